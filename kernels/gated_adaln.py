"""The seam between two half blocks of a transformer with adaLN-Zero.

    x' = x + gate * branch
    h  = LayerNorm(x') * (1 + scale) + shift

and, where no normalisation follows, the gated residual x' alone. That has no kernel: torch.compile makes one pass of it
together with what surrounds it, which a kernel of ours would cut off.

Backward, with n = (x' - mean) rstd, g = dh (1 + scale), means over the last axis and sums over tokens:

    dx = dx' + (g - mean(g) - n mean(g n)) rstd        dbranch = gate * dx
    dgate = sum dx * branch        dshift = sum dh        dscale = sum dh n

Sources: Peebles and Xie, "Scalable Diffusion Models with Transformers", 2023, section 3.2 (adaLN-Zero); Ba et al.,
"Layer Normalization", 2016.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import rows
from .adaln import adaln_ref
from .language import tl, triton

FORWARD_TOKENS, BACKWARD_TOKENS = 4, 16  # fewest of a program, see `rows.chunks`


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


@triton.jit
def _gated_adaln_forward(
    x, branch, gate, shift, scale,  # (B, T, D), (B, T, D), 3 x (B, D)
    residual, h, mean, rstd,  # (B, T, D), (B, T, D), (B, T), (B, T), contiguous
    tokens, chunks, x_batch, x_token, branch_batch, branch_token, gate_batch, shift_batch, scale_batch, eps,
    WIDTH: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Every CHUNKS-th token of one sample."""
    program = tl.program_id(0)
    sample = (program // chunks).to(tl.int64)
    gate_a, gate_b = rows.load(gate + sample * gate_batch, WIDTH, MAIN, TAIL)
    shift_a, shift_b = rows.load(shift + sample * shift_batch, WIDTH, MAIN, TAIL)
    scale_a, scale_b = rows.load(scale + sample * scale_batch, WIDTH, MAIN, TAIL)
    for token in tl.range(program % chunks, tokens, chunks, num_stages=STAGES):
        row = sample * tokens + token
        place = tl.cast(token, tl.int64)
        a, b = rows.load(x + sample * x_batch + place * x_token, WIDTH, MAIN, TAIL)
        branch_a, branch_b = rows.load(branch + sample * branch_batch + place * branch_token, WIDTH, MAIN, TAIL)
        # The norm reads x' as stored, because that is what backward will read.
        a = (a + gate_a * branch_a).to(residual.dtype.element_ty).to(tl.float32)
        b = (b + gate_b * branch_b).to(residual.dtype.element_ty).to(tl.float32)
        rows.store(residual + row * WIDTH, a, b, WIDTH, MAIN, TAIL)
        n_a, n_b, mu, inverse = rows.normalise(a, b, eps, WIDTH, MAIN, TAIL)
        rows.store(h + row * WIDTH, n_a * (1 + scale_a) + shift_a, n_b * (1 + scale_b) + shift_b, WIDTH, MAIN, TAIL)
        tl.store(mean + row, mu)
        tl.store(rstd + row, inverse)


@triton.jit
def _gated_adaln_backward(
    above, dh, residual, branch, gate, scale, mean, rstd,  # dx', dh, x', branch (B, T, D); 2 x (B, D), 2 x (B, T)
    dx, dbranch, dgate, dshift, dscale,  # (B, T, D), (B, T, D), 3 x (B, CHUNKS, D) float32, contiguous
    tokens, chunks, above_batch, above_token, dh_batch, dh_token, residual_batch, residual_token,
    branch_batch, branch_token, gate_batch, scale_batch,
    WIDTH: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Every CHUNKS-th token of one sample, and the sums over these."""
    program = tl.program_id(0)
    sample = (program // chunks).to(tl.int64)
    gate_a, gate_b = rows.load(gate + sample * gate_batch, WIDTH, MAIN, TAIL)
    scale_a, scale_b = rows.load(scale + sample * scale_batch, WIDTH, MAIN, TAIL)
    dgate_a, dgate_b = tl.zeros((MAIN,), tl.float32), tl.zeros((TAIL,), tl.float32)
    dshift_a, dshift_b = tl.zeros((MAIN,), tl.float32), tl.zeros((TAIL,), tl.float32)
    dscale_a, dscale_b = tl.zeros((MAIN,), tl.float32), tl.zeros((TAIL,), tl.float32)
    for token in tl.range(program % chunks, tokens, chunks, num_stages=STAGES):
        row = sample * tokens + token
        place = tl.cast(token, tl.int64)
        mu, inverse = tl.load(mean + row), tl.load(rstd + row)
        x_a, x_b = rows.load(residual + sample * residual_batch + place * residual_token, WIDTH, MAIN, TAIL)
        dh_a, dh_b = rows.load(dh + sample * dh_batch + place * dh_token, WIDTH, MAIN, TAIL)
        above_a, above_b = rows.load(above + sample * above_batch + place * above_token, WIDTH, MAIN, TAIL)
        branch_a, branch_b = rows.load(branch + sample * branch_batch + place * branch_token, WIDTH, MAIN, TAIL)
        n_a, n_b = (x_a - mu) * inverse, (x_b - mu) * inverse
        dshift_a, dshift_b = dshift_a + dh_a, dshift_b + dh_b
        dscale_a, dscale_b = dscale_a + dh_a * n_a, dscale_b + dh_b * n_b
        dx_a, dx_b = rows.normalise_backward(n_a, n_b, dh_a * (1 + scale_a), dh_b * (1 + scale_b), inverse, WIDTH)
        dx_a, dx_b = dx_a + above_a, dx_b + above_b
        dgate_a, dgate_b = dgate_a + dx_a * branch_a, dgate_b + dx_b * branch_b
        rows.store(dx + row * WIDTH, dx_a, dx_b, WIDTH, MAIN, TAIL)
        rows.store(dbranch + row * WIDTH, dx_a * gate_a, dx_b * gate_b, WIDTH, MAIN, TAIL)
    partial = program.to(tl.int64) * WIDTH
    rows.store(dgate + partial, dgate_a, dgate_b, WIDTH, MAIN, TAIL)
    rows.store(dshift + partial, dshift_a, dshift_b, WIDTH, MAIN, TAIL)
    rows.store(dscale + partial, dscale_a, dscale_b, WIDTH, MAIN, TAIL)


def _launch_forward(
    x: Tensor, branch: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, tokens, width = x.shape
    main, tail, warps, stages = rows.tiles(width)
    chunks = rows.chunks(batch, tokens, FORWARD_TOKENS)
    residual, h = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(2))
    mean, rstd = (torch.empty(batch, tokens, dtype=torch.float32, device=x.device) for _ in range(2))
    if batch * chunks:
        with torch.cuda.device_of(x):
            _gated_adaln_forward[(batch * chunks,)](
                x, branch, gate, shift, scale, residual, h, mean, rstd,
                tokens, chunks, *x.stride()[:2], *branch.stride()[:2],
                gate.stride(0), shift.stride(0), scale.stride(0), eps,
                WIDTH=width, MAIN=main, TAIL=tail, STAGES=stages, num_warps=warps,
            )  # fmt: skip
    return residual, h, mean, rstd


def _launch_backward(
    above: Tensor, dh: Tensor, residual: Tensor, branch: Tensor, gate: Tensor, scale: Tensor, mean: Tensor,
    rstd: Tensor, shift_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    batch, tokens, width = residual.shape
    main, tail, warps, stages = rows.tiles(width)
    chunks = rows.chunks(batch, tokens, BACKWARD_TOKENS)
    above, dh = rows.with_dense_rows(above), rows.with_dense_rows(dh)
    dx = torch.empty(residual.shape, dtype=residual.dtype, device=residual.device)
    dbranch = torch.empty(branch.shape, dtype=branch.dtype, device=branch.device)
    partials = torch.empty(3, batch, chunks, width, dtype=torch.float32, device=residual.device)
    with torch.cuda.device_of(residual):
        if batch * chunks:
            _gated_adaln_backward[(batch * chunks,)](
                above, dh, residual, branch, gate, scale, mean, rstd, dx, dbranch, *partials,
                tokens, chunks, *above.stride()[:2], *dh.stride()[:2], *residual.stride()[:2], *branch.stride()[:2],
                gate.stride(0), scale.stride(0),
                WIDTH=width, MAIN=main, TAIL=tail, STAGES=stages, num_warps=warps,
            )  # fmt: skip
        return dx, dbranch, *rows.total(partials, gate.dtype, shift_dtype, scale.dtype)


_op = torch.library.custom_op(
    "sra_fast::gated_adaln",
    _launch_forward,
    mutates_args=(),
    schema="(Tensor x, Tensor branch, Tensor gate, Tensor shift, Tensor scale, float eps)"
    " -> (Tensor residual, Tensor h, Tensor mean, Tensor rstd)",
)
_backward_op = torch.library.custom_op(
    "sra_fast::gated_adaln_backward",
    _launch_backward,
    mutates_args=(),
    schema="(Tensor above, Tensor dh, Tensor residual, Tensor branch, Tensor gate, Tensor scale, Tensor mean,"
    " Tensor rstd, ScalarType shift_dtype) -> (Tensor dx, Tensor dbranch, Tensor dgate, Tensor dshift, Tensor dscale)",
)


@_op.register_fake
def _(x, branch, gate, shift, scale, eps):
    mean, rstd = (x.new_empty(x.shape[:2], dtype=torch.float32) for _ in range(2))
    return x.new_empty(x.shape), x.new_empty(x.shape), mean, rstd


@_backward_op.register_fake
def _(above, dh, residual, branch, gate, scale, mean, rstd, shift_dtype):
    vectors = (gate.new_empty(gate.shape, dtype=dtype) for dtype in (gate.dtype, shift_dtype, scale.dtype))
    return residual.new_empty(residual.shape), branch.new_empty(branch.shape), *vectors


def _save(ctx, inputs, output) -> None:
    _, branch, gate, shift, scale, _ = inputs
    residual, _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(residual, branch, gate, scale, mean, rstd)
    ctx.shift_dtype = shift.dtype


def _gradients(ctx, above, dh, *_) -> tuple[Tensor | None, ...]:
    return *_backward_op(above, dh, *ctx.saved_tensors, ctx.shift_dtype), None


_op.register_autograd(_gradients, setup_context=_save)


def gated_adaln(
    x: Tensor, branch: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """Gated residual and adaLN as one kernel forward, and one and a small sum backward.

    Args:
        x, branch: (B, T, D), float32, bfloat16 or float16, D up to 8,192; any strides but the last, which is 1.
        gate, shift, scale: (B, D), of any of these dtypes; views into one modulation tensor are read where they lie.
        eps: added to the variance.

    Returns:
        (x', h), both (B, T, D) in x's dtype, contiguous. The normalisation reads x' as stored, after rounding to that
        dtype; everything else is computed in float32.

    Raises:
        ValueError: on a wrong shape, dtype, device or stride.
    """
    rows.check({"x": x, "branch": branch}, {"gate": gate, "shift": shift, "scale": scale})
    return _op(x, branch, gate, shift, scale, eps)[:2]
