"""encoding.py: every image once, as the right pixels or moments, under its label; bad ones are named and left out."""

from __future__ import annotations

import errno

import numpy as np
import pytest
import torch
from small_data import (
    BAD,
    CPU,
    SIDE,
    config,
    content,
    jpeg,
    picture,
    pixels,
    refusal,
    resident_kib,
    rows,
    save_kl,
    save_tiny,
    write_jpegs,
)
from test_archives import write_tar
from test_decoders import encoded, png16, turned

from sra_fast.data.manifest import Skipped
from sra_fast.packing import encoding
from sra_fast.packing import prepare as prepare_module
from sra_fast.packing.archives import open_images
from sra_fast.packing.prepare import prepare
from sra_fast.vae import Vae, open_vae


@pytest.fixture(scope="module")
def packed(images, tmp_path_factory):
    """(folder, manifest) of the images as pixels, with flips."""
    out = tmp_path_factory.mktemp("packed") / "set"
    return out, prepare(config(images, out, flips=True))


def encode(vae, images):
    """Moments of pixels (N, 3, SIDE, SIDE) uint8, each encoded alone."""
    x = torch.from_numpy(images).float() / 127.5 - 1
    return torch.cat([open_vae(str(vae), CPU, torch.float32).encode(image) for image in x.split(1)]).half().numpy()


def test_pixels_are_those_of_the_decoder_under_their_labels(images, packed):
    out, manifest = packed
    x, labels = rows(out)
    files = [path for path in sorted(images.rglob("*.*")) if path.name not in BAD]
    assert np.array_equal(x, np.stack([pixels(path.read_bytes()) for path in files]))
    assert labels.tolist() == [int(path.parent.name[1:]) for path in files]
    assert np.array_equal(rows(out, "flip")[0], x[..., ::-1])
    assert (manifest.count, manifest.classes, manifest.vae) == (40, ("c0", "c1", "c2"), "")
    assert (manifest.shape, manifest.dtype, manifest.posterior) == ((3, SIDE, SIDE), "uint8", False)
    assert (manifest.scale, manifest.shift, manifest.resolution) == (1 / 127.5, 127.5, SIDE)


def test_bad_files_are_named_and_do_not_move_other_shards(images, packed):
    manifest = packed[1]
    assert [(file.file, file.reason) for file in manifest.skipped] == [
        ("c1/0cut.jpg", "JPEG cut short"),
        ("c1/1empty.jpg", "empty file"),
        ("c1/2text.png", "neither JPEG nor PNG"),
        ("c1/3zeros.jpg", "neither JPEG nor PNG"),
    ]
    files, bad = open_images(str(images)).files, {file.file for file in manifest.skipped}
    expected = [len([file for file in files[first : first + 16] if file not in bad]) for first in (0, 16, 32)]
    assert [shard.rows for shard in manifest.shards] == expected
    assert max(expected) == 16 > min(expected)


@pytest.mark.parametrize("reader", ["pillow", "dali"])
def test_unusual_files_have_the_right_pixels(tmp_path, reader):
    if reader == "dali":
        pytest.importorskip("nvidia.dali")
    files = {
        "cmyk.jpg": jpeg(1, mode="CMYK"),
        "deep.png": png16(np.linspace(0, 65535, 24 * 20).reshape(20, 24).astype(np.uint16)),
        "grey.jpg": jpeg(2, mode="L"),
        "halved.jpg": jpeg(3, 90, 70),
        "progressive.jpeg": jpeg(4, progressive=True),
        "really a png.jpg": encoded(picture(5), "PNG"),
        "turned.jpg": turned(picture(7)),
    }
    (tmp_path / "images" / "c").mkdir(parents=True)
    for name, file in files.items():
        (tmp_path / "images" / "c" / name).write_bytes(file)
    for exif in (False, True):
        prepare(config(tmp_path / "images", tmp_path / f"{exif}", reader=reader, exif=exif))
        expected = np.stack([pixels(files[name], exif) for name in sorted(files)])
        difference = np.abs(rows(tmp_path / f"{exif}")[0].astype(float) - expected).mean(axis=(1, 2, 3))
        assert (difference <= (0 if reader == "pillow" else 1)).all(), difference
    assert not np.array_equal(pixels(files["turned.jpg"]), pixels(files["turned.jpg"], True))


