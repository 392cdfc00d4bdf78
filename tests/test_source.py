"""source.py: images or latents are opened and split, and the model takes their sizes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from small_data import CPU, pack, publish
from small_data import refusal as refusal_of
from small_run import small, write_images

from sra_fast.data.rows import split
from sra_fast.data.source import ImageSource, LatentSource, open_source
from sra_fast.errors import Refused


def config(tmp_path, **changes):
    return small(tmp_path, **{"data__images": "", "data__latents": str(tmp_path / "set"), **changes})


def refusal(config):
    return refusal_of(open_source, config, CPU)


@pytest.mark.parametrize(
    ("options", "size", "channels"),
    [
        ({}, 4, 4),
        ({"posterior": False}, 4, 8),
        ({"shape": (32, 8, 8), "posterior": False}, 8, 32),
        ({"dtype": "uint8", "shape": (3, 6, 6)}, 6, 3),
    ],
)
def test_the_model_fits_the_rows(tmp_path, options, size, channels):
    pack(tmp_path / "set", **options)
    source, filled = open_source(config(tmp_path), CPU)
    assert isinstance(source, LatentSource)
    assert (filled.model.input_size, filled.model.channels, filled.model.classes) == (size, channels, 4)
    assert source.holds_pixels == (options.get("dtype") == "uint8")
    assert len(source.train) + len(source.held_out) == 80
    assert source.fingerprint == source.row_set.fingerprint
    assert str(tmp_path / "set") in source.reader


def test_the_public_layout_is_a_source_too(tmp_path):
    publish(tmp_path / "set")
    source, filled = open_source(config(tmp_path), CPU)
    assert (filled.model.input_size, filled.model.channels, filled.model.classes) == (4, 4, 3)
    assert source.stored.scale.tolist() == [np.float32(0.18215)] * 4


@pytest.mark.parametrize(("name", "value", "fact"), [("input_size", 32, 4), ("channels", 3, 4), ("classes", 5, 4)])
def test_a_model_of_another_size_is_refused(tmp_path, name, value, fact):
    pack(tmp_path / "set")
    other = config(tmp_path)
    option = f"model.{name.replace('_', '-')}"
    message = f"{option}: {value} given; must be {fact}, as in the data, or 0"
    assert refusal(replace(other, model=replace(other.model, **{name: value}))) == message


def test_damage_is_reported_under_the_option(tmp_path):
    pack(tmp_path / "set")
    path = tmp_path / "set" / "labels-00001.npy"
    path.unlink()
    assert refusal(config(tmp_path)) == f"data.latents: {path}: cannot be read (No such file or directory)"
    images = config(tmp_path, data__images=str(tmp_path / "none"), data__latents="")
    assert refusal(images) == f"data.images: {tmp_path / 'none'}: must be a folder of class folders"


def test_images_or_latents_but_one(tmp_path):
    pack(tmp_path / "set")
    write_images(tmp_path / "data")
    both = refusal(config(tmp_path, data__images=str(tmp_path / "data")))
    assert both.startswith("data.latents: ")
    assert both.endswith(f"; excludes data.images, which is '{tmp_path / 'data'}'")
    assert refusal(config(tmp_path, data__latents="")).startswith("data.images: '' given; must be a folder of class")
    source, filled = open_source(config(tmp_path, data__images=str(tmp_path / "data"), data__latents=""), CPU)
    assert isinstance(source, ImageSource)
    assert (source.holds_pixels, source.stored, filled.model.input_size) == (True, None, 8)


def test_packed_pixels_are_the_images_they_were(tmp_path):
    stored = pack(tmp_path / "set", dtype="uint8", shape=(1, 8, 8))
    source, _ = open_source(config(tmp_path), CPU)
    x, labels = source.pixels(source.held_out)
    rows = stored.rows[split(source.row_set, 0.2)[1].index].astype(np.float32)
    assert np.abs(x.numpy() - (rows / 127.5 - 1)).max() < 1e-6
    assert labels.tolist() == source.held_out.labels.tolist()
    raw, _ = source.load(source.held_out)
    assert np.array_equal(raw.numpy(), rows)


def test_latents_have_no_pixels(tmp_path):
    pack(tmp_path / "set")
    source, _ = open_source(config(tmp_path), CPU)
    with pytest.raises(Refused, match=r"data\.latents: .+ must be images to be judged"):
        source.pixels(source.held_out)


def test_the_stream_is_that_of_the_run(tmp_path):
    stored = pack(tmp_path / "set")
    run = config(tmp_path, train__batch=6)
    source, _ = open_source(run, CPU)
    with source.stream(run, 12, {}) as stream:
        batch = next(stream)
    assert batch.number.tolist() == list(range(12, 18))
    for row, label in zip(batch.x.numpy(), batch.labels.tolist(), strict=True):
        (index,) = np.flatnonzero((stored.rows == row).all((1, 2, 3)))
        assert stored.labels[index] == label
        assert index in source.train.index


def test_ignored_files_are_reported(tmp_path, capsys):
    write_images(tmp_path / "data")
    (tmp_path / "data" / "loose.webp").touch()
    open_source(small(tmp_path), CPU)
    line = capsys.readouterr().err
    assert line.startswith(f"data.images: {tmp_path / 'data'}: ignored, because not JPEG or PNG files")
    assert line.endswith(": 1 .webp (loose.webp)\n")


def test_classes_that_are_held_out_as_a_whole_are_named(tmp_path, capsys):
    write_images(tmp_path / "data", count=30, classes=30)
    source, _ = open_source(small(tmp_path, data__held_out=0.3), CPU)
    untrained = sorted(set(range(30)) - set(source.train.labels.tolist()))
    line = capsys.readouterr().err.splitlines()[-1]
    assert f"all images of {len(untrained)} of 30 classes are held out" in line
    assert f"{untrained[0]} ({source.train.classes[untrained[0]]})" in line
