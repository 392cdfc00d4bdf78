"""adaLN's reference against its formula in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from sra_fast.kernels.adaln import adaln_ref

EPS = 1e-6


def formula(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LayerNorm(x) * (1 + scale) + shift in numpy float64; mean and biased variance over the last axis."""
    x, shift, scale = (value.detach().double().numpy() for value in (x, shift, scale))
    centred = x - x.mean(axis=2, keepdims=True)
    normed = centred / np.sqrt((centred**2).mean(axis=2, keepdims=True) + EPS)
    return torch.from_numpy(normed * (1 + scale[:, None, :]) + shift[:, None, :])


def draw(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


@pytest.mark.parametrize("shape", [(2, 5, 8), (1, 1, 16), (3, 4, 33)])
def test_is_its_formula(shape: tuple[int, int, int]) -> None:
    x, shift, scale = draw(shape, shape[::2], shape[::2])
    torch.testing.assert_close(adaln_ref(x, shift, scale), formula(x, shift, scale), atol=1e-12, rtol=1e-12)


def test_is_layer_norm_without_affine_where_the_modulation_is_zero() -> None:
    (x,) = draw((2, 5, 8))
    zero = torch.zeros(2, 8, dtype=torch.float64)
    norm = torch.nn.LayerNorm(8, elementwise_affine=False, eps=EPS, dtype=torch.float64)
    torch.testing.assert_close(adaln_ref(x, zero, zero), norm(x), atol=1e-12, rtol=1e-12)


def test_eps_is_added_to_the_variance() -> None:
    x = torch.full((1, 1, 4), 3.0, dtype=torch.float64)
    x[0, 0, 0] += 1e-3  # a variance of the size of eps
    zero = torch.zeros(1, 4, dtype=torch.float64)
    torch.testing.assert_close(adaln_ref(x, zero, zero), formula(x, zero, zero), rtol=1e-9, atol=0)


def test_gradients() -> None:
    inputs = [value.requires_grad_() for value in draw((2, 3, 6), (2, 6), (2, 6))]
    assert torch.autograd.gradcheck(adaln_ref, inputs)


def within_bf16(h: Tensor, truth: Tensor) -> bool:
    """Half a bf16 ulp (relative 2^-8) for the one rounding at the end, and a floor for fp32 statistics: x up to 20 at
    a spread of about 1, 2^-24 relative, a few roundings."""
    return bool(((h.double() - truth).abs() <= 2**-8 * truth.abs() * 1.001 + 8 * 20 * 2**-24 * (1 + truth.abs())).all())


def test_bf16_input_is_normalised_with_fp32_statistics() -> None:
    x, shift, scale = draw((4, 16, 64), (4, 64), (4, 64))
    x = (x + 16).bfloat16()  # far from zero, where statistics in bf16 would be worthless
    shift, scale = shift.float(), scale.float()
    h = adaln_ref(x, shift, scale)
    assert h.dtype == torch.bfloat16
    assert within_bf16(h, formula(x, shift, scale))
    centred = x - x.mean(-1, keepdim=True)
    in_bf16 = centred / (centred.square().mean(-1, keepdim=True) + EPS).sqrt()
    in_bf16 = in_bf16 * (1 + scale.bfloat16()[:, None]) + shift.bfloat16()[:, None]
    assert not within_bf16(in_bf16, formula(x, shift, scale)), "the bound would not catch bf16 statistics"


def test_strided_views_of_one_modulation_tensor() -> None:
    x, modulation = draw((2, 5, 8), (2, 48))
    shift, scale = modulation.chunk(6, dim=-1)[:2]
    assert not shift.is_contiguous()
    assert torch.equal(adaln_ref(x, shift, scale), adaln_ref(x, shift.contiguous(), scale.contiguous()))
