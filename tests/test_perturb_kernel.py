"""The perturb kernel against its formulas in float64 on the same uniforms, in Triton's interpreter or on a GPU."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from interpreter import (
    DEVICE,
    assert_same,
    assert_within_twice,
    guarded,
    kernel,
    largest,
    mutant,
    poisoned,  # noqa: F401
    run_interpreted,
    surrounded,
)
from torch import Tensor

from sra_fast.kernels import perturb as ours
from sra_fast.kernels.perturb import Perturbed, Settings, Stored, path_coefficients, perturb, perturb_ref
from sra_fast.kernels.philox import Draw, uniforms

EPS = torch.finfo(torch.float32).eps
FULL, HALF, PIXELS = torch.float32, torch.float16, torch.uint8
NUMBERS = (0, 2**40 + 3, 2**32 - 1, 2**32, 2**63 - 1, 7, 8)  # of images: both words of the counter, to their limits
LIMIT = 2**64 - 1
Batch = tuple[Tensor, Tensor, Tensor, Settings, Stored | None]


class Case(NamedTuple):
    shape: tuple[int, ...]  # of x: (B, C, ...)
    path: str = "linear"
    times: str = "uniform"
    shared: bool = True
    seed: int = 3
    dropout: float = 0.3
    t_max: float = 0.2
    stored: str = ""  # "moments" or "values"; without it the data are x
    dtype: torch.dtype = FULL

    @property
    def settings(self) -> Settings:
        return Settings(self.seed, self.path, self.times, self.t_max, 10, self.dropout, self.shared)


# One element, one image, primes, whole programs of 1,024 elements, several of them, and one element more. Channels of
# 77, 35, 121 and 437 elements end inside a program and inside a Philox call; those of 256 with one.
CASES = (
    Case((1, 1, 1, 1)),
    Case((7, 1, 8, 8), "cosine", "lognormal", seed=1),
    Case((5, 3, 7, 11), "linear", "lognormal", shared=False, seed=LIMIT),
    Case((3, 4, 32, 32), "cosine", seed=0x9E3779B97F4A7C15, t_max=1.0),
    Case((2, 3, 1025), shared=False, dropout=0.0),
    Case((2, 1024), "linear", "lognormal", dropout=1.0),
    Case((1, 1, 1, 1), stored="moments"),
    Case((5, 3, 5, 7), stored="moments", dtype=HALF, shared=False, seed=LIMIT),
    Case((3, 4, 16, 16), "cosine", "lognormal", stored="moments", dtype=HALF),
    Case((2, 16, 11, 11), "cosine", stored="moments", seed=1),
    Case((2, 1, 3, 347), stored="moments", dtype=PIXELS),
    Case((7, 3, 7, 11), stored="values", dtype=PIXELS),
    Case((2, 4, 19, 23), "cosine", stored="values", dtype=HALF),
    Case((2, 3), stored="values"),
)


def inputs(case: Case) -> Batch:
    """Data with NaN before and after, as everything that is read has; a posterior as wide as its means are apart; and
    for each channel another shift and scale, which make x of the order of 1."""
    generator = torch.Generator().manual_seed(0)
    channels = case.shape[1]
    count = 2 * channels if case.stored == "moments" else channels
    data = torch.randn(case.shape[0], count, *case.shape[2:], generator=generator)
    data[:, channels:].abs_()
    if case.dtype == PIXELS:
        data = torch.randint(256, data.shape, generator=generator)
    size = 100.0 if case.dtype == PIXELS else 1.0
    shift, scale = size * torch.randn(channels, generator=generator), (1 + torch.arange(channels)) / channels / size
    number, labels = torch.tensor(NUMBERS[: len(data)]), torch.arange(len(data))
    stored = [surrounded(value.to(DEVICE)) for value in (shift, scale)]
    batch = (surrounded(value.to(DEVICE)) for value in (data.to(case.dtype), labels, number))
    return (*batch, case.settings, Stored(case.stored == "moments", *stored) if case.stored else None)


def normals_in_float64(seed: int, number: Tensor, draw: Draw, count: int) -> Tensor:
    even = count + count % 2
    u = uniforms(seed, number, draw, even).double()
    radius, angle = (-2 * u[:, 0::2].log()).sqrt(), 2 * math.pi * u[:, 1::2]
    return torch.stack([radius * angle.cos(), radius * angle.sin()], dim=-1).flatten(1)[:, :count]


def clean(data: Tensor, number: Tensor, seed: int, stored: Stored | None) -> tuple[Tensor, float]:
    """x in float64, and the largest value on the way to it, in x's units."""
    z = data.double()
    if stored is None:
        return z, largest(z)
    if stored.posterior:
        channels = z.shape[1] // 2
        mean, std = z[:, :channels], z[:, channels:]
        z = mean + std * normals_in_float64(seed, number, Draw.POSTERIOR, mean[0].numel()).view_as(mean)
    shift, scale = (value.double().view(-1, *[1] * (z.ndim - 2)) for value in stored[1:])
    return (z - shift) * scale, largest((z.abs() + shift.abs()) * scale)


