"""Rows of a (B, T, D) tensor in registers, for the kernels that normalise them.

A row is two tiles, both powers of two as Triton wants them: D elements = MAIN, all of them there, and the rest in TAIL.
The widths of the published models fill both (384 = 256 + 128, 768 = 512 + 256, 1024 = 512 + 512, 1152 = 1024 + 128),
where one tile of the next power of two would compute on up to 44 % of nothing. Everything is float32 in registers.

A program takes one row at a time: the sum of a tile is then a scalar, whereas for several rows at once Triton carries
whole tiles of unequal widths through shared memory, so that both have their sums in the same threads. Programs enough
on a multiprocessor, and the next row under way while one is computed, hide the memory's latency.

Sums over tokens are taken within a chunk of tokens by one program, and over chunks by `total`, both in a fixed order:
there are no atomics, and two runs are equal in every bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from .language import INTERPRETED, tl, triton, why_unavailable

LARGEST_WIDTH = 8192
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TOTAL_ROWS, TOTAL_COLUMNS = 16, 128  # tile of `total`


class Tiles(NamedTuple):
    """How a program holds a row.

    Attributes:
        main, tail: widths of the two tiles.
        warps: of the program.
        stages: rows under way at a time; those to come wait in shared memory.
    """

    main: int
    tail: int
    warps: int
    stages: int


def tiles(width: int) -> Tiles:
    """MAIN is the largest power of two below the width, TAIL the smallest that holds the rest. Not yet tuned on a GPU:

    A thread holds at most 24 elements of a row, because gated_adaln's backward pass has ten such shares in its at most
    255 registers, and as many as that, because with few warps the sums over a row are cheap and TAIL has two elements
    for each thread, the least that can be copied into shared memory ahead of time. Rows above 2,048 would need more of
    that than some GPUs have.
    """
    main = 1 << max(0, (width - 1).bit_length() - 1)
    tail = 1 << max(0, width - main - 1).bit_length()
    warps = 1 << (-(-(main + tail) // (24 * 32)) - 1).bit_length()
    return Tiles(main, tail, warps, 3 if main + tail <= 2048 else 1)


@triton.jit
def load(pointer, WIDTH: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr):
    """Tiles (MAIN,) and (TAIL,) of the row at `pointer`; zeros where nothing is."""
    tail = MAIN + tl.arange(0, TAIL)
    a = tl.load(pointer + tl.arange(0, MAIN))
    b = tl.load(pointer + tail, mask=tail < WIDTH, other=0.0)
    return a.to(tl.float32), b.to(tl.float32)


@triton.jit
def store(pointer, a, b, WIDTH: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr):
    """The inverse of `load`, rounded to the pointer's dtype."""
    tail = MAIN + tl.arange(0, TAIL)
    tl.store(pointer + tl.arange(0, MAIN), a.to(pointer.dtype.element_ty))
    tl.store(pointer + tail, b.to(pointer.dtype.element_ty), mask=tail < WIDTH)


@triton.jit
def mean(a, b, WIDTH: tl.constexpr):
    """The mean over the width, of what is zero where nothing is."""
    return (tl.sum(a, axis=0) + tl.sum(b, axis=0)) / WIDTH


@triton.jit
def normalise(a, b, eps, WIDTH: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr):
    """(n_a, n_b, mean, rstd): the row less its mean, times the inverse of its standard deviation. Two passes over the
    registers: the variance is that of the centred row."""
    mu = mean(a, b, WIDTH)
    a = a - mu
    b = tl.where(MAIN + tl.arange(0, TAIL) < WIDTH, b - mu, 0.0)
    rstd = 1 / tl.sqrt(mean(a * a, b * b, WIDTH) + eps)
    return a * rstd, b * rstd, mu, rstd


@triton.jit
def normalise_backward(n_a, n_b, g_a, g_b, rstd, WIDTH: tl.constexpr):
    """Gradient of a row for the gradient g of n = `normalise`(row): (g - mean(g) - n mean(g n)) rstd. Only g has to be
    zero where nothing is."""
    g_mean = mean(g_a, g_b, WIDTH)
    gn_mean = mean(g_a * n_a, g_b * n_b, WIDTH)
    return (g_a - g_mean - n_a * gn_mean) * rstd, (g_b - g_mean - n_b * gn_mean) * rstd


