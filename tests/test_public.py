"""public.py: the public layout, as it is and converted."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from small_set import config, refusal, rows
from small_sets import ROW, publish
from small_vae import save_kl

from sra_fast.data.packed import open_row_set
from sra_fast.data.public import PublicSet
from sra_fast.errors import Refused
from sra_fast.packing.prepare import prepare

# As it is


@pytest.mark.parametrize("leading", [False, True])
@pytest.mark.parametrize("below", ["", "vae-sd"])
def test_the_public_layout_is_read_as_it_is(tmp_path, leading, below):
    stored = publish(tmp_path, leading=leading)
    moments = open_row_set(tmp_path / below)
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
    first = open_row_set(tmp_path / "a").fingerprint
    assert open_row_set(tmp_path / "b/vae-sd").fingerprint == first
    path = tmp_path / "b/vae-sd/dataset.json"
    given = json.loads(path.read_text())
    given["labels"][0][1] = 1
    path.write_text(json.dumps(given))
    assert open_row_set(tmp_path / "b").fingerprint != first


DATASETS = [
    ("{", 'must be {"labels": [[file, label], ...]}; cannot be read'),
    ("[]", "cannot be read"),
    ('{"labels": null}', "cannot be read"),
    ('{"labels": [["a.npy"]]}', "cannot be read"),
    ('{"labels": []}', "at least one file"),
    ('{"labels": [["a.npy", -1]]}', "label of a.npy: -1 given"),
    ('{"labels": [["a.npy", 0.5]]}', "label of a.npy: 0.5 given"),
    ('{"labels": [["a.npy", [1, 0]]]}', "label of a.npy: [1, 0] given"),
    ('{"labels": [["a.npy", null]]}', "label of a.npy: None given"),
    ('{"labels": [["a.npy", 1000000000000000]]}', "label of a.npy: 1000000000000000 given"),
    ('{"labels": [["a.npy", 1], ["b.npy", 1]]}', "class 0 (0) has no images"),
    ('{"labels": [["../a.npy", 0]]}', "file: '../a.npy' given"),
    ('{"labels": [["/a.npy", 0]]}', "file: '/a.npy' given"),
    ('{"labels": [["a.npy", 0], ["b.npy", 0], ["a.npy", 0]]}', "file: 'a.npy' given; must be named once"),
    ('{"labels": [["a.npy", null], ["a.npy", 0]]}', "label of a.npy: None given"),
    ('{"labels": [["a.npy", 0]]}', "a.npy: No such file"),
]

# Converted


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
    with pytest.raises(Refused, match="no image of class '0' can be decoded"):
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
    assert reasons["3"] == "shape (8, 8, 8), not (8, 4, 4) as the first file"
    assert reasons["4"] == reasons["9"] == "not finite, or beyond float16"
    assert reasons["5"] == "a standard deviation below 0"
    assert "no Python objects" in reasons["7"]
    with pytest.raises(Refused, match=r"00000000\.npy: undecodable \(No such file"):
        prepare(public(root, tmp_path / "strict", strict=True))


def rows_of(_, out):
    return rows(out)[0]


def write_all_broken(root):
    write_public(root, 3)
    (root / "vae-sd" / "00000" / "img-mean-std-00000000.npy").write_bytes(b"")
    return root


@pytest.mark.parametrize(("content", "said"), DATASETS)
def test_a_dataset_json_that_cannot_serve_is_refused(tmp_path, content, said):
    (tmp_path / "vae-sd").mkdir()
    (tmp_path / "vae-sd" / "dataset.json").write_text(content)
    with pytest.raises(Refused) as caught:
        open_row_set(tmp_path)
    message = str(caught.value)
    assert message.startswith("data.latents: ")
    assert str(tmp_path) in message
    assert said in message
    assert refusal(public(tmp_path, tmp_path / "set")) == message.replace("data.latents", "from-public", 1)
    assert not (tmp_path / "set").exists()


def test_a_folder_without_the_layout_is_refused(tmp_path):
    assert "must be a folder with vae-sd/dataset.json" in refusal(public(tmp_path, tmp_path / "set"))


def test_moments_of_another_vae_need_its_name(tmp_path):
    vae = save_kl(tmp_path / "vae", channels=2, scaling_factor=0.5, shift_factor=0.25)
    publish(tmp_path / "public", shape=(4, 4, 4))
    with pytest.raises(Refused, match=r"data\.latents: .*: channels: 2 given; must be 4, Stable Diffusion's: .*--vae"):
        open_row_set(tmp_path / "public")
    assert "have 2 channels and Stable Diffusion's VAE 4: --vae must name theirs" in refusal(
        public(tmp_path / "public", tmp_path / "set")
    )
    other = save_kl(tmp_path / "other", channels=3)
    line = refusal(public(tmp_path / "public", tmp_path / "set", vae=str(other)))
    assert line == f"vae: {str(other)!r} given; must be an AutoencoderKL of 2 channels"
    assert not (tmp_path / "set").exists()
    manifest = prepare(public(tmp_path / "public", tmp_path / "set", vae=str(vae)))
    assert (manifest.scale, manifest.shift, manifest.vae, manifest.resolution) == (0.5, 0.25, str(vae), 16)
    assert open_row_set(tmp_path / "set").scale == 0.5
    assert "vae" in refusal(public(tmp_path / "public", tmp_path / "set", vae=str(save_kl(vae, channels=2))))


def test_conversion_does_not_change_which_image_is_which(tmp_path):
    """Nor do the rows held out, or the order of training, which go by the row."""
    write_public(tmp_path / "public")
    prepare(public(tmp_path / "public", tmp_path / "set"))
    before, after = open_row_set(tmp_path / "public"), open_row_set(tmp_path / "set")
    every = np.arange(10)
    assert np.array_equal(before.gather(every).numpy().astype(np.float16), after.gather(every).numpy())
    assert np.array_equal(before.labels, after.labels)


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

    if kind == "another shape" and row == 0:  # then the first is right and the others are not
        path = path.with_name("img-mean-std-00000001.npy")
    with pytest.raises(Refused) as caught:
        open_row_set(tmp_path).gather(np.arange(24))
    assert f"data.latents: {path}: cannot be read (" in str(caught.value)
    assert "\n" not in str(caught.value)