def truth(data: Tensor, labels: Tensor, number: Tensor, settings: Settings, stored: Stored | None) -> Perturbed:
    """The formulas of perturb.py in float64."""
    seed, (x, _) = settings.seed, clean(data, number, settings.seed, stored)
    column = (-1, *[1] * (x.ndim - 1))
    noise = normals_in_float64(seed, number, Draw.NOISE, x[0].numel()).view_as(x)
    t = uniforms(seed, number, Draw.TIME)[:, 0].double()
    if settings.times == "lognormal":
        s = normals_in_float64(seed, number, Draw.TIME, 1)[:, 0].exp()
        t = s / (1 + s) if settings.path == "linear" else s.atan() * (2 / math.pi)
    t_teacher = (t - settings.t_max * uniforms(seed, number, Draw.TEACHER_TIME)[:, 0].double()).clamp(0, 1)
    alpha, sigma, d_alpha, d_sigma = (c.view(column) for c in path_coefficients(settings.path, t))
    a, b, _, _ = (c.view(column) for c in path_coefficients(settings.path, t_teacher))
    x_t, x_teacher, target = alpha * x + sigma * noise, a * x + b * noise, d_alpha * x + d_sigma * noise
    rate = torch.tensor(settings.label_dropout)

    def dropped(draw: Draw) -> Tensor:
        return torch.where(uniforms(seed, number, draw)[:, 0] < rate, 10, labels)

    student = dropped(Draw.LABEL_DROPOUT)
    teacher = student if settings.shared_label_dropout else dropped(Draw.TEACHER_LABEL_DROPOUT)
    return Perturbed(t, t_teacher, x_t, x_teacher, target, student, teacher)


def compare(function: Callable[..., tuple[Tensor, ...]], case: Case) -> None:
    """Raise AssertionError if something of a kernel is wrong.

    Labels and uniform times are equal in every bit. Other errors may be twice the reference's own, as logarithm, sine
    and cosine differ between libraries, and four units in the last place of the largest value: a rounding for each
    factor, each product and the sum. On a GPU exp adds as many. A sample of a posterior, its shift and scale are as
    many operations again, on the largest values that are met there.
    """
    batch = inputs(case)
    with guarded():
        got = function(*batch)
    own, best = perturb_ref(*batch), truth(*batch)
    exact = {"labels", "teacher_labels"} | ({"t"} if case.times == "uniform" else set())
    for name, value, theirs, right in zip(Perturbed._fields, got, own, best, strict=True):
        if name in exact:
            assert torch.equal(value, theirs), f"{name} is {value.tolist()}, not {theirs.tolist()}"
            assert torch.equal(value.double(), right.double()), f"{name} is {value.tolist()}, not {right.tolist()}"
    units = 8 if DEVICE.type == "cuda" and case.times == "lognormal" else 4
    on_the_way = 4 * EPS * clean(batch[0], batch[2], case.seed, batch[4])[1] if case.stored else 0.0
    floors = [units * EPS * largest(value) for value in best[:2]]
    floors += [units * EPS * largest(value) + 2 * on_the_way for value in best[2:5]]  # a coefficient is at most pi / 2
    assert_within_twice(got[:5], own[:5], best[:5], floors)


