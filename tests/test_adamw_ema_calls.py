"""The update in one pass as a PyTorch operator: what it says of itself, under torch.compile, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from update_lists import BETAS, DECAYS, EPS, FULL, GROUP, OPTIONS, all_words, compiled, scalars, used, words

from sra_fast.kernels import library
from sra_fast.kernels.adamw_ema import Lists, Scalars, adamw_ema
from sra_fast.kernels.gradient_norm import gradient_norm


def arguments(lists: Lists, given: Scalars, zero_gradients: bool = False) -> tuple:
    return (*map(list, lists), *given, GROUP, list(DECAYS), *BETAS, EPS, zero_gradients)


@compiled
@pytest.mark.parametrize("absent", [(), ("ema", "teacher"), ("gradients", "m", "v"), ("student", "teacher")], ids=str)
def test_opcheck_finds_nothing(absent: tuple[str, ...]) -> None:
    lists = used()._replace(**{name: [] for name in absent})
    torch.library.opcheck(torch.ops.sra_fast.adamw_ema_.default, arguments(lists, scalars(), zero_gradients=True))


@compiled
def test_what_is_changed_is_annotated_and_nothing_else() -> None:
    schema = torch.ops.sra_fast.adamw_ema_.default._schema
    changed = [argument.name for argument in schema.arguments if argument.alias_info and argument.alias_info.is_write]
    assert changed == [*Lists._fields, "step", "skipped"]
    assert schema.returns == []


@compiled
def test_a_compiled_graph_gives_the_same_bits() -> None:
    def step(lists: Lists, given: Scalars) -> Tensor:
        norm = gradient_norm(lists.gradients)
        adamw_ema(lists, given._replace(norm=norm), **OPTIONS)
        return norm + lists.student[0].float().sum()  # must see the new copy

    found = []
    for function in (step, torch.compile(step, fullgraph=True)):
        lists, given = used(), scalars(clip=1.0)
        results = [function(lists, given) for _ in range(2)]
        found.append([*all_words(lists, given), words(results)])
    assert found[0] == found[1]


@compiled
def test_fake_tensors_pass_through() -> None:
    lists, given = used(), scalars()
    with FakeTensorMode() as mode:
        fakes = Lists(*([mode.from_tensor(t) for t in part] for part in lists))
        rest = [mode.from_tensor(t) for t in given[1:]]
        norm = gradient_norm(fakes.gradients)
        assert (norm.shape, norm.dtype, norm.device.type) == ((), FULL, "cpu")
        assert adamw_ema(fakes, Scalars(norm, *rest), **OPTIONS) is None


# What it refuses


def swapped(part: str, index: int, change: Callable[[Tensor], Tensor]) -> Callable[[dict], None]:
    def apply(call: dict) -> None:
        call["lists"] = call["lists"]._replace(
            **{part: [change(t) if i == index else t for i, t in enumerate(getattr(call["lists"], part))]}
        )

    return apply


def without(*parts: str) -> Callable[[dict], None]:
    return lambda call: call.update(lists=call["lists"]._replace(**{part: [] for part in parts}))


def scalar(name: str, value: Tensor) -> Callable[[dict], None]:
    return lambda call: call.update(given=call["given"]._replace(**{name: value}))


def halves(part: str) -> Callable[[dict], None]:
    return lambda call: call.update(lists=call["lists"]._replace(**{part: [t.half() for t in call["lists"].student]}))


PARTS, MASTERS, COPIES = Lists._fields, ("weights", "m", "v", "ema"), ("student", "teacher")
BAD: dict[str, tuple[Callable[[dict], None], str]] = {
    **{
        f"{part} short": (
            lambda call, part=part: getattr(call["lists"], part).pop(),
            rf"{part} has 2 tensors.* 3 in we",
        )
        for part in PARTS
        if part != "weights"
    },
    **{f"{part} of float64": (swapped(part, 0, Tensor.double), rf"{part}\[0\]: dtype Double given") for part in PARTS},
    **{f"{part} of halves": (swapped(part, 0, Tensor.half), rf"{part}\[0\]: dtype Half .* Float$") for part in MASTERS},
    **{
        f"{part} mixed": (swapped(part, 2, Tensor.half), rf"{part}\[2\]: dtype Half .* of {part}\[0\], ")
        for part in ("gradients", *COPIES)
    },
    **{
        f"{part} of another shape": (
            swapped(part, 1, lambda t: t.reshape(4, 6)),
            rf"{part}\[1\]: shape \(4, 6\).*\(6, 4\)",
        )
        for part in PARTS
        if part != "weights"
    },
    **{
        f"{part} strided": (swapped(part, 1, lambda t: t.t().contiguous().t()), rf"{part}\[1\]: not contiguous")
        for part in PARTS
    },
    **{f"{part} absent": (without(part), "gradients, m and v have [03], ") for part in ("gradients", "m", "v")},
    "no elements": (swapped("m", 1, lambda t: t.new_empty(0)), r"m\[1\]: shape \(0,\) given.*weights\[1\], \(6, 4\)"),
    "teacher of no ema": (without("ema"), "teacher has 3 tensors, ema has none"),
    "weights absent": (without("weights"), "gradients has 3 tensors, weights has none"),
    "two kinds of copies": (halves("teacher"), r"teacher\[0\]: dtype Half given.*student\[0\], BFloat16"),
    "few groups": (lambda call: call.update(group=[0, 1]), "group has 2 numbers; must have one for each of the 3"),
    "group beyond": (lambda call: call.update(group=[0, 1, 2]), r"group\[2\]: 2 given; must be in \[0, 2\)"),
    "group below": (lambda call: call.update(group=[0, -1, 1]), r"group\[1\]: -1 given"),
    "no decay": (lambda call: call.update(weight_decay=[], group=[]), "weight_decay is empty"),
    "three rates": (
        scalar("lr", torch.ones(3)),
        r"lr: Float of shape \(3,\) on cpu given; must be Float of 2 elements",
    ),
    "strided rates": (scalar("lr", torch.ones(4)[::2]), "lr: .*contiguous"),
    "two norms": (scalar("norm", torch.ones(2)), r"norm: Float of shape \(2,\).*1 element,"),
    "no clip": (scalar("clip", torch.ones(0)), r"clip: Float of shape \(0,\)"),
    **{
        f"{name} of another dtype": (
            scalar(name, torch.ones((), dtype=torch.float64)),
            rf"{name}: Double of shape \(\)",
        )
        for name in Scalars._fields
    },
    "step of int32": (scalar("step", torch.ones((), dtype=torch.int32)), "step: Int of .* must be Long of 1 element"),
}


@compiled
@pytest.mark.parametrize("name", BAD)
def test_a_bad_call_is_refused_by_name_and_changes_nothing(name: str) -> None:
    spoil, said = BAD[name]
    lists, given = used(shapes=[(3,), (6, 4), (5,)]), scalars(step=2)
    held, before = Lists(*map(list, lists)), all_words(lists, given)
    call = {"lists": lists, "given": given, "group": [0, 1, 0], "weight_decay": DECAYS}
    spoil(call)
    with pytest.raises(RuntimeError, match=rf"^adamw_ema_: {said}"):
        adamw_ema(call.pop("lists"), call.pop("given"), betas=BETAS, eps=EPS, zero_gradients=True, **call)
    assert all_words(held, given) == before


@compiled
@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or bool(library.why_unavailable(on_gpu=True)), reason="needs an NVIDIA GPU and GPU code"
)
def test_a_tensor_on_another_device_is_refused_by_name() -> None:
    lists = Lists(*([t.cuda() for t in part] for part in used()))
    given = Scalars(*(t.cuda() for t in scalars()))
    lists.m[1] = lists.m[1].cpu()
    with pytest.raises(RuntimeError, match=r"^adamw_ema_: m\[1\]: on cpu; must be on cuda:0 as weights\[0\]"):
        adamw_ema(lists, given, **OPTIONS)
    lists.m[1] = lists.m[1].cuda()
    with pytest.raises(RuntimeError, match=r"^adamw_ema_: clip: Float of shape \(\) on cpu"):
        adamw_ema(lists, given._replace(clip=torch.zeros(())), **OPTIONS)