def test_moments_are_those_of_the_vae(images, packed, kl, tmp_path):
    manifest = prepare(config(images, tmp_path / "set", vae=str(kl), flips=True))
    moments, labels = rows(tmp_path / "set")
    x, same = rows(packed[0])
    assert labels.tolist() == same.tolist()
    assert np.array_equal(moments, encode(kl, x))
    assert np.array_equal(rows(tmp_path / "set", "flip")[0], encode(kl, x[..., ::-1].copy()))
    assert (manifest.shape, manifest.dtype, manifest.posterior, manifest.flips) == ((8, 4, 4), "float16", True, True)
    assert (manifest.scale, manifest.shift, manifest.vae, manifest.channels) == (0.18215, 0.0, str(kl), 4)


def test_a_vae_without_a_posterior_has_half_the_channels(images, packed, tmp_path):
    tiny = save_tiny(tmp_path / "vae")
    manifest = prepare(config(images, tmp_path / "set", vae=str(tiny)))
    assert np.array_equal(rows(tmp_path / "set")[0], encode(tiny, rows(packed[0])[0]))
    assert (manifest.posterior, manifest.shape, manifest.channels, manifest.scale) == (False, (4, 4, 4), 4, 1.0)


def test_archives_give_the_same_rows_as_folders(images, packed, tmp_path):
    folder = open_images(str(images))
    members = [
        (f"{row:04d}{suffix}", content)
        for row, label in enumerate(folder.labels.tolist())
        for suffix, content in ((".jpg", folder.read(row)), (".cls", b"%d" % label))
    ]
    write_tar(tmp_path / "tars" / "a.tar", members[:30])
    write_tar(tmp_path / "tars" / "b.tar", members[30:])
    manifest = prepare(config(tmp_path / "tars", tmp_path / "set"))
    for ours, theirs in zip(rows(tmp_path / "set"), rows(packed[0]), strict=True):
        assert np.array_equal(ours, theirs)
    assert manifest.classes == ("0", "1", "2")
    bad = [row for row, file in enumerate(folder.files) if file.split("/")[1] in BAD]
    assert [file.file for file in manifest.skipped] == [f"b.tar/{row:04d}.jpg" for row in bad]


def test_batches_start_with_their_shard(images, tmp_path, monkeypatch):
    seen, decode, files = [], encoding.ImageEncoder._decode, open_images(str(images)).files
    monkeypatch.setattr(encoding.ImageEncoder, "_decode", lambda self, batch: seen.append(batch) or decode(self, batch))
    prepare(config(images, tmp_path / "set", batch=6))
    assert [row for batch in seen for row in batch] == list(range(len(files)))
    for batch in seen:
        assert batch.start // 16 == (batch.stop - 1) // 16
        assert (batch.start % 16) % 6 == 0
    assert max(map(len, seen)) == 6


def test_a_shard_of_nothing_but_bad_files_is_left_out(tmp_path):
    root = write_jpegs(tmp_path / "images", count=4, classes=1)
    for index in range(5):
        (root / "c0" / f"002-{index}.jpg").write_bytes(b"")
    manifest = prepare(config(root, tmp_path / "set", rows_per_shard=2))
    assert len(manifest.skipped) == 5
    assert [shard.rows for shard in manifest.shards] == [2, 1, 1]
    files = [name for shard in manifest.shards for name in shard.files()]
    assert sorted(content(tmp_path / "set")) == sorted(["manifest.json", "prepare.json", *files])
    assert len(rows(tmp_path / "set")[0]) == 4


