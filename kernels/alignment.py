"""Distance between student and teacher features: one scalar, differentiable in the student only.

With s, t of shape (B, T, D):

    cosine          1 - mean over (B, T) of <s, t> / (|s| |t|), norms over D: one cosine per token, as in the paper
    cosine_channel  the same with norms over T and mean over (B, D): one cosine per channel, as in the public code
    smooth_l1       mean over all elements of huber_beta(s - t) / beta, beta = 0.05: the published loss
    l1, l2          mean over all elements of |s - t|, (s - t)^2

Backward, with n the number of averaged values, c a cosine, S = max(|s|, 1e-8) and T = max(|t|, 1e-8) as in PyTorch:

    cosines         grad_s = grad_loss (c / (S |s|) s - t / (S T)) / n, without the first term where s = 0
    smooth_l1       grad_s = grad_loss clamp((s - t) / beta, -1, 1) / n
    l1              grad_s = grad_loss sign(s - t) / n
    l2              grad_s = grad_loss 2 (s - t) / n

Source: Jiang et al., "No Other Representation Component Is Needed: Diffusion Transformers Can Provide Representation
Guidance by Themselves" (SRA), arXiv 2505.02831.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .language import tl, triton
from .rows import check

SMOOTH_L1_BETA = 0.05

_DISTANCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cosine": lambda s, t: (1 - F.cosine_similarity(s, t, dim=-1)).mean(),
    "cosine_channel": lambda s, t: (1 - F.cosine_similarity(s, t, dim=-2)).mean(),
    "smooth_l1": lambda s, t: F.smooth_l1_loss(s, t, beta=SMOOTH_L1_BETA),
    "l1": F.l1_loss,
    "l2": F.mse_loss,
}
DISTANCES = tuple(_DISTANCES)

_TILE = 1024  # elements per tile of tokens: one 16-byte load of bf16 for each of 128 threads
_CHANNEL_TILE = 2048  # the same by channels: the loop over tokens is not unrolled and needs more loads in flight
_PARTIALS = 4096  # partial sums added at a time


def alignment_ref(student: Tensor, teacher: Tensor, distance: str) -> Tensor:
    """Reference distance.

    Args:
        student, teacher: (B, T, D), any floating dtype. No gradient reaches `teacher`.
        distance: one of `DISTANCES`.

    Returns:
        A scalar in promote_types(student.dtype, float32).

    Raises:
        ValueError: on different shapes or an unknown distance.
    """
    if student.shape != teacher.shape:
        raise ValueError(f"teacher: shape {tuple(teacher.shape)} given; must be the student's, {tuple(student.shape)}")
    if distance not in _DISTANCES:
        raise ValueError(f"distance: {distance!r} given; must be one of {', '.join(DISTANCES)}")
    compute = torch.promote_types(student.dtype, torch.float32)
    return _DISTANCES[distance](student.to(compute), teacher.detach().to(compute))


@triton.jit
def _cosine(product, s_square, t_square):
    """(1 - cosine, s_coef, t_coef) from <s, t>, |s|^2 and |t|^2. The gradient of 1 - cosine is
    s_coef s - t_coef t."""
    s_norm, t_norm = tl.sqrt_rn(s_square), tl.sqrt_rn(t_square)
    # A NaN must reach the gradient, as it does in PyTorch.
    s_clamped = tl.maximum(s_norm, 1e-8, propagate_nan=tl.PropagateNan.ALL)
    t_clamped = tl.maximum(t_norm, 1e-8, propagate_nan=tl.PropagateNan.ALL)
    # Two divisions, because the product of two norms may overflow float32.
    cosine = tl.div_rn(tl.div_rn(product, s_clamped), t_clamped)
    s_coef = tl.div_rn(tl.div_rn(cosine, tl.where(s_norm == 0, 1.0, s_norm)), s_clamped)
    t_coef = tl.div_rn(tl.div_rn(tl.full(t_norm.shape, 1.0, tl.float32), t_clamped), s_clamped)
    return 1 - cosine, tl.where(s_norm == 0, 0.0, s_coef), t_coef


@triton.jit
def _pointwise(difference, DISTANCE: tl.constexpr, BETA: tl.constexpr):
    """Elementwise distance."""
    magnitude = tl.abs(difference)
    if DISTANCE == "smooth_l1":
        return tl.where(magnitude < BETA, difference * difference * (0.5 / BETA), magnitude - 0.5 * BETA)
    if DISTANCE == "l1":
        return magnitude
    return difference * difference


@triton.jit
def _slope(difference, DISTANCE: tl.constexpr, BETA: tl.constexpr):
    """Derivative of `_pointwise`."""
    sign = tl.where(difference > 0, 1.0, tl.where(difference < 0, -1.0, 0.0))
    if DISTANCE == "smooth_l1":
        return tl.where(tl.abs(difference) >= BETA, sign, difference * (1 / BETA))
    if DISTANCE == "l1":
        return sign
    return 2 * difference


@triton.jit
def _alignment_tokens_forward(
    student, teacher, coefficients, partials,
    rows, s_batch, s_token, t_batch, t_token,
    DISTANCE: tl.constexpr, BETA: tl.constexpr,
    TOKENS: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The sum of the distances of ROWS tokens; for a cosine, also both coefficients of each token."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    row_mask = row < rows
    sample, token = row // TOKENS, row % TOKENS
    s_row = (student + sample * s_batch + token * s_token)[:, None]
    t_row = (teacher + sample * t_batch + token * t_token)[:, None]
    total = tl.zeros((ROWS, BLOCK), tl.float32)  # <s, t>, or the elements' distances
    s_square, t_square = tl.zeros((ROWS, BLOCK), tl.float32), tl.zeros((ROWS, BLOCK), tl.float32)
    for first in tl.static_range(0, WIDTH, BLOCK):
        column = first + tl.arange(0, BLOCK)[None, :]
        mask = row_mask[:, None] & (column < WIDTH)
        s = tl.load(s_row + column, mask=mask, other=0.0).to(tl.float32)
        t = tl.load(t_row + column, mask=mask, other=0.0).to(tl.float32)
        if DISTANCE == "cosine":
            total += s * t
            s_square += s * s
            t_square += t * t
        else:
            total += _pointwise(s - t, DISTANCE, BETA)
    distance = tl.sum(total, axis=1)
    if DISTANCE == "cosine":
        distance, s_coef, t_coef = _cosine(distance, tl.sum(s_square, axis=1), tl.sum(t_square, axis=1))
        tl.store(coefficients + row, s_coef, mask=row_mask)
        tl.store(coefficients + rows + row, t_coef, mask=row_mask)
    tl.store(partials + tl.program_id(0), tl.sum(tl.where(row_mask, distance, 0.0), axis=0))


@triton.jit
def _alignment_tokens_backward(
    grad_loss, student, teacher, coefficients, grad_student,
    rows, s_batch, s_token, t_batch, t_token, inverse_count,
    DISTANCE: tl.constexpr, BETA: tl.constexpr,
    TOKENS: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradient of ROWS tokens."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    row_mask = row < rows
    sample, token = row // TOKENS, row % TOKENS
    s_row = (student + sample * s_batch + token * s_token)[:, None]
    t_row = (teacher + sample * t_batch + token * t_token)[:, None]
    factor = tl.load(grad_loss).to(tl.float32) * inverse_count
    if DISTANCE == "cosine":
        s_coef = tl.load(coefficients + row, mask=row_mask, other=0.0)[:, None]
        t_coef = tl.load(coefficients + rows + row, mask=row_mask, other=0.0)[:, None]
    for first in tl.static_range(0, WIDTH, BLOCK):
        column = first + tl.arange(0, BLOCK)[None, :]
        mask = row_mask[:, None] & (column < WIDTH)
        s = tl.load(s_row + column, mask=mask, other=0.0).to(tl.float32)
        t = tl.load(t_row + column, mask=mask, other=0.0).to(tl.float32)
        slope = s_coef * s - t_coef * t if DISTANCE == "cosine" else _slope(s - t, DISTANCE, BETA)
        grad_s = factor * slope
        tl.store(grad_student + (row * WIDTH)[:, None] + column, grad_s.to(grad_student.dtype.element_ty), mask=mask)


@triton.jit
def _alignment_channels_forward(
    student, teacher, coefficients, partials,
    channels, s_batch, s_token, t_batch, t_token,
    TOKENS: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The sum of 1 - cosine and both coefficients of BLOCK channels of one sample, over all its tokens."""
    blocks: tl.constexpr = (WIDTH + BLOCK - 1) // BLOCK
    sample = (tl.program_id(0) // blocks).to(tl.int64)
    channel = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    channel_mask = channel < WIDTH
    s_column = (student + sample * s_batch + channel)[None, :]
    t_column = (teacher + sample * t_batch + channel)[None, :]
    product = tl.zeros((ROWS, BLOCK), tl.float32)
    s_square, t_square = tl.zeros((ROWS, BLOCK), tl.float32), tl.zeros((ROWS, BLOCK), tl.float32)
    for first in range(0, TOKENS, ROWS):
        token = first + tl.arange(0, ROWS).to(tl.int64)[:, None]
        mask = (token < TOKENS) & channel_mask[None, :]
        s = tl.load(s_column + token * s_token, mask=mask, other=0.0).to(tl.float32)
        t = tl.load(t_column + token * t_token, mask=mask, other=0.0).to(tl.float32)
        product += s * t
        s_square += s * s
        t_square += t * t
    distance, s_coef, t_coef = _cosine(tl.sum(product, axis=0), tl.sum(s_square, axis=0), tl.sum(t_square, axis=0))
    index = sample * WIDTH + channel
    tl.store(coefficients + index, s_coef, mask=channel_mask)
    tl.store(coefficients + channels + index, t_coef, mask=channel_mask)
    tl.store(partials + tl.program_id(0), tl.sum(tl.where(channel_mask, distance, 0.0), axis=0))


@triton.jit
def _alignment_channels_backward(
    grad_loss, student, teacher, coefficients, grad_student,
    channels, s_batch, s_token, t_batch, t_token, inverse_count,
    TOKENS: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradient of BLOCK channels of one sample."""
    blocks: tl.constexpr = (WIDTH + BLOCK - 1) // BLOCK
    sample = (tl.program_id(0) // blocks).to(tl.int64)
    channel = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    channel_mask = channel < WIDTH
    s_column = (student + sample * s_batch + channel)[None, :]
    t_column = (teacher + sample * t_batch + channel)[None, :]
    factor = tl.load(grad_loss).to(tl.float32) * inverse_count
    index = sample * WIDTH + channel
    s_coef = tl.load(coefficients + index, mask=channel_mask, other=0.0)[None, :]
    t_coef = tl.load(coefficients + channels + index, mask=channel_mask, other=0.0)[None, :]
    column = (grad_student + sample * TOKENS * WIDTH + channel)[None, :]
    for first in range(0, TOKENS, ROWS):
        token = first + tl.arange(0, ROWS).to(tl.int64)[:, None]
        mask = (token < TOKENS) & channel_mask[None, :]
        s = tl.load(s_column + token * s_token, mask=mask, other=0.0).to(tl.float32)
        t = tl.load(t_column + token * t_token, mask=mask, other=0.0).to(tl.float32)
        grad_s = factor * (s_coef * s - t_coef * t)
        tl.store(column + token * WIDTH, grad_s.to(grad_student.dtype.element_ty), mask=mask)


@triton.jit
def _alignment_mean(partials, loss, inverse_count, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """The mean from all partial sums, added in a fixed order by one program."""
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, COUNT, BLOCK):
        index = first + tl.arange(0, BLOCK)
        total += tl.load(partials + index, mask=index < COUNT, other=0.0)
    tl.store(loss, tl.sum(total, axis=0) * inverse_count)


def _check(student: Tensor, teacher: Tensor, distance: str) -> None:
    """Raise ValueError for arguments that the kernels do not support."""
    if distance not in DISTANCES:
        raise ValueError(f"distance: {distance!r} given; must be one of {', '.join(DISTANCES)}")
    check({"student": student, "teacher": teacher})
    if not student.numel():
        raise ValueError(f"student: shape {tuple(student.shape)} given; must not be empty: it has no mean")


def _count(shape: torch.Size, distance: str) -> int:
    """Number of values that are averaged."""
    batch, tokens, width = shape
    return {"cosine": batch * tokens, "cosine_channel": batch * width}.get(distance, batch * tokens * width)


def _coefficients_shape(shape: torch.Size, distance: str) -> tuple[int, int]:
    """Two coefficients for each cosine."""
    return 2, _count(shape, distance) if distance.startswith("cosine") else 0


def _launch(student: Tensor, teacher: Tensor, distance: str, sums: bool) -> tuple[bool, int, dict[str, int]]:
    """(by channel or by token, number of programs, tile sizes) of a pass; `sums`: of the forward pass.

    Tiles of tokens are 128 or 256 channels wide: published widths are multiples of one of them, and every sum over
    channels stays within a warp. They are wider only where a row would unroll into more than 16 tiles. Sizes are
    compile-time constants: they do not change during a run, and row // TOKENS then needs no division.
    """
    batch, tokens, width = student.shape
    by_channel = distance == "cosine_channel"
    block = min(64 if by_channel else 256 if width % 256 == 0 else 128, triton.next_power_of_2(width))
    while not by_channel and width > 16 * block:
        block *= 2
    # A float32 tile of as many elements does not fit into the registers: half of it does, or a quarter beside sums.
    float32 = max(student.element_size(), teacher.element_size()) > 2
    divisor = (4 if by_channel and sums else 2) if float32 else 1
    rows = max(1, (_CHANNEL_TILE if by_channel else _TILE) // divisor // block)
    programs = batch * triton.cdiv(width, block) if by_channel else triton.cdiv(batch * tokens, rows)
    return by_channel, programs, {"TOKENS": tokens, "WIDTH": width, "ROWS": rows, "BLOCK": block}


@torch.library.custom_op("sra_fast::alignment", mutates_args=())
def _alignment(student: Tensor, teacher: Tensor, distance: str) -> tuple[Tensor, Tensor]:
    """(loss, coefficients): () float32, and (2, cosines) float32 for the backward pass."""
    _check(student, teacher, distance)
    by_channel, programs, sizes = _launch(student, teacher, distance, sums=True)
    device = student.device
    loss = torch.empty((), dtype=torch.float32, device=device)
    coefficients = torch.empty(_coefficients_shape(student.shape, distance), dtype=torch.float32, device=device)
    partials = torch.empty(programs, dtype=torch.float32, device=device)
    batch, tokens, width = student.shape
    strides = (*student.stride()[:2], *teacher.stride()[:2])
    with torch.cuda.device_of(student):
        if by_channel:
            _alignment_channels_forward[programs,](
                student, teacher, coefficients, partials, batch * width, *strides, **sizes
            )
        else:
            _alignment_tokens_forward[programs,](
                student, teacher, coefficients, partials, batch * tokens, *strides,
                DISTANCE=distance, BETA=SMOOTH_L1_BETA, **sizes,
            )  # fmt: skip
        _alignment_mean[1,](
            partials, loss, 1 / _count(student.shape, distance), COUNT=programs, BLOCK=_PARTIALS, num_warps=8
        )
    return loss, coefficients


@_alignment.register_fake
def _(student: Tensor, teacher: Tensor, distance: str) -> tuple[Tensor, Tensor]:
    loss = student.new_empty((), dtype=torch.float32)
    return loss, student.new_empty(_coefficients_shape(student.shape, distance), dtype=torch.float32)


@torch.library.custom_op("sra_fast::alignment_backward", mutates_args=())
def _alignment_backward(
    grad_loss: Tensor, student: Tensor, teacher: Tensor, coefficients: Tensor, distance: str
) -> Tensor:
    """The student's gradient, contiguous and in its dtype. grad_loss: () float32."""
    _check(student, teacher, distance)
    shapes = {"grad_loss": (), "coefficients": _coefficients_shape(student.shape, distance)}
    for (name, shape), value in zip(shapes.items(), (grad_loss, coefficients), strict=True):
        if (value.shape, value.dtype, value.device) != (shape, torch.float32, student.device):
            raise ValueError(
                f"{name}: {value.dtype} {tuple(value.shape)} on {value.device} given; "
                f"must be torch.float32 {shape} on {student.device}"
            )
    by_channel, programs, sizes = _launch(student, teacher, distance, sums=False)
    grad_student = torch.empty(student.shape, dtype=student.dtype, device=student.device)
    batch, tokens, width = student.shape
    strides, inverse_count = (*student.stride()[:2], *teacher.stride()[:2]), 1 / _count(student.shape, distance)
    with torch.cuda.device_of(student):
        if by_channel:
            _alignment_channels_backward[programs,](
                grad_loss, student, teacher, coefficients, grad_student, batch * width, *strides, inverse_count, **sizes
            )
        else:
            _alignment_tokens_backward[programs,](
                grad_loss, student, teacher, coefficients, grad_student, batch * tokens, *strides, inverse_count,
                DISTANCE=distance, BETA=SMOOTH_L1_BETA, **sizes,
            )  # fmt: skip
    return grad_student


@_alignment_backward.register_fake
def _(grad_loss: Tensor, student: Tensor, teacher: Tensor, coefficients: Tensor, distance: str) -> Tensor:
    return student.new_empty(student.shape)


def _setup(ctx: Any, inputs: tuple[Tensor, Tensor, str], output: tuple[Tensor, Tensor]) -> None:
    student, teacher, ctx.distance = inputs
    _, coefficients = output
    ctx.mark_non_differentiable(coefficients)
    ctx.save_for_backward(student, teacher, coefficients)


def _autograd(ctx: Any, grad_loss: Tensor, _: Tensor | None) -> tuple[Tensor, None, None]:
    return _alignment_backward(grad_loss, *ctx.saved_tensors, ctx.distance), None, None


_alignment.register_autograd(_autograd, setup_context=_setup)


def alignment(student: Tensor, teacher: Tensor, distance: str) -> Tensor:
    """Distance computed by Triton kernels that read each input once per pass. Sums have a fixed order.

    Args:
        student, teacher: (B, T, D), float32, bfloat16 or float16, also different ones; D up to 8,192; last stride 1. No
            gradient reaches `teacher`.
        distance: one of `DISTANCES`.

    Returns:
        A scalar in float32.

    Raises:
        ValueError: on a wrong shape, dtype, device, stride or distance.
    """
    return _alignment(student, teacher.detach(), distance)[0]
