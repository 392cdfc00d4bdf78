"""prepare.py: what the command says, what it refuses, and how processes divide the work."""

from __future__ import annotations

import re

import pytest
import torch
from small_data import (
    config,
    content,
    kill,
    prepare_without_manifest,
    refusal,
    rows,
    save_kl,
    words,
    write_jpegs,
)

from sra_fast import progress
from sra_fast.packing import encoding
from sra_fast.packing.prepare import prepare


def test_it_reports_what_it_does_and_the_result(images, kl, tmp_path, main, monkeypatch):
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    code, output, error = main(words(config(images, tmp_path / "set", vae=str(kl))))
    first, last = output.splitlines()
    assert code == 0
    assert first == f"44 images, 3 classes; decoded by pillow; AutoencoderKL {kl}: 4 channels, fp32 on cpu; 3 shards"
    assert last.startswith("40 images of (8, 4, 4) float16 in 3 shards, 4 skipped, ")
    size = sum(len(file) for name, file in content(tmp_path / "set").items() if name.endswith(".npy"))
    assert last.endswith(f" images/s here, {size:,} bytes: {tmp_path / 'set'}")
    assert error.count("undecodable") == 4
    assert re.search(r"encoding: 100 %, 44/44 in .*img/s", error)


def test_a_complete_set_is_left_as_it_is(tmp_path, monkeypatch, capsys):
    root = write_jpegs(tmp_path / "images")
    (root / "c0" / "animation.gif").touch()
    prepare(config(root, tmp_path / "set"))
    before = content(tmp_path / "set")
    monkeypatch.setattr(encoding.ImageEncoder, "_decode", kill)
    capsys.readouterr()
    assert prepare(config(root, tmp_path / "set")).count == 40
    assert content(tmp_path / "set") == before
    output, error = capsys.readouterr()
    assert "already complete" in output
    assert error.startswith(
        f"images: {root}: ignored, because not JPEG or PNG files in a class folder: 1 .gif (c0/animation.gif)\n"
    )


def test_ranks_of_a_launcher_start_at_different_shards(images, tmp_path, monkeypatch, capsys):
    order, parts = [], encoding.ImageEncoder.parts
    monkeypatch.setattr(encoding.ImageEncoder, "parts", lambda self, shard: order.append(shard) or parts(self, shard))
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "3")
    prepare(config(images, tmp_path / "set"))
    assert order == [2, 0, 1]
    output, error = capsys.readouterr()
    assert re.fullmatch(r"rank 2: 44 images, [\d,.]+ images/s here\n", output)
    assert "img/s" not in error
    assert error.count("undecodable") == 4  # reported by the process that meets them
    monkeypatch.setenv("RANK", "")
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.setenv("SLURM_PROCID", "1")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "3")
    order.clear()
    prepare(config(images, tmp_path / "slurm"))
    assert order == [1, 2, 0]
    monkeypatch.setenv("RANK", "first")
    assert "RANK: 'first' given; must be a number" in refusal(prepare, config(images, tmp_path / "other"))
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "0")
    assert "WORLD_SIZE: '0' given; must be a number, 1 or more" in refusal(prepare, config(images, tmp_path / "other"))


def test_a_vae_is_known_by_its_absolute_path(images, kl, tmp_path, monkeypatch):
    monkeypatch.chdir(kl.parent)
    assert prepare(config(images, tmp_path / "set", vae=kl.name)).vae == str(kl.resolve())
    monkeypatch.chdir(tmp_path)
    prepare(config(images, tmp_path / "set", vae=str(kl)))


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"resolution": 32}, "resolution: 32 given; the set in .* was begun with 16"),
        ({"rows_per_shard": 8}, "rows-per-shard: 8 given; .* begun with 16"),
        ({"flips": True}, "flips: True given; .* begun with False"),
        ({"exif": True}, "exif: True given"),
        ({"vae": "KL"}, "no-vae: False given; .* begun with True"),
        (
            {"reader": "dali"},
            "reader: 'dali cpu' given; .* begun with 'pillow'; use the earlier value, or choose another",
        ),
        ({"images": "other"}, "images: not what the set in .* was begun with: 44 images then, 3 now; "),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_other_settings_than_the_sets_are_refused(images, kl, tmp_path, changes, line):
    if changes.get("reader") == "dali":
        pytest.importorskip("nvidia.dali")
    prepare(config(images, tmp_path / "set"))
    before = content(tmp_path / "set")
    changes = {name: str(kl) if value == "KL" else value for name, value in changes.items()}
    source = write_jpegs(tmp_path / "other", 3) if changes.pop("images", "") else images
    assert re.match(line, refusal(prepare, config(source, tmp_path / "set", **changes)))
    assert content(tmp_path / "set") == before


def test_other_weights_in_the_same_folder_are_refused(images, tmp_path):
    vae, out = save_kl(tmp_path / "vae"), tmp_path / "set"
    prepare(config(images, out, vae=str(vae)))
    save_kl(vae, seed=5)
    assert "vae: not the one that the set in " in refusal(prepare, config(images, out, vae=str(vae)))
    save_kl(vae)
    line = refusal(prepare, config(images, out, vae=str(vae), precision="bf16"))
    assert line.startswith("precision: 'bf16' given; ")