def test_a_file_that_vanishes_is_left_out_and_a_disk_that_does_is_not(tmp_path, monkeypatch):
    root = write_jpegs(tmp_path / "images", 8, 1)
    source = type(open_images(str(root)))
    read = source.read

    def vanish(self, row):
        if row == 2:
            raise FileNotFoundError(errno.ENOENT, "gone")
        return read(self, row)

    monkeypatch.setattr(source, "read", vanish)
    assert prepare(config(root, tmp_path / "one")).skipped == (Skipped("c0/002.jpg", "gone"),)

    def stale(self, row):
        raise OSError(errno.ESTALE, "stale handle")

    monkeypatch.setattr(source, "read", stale)
    line = refusal(prepare, config(root, tmp_path / "two"))
    assert line == f"{root / 'c0/000.jpg'}: cannot be read (stale handle)"

    def unmount(self, row):
        if root.exists():
            root.rename(tmp_path / "elsewhere")
        raise FileNotFoundError(errno.ENOENT, "gone")

    monkeypatch.setattr(source, "read", unmount)
    assert "c0/000.jpg: cannot be read (gone)" in refusal(prepare, config(root, tmp_path / "three"))


def test_an_archive_that_vanishes_is_an_error_not_many_bad_images(tmp_path):
    path = write_tar(tmp_path / "a.tar", {"0.jpg": jpeg(0), "0.cls": b"0", "1.jpg": jpeg(1), "1.cls": b"0"})
    encoder = encoding.ImageEncoder(config(path, tmp_path / "set"), open_images(str(path)))
    path.unlink()
    assert "cannot be read" in refusal(list, encoder.parts(0))


def test_a_vae_that_returns_no_numbers_is_refused_with_the_image(images, kl, tmp_path, monkeypatch):
    encode, calls = Vae.encode, []

    def broken(self, x):
        calls.append(1)
        return encode(self, x) * (float("nan") if len(calls) == 4 else 1)  # the first is a trial

    monkeypatch.setattr(Vae, "encode", broken)
    line = refusal(prepare, config(images, tmp_path / "set", vae=str(kl)))
    assert line.endswith(f"float16 cannot hold for {open_images(str(images)).files[2]}")
    assert not list((tmp_path / "set").glob("*.npy*"))


@pytest.mark.parametrize("batch", [1, 64])
def test_on_a_cpu_the_batch_changes_no_bit(images, kl, tmp_path, batch):
    for name, size in (("one", 4), ("two", batch)):
        prepare(config(images, tmp_path / name, vae=str(kl), batch=size))
    assert content(tmp_path / "one") == content(tmp_path / "two")


def test_on_a_cpu_the_number_of_threads_changes_no_bit(kl, tmp_path):
    # At this size it would: two of a thousand numbers, if several threads encoded an image.
    root, before = write_jpegs(tmp_path / "images", 6), torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            prepare(config(root, tmp_path / f"{threads}", vae=str(kl), resolution=128))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert content(tmp_path / "1") == content(tmp_path / "3")


@pytest.mark.parametrize("reader", [pytest.param("pillow", marks=pytest.mark.slow), "dali"])
def test_memory_stays_flat_over_many_shards(tmp_path, monkeypatch, reader):
    """1,600 images in 100 shards; the first 40 fill what is kept."""
    if reader == "dali":
        pytest.importorskip("nvidia.dali")
    resident, write_shard = [], prepare_module.write_shard

    def watched(*arguments, **named):
        resident.append(resident_kib())
        return write_shard(*arguments, **named)

    monkeypatch.setattr(prepare_module, "write_shard", watched)
    vae = save_kl(tmp_path / "vae")
    prepare(config(write_jpegs(tmp_path / "images", 1600), tmp_path / "set", reader=reader, vae=str(vae), batch=16))
    assert len(resident) == 100
    assert np.mean(resident[-10:]) - np.mean(resident[40:50]) < 1024  # KiB; the pixels of these alone are 2,250
