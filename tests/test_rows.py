"""rows.py: subsets of a row set, and the rows that are held out."""

from __future__ import annotations

import numpy as np
import torch
from small_data import pack, refusal

from sra_fast.data.packed import open_row_set
from sra_fast.data.rows import split
from sra_fast.kernels.perturb import clean_ref
from sra_fast.kernels.philox import Draw, normals, uniforms


def test_held_out_rows_are_a_function_of_the_row(tmp_path):
    stored = pack(tmp_path / "set")
    train, held_out = split(open_row_set(stored.root), 0.3)
    assert sorted([*train.index, *held_out.index]) == list(range(80))
    drawn = uniforms(0, torch.arange(80), Draw.HELD_OUT)[:, 0] < 0.3
    assert held_out.index.tolist() == drawn.nonzero()[:, 0].tolist()
    more = pack(tmp_path / "more", shards=(7, 30, 1, 42, 40))
    assert set(held_out.index) == {row for row in split(open_row_set(more.root), 0.3)[1].index if row < 80}
    assert set(split(open_row_set(stored.root), 0.1)[1].index) < set(held_out.index)
    assert np.array_equal(held_out.labels, stored.labels[held_out.index])
    assert (len(train), train.classes) == (80 - len(held_out), ("c0", "c1", "c2", "c3"))
    assert held_out.take(np.array([2, 0])).index.tolist() == held_out.index[[2, 0]].tolist()


def test_a_split_leaves_rows_on_both_sides(tmp_path):
    pack(tmp_path, shards=(2,), classes=1)
    for share in (1e-9, 1 - 1e-9):
        assert f"data.held-out: {share} given" in refusal(split, open_row_set(tmp_path), share)


def test_x_is_scaled_per_channel(tmp_path):
    stored = pack(tmp_path, scale=[1.0, 2.0, 3.0, 4.0], shift=[0.5, 0.0, 0.0, -1.0])
    row_set, number = open_row_set(tmp_path), torch.arange(80)
    x = clean_ref(row_set.gather(np.arange(80)), number, 7, row_set.stored(torch.device("cpu")))
    mean, deviation = np.split(stored.rows.astype(np.float32), 2, axis=1)
    z = mean + deviation * normals(7, number, Draw.POSTERIOR, 64).view(80, 4, 4, 4).numpy()
    shift, scale = (np.array(factor)[:, None, None] for factor in ((0.5, 0, 0, -1), (1, 2, 3, 4)))
    assert np.allclose(x.numpy(), (z - shift) * scale, atol=1e-6)