def test_strict_stops_at_the_first_bad_file(images, tmp_path):
    line = "images: c1/0cut.jpg: undecodable (JPEG cut short)"
    assert line in refusal(prepare, config(images, tmp_path / "set", strict=True))
    assert not (tmp_path / "set" / "manifest.json").exists()
    assert not list((tmp_path / "set").glob("*.tmp"))
    # Nor does it accept a shard, or a set, that was finished without the file.
    prepare_without_manifest(config(images, tmp_path / "set"))
    assert line in refusal(prepare, config(images, tmp_path / "set", strict=True))
    assert prepare(config(images, tmp_path / "set")).count == 40
    assert f"{line} and left out of the finished set" in refusal(prepare, config(images, tmp_path / "set", strict=True))


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ("", "out"),
        ("--out o", "images: '' given; must be given unless from-public is"),
        ("--out o --images i --from-public p", "images: 'i' given; must be given unless from-public is"),
        ("--out o --images i", "vae: '' given; must be given unless no-vae is"),
        ("--out o --images i --vae v --no-vae", "vae: 'v' given; must be given unless no-vae is"),
        ("--out o --from-public p --no-vae", "no-vae: True given; must not be given with from-public"),
        ("--out o --from-public p --flips", "flips: True given; must not be given with from-public"),
        ("--out o --from-public p", "from-public: p: must be a folder with vae-sd/dataset.json"),
        ("--out o --images i --no-vae", "images: 'i' given; there is no such folder, and no file"),
        ("--out o --images . --no-vae", "out: 'o' given; must not be inside the folder of images"),
        ("--out o --images i --no-vae --batch 0", "batch: 0 given; must be positive"),
        ("--out o --images i --no-vae --reader cv2", "reader: 'cv2' given; must be one of"),
    ],
)
def test_wrong_options_are_one_line_and_write_nothing(options, line, refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert line in refused(["prepare", *options.split()])
    assert content(tmp_path) == {}


def test_wrong_images_and_vaes_are_refused_before_anything_is_written(images, kl, tmp_path):
    def line(images=images, **changes):
        return refusal(prepare, config(images, tmp_path / "set", **changes))

    assert "resolution: 18 given; must be a multiple of the VAE's 4" in line(vae=str(kl), resolution=18)
    assert "there is no such folder" in line(vae=str(tmp_path / "vae"))
    (tmp_path / "empty" / "c0").mkdir(parents=True)
    assert line(tmp_path / "empty").startswith(f"images: {tmp_path / 'empty/c0'}: ")
    if not torch.cuda.is_available():
        assert "device: 'cuda' given" in line(device="cuda")
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize("name", ["notes.txt", "manifest.json"])
def test_a_folder_with_something_else_is_refused_and_left_alone(images, tmp_path, name):
    out = tmp_path / "set"
    out.mkdir()
    (out / name).write_text("mine")
    assert f"must be empty or a set begun by this command: has {name}" in refusal(prepare, config(images, out))
    assert content(out) == {name: b"mine"}
    assert "must be a folder" in refusal(prepare, config(images, out / name))
    line = refusal(prepare, config(images, out / name / "set"))
    assert line.startswith(f"out: '{out / name}/set' given; cannot be ")


def test_a_lost_class_is_refused_and_costs_only_the_shards_that_lack_it(tmp_path):
    root = write_jpegs(tmp_path / "images", 60)  # shards of 16 files in the order of names
    broken = sorted((root / "c2").iterdir())
    whole = [path.read_bytes() for path in broken]
    (root / "c0" / "000.jpg").write_bytes(b"")
    for path in broken:
        path.write_bytes(b"")
    line = "no image of class 'c2' can be decoded; first failure: c2/002.jpg (empty file); repair it and run the same"
    assert line in refusal(prepare, config(root, tmp_path / "set"))
    assert {path.name for path in (tmp_path / "set").glob("shard-*")} == {"shard-00000.json", "shard-00001.json"}
    for path, file in zip(broken, whole, strict=True):
        path.write_bytes(file)
    manifest = prepare(config(root, tmp_path / "set"))
    assert (manifest.count, len(manifest.skipped)) == (59, 1)
    assert sorted(set(rows(tmp_path / "set")[1].tolist())) == [0, 1, 2]
    for path in root.rglob("*.jpg"):
        path.write_bytes(b"")
    line = refusal(prepare, config(root, tmp_path / "none"))
    assert "none of 60 images can be read; first failure: c0/000.jpg (empty file)" in line
    assert not (tmp_path / "none" / "manifest.json").exists()


def test_images_that_could_not_be_read_are_read_again_once_they_can(tmp_path):
    root = write_jpegs(tmp_path / "images", count=6)
    whole = {path: path.read_bytes() for path in root.rglob("*.jpg")}
    for path in whole:
        path.write_bytes(b"x")
    assert "none of 6 images can be read" in refusal(prepare, config(root, tmp_path / "set"))
    for path, file in whole.items():
        path.write_bytes(file)
    assert prepare(config(root, tmp_path / "set")).count == 6


def test_strict_reads_again_what_was_left_out_before(tmp_path):
    root = write_jpegs(tmp_path / "images", count=40)
    whole = (root / "c0/000.jpg").read_bytes()
    (root / "c0/000.jpg").write_bytes(b"x")
    prepare_without_manifest(config(root, tmp_path / "set"))
    assert "strict allows none" in refusal(prepare, config(root, tmp_path / "set", strict=True))
    (root / "c0/000.jpg").write_bytes(whole)
    assert prepare(config(root, tmp_path / "set", strict=True)).count == 40
