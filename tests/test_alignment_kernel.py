"""The alignment kernel against its reference in float64, in Triton's interpreter or on a GPU."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import NamedTuple
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
FP16, BF16, FP32 = torch.float16, torch.bfloat16, torch.float32


class Case(NamedTuple):
    shape: tuple[int, int, int]  # (B, T, D)
    student: torch.dtype = FP32
    teacher: torch.dtype = FP32
    layout: str = "contiguous"
    partials: int = 4096  # partial sums added at a time


# Primes, one sample, one token, one channel; widths of 16 and fewer tiles, and 1153 = 9 tiles and one channel. Tiles of
# tokens are 8 rows and more, so (2, 37, 29) is two programs with a tail, and channels there are two steps of 64 tokens.
CASES = (
    Case((1, 1, 1)),
    Case((7, 1, 13), layout="padded"),
    Case((1, 67, 1), layout="padded"),
    Case((2, 37, 29), layout="padded"),
    Case((3, 11, 72), BF16, BF16, "transposed", partials=2),
    Case((2, 35, 384), FP16, FP16, "padded", partials=4),
    Case((2, 5, 1152), BF16, FP32, "padded"),
    Case((1, 5, 1153), FP32, BF16, "padded"),
    Case((1, 3, 8192), FP16, BF16),
)


def inputs(case: Case) -> tuple[Tensor, Tensor]:
    """A student and a teacher that resembles it: differences on both sides of beta = 0.05. NaN surrounds them and fills
    the padding between rows and samples."""
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
    """Errors of (loss, gradient) that are always allowed: one unit in the last place of the gradient's dtype, and eight
    float32 roundings of the largest intermediate values. These are 1 where a cosine is subtracted from it, and 2.5 / n
    max |t / (S T)| where a cosine's gradient is the difference of two such terms."""
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


# l1 and l2 differ from smooth_l1 by an elementwise function.
@kernel
@pytest.mark.parametrize(
    ("distance", "case"),
    [(name, case) for name in DISTANCES for case in (CASES[4:6] if name in ("l1", "l2") else CASES)],
    ids=str,
)
def test_kernel_is_as_exact_as_pytorch(distance: str, case: Case) -> None:
    compare(ours, distance, case)


# The interpreter runs one program after the other.
@kernel
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("case", CASES if DEVICE.type == "cuda" else CASES[3:4], ids=str)
@pytest.mark.parametrize("distance", DISTANCES)
def test_two_runs_of_a_kernel_are_equal_in_every_bit(distance: str, case: Case) -> None:
    first, second = (both(partial(alignment, distance=distance), *inputs(case)) for _ in range(2))
    assert_same(first, second)


@kernel
@pytest.mark.parametrize("scaled", ["student", "teacher", "both"])
@pytest.mark.parametrize("scale", [0.0, 1e-9, torch.nan, torch.inf])
@pytest.mark.parametrize("distance", ["cosine", "cosine_channel"])
def test_kernel_clamps_as_pytorch(distance: str, scale: float, scaled: str) -> None:
    """Vectors of zeros, shorter than PyTorch's eps = 1e-8, NaN and infinite: as in PyTorch, loss and gradient."""
    student, teacher = inputs(Case((2, 6, 5)))
    vector = (slice(None), slice(None), 2) if distance == "cosine_channel" else (slice(None), 2)
    if scaled != "teacher":
        student[vector] *= scale
    if scaled != "student":
        teacher[vector] *= scale
    got = both(partial(alignment, distance=distance), student, teacher)
    usual = both(partial(alignment_ref, distance=distance), student, teacher)
    for value, own in zip(got, usual, strict=True):
        torch.testing.assert_close(value, own, rtol=1e-4, atol=1e-5, equal_nan=True)


@kernel
@pytest.mark.parametrize("distance", ["cosine", "cosine_channel", "l1"])
def test_kernel_is_an_op_that_torch_can_check_and_compile(distance: str) -> None:
    student, teacher = inputs(Case((2, 3, 5), layout="padded"))
    op = torch.ops.sra_fast
    torch.library.opcheck(op.alignment.default, (student.detach().requires_grad_(), teacher, distance))
    _, coefficients = op.alignment(student, teacher, distance)
    grad_loss = torch.tensor(2.5, device=DEVICE)
    torch.library.opcheck(op.alignment_backward.default, (grad_loss, student, teacher, coefficients, distance))
    call = partial(alignment, distance=distance)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert_same(both(compiled, student, teacher), both(call, student, teacher))


