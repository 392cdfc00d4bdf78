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
from sra_fast.kernels.perturb import NoisedBatch, Settings, Stored, path_coefficients, perturb, perturb_ref
from sra_fast.kernels.philox import Draw, uniforms

EPS = torch.finfo(torch.float32).eps
FP32, FP16, PIXELS = torch.float32, torch.float16, torch.uint8
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
    dtype: torch.dtype = FP32

    @property
    def settings(self) -> Settings:
        return Settings(self.seed, self.path, self.times, self.t_max, 10, self.dropout, self.shared)


# One element, one image, primes, whole programs of 1,024 elements, several of them, and one element more. Channels of
# 35, 121 and 437 elements end inside a program and inside a Philox call; those of 256 with one.
CASES = (
    Case((1, 1, 1, 1)),
    Case((7, 1, 8, 8), "cosine", "lognormal", seed=1),
    Case((3, 3, 7, 11), "linear", "lognormal", shared=False, seed=LIMIT),
    Case((2, 4, 16, 32), "cosine", seed=0x9E3779B97F4A7C15, t_max=1.0),
    Case((2, 1025), shared=False, dropout=0.0),
    Case((2, 1024), "linear", "lognormal", dropout=1.0),
    Case((3, 3, 5, 7), stored="moments", dtype=FP16, shared=False, seed=LIMIT),
    Case((2, 4, 16, 16), "cosine", "lognormal", stored="moments", dtype=FP16),
    Case((2, 16, 11, 11), "cosine", stored="moments", seed=1),
    Case((7, 3, 7, 11), stored="values", dtype=PIXELS),
    Case((2, 4, 19, 23), "cosine", stored="values", dtype=FP16),
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


def truth(data: Tensor, labels: Tensor, number: Tensor, settings: Settings, stored: Stored | None) -> NoisedBatch:
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
    return NoisedBatch(t, t_teacher, x_t, x_teacher, target, student, teacher)


def compare(function: Callable[..., tuple[Tensor, ...]], case: Case) -> None:
    """Raise AssertionError if a result of a kernel is wrong.

    Labels and uniform times are equal in every bit. Other errors may be twice the reference's own, as logarithm, sine
    and cosine differ between libraries, plus four units in the last place of the largest value: one rounding for each
    factor, each product and the sum. On a GPU, exp adds four. Posterior, shift and scale are four more operations, on
    their largest values.
    """
    batch = inputs(case)
    with guarded():
        got = function(*batch)
    own, best = perturb_ref(*batch), truth(*batch)
    exact = {"labels", "teacher_labels"} | ({"t"} if case.times == "uniform" else set())
    for name, value, theirs, right in zip(NoisedBatch._fields[:7], got[:7], own[:7], best[:7], strict=True):
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
@pytest.mark.parametrize("case", CASES if DEVICE.type == "cuda" else CASES[1:8:6], ids=str)
def test_two_runs_of_a_kernel_are_equal_in_every_bit(case: Case) -> None:
    batch = inputs(case)
    assert_same(perturb(*batch)[:7], perturb(*batch)[:7])


@kernel
@pytest.mark.parametrize("stored", ["", "moments"])
def test_kernel_draws_the_same_for_an_image_in_any_batch(stored: str) -> None:
    data, labels, number, *fixed = inputs(Case((6, 3, 7, 11), "cosine", "lognormal", shared=False, stored=stored))
    together = perturb(data, labels, number, *fixed)[:7]
    for rows in ([3], [2, 1, 5]):
        part = perturb(data[rows], labels[rows], number[rows], *fixed)[:7]
        assert_same(part, [value[rows] for value in together])


@kernel
def test_kernel_samples_the_posterior_and_the_noise_from_separate_streams() -> None:
    """With a posterior of mean 0 and deviation 1, x is one stream and x_t at t = 1 the other."""
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


@kernel
@pytest.mark.parametrize(("stored", "shared"), [("", True), ("", False), ("values", True), ("moments", True)])
def test_kernel_is_an_op_that_torch_can_check_and_compile(stored: str, shared: bool) -> None:
    case = Case((2, 1, 3, 3), shared=shared, seed=LIMIT, stored=stored, dtype=FP16 if stored else FP32)
    *batch, settings, data_format = inputs(case)
    shift, scale = (None, None) if data_format is None else data_format[1:]
    arguments = (*batch, shift, scale, stored == "moments", -1, *settings[1:])  # -1: the seed as a signed integer
    torch.library.opcheck(torch.ops.sra_fast.perturb.default, arguments)
    call = partial(perturb, settings=settings, stored=data_format)
    assert_same(torch.compile(call, fullgraph=True, backend="aot_eager")(*batch)[:7], call(*batch)[:7])


def moments(batch: Batch) -> Batch:
    return inputs(Case(batch[0].shape, stored="moments"))


def changed(batch: Batch, place: int, change: Callable) -> Batch:
    return (*batch[:place], change(batch[place]), *batch[place + 1 :])


def settings(**changes: str) -> Callable[[Batch], Batch]:
    return lambda batch: changed(batch, 3, lambda s: s._replace(**changes))


def stored(change: Callable[[Stored], Stored]) -> Callable[[Batch], Batch]:
    return lambda batch: changed(moments(batch), 4, change)


REFUSED: dict[str, Callable[[Batch], Batch]] = {
    "path: 'spiral' given; must be one of linear, cosine": settings(path="spiral"),
    "times: 'never' given; must be one of uniform, lognormal": settings(times="never"),
    "data: torch.uint8 given; must be one of torch.float32": lambda b: changed(b, 0, Tensor.byte),
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
    "shift: shape (2,) given; must be (1,)": stored(lambda s: s._replace(shift=s.shift.repeat(2))),
    "scale: torch.float64 given; must be one of torch.float32": stored(lambda s: s._replace(scale=s.scale.double())),
}


@kernel
@pytest.mark.parametrize("message", REFUSED)
def test_kernel_refuses_invalid_arguments(message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        perturb(*REFUSED[message](inputs(Case((2, 1, 4, 5)))))


def test_tensors_that_are_not_on_a_gpu_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = torch.zeros(2, 1, 4, 5), torch.arange(2), torch.arange(2), Case((2, 1, 4, 5)).settings
    monkeypatch.setattr(ours, "INTERPRETED", False)
    monkeypatch.setattr(ours, "why_unavailable", lambda: "")
    with pytest.raises(ValueError, match=r"^data: device cpu given; must be a CUDA device$"):
        perturb(*batch)


FAULTS = {  # function, right, wrong
    "no tail": ("_perturb_kernel", "inside, at = element < COUNT", "inside, at = element >= 0"),
    "next sample's number": ("_perturb_kernel", "tl.load(number + sample)", "tl.load(number + sample + 1)"),
    "next sample's data": ("_perturb_kernel", "sample * COUNT + element", "(sample + 1) * COUNT + element"),
    "normals in another order": ("_normals", "tl.join(z0, z2), tl.join(z1, z3)", "tl.join(z0, z1), tl.join(z2, z3)"),
    "wide counter": ("_normals", "quad(seed, call,", "quad(seed, call.to(tl.uint64),"),
    "high word lost": ("_perturb_kernel", "(image >> 32).to(tl.uint32)", "(image >> 63).to(tl.uint32)"),
    "every program the first": ("_perturb_kernel", "part * BLOCK + tl.arange(0, BLOCK)", "tl.arange(0, BLOCK)"),
    "teacher at the student's time": ("_perturb_kernel", "_coefficients(t_teacher, PATH)", "_coefficients(t, PATH)"),
    "teacher's labels are the student's": ("_perturb_kernel", "low, high, TEACHER_LABEL)", "low, high, LABEL)"),
    "deviation instead of mean": ("_perturb_kernel", "tl.load(mean, mask", "tl.load(mean + COUNT, mask"),
    "posterior from the noise's stream": ("_perturb_kernel", "low, high, SAMPLE, BLOCK)", "low, high, NOISE, BLOCK)"),
    "channel begins one element early": ("_perturb_kernel", "element // AREA", "(element + 1) // AREA"),
    "output written where moments lie": ("_perturb_kernel", "x_t_out + at,", "x_t_out + at + sample * COUNT,"),
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
    compare_mutant(tmp_path, "_perturb_kernel", "tl.load(mean,", "tl.load(mean,")


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_compiles_ahead_of_time(capability: int) -> None:
    """Without a GPU: loads of 16 bytes, no stack, and no fast logarithm, sine or cosine: their absolute errors can make
    a normal NaN."""
    pytest.importorskip("triton", reason="Triton is not installed")
    from benchmarks.kernel_resources import compiled, recorded

    labels, vector, seed = torch.empty(2, dtype=torch.int64), torch.empty(4), 2**40
    with recorded() as launches:
        pixels, latents = torch.empty(2, 4, 32, 32), torch.empty(2, 8, 32, 32, dtype=FP16)
        ours._launch(pixels, labels, labels, None, None, False, seed, "linear", "uniform", 0.2, 10, 0.1, False)
        ours._launch(latents, labels, labels, vector, vector, True, seed, "cosine", "lognormal", 0.2, 10, 0.1, False)
    for launch in launches:
        ptx = compiled(launch, capability).asm["ptx"]
        assert "ld.global.v4.b32" in ptx
        for name in (".local", "lg2.approx", "sin.approx", "cos.approx"):
            assert name not in ptx, name
