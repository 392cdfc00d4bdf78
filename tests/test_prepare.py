"""prepare.py, encoding.py: every image once, in the right pixels or moments, under its label; bad ones named; what the
command says and refuses."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from small_set import (
    BAD,
    CPU,
    SIDE,
    config,
    content,
    odd_files,
    pixels,
    refusal,
    resident_kib,
    rows,
    words,
    write_set,
)
from small_vae import save_kl, save_tiny
from test_archives import write_tar
from test_cli import documentation, help_of, sections

from sra_fast.config import PrepareCommand
from sra_fast.packing import encoding
from sra_fast.packing import prepare as prepare_module
from sra_fast.packing.archives import open_images
from sra_fast.packing.prepare import prepare
from sra_fast.vae import open_vae, per_channel

# What is in a set


def test_pixels_are_those_of_the_decoder_under_their_labels(images, tmp_path):
    manifest = prepare(config(images, tmp_path / "set"))
    made, labels = rows(tmp_path / "set")
    files = [path for path in sorted(images.rglob("*.*")) if path.name.lstrip("0123456789") not in BAD]
    assert np.array_equal(made, np.stack([pixels(path.read_bytes()) for path in files]))
    assert labels.tolist() == [int(path.parent.name[1:]) for path in files]
    assert (manifest.count, manifest.classes, manifest.vae) == (40, ("c0", "c1", "c2"), "")
    assert (manifest.shape, manifest.dtype, manifest.posterior) == ((3, SIDE, SIDE), "uint8", False)
    assert (manifest.scale, manifest.shift, manifest.resolution) == (1 / 127.5, 127.5, SIDE)
    x = (np.arange(256, dtype=np.float32) - np.float32(manifest.shift)) * np.float32(manifest.scale)
    np.testing.assert_allclose(x, np.arange(256) / 127.5 - 1, atol=1e-6)
    assert not manifest.flips


def test_what_is_left_out_is_named_and_moves_nothing(images, tmp_path):
    manifest = prepare(config(images, tmp_path / "set"))
    assert [(file.file, file.reason) for file in manifest.skipped] == [
        ("c1/0cut.jpg", "JPEG cut short"),
        ("c1/1empty.jpg", "empty file"),
        ("c1/2text.png", "neither JPEG nor PNG"),
        ("c1/3zeros.jpg", "neither JPEG nor PNG"),
    ]
    # A shard takes its 16 files whatever they are worth: 14 of c0 and 2 of c1; 4 bad ones, 12 others; the rest.
    files = open_images(str(images)).files
    bad = {file.file for file in manifest.skipped}
    expected = [len([file for file in files[first : first + 16] if file not in bad]) for first in (0, 16, 32)]
    assert [shard.rows for shard in manifest.shards] == expected
    assert sum(expected) == 40
    assert 16 in expected
    assert min(expected) < 16


@pytest.mark.parametrize("reader", ["pillow", "dali"])
def test_odd_files_have_the_right_pixels(tmp_path, reader):
    if reader == "dali":
        pytest.importorskip("nvidia.dali")
    odd = odd_files()
    for name, file in odd.items():
        (tmp_path / "images" / "c").mkdir(parents=True, exist_ok=True)
        (tmp_path / "images" / "c" / name).write_bytes(file)
    turned = sorted(odd).index("turned.jpg")
    for exif in (False, True):
        prepare(config(tmp_path / "images", tmp_path / f"{exif}", reader=reader, exif=exif))
        made, _ = rows(tmp_path / f"{exif}")
        expected = np.stack([pixels(odd[name], exif) for name in sorted(odd)])
        difference = np.abs(made.astype(float) - expected).mean(axis=(1, 2, 3))
        assert (difference <= (0 if reader == "pillow" else 1)).all(), difference
    assert not np.array_equal(pixels(odd["turned.jpg"]), pixels(odd["turned.jpg"], True))
    assert not np.array_equal(made[turned], rows(tmp_path / "False")[0][turned])


def test_moments_are_those_of_the_vae(images, kl, tmp_path):
    manifest = prepare(config(images, tmp_path / "set", vae=str(kl)))
    prepare(config(images, tmp_path / "pixels"))
    made, labels = rows(tmp_path / "set")
    seen, same = rows(tmp_path / "pixels")
    assert labels.tolist() == same.tolist()
    vae = open_vae(str(kl), CPU, torch.float32)
    x = torch.from_numpy(seen).float() / 127.5 - 1
    expected = vae.encode(x)
    torch.testing.assert_close(torch.from_numpy(made).float(), expected, rtol=2e-3, atol=1e-4)  # half an ulp: 5e-4
    alone = torch.cat([vae.encode(one) for one in x.split(1)]).half()
    assert np.array_equal(made, alone.numpy())
    assert (manifest.shape, manifest.dtype, manifest.posterior) == ((8, 4, 4), "float16", True)
    assert (manifest.scale, manifest.shift, manifest.vae, manifest.channels) == (0.18215, 0.0, str(kl), 4)
    # And back: what training reads decodes to what diffusers makes of it.
    back = vae.decode(torch.from_numpy(made[:, :4]).float())
    torch.testing.assert_close(back, vae.decode(expected[:, :4]), rtol=0.05, atol=0.02)


def test_a_vae_without_a_posterior_has_half_the_channels(images, tmp_path):
    tiny = save_tiny(tmp_path / "vae")
    manifest = prepare(config(images, tmp_path / "set", vae=str(tiny)))
    prepare(config(images, tmp_path / "pixels"))
    x = torch.from_numpy(rows(tmp_path / "pixels")[0]).float() / 127.5 - 1
    vae = open_vae(str(tiny), CPU, torch.float32)
    expected = torch.cat([vae.encode(one) for one in x.split(1)]).half()
    assert np.array_equal(rows(tmp_path / "set")[0], expected.numpy())
    assert (manifest.posterior, manifest.shape, manifest.channels, manifest.scale) == (False, (4, 4, 4), 4, 1.0)


def test_factors_of_each_channel_reach_the_manifest(images, tmp_path):
    vae = save_kl(tmp_path / "vae", latents_mean=[1.0, 2.0, 3.0, 4.0], latents_std=[1.0, 2.0, 4.0, 8.0])
    manifest = prepare(config(images, tmp_path / "set", vae=str(vae)))
    shift, scale = (per_channel(factor, manifest.channels) for factor in (manifest.shift, manifest.scale))
    assert shift.tolist() == [1, 2, 3, 4]
    np.testing.assert_allclose(scale, 0.18215 / np.array([1, 2, 4, 8]), rtol=1e-6)


@pytest.mark.parametrize("latents", [False, True])
def test_flips_are_of_the_mirrored_images(images, kl, tmp_path, latents):
    manifest = prepare(config(images, tmp_path / "set", flips=True, **({"vae": str(kl)} if latents else {})))
    assert manifest.flips
    made, flipped = rows(tmp_path / "set")[0], rows(tmp_path / "set", "flips")[0]
    seen = made
    if latents:
        prepare(config(images, tmp_path / "pixels"))
        seen = rows(tmp_path / "pixels")[0]
    mirrored = seen[..., ::-1].copy()
    if latents:
        vae = open_vae(str(kl), CPU, torch.float32)
        x = torch.from_numpy(mirrored).float() / 127.5 - 1
        mirrored = torch.cat([vae.encode(one) for one in x.split(1)]).half().numpy()
    assert np.array_equal(flipped, mirrored)
    assert not np.array_equal(flipped, made)
    assert not np.array_equal(flipped, made[..., ::-1]) or not latents  # mirrored moments would not do


def test_archives_give_the_same_rows_as_folders(images, kl, tmp_path):
    folder = open_images(str(images))
    members = {}
    for row, label in enumerate(folder.labels.tolist()):
        members |= {f"{row:04d}.jpg": folder.read(row), f"{row:04d}.cls": b"%d" % label}
    names = list(members)
    for part, name in enumerate(("a", "b")):
        write_tar(
            tmp_path / "tars" / f"{name}.tar", {n: members[n] for n in names[part * 30 : part * 30 + (30, 99)[part]]}
        )
    manifest = prepare(config(tmp_path / "tars", tmp_path / "one", vae=str(kl)))
    prepare(config(images, tmp_path / "two", vae=str(kl)))
    for one, two in zip(rows(tmp_path / "one"), rows(tmp_path / "two"), strict=True):
        assert np.array_equal(one, two)
    assert manifest.classes == ("0", "1", "2")
    assert [file.file for file in manifest.skipped] == [f"b.tar/{row:04d}.jpg" for row in (27, 28, 29, 30)]


def test_batches_never_cross_shards(images, kl, tmp_path, monkeypatch):
    seen, decode, files = [], encoding.ImageEncoder._decode, open_images(str(images)).files

    def noted(self, batch):
        seen.append(batch)
        return decode(self, batch)

    monkeypatch.setattr(encoding.ImageEncoder, "_decode", noted)
    prepare(config(images, tmp_path / "set", batch=6))
    assert [row for batch in seen for row in batch] == list(range(len(files)))
    for batch in seen:
        assert batch.start // 16 == (batch.stop - 1) // 16
        assert (batch.start % 16) % 6 == 0  # and begin where they would, had this shard been made alone
    assert max(map(len, seen)) == 6


def test_a_shard_of_nothing_but_bad_files_is_left_out(tmp_path):
    root = write_set(tmp_path / "images", count=4, classes=1)
    for index in range(5):
        (root / "c0" / f"002-{index}.jpg").write_bytes(b"")
    manifest = prepare(config(root, tmp_path / "set", rows_per_shard=2))
    assert len(manifest.skipped) == 5
    assert [shard.rows for shard in manifest.shards] == [2, 1, 1]
    assert sorted(content(tmp_path / "set")) == sorted(
        ["manifest.json", "prepare.json", *(name for shard in manifest.shards for name in shard.files())]
    )
    assert len(rows(tmp_path / "set")[0]) == 4


# The command


def test_the_command_says_what_it_does_and_what_came_of_it(images, kl, tmp_path, main):
    code, output, error = main(words(config(images, tmp_path / "set", vae=str(kl))))
    first, last = output.splitlines()
    assert code == 0
    assert first == f"44 images, 3 classes; decoded by pillow; AutoencoderKL {kl}: 4 channels, fp32 on cpu; 3 shards"
    assert last.startswith("40 images of (8, 4, 4) float16 in 3 shards, 4 skipped, ")
    size = sum(len(file) for name, file in content(tmp_path / "set").items() if name.endswith(".npy"))
    assert last.endswith(f" images/s here, {size:,} bytes: {tmp_path / 'set'}")
    assert error.count("undecodable") == 4


def test_help_documents_every_field(capsys, monkeypatch):
    text = help_of(["prepare"], capsys, monkeypatch)
    for option, owner, name in sections(PrepareCommand):
        assert option in text
        assert " ".join(documentation(owner)[name].split()).rstrip(".") in text, option


def test_ranks_of_a_launcher_begin_at_different_shards(images, tmp_path, monkeypatch):
    seen, parts = [], encoding.ImageEncoder.parts
    monkeypatch.setattr(encoding.ImageEncoder, "parts", lambda self, *ends: seen.append(ends) or parts(self, *ends))
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "3")
    prepare(config(images, tmp_path / "set"))
    assert seen == [(32, 44), (0, 16), (16, 32)]
    monkeypatch.setenv("RANK", "")
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.setenv("SLURM_PROCID", "1")
    monkeypatch.setenv("SLURM_NTASKS", "3")
    seen.clear()
    prepare(config(images, tmp_path / "slurm"))
    assert seen == [(16, 32), (32, 44), (0, 16)]
    monkeypatch.setenv("RANK", "first")
    assert "RANK: 'first' given; must be a number" in refusal(config(images, tmp_path / "other"))
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "0")
    assert "WORLD_SIZE: '0' given; must be a number, 1 or more" in refusal(config(images, tmp_path / "other"))


def test_other_ranks_than_the_first_say_little(images, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    prepare(config(images, tmp_path / "set"))
    said = capsys.readouterr()
    assert re.fullmatch(r"rank 1: 44 images, [\d,.]+ images/s here\n", said.out)
    assert "img/s" not in said.err
    assert said.err.count("undecodable") == 4  # but of bad files, whoever finds them


def test_a_log_file_is_told_the_rate_and_what_is_ignored(images, tmp_path, capsys):
    (images / "c0" / "animation.gif").touch()
    prepare(config(images, tmp_path / "set"))
    said = capsys.readouterr().err
    assert re.search(r"44/44 \[.*img/s\]", said)
    assert f"images: {images}: not read, being no JPEG or PNG in a class folder: 1 .gif\n" in said


def test_a_vae_is_found_from_any_folder_and_by_any_name(images, kl, tmp_path, monkeypatch):
    monkeypatch.chdir(kl.parent)
    assert prepare(config(images, tmp_path / "set", vae=kl.name)).vae == str(kl.resolve())
    prepare(config(images, tmp_path / "set", vae=f"./{kl.name}"))
    monkeypatch.chdir(tmp_path)
    prepare(config(images, tmp_path / "set", vae=str(kl)))


@pytest.mark.parametrize("reader", ["pillow", "dali"])
def test_memory_stays_flat_over_many_shards(tmp_path, monkeypatch, reader):
    """1,600 images in 100 shards; the first 40 settle what is kept."""
    if reader == "dali":
        pytest.importorskip("nvidia.dali")
    resident, write_shard = [], prepare_module.write_shard

    def watched(*arguments, **named):
        resident.append(resident_kib())
        return write_shard(*arguments, **named)

    monkeypatch.setattr(prepare_module, "write_shard", watched)
    vae = save_kl(tmp_path / "vae")
    prepare(config(write_set(tmp_path / "images", 1600), tmp_path / "set", reader=reader, vae=str(vae), batch=16))
    settled = resident[40:]
    assert len(resident) == 100
    assert np.mean(settled[-10:]) - np.mean(settled[:10]) < 1024  # KiB; the pixels of these alone are 2,250
