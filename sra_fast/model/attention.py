"""Multi-head attention as one function with several backends.

softmax(q k^T / sqrt(d)) v        no mask: every token sees every token
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def _math(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (q @ k.transpose(-2, -1)) / math.sqrt(q.shape[-1])  # (B, H, T, T)
    return scores.softmax(dim=-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(v.dtype) @ v


_BACKENDS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "sdpa": F.scaled_dot_product_attention,
    "math": _math,
}
BACKENDS = tuple(_BACKENDS)


def attention(q: Tensor, k: Tensor, v: Tensor, backend: str = "sdpa") -> Tensor:
    """Attention of every token over every token.

    Args:
        q, k, v: (B, H, T, d), any floating dtype; strided views are fine.
        backend: one of `BACKENDS`; "sdpa" leaves the choice of kernel to PyTorch.

    Returns:
        (B, H, T, d) in v's dtype.
    """
    if backend not in _BACKENDS:
        raise ValueError(f"backend: {backend!r} given; must be one of {', '.join(BACKENDS)}")
    return _BACKENDS[backend](q, k, v)
