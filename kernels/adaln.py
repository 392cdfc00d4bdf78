"""Adaptive layer normalisation.

    h = LayerNorm(x) * (1 + scale) + shift

LayerNorm runs over the last axis, without affine parameters; shift and scale belong to a sample and are shared by its
tokens. Backward, with n = (x - mean) rstd, g = dh (1 + scale), means over the last axis and sums over tokens:

    dx = (g - mean(g) - n mean(g n)) rstd        dshift = sum dh        dscale = sum dh n

Sources: Peebles and Xie, "Scalable Diffusion Models with Transformers", 2023, section 3.2 (adaLN-Zero); Ba et al.,
"Layer Normalization", 2016.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import rows
from .language import tl, triton

FORWARD_TOKENS, BACKWARD_TOKENS = 4, 16  # fewest of a program, see `rows.chunks`


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


@triton.jit
def _adaln_forward(
    x, shift, scale,  # (B, T, D), (B, D), (B, D)
    h, mean, rstd,  # (B, T, D), (B, T), (B, T), contiguous
    tokens, chunks, x_batch, x_token, shift_batch, scale_batch, eps,
    WIDTH: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Every CHUNKS-th token of one sample."""
    program = tl.program_id(0)
    sample = (program // chunks).to(tl.int64)
    shift_a, shift_b = rows.load(shift + sample * shift_batch, WIDTH, MAIN, TAIL)
    scale_a, scale_b = rows.load(scale + sample * scale_batch, WIDTH, MAIN, TAIL)
    for token in tl.range(program % chunks, tokens, chunks, num_stages=STAGES):
        row = sample * tokens + token
        a, b = rows.load(x + sample * x_batch + tl.cast(token, tl.int64) * x_token, WIDTH, MAIN, TAIL)
        n_a, n_b, mu, inverse = rows.normalise(a, b, eps, WIDTH, MAIN, TAIL)
        rows.store(h + row * WIDTH, n_a * (1 + scale_a) + shift_a, n_b * (1 + scale_b) + shift_b, WIDTH, MAIN, TAIL)
        tl.store(mean + row, mu)
        tl.store(rstd + row, inverse)


@triton.jit
def _adaln_backward(
    dh, x, scale, mean, rstd,  # (B, T, D), (B, T, D), (B, D), (B, T), (B, T)
    dx, dshift, dscale,  # (B, T, D), (B, CHUNKS, D) float32, (B, CHUNKS, D) float32, contiguous
    tokens, chunks, dh_batch, dh_token, x_batch, x_token, scale_batch,
    WIDTH: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Every CHUNKS-th token of one sample, and the sums over these."""
    program = tl.program_id(0)
    sample = (program // chunks).to(tl.int64)
    scale_a, scale_b = rows.load(scale + sample * scale_batch, WIDTH, MAIN, TAIL)
    dshift_a, dshift_b = tl.zeros((MAIN,), tl.float32), tl.zeros((TAIL,), tl.float32)
    dscale_a, dscale_b = tl.zeros((MAIN,), tl.float32), tl.zeros((TAIL,), tl.float32)
    for token in tl.range(program % chunks, tokens, chunks, num_stages=STAGES):
        row = sample * tokens + token
        place = tl.cast(token, tl.int64)
        mu, inverse = tl.load(mean + row), tl.load(rstd + row)
        x_a, x_b = rows.load(x + sample * x_batch + place * x_token, WIDTH, MAIN, TAIL)
        dh_a, dh_b = rows.load(dh + sample * dh_batch + place * dh_token, WIDTH, MAIN, TAIL)
        n_a, n_b = (x_a - mu) * inverse, (x_b - mu) * inverse
        dshift_a, dshift_b = dshift_a + dh_a, dshift_b + dh_b
        dscale_a, dscale_b = dscale_a + dh_a * n_a, dscale_b + dh_b * n_b
        dx_a, dx_b = rows.normalise_backward(n_a, n_b, dh_a * (1 + scale_a), dh_b * (1 + scale_b), inverse, WIDTH)
        rows.store(dx + row * WIDTH, dx_a, dx_b, WIDTH, MAIN, TAIL)
    partial = program.to(tl.int64) * WIDTH
    rows.store(dshift + partial, dshift_a, dshift_b, WIDTH, MAIN, TAIL)
    rows.store(dscale + partial, dscale_a, dscale_b, WIDTH, MAIN, TAIL)


def _launch_forward(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    batch, tokens, width = x.shape
    main, tail, warps, stages = rows.tiles(width)
    chunks = rows.chunks(batch, tokens, FORWARD_TOKENS)
    h = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    mean, rstd = (torch.empty(batch, tokens, dtype=torch.float32, device=x.device) for _ in range(2))
    if batch * chunks:
        with torch.cuda.device_of(x):
            _adaln_forward[(batch * chunks,)](
                x, shift, scale, h, mean, rstd,
                tokens, chunks, *x.stride()[:2], shift.stride(0), scale.stride(0), eps,
                WIDTH=width, MAIN=main, TAIL=tail, STAGES=stages, num_warps=warps,
            )  # fmt: skip
    return h, mean, rstd


def _launch_backward(
    dh: Tensor, x: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor, shift_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    batch, tokens, width = x.shape
    main, tail, warps, stages = rows.tiles(width)
    chunks = rows.chunks(batch, tokens, BACKWARD_TOKENS)
    dh = rows.with_dense_rows(dh)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    partials = torch.empty(2, batch, chunks, width, dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        if batch * chunks:
            _adaln_backward[(batch * chunks,)](
                dh, x, scale, mean, rstd, dx, *partials,
                tokens, chunks, *dh.stride()[:2], *x.stride()[:2], scale.stride(0),
                WIDTH=width, MAIN=main, TAIL=tail, STAGES=stages, num_warps=warps,
            )  # fmt: skip
        return dx, *rows.total(partials, shift_dtype, scale.dtype)


_op = torch.library.custom_op(
    "sra_fast::adaln",
    _launch_forward,
    mutates_args=(),
    schema="(Tensor x, Tensor shift, Tensor scale, float eps) -> (Tensor h, Tensor mean, Tensor rstd)",
)
_backward_op = torch.library.custom_op(
    "sra_fast::adaln_backward",
    _launch_backward,
    mutates_args=(),
    schema="(Tensor dh, Tensor x, Tensor scale, Tensor mean, Tensor rstd, ScalarType shift_dtype)"
    " -> (Tensor dx, Tensor dshift, Tensor dscale)",
)


@_op.register_fake
def _(x, shift, scale, eps):
    mean, rstd = (x.new_empty(x.shape[:2], dtype=torch.float32) for _ in range(2))
    return x.new_empty(x.shape), mean, rstd


@_backward_op.register_fake
def _(dh, x, scale, mean, rstd, shift_dtype):
    return x.new_empty(x.shape), scale.new_empty(scale.shape, dtype=shift_dtype), scale.new_empty(scale.shape)


def _save(ctx, inputs, output) -> None:
    x, shift, scale, _ = inputs
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(x, scale, mean, rstd)
    ctx.shift_dtype = shift.dtype


def _gradients(ctx, dh, *_) -> tuple[Tensor, Tensor, Tensor, None]:
    return *_backward_op(dh, *ctx.saved_tensors, ctx.shift_dtype), None


_op.register_autograd(_gradients, setup_context=_save)


def adaln(x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6) -> Tensor:
    """adaLN as one kernel forward, and one and a small sum backward.

    Args:
        x: (B, T, D), float32, bfloat16 or float16, D up to 8,192; any strides but the last, which is 1.
        shift, scale: (B, D), of any of these dtypes; views into one modulation tensor are read where they lie.
        eps: added to the variance.

    Returns:
        (B, T, D) in x's dtype, contiguous. Statistics and products are computed in float32.

    Raises:
        ValueError: on a wrong shape, dtype, device or stride.
    """
    rows.check({"x": x}, {"shift": shift, "scale": scale})
    return _op(x, shift, scale, eps)[0]
