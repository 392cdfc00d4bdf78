"""The ops of a training step and their implementations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

from . import adaln, adamw_ema, alignment, gradient_norm, language, library, linear_gelu, perturb


class Op(NamedTuple):
    """One op.

    Attributes:
        reference: in plain PyTorch.
        fused: a kernel, or None where torch.compile of the reference is the best there is.
        of: what the kernel is part of: Triton kernels, the compiled library (csrc/), or a GPU build of PyTorch.
    """

    reference: Callable
    fused: Callable | None = None
    of: Literal["triton", "library", "torch"] = "triton"


OPS: dict[str, Op] = {
    "adaln": Op(adaln.adaln_ref, adaln.adaln),
    "gated_adaln": Op(adaln.gated_adaln_ref, adaln.gated_adaln),
    # No kernel: torch.compile fuses it with the ops around it, and a kernel of ours would break that fusion.
    "gated_residual": Op(adaln.gated_residual_ref),
    "linear_gelu": Op(linear_gelu.linear_gelu_ref, linear_gelu.linear_gelu, of="torch"),
    "alignment": Op(alignment.alignment_ref, alignment.alignment),
    "perturb": Op(perturb.perturb_ref, perturb.perturb),
    "gradient_norm": Op(gradient_norm.gradient_norm_ref, gradient_norm.gradient_norm, of="library"),
    "adamw_ema": Op(adamw_ema.adamw_ema_ref, adamw_ema.adamw_ema, of="library"),
}


def why_unavailable(op: str, architecture: str) -> str:
    """Why the fused kernel of an op cannot run and how to fix it; '' if it can.

    Args:
        op: a key of `OPS`.
        architecture: "cpu", or that of a GPU, such as "sm_90".
    """
    on_gpu = architecture != "cpu"
    if OPS[op].fused is None:
        return "this op has no fused kernel"
    if OPS[op].of == "library":
        return library.why_unavailable(on_gpu)
    if OPS[op].of == "torch":
        return "" if on_gpu else "it runs on GPUs only"
    if not on_gpu and not language.INTERPRETED:
        return language.why_unavailable() or "it runs on GPUs only"
    return language.why_unavailable()
