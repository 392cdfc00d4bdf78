"""packed.py: every row is read as it was stored, and a damaged file is named."""

from __future__ import annotations

import os
import resource
import threading

import numpy as np
import pytest
from small_data import ROW, change, pack, publish, refusal

from sra_fast import files
from sra_fast.data import packed as packed_module
from sra_fast.data.packed import PackedSet, open_row_set
from sra_fast.errors import Refused

KINDS = {
    "moments": {},
    "latents": {"posterior": False},
    "float32": {"dtype": "float32"},
    "grey": {"dtype": "uint8", "shape": (1, 3, 3)},  # 9 bytes a row
    "mirrored": {"flips": True},
    "one row": {"shards": (1,), "classes": 1},
}


@pytest.fixture
def packed(tmp_path):
    return pack(tmp_path / "set", flips=True)


@pytest.mark.parametrize("kind", KINDS)
def test_every_row_is_what_was_stored(tmp_path, kind):
    stored = pack(tmp_path, **KINDS[kind])
    row_set = open_row_set(tmp_path)
    assert isinstance(row_set, PackedSet)
    count = len(stored.labels)
    order = np.random.default_rng(1).permutation(np.concatenate([np.arange(count)] * 2))
    x = row_set.gather(order)
    assert x.numpy().dtype == stored.rows.dtype
    assert np.array_equal(x.numpy(), stored.rows[order])
    assert np.array_equal(row_set.labels, stored.labels)
    assert row_set.gather(np.empty(0, dtype=np.int64)).shape == (0, *stored.rows.shape[1:])
    if row_set.flips:
        coin = np.random.default_rng(2).random(len(order)) < 0.5
        expected = np.where(coin[:, None, None, None], stored.flips[order], stored.rows[order])
        assert np.array_equal(row_set.gather(order, coin).numpy(), expected)
    for row in (0, count // 2, count - 1):
        assert any(np.array_equal(stored.rows[row], one) for one in np.load(row_set.file(row)))


def test_more_shards_than_open_files(tmp_path, monkeypatch):
    monkeypatch.setattr(packed_module, "OPEN_FILES", 3)
    stored = pack(tmp_path, shards=(2,) * 10)
    row_set = open_row_set(tmp_path)
    before = len(os.listdir("/proc/self/fd"))
    order = np.random.default_rng(0).integers(0, 20, 200)
    assert np.array_equal(row_set.gather(order).numpy(), stored.rows[order])
    assert len(os.listdir("/proc/self/fd")) == before + 3
    row_set.close()
    assert len(os.listdir("/proc/self/fd")) == before
    assert np.array_equal(row_set.gather(order).numpy(), stored.rows[order])
    del row_set
    assert len(os.listdir("/proc/self/fd")) == before


def test_more_shards_than_the_system_lets_open(tmp_path, monkeypatch):
    stored = pack(tmp_path, shards=(2,) * 40)
    row_set = open_row_set(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken = len(os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (taken + 12, limits[1]))
    monkeypatch.setattr(files, "PAUSES_S", ())
    try:
        assert np.array_equal(row_set.gather(np.arange(80)).numpy(), stored.rows[np.arange(80)])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_threads_share_a_set_with_few_open_files(tmp_path, monkeypatch):
    monkeypatch.setattr(packed_module, "OPEN_FILES", 1)
    stored = pack(tmp_path, shards=(3,) * 6)
    row_set = open_row_set(tmp_path)
    # Gives another thread time between opening and reading, to close the file if there were no lock.
    read, wrong = os.preadv, []
    monkeypatch.setattr(os, "preadv", lambda *words: (threading.Event().wait(0.0005), read(*words))[1])

    def work(seed):
        try:
            for _ in range(8):
                order = np.random.default_rng(seed).integers(0, 18, 6)
                if not np.array_equal(row_set.gather(order).numpy(), stored.rows[order]):
                    wrong.append("other rows")
        except Refused as error:
            wrong.append(str(error))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.parametrize("name", ["moments-00001.npy", "moments_flip-00002.npy", "labels-00003.npy"])
@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "longer", "folder", "unreadable header"])
def test_a_damaged_file_is_refused_by_name(packed, name, damage):
    path = packed.root / name
    whole = path.read_bytes()
    path.unlink()
    if damage == "folder":
        path.mkdir()
    elif damage != "missing":
        broken = whole[:20] + b"((\n(" + whole[24:]
        path.write_bytes({"empty": b"", "cut": whole[:-1], "longer": whole + b"\0"}.get(damage, broken))
    assert refusal(open_row_set, packed.root).startswith(f"{path}: ")


