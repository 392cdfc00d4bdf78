"""The update of all parameters in one pass: accuracy against torch.optim.AdamW and a plain EMA in float64, bits, and
the PyTorch operator."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache, partial
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from update_lists import (
    BETAS,
    BF16,
    DECAYS,
    EMA,
    EPS,
    FP16,
    FP32,
    GROUP,
    ONE,
    OPTIONS,
    RATES,
    SHAPES,
    all_words,
    compiled,
    copied,
    draw,
    either,
    scalars,
    threads,
    used,
    words,
)

from sra_fast.kernels.adamw_ema import Lists, Scalars, adamw_ema, adamw_ema_ref, parameter_ref
from sra_fast.kernels.gradient_norm import gradient_norm, gradient_norm_ref


def fresh(copies: torch.dtype | None) -> Lists:
    """Before the first update: moments and copies are zero, the EMA equals the weights, there are no gradients yet."""
    weights = draw(0)
    m, v = ([torch.zeros_like(w) for w in weights] for _ in range(2))
    student, teacher = ([torch.zeros_like(w, dtype=copies) for w in weights if copies] for _ in range(2))
    return Lists([], weights, m, v, [w.clone() for w in weights], student, teacher)


class Mix(NamedTuple):
    gradients: torch.dtype
    clip: float
    loss_scale: float


def gradients_of(mix: Mix, k: int) -> list[Tensor]:
    """Norms on both sides of the clip; scaled by what is no power of two."""
    return [(mix.loss_scale * g).to(mix.gradients) for g in draw(100 + k, scale=10 ** (k % 5 - 4))]


@cache
def torchs(mix: Mix, dtype: torch.dtype, steps: int) -> dict[str, list[Tensor]]:
    weights = [w.to(dtype).requires_grad_() for w in draw(0)]
    ema = [w.detach().clone() for w in weights]
    groups = [
        {
            "params": [w for w, own in zip(weights, GROUP, strict=True) if own == i],
            "lr": float(lr),
            "weight_decay": decay,
        }
        for i, (lr, decay) in enumerate(zip(RATES, DECAYS, strict=True))
    ]
    adamw, keep = torch.optim.AdamW(groups, betas=BETAS, eps=EPS), float(torch.tensor(EMA))
    for k in range(steps):
        for weight, g in zip(weights, gradients_of(mix, k), strict=True):
            weight.grad = g.to(dtype) / mix.loss_scale
        if mix.clip:
            torch.nn.utils.clip_grad_norm_(weights, mix.clip)
        adamw.step()
        for average, weight in zip(ema, weights, strict=True):
            average.mul_(keep).add_(weight.detach(), alpha=1 - keep)
    moments = [[adamw.state[weight][name] for weight in weights] for name in ("exp_avg", "exp_avg_sq")]
    return {"weights": [w.detach() for w in weights], "m": moments[0], "v": moments[1], "ema": ema}


def assert_as_exact(got: Lists, mix: Mix, steps: int) -> None:
    truth, theirs = torchs(mix, torch.float64, steps), torchs(mix, FP32, steps)
    for name, expected in truth.items():
        error, allowed = (
            max(float((a - b).abs().max()) for a, b in zip(results, expected, strict=True) if b.numel())
            for results in (getattr(got, name), theirs[name])
        )
        largest = max(float(b.abs().max()) for b in expected if b.numel())
        assert 0 < allowed < 1e-4 * largest, "the comparison shows nothing"
        # Floor: our worst element may fall where theirs got lucky; one rounding of the largest value.
        assert error <= 2 * allowed + 2**-24 * largest, name


@either
@pytest.mark.parametrize(
    ("mix", "copies"),
    [
        (Mix(FP32, 0.0, 1.0), None),
        (Mix(FP32, 1.0, 1.0), FP16),
        (Mix(BF16, 1.0, 3.0), BF16),
        (Mix(FP16, 1.0, 96.0), FP16),
    ],
    ids=str,
)
def test_a_hundred_updates_err_at_most_twice_as_much_as_torchs(call, mix: Mix, copies: torch.dtype | None) -> None:
    norm_of = gradient_norm if call is adamw_ema else gradient_norm_ref
    lists, state = fresh(copies), scalars(clip=mix.clip, loss_scale=mix.loss_scale)
    norms = []
    for k in range(100):
        lists = lists._replace(gradients=gradients_of(mix, k))
        if k == 50:  # a skipped update leaves no trace
            skipped = state._replace(norm=torch.tensor(math.nan))
            call(lists._replace(gradients=[g * math.nan for g in lists.gradients]), skipped, **OPTIONS)
        state = state._replace(norm=norm_of(lists.gradients))
        call(lists, state, **OPTIONS)
        norms.append(float(state.norm) / mix.loss_scale)
    assert (int(state.step), int(state.skipped)) == (100, 1)
    assert min(norms) < 1 < max(norms)
    assert_as_exact(lists, mix, 100)
    for copy, source in ((lists.student, lists.weights), (lists.teacher, lists.ema)):
        assert words(copy) == (words([w.to(copies) for w in source]) if copies else [])


def test_the_compiled_reference_is_as_exact() -> None:
    mix = Mix(BF16, 1.0, 3.0)
    call = partial(adamw_ema_ref, parameter=torch.compile(parameter_ref, fullgraph=True, dynamic=True))
    lists, state = fresh(BF16), scalars(clip=mix.clip, loss_scale=mix.loss_scale)
    for k in range(20):
        lists = lists._replace(gradients=gradients_of(mix, k))
        call(lists, state._replace(norm=gradient_norm_ref(lists.gradients)), **OPTIONS)
    assert_as_exact(lists, mix, 20)
    assert words(lists.student) == words([w.bfloat16() for w in lists.weights])
    assert words(lists.teacher) == words([w.bfloat16() for w in lists.ema])
    before = all_words(lists, state)[1:7]
    call(lists, state._replace(norm=torch.tensor(math.inf)), **OPTIONS)
    assert all_words(lists, state)[1:7] == before


@either
@pytest.mark.parametrize("norm", [math.nan, -math.inf])
@pytest.mark.parametrize("zero_gradients", [False, True])
def test_a_norm_that_is_not_finite_changes_no_bit(call, norm: float, zero_gradients: bool) -> None:
    lists, state = used(), scalars(norm, step=7, clip=1.0)
    lists.gradients[1][3] = math.nan
    for part in lists[1:]:
        part[1][:5] = torch.tensor([-0.0, math.inf, -math.inf, math.nan, 1e-41])
    for copies, sources in ((lists.student, lists.weights), (lists.teacher, lists.ema)):
        for copy, source in zip(copies, sources, strict=True):
            copy.copy_(source)
    before = all_words(lists, state)
    call(lists, state, **OPTIONS, zero_gradients=zero_gradients)
    if zero_gradients:
        assert not any(g.any() for g in lists.gradients)
    after = all_words(lists, state._replace(skipped=torch.tensor(0)))
    assert after[zero_gradients:] == before[zero_gradients:]
    assert (int(state.step), int(state.skipped)) == (7, 1)


@either
def test_gradients_and_rates_do_not_change_unless_gradients_are_to_be_zeroed(call) -> None:
    lists, state = used(gradients=BF16), scalars(2.0, clip=1.0, loss_scale=4.0)
    before, rates = words(lists.gradients), words([*state[:1], *state[3:]])
    call(lists, state, **OPTIONS)
    assert words(lists.gradients) == before
    assert words([*state[:1], *state[3:]]) == rates
    call(lists, state, **OPTIONS, zero_gradients=True)
    assert not any(g.view(torch.int16).any() for g in lists.gradients)  # all are +0


@either
@pytest.mark.parametrize("copies", [BF16, FP16], ids=str)
def test_parts_alone_give_the_same_bits_as_all_together(call, copies: torch.dtype) -> None:
    complete = used(copies=copies)
    alone = copied(complete)
    call(complete, scalars(), **OPTIONS)
    adam = copied(alone)._replace(ema=[], student=[], teacher=[])
    call(adam, scalars(), **OPTIONS)
    assert [*map(words, adam[1:4])] == [*map(words, complete[1:4])]
    # EMA and copies alone, from the updated weights.
    follow = copied(alone)._replace(gradients=[], weights=[w.clone() for w in complete.weights], m=[], v=[], student=[])
    call(follow, state := scalars(step=5), **OPTIONS)
    assert [words(part) for part in follow[1:]] == [
        *map(words, (complete.weights, [], [], complete.ema, [], complete.teacher))
    ]
    assert int(state.step) == 6
    only = Lists([], [w.clone() for w in complete.weights], [], [], [], student=copied(alone).student)
    call(only, scalars(), **OPTIONS)
    assert [*map(words, (only.weights, only.student))] == [*map(words, (complete.weights, complete.student))]


@either
def test_a_copy_without_elements_stands_for_no_copy(call) -> None:
    complete = used()
    some, none = copied(complete), torch.empty(0, dtype=BF16)
    some = some._replace(teacher=[none if i % 2 else copy for i, copy in enumerate(some.teacher)])
    call(complete, scalars(), **OPTIONS)
    call(some, scalars(), **OPTIONS)
    assert [*map(words, some[:6])] == [*map(words, complete[:6])]
    assert words(some.teacher) == [b"" if i % 2 else word for i, word in enumerate(words(complete.teacher))]


@either
def test_one_rate_for_all_groups_and_no_groups(call) -> None:
    results = []
    for lr, group in ((ONE, GROUP), (ONE.view(1), GROUP), (ONE.expand(2).clone(), GROUP)):
        call(lists := used(), scalars(lr=lr), **OPTIONS | {"group": group})
        results.append([*map(words, lists)])
    assert results[0] == results[1] == results[2]
    first = []
    for group in ([], [0] * len(SHAPES)):
        call(lists := used(), scalars(), **OPTIONS | {"group": group})
        first.append([*map(words, lists)])
    assert first[0] == first[1] != results[0]


@either
def test_bits_do_not_depend_on_the_number_of_threads(call) -> None:
    results = []
    for count in (1, 2, 4):
        lists, state = used(shapes=[(300, 77), (5,), (16384,), (16385,), (99_991,)]), scalars(lr=ONE)
        with threads(count):
            for _ in range(2):
                call(lists, state, betas=BETAS, eps=EPS)
        results.append(all_words(lists, state))
    assert all(result == results[0] for result in results)


@either
@pytest.mark.parametrize(("gradients", "copies"), [(FP32, BF16), (BF16, FP16), (FP16, BF16)], ids=str)
def test_many_unaligned_views_give_the_same_bits_as_tensors(call, gradients, copies) -> None:
    """Cut from one buffer without padding, at odd offsets; the elements before and after them do not change."""
    count = 1000 if call is adamw_ema else 50
    shapes = [(37 * i % 61,) if i % 50 else (1001 + i,) for i in range(count)]
    apart = used(gradients=gradients, copies=copies, shapes=shapes)
    buffers = [torch.cat([torch.full((3,), 7.0), *part, torch.full((3,), 7.0)]).to(part[0].dtype) for part in apart]
    sizes = [3, *(size for (size,) in shapes), 3]
    views = Lists(*(list(buffer.split(sizes)[1:-1]) for buffer in buffers))
    assert {view.data_ptr() % 16 for view in views.weights} == {0, 4, 8, 12}
    for lists in (apart, views):
        call(lists, scalars(lr=ONE, clip=0.5), betas=BETAS, eps=EPS, zero_gradients=True)
    assert [*map(words, views)] == [*map(words, apart)]
    assert all(buffer[edge].tolist() == [7.0] * 3 for buffer in buffers for edge in (slice(3), slice(-3, None)))


@compiled
@pytest.mark.slow
def test_streaming_stores_give_the_same_bits() -> None:
    """64 MiB of copies in one call bypass the caches; in two calls of half the size they do not."""
    size = (1 << 24) + 77
    part = torch.randn(size, generator=torch.Generator().manual_seed(0))
    complete = Lists(*([part.clone()] for _ in range(5)), *([part.bfloat16()] for _ in range(2)))
    complete.v[0].abs_()
    halves = Lists(*(list(tensors[0].clone().split(size // 2 + 1)) for tensors in complete))
    adamw_ema(complete, scalars(lr=ONE), betas=BETAS, eps=EPS)
    for i in range(2):
        adamw_ema(Lists(*([tensors[i]] for tensors in halves)), scalars(lr=ONE), betas=BETAS, eps=EPS)
    for one, two in zip(complete, halves, strict=True):
        assert torch.equal(one[0], torch.cat(two))


def arguments(lists: Lists, state: Scalars, zero_gradients: bool = False) -> tuple:
    return (*map(list, lists), *state, GROUP, list(DECAYS), *BETAS, EPS, zero_gradients)


@compiled
@pytest.mark.parametrize("absent", [(), ("ema", "teacher"), ("gradients", "m", "v", "student")], ids=str)
def test_opcheck_finds_nothing(absent: tuple[str, ...]) -> None:
    lists = used()._replace(**{name: [] for name in absent})
    torch.library.opcheck(torch.ops.sra_fast.adamw_ema_.default, arguments(lists, scalars(), zero_gradients=True))


@compiled
def test_the_schema_annotates_exactly_the_changed_arguments() -> None:
    schema = torch.ops.sra_fast.adamw_ema_.default._schema
    changed = [argument.name for argument in schema.arguments if argument.alias_info and argument.alias_info.is_write]
    assert changed == [*Lists._fields, "step", "skipped"]
    assert schema.returns == []


@compiled
def test_a_compiled_graph_gives_the_same_bits() -> None:
    def step(lists: Lists, state: Scalars) -> Tensor:
        norm = gradient_norm(lists.gradients)
        adamw_ema(lists, state._replace(norm=norm), **OPTIONS)
        return norm + lists.student[0].float().sum()  # must see the new copy

    results = []
    for function in (step, torch.compile(step, fullgraph=True)):
        lists, state = used(), scalars(clip=1.0)
        outputs = [function(lists, state) for _ in range(2)]
        results.append([*all_words(lists, state), words(outputs)])
    assert results[0] == results[1]


@compiled
def test_fake_tensors_pass_through() -> None:
    lists, state = used(), scalars()
    with FakeTensorMode() as mode:
        fakes = Lists(*([mode.from_tensor(t) for t in part] for part in lists))
        rest = [mode.from_tensor(t) for t in state[1:]]
        norm = gradient_norm(fakes.gradients)
        assert (norm.shape, norm.dtype, norm.device.type) == ((), FP32, "cpu")
        assert adamw_ema(fakes, Scalars(norm, *rest), **OPTIONS) is None


Call = dict  # lists, scalars, group, weight_decay
Change = Callable[[Call], None]
WRONG_DTYPE = torch.ones((), dtype=torch.float64)


def replaced(part: str, index: int, change: Callable[[Tensor], Tensor]) -> Change:
    """One tensor of a list."""

    def apply(call: Call) -> None:
        tensors = list(getattr(call["lists"], part))
        tensors[index] = change(tensors[index])
        call["lists"] = call["lists"]._replace(**{part: tensors})

    return apply


def with_lists(**parts: list[Tensor]) -> Change:
    return lambda call: call.update(lists=call["lists"]._replace(**parts))


def with_scalar(name: str, value: Tensor) -> Change:
    return lambda call: call.update(scalars=call["scalars"]._replace(**{name: value}))


def with_groups(group: list[int], weight_decay: tuple[float, ...] = DECAYS) -> Change:
    return lambda call: call.update(group=group, weight_decay=weight_decay)


REFUSED: list[tuple[str, Change]] = [  # the beginning of the message, as a regular expression
    *((rf"{part}\[1\]: not contiguous", replaced(part, 1, lambda t: t.t().contiguous().t())) for part in Lists._fields),
    *((rf"{part}\[0\]: dtype Double given", replaced(part, 0, Tensor.double)) for part in Lists._fields),
    *((rf"{part}\[0\]: dtype Half .* Float$", replaced(part, 0, Tensor.half)) for part in ("weights", "m", "v", "ema")),
    *((rf"{name}: Double of shape \(\)", with_scalar(name, WRONG_DTYPE)) for name in Scalars._fields),
    *((r"gradients, m and v have [03], ", with_lists(**{part: []})) for part in ("gradients", "m", "v")),
    (r"gradients\[2\]: dtype Half .* of gradients\[0\], ", replaced("gradients", 2, Tensor.half)),
    (r"m has 2 tensors.* 3 in we", lambda call: call["lists"].m.pop()),
    (r"ema\[1\]: shape \(4, 6\).*\(6, 4\)", replaced("ema", 1, lambda t: t.reshape(4, 6))),
    (r"m\[1\]: shape \(0,\) given.*weights\[1\], \(6, 4\)", replaced("m", 1, lambda t: t.new_empty(0))),
    (r"teacher has 3 tensors, ema has none", with_lists(ema=[])),
    (r"gradients has 3 tensors, weights has none", with_lists(weights=[])),
    (
        r"teacher\[0\]: dtype Half given.*student\[0\], BFloat16",
        with_lists(teacher=[torch.zeros(shape, dtype=FP16) for shape in ((3,), (6, 4), (5,))]),
    ),
    (r"group has 2 numbers; must have one for each of the 3", with_groups([0, 1])),
    (r"group\[2\]: 2 given; must be in \[0, 2\)", with_groups([0, 1, 2])),
    (r"group\[1\]: -1 given", with_groups([0, -1, 1])),
    (r"weight_decay is empty", with_groups([], ())),
    (r"lr: Float of shape \(3,\) on cpu given; must be Float of 2 elements", with_scalar("lr", torch.ones(3))),
    (r"lr: .*contiguous", with_scalar("lr", torch.ones(4)[::2])),
    (r"norm: Float of shape \(2,\).*1 element,", with_scalar("norm", torch.ones(2))),
    (r"step: Int of .* must be Long of 1 element", with_scalar("step", torch.ones((), dtype=torch.int32))),
]


@compiled
@pytest.mark.parametrize(("message", "change"), REFUSED, ids=[message for message, _ in REFUSED])
def test_an_invalid_call_is_refused_and_changes_nothing(message: str, change: Change) -> None:
    lists, state = used(shapes=[(3,), (6, 4), (5,)]), scalars(step=2)
    untouched, before = Lists(*map(list, lists)), all_words(lists, state)
    call = {"lists": lists, "scalars": state, "group": [0, 1, 0], "weight_decay": DECAYS}
    change(call)
    with pytest.raises(RuntimeError, match=rf"^adamw_ema_: {message}"):
        adamw_ema(**call, betas=BETAS, eps=EPS, zero_gradients=True)
    assert all_words(untouched, state) == before
