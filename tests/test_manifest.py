"""manifest.py: a manifest is read back as written, and an invalid one is refused with its file and field."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict

import numpy as np
import pytest
from small_data import change, pack, refusal

from sra_fast.data.manifest import Manifest, Shard, Skipped, read_manifest
from sra_fast.vae import per_channel

SHARD = Shard("m.npy", 5, "a", "l.npy", "b", "f.npy", "c")
MANIFEST = Manifest(
    count=5,
    classes=("cat", "dog"),
    shape=(6, 4, 4),
    dtype="float16",
    posterior=True,
    scale=(0.5, 2.0, 1.0),
    shift=0.25,
    vae="owner/name",
    crop="adm",
    resolution=32,
    shards=(SHARD,),
    skipped=(Skipped("cat/1.jpg", "cut short"),),
)


def test_it_is_read_as_it_was_written(tmp_path):
    (tmp_path / "manifest.json").write_text(json.dumps(asdict(MANIFEST)))
    manifest = read_manifest(tmp_path)
    assert manifest == MANIFEST
    assert (manifest.channels, manifest.flips) == (3, True)
    shift, scale = (per_channel(factor, manifest.channels) for factor in (manifest.shift, manifest.scale))
    assert (shift.tolist(), scale.tolist()) == ([0.25] * 3, [0.5, 2.0, 1.0])
    assert shift.dtype == scale.dtype == np.float64
    assert SHARD.files() == {"m.npy": "a", "l.npy": "b", "f.npy": "c"}


@pytest.mark.parametrize(
    ("edit", "same"),
    [
        (lambda m: m.update(vae="elsewhere", skipped=[{"file": "x", "reason": "y"}]), True),
        (lambda m: m["shards"][1].update(sha256="0"), False),
        (lambda m: m["shards"][1].update(labels_sha256="0"), False),
        (lambda m: m["shards"].reverse(), False),
        (lambda m: m.update(scale=0.5), False),
        (lambda m: m.update(shift=[0.0, 0.0, 0.0, 1.0]), False),
        (lambda m: m.update(classes=["c0", "c1", "c2", "c3", "c4"]), False),
        (lambda m: m.update(posterior=False), False),
    ],
)
def test_the_fingerprint_depends_on_the_rows_and_not_on_the_place(tmp_path, edit, same):
    pack(tmp_path / "a")
    fingerprint = read_manifest(tmp_path / "a").fingerprint()
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    change(tmp_path / "b", edit)
    assert (read_manifest(tmp_path / "b").fingerprint() == fingerprint) == same


def test_a_missing_manifest_says_whether_the_set_is_unfinished(tmp_path):
    pack(tmp_path / "set")
    (tmp_path / "set/manifest.json").unlink()
    assert "unfinished: run the same `sra-fast prepare` again" in refusal(read_manifest, tmp_path / "set")
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun/prepare.json").write_text("{}")
    assert "unfinished" in refusal(read_manifest, tmp_path / "begun")
    (tmp_path / "empty").mkdir()
    assert refusal(read_manifest, tmp_path / "empty") == f"{tmp_path / 'empty'}: has no manifest.json"
    assert "must be a folder" in refusal(read_manifest, tmp_path / "nowhere")


@pytest.mark.parametrize("content", [b"", b"[1]", b"null", b'"x"', b"\xff\xfe", b"{}", b"[" * 100_000])
def test_a_file_that_is_no_manifest_is_refused_by_name(tmp_path, content):
    (tmp_path / "manifest.json").write_bytes(content)
    assert refusal(read_manifest, tmp_path).startswith(f"{tmp_path / 'manifest.json'}: ")


def shard(**changes):
    return lambda m: m["shards"][0].update(changes)


def fields(**changes):
    return lambda m: m.update(changes)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (fields(format_version=2), "format_version: 2 given"),
        (lambda m: m.pop("shape"), "'shape'"),
        (fields(colour="blue"), "colour"),
        (fields(count=81), "count: 81 given"),
        (fields(count=0, shards=[]), "count: 0 given"),
        (fields(dtype="float64"), "dtype: 'float64' given"),
        (fields(shape=[8, 4]), "shape: (8, 4) given"),
        (fields(shape=[8, 4, 5]), "square"),
        (fields(shape=[7, 4, 4]), "means and deviations"),
        (fields(shape=[8, 0, 0]), "shape"),
        (fields(dtype="uint8", posterior=False), "must be pixels"),
        (fields(posterior="no"), "posterior: 'no' given"),
        (fields(scale=[0.1, 0.2]), "scale: (0.1, 0.2) given"),
        (fields(scale=float("nan")), "scale: nan given"),
        (fields(scale=1e300), "scale: 1e+300 given"),
        (fields(shift=[0, 0, 0, float("-inf")]), "shift: (0.0, 0.0, 0.0, -inf) given"),
        (fields(scale=0), "scale: 0.0 given; must not be 0"),
        (fields(shift=[0] * 8), "one for each of 4 channels"),
        (fields(shift=None), "float"),
        (fields(vae=None), "vae: None given"),
        (fields(resolution="256"), "resolution: '256' given"),
        (fields(classes="abcd"), "classes: 'abcd' given"),
        (fields(classes=[0, 1, 2, 3]), "classes: 0 given"),
        (shard(rows=-1), "shards: -1 given"),
        (shard(file="../moments-00000.npy"), "shards: '../moments-00000.npy' given"),
        (shard(labels="sub/labels.npy"), "shards: 'sub/labels.npy' given"),
        (shard(file=".."), "shards: '..' given"),
        (shard(labels=""), "shards: '' given"),
        (shard(file="moments-00001.npy"), "is named twice"),
        (shard(flip="moments_flip-00000.npy"), "or none"),
        (shard(more=1), "more"),
        (fields(skipped=[{"file": "x"}]), "reason"),
    ],
)
def test_invalid_values_are_refused_with_their_field(tmp_path, edit, message):
    pack(tmp_path)
    change(tmp_path, edit)
    line = refusal(read_manifest, tmp_path)
    assert line.startswith(f"{tmp_path / 'manifest.json'}: ")
    assert message in line