def test_any_flipped_bit_of_a_header_is_refused_or_harmless(tmp_path):
    """Those in the padding are harmless."""
    stored = pack(tmp_path, shards=(4,))
    path = tmp_path / "moments-00000.npy"
    whole, messages = path.read_bytes(), []
    for place in range(128):
        for bit in (1, 8, 64):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ bit]) + whole[place + 1 :])
            try:
                row_set = open_row_set(tmp_path)
            except Refused as error:
                messages.append(str(error))
            else:
                assert np.array_equal(row_set.gather(np.arange(4)).numpy(), stored.rows)
    assert all(message.startswith(f"{path}: ") for message in messages)
    assert len(messages) > 200


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("moments-00001.npy", np.zeros((30, *ROW), np.float32), "float32 (30, 8, 4, 4); must be float16"),
        ("moments-00001.npy", np.zeros((30, *ROW), ">f2"), "; must be float16"),
        ("moments-00001.npy", np.zeros((29, *ROW), np.float16), "(29, 8, 4, 4); must be float16 (30, 8, 4, 4)"),
        ("moments-00001.npy", np.zeros((30, *ROW), np.float16, order="F"), "C order"),
        ("labels-00001.npy", np.zeros(30, np.int32), "holds int32 (30,)"),
        ("labels-00001.npy", np.zeros((30, 1), np.int64), "holds int64 (30, 1)"),
        ("labels-00001.npy", np.full(30, 4), "label 4 of row 0; must be in [0, 4)"),
        ("labels-00001.npy", np.full(30, -1), "label -1 of row 0"),
        ("labels-00001.npy", np.full(30, 2**62), f"label {2**62} of row 0"),
    ],
)
def test_a_file_unlike_the_manifest_is_refused(packed, name, content, message):
    np.save(packed.root / name, content)
    line = refusal(open_row_set, packed.root)
    assert line.startswith(f"{packed.root / name}: ")
    assert message in line


def test_a_class_without_rows_is_named(packed):
    change(packed.root, lambda m: m["classes"].append("zebra"))
    assert refusal(open_row_set, packed.root) == f"{packed.root}: class 4 (zebra) has no images"


def test_a_shard_that_shrinks_or_vanishes_is_named(packed):
    row_set, rows = open_row_set(packed.root), np.arange(80)
    path = packed.root / "moments-00003.npy"
    row_set.gather(rows)
    os.truncate(path, path.stat().st_size - 1)
    assert np.array_equal(row_set.gather(rows[:79]).numpy(), packed.rows[:79])
    assert refusal(row_set.gather, rows) == f"{path}: cut short; row 41 is incomplete"
    row_set.close()
    path.unlink()
    assert f"{path}: cannot be read (No such file" in refusal(row_set.gather, rows)
    assert np.array_equal(row_set.gather(rows[:38]).numpy(), packed.rows[:38])


def test_a_packed_set_has_precedence_over_the_public_layout(tmp_path):
    publish(tmp_path)
    pack(tmp_path)
    assert isinstance(open_row_set(tmp_path), PackedSet)


def test_a_large_set_needs_little_memory(tmp_path):
    """Open a sparse set of 4 GiB and read a few rows."""
    size = 65_536
    pack(tmp_path, shards=(1, 1), shape=(8, 64, 64), classes=1)
    header = np.lib.format.header_data_from_array_1_0(np.empty((0, 8, 64, 64), np.float16))
    with (tmp_path / "moments-00001.npy").open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {**header, "shape": (size, 8, 64, 64)})
        file.truncate(file.tell() + size * 65_536)
    np.save(tmp_path / "labels-00001.npy", np.zeros(size, np.int64))
    change(tmp_path, lambda m: (m["shards"][1].update(rows=size), m.update(count=size + 1)))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    x = open_row_set(tmp_path).gather(np.array([size, 0, 12345]))
    assert not x[[0, 2]].any()
    assert x[1].any()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # KiB
