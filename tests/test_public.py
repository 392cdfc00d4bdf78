"""public.py: the public layout, read as it is and converted."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from small_data import ROW, config, publish, refusal, rows, save_kl

from sra_fast.data.packed import open_row_set
from sra_fast.data.public import PublicSet
from sra_fast.packing.prepare import prepare


def convert(root, out, **changes):
    return config("", out, from_public=str(root), rows_per_shard=4, **changes)


@pytest.mark.parametrize("below", ["", "vae-sd"])
def test_it_is_read_as_it_is(tmp_path, below):
    stored = publish(tmp_path, leading=range(0, 24, 2))
    row_set = open_row_set(tmp_path / below)
    assert isinstance(row_set, PublicSet)
    order = np.random.default_rng(0).integers(0, 24, 60)
    assert np.array_equal(row_set.gather(order).numpy(), stored.rows[order])
    assert np.array_equal(row_set.labels, stored.labels)
    facts = (row_set.classes, row_set.shape, row_set.channels, row_set.scale, row_set.flips)
    assert facts == (("0", "1", "2"), ROW, 4, 0.18215, False)
    assert row_set.file(13) == tmp_path / "vae-sd/00001/img-mean-std-00000013.npy"


def test_the_fingerprint_depends_on_names_and_labels(tmp_path):
    publish(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    first = open_row_set(tmp_path / "a").fingerprint
    assert open_row_set(tmp_path / "b/vae-sd").fingerprint == first
    path = tmp_path / "b/vae-sd/dataset.json"
    pairs = json.loads(path.read_text())
    pairs["labels"][0][1] = 1
    path.write_text(json.dumps(pairs))
    assert open_row_set(tmp_path / "b").fingerprint != first


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", 'must be {"labels": [[file, label], ...]}; cannot be read'),
        ("[]", "cannot be read"),
        ('{"labels": null}', "cannot be read"),
        ('{"labels": [["a.npy"]]}', "cannot be read"),
        ('{"labels": []}', "at least one file"),
        ('{"labels": [["a.npy", -1]]}', "label of a.npy: -1 given"),
        ('{"labels": [["a.npy", 0.5]]}', "label of a.npy: 0.5 given"),
        ('{"labels": [["a.npy", null]]}', "label of a.npy: None given"),
        ('{"labels": [["a.npy", 1000000000000000]]}', "label of a.npy: 1000000000000000 given"),
        ('{"labels": [["a.npy", 1], ["b.npy", 1]]}', "class 0 (0) has no images"),
        ('{"labels": [["../a.npy", 0]]}', "file: '../a.npy' given"),
        ('{"labels": [["/a.npy", 0]]}', "file: '/a.npy' given"),
        ('{"labels": [["a.npy", 0], ["b.npy", 0], ["a.npy", 0]]}', "file: 'a.npy' given; must be named once"),
        ('{"labels": [["a.npy", 0]]}', "a.npy: No such file"),
    ],
)
def test_an_invalid_dataset_json_is_refused(tmp_path, content, message):
    (tmp_path / "vae-sd").mkdir()
    (tmp_path / "vae-sd" / "dataset.json").write_text(content)
    line = refusal(open_row_set, tmp_path)
    assert line.startswith(str(tmp_path / "vae-sd"))
    assert message in line
    assert refusal(prepare, convert(tmp_path, tmp_path / "set")) == f"from-public: {line}"
    assert not (tmp_path / "set").exists()


def test_conversion_keeps_rows_labels_and_their_order(tmp_path):
    """So the rows held out and the order of training stay, too."""
    stored = publish(tmp_path / "public", 10, leading=[1, 3, 5])
    for below in ("", "vae-sd"):
        manifest = prepare(convert(tmp_path / "public" / below, tmp_path / f"set{below}"))
        converted, labels = rows(tmp_path / f"set{below}")
        assert np.array_equal(converted, stored.rows.astype(np.float16))
        assert labels.tolist() == [index % 3 for index in range(10)]
    assert [shard.rows for shard in manifest.shards] == [4, 4, 2]
    facts = (manifest.scale, manifest.shift, manifest.posterior, manifest.resolution, manifest.classes)
    assert facts == (0.18215, 0.0, True, 32, ("0", "1", "2"))
    assert np.array_equal(open_row_set(tmp_path / "public").labels, labels)


def test_conversion_names_damaged_files_and_leaves_them_out(tmp_path):
    stored = publish(tmp_path / "public", 10)
    path = [stored.root / f"vae-sd/00000/img-mean-std-{index:08d}.npy" for index in range(10)]
    path[0].unlink()
    path[2].write_bytes(path[2].read_bytes()[:-8])
    np.save(path[3], np.zeros((8, 8, 8), np.float32))
    np.save(path[4], np.full(ROW, np.nan, np.float32))
    np.save(path[5], np.full(ROW, -1, np.float32))
    np.save(path[7], np.array([{}], dtype=object), allow_pickle=True)
    np.save(path[9], np.full(ROW, 1e5, np.float32))
    manifest = prepare(convert(stored.root, tmp_path / "set"))
    converted, labels = rows(tmp_path / "set")
    assert labels.tolist() == [1, 0, 2]
    assert np.array_equal(converted, stored.rows[[1, 6, 8]].astype(np.float16))
    reasons = {file.file[-5:-4]: file.reason for file in manifest.skipped}
    assert reasons.keys() == set("0234579")
    assert reasons["0"] == "No such file or directory"
    assert reasons["3"] == "shape (8, 8, 8), not (8, 4, 4) as the first file"
    assert reasons["4"] == reasons["9"] == "not finite, or beyond float16"
    assert reasons["5"] == "a standard deviation below 0"
    assert "no Python objects" in reasons["7"]
    line = refusal(prepare, convert(stored.root, tmp_path / "strict", strict=True))
    assert "00000000.npy: undecodable (No such file" in line
    path[1].write_bytes(b"")
    path[8].write_bytes(b"")  # the last of class 2
    assert "no image of class '1' can be decoded" in refusal(prepare, convert(stored.root, tmp_path / "none"))


def test_latents_of_another_vae_need_its_name(tmp_path):
    vae = save_kl(tmp_path / "vae", channels=2, scaling_factor=0.5, shift_factor=0.25)
    other = save_kl(tmp_path / "other", channels=3)
    root, out = publish(tmp_path / "public", shape=(4, 4, 4)).root, tmp_path / "set"
    assert "has latents of 2 channels; must be 4, Stable Diffusion's: " in refusal(open_row_set, root)
    assert "has 2 channels and Stable Diffusion's VAE 4: name its VAE" in refusal(prepare, convert(root, out))
    line = refusal(prepare, convert(root, out, vae=str(other)))
    assert line == f"vae: {str(other)!r} given; must be an AutoencoderKL of 2 channels"
    assert "must be a folder with vae-sd/dataset.json" in refusal(prepare, convert(tmp_path, out))
    assert not out.exists()
    manifest = prepare(convert(root, out, vae=str(vae)))
    assert (manifest.scale, manifest.shift, manifest.vae, manifest.resolution) == (0.5, 0.25, str(vae), 16)
    assert open_row_set(out).scale == 0.5
    assert "vae" in refusal(prepare, convert(root, out, vae=str(save_kl(vae, channels=2))))


BAD_ARRAYS = {
    "another shape": np.ones((8, 5, 5), np.float32),
    "odd channels": np.ones((7, 4, 4), np.float32),
    "two of them": np.ones((2, *ROW), np.float32),
    "not square": np.ones((8, 4, 5), np.float32),
    "integers": np.ones(ROW, np.int64),
    "complex": np.ones(ROW, np.complex64),
    "objects": np.array([None] * 3, dtype=object),
}


@pytest.mark.parametrize("kind", [*BAD_ARRAYS, "empty", "cut", "huge", "missing"])
def test_a_damaged_file_is_named(tmp_path, kind):
    publish(tmp_path)
    path = tmp_path / "vae-sd/00001/img-mean-std-00000013.npy"
    whole = path.read_bytes()
    path.unlink()
    if kind in BAD_ARRAYS:
        np.save(path, BAD_ARRAYS[kind], allow_pickle=True)
    elif kind != "missing":
        huge = whole.replace(b"(8, 4, 4), }" + b" " * 10, b"(8, 40000, 40000), }  ")
        path.write_bytes({"empty": b"", "cut": whole[:-1], "huge": huge}[kind])
    assert refusal(open_row_set(tmp_path).gather, np.arange(24)).startswith(f"{path}: ")


def test_the_shape_is_that_of_the_first_file_that_can_be_read(tmp_path):
    stored = publish(tmp_path)
    first, second = (tmp_path / f"vae-sd/00000/img-mean-std-{index:08d}.npy" for index in (0, 1))
    first.write_bytes(b"")
    assert open_row_set(tmp_path).shape == stored.rows.shape[1:]
    np.save(first, BAD_ARRAYS["another shape"])
    assert refusal(open_row_set(tmp_path).gather, np.arange(24)).startswith(f"{second}: shape (8, 4, 4), not")
