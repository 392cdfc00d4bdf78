"""SiT's loss against its closed form. The interpolant is tested in test_perturb.py."""

from __future__ import annotations

import pytest
import torch

from sra_fast.kernels.perturb import NoisedBatch
from sra_fast.objective.flow import Flow


def noised_with(target: torch.Tensor) -> NoisedBatch:
    """A batch of which only the target matters."""
    return NoisedBatch(*[torch.empty(0)] * 4, target, *[torch.empty(0)] * 2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_loss_is_the_mean_squared_error_in_at_least_fp32(dtype: torch.dtype) -> None:
    target, prediction = torch.randn(2, 4, 2, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    target, prediction = target.to(torch.promote_types(dtype, torch.float32)), prediction.to(dtype).requires_grad_()
    loss = Flow().loss(prediction, noised_with(target))
    assert loss.dtype == target.dtype
    difference = prediction.detach().double() - target.double()
    assert loss.item() == pytest.approx(float(difference.square().mean()), rel=1e-6)
    (gradient,) = torch.autograd.grad(loss, prediction)
    expected = 2 * difference / difference.numel()
    torch.testing.assert_close(gradient.double(), expected, rtol=2**-8 if dtype == torch.bfloat16 else 1e-6, atol=0)
