"""adaLN, alone and gated: the references against their formulas in float64, the kernels against the references."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import NamedTuple

import numpy as np
import pytest
import torch
from interpreter import (
    DEVICE,
    assert_as_exact,
    assert_same,
    inside,
    kernel,
    mutant,
    poisoned,  # noqa: F401
    run_interpreted,
)
from torch import Tensor

from sra_fast.kernels import adaln as ours
from sra_fast.kernels import rows
from sra_fast.kernels.adaln import adaln, adaln_ref, gated_adaln, gated_adaln_ref, gated_residual_ref
from sra_fast.kernels.language import INTERPRETED, why_unavailable

EPS = 1e-6
FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
OPS = pytest.mark.parametrize("name", ["adaln", "gated_adaln"])
REFERENCES = {"adaln": adaln_ref, "gated_adaln": gated_adaln_ref}


def formula(x: Tensor, modulation: Tensor) -> Tensor:
    """LayerNorm(x) * (1 + scale) + shift in numpy float64; mean and biased variance over the last axis."""
    x, modulation = (value.detach().double().numpy() for value in (x, modulation))
    shift, scale = modulation[:, 0], modulation[:, 1]
    centred = x - x.mean(axis=2, keepdims=True)
    normed = centred / np.sqrt((centred**2).mean(axis=2, keepdims=True) + EPS)
    return torch.from_numpy(normed * (1 + scale[:, None, :]) + shift[:, None, :])


def draw(*shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


@pytest.mark.parametrize("shape", [(1, 1, 16), (3, 4, 33)])
def test_adaln_matches_its_formula(shape: tuple[int, int, int]) -> None:
    x, modulation = draw(shape, (shape[0], 2, shape[2]))
    torch.testing.assert_close(adaln_ref(x, modulation), formula(x, modulation), atol=1e-12, rtol=1e-12)


def test_eps_is_added_to_the_variance() -> None:
    x = torch.full((1, 1, 4), 3.0, dtype=torch.float64)
    x[0, 0, 0] += 1e-3  # a variance of the size of eps
    zero = torch.zeros(1, 2, 4, dtype=torch.float64)
    torch.testing.assert_close(adaln_ref(x, zero), formula(x, zero), rtol=1e-9, atol=0)


def test_gated_adaln_matches_its_formula() -> None:
    x, branch, bias, modulation = draw((2, 5, 8), (2, 5, 8), (8,), (2, 3, 8))
    residual, h = gated_adaln_ref(x, branch, bias, modulation)
    gate = modulation[:, 0]  # of sample b for all its tokens
    expected = torch.stack([x[b] + gate[b] * (branch[b] + bias) for b in range(2)])
    torch.testing.assert_close(residual, expected, atol=1e-14, rtol=1e-14)
    torch.testing.assert_close(h, formula(expected, modulation[:, 1:]), atol=1e-12, rtol=1e-12)
    assert torch.equal(gated_residual_ref(x, branch, bias, modulation[:, :1]), residual)


def test_gradients_of_the_references() -> None:
    x, branch, bias, modulation = (value.requires_grad_() for value in draw((2, 3, 6), (2, 3, 6), (6,), (2, 3, 6)))
    assert torch.autograd.gradcheck(adaln_ref, [x, modulation[:, 1:]])
    assert torch.autograd.gradcheck(gated_adaln_ref, [x, branch, bias, modulation])


def within_bf16(h: Tensor, truth: Tensor) -> bool:
    """Half a bf16 ulp (relative 2^-8) for the one rounding at the end, and a floor for fp32 statistics: x up to 20 with
    a spread of about 1, 2^-24 relative, a few roundings."""
    return bool(((h.double() - truth).abs() <= 2**-8 * truth.abs() * 1.001 + 8 * 20 * 2**-24 * (1 + truth.abs())).all())


def test_bf16_is_normalised_with_fp32_statistics_of_the_rounded_residual() -> None:
    x, branch, bias, modulation = draw((4, 16, 64), (4, 16, 64), (64,), (4, 3, 64))
    x, branch = (x + 16).bfloat16(), branch.bfloat16()  # far from zero: statistics in bf16 would be worthless
    bias, modulation = bias.float(), modulation.float()
    residual, h = gated_adaln_ref(x, branch, bias, modulation)
    assert residual.dtype == h.dtype == BF16
    exact = x.double() + modulation[:, :1].double() * (branch.double() + bias.double())
    assert bool(((residual.double() - exact).abs() <= 1.001 * 2**-8 * exact.abs()).all())  # half a bf16 ulp
    truth = formula(residual, modulation[:, 1:])
    assert within_bf16(h, truth)
    centred = residual - residual.mean(-1, keepdim=True)
    in_bf16 = centred / (centred.square().mean(-1, keepdim=True) + EPS).sqrt()
    _, shift, scale = modulation.bfloat16().split(1, dim=1)
    assert not within_bf16(in_bf16 * (1 + scale) + shift, truth), "the bound would not catch bf16 statistics"


class Case(NamedTuple):
    """Sizes, and dtypes of x, the branch with its bias, and the modulation."""

    shape: tuple[int, int, int]  # B, T, D
    x: torch.dtype = FP32
    branch: torch.dtype = FP32
    modulation: torch.dtype = FP32


# One of everything, primes, D a power of two and one more, both tiles full (72 = 64 + 8, 384), one token, more tokens
# than one program has. The gradient of a row of one element is zero, which a GPU misses: it multiplies and adds with
# one rounding, and 1 / sqrt(eps) enlarges the difference.
CASES = (
    Case((1, 1, 1 if INTERPRETED else 3)),
    Case((3, 7, 13)),
    Case((2, 19, 11), BF16, BF16, BF16),
    Case((2, 3, 64), FP16, FP16, FP16),
    Case((2, 3, 65), FP32, BF16, FP16),
    Case((4, 1, 72), BF16, BF16, FP32),
    Case((1, 2, 384), FP16, FP16, FP16),
    Case((1, 2, 1153), FP32, FP32, BF16),
)
SMALL = CASES[1]


def inputs(name: str, case: Case) -> tuple[list[Tensor], list[Tensor]]:
    """(Arguments of the op, gradients of its outputs), none contiguous."""
    generator = torch.Generator().manual_seed(0)
    row_dtypes = [case.x] if name == "adaln" else [case.x, case.branch]
    row_inputs = [inside(case.shape, dtype, generator) for dtype in row_dtypes]
    batch, _, width = case.shape
    biases = [torch.randn(width, generator=generator).to(DEVICE, case.branch) for _ in row_dtypes[1:]]
    modulation = inside((batch, 1 + len(row_dtypes), width), case.modulation, generator)
    return [*row_inputs, *biases, modulation], [inside(case.shape, case.x, generator) for _ in row_dtypes]


def results(function: Callable, arguments: Sequence[Tensor], grads: Sequence[Tensor], eps: float = EPS) -> list[Tensor]:
    """All outputs, then the gradients of all arguments."""
    leaves = [value.detach().requires_grad_() for value in arguments]
    outputs = function(*leaves, eps)
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    return [*(value.detach() for value in outputs), *torch.autograd.grad(outputs, leaves, grads)]


def doubled(values: Sequence[Tensor]) -> list[Tensor]:
    return [value.double() for value in values]


def compare(module: ModuleType, name: str, case: Case) -> None:
    """Raise AssertionError if an output or gradient of a kernel is wrong."""
    arguments, grads = inputs(name, case)
    truth = results(REFERENCES[name], doubled(arguments), doubled(grads))
    got, usual = (results(call, arguments, grads) for call in (getattr(module, name), REFERENCES[name]))
    assert_as_exact(got, usual, truth, terms=max(case.shape[0] * case.shape[1], case.shape[2]))


def test_kernels_in_the_interpreter() -> None:
    run_interpreted(__file__)


@kernel
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("case", CASES, ids=str)
@OPS
def test_kernel_is_as_exact_as_pytorch(name: str, case: Case) -> None:
    compare(ours, name, case)


@kernel
def test_kernel_normalises_the_residual_as_it_stored_it() -> None:
    """x' is a large number; its rounding to bf16 exceeds what remains after the mean is subtracted."""
    x = torch.full((1, 1, 8), 256.0, dtype=BF16, device=DEVICE)
    branch = torch.tensor([0.9, 1.1, 2.9, 3.1, -0.4, -0.6, 1.4, 0.1], device=DEVICE).to(BF16).view(1, 1, 8)
    bias, modulation = torch.zeros(8, device=DEVICE), torch.eye(3, 1, device=DEVICE).expand(1, 3, 8).contiguous()
    residual, h = gated_adaln(x, branch, bias, modulation)
    assert torch.equal(residual, gated_residual_ref(x, branch, bias, modulation[:, :1]))
    torch.testing.assert_close(h, gated_adaln_ref(x, branch, bias, modulation)[1], rtol=2**-7, atol=0)
    unrounded = formula((x.double() + branch.double()).cpu(), modulation[:, 1:].cpu())
    assert float((h.cpu() - unrounded).abs().max()) > 0.1


