"""Adaptive layer normalisation (adaLN), alone or after a gated residual.

    x' = x + gate * (branch + bias)                          gated only; without a branch, x' = x
    h  = LayerNorm(x') * (1 + scale) + shift

LayerNorm runs over the last axis, without affine parameters; gate, shift and scale belong to a sample and are shared by
its tokens. Backward, with n = (x' - mean) rstd, g = grad_h (1 + scale), means over the last axis and sums over tokens:

    grad_x      = grad_x' + (g - mean(g) - n mean(g n)) rstd
    grad_branch = gate * grad_x                              grad_gate  = sum grad_x * (branch + bias)
    grad_shift  = sum grad_h                                 grad_scale = sum grad_h n
    grad_bias   = sum over samples of gate * sum grad_x

The bias is that of the linear layer that computes the branch. It is added here, because the backward kernel has the
rows whose sum is its gradient, which would otherwise be read again.

The vectors of a sample are one tensor, a view of the modulation of all layers, and so is their gradient.

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


def adaln_ref(x: Tensor, modulation: Tensor, eps: float = 1e-6) -> Tensor:
    """Reference adaLN in plain PyTorch.

    Args:
        x: (B, T, D), any floating dtype.
        modulation: (B, 2, D), shift and scale, any floating dtype and strides.
        eps: added to the variance.

    Returns:
        (B, T, D) in x's dtype. Statistics and products are computed in promote_types(x.dtype, float32).
    """
    compute = torch.promote_types(x.dtype, torch.float32)
    shift, scale = modulation.unbind(1)
    normed = F.layer_norm(x.to(compute), x.shape[-1:], eps=eps)
    return (normed * (1 + scale.to(compute)[:, None]) + shift.to(compute)[:, None]).to(x.dtype)


def gated_residual_ref(x: Tensor, branch: Tensor, bias: Tensor, gate: Tensor) -> Tensor:
    """Reference gated residual: (B, T, D) in x's dtype.

    Args:
        x: (B, T, D), the residual stream.
        branch: (B, T, D), the output of attention or MLP without the last layer's bias.
        bias: (D,), that bias.
        gate: (B, 1, D).
    """
    compute = torch.promote_types(x.dtype, torch.float32)
    return (x.to(compute) + gate.to(compute) * (branch.to(compute) + bias.to(compute))).to(x.dtype)


def gated_adaln_ref(
    x: Tensor, branch: Tensor, bias: Tensor, modulation: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """Reference gated residual followed by adaLN.

    Args:
        x, branch, bias: as `gated_residual_ref`.
        modulation: (B, 3, D), gate, shift and scale.
        eps: added to the variance.

    Returns:
        (x', h), both (B, T, D) in x's dtype. The norm reads x' after rounding to that dtype.
    """
    gate, shift_and_scale = modulation.split([1, 2], dim=1)
    residual = gated_residual_ref(x, branch, bias, gate)
    return residual, adaln_ref(residual, shift_and_scale, eps)


@triton.jit
def _adaln_forward(
    x, branch, bias, modulation,  # (B, T, D), (B, T, D) or None, (D,) or None, (B, 3 or, without a branch, 2, D)
    residual, h, mean, rstd,  # (B, T, D) or None, (B, T, D), (B, T), (B, T), contiguous
    tokens, chunks, x_batch, x_token, branch_batch, branch_token, modulation_batch, modulation_vector, eps,
    WIDTH: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Tokens program % chunks, then every `chunks`-th, of one sample. Without a branch, the norm alone."""
    program = tl.program_id(0)
    sample = (program // chunks).to(tl.int64)
    vector = modulation + sample * modulation_batch
    if branch is not None:
        gate_main, gate_tail = rows.load(vector, WIDTH, MAIN, TAIL)
        bias_main, bias_tail = rows.load(bias, WIDTH, MAIN, TAIL)
        vector += modulation_vector
    shift_main, shift_tail = rows.load(vector, WIDTH, MAIN, TAIL)
    scale_main, scale_tail = rows.load(vector + modulation_vector, WIDTH, MAIN, TAIL)
    for token in tl.range(program % chunks, tokens, chunks, num_stages=STAGES):
        row = sample * tokens + token
        position = tl.cast(token, tl.int64)
        x_main, x_tail = rows.load(x + sample * x_batch + position * x_token, WIDTH, MAIN, TAIL)
        if branch is not None:
            branch_row = branch + sample * branch_batch + position * branch_token
            branch_main, branch_tail = rows.load(branch_row, WIDTH, MAIN, TAIL)
            # The norm reads x' as stored, because the backward pass will read it from there.
            x_main = (x_main + gate_main * (branch_main + bias_main)).to(residual.dtype.element_ty).to(tl.float32)
            x_tail = (x_tail + gate_tail * (branch_tail + bias_tail)).to(residual.dtype.element_ty).to(tl.float32)
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
    branch, bias, modulation, mean, rstd,  # as above
    grad_x, grad_branch,  # (B, T, D), (B, T, D) or None, contiguous
    partials,  # (4, B, CHUNKS, D), sums for gate, shift, scale, bias; or (2, B, CHUNKS, D); float32, contiguous
    tokens, chunks, grad_residual_batch, grad_residual_token, grad_h_batch, grad_h_token,
    residual_batch, residual_token, branch_batch, branch_token, modulation_batch, modulation_vector,
    WIDTH: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The same tokens as the forward kernel, and the sums over these. Without a branch, the norm alone."""
    program = tl.program_id(0)
    sample = (program // chunks).to(tl.int64)
    scale = modulation + sample * modulation_batch + modulation_vector
    if branch is not None:
        gate_main, gate_tail = rows.load(modulation + sample * modulation_batch, WIDTH, MAIN, TAIL)
        scale += modulation_vector
    scale_main, scale_tail = rows.load(scale, WIDTH, MAIN, TAIL)
    x_sum_main, x_sum_tail = tl.zeros((MAIN,), tl.float32), tl.zeros((TAIL,), tl.float32)
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
            x_sum_main += grad_x_main
            x_sum_tail += grad_x_tail
            gate_sum_main += grad_x_main * branch_main
            gate_sum_tail += grad_x_tail * branch_tail
        rows.store(grad_x + row * WIDTH, grad_x_main, grad_x_tail, WIDTH, MAIN, TAIL)
        if branch is not None:
            rows.store(grad_branch + row * WIDTH, grad_x_main * gate_main, grad_x_tail * gate_tail, WIDTH, MAIN, TAIL)
    partial = partials + program.to(tl.int64) * WIDTH
    step = tl.num_programs(0).to(tl.int64) * WIDTH  # from a sum to the next
    if branch is not None:
        bias_main, bias_tail = rows.load(bias, WIDTH, MAIN, TAIL)
        gate_sum_main += x_sum_main * bias_main
        gate_sum_tail += x_sum_tail * bias_tail
        rows.store(partial, gate_sum_main, gate_sum_tail, WIDTH, MAIN, TAIL)
        rows.store(partial + 3 * step, x_sum_main * gate_main, x_sum_tail * gate_tail, WIDTH, MAIN, TAIL)
        partial += step
    rows.store(partial, shift_sum_main, shift_sum_tail, WIDTH, MAIN, TAIL)
    rows.store(partial + step, scale_sum_main, scale_sum_tail, WIDTH, MAIN, TAIL)


def _strides(tensor: Tensor | None) -> tuple[int, ...]:
    """Strides of the first two axes of (B, T, D) or (B, K, D); zeros for a missing tensor."""
    return (0, 0) if tensor is None else tensor.stride()[:2]


def _allocate_like(tensor: Tensor) -> Tensor:
    """An uninitialized contiguous tensor, whatever the strides."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)


def _allocate_outputs(x: Tensor, gated: bool) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
    """Uninitialized (x' or None, h, mean, rstd)."""
    mean, rstd = (torch.empty(x.shape[:2], dtype=torch.float32, device=x.device) for _ in range(2))
    return _allocate_like(x) if gated else None, _allocate_like(x), mean, rstd


def _forward(
    x: Tensor, branch: Tensor | None, bias: Tensor | None, modulation: Tensor, eps: float
) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
    """Launch the forward kernel. Returns (x' or None, h, mean, rstd)."""
    batch, tokens, width = x.shape
    main, tail, warps, stages = rows.tiles(width)
    chunks = rows.chunks(batch, tokens, FORWARD_TOKENS)
    outputs = _allocate_outputs(x, gated=branch is not None)
    if batch * chunks:
        with torch.cuda.device_of(x):
            _adaln_forward[(batch * chunks,)](
                x, branch, bias, modulation, *outputs, tokens, chunks,
                *_strides(x), *_strides(branch), *_strides(modulation), eps,
                WIDTH=width, MAIN=main, TAIL=tail, STAGES=stages, num_warps=warps,
            )  # fmt: skip
    return outputs


def _backward(
    grad_residual: Tensor | None, grad_h: Tensor, residual: Tensor, branch: Tensor | None, bias: Tensor | None,
    modulation: Tensor, mean: Tensor, rstd: Tensor,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:  # fmt: skip
    """Launch the backward kernel. Returns the gradients of x, branch and bias (or None), and the modulation."""
    batch, tokens, width = residual.shape
    main, tail, warps, stages = rows.tiles(width)
    chunks = rows.chunks(batch, tokens, BACKWARD_TOKENS)
    grad_x, grad_branch = _allocate_like(residual), None if branch is None else _allocate_like(branch)
    grad_bias, grad_modulation = None if bias is None else _allocate_like(bias), _allocate_like(modulation)
    sums = modulation.shape[1] + (bias is not None)
    partials = torch.empty(sums, batch, chunks, width, dtype=torch.float32, device=residual.device)
    with torch.cuda.device_of(residual):
        if batch * chunks:
            _adaln_backward[(batch * chunks,)](
                grad_residual, grad_h, residual, branch, bias, modulation, mean, rstd,
                grad_x, grad_branch, partials, tokens, chunks,
                *_strides(grad_residual), *_strides(grad_h), *_strides(residual), *_strides(branch),
                *_strides(modulation),
                WIDTH=width, MAIN=main, TAIL=tail, STAGES=stages, num_warps=warps,
            )  # fmt: skip
        rows.total(partials, grad_modulation, grad_bias)
    return grad_x, grad_branch, grad_bias, grad_modulation


@torch.library.custom_op(
    "sra_fast::adaln",
    mutates_args=(),
    schema="(Tensor x, Tensor modulation, float eps) -> (Tensor h, Tensor mean, Tensor rstd)",
)
def _adaln(x, modulation, eps):
    return _forward(x, None, None, modulation, eps)[1:]


@_adaln.register_fake
def _(x, modulation, eps):
    return _allocate_outputs(x, gated=False)[1:]


@torch.library.custom_op(
    "sra_fast::adaln_backward",
    mutates_args=(),
    schema="(Tensor grad_h, Tensor x, Tensor modulation, Tensor mean, Tensor rstd)"
    " -> (Tensor grad_x, Tensor grad_modulation)",
)
def _adaln_grad(grad_h, x, modulation, mean, rstd):
    grad_x, _, _, grad_modulation = _backward(None, rows.with_dense_rows(grad_h), x, None, None, modulation, mean, rstd)
    return grad_x, grad_modulation


@_adaln_grad.register_fake
def _(grad_h, x, modulation, mean, rstd):
    return _allocate_like(x), _allocate_like(modulation)


def _adaln_setup(ctx, inputs, output) -> None:
    x, modulation, _ = inputs
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(x, modulation, mean, rstd)


def _adaln_autograd(ctx, grad_h, *_):
    return *_adaln_grad(grad_h, *ctx.saved_tensors), None


_adaln.register_autograd(_adaln_autograd, setup_context=_adaln_setup)


@torch.library.custom_op(
    "sra_fast::gated_adaln",
    mutates_args=(),
    schema="(Tensor x, Tensor branch, Tensor bias, Tensor modulation, float eps)"
    " -> (Tensor residual, Tensor h, Tensor mean, Tensor rstd)",
)
def _gated_adaln(x, branch, bias, modulation, eps):
    return _forward(x, branch, bias, modulation, eps)


@_gated_adaln.register_fake
def _(x, branch, bias, modulation, eps):
    return _allocate_outputs(x, gated=True)


@torch.library.custom_op(
    "sra_fast::gated_adaln_backward",
    mutates_args=(),
    schema="(Tensor grad_residual, Tensor grad_h, Tensor residual, Tensor branch, Tensor bias, Tensor modulation,"
    " Tensor mean, Tensor rstd) -> (Tensor grad_x, Tensor grad_branch, Tensor grad_bias, Tensor grad_modulation)",
)
def _gated_adaln_grad(grad_residual, grad_h, *saved):
    return _backward(rows.with_dense_rows(grad_residual), rows.with_dense_rows(grad_h), *saved)


@_gated_adaln_grad.register_fake
def _(grad_residual, grad_h, residual, branch, bias, modulation, mean, rstd):
    return tuple(_allocate_like(tensor) for tensor in (residual, branch, bias, modulation))


def _gated_adaln_setup(ctx, inputs, output) -> None:
    _, branch, bias, modulation, _ = inputs
    residual, _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(residual, branch, bias, modulation, mean, rstd)


def _gated_adaln_autograd(ctx, grad_residual, grad_h, *_):
    return *_gated_adaln_grad(grad_residual, grad_h, *ctx.saved_tensors), None


_gated_adaln.register_autograd(_gated_adaln_autograd, setup_context=_gated_adaln_setup)


def adaln(x: Tensor, modulation: Tensor, eps: float = 1e-6) -> Tensor:
    """adaLN: one kernel in the forward pass, one kernel and a small reduction in the backward pass.

    Args:
        x: (B, T, D), float32, bfloat16 or float16, D up to 8,192; last stride 1.
        modulation: (B, 2, D), shift and scale, of any of these dtypes, last stride 1; a view of the modulation of all
            layers is not copied.
        eps: added to the variance.

    Returns:
        (B, T, D) in x's dtype, contiguous. Statistics and products are computed in float32.

    Raises:
        ValueError: on a wrong shape, dtype, device or stride.
    """
    batch, _, width = rows.check({"x": x})
    rows.check_shape(x, modulation=(modulation, (batch, 2, width)))
    return _adaln(x, modulation, eps)[0]


def gated_adaln(
    x: Tensor, branch: Tensor, bias: Tensor, modulation: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """Gated residual and adaLN: one kernel in the forward pass, one and a small reduction in the backward pass.

    Args:
        x, branch: (B, T, D), float32, bfloat16 or float16, D up to 8,192; last stride 1.
        bias: (D,), contiguous, the bias of the layer that computes the branch.
        modulation: (B, 3, D), gate, shift and scale, as in `adaln`.
        eps: added to the variance.

    Returns:
        (x', h), both (B, T, D) in x's dtype, contiguous. The norm reads x' after rounding to that dtype; everything
        else is computed in float32.

    Raises:
        ValueError: on a wrong shape, dtype, device or stride.
    """
    batch, _, width = rows.check({"x": x, "branch": branch})
    rows.check_shape(x, bias=(bias, (width,)), modulation=(modulation, (batch, 3, width)))
    return _gated_adaln(x, branch, bias, modulation, eps)[:2]
