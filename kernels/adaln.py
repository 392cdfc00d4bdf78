"""Adaptive layer normalisation (adaLN), alone or after a gated residual.

    x' = x + gate * branch                                   gated only; without a branch, x' = x
    h  = LayerNorm(x') * (1 + scale) + shift

LayerNorm runs over the last axis, without affine parameters; gate, shift and scale belong to a sample and are shared by
its tokens. Backward, with n = (x' - mean) rstd, g = grad_h (1 + scale), means over the last axis and sums over tokens:

    grad_x      = grad_x' + (g - mean(g) - n mean(g n)) rstd
    grad_branch = gate * grad_x                              grad_gate  = sum grad_x * branch
    grad_shift  = sum grad_h                                 grad_scale = sum grad_h n

The gated residual x' without a norm after it has no kernel: torch.compile fuses it with its neighbours, which a kernel
of ours would prevent.

Sources: Peebles and Xie, "Scalable Diffusion Models with Transformers", 2023, section 3.2 (adaLN-Zero); Ba et al.,
"Layer Normalization", 2016.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import rows
from .language import tl, triton

FORWARD_TOKENS, BACKWARD_TOKENS = 4, 16  # minimum tokens per program, see `rows.chunks`


def adaln_ref(x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6) -> Tensor:
    """Reference adaLN in plain PyTorch.

    Args:
        x: (B, T, D), any floating dtype.
        shift, scale: (B, D), any floating dtype and strides.
        eps: added to the variance.

    Returns:
        (B, T, D) in x's dtype. Statistics and products are computed in promote_types(x.dtype, float32).
    """
    compute = torch.promote_types(x.dtype, torch.float32)
    normed = F.layer_norm(x.to(compute), x.shape[-1:], eps=eps)
    return (normed * (1 + scale.to(compute)[:, None]) + shift.to(compute)[:, None]).to(x.dtype)


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
        (x', h), both (B, T, D) in x's dtype. The norm reads x' after rounding to that dtype.
    """
    residual = gated_residual_ref(x, branch, gate)
    return residual, adaln_ref(residual, shift, scale, eps)


