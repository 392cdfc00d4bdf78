"""latents.py: every row is the one that was stored, and a damaged file is named."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import shutil
import threading

import numpy as np
import pytest
import torch
from small_sets import ROW, SHARDS, change, pack, publish

from sra_fast.config import Refused
from sra_fast.data import latents
from sra_fast.data.latents import PackedSet, PublicSet, Rows, open_moments, split
from sra_fast.kernels.perturb import clean_ref
from sra_fast.kernels.philox import Draw, normals, uniforms

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


# Packed sets


@pytest.mark.parametrize("kind", KINDS)
def test_every_row_is_what_was_stored(tmp_path, kind):
    stored = pack(tmp_path, **KINDS[kind])
    moments = open_moments(tmp_path)
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
    moments = open_moments(tmp_path)
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
    moments = open_moments(tmp_path)
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
    moments = open_moments(tmp_path)
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
    open_moments(packed.root)


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
    assert f"{path}: " in refusal(open_moments, packed.root)


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
                moments = open_moments(tmp_path)
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
    message = refusal(open_moments, packed.root)
    assert str(packed.root) in message
    assert said in message


def test_a_class_without_rows_is_named(packed):
    change(packed.root, lambda m: m["classes"].append("zebra"))
    assert "class 4 (zebra) has no images" in refusal(open_moments, packed.root)


def test_a_shard_that_shrinks_or_vanishes_while_it_is_read(packed):
    moments = open_moments(packed.root)
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


# The public layout


@pytest.mark.parametrize("leading", [False, True])
@pytest.mark.parametrize("below", ["", "vae-sd"])
def test_the_public_layout_is_read_as_it_is(tmp_path, leading, below):
    stored = publish(tmp_path, leading=leading)
    moments = open_moments(tmp_path / below)
    assert isinstance(moments, PublicSet)
    order = np.random.default_rng(0).integers(0, 24, 60)
    assert np.array_equal(moments.gather(order).numpy(), stored.rows[order])
    assert np.array_equal(moments.labels, stored.labels)
    facts = (moments.classes, moments.shape, moments.channels, moments.scale, moments.flips)
    assert facts == (("0", "1", "2"), ROW, 4, 0.18215, False)
    assert moments.file(13) == tmp_path / "vae-sd/00001/img-mean-std-00000013.npy"


def test_the_public_fingerprint_is_of_names_and_labels(tmp_path):
    publish(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    first = open_moments(tmp_path / "a").fingerprint
    assert open_moments(tmp_path / "b/vae-sd").fingerprint == first
    path = tmp_path / "b/vae-sd/dataset.json"
    given = json.loads(path.read_text())
    given["labels"][0][1] = 1
    path.write_text(json.dumps(given))
    assert open_moments(tmp_path / "b").fingerprint != first


def test_a_packed_set_has_precedence(tmp_path):
    publish(tmp_path)
    pack(tmp_path)
    assert isinstance(open_moments(tmp_path), PackedSet)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "cannot be read"),
        ("[]", "cannot be read"),
        ('{"labels": null}', "cannot be read"),
        ('{"labels": [["a.npy"]]}', "cannot be read"),
        ('{"labels": []}', "at least one file"),
        ('{"labels": [["a.npy", -1]]}', "label -1"),
        ('{"labels": [["a.npy", 0.5]]}', "label of a.npy: 0.5 given"),
        ('{"labels": [["a.npy", [1, 0]]]}', "label of a.npy: [1, 0] given"),
        ('{"labels": [["a.npy", null]]}', "label of a.npy: None given"),
        ('{"labels": [["a.npy", 1000000000000000]]}', "label of a.npy: 1000000000000000 given"),
        ('{"labels": [["a.npy", 1], ["b.npy", 1]]}', "class 0 (0) has no images"),
        ('{"labels": [["../a.npy", 0]]}', "file: '../a.npy' given"),
        ('{"labels": [["/a.npy", 0]]}', "file: '/a.npy' given"),
        ('{"labels": [["a.npy", 0]]}', "a.npy: cannot be read (No such file"),
    ],
)
def test_a_dataset_json_that_cannot_serve_is_refused(tmp_path, content, said):
    (tmp_path / "dataset.json").write_text(content)
    message = refusal(open_moments, tmp_path)
    assert str(tmp_path) in message
    assert said in message


def bad_files():
    rng = np.random.default_rng(0)
    return {
        "another shape": rng.random((8, 5, 5)).astype(np.float32),
        "odd channels": rng.random((7, 4, 4)).astype(np.float32),
        "two of them": rng.random((2, *ROW)).astype(np.float32),
        "not square": rng.random((8, 4, 5)).astype(np.float32),
        "whole numbers": np.ones(ROW, np.int64),
        "complex": np.ones(ROW, np.complex64),
        "objects": np.array([None] * 3, dtype=object),
    }


@pytest.mark.parametrize("kind", [*bad_files(), "zip", "empty", "cut", "huge", "missing"])
@pytest.mark.parametrize("row", [0, 13])
def test_a_public_file_that_cannot_serve_is_named(tmp_path, kind, row):
    publish(tmp_path)
    path = tmp_path / f"vae-sd/{row // 10:05d}/img-mean-std-{row:08d}.npy"
    whole = path.read_bytes()
    path.unlink()
    if kind in bad_files():
        np.save(path, bad_files()[kind], allow_pickle=True)
    elif kind == "zip":
        with path.open("wb") as file:
            np.savez(file, a=np.zeros(3))
    elif kind != "missing":
        huge = whole.replace(b"(8, 4, 4), }" + b" " * 10, b"(8, 40000, 40000), }  ")
        path.write_bytes({"empty": b"", "cut": whole[:-1], "huge": huge}[kind])

    def use():
        open_moments(tmp_path).gather(np.arange(24))

    if kind == "another shape" and row == 0:  # then the first is right and the others are not
        path = path.with_name("img-mean-std-00000001.npy")
    assert f"{path}: " in refusal(use)


# Rows of a set


def test_held_out_rows_are_a_function_of_the_row(packed, tmp_path):
    train, held_out = split(open_moments(packed.root), 0.3)
    assert sorted([*train.index, *held_out.index]) == list(range(80))
    drawn = uniforms(0, torch.arange(80), Draw.HELD_OUT)[:, 0] < 0.3
    assert held_out.index.tolist() == drawn.nonzero()[:, 0].tolist()
    more = pack(tmp_path / "more", shards=(7, 30, 1, 42, 40))
    assert set(held_out.index) == {row for row in split(open_moments(more.root), 0.3)[1].index if row < 80}
    assert set(split(open_moments(packed.root), 0.1)[1].index) < set(held_out.index)
    assert np.array_equal(held_out.labels, packed.labels[held_out.index])
    assert (len(train), train.classes) == (80 - len(held_out), ("c0", "c1", "c2", "c3"))
    few = held_out.take(np.array([2, 0]))
    assert few.index.tolist() == held_out.index[[2, 0]].tolist()


def test_a_split_leaves_rows_on_both_sides(tmp_path):
    pack(tmp_path, shards=(2,), classes=1)
    assert "data.held-out: 1e-09 given" in refusal(split, open_moments(tmp_path), 1e-9)
    assert "data.held-out" in refusal(split, open_moments(tmp_path), 1 - 1e-9)


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
    x = open_moments(tmp_path).gather(np.array([size, 0, 12345]))
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
    after = open_moments(packed.root).gather(np.arange(7, 37)).numpy().view(np.uint16)
    assert (before != after).sum() == 1


def test_rows_of_a_set_are_loaded_in_their_order(packed):
    rows = Rows(open_moments(packed.root), np.array([40, 3, 79]))
    assert np.array_equal(rows.moments.gather(rows.index).numpy(), packed.rows[[40, 3, 79]])
    assert len(rows) == 3
    assert sum(SHARDS) == 80
