"""The alignment kernel against its reference in float64, in Triton's interpreter or on a GPU."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple
from unittest.mock import patch

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

from sra_fast.kernels import alignment as ours
from sra_fast.kernels.alignment import DISTANCES, alignment, alignment_ref

EPS = torch.finfo(torch.float32).eps
HALF, BRAIN, FULL = torch.float16, torch.bfloat16, torch.float32


class Case(NamedTuple):
    shape: tuple[int, int, int]  # (B, T, D)
    student: torch.dtype = FULL
    teacher: torch.dtype = FULL
    layout: str = "contiguous"
    partials: int = 4096  # partial sums that are added at a time


# Primes, one sample, one token, one channel; widths of 16 and fewer tiles, and 1153 = 9 tiles and one channel. Tiles of
# tokens are 8 rows and more, so (2, 37, 29) is two programs with a tail, and channels there are two steps of 64 tokens.
CASES = (
    Case((1, 1, 1)),
    Case((1, 1, 384)),
    Case((7, 1, 13), layout="padded"),
    Case((1, 67, 1), layout="padded"),
    Case((2, 37, 29), layout="padded"),
    Case((3, 11, 72), BRAIN, BRAIN, "transposed", partials=2),
    Case((2, 35, 384), HALF, HALF, "padded", partials=4),
    Case((2, 5, 1152), BRAIN, BRAIN),
    Case((2, 5, 1152), BRAIN, FULL, "padded"),
    Case((2, 5, 1153), layout="transposed"),
    Case((2, 5, 1153), FULL, BRAIN, "padded"),
    Case((1, 3, 8192), HALF, BRAIN),
)


def inputs(case: Case) -> tuple[Tensor, Tensor]:
    """A student, and a teacher that resembles it: differences on both sides of beta = 0.05. All around them is NaN, and
    where they are padded between rows and samples too."""
    generator = torch.Generator().manual_seed(0)
    student, noise = torch.randn(2, *case.shape, generator=generator).to(DEVICE)
    batch, tokens, width = case.shape
    strides = {
        "contiguous": (tokens * width, width, 1),
        "padded": ((tokens + 1) * (width + 21), width + 21, 1),
        "transposed": (width, batch * width, 1),
    }[case.layout]
    teacher = (student + 0.2 * noise).to(case.teacher)
    return surrounded(student.to(case.student), strides), surrounded(teacher, strides)


def both(function: Callable[[Tensor, Tensor], Tensor], student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """(loss, the student's gradient) under a gradient of the loss of 2.5."""
    student = student.detach().requires_grad_()
    loss = function(student, teacher)
    return loss.detach(), torch.autograd.grad(2.5 * loss, student)[0]


def floors(distance: str, case: Case, loss: Tensor, gradient: Tensor) -> tuple[float, float]:
    """Errors of the true (loss, gradient) that are no fault, another order of additions aside: of the gradient one unit
    in the last place of its dtype, and eight roundings in float32 of the largest values on the way. Those are 1 where a
    cosine is taken from it, and where a cosine's gradient is the difference of two terms, 2.5 / n * max |t / (S T)|,
    each of them."""
    dims = {"cosine": -1, "cosine_channel": -2}
    in_loss, in_gradient = largest(loss), largest(gradient)
    unit = torch.finfo(case.student).eps * in_gradient
    if distance in dims:
        student, teacher = (x.double() for x in inputs(case))
        n = student.numel() / student.shape[dims[distance]]
        norms = student.norm(dim=dims[distance], keepdim=True) * teacher.norm(dim=dims[distance], keepdim=True)
        in_loss, in_gradient = 1.0, 2.5 / n * float((teacher / norms).abs().max())
    return 8 * EPS * in_loss, 8 * EPS * in_gradient + unit


def compare(module: ModuleType, distance: str, case: Case) -> None:
    """Raise AssertionError if a kernel's loss or gradient is wrong."""
    student, teacher = inputs(case)
    with guarded(), patch.object(module, "_PARTIALS", case.partials):
        got = both(partial(module.alignment, distance=distance), student, teacher)
    usual = both(partial(alignment_ref, distance=distance), student, teacher)
    truth = both(partial(alignment_ref, distance=distance), student.double(), teacher.double())
    assert_within_twice(got, usual, truth, floors(distance, case, *truth))


def test_kernels_in_the_interpreter() -> None:
    run_interpreted(__file__)


@kernel
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("distance", DISTANCES)
def test_kernel_is_as_exact_as_pytorch(distance: str, case: Case) -> None:
    compare(ours, distance, case)


# The shapes at which the features of S and XL are trained.
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("width", [384, 1152])
@pytest.mark.parametrize("distance", DISTANCES)
def test_at_real_sizes(distance: str, width: int) -> None:
    compare(ours, distance, Case((32, 256, width), BRAIN, BRAIN))


# The interpreter runs one program after the other.
@kernel
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("case", CASES if DEVICE.type == "cuda" else CASES[4:7:2], ids=str)
@pytest.mark.parametrize("distance", DISTANCES)
def test_two_runs_of_a_kernel_are_equal_in_every_bit(distance: str, case: Case) -> None:
    first, second = (both(partial(alignment, distance=distance), *inputs(case)) for _ in range(2))
    assert_same(first, second)


@kernel
@pytest.mark.parametrize("place", range(4), ids=["neither", "student", "teacher", "both"])
@pytest.mark.parametrize("scale", [0.0, 1e-12, 1e-9, 1e-7, torch.nan, torch.inf])
@pytest.mark.parametrize("distance", ["cosine", "cosine_channel"])
def test_kernel_clamps_as_pytorch(distance: str, scale: float, place: int) -> None:
    """Vectors of zeros and shorter than PyTorch's eps = 1e-8, and NaN: what PyTorch makes of them, in the loss and in
    the gradient."""
    student, teacher = inputs(Case((2, 6, 5)))
    vector = (slice(None), slice(None), 2) if distance == "cosine_channel" else (slice(None), 2)
    for changed, bit in ((student, 1), (teacher, 2)):
        if place & bit:
            changed[vector] *= scale
    got = both(partial(alignment, distance=distance), student, teacher)
    usual = both(partial(alignment_ref, distance=distance), student, teacher)
    for value, own in zip(got, usual, strict=True):
        torch.testing.assert_close(value, own, rtol=1e-4, atol=1e-5, equal_nan=True)


@kernel
@pytest.mark.parametrize("distance", ["cosine", "cosine_channel", "l1"])
def test_kernel_is_an_op_that_torch_can_check(distance: str) -> None:
    student, teacher = inputs(Case((2, 3, 5), layout="padded"))
    op = torch.ops.sra_fast
    torch.library.opcheck(op.alignment.default, (student.detach().requires_grad_(), teacher, distance))
    _, coefficients = op.alignment(student, teacher, distance)
    above = torch.tensor(2.5, device=DEVICE)
    torch.library.opcheck(op.alignment_backward.default, (above, student, teacher, coefficients, distance))


@kernel
@pytest.mark.parametrize("distance", ["cosine", "smooth_l1"])
def test_kernel_compiles_without_a_graph_break_to_the_same_bits(distance: str) -> None:
    student, teacher = inputs(Case((2, 3, 5)))
    compiled = torch.compile(partial(alignment, distance=distance), fullgraph=True, backend="aot_eager")
    plain = partial(alignment, distance=distance)
    assert_same(both(compiled, student, teacher), both(plain, student, teacher))


WRONG: dict[str, Callable[[Tensor], tuple[Tensor, Tensor, str]]] = {
    "distance: 'cos' given; must be one of cosine, ": lambda x: (x, x, "cos"),
    "student: shape (3, 4) given; must be (B, T, D)": lambda x: (x[0], x[0], "l1"),
    "student: shape (2, 0, 4) given; must have an element": lambda x: (x[:, :0], x[:, :0], "l1"),
    "student: shape (1, 1, 8193) given": lambda x: (x.new_zeros(1, 1, 8193), x.new_zeros(1, 1, 8193), "l1"),
    "teacher: shape (2, 2, 4) given; must be (2, 3, 4), as student has it": lambda x: (x, x[:, :2], "cosine"),
    "student: dtype torch.float64 given; must be one of torch.float32, ": lambda x: (x.double(), x, "l2"),
    "teacher: dtype torch.int64 given": lambda x: (x, x.long(), "l2"),
    "teacher: strides (12, 1, 3) given; the last must be 1": lambda x: (x, x.new_zeros(2, 4, 3).mT, "cosine_channel"),
    "teacher: device meta given": lambda x: (x, x.to("meta"), "cosine"),
}


@kernel
@pytest.mark.parametrize("message", WRONG)
def test_kernel_refuses_what_it_cannot_take(message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        ours._check(*WRONG[message](torch.zeros(2, 3, 4, device=DEVICE)))


@kernel
def test_kernel_checks_what_it_is_given() -> None:
    x = torch.zeros(2, 3, 4, device=DEVICE)
    with pytest.raises(ValueError, match=r"student: dtype torch.float64 given"):
        alignment(x.double(), x, "l1")


class Fault(NamedTuple):
    """A change of one kernel's source."""

    distance: str
    function: str
    old: str
    new: str


SAMPLE = "sample, token = row // TOKENS", "sample, token = (row + 1) // TOKENS"
OF_PROGRAM = "(tl.program_id(0) // blocks)", "(tl.program_id(0) // blocks + 1)"
CHANNELS, ROWS = "there[:, None] & (column < WIDTH)", "there[:, None]"
LAST_TOKEN = "(token < TOKENS) & there[None, :]", "there[None, :]"
FAULTS = {
    "tokens forward, wrong axis": Fault(
        "cosine", "_alignment_tokens_forward", "tl.sum(s_square, axis=1)", "tl.sum(tl.sum(s_square, axis=1), axis=0)"
    ),
    "tokens forward, no tail": Fault("cosine", "_alignment_tokens_forward", CHANNELS, ROWS),
    "tokens forward, no last row": Fault(
        "cosine", "_alignment_tokens_forward", "tl.where(there, distance, 0.0)", "distance"
    ),
    "tokens forward, next sample": Fault("cosine", "_alignment_tokens_forward", *SAMPLE),
    "tokens backward, wrong axis": Fault(
        "cosine", "_alignment_tokens_backward", "coefficients + rows + row", "coefficients + row"
    ),
    "tokens backward, no tail": Fault("cosine", "_alignment_tokens_backward", CHANNELS, ROWS),
    "tokens backward, next sample": Fault("cosine", "_alignment_tokens_backward", *SAMPLE),
    "elements forward, wrong axis": Fault(
        "smooth_l1", "_alignment_tokens_forward", "distance = tl.sum(total, axis=1)", "distance = tl.max(total, axis=1)"
    ),
    "elements forward, no tail": Fault("smooth_l1", "_alignment_tokens_forward", CHANNELS, ROWS),
    "elements forward, next sample": Fault("l1", "_alignment_tokens_forward", *SAMPLE),
    "elements backward, no tail": Fault("l2", "_alignment_tokens_backward", CHANNELS, ROWS),
    "elements backward, next sample": Fault("l2", "_alignment_tokens_backward", *SAMPLE),
    "channels forward, wrong axis": Fault(
        "cosine_channel",
        "_alignment_channels_forward",
        "tl.sum(t_square, axis=0)",
        "tl.sum(tl.sum(t_square, axis=0), axis=0)",
    ),
    "channels forward, no last token": Fault("cosine_channel", "_alignment_channels_forward", *LAST_TOKEN),
    "channels forward, no tail": Fault(
        "cosine_channel", "_alignment_channels_forward", "there = channel < WIDTH", "there = channel >= 0"
    ),
    "channels forward, next sample": Fault("cosine_channel", "_alignment_channels_forward", *OF_PROGRAM),
    "channels backward, no last token": Fault("cosine_channel", "_alignment_channels_backward", *LAST_TOKEN),
    "channels backward, next sample": Fault("cosine_channel", "_alignment_channels_backward", *OF_PROGRAM),
    "mean, no tail": Fault("l2", "_alignment_mean", "mask=at < COUNT, ", "mask=at >= 0, "),
}
# Small ones: a tail in tokens, rows and channels, two samples and more than one program.
FAULTY_CASES = (Case((2, 37, 29), layout="padded"), Case((3, 5, 13)))


def compare_mutant(folder: Path, fault: Fault) -> None:
    distance, function, *change = fault
    module = mutant(folder, "alignment", "alignment", *change, function)
    for case in FAULTY_CASES:
        compare(module, distance, case)


@kernel
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_in_a_kernel_is_found(fault: str, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"error .* allowed|wrote outside"):
        compare_mutant(tmp_path, FAULTS[fault])


@kernel
@pytest.mark.parametrize("fault", ["tokens forward, no tail", "channels forward, no tail"])
def test_a_copy_of_a_kernel_without_a_fault_passes(fault: str, tmp_path: Path) -> None:
    compare_mutant(tmp_path, FAULTS[fault]._replace(new=FAULTS[fault].old))


def specialised(distance: str, shape: tuple[int, int, int]) -> Iterator[tuple[Any, dict]]:
    """(kernel, its constexpr arguments) of every launch."""
    inputs = 2 * [torch.empty(shape, device="meta", dtype=torch.bfloat16)]
    for name in ("forward", "backward"):
        by_channel, programs, sizes = ours._launch(*inputs, distance, sums=name == "forward")
        if not by_channel:
            sizes |= {"DISTANCE": distance, "BETA": ours.SMOOTH_L1_BETA}
        yield getattr(ours, f"_alignment_{'channels' if by_channel else 'tokens'}_{name}"), sizes
    yield ours._alignment_mean, {"COUNT": programs, "BLOCK": ours._PARTIALS}


TYPES = {"student": "*bf16", "teacher": "*bf16", "gradient": "*bf16", "share": "fp32"}
TYPES |= dict.fromkeys(("above", "coefficients", "partials", "loss"), "*fp32")


@pytest.mark.parametrize("compute_capability", [80, 90, 100])
def test_compiles_ahead_of_time_with_full_loads(compute_capability: int) -> None:
    """At the width of XL, with no GPU: 16 bytes a load, wherever rows are read."""
    pytest.importorskip("triton", reason="Triton is not installed")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    for distance in ("cosine", "smooth_l1", "cosine_channel"):
        for launched, sizes in specialised(distance, (32, 256, 1152)):
            names = launched.arg_names
            signature = {n: "constexpr" if n in sizes else TYPES.get(n, "i32") for n in names}
            aligned = {
                (i,): [["tt.divisibility", 16]]
                for i, n in enumerate(names)
                if signature[n] not in ("constexpr", "fp32")
            }
            fixed = {(names.index(name),): value for name, value in sizes.items()}
            made = compile(
                ASTSource(launched, signature, fixed, aligned), target=GPUTarget("cuda", compute_capability, 32)
            )
            assert len(made.asm["cubin"]) > 0
            assert "ld.global.v4.b32" in made.asm["ptx"], launched
            assert "atom" not in made.asm["ptx"], launched
