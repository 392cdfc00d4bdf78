"""Multi-head attention as one function with several backends.

    softmax(q k^T / sqrt(d)) v        no mask: every token sees every token

Queries, keys and values stay packed as the projection wrote them, (B, T, 3, H, d): every backend reads strided views,
and the result comes out as (B, T, H d) without a copy. In the backward pass PyTorch's kernels return three gradients,
which are then written into one; flash-attn's packed functions write one to begin with.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from importlib import import_module
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from sra_fast.config import refuse_unless

# Compute capabilities on which cuDNN's kernel is taken before PyTorch's own flash kernel: 1.7 to 2.3 times as fast for
# training shapes on Hopper, 0.82 times on A100, 0.88 times on RTX PRO 6000 (huggingface/transformers#48163), and
# faster than FlashAttention-4 on B200 (sglang#33655).
CUDNN_FIRST = (9, 10)
LARGEST_HEAD = 128  # up to which all of the kernels for half precision go; they also want a multiple of 8


def _math(qkv: Tensor) -> Tensor:
    q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))  # 3 x (B, H, T, d)
    scores = (q @ k.transpose(-2, -1)) / math.sqrt(q.shape[-1])  # (B, H, T, T)
    weights = scores.softmax(dim=-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(v.dtype)
    return (weights @ v).transpose(1, 2).flatten(2)


def _sdpa(qkv: Tensor) -> Tensor:
    q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))  # 3 x (B, H, T, d), views
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def _only(kernel: SDPBackend) -> Callable[[Tensor], Tensor]:
    """PyTorch's attention by one kernel and no other: where it cannot be had, this raises."""

    def attend(qkv: Tensor) -> Tensor:
        with sdpa_kernel(kernel):
            return _sdpa(qkv)

    return attend


def _flash_attn(module: str, function: str, packed: bool) -> Callable[[Tensor], Tensor]:
    """A function of one of the flash-attn packages."""

    def attend(qkv: Tensor) -> Tensor:
        call = getattr(import_module(module), function)
        out = call(qkv) if packed else call(*qkv.unbind(2))  # (B, T, H, d), with the logsumexp in some versions
        return (out[0] if isinstance(out, tuple) else out).flatten(2)

    return attend


PACKAGES = {  # backend -> (module, function, whether it takes qkv as it is)
    "flash-attn-2": ("flash_attn", "flash_attn_qkvpacked_func", True),
    "flash-attn-3": ("flash_attn_interface", "flash_attn_qkvpacked_func", True),
    "flash-attn-4": ("flash_attn.cute", "flash_attn_func", False),
}
AMPERE, HOPPER = 8, 9
OLDEST = {"flash-attn-2": AMPERE, "flash-attn-3": HOPPER, "flash-attn-4": HOPPER}  # major compute capability
_BACKENDS: dict[str, Callable[[Tensor], Tensor]] = {
    "sdpa": _sdpa,
    "cudnn": _only(SDPBackend.CUDNN_ATTENTION),
    "flash": _only(SDPBackend.FLASH_ATTENTION),
    **{name: _flash_attn(*found) for name, found in PACKAGES.items()},
    "math": _math,
}
BACKENDS = tuple(_BACKENDS)


def attention(qkv: Tensor, backend: str = "sdpa") -> Tensor:
    """Attention of every token over every token.

    Args:
        qkv: (B, T, 3, H, d), any floating dtype the backend takes; strided views are fine.
        backend: one of `BACKENDS`. "sdpa" leaves the kernel to PyTorch; "cudnn" and "flash" are that kernel or an
            error.

    Returns:
        (B, T, H d) in qkv's dtype.
    """
    if backend not in _BACKENDS:
        raise ValueError(f"backend: {backend!r} given; must be one of {', '.join(BACKENDS)}")
    return _BACKENDS[backend](qkv)


def operator(backend: str) -> Callable[[Tensor], Tensor]:
    """`attention` by one backend, as a function of qkv alone. torch.compile does not look into the packages' own."""
    function = partial(attention, backend=backend)
    return torch.compiler.disable(function) if backend in PACKAGES else function


def _installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # of the package it would be in
        return False


def available(device: torch.device, dtype: torch.dtype = torch.bfloat16, head_dim: int = 64) -> tuple[str, ...]:
    """Backends that can be had on a device for heads of that dtype and width."""
    found = ["sdpa", "math"]
    half = dtype in (torch.bfloat16, torch.float16)
    if device.type == "cpu":
        found.append("flash")
    elif half and head_dim % 8 == 0 and head_dim <= LARGEST_HEAD:
        major = torch.cuda.get_device_capability(device)[0]
        found += [name for name, (module, *_) in PACKAGES.items() if major >= OLDEST[name] and _installed(module)]
        if major >= AMPERE and torch.backends.cuda.is_flash_attention_available():
            found.append("flash")
        if major >= AMPERE and torch.backends.cudnn.is_available():
            found.append("cudnn")
    return tuple(name for name in BACKENDS if name in found)


def choose(wish: str, device: torch.device, dtype: torch.dtype, head_dim: int, deterministic: bool) -> str:
    """The backend of a run, by rule: a wish is granted or refused; "auto" is cuDNN on Hopper and Blackwell, PyTorch's
    flash kernel on other GPUs, and what PyTorch takes where neither can be had.

    Args:
        wish: "auto" or one of `BACKENDS`.
        device, dtype, head_dim: of queries, keys and values.
        deterministic: leaves out cuDNN, whose backward pass adds in any order.

    Raises:
        Refused: for a backend that cannot be had, or not deterministically.
    """
    allowed = available(device, dtype, head_dim)
    if wish != "auto":
        where = f"{device.type}, {str(dtype).removeprefix('torch.')}, heads of {head_dim}"
        refuse_unless(wish in allowed, "model.attention", wish, f"not available for {where}: {', '.join(allowed)} are")
        sure = wish in ("sdpa", "flash", "math") or not deterministic
        refuse_unless(sure, "model.attention", wish, "not deterministic; must be auto, flash or math")
        return wish
    if device.type == "cuda":
        major = torch.cuda.get_device_capability(device)[0]
        if "cudnn" in allowed and major in CUDNN_FIRST and not deterministic:
            return "cudnn"
        if "flash" in allowed:
            return "flash"
    return "sdpa"
