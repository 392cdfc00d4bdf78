"""Adaptive layer normalisation.

    h = LayerNorm(x) * (1 + scale) + shift

LayerNorm runs over the last axis, without affine parameters; shift and scale belong to a sample and are shared by its
tokens.

Source: Peebles and Xie, "Scalable Diffusion Models with Transformers", 2023, section 3.2 (adaLN-Zero).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def adaln_ref(x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6) -> Tensor:
    """Reference adaLN in plain PyTorch.

    Args:
        x: (B, T, D), any floating dtype.
        shift, scale: (B, D), any floating dtype; strided views are fine.
        eps: added to the variance.

    Returns:
        (B, T, D) in x's dtype. Statistics and products are computed in promote_types(x.dtype, float32).
    """
    compute = torch.promote_types(x.dtype, torch.float32)
    normed = F.layer_norm(x.to(compute), x.shape[-1:], eps=eps)
    return (normed * (1 + scale.to(compute)[:, None]) + shift.to(compute)[:, None]).to(x.dtype)