@triton.jit
def _adaln_total(
    partials, first, second, third,  # (K, B, CHUNKS, D), K times (B, D), None beyond K
    batch, chunks,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """COLUMNS columns of one of K sums of one sample, ROWS chunks at a time."""
    sample, which = tl.program_id(0).to(tl.int64), tl.program_id(2)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    partials += (which * batch + sample) * chunks * WIDTH
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    for begin in range(0, chunks, ROWS):
        chunk = begin + tl.arange(0, ROWS)[:, None]
        sums += tl.load(partials + chunk * WIDTH + column, mask=(chunk < chunks) & (column < WIDTH), other=0.0)
    result = tl.sum(sums, axis=0, keep_dims=True)
    place, there = sample * WIDTH + column, column < WIDTH
    if which == 0:
        tl.store(first + place, result.to(first.dtype.element_ty), mask=there)
    elif which == 1:
        tl.store(second + place, result.to(second.dtype.element_ty), mask=there)
    elif third is not None:
        tl.store(third + place, result.to(third.dtype.element_ty), mask=there)


def chunks(batch: int, tokens: int, smallest: int) -> int:
    """Programs for a sample's tokens, a power of two where there are enough, so that they share alike. Not yet tuned on
    a GPU.

    Six to twelve for each of an H200's 132 multiprocessors, but none with fewer than `smallest` tokens: each reads the
    modulation anew, and in a backward pass writes a row of float32 for each sum. A fixed number rather than the
    device's own: the order of additions, and with it the last bit, is the same everywhere.
    """
    if not batch:
        return 0
    wanted = 1 << ((-(-12 * 132 // batch)).bit_length() - 1)
    return min(wanted, -(-tokens // smallest))


def total(partials: Tensor, *dtypes: torch.dtype) -> tuple[Tensor, ...]:
    """Sums over chunks, in one launch: (K, B, CHUNKS, D) float32 -> K times (B, D) in the given dtypes, zeros where
    there is no chunk. K is 2 or 3."""
    count, batch, chunks, width = partials.shape
    out = tuple(torch.empty(batch, width, dtype=dtype, device=partials.device) for dtype in dtypes)
    if batch:
        first, second, third = (*out, None)[:3]
        grid = (batch, -(-width // TOTAL_COLUMNS), count)
        _adaln_total[grid](
            partials, first, second, third, batch, chunks,
            WIDTH=width, ROWS=TOTAL_ROWS, COLUMNS=TOTAL_COLUMNS, num_warps=4,
        )  # fmt: skip
    return out


def check(rows: Mapping[str, Tensor], vectors: Mapping[str, Tensor]) -> None:
    """Refuse what the kernels cannot take.

    Args:
        rows: by name, tensors that must be (B, T, D), as the first is.
        vectors: by name, tensors that must be (B, D).

    Raises:
        ValueError: naming the tensor, what came and what is expected.
    """
    if reason := why_unavailable():
        raise ValueError(f"a fused kernel cannot run: {reason}")
    first, x = next(iter(rows.items()))
    if x.ndim != 3 or not 1 <= x.shape[2] <= LARGEST_WIDTH:
        raise ValueError(f"{first}: shape {tuple(x.shape)} given; must be (B, T, D) with D from 1 to {LARGEST_WIDTH:,}")
    if x.device.type != "cuda" and not INTERPRETED:
        raise ValueError(f"{first}: device {x.device} given; must be a CUDA device")
    batch, tokens, width = x.shape
    for name, tensor, expected in (
        *((name, tensor, (batch, tokens, width)) for name, tensor in rows.items()),
        *((name, tensor, (batch, width)) for name, tensor in vectors.items()),
    ):
        if tensor.shape != expected:
            raise ValueError(f"{name}: shape {tuple(tensor.shape)} given; must be {expected}, as {first} has it")
        if tensor.dtype not in DTYPES:
            raise ValueError(f"{name}: dtype {tensor.dtype} given; must be one of {', '.join(map(str, DTYPES))}")
        if tensor.device != x.device:
            raise ValueError(f"{name}: device {tensor.device} given; must be {first}'s, {x.device}")
        if not dense(tensor):
            raise ValueError(f"{name}: strides {tensor.stride()} given; the last must be 1")


def dense(tensor: Tensor) -> bool:
    """Whether the elements of a row are neighbours."""
    return tensor.stride(-1) == 1 or tensor.shape[-1] == 1 or not tensor.numel()


def with_dense_rows(gradient: Tensor) -> Tensor:
    """A gradient as it came, or copied where its rows are not dense: the sum's is one element, expanded."""
    return gradient if dense(gradient) else gradient.contiguous()
