"""moments.py: rows of a set, held out or not."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from small_sets import SHARDS, pack

from sra_fast.data.packed import open_row_set
from sra_fast.data.rows import Rows, split
from sra_fast.errors import Refused
from sra_fast.kernels.philox import Draw, uniforms


@pytest.fixture
def packed(tmp_path):
    return pack(tmp_path / "set", flips=True)


def test_held_out_rows_are_a_function_of_the_row(packed, tmp_path):
    train, held_out = split(open_row_set(packed.root), 0.3)
    assert sorted([*train.index, *held_out.index]) == list(range(80))
    drawn = uniforms(0, torch.arange(80), Draw.HELD_OUT)[:, 0] < 0.3
    assert held_out.index.tolist() == drawn.nonzero()[:, 0].tolist()
    more = pack(tmp_path / "more", shards=(7, 30, 1, 42, 40))
    assert set(held_out.index) == {row for row in split(open_row_set(more.root), 0.3)[1].index if row < 80}
    assert set(split(open_row_set(packed.root), 0.1)[1].index) < set(held_out.index)
    assert np.array_equal(held_out.labels, packed.labels[held_out.index])
    assert (len(train), train.classes) == (80 - len(held_out), ("c0", "c1", "c2", "c3"))
    few = held_out.take(np.array([2, 0]))
    assert few.index.tolist() == held_out.index[[2, 0]].tolist()


def test_a_split_leaves_rows_on_both_sides(tmp_path):
    pack(tmp_path, shards=(2,), classes=1)
    for share in (1e-9, 1 - 1e-9):
        with pytest.raises(Refused, match=f"data.held-out: {share} given"):
            split(open_row_set(tmp_path), share)


def test_rows_of_a_set_are_loaded_in_their_order(packed):
    rows = Rows(open_row_set(packed.root), np.array([40, 3, 79]))
    assert np.array_equal(rows.row_set.gather(rows.index).numpy(), packed.rows[[40, 3, 79]])
    assert len(rows) == 3
    assert sum(SHARDS) == 80
