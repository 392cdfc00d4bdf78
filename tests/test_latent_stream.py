"""latent_stream.py: every row once an epoch, in the run's order, whatever the batch and the resume point."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_data import pack, publish, refusal, resident_kib

from sra_fast.data import latent_stream
from sra_fast.data.latent_stream import LatentStream, load
from sra_fast.data.order import rows
from sra_fast.data.packed import open_row_set
from sra_fast.data.rows import Rows, split
from sra_fast.kernels.philox import Draw, uniforms


def numbered(root, count, **options):
    """A set whose row n holds n everywhere, and -n where it is mirrored; in shards of unequal rows."""
    cuts = sorted({*(np.random.default_rng(count).integers(1, count, 4).tolist() if count > 1 else []), count})
    shards = np.diff([0, *cuts]).tolist()
    pack(root, shards, shape=(2, 1, 1), dtype="float32", classes=1, posterior=False, **options)
    first = 0
    for number, size in enumerate(shards):
        values = np.arange(first, first + size, dtype=np.float32)[:, None, None, None].repeat(2, 1)
        np.save(root / f"moments-{number:05d}.npy", values)
        if options.get("flips"):
            np.save(root / f"moments_flip-{number:05d}.npy", -values)
        first += size
    return open_row_set(root)


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """Numbered sets by size."""
    root = tmp_path_factory.mktemp("sets")
    return {size: numbered(root / str(size), size, flips=True) for size in (2, 5, 31, 100)}


def taken(chosen, count, batch, first=0, seed=5):
    """(rows, with a minus where mirrored, numbers, labels) of `count` images; count is a multiple of batch."""
    shown, numbers, labels = [], [], []
    with LatentStream(chosen, seed=seed, batch=batch, first_image=first) as stream:
        for item in [next(stream) for _ in range(count // batch)]:  # later batches do not change earlier ones
            assert item.x.shape == (batch, 2, 1, 1)
            shown += item.x[:, 0, 0, 0].tolist()
            numbers += item.number.tolist()
            labels += item.labels.tolist()
        assert (stream.replaced, stream.bad) == (0, {})
    return shown, numbers, labels


def mirrored(seed, numbers):
    """From the description: a coin of (seed, n, FLIP)."""
    return (uniforms(seed, torch.tensor(numbers), Draw.FLIP)[:, 0] < 0.5).tolist()


@settings(deadline=None, max_examples=25)
@given(
    size=st.sampled_from([2, 5, 31, 100]),
    batch=st.integers(1, 40),
    start=st.integers(0, 250),
    seed=st.integers(0, 2**64 - 1),
)
def test_every_row_comes_once_an_epoch_from_any_point(sets, size, batch, start, seed):
    chosen = Rows(sets[size], np.arange(size))
    shown, numbers, labels = taken(chosen, batch * (2 * size // batch + 2), batch, start, seed)
    assert numbers == list(range(start, start + len(numbers)))
    order = rows(seed, start, len(numbers), size).tolist()
    assert [abs(row) for row in shown] == order
    begin = -start % size  # the first whole epoch
    assert sorted(order[begin : begin + size]) == list(range(size))
    signs = mirrored(seed, numbers)
    assert shown == [-row if flip else row for row, flip in zip(order, signs, strict=True)]
    assert labels == [0] * len(numbers)


@settings(deadline=None, max_examples=10)
@given(batch=st.integers(1, 12), done=st.integers(0, 8), block=st.sampled_from([5, 16, 64]))
def test_a_resumed_run_and_another_batch_see_the_same(sets, batch, done, block):
    chosen = Rows(sets[31], np.arange(3, 29))  # not all of the set, as training is
    whole = taken(chosen, 12 * batch, batch)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(latent_stream, "BLOCK", block)
        resumed = taken(chosen, (12 - done) * batch, batch, first=done * batch)
        split_up = taken(chosen, 12 * batch, 1)
    assert resumed == tuple(values[done * batch :] for values in whole)
    assert split_up == whole
    assert {abs(row) for row in whole[0]} <= set(range(3, 29))


def test_batches_are_as_the_set_stores_them(tmp_path):
    stored = pack(tmp_path / "p", flips=False)
    published = publish(tmp_path / "q")
    for one, dtype in ((stored, torch.float16), (published, torch.float32)):
        moments = open_row_set(one.root)
        with LatentStream(split(moments, 0.2)[0], seed=1, batch=9, first_image=2**40) as stream:
            x, labels, number = next(stream)
        assert (x.dtype, x.device.type, x.shape[0]) == (dtype, "cpu", 9)
        assert number.tolist() == list(range(2**40, 2**40 + 9))
        expected = split(moments, 0.2)[0].index[rows(1, 2**40, 9, len(split(moments, 0.2)[0]))]
        assert np.array_equal(x.numpy(), one.rows[expected])
        assert labels.tolist() == one.labels[expected].tolist()


def test_a_shard_cut_short_in_the_middle_of_a_run_is_named(tmp_path):
    row_set = numbered(tmp_path, 100)
    path = max(tmp_path.glob("moments-*.npy"))
    with LatentStream(Rows(row_set, np.arange(100)), seed=0, batch=4, first_image=0) as stream:
        next(stream)
        os.truncate(path, 130)
        line = refusal(lambda: [next(stream) for _ in range(60)])
        assert line.startswith(f"{path}: cut short; row ")
        assert refusal(next, stream) == line


def test_load_gives_rows_in_their_order(sets):
    x, labels = load(Rows(sets[31], np.array([7, 30, 0])), torch.device("cpu"))
    assert x[:, 0, 0, 0].tolist() == [7, 30, 0]
    assert labels.tolist() == [0, 0, 0]


def test_memory_stays_flat_over_thousands_of_batches(tmp_path):
    """3,000 batches of 32 KiB, of which the first 500 fill what is kept. With a leak the process grows again and again,
    while the allocator takes a step or two."""
    pack(tmp_path, shape=(8, 8, 8), flips=True)
    chosen, resident = Rows(open_row_set(tmp_path), np.arange(80)), []
    with LatentStream(chosen, seed=0, batch=32, first_image=0) as stream:
        for number in range(3000):
            next(stream)
            if number >= 500 and number % 100 == 0:
                resident.append(resident_kib())
        assert len(os.listdir("/proc/self/fd")) < 100
    assert np.count_nonzero(np.diff(resident) > 0) < len(resident) / 2, resident  # KiB
