"""prepare.py: what it refuses, before or while it works."""

from __future__ import annotations

import pytest
import torch
from small_set import (
    Killed,
    config,
    content,
    jpeg,
    kill,
    refusal,
    write_set,
)
from small_vae import save_kl

from sra_fast.errors import Refused
from sra_fast.packing.archives import open_images
from sra_fast.packing.prepare import prepare
from sra_fast.vae import Vae

# What is refused


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"resolution": 32}, "resolution: 32 given; the set in .* was begun with 16"),
        ({"rows_per_shard": 8}, "rows-per-shard: 8 given; .* begun with 16"),
        ({"flips": True}, "flips: True given; .* begun with False"),
        ({"exif": True}, "exif: True given"),
        ({"vae": "KL"}, "no-vae: False given; .* begun with True"),
        ({"reader": "dali"}, "reader: 'dali cpu' given; .* begun with 'pillow'; go on with that, or take another"),
        ({"images": "other"}, "images: others given than the set in .* was begun with: 44 images then, 3 now; "),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_going_on_with_other_settings_is_refused_by_name(images, kl, tmp_path, changes, line):
    if changes.get("reader") == "dali":
        pytest.importorskip("nvidia.dali")
    prepare(config(images, tmp_path / "set"))
    before = content(tmp_path / "set")
    changes = {name: str(kl) if value == "KL" else value for name, value in changes.items()}
    source = write_set(tmp_path / "other", 3) if changes.pop("images", "") else images
    with pytest.raises(Refused, match=line):
        prepare(config(source, tmp_path / "set", **changes))
    assert content(tmp_path / "set") == before


def test_going_on_with_other_weights_in_the_same_folder_is_refused(images, tmp_path):
    vae = save_kl(tmp_path / "vae")
    prepare(config(images, tmp_path / "set", vae=str(vae)))
    save_kl(vae, seed=5)
    assert "vae: another one given than the set in " in refusal(config(images, tmp_path / "set", vae=str(vae)))
    save_kl(vae)
    assert "precision: 'bf16' given; " in refusal(config(images, tmp_path / "set", vae=str(vae), precision="bf16"))
    prepare(config(images, tmp_path / "set", vae=str(vae)))


def test_strict_stops_at_the_first_bad_file_and_names_it(images, tmp_path):
    line = "images: c1/0cut.jpg: undecodable (JPEG cut short)"
    assert line in refusal(config(images, tmp_path / "strict", strict=True))
    assert not (tmp_path / "strict" / "manifest.json").exists()
    assert not list((tmp_path / "strict").glob("*.tmp"))
    # A shard that was finished without it is not let through either; and without it the work goes on.
    prepare_part(images, tmp_path / "part")
    assert line in refusal(config(images, tmp_path / "part", strict=True))
    assert prepare(config(images, tmp_path / "strict")).count == 40


def prepare_part(images, out):
    """All shards, but no manifest."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sra_fast.packing.prepare.assemble", kill)
        with pytest.raises(Killed):
            prepare(config(images, out))


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ([], "out"),
        (["--out", "o"], "images: '' given; must be given unless from-public is"),
        (
            ["--out", "o", "--images", "i", "--from-public", "p"],
            "images: 'i' given; must be given unless from-public is",
        ),
        (["--out", "o", "--images", "i"], "vae: '' given; must be given unless no-vae is"),
        (["--out", "o", "--images", "i", "--vae", "v", "--no-vae"], "vae: 'v' given; must be given unless no-vae is"),
        (["--out", "o", "--from-public", "p", "--no-vae"], "no-vae: True given; must not be given with from-public"),
        (["--out", "o", "--from-public", "p", "--flips"], "flips: True given; cannot be made from-public"),
        (["--out", "o", "--from-public", "p"], "from-public: 'p' given; must be a folder with vae-sd/dataset.json"),
        (["--out", "o", "--images", "i", "--no-vae"], "images: 'i' given; there is no such folder, and no file"),
        (["--out", "o", "--images", ".", "--no-vae"], "out: 'o' given; must not lie among the images"),
        (["--out", "", "--images", "i", "--no-vae"], "out: '' given; must be a folder"),
        (["--out", "o", "--images", "i", "--no-vae", "--batch", "0"], "batch: 0 given; must be positive"),
        (["--out", "o", "--images", "i", "--no-vae", "--resolution", "-1"], "resolution: -1 given; must be positive"),
        (["--out", "o", "--images", "i", "--no-vae", "--rows-per-shard", "0"], "rows-per-shard: 0 given"),
        (["--out", "o", "--images", "i", "--no-vae", "--reader", "cv2"], "reader: 'cv2' given; must be one of"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_words_are_one_line_and_write_nothing(options, line, refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert line in refused(["prepare", *options])
    assert content(tmp_path) == {}


def test_wrong_images_and_vaes_are_refused_before_anything_is_written(images, kl, tmp_path):
    out = tmp_path / "set"
    assert "resolution: 18 given; must be a multiple of 4" in refusal(config(images, out, vae=str(kl), resolution=18))
    assert "there is no such folder" in refusal(config(images, out, vae=str(tmp_path / "vae")))
    (tmp_path / "empty" / "c0").mkdir(parents=True)
    assert refusal(config(tmp_path / "empty", out)).startswith("images: ")
    assert not out.exists()
    assert "must not lie among the images" in refusal(config(tmp_path / "empty", tmp_path / "empty" / "set"))
    if not torch.cuda.is_available():
        assert "device: 'cuda' given" in refusal(config(images, out, device="cuda"))
    assert not out.exists()


@pytest.mark.parametrize("name", ["notes.txt", "manifest.json", "moments-00000.npy"])
def test_a_folder_with_something_else_is_refused_and_left_alone(images, tmp_path, name):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / name).write_text("mine")
    assert f"must be empty or a set begun by this command: has {name}" in refusal(config(images, tmp_path / "set"))
    assert content(tmp_path / "set") == {name: b"mine"}
    (tmp_path / "file").touch()
    assert "must be a folder" in refusal(config(images, tmp_path / "file"))
    assert refusal(config(images, tmp_path / "file" / "set")).startswith(
        f"out: '{tmp_path}/file/set' given; cannot be "
    )


def test_nothing_decodable_and_a_class_without_images_are_refused(tmp_path):
    root = write_set(tmp_path / "images", 3)
    (root / "c2" / "002.jpg").write_bytes(b"")
    line = "no image of class 'c2' can be decoded, the first, c2/002.jpg, because: empty file; mend it and run the same"
    assert line in refusal(config(root, tmp_path / "one"))
    (root / "c2" / "002.jpg").write_bytes(jpeg(0))
    assert prepare(config(root, tmp_path / "one")).count == 3
    for path in root.rglob("*.jpg"):
        path.write_bytes(b"")
    line = refusal(config(root, tmp_path / "two"))
    assert "none of 3 images can be read, the first, c0/000.jpg, because: empty file" in line
    assert not (tmp_path / "two" / "manifest.json").exists()


def test_a_vae_that_gives_no_numbers_is_refused_with_the_image(images, kl, tmp_path, monkeypatch):
    encode, calls = Vae.encode, []

    def broken(self, x):
        calls.append(1)
        return encode(self, x) * (float("nan") if len(calls) == 3 else 1)

    monkeypatch.setattr(Vae, "encode", broken)
    files = open_images(str(images)).files
    assert refusal(config(images, tmp_path / "set", vae=str(kl))).endswith(f"float16 cannot hold for {files[2]}")
    assert not list((tmp_path / "set").glob("*.npy*"))