@triton.jit
def _adaln_forward(
    x, branch, gate, shift, scale,  # (B, T, D), (B, T, D) or None, (B, D) or None, (B, D), (B, D)
    residual, h, mean, rstd,  # (B, T, D) or None, (B, T, D), (B, T), (B, T), contiguous
    tokens, chunks, x_batch, x_token, branch_batch, branch_token, gate_batch, shift_batch, scale_batch, eps,
    WIDTH: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Tokens program % chunks, then every `chunks`-th, of one sample. Without branch and gate, the norm alone."""
    program = tl.program_id(0)
    sample = (program // chunks).to(tl.int64)
    if branch is not None:
        gate_main, gate_tail = rows.load(gate + sample * gate_batch, WIDTH, MAIN, TAIL)
    shift_main, shift_tail = rows.load(shift + sample * shift_batch, WIDTH, MAIN, TAIL)
    scale_main, scale_tail = rows.load(scale + sample * scale_batch, WIDTH, MAIN, TAIL)
    for token in tl.range(program % chunks, tokens, chunks, num_stages=STAGES):
        row = sample * tokens + token
        position = tl.cast(token, tl.int64)
        x_main, x_tail = rows.load(x + sample * x_batch + position * x_token, WIDTH, MAIN, TAIL)
        if branch is not None:
            branch_row = branch + sample * branch_batch + position * branch_token
            branch_main, branch_tail = rows.load(branch_row, WIDTH, MAIN, TAIL)
            # The norm reads x' as stored, because the backward pass will read it from there.
            x_main = (x_main + gate_main * branch_main).to(residual.dtype.element_ty).to(tl.float32)
            x_tail = (x_tail + gate_tail * branch_tail).to(residual.dtype.element_ty).to(tl.float32)
            rows.store(residual + row * WIDTH, x_main, x_tail, WIDTH, MAIN, TAIL)
        n_main, n_tail, row_mean, row_rstd = rows.normalise(x_main, x_tail, eps, WIDTH, MAIN, TAIL)
        h_main = n_main * (1 + scale_main) + shift_main
        h_tail = n_tail * (1 + scale_tail) + shift_tail
        rows.store(h + row * WIDTH, h_main, h_tail, WIDTH, MAIN, TAIL)
        tl.store(mean + row, row_mean)
        tl.store(rstd + row, row_rstd)


@triton.jit
def _adaln_backward(
    grad_residual, grad_h, residual,  # (B, T, D) or None, (B, T, D), (B, T, D): x', the norm's input
    branch, gate, scale, mean, rstd,  # (B, T, D) or None, (B, D) or None, (B, D), (B, T), (B, T)
    grad_x, grad_branch,  # (B, T, D), (B, T, D) or None, contiguous
    grad_shift, grad_scale, grad_gate,  # 3 x (B, CHUNKS, D) float32, contiguous; the last may be None
    tokens, chunks, grad_residual_batch, grad_residual_token, grad_h_batch, grad_h_token,
    residual_batch, residual_token, branch_batch, branch_token, gate_batch, scale_batch,
    WIDTH: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The same tokens as the forward kernel, and the sums over these. Without branch and gate, the norm alone."""
    program = tl.program_id(0)
    sample = (program // chunks).to(tl.int64)
    if branch is not None:
        gate_main, gate_tail = rows.load(gate + sample * gate_batch, WIDTH, MAIN, TAIL)
    scale_main, scale_tail = rows.load(scale + sample * scale_batch, WIDTH, MAIN, TAIL)
    gate_sum_main, gate_sum_tail = tl.zeros((MAIN,), tl.float32), tl.zeros((TAIL,), tl.float32)
    shift_sum_main, shift_sum_tail = tl.zeros((MAIN,), tl.float32), tl.zeros((TAIL,), tl.float32)
    scale_sum_main, scale_sum_tail = tl.zeros((MAIN,), tl.float32), tl.zeros((TAIL,), tl.float32)
    for token in tl.range(program % chunks, tokens, chunks, num_stages=STAGES):
        row = sample * tokens + token
        position = tl.cast(token, tl.int64)
        row_mean, row_rstd = tl.load(mean + row), tl.load(rstd + row)
        x_row = residual + sample * residual_batch + position * residual_token
        x_main, x_tail = rows.load(x_row, WIDTH, MAIN, TAIL)
        grad_h_row = grad_h + sample * grad_h_batch + position * grad_h_token
        grad_h_main, grad_h_tail = rows.load(grad_h_row, WIDTH, MAIN, TAIL)
        if branch is not None:
            grad_residual_row = grad_residual + sample * grad_residual_batch + position * grad_residual_token
            grad_residual_main, grad_residual_tail = rows.load(grad_residual_row, WIDTH, MAIN, TAIL)
            branch_row = branch + sample * branch_batch + position * branch_token
            branch_main, branch_tail = rows.load(branch_row, WIDTH, MAIN, TAIL)
        n_main, n_tail = (x_main - row_mean) * row_rstd, (x_tail - row_mean) * row_rstd
        shift_sum_main += grad_h_main
        shift_sum_tail += grad_h_tail
        scale_sum_main += grad_h_main * n_main
        scale_sum_tail += grad_h_tail * n_tail
        g_main, g_tail = grad_h_main * (1 + scale_main), grad_h_tail * (1 + scale_tail)
        grad_x_main, grad_x_tail = rows.normalise_backward(n_main, n_tail, g_main, g_tail, row_rstd, WIDTH)
        if branch is not None:
            grad_x_main += grad_residual_main
            grad_x_tail += grad_residual_tail
            gate_sum_main += grad_x_main * branch_main
            gate_sum_tail += grad_x_tail * branch_tail
        rows.store(grad_x + row * WIDTH, grad_x_main, grad_x_tail, WIDTH, MAIN, TAIL)
        if branch is not None:
            rows.store(grad_branch + row * WIDTH, grad_x_main * gate_main, grad_x_tail * gate_tail, WIDTH, MAIN, TAIL)
    partial = program.to(tl.int64) * WIDTH
    if branch is not None:
        rows.store(grad_gate + partial, gate_sum_main, gate_sum_tail, WIDTH, MAIN, TAIL)
    rows.store(grad_shift + partial, shift_sum_main, shift_sum_tail, WIDTH, MAIN, TAIL)
    rows.store(grad_scale + partial, scale_sum_main, scale_sum_tail, WIDTH, MAIN, TAIL)


def _strides(tensor: Tensor | None, axes: int) -> tuple[int, ...]:
    """Strides of the first axes; zeros for a missing tensor."""
    return (0,) * axes if tensor is None else tensor.stride()[:axes]


def _allocate_like(tensor: Tensor) -> Tensor:
    """An uninitialized contiguous tensor, whatever the strides."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)


def _allocate_outputs(x: Tensor, gated: bool) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
    """Uninitialized (x' or None, h, mean, rstd)."""
    mean, rstd = (torch.empty(x.shape[:2], dtype=torch.float32, device=x.device) for _ in range(2))
    return _allocate_like(x) if gated else None, _allocate_like(x), mean, rstd


def _forward(
    x: Tensor, branch: Tensor | None, gate: Tensor | None, shift: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
    """Launch the forward kernel. Returns (x' or None, h, mean, rstd)."""
    batch, tokens, width = x.shape
    main, tail, warps, stages = rows.tiles(width)
    chunks = rows.chunks(batch, tokens, FORWARD_TOKENS)
    outputs = _allocate_outputs(x, gated=branch is not None)
    if batch * chunks:
        with torch.cuda.device_of(x):
            _adaln_forward[(batch * chunks,)](
                x, branch, gate, shift, scale, *outputs, tokens, chunks,
                *_strides(x, 2), *_strides(branch, 2), *_strides(gate, 1), *_strides(shift, 1), *_strides(scale, 1),
                eps, WIDTH=width, MAIN=main, TAIL=tail, STAGES=stages, num_warps=warps,
            )  # fmt: skip
    return outputs


def _backward(
    grad_residual: Tensor | None, grad_h: Tensor, residual: Tensor, branch: Tensor | None, gate: Tensor | None,
    scale: Tensor, mean: Tensor, rstd: Tensor, shift_dtype: torch.dtype,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Launch the backward kernel. Returns the gradients of x, branch (or None), shift, scale and, if gated, gate."""
    batch, tokens, width = residual.shape
    main, tail, warps, stages = rows.tiles(width)
    chunks = rows.chunks(batch, tokens, BACKWARD_TOKENS)
    grad_x, grad_branch = _allocate_like(residual), None if branch is None else _allocate_like(branch)
    dtypes = (shift_dtype, scale.dtype) if gate is None else (shift_dtype, scale.dtype, gate.dtype)
    partials = torch.empty(len(dtypes), batch, chunks, width, dtype=torch.float32, device=residual.device)
    grad_shift, grad_scale, grad_gate = (*partials, None)[:3]
    with torch.cuda.device_of(residual):
        if batch * chunks:
            _adaln_backward[(batch * chunks,)](
                grad_residual, grad_h, residual, branch, gate, scale, mean, rstd,
                grad_x, grad_branch, grad_shift, grad_scale, grad_gate, tokens, chunks,
                *_strides(grad_residual, 2), *_strides(grad_h, 2), *_strides(residual, 2), *_strides(branch, 2),
                *_strides(gate, 1), *_strides(scale, 1),
                WIDTH=width, MAIN=main, TAIL=tail, STAGES=stages, num_warps=warps,
            )  # fmt: skip
        return grad_x, grad_branch, *rows.total(partials, *dtypes)


@torch.library.custom_op(
    "sra_fast::adaln",
    mutates_args=(),
    schema="(Tensor x, Tensor shift, Tensor scale, float eps) -> (Tensor h, Tensor mean, Tensor rstd)",
)
def _adaln(x, shift, scale, eps):
    return _forward(x, None, None, shift, scale, eps)[1:]


@_adaln.register_fake
def _(x, shift, scale, eps):
    return _allocate_outputs(x, gated=False)[1:]


@torch.library.custom_op(
    "sra_fast::adaln_backward",
    mutates_args=(),
    schema="(Tensor grad_h, Tensor x, Tensor scale, Tensor mean, Tensor rstd, ScalarType shift_dtype)"
    " -> (Tensor grad_x, Tensor grad_shift, Tensor grad_scale)",
)
def _adaln_grad(grad_h, x, scale, mean, rstd, shift_dtype):
    grad_h = rows.with_dense_rows(grad_h)
    grad_x, _, grad_shift, grad_scale = _backward(None, grad_h, x, None, None, scale, mean, rstd, shift_dtype)
    return grad_x, grad_shift, grad_scale


@_adaln_grad.register_fake
def _(grad_h, x, scale, mean, rstd, shift_dtype):
    return _allocate_like(x), scale.new_empty(scale.shape, dtype=shift_dtype), scale.new_empty(scale.shape)


def _adaln_setup(ctx, inputs, output) -> None:
    x, shift, scale, _ = inputs
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(x, scale, mean, rstd)
    ctx.shift_dtype = shift.dtype


def _adaln_autograd(ctx, grad_h, *_):
    return *_adaln_grad(grad_h, *ctx.saved_tensors, ctx.shift_dtype), None


_adaln.register_autograd(_adaln_autograd, setup_context=_adaln_setup)


@torch.library.custom_op(
    "sra_fast::gated_adaln",
    mutates_args=(),
    schema="(Tensor x, Tensor branch, Tensor gate, Tensor shift, Tensor scale, float eps)"
    " -> (Tensor residual, Tensor h, Tensor mean, Tensor rstd)",
)
def _gated_adaln(x, branch, gate, shift, scale, eps):
    return _forward(x, branch, gate, shift, scale, eps)


@_gated_adaln.register_fake
def _(x, branch, gate, shift, scale, eps):
    return _allocate_outputs(x, gated=True)


@torch.library.custom_op(
    "sra_fast::gated_adaln_backward",
    mutates_args=(),
    schema="(Tensor grad_residual, Tensor grad_h, Tensor residual, Tensor branch, Tensor gate, Tensor scale,"
    " Tensor mean, Tensor rstd, ScalarType shift_dtype)"
    " -> (Tensor grad_x, Tensor grad_branch, Tensor grad_gate, Tensor grad_shift, Tensor grad_scale)",
)
def _gated_adaln_grad(grad_residual, grad_h, *saved):
    gradients = _backward(rows.with_dense_rows(grad_residual), rows.with_dense_rows(grad_h), *saved)
    grad_x, grad_branch, grad_shift, grad_scale, grad_gate = gradients
    return grad_x, grad_branch, grad_gate, grad_shift, grad_scale


@_gated_adaln_grad.register_fake
def _(grad_residual, grad_h, residual, branch, gate, scale, mean, rstd, shift_dtype):
    vectors = (gate.new_empty(gate.shape, dtype=dtype) for dtype in (gate.dtype, shift_dtype, scale.dtype))
    return _allocate_like(residual), _allocate_like(branch), *vectors


def _gated_adaln_setup(ctx, inputs, output) -> None:
    _, branch, gate, shift, scale, _ = inputs
    residual, _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(residual, branch, gate, scale, mean, rstd)
    ctx.shift_dtype = shift.dtype


def _gated_adaln_autograd(ctx, grad_residual, grad_h, *_):
    return *_gated_adaln_grad(grad_residual, grad_h, *ctx.saved_tensors, ctx.shift_dtype), None


_gated_adaln.register_autograd(_gated_adaln_autograd, setup_context=_gated_adaln_setup)


def adaln(x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6) -> Tensor:
    """adaLN: one kernel in the forward pass, one kernel and a small reduction in the backward pass.

    Args:
        x: (B, T, D), float32, bfloat16 or float16, D up to 8,192; last stride 1.
        shift, scale: (B, D), of any of these dtypes, last stride 1; views into one modulation tensor are not copied.
        eps: added to the variance.

    Returns:
        (B, T, D) in x's dtype, contiguous. Statistics and products are computed in float32.

    Raises:
        ValueError: on a wrong shape, dtype, device or stride.
    """
    rows.check({"x": x}, {"shift": shift, "scale": scale})
    return _adaln(x, shift, scale, eps)[0]


def gated_adaln(
    x: Tensor, branch: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """Gated residual and adaLN: one kernel in the forward pass, one and a small reduction in the backward pass.

    Args:
        x, branch: (B, T, D), float32, bfloat16 or float16, D up to 8,192; last stride 1.
        gate, shift, scale: (B, D), as in `adaln`.
        eps: added to the variance.

    Returns:
        (x', h), both (B, T, D) in x's dtype, contiguous. The norm reads x' after rounding to that dtype; everything
        else is computed in float32.

    Raises:
        ValueError: on a wrong shape, dtype, device or stride.
    """
    rows.check({"x": x, "branch": branch}, {"gate": gate, "shift": shift, "scale": scale})
    return _gated_adaln(x, branch, gate, shift, scale, eps)[:2]
