"""Which data row is the n-th image of a run.

    epoch = n // N,  row = P(n % N),  P = a bijection of [0, N) keyed by (seed, epoch)

Every row appears once in each epoch, in an order that is a pure function of (seed, n): no shuffled index is stored,
resuming costs nothing, and ranks agree without communication. A library's `randperm` needs O(N) memory and its result
may change with the version.

P is a Feistel network on pairs. With a = ceil(sqrt(N)) and b = ceil(N / a), a number below a b is a pair (left in
Z_a, right in Z_b), and each round adds a random function of one half to the other: a bijection whatever the function.
A result of N or more is permuted again until it lies below N ("cycle walking"), which gives a bijection of [0, N);
fewer than one in b needs this.

Source: Black and Rogaway, "Ciphers with Arbitrary Finite Domains", CT-RSA 2002 (generalized Feistel and cycle walking).
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from sra_fast.kernels.philox import Draw, below, philox

ROUNDS = 8  # each half changes four times. Frozen like the rest of this file: another order is another run.
LARGEST_SIZE = 1 << 46  # the halves are then at most 2^23, and a round's counter word has 24 bits for them
_MASK = 0xFFFFFFFF


def rows(seed: int, first: int, count: int, size: int) -> np.ndarray:
    """The data rows of image numbers first .. first + count - 1.

    Args:
        seed: the run's 64-bit seed.
        first: first image number.
        count: number of images; they may span epochs.
        size: N, rows in the data set, in [1, 2^46].

    Returns:
        (count,) int64 in [0, size).

    Raises:
        ValueError: on a size, first or count out of range.
    """
    if not 1 <= size <= LARGEST_SIZE:
        raise ValueError(f"size: {size} given; must be in [1, 2^46]")
    if first < 0 or count < 0:
        raise ValueError(f"first, count: {first}, {count} given; must not be negative")
    number = torch.arange(first, first + count, dtype=torch.int64)
    epoch, row = number // size, number % size
    left_size = math.isqrt(size - 1) + 1
    halves = left_size, -(-size // left_size)
    outside = torch.arange(count)
    while len(outside):
        permuted = _permute(seed, epoch.index_select(0, outside), row.index_select(0, outside), halves)
        row.index_copy_(0, outside, permuted)
        outside = outside[permuted >= size]
    return row.numpy()


def _permute(seed: int, epoch: Tensor, value: Tensor, halves: tuple[int, int]) -> Tensor:
    """The Feistel network on [0, a b): epoch and value (B,) int64, halves = (a, b). Returns (B,) int64."""
    key = seed & _MASK, seed >> 32
    low, high = epoch & _MASK, epoch >> 32
    pair = [value // halves[1], value % halves[1]]
    for index in range(ROUNDS):
        changed, source = index % 2, 1 - index % 2
        word = philox((pair[source] | index << 24, low, high, torch.tensor(int(Draw.ORDER))), key)[0]
        pair[changed] = (pair[changed] + below(word, halves[changed])) % halves[changed]
    return pair[0] * halves[1] + pair[1]
