"""latents.py: every row is the one that was stored, and a damaged file is named."""

from __future__ import annotations

import hashlib
import os
import resource
import threading

import numpy as np
import pytest
import torch
from small_sets import ROW, change, pack, publish

from sra_fast.data import packed as latents
from sra_fast.data.packed import PackedSet, open_row_set
from sra_fast.errors import Refused
from sra_fast.kernels.perturb import clean_ref
from sra_fast.kernels.philox import Draw, normals

KINDS = {
    "moments": {},
    "latents": {"posterior": False},
    "float32": {"dtype": "float32"},
    "pixels": {"dtype": "uint8", "shape": (3, 5, 5)},
    "grey": {"dtype": "uint8", "shape": (1, 3, 3)},  # 9 bytes a row
    "mirrored": {"flips": True},
    "one row": {"shards": (1,), "classes": 1},
}


def refusal(call, *arguments):
    with pytest.raises(Refused) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def packed(tmp_path):
    return pack(tmp_path / "set", flips=True)


@pytest.mark.parametrize("kind", KINDS)
def test_every_row_is_what_was_stored(tmp_path, kind):
    stored = pack(tmp_path, **KINDS[kind])
    moments = open_row_set(tmp_path)
    assert isinstance(moments, PackedSet)
    count = len(stored.labels)
    order = np.random.default_rng(1).permutation(np.concatenate([np.arange(count)] * 2))
    x = moments.gather(order)
    assert x.numpy().dtype == stored.rows.dtype
    assert np.array_equal(x.numpy(), stored.rows[order])
    assert np.array_equal(moments.labels, stored.labels)
    assert moments.shape == stored.rows.shape[1:]
    assert moments.gather(np.empty(0, dtype=np.int64)).shape == (0, *moments.shape)
    if moments.flips:
        coin = np.random.default_rng(2).random(len(order)) < 0.5
        expected = np.where(coin[:, None, None, None], stored.flips[order], stored.rows[order])
        assert np.array_equal(moments.gather(order, coin).numpy(), expected)
    for row in (0, count // 2, count - 1):
        held = np.load(moments.file(row))
        assert any(np.array_equal(stored.rows[row], one) for one in held)


def test_x_of_training_is_scaled_per_channel(tmp_path):
    stored = pack(tmp_path, scale=[1.0, 2.0, 3.0, 4.0], shift=[0.5, 0.0, 0.0, -1.0])
    moments = open_row_set(tmp_path)
    assert moments.channels == 4
    number = torch.arange(80)
    x = clean_ref(moments.gather(np.arange(80)), number, 7, moments.stored(torch.device("cpu")))
    mean, deviation = stored.rows.astype(np.float32)[:, :4], stored.rows.astype(np.float32)[:, 4:]
    z = mean + deviation * normals(7, number, Draw.POSTERIOR, 64).view(80, 4, 4, 4).numpy()
    shift, scale = (np.array(f)[:, None, None] for f in ((0.5, 0, 0, -1), (1, 2, 3, 4)))
    assert np.allclose(x.numpy(), (z - shift) * scale, atol=1e-6)


def test_more_shards_than_open_files(tmp_path, monkeypatch):
    monkeypatch.setattr(latents, "OPEN_FILES", 3)
    stored = pack(tmp_path, shards=(2,) * 10, flips=True)
    moments = open_row_set(tmp_path)
    before = len(os.listdir("/proc/self/fd"))
    order = np.random.default_rng(0).integers(0, 20, 200)
    coin = np.random.default_rng(1).random(200) < 0.5
    expected = np.where(coin[:, None, None, None], stored.flips[order], stored.rows[order])
    assert np.array_equal(moments.gather(order, coin).numpy(), expected)
    assert len(os.listdir("/proc/self/fd")) == before + 3
    moments.close()
    assert len(os.listdir("/proc/self/fd")) == before
    assert np.array_equal(moments.gather(order).numpy(), stored.rows[order])
    del moments
    assert len(os.listdir("/proc/self/fd")) == before


def test_threads_share_a_set_with_few_open_files(tmp_path, monkeypatch):
    monkeypatch.setattr(latents, "OPEN_FILES", 1)
    stored = pack(tmp_path, shards=(3,) * 6)
    moments = open_row_set(tmp_path)
    # What another thread does between opening and reading: without a lock, close the file under it.
    read, wrong = os.preadv, []
    monkeypatch.setattr(os, "preadv", lambda *words: (threading.Event().wait(0.0005), read(*words))[1])

    def work(seed):
        try:
            for _ in range(8):
                order = np.random.default_rng(seed).integers(0, 18, 6)
                if not np.array_equal(moments.gather(order).numpy(), stored.rows[order]):
                    wrong.append("other rows")
        except Refused as error:
            wrong.append(str(error))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_opening_reads_no_rows(packed, monkeypatch):
    monkeypatch.setattr(os, "preadv", lambda *_: pytest.fail("a row was read"))
    open_row_set(packed.root)


@pytest.mark.parametrize("name", ["moments-00001.npy", "moments_flip-00002.npy", "labels-00003.npy"])
@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "longer", "folder", "text", "unreadable header"])
def test_a_damaged_file_is_refused_by_name(packed, name, damage):
    path = packed.root / name
    whole = path.read_bytes()
    path.unlink()
    if damage == "folder":
        path.mkdir()
    elif damage != "missing":
        broken = bytearray(whole)
        broken[20:24] = b"((\n("
        made = {"empty": b"", "cut": whole[:-1], "longer": whole + b"\0", "text": b"not an array" * 20}
        path.write_bytes(made.get(damage, bytes(broken)))
    assert f"{path}: " in refusal(open_row_set, packed.root)


