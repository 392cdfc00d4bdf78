"""The seam between two half blocks of a transformer with adaLN-Zero.

    x' = x + gate * branch
    h  = LayerNorm(x') * (1 + scale) + shift

and, where no normalisation follows, the gated residual x' alone.

Source: Peebles and Xie, "Scalable Diffusion Models with Transformers", 2023, section 3.2 (adaLN-Zero).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .adaln import adaln_ref


def gated_residual_ref(x: Tensor, branch: Tensor, gate: Tensor) -> Tensor:
    """Reference gated residual: (B, T, D) in x's dtype.

    Args:
        x: (B, T, D), the residual stream.
        branch: (B, T, D), the output of attention or MLP.
        gate: (B, D).
    """
    compute = torch.promote_types(x.dtype, torch.float32)
    return (x.to(compute) + gate.to(compute)[:, None] * branch.to(compute)).to(x.dtype)


def gated_adaln_ref(
    x: Tensor, branch: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """Reference gated residual followed by adaLN.

    Args:
        x, branch: (B, T, D).
        gate, shift, scale: (B, D).
        eps: added to the variance.

    Returns:
        (x', h), both (B, T, D) in x's dtype. The normalisation reads x' as stored, after rounding to that dtype.
    """
    residual = gated_residual_ref(x, branch, gate)
    return residual, adaln_ref(residual, shift, scale, eps)
