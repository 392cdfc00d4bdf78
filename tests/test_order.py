"""order.py: a keyed bijection per epoch, in an order that never changes."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sra_fast.data.order import LARGEST_SIZE, rows

AWKWARD = (1, 2, 3, 4, 5, 6, 9, 10, 15, 16, 17, 97, 99, 100, 101, 1023, 1024, 1025, 10_007)


def scalar_row(seed: int, number: int, size: int) -> int:
    """The same bijection, one row at a time in Python integers, written from the description alone."""

    def word(counter: list[int]) -> int:
        c, k = list(counter), [seed % 2**32, seed // 2**32]
        for _ in range(10):
            p, q = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
            c = [(q >> 32) ^ c[1] ^ k[0], q % 2**32, (p >> 32) ^ c[3] ^ k[1], p % 2**32]
            k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
        return c[0]

    epoch, value = divmod(number, size)
    a = math.ceil(math.sqrt(size))
    b = math.ceil(size / a)
    while True:
        left, right = divmod(value, b)
        for index in range(8):
            order = 5  # Draw.ORDER
            tail = [epoch % 2**32, epoch // 2**32, order]
            if index % 2 == 0:
                left = (left + word([index * 2**24 + right, *tail]) * a // 2**32) % a
            else:
                right = (right + word([index * 2**24 + left, *tail]) * b // 2**32) % b
        value = left * b + right
        if value < size:
            return value


@pytest.mark.parametrize("size", AWKWARD)
def test_every_epoch_is_a_bijection(size):
    for seed, epoch in ((0, 0), (0, 1), (2**64 - 1, 2**33 + 1)):
        assert sorted(rows(seed, epoch * size, size, size).tolist()) == list(range(size))


@pytest.mark.parametrize("size", [1, 2, 5, 97, 1797, 1_281_167, 2**40, LARGEST_SIZE - 1, LARGEST_SIZE])
def test_equals_the_scalar_description(size):
    for seed, first in ((0, 0), (2**64 - 1, 3 * size - 2), (12345, 2**33 * min(size, 1000) + 7)):
        first = max(first, 0)
        expected = [scalar_row(seed, first + i, size) for i in range(5)]
        assert rows(seed, first, 5, size).tolist() == expected


def test_committed_values_never_change():
    assert rows(0, 0, 8, 10).tolist() == [9, 8, 6, 5, 0, 3, 4, 1]
    assert rows(0, 10, 8, 10).tolist() == [5, 8, 0, 6, 7, 2, 9, 4]
    assert rows(7, 3 * 1797 - 3, 6, 1797).tolist() == [9, 1504, 171, 805, 848, 86]
    assert rows(2**64 - 1, 2**40 + 5, 4, 1_281_167).tolist() == [412264, 461349, 806539, 10805]
    assert rows(1, 0, 3, 2**40).tolist() == [236963707063, 613667064299, 356460320294]
    assert rows(1, 12345678901234567, 2, 2**46).tolist() == [42521621149478, 39604123103210]


@settings(max_examples=40, deadline=None)
@given(
    size=st.integers(1, 400),
    seed=st.integers(0, 2**64 - 1),
    epoch=st.integers(0, 2**34),
    cuts=st.lists(st.integers(0, 800), max_size=5),
)
def test_once_per_epoch_however_batches_are_cut(size, seed, epoch, cuts):
    first = epoch * size
    edges = [0, *sorted(min(cut, 2 * size) for cut in cuts), 2 * size]
    parts = [rows(seed, first + lo, hi - lo, size) for lo, hi in itertools.pairwise(edges)]
    joined = np.concatenate(parts)
    assert joined.dtype == np.int64
    assert (joined == rows(seed, first, 2 * size, size)).all()
    for half in (joined[:size], joined[size:]):
        assert sorted(half.tolist()) == list(range(size))


def test_refuses_what_it_cannot_number():
    for arguments in ((0, 0, 1, 0), (0, 0, 1, LARGEST_SIZE + 1), (0, -1, 1, 5), (0, 0, -1, 5)):
        with pytest.raises(ValueError, match=r"given; must"):
            rows(*arguments)
    assert rows(0, 3, 0, 5).tolist() == []