REFUSED: dict[str, Callable[[Tensor], tuple[Tensor, Tensor, str]]] = {
    "distance: 'cos' given; must be one of cosine, ": lambda x: (x, x, "cos"),
    "student: shape (2, 0, 4) given; must not be empty": lambda x: (x[:, :0], x[:, :0], "l1"),
    "student: dtype torch.float64 given; must be one of torch.float32, ": lambda x: (x.double(), x, "l2"),
    "teacher: shape (2, 2, 4) given; must be (2, 3, 4) to match the rows": lambda x: (x, x[:, :2], "cosine"),
}


@kernel
@pytest.mark.parametrize("message", REFUSED)
def test_kernel_refuses_invalid_arguments(message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        alignment(*REFUSED[message](torch.zeros(2, 3, 4, device=DEVICE)))


class Fault(NamedTuple):
    """A change of one kernel's source."""

    distance: str
    function: str
    old: str
    new: str


TOKENS, CHANNELS = "_alignment_tokens_", "_alignment_channels_"
NEXT_SAMPLE = "sample, token = row // TOKENS", "sample, token = (row + 1) // TOKENS"
NEXT_PROGRAM = "(tl.program_id(0) // blocks)", "(tl.program_id(0) // blocks + 1)"
NO_TAIL = "row_mask[:, None] & (column < WIDTH)", "row_mask[:, None]"
NO_LAST_TOKEN = "(token < TOKENS) & channel_mask[None, :]", "channel_mask[None, :]"
FAULTS = {
    "tokens forward, wrong axis": Fault(
        "cosine", TOKENS + "forward", "tl.sum(s_square, axis=1)", "tl.sum(tl.sum(s_square, axis=1), axis=0)"
    ),
    "tokens forward, no tail": Fault("cosine", TOKENS + "forward", *NO_TAIL),
    "tokens forward, no last row": Fault("cosine", TOKENS + "forward", "tl.where(row_mask, distance, 0.0)", "distance"),
    "tokens backward, wrong coefficient": Fault(
        "cosine", TOKENS + "backward", "coefficients + rows + row", "coefficients + row"
    ),
    "tokens backward, no tail": Fault("cosine", TOKENS + "backward", *NO_TAIL),
    "elements forward, wrong reduction": Fault(
        "smooth_l1", TOKENS + "forward", "distance = tl.sum(total, axis=1)", "distance = tl.max(total, axis=1)"
    ),
    "elements forward, next sample": Fault("l1", TOKENS + "forward", *NEXT_SAMPLE),
    "elements backward, next sample": Fault("l2", TOKENS + "backward", *NEXT_SAMPLE),
    "channels forward, wrong axis": Fault(
        "cosine_channel", CHANNELS + "forward", "tl.sum(t_square, axis=0)", "tl.sum(tl.sum(t_square, axis=0), axis=0)"
    ),
    "channels forward, no last token": Fault("cosine_channel", CHANNELS + "forward", *NO_LAST_TOKEN),
    "channels forward, no tail": Fault(
        "cosine_channel", CHANNELS + "forward", "channel_mask = channel < WIDTH", "channel_mask = channel >= 0"
    ),
    "channels forward, next sample": Fault("cosine_channel", CHANNELS + "forward", *NEXT_PROGRAM),
    "channels backward, no last token": Fault("cosine_channel", CHANNELS + "backward", *NO_LAST_TOKEN),
    "channels backward, next sample": Fault("cosine_channel", CHANNELS + "backward", *NEXT_PROGRAM),
    "mean, no tail": Fault("l2", "_alignment_mean", "mask=index < COUNT, ", "mask=index >= 0, "),
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


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_compiles_ahead_of_time_without_atomics(capability: int) -> None:
    """At the width of XL, without a GPU: loads of 16 bytes wherever rows are read."""
    pytest.importorskip("triton", reason="Triton is not installed")
    from benchmarks.kernel_resources import compiled, recorded

    features = torch.empty(32, 256, 1152, dtype=BF16)
    with recorded() as launches, patch.object(ours, "_check"):
        for distance in ("cosine", "smooth_l1", "cosine_channel"):
            _, coefficients = ours._alignment._init_fn(features, features, distance)
            ours._alignment_backward._init_fn(torch.empty(()), features, features, coefficients, distance)
    assert len(launches) == 9
    for launch in launches:
        ptx = compiled(launch, capability).asm["ptx"]
        assert "ld.global.v4.b32" in ptx, launch.name
        assert "atom" not in ptx, launch.name
