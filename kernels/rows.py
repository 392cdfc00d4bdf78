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
    partials,  # (K, B, CHUNKS, D), or (K + 1, B, CHUNKS, D) with a bias
    modulation, bias,  # (B, K, D), (D,) or None
    batch, chunks,
    SUMS: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """COLUMNS columns of one of the B K sums over chunks, or of the bias's over samples and chunks, ROWS at a time."""
    program = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    is_bias = program == batch * SUMS
    sample, which = program // SUMS, program % SUMS
    first = tl.where(is_bias, SUMS * batch, which * batch + sample) * chunks
    count = tl.where(is_bias, batch * chunks, chunks)
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    for begin in range(0, count, ROWS):
        row = begin + tl.arange(0, ROWS)[:, None]
        source = partials + (first + row) * WIDTH + column
        sums += tl.load(source, mask=(row < count) & (column < WIDTH), other=0.0)
    result = tl.sum(sums, axis=0, keep_dims=True)
    if program < batch * SUMS:
        target = modulation + program * WIDTH + column
        tl.store(target, result.to(modulation.dtype.element_ty), mask=column < WIDTH)
    elif bias is not None:
        tl.store(bias + column, result.to(bias.dtype.element_ty), mask=column < WIDTH)


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


def total(partials: Tensor, modulation: Tensor, bias: Tensor | None = None) -> None:
    """Sums over chunks in one launch, zeros without any chunks.

    Args:
        partials: (K, B, CHUNKS, D) float32; with a bias, (K + 1, B, CHUNKS, D), of which the last are summed over
            samples too.
        modulation: (B, K, D), contiguous, overwritten.
        bias: (D,), contiguous, overwritten.
    """
    _, batch, chunks, width = partials.shape
    sums = modulation.shape[1]
    programs = batch * sums + (bias is not None)
    if programs:
        _adaln_total[(programs, -(-width // TOTAL_COLUMNS))](
            partials, modulation, bias, batch, chunks,
            SUMS=sums, WIDTH=width, ROWS=TOTAL_ROWS, COLUMNS=TOTAL_COLUMNS, num_warps=4,
        )  # fmt: skip


def check(rows: Mapping[str, Tensor]) -> tuple[int, int, int]:
    """Validate the rows of a fused op, by name. The first decides the sizes, which are returned: (B, T, D).

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
    shape = batch, tokens, width = x.shape
    check_shape(x, **{name: (tensor, shape) for name, tensor in rows.items()})
    return batch, tokens, width


def check_shape(x: Tensor, /, **tensors: tuple[Tensor, tuple[int, ...]]) -> None:
    """Validate tensors that accompany the rows x: (tensor, its shape) by name.

    Raises:
        ValueError: naming the tensor, its value and what is expected.
    """
    for name, (tensor, shape) in tensors.items():
        if tensor.shape != shape:
            raise ValueError(f"{name}: shape {tuple(tensor.shape)} given; must be {tuple(shape)} to match the rows")
        if tensor.dtype not in DTYPES:
            raise ValueError(f"{name}: dtype {tensor.dtype} given; must be one of {', '.join(map(str, DTYPES))}")
        if tensor.device != x.device:
            raise ValueError(f"{name}: device {tensor.device} given; must be {x.device}, the device of the rows")
        if not _has_dense_rows(tensor):
            raise ValueError(f"{name}: strides {tensor.stride()} given; the last must be 1")


def _has_dense_rows(tensor: Tensor) -> bool:
    return tensor.stride(-1) == 1 or tensor.shape[-1] == 1 or not tensor.numel()


def with_dense_rows(gradient: Tensor) -> Tensor:
    """The gradient, copied if its rows are not dense: that of a sum is one element, expanded."""
    return gradient if _has_dense_rows(gradient) else gradient.contiguous()
