"""How far the student's features are from the teacher's: one number, with a gradient for the student only.

With s, t of shape (B, T, D):

    cosine          1 - mean over (B, T) of <s, t> / (|s| |t|), norms over D: each token's direction, as in the paper
    cosine_channel  the same with norms over T and mean over (B, D): each channel's map, as in the public code
    smooth_l1       mean over all elements of huber_beta(s - t) / beta, beta = 0.05: the published loss
    l1, l2          mean over all elements of |s - t|, (s - t)^2

Backward, with n the number of averaged values, c a cosine and S = max(|s|, 1e-8), likewise T, as PyTorch has them:

    cosines         ds = dloss (c / (S |s|) s - t / (S T)) / n, without the first term where s = 0
    smooth_l1       ds = dloss clamp((s - t) / beta, -1, 1) / n
    l1, l2          ds = dloss sign(s - t) / n, dloss 2 (s - t) / n

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

_TILE = 1024  # elements of a program's tile of tokens: one 16-byte load of bf16 for each of 128 threads
_CHANNEL_TILE = 2048  # the loop over tokens is not unrolled, so it needs more loads in flight
_PARTIALS = 4096  # partial sums that are added at a time


def alignment_ref(student: Tensor, teacher: Tensor, distance: str) -> Tensor:
    """Reference distance.

    Args:
        student, teacher: (B, T, D), any floating dtype. No gradient reaches `teacher`.
        distance: one of `DISTANCES`.

    Returns:
        A scalar in promote_types(student.dtype, float32).

    Raises:
        ValueError: on shapes that differ or an unknown distance.
    """
    if student.shape != teacher.shape:
        raise ValueError(f"teacher: shape {tuple(teacher.shape)} given; must be the student's, {tuple(student.shape)}")
    if distance not in _DISTANCES:
        raise ValueError(f"distance: {distance!r} given; must be one of {', '.join(DISTANCES)}")
    compute = torch.promote_types(student.dtype, torch.float32)
    return _DISTANCES[distance](student.to(compute), teacher.detach().to(compute))


@triton.jit
def _cosine(product, s_square, t_square):
    """(1 - cosine, coefficient of s, coefficient of t) from <s, t>, |s|^2 and |t|^2; the gradient of 1 - cosine is the
    first coefficient times s less the second times t."""
    s_norm, t_norm = tl.sqrt_rn(s_square), tl.sqrt_rn(t_square)
    # A NaN must reach the gradient, as it does in PyTorch.
    s_clamped = tl.maximum(s_norm, 1e-8, propagate_nan=tl.PropagateNan.ALL)
    t_clamped = tl.maximum(t_norm, 1e-8, propagate_nan=tl.PropagateNan.ALL)
    # One division after the other: the product of two norms may leave float32's range.
    cosine = tl.div_rn(tl.div_rn(product, s_clamped), t_clamped)
    of_s = tl.div_rn(tl.div_rn(cosine, tl.where(s_norm == 0, 1.0, s_norm)), s_clamped)
    of_t = tl.div_rn(tl.div_rn(tl.full(t_norm.shape, 1.0, tl.float32), t_clamped), s_clamped)
    return 1 - cosine, tl.where(s_norm == 0, 0.0, of_s), of_t


@triton.jit
def _pointwise(difference, DISTANCE: tl.constexpr, BETA: tl.constexpr):
    """Distance of single elements."""
    size = tl.abs(difference)
    if DISTANCE == "smooth_l1":
        return tl.where(size < BETA, difference * difference * (0.5 / BETA), size - 0.5 * BETA)
    if DISTANCE == "l1":
        return size
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
    """ROWS tokens: the sum of their distances, and of a cosine both coefficients of each."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    there = row < rows
    sample, token = row // TOKENS, row % TOKENS
    s_row = (student + sample * s_batch + token * s_token)[:, None]
    t_row = (teacher + sample * t_batch + token * t_token)[:, None]
    total = tl.zeros((ROWS, BLOCK), tl.float32)  # <s, t>, or the elements' distances
    s_square, t_square = tl.zeros((ROWS, BLOCK), tl.float32), tl.zeros((ROWS, BLOCK), tl.float32)
    for first in tl.static_range(0, WIDTH, BLOCK):
        column = first + tl.arange(0, BLOCK)[None, :]
        inside = there[:, None] & (column < WIDTH)
        s = tl.load(s_row + column, mask=inside, other=0.0).to(tl.float32)
        t = tl.load(t_row + column, mask=inside, other=0.0).to(tl.float32)
        if DISTANCE == "cosine":
            total += s * t
            s_square += s * s
            t_square += t * t
        else:
            total += _pointwise(s - t, DISTANCE, BETA)
    distance = tl.sum(total, axis=1)
    if DISTANCE == "cosine":
        distance, of_s, of_t = _cosine(distance, tl.sum(s_square, axis=1), tl.sum(t_square, axis=1))
        tl.store(coefficients + row, of_s, mask=there)
        tl.store(coefficients + rows + row, of_t, mask=there)
    tl.store(partials + tl.program_id(0), tl.sum(tl.where(there, distance, 0.0), axis=0))


