"""manifest.py: what is read is what was written, and what cannot be is refused with its file and field."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict

import numpy as np
import pytest
from small_sets import change, pack

from sra_fast.data.manifest import Manifest, Shard, Skipped, read_manifest
from sra_fast.errors import Refused
from sra_fast.vae import per_channel

SHARD = Shard("m.npy", 5, "a", "l.npy", "b", "f.npy", "c")
MADE = Manifest(
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


def refusal(root):
    with pytest.raises(Refused) as caught:
        read_manifest(root)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_is_read_is_what_was_written(tmp_path):
    (tmp_path / "manifest.json").write_text(json.dumps(asdict(MADE)))
    read = read_manifest(tmp_path)
    assert read == MADE
    assert (read.channels, read.flips) == (3, True)
    shift, scale = (per_channel(factor, read.channels) for factor in (read.shift, read.scale))
    assert (shift.tolist(), scale.tolist()) == ([0.25] * 3, [0.5, 2.0, 1.0])
    assert shift.dtype == scale.dtype == np.float64
    assert SHARD.files() == {"m.npy": "a", "l.npy": "b", "f.npy": "c"}


def test_the_fingerprint_is_of_the_rows_wherever_they_lie(tmp_path):
    pack(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    fingerprint = read_manifest(tmp_path / "a").fingerprint()
    change(tmp_path / "b", lambda m: m.update(vae="elsewhere", skipped=[{"file": "x", "reason": "y"}]))
    assert read_manifest(tmp_path / "b").fingerprint() == fingerprint


@pytest.mark.parametrize(
    "edit",
    [
        lambda m: m["shards"][1].update(sha256="0"),
        lambda m: m["shards"][1].update(labels_sha256="0"),
        lambda m: m["shards"].reverse(),
        lambda m: m.update(scale=0.5),
        lambda m: m.update(shift=[0.0, 0.0, 0.0, 1.0]),
        lambda m: m.update(classes=["c0", "c1", "c2", "c3", "c4"]),
        lambda m: m.update(posterior=False),
    ],
)
def test_another_set_has_another_fingerprint(tmp_path, edit):
    pack(tmp_path)
    fingerprint = read_manifest(tmp_path).fingerprint()
    change(tmp_path, edit)
    assert read_manifest(tmp_path).fingerprint() != fingerprint


def test_a_missing_manifest_says_whether_the_set_is_unfinished(tmp_path):
    pack(tmp_path / "set")
    (tmp_path / "set/manifest.json").unlink()
    assert "unfinished: run the same `sra-fast prepare` again" in refusal(tmp_path / "set")
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun/prepare.json").write_text("{}")
    assert "unfinished" in refusal(tmp_path / "begun")
    (tmp_path / "empty").mkdir()
    said = refusal(tmp_path / "empty")
    assert "has no manifest.json" in said
    assert "unfinished" not in said
    assert "must be a folder" in refusal(tmp_path / "nowhere")
    assert "must be a folder" in refusal(tmp_path / "set/labels-00000.npy")


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"null", b'"x"', b"\xff\xfe", b"{}", b"[" * 100_000])
def test_what_is_no_manifest_is_refused_by_name(tmp_path, content):
    (tmp_path / "manifest.json").write_bytes(content)
    assert refusal(tmp_path).startswith(str(tmp_path / "manifest.json"))


def shard(**changes):
    return lambda m: m["shards"][0].update(changes)


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda m: m.update(format_version=2), "format_version: 2 given"),
        (lambda m: m.update(format_version="1"), "format_version: '1' given"),
        (lambda m: m.pop("shape"), "'shape'"),
        (lambda m: m.update(colour="blue"), "colour"),
        (lambda m: m.update(count=81), "count: 81 given"),
        (lambda m: m.update(count=0, shards=[]), "count: 0 given"),
        (lambda m: m.update(dtype="float64"), "dtype: 'float64' given"),
        (lambda m: m.update(dtype=5), "dtype: 5 given"),
        (lambda m: m.update(shape=[8, 4]), "shape: (8, 4) given"),
        (lambda m: m.update(shape=[8, 4, 5]), "square"),
        (lambda m: m.update(shape=[7, 4, 4]), "means and deviations"),
        (lambda m: m.update(shape=[8, 0, 0]), "shape"),
        (lambda m: m.update(shape=[8, 4.0, 4.0]), "shape"),
        (lambda m: m.update(dtype="uint8", posterior=False), "must be pixels"),
        (lambda m: m.update(posterior="no"), "posterior: 'no' given"),
        (lambda m: m.update(scale=[0.1, 0.2]), "scale: (0.1, 0.2) given"),
        (lambda m: m.update(scale=[]), "scale: () given"),
        (lambda m: m.update(scale=float("nan")), "scale: nan given"),
        (lambda m: m.update(scale=1e300), "scale: 1e+300 given"),
        (lambda m: m.update(shift=float("-inf")), "shift: -inf given"),
        (lambda m: m.update(scale=0), "scale: 0.0 given; must not be 0"),
        (lambda m: m.update(scale=[1, 1, 0, 1]), "must not be 0"),
        (lambda m: m.update(shift=[0, 0, 0, float("inf")]), "shift: (0.0, 0.0, 0.0, inf) given"),
        (lambda m: m.update(shift=[0] * 8), "one for each of 4 channels"),
        (lambda m: m.update(shift=None), "float"),
        (lambda m: m.update(vae=None), "vae: None given"),
        (lambda m: m.update(resolution="256"), "resolution: '256' given"),
        (lambda m: m.update(classes="abcd"), "classes: 'abcd' given"),
        (lambda m: m.update(classes=[0, 1, 2, 3]), "str"),
        (shard(rows=-1), "shards: -1 given"),
        (shard(rows=7.0), "shards: 7.0 given"),
        (shard(file="../moments-00000.npy"), "shards: '../moments-00000.npy' given"),
        (shard(file="/etc/passwd"), "shards: '/etc/passwd' given"),
        (shard(labels="sub/labels.npy"), "shards: 'sub/labels.npy' given"),
        (shard(file=".."), "shards: '..' given"),
        (shard(file="."), "shards: '.' given"),
        (shard(labels=""), "shards: '' given"),
        (shard(file=3), "int"),
        (shard(file="moments-00001.npy"), "is named twice"),
        (shard(file="labels-00000.npy"), "is named twice"),
        (shard(flip="moments_flip-00000.npy"), "all or none"),
        (shard(more=1), "more"),
        (lambda m: m.update(skipped=[{"file": "x"}]), "reason"),
    ],
)
def test_what_cannot_be_is_refused_with_its_field(tmp_path, edit, said):
    pack(tmp_path)
    change(tmp_path, edit)
    message = refusal(tmp_path)
    assert message.startswith(f"{tmp_path / 'manifest.json'}: ")
    assert said in message