SHIFT_SUM, GATE_SUM = "shift_sum_main += grad_h_main", "gate_sum_main += grad_x_main * branch_main"
FAULTS = {  # op, file, right, wrong
    "sum over the wrong axis": ("adaln", "adaln", SHIFT_SUM, "shift_sum_main += tl.sum(grad_h_main, axis=0)"),
    "no tail mask": ("adaln", "rows", "mask=tail_columns < WIDTH, other=0.0", "mask=tail_columns >= 0, other=0.0"),
    "next sample's shift": (
        "adaln",
        "adaln",
        "vector = modulation + sample * modulation_batch",
        "vector = modulation + (sample + 1) * modulation_batch",
    ),
    "bias's sum without the gate": ("gated_adaln", "adaln", "x_sum_main * gate_main", "x_sum_main"),
    "bias's sum over one sample": (
        "gated_adaln",
        "rows",
        "count = tl.where(is_bias, batch * chunks, chunks)",
        "count = chunks",
    ),
    "gate's sum without the bias": ("gated_adaln", "adaln", "gate_sum_main += x_sum_main * bias_main", "pass"),
    "gate's sum over the wrong axis": (
        "gated_adaln",
        "adaln",
        GATE_SUM,
        "gate_sum_main += tl.sum(grad_x_main * branch_main, axis=0)",
    ),
    "no mask in the variance": (
        "gated_adaln",
        "rows",
        "tl.where(MAIN + tl.arange(0, TAIL) < WIDTH, tail - row_mean, 0.0)",
        "tail - row_mean",
    ),
    "next sample's gradient": ("gated_adaln", "adaln", "grad_h + sample *", "grad_h + (sample + 1) *"),
    "residual's gradient lost": ("gated_adaln", "adaln", "grad_x_main += grad_residual_main", "grad_x_main += 0"),
}


