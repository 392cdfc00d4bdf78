"""The gated seam between two half blocks: the reference against its formula in float64, the kernels against it."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import pytest
import torch
from interpreter import DEVICE, assert_as_exact, inside, kernel, mutant, poisoned, run_interpreted  # noqa: F401
from torch import Tensor

from sra_fast.kernels import gated_adaln as ours
from sra_fast.kernels.gated_adaln import gated_adaln, gated_adaln_ref, gated_residual_ref
from sra_fast.kernels.language import AVAILABLE

EPS = 1e-6
FULL, HALF, BRAIN = torch.float32, torch.float16, torch.bfloat16


def draw(*shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def normed(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LayerNorm(x) * (1 + scale) + shift in numpy float64, over the last axis."""
    x, shift, scale = (value.detach().double().numpy() for value in (x, shift, scale))
    centred = x - x.mean(axis=2, keepdims=True)
    h = centred / np.sqrt((centred**2).mean(axis=2, keepdims=True) + EPS)
    return torch.from_numpy(h * (1 + scale[:, None, :]) + shift[:, None, :])


def test_is_its_formula() -> None:
    x, branch, gate, shift, scale = draw((2, 5, 8), (2, 5, 8), (2, 8), (2, 8), (2, 8))
    residual, h = gated_adaln_ref(x, branch, gate, shift, scale)
    wanted = torch.stack([x[b] + gate[b] * branch[b] for b in range(2)])  # the gate of sample b on all its tokens
    torch.testing.assert_close(residual, wanted, atol=1e-14, rtol=1e-14)
    torch.testing.assert_close(h, normed(wanted, shift, scale), atol=1e-12, rtol=1e-12)
    assert torch.equal(gated_residual_ref(x, branch, gate), residual)


def test_a_closed_gate_leaves_the_residual_as_it_is() -> None:
    x, branch, gate = draw((2, 5, 8), (2, 5, 8), (2, 8))
    assert torch.equal(gated_residual_ref(x, branch, torch.zeros_like(gate)), x)


def test_gradients_of_both_outputs() -> None:
    inputs = [value.requires_grad_() for value in draw((2, 3, 6), (2, 3, 6), (2, 6), (2, 6), (2, 6))]
    assert torch.autograd.gradcheck(gated_adaln_ref, inputs)
    assert torch.autograd.gradcheck(gated_residual_ref, inputs[:3])


def test_bf16_rounds_the_residual_once_and_normalises_what_it_stored() -> None:
    x, branch, gate, shift, scale = draw((4, 16, 64), (4, 16, 64), (4, 64), (4, 64), (4, 64))
    x, branch = (x + 16).bfloat16(), branch.bfloat16()
    gate, shift, scale = gate.float(), shift.float(), scale.float()
    residual, h = gated_adaln_ref(x, branch, gate, shift, scale)
    assert residual.dtype == h.dtype == torch.bfloat16
    exact = x.double() + gate.double()[:, None] * branch.double()
    assert bool(((residual.double() - exact).abs() <= 1.001 * 2**-8 * exact.abs()).all())  # half a bf16 ulp
    truth = normed(residual, shift, scale)  # of x' as stored
    floor = 8 * 20 * 2**-24 * (1 + truth.abs())  # fp32 statistics of values up to 20, a few roundings
    assert bool(((h.double() - truth).abs() <= 1.001 * 2**-8 * truth.abs() + floor).all())


def test_strided_views_of_one_modulation_tensor() -> None:
    x, branch, modulation = draw((2, 5, 8), (2, 5, 8), (2, 48))
    views = modulation.chunk(6, dim=-1)[2:5]
    assert not views[0].is_contiguous()
    for got, wanted in zip(
        gated_adaln_ref(x, branch, *views), gated_adaln_ref(x, branch, *(v.contiguous() for v in views)), strict=True
    ):
        assert torch.equal(got, wanted)


# (B, T, D), dtypes of x, of the branch and of the modulation; shapes as in test_adaln.py.
CASES = [
    ((1, 1, 1), FULL, FULL, FULL),
    ((3, 5, 1), FULL, FULL, FULL),
    ((3, 7, 13), FULL, FULL, FULL),
    ((2, 19, 11), BRAIN, BRAIN, BRAIN),
    ((2, 3, 64), HALF, HALF, HALF),
    ((2, 3, 65), FULL, BRAIN, FULL),
    ((4, 1, 72), BRAIN, BRAIN, FULL),
    ((1, 5, 384), HALF, HALF, HALF),
    ((2, 2, 1152), BRAIN, BRAIN, FULL),
    ((2, 2, 1153), FULL, FULL, BRAIN),
]