def test_any_flipped_bit_of_a_header_is_refused_or_harmless(tmp_path):
    """Harmless are those in the padding."""
    stored = pack(tmp_path, shards=(4,))
    path = tmp_path / "moments-00000.npy"
    whole, said, refused = path.read_bytes(), str(path), 0
    for place in range(128):
        for bit in (1, 8, 64):
            damaged = bytearray(whole)
            damaged[place] ^= bit
            path.write_bytes(damaged)
            try:
                moments = open_row_set(tmp_path)
            except Refused as error:
                said = str(error)
                refused += 1
            else:
                assert np.array_equal(moments.gather(np.arange(4)).numpy(), stored.rows)
            assert str(path) in said
    assert refused > 200


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("moments-00001.npy", np.zeros((30, *ROW), np.float32), "float32 (30, 8, 4, 4) given; must be float16"),
        ("moments-00001.npy", np.zeros((30, *ROW), ">f2"), "given; must be float16"),
        ("moments-00001.npy", np.zeros((29, *ROW), np.float16), "(29, 8, 4, 4) given; must be float16 (30, 8, 4, 4)"),
        ("moments-00001.npy", np.zeros((30, 4, 4, 4), np.float16), "(30, 4, 4, 4) given"),
        ("moments-00001.npy", np.zeros((30, *ROW), np.float16, order="F"), "C order"),
        ("labels-00001.npy", np.zeros(30, np.int32), "int32 (30,) given"),
        ("labels-00001.npy", np.zeros((30, 1), np.int64), "(30, 1) given"),
        ("labels-00001.npy", np.full(30, 4), "label 4 found; must be in [0, 4)"),
        ("labels-00001.npy", np.full(30, -1), "label -1 found"),
        ("labels-00001.npy", np.full(30, 2**62), f"label {2**62} found"),
    ],
)
def test_what_is_not_as_the_manifest_says_is_refused(packed, name, content, said):
    np.save(packed.root / name, content)
    message = refusal(open_row_set, packed.root)
    assert str(packed.root) in message
    assert said in message


def test_a_class_without_rows_is_named(packed):
    change(packed.root, lambda m: m["classes"].append("zebra"))
    assert "class 4 (zebra) has no images" in refusal(open_row_set, packed.root)


def test_a_shard_that_shrinks_or_vanishes_while_it_is_read(packed):
    moments = open_row_set(packed.root)
    rows = np.arange(80)
    path = packed.root / "moments-00003.npy"
    moments.gather(rows)
    os.truncate(path, path.stat().st_size - 1)
    assert np.array_equal(moments.gather(rows[:79]).numpy(), packed.rows[:79])
    assert f"{path}: cut short; row 41 is not whole" in refusal(moments.gather, rows)
    moments.close()
    path.unlink()
    assert f"{path}: cannot be read (No such file" in refusal(moments.gather, rows)
    assert np.array_equal(moments.gather(rows[:38]).numpy(), packed.rows[:38])


def test_a_packed_set_has_precedence(tmp_path):
    publish(tmp_path)
    pack(tmp_path)
    assert isinstance(open_row_set(tmp_path), PackedSet)


def test_rows_need_no_memory_of_the_set(tmp_path):
    """Opening and reading a few rows of a sparse set of 4 GiB."""
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


def test_checksums_are_not_read_by_training(packed):
    """That is what `sra-fast inspect` is for: see test_inspecting.py."""
    path = packed.root / "moments-00001.npy"
    damaged = bytearray(path.read_bytes())
    damaged[-5] ^= 1
    path.write_bytes(damaged)
    assert hashlib.sha256(damaged).hexdigest() not in (packed.root / "manifest.json").read_text()
    before = packed.rows[7:37].view(np.uint16)
    after = open_row_set(packed.root).gather(np.arange(7, 37)).numpy().view(np.uint16)
    assert (before != after).sum() == 1