@kernel
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_in_a_kernel_is_found(fault: str, tmp_path) -> None:
    name, *change = FAULTS[fault]
    with pytest.raises(AssertionError, match=r"error .* allowed"):
        compare(mutant(tmp_path, "adaln", *change), name, SMALL)


@kernel
@OPS
def test_a_copy_of_the_kernel_without_a_fault_passes(name: str, tmp_path) -> None:
    compare(mutant(tmp_path, "adaln", "adaln", "grad_x_main += ", "grad_x_main += "), name, SMALL)


@kernel
@pytest.mark.usefixtures("poisoned")
@OPS
def test_two_runs_of_a_kernel_are_equal_in_every_bit(name: str) -> None:
    arguments, grads = inputs(name, Case((2, 19, 11)))
    assert_same(*(results(getattr(ours, name), arguments, grads) for _ in range(2)))


@kernel
@OPS
def test_kernel_takes_expanded_gradients_and_another_eps(name: str) -> None:
    arguments, grads = inputs(name, Case((2, 3, 8)))
    grads = [torch.ones((), device=DEVICE).expand(2, 3, 8)] * len(grads)  # of a sum: all strides are 0
    truth = results(REFERENCES[name], doubled(arguments), doubled(grads), 0.5)
    got, usual = (results(call, arguments, grads, 0.5) for call in (getattr(ours, name), REFERENCES[name]))
    assert_as_exact(got, usual, truth, terms=8)


@kernel
@pytest.mark.parametrize("used", [0, 1], ids=["residual", "h"])
def test_kernel_gives_gradients_of_one_output_alone(used: int) -> None:
    arguments, grads = inputs("gated_adaln", Case((2, 3, 8)))
    got, expected = (
        torch.autograd.grad(function(*leaves)[used], leaves, grads[used], materialize_grads=True)
        for function in (gated_adaln, gated_adaln_ref)
        for leaves in [[value.detach().requires_grad_() for value in arguments]]
    )
    for value, right in zip(got, expected, strict=True):
        torch.testing.assert_close(value, right, rtol=1e-5, atol=1e-5)


@kernel
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("shape", [(0, 3, 8), (3, 0, 8)])
@OPS
def test_kernel_of_empty_tensors(name: str, shape: tuple[int, int, int]) -> None:
    arguments, grads = inputs(name, Case(shape))
    got = results(getattr(ours, name), arguments, grads)
    assert [value.shape for value in got] == [value.shape for value in (*grads, *arguments)]
    for value in got:
        assert not value.numel() or torch.equal(value, torch.zeros_like(value))