def test_kernels_in_the_interpreter() -> None:
    run_interpreted(__file__)


@kernel
@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernel_is_as_exact_as_pytorch(case: Case) -> None:
    compare(perturb, case)


# The interpreter runs one program after the other.
@kernel
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("case", CASES if DEVICE.type == "cuda" else CASES[1:9:7], ids=str)
def test_two_runs_of_a_kernel_are_equal_in_every_bit(case: Case) -> None:
    batch = inputs(case)
    assert_same(perturb(*batch), perturb(*batch))


@kernel
@pytest.mark.parametrize("stored", ["", "moments"])
def test_kernel_draws_the_same_for_an_image_in_any_batch(stored: str) -> None:
    data, labels, number, *fixed = inputs(Case((6, 3, 7, 11), "cosine", "lognormal", shared=False, stored=stored))
    whole = perturb(data, labels, number, *fixed)
    for rows in ([3], [4, 0], [2, 1, 5]):
        part = perturb(data[rows], labels[rows], number[rows], *fixed)
        assert_same(part, [value[rows] for value in whole])


@kernel
def test_kernel_samples_the_posterior_apart_from_the_noise() -> None:
    """Of a posterior of mean 0 and deviation 1 x is one stream, and x_t at t = 1 is the other."""
    case = Case((2, 1, 16, 16), stored="moments")
    data, labels, number, settings, _ = inputs(case)
    data[:, :1], data[:, 1:] = 0, 1
    stored = Stored(True, torch.zeros(1, device=DEVICE), torch.ones(1, device=DEVICE))
    t, _, x_t, _, target, *_ = perturb(data, labels, number, settings, stored)
    t = t.view(-1, 1, 1, 1)
    x, noise = x_t - t * target, x_t + (1 - t) * target  # of the linear path
    for value, draw in ((x, Draw.POSTERIOR), (noise, Draw.NOISE)):
        right = normals_in_float64(case.seed, number, draw, 256).view_as(value)
        torch.testing.assert_close(value.double(), right, rtol=0, atol=1e-5)
    assert abs(float(torch.corrcoef(torch.stack([x.flatten(), noise.flatten()]))[0, 1])) < 4 / math.sqrt(512)


@kernel
@pytest.mark.parametrize(("stored", "shared"), [("", True), ("", False), ("moments", True)])
def test_kernel_is_an_op_that_torch_can_check(stored: str, shared: bool) -> None:
    *batch, settings, how = inputs(Case((2, 1, 3, 3), shared=shared, stored=stored, dtype=HALF if stored else FULL))
    shift, scale = (None, None) if how is None else how[1:]
    torch.library.opcheck(torch.ops.sra_fast.perturb.default, (*batch, shift, scale, bool(stored), *settings))


@kernel
@pytest.mark.parametrize("stored", ["", "values", "moments"])
def test_kernel_compiles_without_a_graph_break_to_the_same_bits(stored: str) -> None:
    *batch, settings, how = inputs(Case((2, 1, 3, 3), seed=LIMIT, stored=stored))
    call = partial(perturb, settings=settings, stored=how)
    assert_same(torch.compile(call, fullgraph=True, backend="aot_eager")(*batch), call(*batch))


def moments(batch: Batch) -> Batch:
    return inputs(Case(batch[0].shape, stored="moments"))


def changed(batch: Batch, place: int, change: Callable) -> Batch:
    return (*batch[:place], change(batch[place]), *batch[place + 1 :])


