"""Rows of a (B, T, D) tensor in registers, for the kernels that normalise them.

Triton's tiles are powers of two, so a row of D elements is two of them: MAIN elements, always filled, and the rest in
TAIL. The widths of the published models fill both (384 = 256 + 128, 768 = 512 + 256, 1024 = 512 + 512,
1152 = 1024 + 128), where a single tile of the next power of two would waste up to 44 % of its lanes. Registers hold
float32.

A program processes one row at a time. The sum of a tile is then a scalar; for several rows at once, Triton would move
tiles of unequal widths through shared memory to bring both sums into the same threads. Memory latency is hidden by many
programs per multiprocessor and by loading the next row while one is computed.

Sums over tokens are computed per chunk of tokens by one program, then over chunks by `total`, both in a fixed order and
without atomics: two runs give the same bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from .language import INTERPRETED, tl, triton, why_unavailable

MAX_WIDTH = 8192
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TOTAL_ROWS, TOTAL_COLUMNS = 16, 128  # tile of `total`


class Tiles(NamedTuple):
    """How a program holds a row: widths of the two tiles, warps, and rows in flight (all but one in shared memory)."""

    main: int
    tail: int
    warps: int
    stages: int


def tiles(width: int) -> Tiles:
    """MAIN is the largest power of two below the width, TAIL the smallest that holds the rest. Not yet tuned on a GPU.

    A thread holds at most 24 elements of a row, because the gated backward pass keeps ten rows in at most 255 registers
    per thread. It holds no fewer, because sums over a row are cheap with few warps, and because TAIL then has two
    elements per thread, the minimum for asynchronous copies into shared memory. Rows above 2,048 are not prefetched:
    that would exceed the shared memory of some GPUs.
    """
    main = 1 << max(0, (width - 1).bit_length() - 1)
    tail = 1 << max(0, width - main - 1).bit_length()
    warps = 1 << (-(-(main + tail) // (24 * 32)) - 1).bit_length()
    return Tiles(main, tail, warps, 3 if main + tail <= 2048 else 1)


@triton.jit
def load(pointer, WIDTH: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr):
    """Tiles (MAIN,) and (TAIL,) of the row at `pointer` as float32; zeros beyond the row."""
    tail_columns = MAIN + tl.arange(0, TAIL)
    main = tl.load(pointer + tl.arange(0, MAIN))
    tail = tl.load(pointer + tail_columns, mask=tail_columns < WIDTH, other=0.0)
    return main.to(tl.float32), tail.to(tl.float32)


@triton.jit
def store(pointer, main, tail, WIDTH: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr):
    """The inverse of `load`, rounded to the pointer's dtype."""
    tail_columns = MAIN + tl.arange(0, TAIL)
    tl.store(pointer + tl.arange(0, MAIN), main.to(pointer.dtype.element_ty))
    tl.store(pointer + tail_columns, tail.to(pointer.dtype.element_ty), mask=tail_columns < WIDTH)


@triton.jit
def mean(main, tail, WIDTH: tl.constexpr):
    """Mean of a row whose tail is zero beyond the width.

    Not a division, which is approximate on GPUs: the mean of a row of one element would not be that element, and the
    normalisation would multiply the difference by up to 1 / sqrt(eps).
    """
    return (tl.sum(main, axis=0) + tl.sum(tail, axis=0)) * (1.0 / WIDTH)


@triton.jit
def normalise(main, tail, eps, WIDTH: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr):
    """(n_main, n_tail, mean, rstd) with n = (row - mean) rstd. Two passes over the registers: the variance is that of
    the centred row."""
    row_mean = mean(main, tail, WIDTH)
    main = main - row_mean
    tail = tl.where(MAIN + tl.arange(0, TAIL) < WIDTH, tail - row_mean, 0.0)
    rstd = 1 / tl.sqrt(mean(main * main, tail * tail, WIDTH) + eps)
    return main * rstd, tail * rstd, row_mean, rstd


@triton.jit
def normalise_backward(n_main, n_tail, g_main, g_tail, rstd, WIDTH: tl.constexpr):
    """Gradient of a row, (g - mean(g) - n mean(g n)) rstd, from the gradient g of n = `normalise`(row). Only g has to
    be zero beyond the width."""
    g_mean = mean(g_main, g_tail, WIDTH)
    gn_mean = mean(g_main * n_main, g_tail * n_tail, WIDTH)
    return (g_main - g_mean - n_main * gn_mean) * rstd, (g_tail - g_mean - n_tail * gn_mean) * rstd