@kernel
@pytest.mark.usefixtures("poisoned")
def test_kernel_adds_up_more_chunks_than_it_takes_at_a_time() -> None:
    partials = torch.randn(4, 2, 2 * rows.TOTAL_ROWS + 3, rows.TOTAL_COLUMNS + 5, device=DEVICE)
    modulation = torch.empty(2, 3, partials.shape[-1], device=DEVICE)
    bias = torch.empty(partials.shape[-1], dtype=BF16, device=DEVICE)
    rows.total(partials, modulation, bias)
    exact = partials.double()
    torch.testing.assert_close(modulation.double(), exact[:3].sum(2).transpose(0, 1), rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(bias.double(), exact[3].sum((0, 1)), rtol=2**-8, atol=1e-5)


@kernel
@OPS
def test_kernel_is_an_op_that_torch_can_check_and_compile(name: str) -> None:
    case = Case((2, 3, 8), FP32, BF16, BF16)
    arguments, grads = inputs(name, case)
    op, backward = getattr(torch.ops.sra_fast, name), getattr(torch.ops.sra_fast, f"{name}_backward")
    torch.library.opcheck(op, (*(value.detach().requires_grad_() for value in arguments), EPS))
    *outputs, mean, rstd = op(*arguments, EPS)
    saved = arguments if name == "adaln" else [outputs[0], *arguments[1:]]
    torch.library.opcheck(backward, (*grads, *saved, mean, rstd))
    call = getattr(ours, name)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert_same(results(compiled, arguments, grads), results(call, arguments, grads))


def changed(place: int, change: Callable[[Tensor], Tensor]) -> Callable[[list[Tensor]], list[Tensor]]:
    return lambda arguments: [change(value) if i == place else value for i, value in enumerate(arguments)]


REFUSED = {  # of gated_adaln's arguments
    "x: shape (2, 3) given; must be (B, T, D)": changed(0, lambda x: x[:, :, 0]),
    "x: shape (1, 1, 8193) given; must be (B, T, D) with D from 1 to 8,192": changed(
        0, lambda x: x.new_ones(1, 1, 8193)
    ),
    "x: dtype torch.float64 given": changed(0, Tensor.double),
    "branch: shape (2, 2, 8) given; must be (2, 3, 8) to match the rows": changed(1, lambda y: y[:, :2]),
    "branch: strides (24, 1, 3) given; the last must be 1": changed(1, lambda y: y.mT.contiguous().mT),
    "bias: shape (1, 8) given; must be (8,)": changed(2, lambda bias: bias[None]),
    "bias: strides (2,) given; the last must be 1": changed(2, lambda bias: bias.repeat(2)[::2]),
    "modulation: dtype torch.int64 given; must be one of torch.float32": changed(3, Tensor.long),
    "modulation: shape (1, 3, 8) given; must be (2, 3, 8)": changed(3, lambda y: y[:1]),
    "modulation: device meta given; must be ": changed(3, lambda y: y.to("meta")),
    "modulation: strides (24, 1, 3) given; the last must be 1": changed(3, lambda y: y.mT.contiguous().mT),
}


@kernel
@pytest.mark.parametrize("message", REFUSED)
def test_kernel_refuses_invalid_tensors(message: str) -> None:
    arguments = [torch.ones(size, device=DEVICE) for size in ((2, 3, 8), (2, 3, 8), (8,), (2, 3, 8))]
    with pytest.raises(ValueError, match=re.escape(message)):
        gated_adaln(*REFUSED[message](arguments))


@kernel
def test_kernel_refuses_invalid_tensors_of_adaln_too() -> None:
    with pytest.raises(ValueError, match=r"modulation: shape \(2, 3, 8\) given; must be \(2, 2, 8\) to match"):
        adaln(*(torch.ones(size, device=DEVICE) for size in ((2, 3, 8), (2, 3, 8))))


@pytest.mark.skipif(not why_unavailable(), reason="kernels run here")
def test_without_a_gpu_the_fused_op_is_refused_in_one_line() -> None:
    with pytest.raises(ValueError, match=r"^a fused kernel cannot run: (there is no CUDA|Triton is not)[^\n]*$"):
        adaln(torch.ones(1, 1, 8), torch.ones(1, 2, 8))


@pytest.mark.parametrize("width", [*range(1, 34), 384, 768, 1024, 1152, 1153, 2047, 2048, 4097, 8191, 8192])
def test_two_tiles_hold_a_row(width: int) -> None:
    main, tail, warps, _ = rows.tiles(width)
    for number in (main, tail, warps):
        assert number & (number - 1) == 0
    assert main <= width <= main + tail
    assert warps <= 16
    if width in (384, 768, 1024, 1152):
        assert main + tail == width