def drawn(shape: tuple, dtype: torch.dtype, branch: torch.dtype, modulation: torch.dtype) -> tuple[list[Tensor], ...]:
    """(x, branch, gate, shift, scale) and the gradients of x' and h, none contiguous."""
    generator = torch.Generator().manual_seed(0)
    x, y, *above = (inside(shape, kind, generator) for kind in (dtype, branch, dtype, dtype))
    return [x, y, *(inside(shape[::2], modulation, generator) for _ in range(3))], above


def results(function: Callable, inputs: list[Tensor], above: list[Tensor], eps: float = EPS) -> list[Tensor]:
    """x', h and the gradients of x, branch, gate, shift, scale."""
    leaves = [value.detach().requires_grad_() for value in inputs]
    outputs = function(*leaves, eps)
    return [*(value.detach() for value in outputs), *torch.autograd.grad(outputs, leaves, above)]


def compare(function: Callable, shape: tuple, *dtypes: torch.dtype) -> None:
    inputs, above = drawn(shape, *dtypes)
    truth = results(gated_adaln_ref, [value.double() for value in inputs], [value.double() for value in above])
    got, usual = (results(call, inputs, above) for call in (function, gated_adaln_ref))
    assert_as_exact(got, usual, truth, terms=max(shape[1], shape[2]))


def test_kernels_in_the_interpreter() -> None:
    run_interpreted(__file__)


@kernel
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("shape", "dtype", "branch", "modulation"), CASES, ids=str)
def test_kernel_is_as_exact_as_pytorch(shape: tuple, dtype, branch, modulation) -> None:
    compare(gated_adaln, shape, dtype, branch, modulation)


@kernel
def test_kernel_normalises_the_residual_as_it_stored_it() -> None:
    """With x' a large number whose rounding to bf16 is larger than what is left of it after the mean."""
    x = torch.full((1, 1, 8), 256.0, dtype=BRAIN, device=DEVICE)
    branch = torch.tensor([0.9, 1.1, 2.9, 3.1, -0.4, -0.6, 1.4, 0.1], device=DEVICE).to(BRAIN).view(1, 1, 8)
    gate, shift, scale = torch.ones(1, 8, device=DEVICE), *torch.zeros(2, 1, 8, device=DEVICE)
    residual, h = gated_adaln(x, branch, gate, shift, scale)
    assert torch.equal(residual, gated_residual_ref(x, branch, gate))
    torch.testing.assert_close(h, gated_adaln_ref(x, branch, gate, shift, scale)[1], rtol=2**-7, atol=0)
    unrounded = normed((x.double() + branch.double()).cpu(), shift.cpu(), scale.cpu())
    assert float((h.cpu() - unrounded).abs().max()) > 0.1


FAULTS = {
    "wrong reduction axis": ("gated_adaln", "dgate_a + dx_a * branch_a,", "dgate_a + tl.sum(dx_a * branch_a, axis=0),"),
    "dropped tail mask": ("rows", "b = tl.where(MAIN + tl.arange(0, TAIL) < WIDTH, b - mu, 0.0)", "b = b - mu"),
    "batch row off by one": ("gated_adaln", "dh + sample * dh_batch", "dh + (sample + 1) * dh_batch"),
}


@kernel
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_in_a_kernel_is_found(fault: str, tmp_path) -> None:
    with pytest.raises(AssertionError, match=r"error .* allowed"):
        compare(mutant(tmp_path, "gated_adaln", *FAULTS[fault]).gated_adaln, (3, 7, 13), FULL, FULL, FULL)


@kernel
def test_a_copy_of_the_kernel_without_a_fault_passes(tmp_path) -> None:
    same = "dgate_a + dx_a * branch_a,"
    compare(mutant(tmp_path, "gated_adaln", "gated_adaln", same, same).gated_adaln, (3, 7, 13), FULL, FULL, FULL)


@kernel
@pytest.mark.usefixtures("poisoned")
def test_two_runs_of_a_kernel_are_equal_in_every_bit() -> None:
    inputs, above = drawn((2, 19, 11), FULL, FULL, FULL)
    for first, second in zip(results(gated_adaln, inputs, above), results(gated_adaln, inputs, above), strict=True):
        assert torch.equal(first, second)


