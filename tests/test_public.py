"""public.py: the public layout, converted."""

from __future__ import annotations

import json

import numpy as np
import pytest
from small_set import (
    config,
    refusal,
    rows,
)

from sra_fast.config import Refused
from sra_fast.data.prepare import prepare

# The public layout


def write_public(root, count=10, side=4, lead=False):
    generator, labels = np.random.default_rng(0), []
    for index in reversed(range(count)):
        name = f"{index // 4:05d}/img-mean-std-{index:08d}.npy"
        moments = generator.normal(0, 8, (8, side, side)).astype(np.float32)
        moments[4:] = np.abs(moments[4:])
        path = root / "vae-sd" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, moments[None] if lead and index % 2 else moments)
        labels.append([name, index % 3])
    (root / "vae-sd" / "dataset.json").write_text(json.dumps({"labels": labels}))
    return root


def public(root, out, **changes):
    return config("", out, from_public=str(root), rows_per_shard=4, **changes)


@pytest.mark.parametrize("given", ["", "vae-sd"])
def test_the_public_layout_converts(tmp_path, given):
    root = write_public(tmp_path / "public", lead=True)
    manifest = prepare(public(root / given, tmp_path / "set"))
    made, labels = rows(tmp_path / "set")
    files = sorted(root.rglob("*.npy"))
    expected = np.stack([np.load(path).reshape(8, 4, 4) for path in files]).astype(np.float16)
    assert np.array_equal(made, expected)
    assert labels.tolist() == [index % 3 for index in range(10)]
    assert [shard.rows for shard in manifest.shards] == [4, 4, 2]
    facts = (manifest.scale, manifest.shift, manifest.posterior, manifest.resolution, manifest.classes)
    assert facts == (0.18215, 0.0, True, 32, ("0", "1", "2"))


def broken_public(root):
    """Seven of ten files broken, each in its own way."""
    path = [root / "vae-sd" / f"{index // 4:05d}/img-mean-std-{index:08d}.npy" for index in range(10)]
    path[0].unlink()
    path[1].write_bytes(b"")
    path[2].write_bytes(path[2].read_bytes()[:-8])
    np.save(path[3], np.zeros((8, 8, 8), np.float32))
    np.save(path[4], np.full((8, 4, 4), np.nan, np.float32))
    np.save(path[5], np.full((8, 4, 4), -1, np.float32))
    np.save(path[7], np.array([{}], dtype=object), allow_pickle=True)
    np.save(path[9], np.full((8, 4, 4), 1e5, np.float32))
    return root


def test_broken_public_files_are_named_and_left_out_without_moving_a_label(tmp_path):
    root = write_public(tmp_path / "public")
    whole = rows_of(prepare(public(root, tmp_path / "whole")), tmp_path / "whole")
    broken_public(root)
    (root / "vae-sd" / "00001" / "img-mean-std-00000005.npy").touch()
    with pytest.raises(Refused, match=r"no image of class '0' can be read|shape"):
        prepare(public(write_all_broken(tmp_path / "none"), tmp_path / "none-set"))
    # Rows 6 and 8 are whole, of classes 0 and 2; one of class 1 must be there too.
    moments = np.ones((8, 8, 8), np.float32)
    np.save(root / "vae-sd" / "00000" / "img-mean-std-00000001.npy", moments[:, :4, :4])
    manifest = prepare(public(root, tmp_path / "set"))
    made, labels = rows(tmp_path / "set")
    assert labels.tolist() == [1, 0, 2]
    assert np.array_equal(made[1:], whole[[6, 8]])
    reasons = {file.file[-5:-4]: file.reason for file in manifest.skipped}
    assert reasons.keys() == set("0234579")
    assert reasons["0"] == "No such file or directory"
    assert reasons["3"] == "shape (8, 8, 8), not (8, 4, 4)"
    assert reasons["4"] == reasons["9"] == "not finite, or beyond float16"
    assert reasons["5"] == "a standard deviation below 0"
    assert "pickle" in reasons["7"]
    with pytest.raises(Refused, match=r"00000000\.npy: undecodable \(No such file"):
        prepare(public(root, tmp_path / "strict", strict=True))


def rows_of(_, out):
    return rows(out)[0]


def write_all_broken(root):
    write_public(root, 3)
    (root / "vae-sd" / "00000" / "img-mean-std-00000000.npy").write_bytes(b"")
    return root


@pytest.mark.parametrize(
    ("labels", "line"),
    [
        ("{}", 'must be {"labels": [[file, label], ...]}'),
        ('{"labels": null}', 'must be {"labels"'),
        ('{"labels": []}', "must name at least one file"),
        ('{"labels": [["a.npy", 0], ["a.npy", 0]]}', "names a file twice"),
        ('{"labels": [["a.npy", -1]]}', "has a label below 0"),
        ('{"labels": [["a.npy", 1]]}', "class 0 of 2 has no file"),
        ('{"labels": [["a.npy", "x"]]}', 'must be {"labels"'),
        ('{"labels": [["a.npy", 0]]}', "none of 1 files can be read (the first: No such file"),
        ("{", "not a readable JSON file"),
    ],
)
def test_a_public_layout_that_is_none_is_refused(tmp_path, labels, line):
    (tmp_path / "vae-sd").mkdir()
    (tmp_path / "vae-sd" / "dataset.json").write_text(labels)
    assert line in refusal(public(tmp_path, tmp_path / "set"))
    assert not (tmp_path / "set").exists()