WRONG: dict[str, Callable[[Batch], Batch]] = {
    "path: 'spiral' given; must be one of linear, cosine": lambda b: changed(b, 3, lambda s: s._replace(path="spiral")),
    "times: 'never' given; must be one of uniform, lognormal": lambda b: changed(
        b, 3, lambda s: s._replace(times="never")
    ),
    "data: torch.float64 given; must be one of torch.float32": lambda b: changed(b, 0, Tensor.double),
    "data: torch.uint8 given; must be one of torch.float32": lambda b: changed(b, 0, Tensor.byte),
    "data: torch.float16 given; must be one of torch.float32": lambda b: changed(b, 0, Tensor.half),
    "data: torch.float64 given; must be one of torch.float32, torch.float16, torch.uint8": lambda b: changed(
        moments(b), 0, Tensor.double
    ),
    "data: shape (0, 1, 4, 5) given": lambda b: (*(value[:0] for value in b[:3]), *b[3:]),
    "data: shape (2,) given; must be (B, C, ...)": lambda b: changed(b, 0, lambda x: x[:, 0, 0, 0]),
    "data: shape (2, 1, 4, 5) given; must be (B, 2C, ...): means, then deviations": lambda b: changed(
        moments(b), 0, lambda x: x[:, :1]
    ),
    "data: strides (20, 20, 1, 4) given; must be contiguous": lambda b: changed(b, 0, lambda x: x.mT.contiguous().mT),
    "labels: shape (1,) given; must be (2,)": lambda b: changed(b, 1, lambda x: x[:1]),
    "number: torch.int32 given; must be one of torch.int64": lambda b: changed(b, 2, Tensor.int),
    "number: device meta given; must be that of data, ": lambda b: changed(b, 2, lambda x: x.to("meta")),
    "shift: shape (2,) given; must be (1,)": lambda b: changed(
        moments(b), 4, lambda s: s._replace(shift=s.shift.repeat(2))
    ),
    "scale: shape () given; must be (1,)": lambda b: changed(moments(b), 4, lambda s: s._replace(scale=s.scale[0])),
    "scale: torch.float64 given; must be one of torch.float32": lambda b: changed(
        moments(b), 4, lambda s: s._replace(scale=s.scale.double())
    ),
    "shift: device meta given; must be that of data, ": lambda b: changed(
        moments(b), 4, lambda s: s._replace(shift=s.shift.to("meta"))
    ),
}


