"""The gated seam between two half blocks against its formula in float64."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from sra_fast.kernels.gated_adaln import gated_adaln_ref, gated_residual_ref

EPS = 1e-6


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