@kernel
@pytest.mark.parametrize("used", [0, 1], ids=["residual", "h"])
def test_kernel_gives_gradients_of_one_output_alone(used: int) -> None:
    inputs, above = drawn((2, 3, 8), FULL, FULL, FULL)
    got, wanted = (
        torch.autograd.grad(function(*leaves)[used], leaves, above[used], materialize_grads=True)
        for function in (gated_adaln, gated_adaln_ref)
        for leaves in [[value.detach().requires_grad_() for value in inputs]]
    )
    for value, right in zip(got, wanted, strict=True):
        torch.testing.assert_close(value, right, rtol=1e-5, atol=1e-5)


@kernel
def test_kernel_takes_expanded_gradients() -> None:
    inputs, _ = drawn((2, 3, 8), FULL, FULL, FULL)
    above = [torch.ones((), device=DEVICE).expand(2, 3, 8)] * 2  # of a sum: all strides are 0
    truth = results(gated_adaln_ref, [value.double() for value in inputs], [value.double() for value in above])
    assert_as_exact(results(gated_adaln, inputs, above), results(gated_adaln_ref, inputs, above), truth, terms=8)


@kernel
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("shape", [(0, 3, 8), (3, 0, 8)])
def test_kernel_of_nothing_is_nothing(shape: tuple[int, int, int]) -> None:
    inputs = [torch.ones(size, device=DEVICE) for size in (shape, shape, *[shape[::2]] * 3)]
    residual, h, dx, dbranch, *sums = results(gated_adaln, inputs, [torch.ones(shape, device=DEVICE)] * 2)
    assert residual.shape == h.shape == dx.shape == dbranch.shape == shape
    for value in sums:
        assert torch.equal(value, torch.zeros(shape[::2], device=DEVICE))


@kernel
def test_kernel_is_an_op_that_torch_can_check_and_compile() -> None:
    inputs, above = drawn((2, 3, 8), FULL, BRAIN, BRAIN)
    leaves = [value.detach().requires_grad_() for value in inputs]
    torch.library.opcheck(torch.ops.sra_fast.gated_adaln, (*leaves, EPS))
    _, branch, gate, shift, scale = inputs
    residual, _, mean, rstd = torch.ops.sra_fast.gated_adaln(*inputs, EPS)
    saved = (residual, branch, gate, scale, mean, rstd)
    torch.library.opcheck(torch.ops.sra_fast.gated_adaln_backward, (*above, *saved, shift.dtype))
    compiled = torch.compile(gated_adaln, fullgraph=True, backend="aot_eager")
    for got, wanted in zip(results(compiled, inputs, above), results(gated_adaln, inputs, above), strict=True):
        assert torch.equal(got, wanted)


@kernel
@pytest.mark.parametrize(
    ("place", "wrong", "message"),
    [
        (1, lambda y: y[:, :2], "branch: shape (2, 2, 8) given; must be (2, 3, 8), as x has it"),
        (1, lambda y: y.mT.contiguous().mT, "branch: strides (24, 1, 3) given; the last must be 1"),
        (2, lambda y: y.double(), "gate: dtype torch.float64 given; must be one of torch.float32"),
        (3, lambda y: y.to("meta"), "shift: device meta given"),
        (4, lambda y: y[:, None], "scale: shape (2, 1, 8) given; must be (2, 8)"),
    ],
    ids=["shape", "stride", "dtype", "device", "axes"],
)
def test_kernel_refuses_what_it_cannot_take(place: int, wrong: Callable, message: str) -> None:
    inputs = [torch.ones(size, device=DEVICE) for size in ((2, 3, 8), (2, 3, 8), *[(2, 8)] * 3)]
    inputs[place] = wrong(inputs[place])
    with pytest.raises(ValueError, match=re.escape(message)):
        gated_adaln(*inputs)


@pytest.mark.skipif(not AVAILABLE, reason="Triton is not installed")
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_both_passes_compile_for_every_architecture(capability: int) -> None:
    from benchmarks.harness.machine_code import compiled, recorded

    x, vector, statistic = torch.empty(2, 64, 384, dtype=BRAIN), torch.empty(2, 384), torch.empty(2, 64)
    with recorded() as launches:
        ours._launch_forward(x, x, vector, vector, vector, EPS)
        ours._launch_backward(x, x, x, x, vector, vector, statistic, statistic, FULL)
    assert [launch.name for launch in launches] == [
        "gated_adaln._gated_adaln_forward",
        "gated_adaln._gated_adaln_backward",
        "rows._adaln_total",
    ]
    for launch in launches:
        assert compiled(launch, capability).asm["cubin"]