@kernel
@pytest.mark.parametrize("message", WRONG)
def test_kernel_refuses_what_it_cannot_take(message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        perturb(*WRONG[message](inputs(Case((2, 1, 4, 5)))))


def test_what_cannot_run_a_kernel_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = torch.zeros(2, 1, 4, 5), torch.arange(2), torch.arange(2), Case((2, 1, 4, 5)).settings
    monkeypatch.setattr(ours, "INTERPRETED", False)
    monkeypatch.setattr(ours, "why_unavailable", lambda: "")
    with pytest.raises(ValueError, match=r"^data: device cpu given; must be a CUDA device$"):
        perturb(*batch)
    monkeypatch.setattr(ours, "why_unavailable", lambda: "there is no GPU")
    with pytest.raises(ValueError, match=r"^a fused kernel cannot run: there is no GPU$"):
        perturb(*batch)


X = "tl.load(data + at, mask=inside, other=0).to(tl.float32)\n        x +="
TO_SCALE = "x = (x - tl.load(shift + channel, mask=inside, other=0)) * tl.load(scale + channel, mask=inside, other=0)"
FAULTS = {  # function, what it has, what it has with a fault
    "no tail": ("_perturb_kernel", "inside, at = element < COUNT", "inside, at = element >= 0"),
    "next sample": ("_perturb_kernel", "tl.load(number + sample)", "tl.load(number + sample + 1)"),
    "next sample's pixels": ("_perturb_kernel", "sample * COUNT + element", "(sample + 1) * COUNT + element"),
    "wrong axis": (
        "_normals",
        "tl.join(tl.join(z0, z2), tl.join(z1, z3))",
        "tl.join(tl.join(z0, z1), tl.join(z2, z3))",
    ),
    "wide counter": ("_normals", "quad(seed, call,", "quad(seed, call.to(tl.uint64),"),
    "high word lost": ("_perturb_kernel", "(image >> 32).to(tl.uint32)", "(image >> 63).to(tl.uint32)"),
    "every program the first": ("_perturb_kernel", "part * BLOCK + tl.arange(0, BLOCK)", "tl.arange(0, BLOCK)"),
    "teacher at the student's time": ("_perturb_kernel", "_coefficients(t_teacher, PATH)", "_coefficients(t, PATH)"),
    "teacher's labels are the student's": ("_perturb_kernel", "low, high, TEACHER_LABEL)", "low, high, LABEL)"),
    "deviation taken for the mean": ("_perturb_kernel", X, X.replace("at,", "at + COUNT,")),
    "mean taken for the deviation": ("_perturb_kernel", "tl.load(data + at + COUNT,", "tl.load(data + at,"),
    "posterior of the noise's stream": ("_perturb_kernel", "low, high, SAMPLE, BLOCK)", "low, high, NOISE, BLOCK)"),
    "scaled before the shift": (
        "_perturb_kernel",
        TO_SCALE,
        "x = x * tl.load(scale + channel, mask=inside, other=0) - tl.load(shift + channel, mask=inside, other=0)",
    ),
    "channel begins one too early": ("_perturb_kernel", "element // AREA", "(element + 1) // AREA"),
    "channel begins a call too late": ("_perturb_kernel", "element // AREA", "element // 4 * 4 // AREA"),
    "moments of the next sample as far as x": ("_perturb_kernel", "at += sample * COUNT", "at += 0 * sample"),
    "written where moments lie": ("_perturb_kernel", "at -= sample * COUNT", "at -= 0 * sample"),
}
# A tail, two programs, channels that end inside a Philox call, and labels that are dropped for one network alone.
FAULTY_CASE = Case((2, 3, 19, 19), shared=False, seed=4, dropout=0.5, stored="moments")


def compare_mutant(folder: Path, function: str, right: str, wrong: str) -> None:
    compare(mutant(folder, "perturb", "perturb", right, wrong, function).perturb, FAULTY_CASE)


@kernel
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_in_a_kernel_is_found(fault: str, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"error .* allowed|wrote outside| is .*, not "):
        compare_mutant(tmp_path, *FAULTS[fault])


@kernel
def test_a_copy_of_the_kernel_without_a_fault_passes(tmp_path: Path) -> None:
    compare_mutant(tmp_path, "_perturb_kernel", TO_SCALE, TO_SCALE)


INTEGERS = {"labels": "*i64", "number": "*i64", "labels_out": "*i64", "teacher_labels_out": "*i64", "seed": "i64"}
SCALARS = {"t_max": "fp32", "null_label": "i32", "label_dropout": "fp32"}


@pytest.mark.parametrize("compute_capability", [80, 90, 100])
def test_compiles_ahead_of_time(compute_capability: int) -> None:
    """With no GPU: 16 bytes a load, nothing on the stack, and no fast logarithm, sine or cosine, whose absolute error
    would make some normal a NaN."""
    pytest.importorskip("triton", reason="Triton is not installed")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    names = ours._perturb_kernel.arg_names
    draws = {"SAMPLE": 0, "NOISE": 1, "TIME": 2, "TEACHER_TIME": 3, "LABEL": 4, "TEACHER_LABEL": 7}
    for data, path, times in (("fp32", "linear", "uniform"), ("fp16", "cosine", "lognormal")):
        sizes = {"PATH": path, "TIMES": times, "SHARED": False, "COUNT": 4096, "AREA": 1024, "BLOCK": ours._CALLS}
        sizes |= draws | ({"POSTERIOR": True} if data == "fp16" else {"POSTERIOR": False, "shift": None, "scale": None})
        types = dict.fromkeys(names, "*fp32") | {"data": f"*{data}"} | INTEGERS | SCALARS
        types |= dict.fromkeys(sizes, "constexpr")
        aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if types[name].startswith("*")}
        fixed = {(names.index(name),): value for name, value in sizes.items()}
        made = compile(
            ASTSource(ours._perturb_kernel, types, fixed, aligned), target=GPUTarget("cuda", compute_capability, 32)
        )
        assert len(made.asm["cubin"]) > 0
        assert "ld.global.v4.b32" in made.asm["ptx"]
        for name in (".local", "lg2.approx", "sin.approx", "cos.approx"):
            assert name not in made.asm["ptx"], name
