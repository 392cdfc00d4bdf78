"""A linear layer and tanh-GELU, without gradients.

    a = GELU(x W^T + bias)

For the backward pass a training step needs the argument of GELU as well, which cuBLASLt could store beside the result
but PyTorch's operator does not. Without gradients, in the teacher and when sampling, GELU is the epilogue of the matrix
product: (B, T, H) is written once, instead of written, read and written.

Source: Hendrycks and Gimpel, "Gaussian Error Linear Units (GELUs)", 2016, the approximation with tanh.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def linear_gelu_ref(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Reference in plain PyTorch: (B, T, H) in x's dtype.

    Args:
        x: (B, T, D), any floating dtype.
        weight: (H, D).
        bias: (H,).
    """
    return F.gelu(F.linear(x, weight, bias), approximate="tanh")


# An operator of its own, because torch.compile would decompose PyTorch's into a product and GELU.
@torch.library.custom_op(
    "sra_fast::linear_gelu", mutates_args=(), schema="(Tensor x, Tensor weight, Tensor bias) -> Tensor"
)
def _linear_gelu(x, weight, bias):
    # Uses tanh-GELU on GPUs, but the one with erf on CPUs.
    return torch._addmm_activation(bias, x.flatten(0, 1), weight.t(), use_gelu=True).view(*x.shape[:2], -1)


@_linear_gelu.register_fake
def _(x, weight, bias):
    return x.new_empty(*x.shape[:2], len(weight))


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """GELU as the epilogue of the matrix product, on a GPU. Not differentiable.

    Args:
        x: (B, T, D), contiguous, float32, bfloat16 or float16.
        weight: (H, D), of the same dtype.
        bias: (H,), of the same dtype.

    Returns:
        (B, T, H). GELU is computed in float32 before the result is rounded once.

    Raises:
        ValueError: if x is not on a GPU.
    """
    if x.device.type != "cuda":
        raise ValueError(f"x: device {x.device} given; must be a CUDA device")
    return _linear_gelu(x, weight, bias)