@triton.jit
def _adaln_total(
    partials, first, second, third,  # (K, B, CHUNKS, D), K x (B, D), None beyond K
    batch, chunks,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """COLUMNS columns of one of the K sums of one sample, ROWS chunks at a time."""
    sample, which = tl.program_id(0).to(tl.int64), tl.program_id(2)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    partials += (which * batch + sample) * chunks * WIDTH
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    for begin in range(0, chunks, ROWS):
        chunk = begin + tl.arange(0, ROWS)[:, None]
        sums += tl.load(partials + chunk * WIDTH + column, mask=(chunk < chunks) & (column < WIDTH), other=0.0)
    result = tl.sum(sums, axis=0, keep_dims=True)
    offset, mask = sample * WIDTH + column, column < WIDTH
    if which == 0:
        tl.store(first + offset, result.to(first.dtype.element_ty), mask=mask)
    elif which == 1:
        tl.store(second + offset, result.to(second.dtype.element_ty), mask=mask)
    elif third is not None:
        tl.store(third + offset, result.to(third.dtype.element_ty), mask=mask)


def chunks(batch: int, tokens: int, min_tokens: int) -> int:
    """Programs that share the tokens of a sample: a power of two if there are enough tokens. Not yet tuned on a GPU.

    The target is 6 to 12 programs for each of an H200's 132 multiprocessors, with at least `min_tokens` tokens each,
    because every program reads the modulation again and, in a backward pass, writes a float32 row for each sum. The
    number does not depend on the device, so that the order of additions, and with it every bit, is the same everywhere.
    """
    if not batch:
        return 0
    target = 1 << ((-(-12 * 132 // batch)).bit_length() - 1)
    return min(target, -(-tokens // min_tokens))


def total(partials: Tensor, *dtypes: torch.dtype) -> tuple[Tensor, ...]:
    """Sums over chunks in one launch: (K, B, CHUNKS, D) float32 -> K x (B, D) of the given dtypes, zeros without any
    chunks. K is 2 or 3."""
    count, batch, chunks, width = partials.shape
    sums = tuple(torch.empty(batch, width, dtype=dtype, device=partials.device) for dtype in dtypes)
    if batch:
        first, second, third = (*sums, None)[:3]
        grid = (batch, -(-width // TOTAL_COLUMNS), count)
        _adaln_total[grid](
            partials, first, second, third, batch, chunks,
            WIDTH=width, ROWS=TOTAL_ROWS, COLUMNS=TOTAL_COLUMNS, num_warps=4,
        )  # fmt: skip
    return sums


def check(rows: Mapping[str, Tensor], vectors: Mapping[str, Tensor]) -> None:
    """Validate the arguments of a fused op.

    Args:
        rows: by name, tensors that must be (B, T, D); the first decides the sizes.
        vectors: by name, tensors that must be (B, D).

    Raises:
        ValueError: naming the tensor, its value and what is expected.
    """
    if reason := why_unavailable():
        raise ValueError(f"a fused kernel cannot run: {reason}")
    first, x = next(iter(rows.items()))
    if x.ndim != 3 or not 1 <= x.shape[2] <= MAX_WIDTH:
        raise ValueError(f"{first}: shape {tuple(x.shape)} given; must be (B, T, D) with D from 1 to {MAX_WIDTH:,}")
    if x.device.type != "cuda" and not INTERPRETED:
        raise ValueError(f"{first}: device {x.device} given; must be a CUDA device")
    shapes = dict.fromkeys(rows, tuple(x.shape)) | dict.fromkeys(vectors, (x.shape[0], x.shape[2]))
    for name, tensor in {**rows, **vectors}.items():
        if tensor.shape != shapes[name]:
            raise ValueError(f"{name}: shape {tuple(tensor.shape)} given; must be {shapes[name]} to match {first}")
        if tensor.dtype not in DTYPES:
            raise ValueError(f"{name}: dtype {tensor.dtype} given; must be one of {', '.join(map(str, DTYPES))}")
        if tensor.device != x.device:
            raise ValueError(f"{name}: device {tensor.device} given; must be {x.device}, the device of {first}")
        if not _has_dense_rows(tensor):
            raise ValueError(f"{name}: strides {tensor.stride()} given; the last must be 1")


def _has_dense_rows(tensor: Tensor) -> bool:
    return tensor.stride(-1) == 1 or tensor.shape[-1] == 1 or not tensor.numel()


def with_dense_rows(gradient: Tensor) -> Tensor:
    """The gradient, copied if its rows are not dense: that of a sum is one element, expanded."""
    return gradient if _has_dense_rows(gradient) else gradient.contiguous()
