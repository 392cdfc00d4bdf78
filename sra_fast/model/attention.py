"""Multi-head attention as one function with several backends.

    softmax(q k^T / sqrt(d)) v        no mask: every token sees every token

Queries, keys and values stay packed as the projection wrote them, (B, T, 3, H, d): every backend reads strided views
and returns (B, T, H d) without a copy. In the backward pass PyTorch's kernels return three gradients, which are then
copied into one; flash-attn's packed functions write one directly.
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

from sra_fast.errors import Refused

# Compute capabilities on which cuDNN's kernel is preferred to PyTorch's own flash kernel: 1.7 to 2.3 times as fast for
# training shapes on Hopper, 0.82 times on A100, 0.88 times on RTX PRO 6000 (huggingface/transformers#48163), and
# faster than FlashAttention-4 on B200 (sglang#33655).
CUDNN_FIRST = (9, 10)
LARGEST_HEAD = 128  # supported by all half-precision kernels, which also need a multiple of 8


def split_heads(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values by head, as PyTorch's attention takes them: (B, T, 3, H, d) -> 3 x (B, H, T, d), views.

    The parts are split along the last axis, not unbound: their gradients are then concatenated along it, and
    torch.compile sums the projection's bias gradient in the same kernel.
    """
    heads = qkv.shape[3:]
    q, k, v = (part.unflatten(-1, heads).transpose(1, 2) for part in qkv.flatten(2).chunk(3, dim=-1))
    return q, k, v


def _math(qkv: Tensor) -> Tensor:
    q, k, v = split_heads(qkv)
    scores = (q @ k.transpose(-2, -1)) / math.sqrt(q.shape[-1])  # (B, H, T, T)
    weights = scores.softmax(dim=-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(v.dtype)
    return (weights @ v).transpose(1, 2).flatten(2)


def _sdpa(qkv: Tensor) -> Tensor:
    q, k, v = split_heads(qkv)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def _only(kernel: SDPBackend) -> Callable[[Tensor], Tensor]:
    """PyTorch's attention by this kernel; raises where it is not available."""

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


PACKAGES = {  # backend -> (module, function, whether it takes packed qkv)
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
    **{name: _flash_attn(*function) for name, function in PACKAGES.items()},
    "math": _math,
}
BACKENDS = tuple(_BACKENDS)


def attention(qkv: Tensor, backend: str = "sdpa") -> Tensor:
    """Attention of every token over every token.

    Args:
        qkv: (B, T, 3, H, d), any floating dtype the backend supports; strided views are fine.
        backend: one of `BACKENDS`. "sdpa" leaves the choice of the kernel to PyTorch; "cudnn" and "flash" are that
            kernel or an error.

    Returns:
        (B, T, H d) in qkv's dtype.
    """
    if backend not in _BACKENDS:
        raise ValueError(f"backend: {backend!r} given; must be one of {', '.join(BACKENDS)}")
    return _BACKENDS[backend](qkv)


def attention_operator(backend: str) -> Callable[[Tensor], Tensor]:
    """`attention` by one backend, as a function of qkv alone. torch.compile does not trace into the packages."""
    function = partial(attention, backend=backend)
    return torch.compiler.disable(function) if backend in PACKAGES else function  # pyright: ignore[reportReturnType]


def _installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # its parent package is not installed
        return False


def available(device: torch.device, dtype: torch.dtype = torch.bfloat16, head_dim: int = 64) -> tuple[str, ...]:
    """Backends that are available on a device for heads of this dtype and width."""
    names = ["sdpa", "math"]
    half = dtype in (torch.bfloat16, torch.float16)
    if device.type == "cpu":
        names.append("flash")
    elif half and head_dim % 8 == 0 and head_dim <= LARGEST_HEAD:
        major = torch.cuda.get_device_capability(device)[0]
        names += [name for name, (module, *_) in PACKAGES.items() if major >= OLDEST[name] and _installed(module)]
        if major >= AMPERE and torch.backends.cuda.is_flash_attention_available():
            names.append("flash")
        if major >= AMPERE and torch.backends.cudnn.is_available():
            names.append("cudnn")
    return tuple(name for name in BACKENDS if name in names)


def candidates(device: torch.device, dtype: torch.dtype, head_dim: int, deterministic: bool) -> tuple[str, ...]:
    """Backends that may be the fastest, beginning with what `choose_attention` takes unmeasured; arguments as there."""
    first = choose_attention("auto", device, dtype, head_dim, deterministic)
    kernels = ("flash",) if deterministic else ("cudnn", "flash", *PACKAGES)
    others = (name for name in kernels if name != first and name in available(device, dtype, head_dim))
    return (first,) if first == "sdpa" else (first, *others)


def choose_attention(choice: str, device: torch.device, dtype: torch.dtype, head_dim: int, deterministic: bool) -> str:
    """The backend of a run. "auto", unless it was measured, is cuDNN on Hopper and Blackwell, PyTorch's flash kernel on
    other GPUs, and PyTorch's own choice where neither is available.

    Args:
        choice: "auto" or one of `BACKENDS`.
        device, dtype, head_dim: of queries, keys and values.
        deterministic: excludes cuDNN, whose backward pass adds in no fixed order.

    Raises:
        Refused: for a backend that is not available, or not deterministic.
    """
    names = available(device, dtype, head_dim)
    if choice != "auto":
        if choice not in names:
            where = f"{device.type}, {str(dtype).removeprefix('torch.')}, heads of {head_dim}"
            raise Refused("model.attention", choice, f"not available for {where}: {', '.join(names)} are")
        if deterministic and choice not in ("sdpa", "flash", "math"):
            raise Refused("model.attention", choice, "not deterministic; must be auto, flash or math")
        return choice
    if device.type == "cuda":
        major = torch.cuda.get_device_capability(device)[0]
        if "cudnn" in names and major in CUDNN_FIRST and not deterministic:
            return "cudnn"
        if "flash" in names:
            return "flash"
    return "sdpa"