@triton.jit
def _alignment_tokens_backward(
    above, student, teacher, coefficients, gradient,
    rows, s_batch, s_token, t_batch, t_token, share,
    DISTANCE: tl.constexpr, BETA: tl.constexpr,
    TOKENS: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradient of ROWS tokens. share = 1 / n."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    there = row < rows
    sample, token = row // TOKENS, row % TOKENS
    s_row = (student + sample * s_batch + token * s_token)[:, None]
    t_row = (teacher + sample * t_batch + token * t_token)[:, None]
    factor = tl.load(above).to(tl.float32) * share
    if DISTANCE == "cosine":
        of_s = tl.load(coefficients + row, mask=there, other=0.0)[:, None]
        of_t = tl.load(coefficients + rows + row, mask=there, other=0.0)[:, None]
    for first in tl.static_range(0, WIDTH, BLOCK):
        column = first + tl.arange(0, BLOCK)[None, :]
        inside = there[:, None] & (column < WIDTH)
        s = tl.load(s_row + column, mask=inside, other=0.0).to(tl.float32)
        t = tl.load(t_row + column, mask=inside, other=0.0).to(tl.float32)
        ds = factor * (of_s * s - of_t * t if DISTANCE == "cosine" else _slope(s - t, DISTANCE, BETA))
        tl.store(gradient + (row * WIDTH)[:, None] + column, ds.to(gradient.dtype.element_ty), mask=inside)


@triton.jit
def _alignment_channels_forward(
    student, teacher, coefficients, partials,
    channels, s_batch, s_token, t_batch, t_token,
    TOKENS: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK channels of one sample, over all its tokens: the sum of 1 - cosine, and both coefficients of each."""
    blocks: tl.constexpr = (WIDTH + BLOCK - 1) // BLOCK
    sample = (tl.program_id(0) // blocks).to(tl.int64)
    channel = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    there = channel < WIDTH
    s_column = (student + sample * s_batch + channel)[None, :]
    t_column = (teacher + sample * t_batch + channel)[None, :]
    product = tl.zeros((ROWS, BLOCK), tl.float32)
    s_square, t_square = tl.zeros((ROWS, BLOCK), tl.float32), tl.zeros((ROWS, BLOCK), tl.float32)
    for first in range(0, TOKENS, ROWS):
        token = first + tl.arange(0, ROWS).to(tl.int64)[:, None]
        inside = (token < TOKENS) & there[None, :]
        s = tl.load(s_column + token * s_token, mask=inside, other=0.0).to(tl.float32)
        t = tl.load(t_column + token * t_token, mask=inside, other=0.0).to(tl.float32)
        product += s * t
        s_square += s * s
        t_square += t * t
    distance, of_s, of_t = _cosine(tl.sum(product, axis=0), tl.sum(s_square, axis=0), tl.sum(t_square, axis=0))
    at = sample * WIDTH + channel
    tl.store(coefficients + at, of_s, mask=there)
    tl.store(coefficients + channels + at, of_t, mask=there)
    tl.store(partials + tl.program_id(0), tl.sum(tl.where(there, distance, 0.0), axis=0))


@triton.jit
def _alignment_channels_backward(
    above, student, teacher, coefficients, gradient,
    channels, s_batch, s_token, t_batch, t_token, share,
    TOKENS: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradient of BLOCK channels of one sample. share = 1 / n."""
    blocks: tl.constexpr = (WIDTH + BLOCK - 1) // BLOCK
    sample = (tl.program_id(0) // blocks).to(tl.int64)
    channel = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    there = channel < WIDTH
    s_column = (student + sample * s_batch + channel)[None, :]
    t_column = (teacher + sample * t_batch + channel)[None, :]
    factor = tl.load(above).to(tl.float32) * share
    at = sample * WIDTH + channel
    of_s = tl.load(coefficients + at, mask=there, other=0.0)[None, :]
    of_t = tl.load(coefficients + channels + at, mask=there, other=0.0)[None, :]
    column = (gradient + sample * TOKENS * WIDTH + channel)[None, :]
    for first in range(0, TOKENS, ROWS):
        token = first + tl.arange(0, ROWS).to(tl.int64)[:, None]
        inside = (token < TOKENS) & there[None, :]
        s = tl.load(s_column + token * s_token, mask=inside, other=0.0).to(tl.float32)
        t = tl.load(t_column + token * t_token, mask=inside, other=0.0).to(tl.float32)
        ds = factor * (of_s * s - of_t * t)
        tl.store(column + token * WIDTH, ds.to(gradient.dtype.element_ty), mask=inside)


@triton.jit
def _alignment_mean(partials, loss, share, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """The sum of all partial sums, in an order that never changes, times share = 1 / n. One program."""
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, COUNT, BLOCK):
        at = first + tl.arange(0, BLOCK)
        total += tl.load(partials + at, mask=at < COUNT, other=0.0)
    tl.store(loss, tl.sum(total, axis=0) * share)


def _check(student: Tensor, teacher: Tensor, distance: str) -> None:
    """Refuse what the kernels cannot compute, by name."""
    if distance not in DISTANCES:
        raise ValueError(f"distance: {distance!r} given; must be one of {', '.join(DISTANCES)}")
    check({"student": student, "teacher": teacher}, {})
    if not student.numel():
        raise ValueError(f"student: shape {tuple(student.shape)} given; must have an element, for the mean to exist")


def _averaged(shape: torch.Size, distance: str) -> int:
    """How many values the mean is over."""
    batch, tokens, width = shape
    return {"cosine": batch * tokens, "cosine_channel": batch * width}.get(distance, batch * tokens * width)


def _cosines(shape: torch.Size, distance: str) -> int:
    """How many of them have coefficients kept for the backward pass."""
    return _averaged(shape, distance) if distance.startswith("cosine") else 0


def _launch(student: Tensor, teacher: Tensor, distance: str, sums: bool) -> tuple[bool, int, dict[str, int]]:
    """(whether it goes by channels, programs, sizes of their tiles), for a pass that sums or one that does not. Tiles
    of tokens are 128 or 256 channels wide: published widths are multiples of one of them, and every sum over channels
    stays within a warp; wider only where a row would unroll into more than 16 of them. Sizes are constants of the
    compiled kernel: they stay the same in a run, and row // TOKENS then costs no division."""
    batch, tokens, width = student.shape
    by_channel = distance == "cosine_channel"
    block = min(64 if by_channel else 256 if width % 256 == 0 else 128, triton.next_power_of_2(width))
    while not by_channel and width > 16 * block:
        block *= 2
    # float32 in tiles of as many elements does not fit into registers: half, and a quarter where sums are kept too.
    wide = max(student.element_size(), teacher.element_size()) > 2
    share = (4 if by_channel and sums else 2) if wide else 1
    rows = max(1, (_CHANNEL_TILE if by_channel else _TILE) // share // block)
    programs = batch * triton.cdiv(width, block) if by_channel else triton.cdiv(batch * tokens, rows)
    return by_channel, programs, {"TOKENS": tokens, "WIDTH": width, "ROWS": rows, "BLOCK": block}


@torch.library.custom_op("sra_fast::alignment", mutates_args=())
def _alignment(student: Tensor, teacher: Tensor, distance: str) -> tuple[Tensor, Tensor]:
    """(loss, coefficients): () float32, and (2, cosines) float32 for the backward pass."""
    _check(student, teacher, distance)
    by_channel, programs, sizes = _launch(student, teacher, distance, sums=True)
    loss = torch.empty((), dtype=torch.float32, device=student.device)
    coefficients = torch.empty(2, _cosines(student.shape, distance), dtype=torch.float32, device=student.device)
    partials = torch.empty(programs, dtype=torch.float32, device=student.device)
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
            partials, loss, 1 / _averaged(student.shape, distance), COUNT=programs, BLOCK=_PARTIALS, num_warps=8
        )
    return loss, coefficients


@_alignment.register_fake
def _(student: Tensor, teacher: Tensor, distance: str) -> tuple[Tensor, Tensor]:
    loss = student.new_empty((), dtype=torch.float32)
    return loss, student.new_empty((2, _cosines(student.shape, distance)), dtype=torch.float32)


@torch.library.custom_op("sra_fast::alignment_backward", mutates_args=())
def _alignment_backward(above: Tensor, student: Tensor, teacher: Tensor, coefficients: Tensor, distance: str) -> Tensor:
    """The student's gradient, contiguous and in its dtype, from that of the loss, `above`: () float32."""
    _check(student, teacher, distance)
    kept = (2, _cosines(student.shape, distance))
    for name, value, shape in (("above", above, ()), ("coefficients", coefficients, kept)):
        if (value.shape, value.dtype, value.device) != (shape, torch.float32, student.device):
            raise ValueError(
                f"{name}: {value.dtype} {tuple(value.shape)} on {value.device} given; "
                f"must be torch.float32 {shape} on {student.device}"
            )
    by_channel, programs, sizes = _launch(student, teacher, distance, sums=False)
    gradient = torch.empty(student.shape, dtype=student.dtype, device=student.device)
    batch, tokens, width = student.shape
    strides, share = (*student.stride()[:2], *teacher.stride()[:2]), 1 / _averaged(student.shape, distance)
    with torch.cuda.device_of(student):
        if by_channel:
            _alignment_channels_backward[programs,](
                above, student, teacher, coefficients, gradient, batch * width, *strides, share, **sizes
            )
        else:
            _alignment_tokens_backward[programs,](
                above, student, teacher, coefficients, gradient, batch * tokens, *strides, share,
                DISTANCE=distance, BETA=SMOOTH_L1_BETA, **sizes,
            )  # fmt: skip
    return gradient


@_alignment_backward.register_fake
def _(above: Tensor, student: Tensor, teacher: Tensor, coefficients: Tensor, distance: str) -> Tensor:
    return student.new_empty(student.shape)


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, str], output: tuple[Tensor, Tensor]) -> None:
    student, teacher, ctx.distance = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(student, teacher, output[1])


def _gradients(ctx: Any, above: Tensor, _: Tensor | None) -> tuple[Tensor, None, None]:
    return _alignment_backward(above, *ctx.saved_tensors, ctx.distance), None, None


_alignment.register_autograd(_gradients, setup_context=_keep)


def alignment(student: Tensor, teacher: Tensor, distance: str) -> Tensor:
    """Distance by a Triton kernel: each input is read once in either pass, and the sums are taken in a fixed order.

    Args:
        student, teacher: (B, T, D), float32, bfloat16 or float16, not necessarily the same; D at most 8,192, its stride
            1, the others free. No gradient reaches `teacher`.
        distance: one of `DISTANCES`.

    Returns:
        A scalar in float32.

    Raises:
        ValueError: on a shape, dtype, device, stride or distance that it cannot serve.
    """
    return _alignment(student, teacher.detach(), distance)[0]
