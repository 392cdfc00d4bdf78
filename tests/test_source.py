"""source.py: images or latents, split, and what the model must fit."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from small_run import small, write_images
from small_sets import pack, publish

from sra_fast.data.rows import split
from sra_fast.data.source import ImageSource, LatentSource, open_source
from sra_fast.errors import Refused

CPU = torch.device("cpu")


def config(tmp_path, **changes):
    return small(tmp_path, **{"data__images": "", "data__latents": str(tmp_path / "set"), **changes})


def refusal(given):
    with pytest.raises(Refused) as caught:
        open_source(given, CPU)
    return str(caught.value)


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
    source, found = open_source(config(tmp_path), CPU)
    assert isinstance(source, LatentSource)
    assert (found.model.input_size, found.model.channels, found.model.classes) == (size, channels, 4)
    assert source.holds_pixels == (options.get("dtype") == "uint8")
    assert len(source.train) + len(source.held_out) == 80
    assert source.fingerprint == source.row_set.fingerprint
    assert str(tmp_path / "set") in source.reader


def test_the_public_layout_is_a_source_too(tmp_path):
    publish(tmp_path / "set")
    source, found = open_source(config(tmp_path), CPU)
    assert (found.model.input_size, found.model.channels, found.model.classes) == (4, 4, 3)
    assert source.stored.scale.tolist() == [np.float32(0.18215)] * 4


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("input_size", 32, "model.input-size: 32 given; must be 4, as the data is, or 0"),
        ("channels", 3, "model.channels: 3 given; must be 4"),
        ("classes", 5, "model.classes: 5 given; must be 4"),
    ],
)
def test_a_model_of_another_size_is_refused(tmp_path, name, value, said):
    pack(tmp_path / "set")
    given = config(tmp_path)
    assert said in refusal(replace(given, model=replace(given.model, **{name: value})))


def test_images_or_latents_but_one(tmp_path):
    pack(tmp_path / "set")
    write_images(tmp_path / "data")
    both = refusal(config(tmp_path, data__images=str(tmp_path / "data")))
    assert both.startswith("data.latents: ")
    assert both.endswith(f"; but so is data.images = {tmp_path / 'data'}")
    assert refusal(config(tmp_path, data__latents="")).startswith("data.images: '' given; must be a folder of class")
    source, found = open_source(config(tmp_path, data__images=str(tmp_path / "data"), data__latents=""), CPU)
    assert isinstance(source, ImageSource)
    assert (source.holds_pixels, source.stored, found.model.input_size) == (True, None, 8)


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
    given = config(tmp_path, train__batch=6)
    source, _ = open_source(given, CPU)
    with source.stream(given, 12, {}) as stream:
        batch = next(stream)
    assert batch.number.tolist() == list(range(12, 18))
    for row, label in zip(batch.x.numpy(), batch.labels.tolist(), strict=True):
        (found,) = np.flatnonzero((stored.rows == row).all((1, 2, 3)))
        assert stored.labels[found] == label
        assert found in source.train.index


def test_what_is_no_image_of_a_class_is_said(tmp_path, capsys):
    write_images(tmp_path / "data")
    (tmp_path / "data" / "loose.webp").touch()
    open_source(small(tmp_path), CPU)
    line = f"data.images: {tmp_path / 'data'}: not read, being no JPEG or PNG in a class folder: 1 .webp\n"
    assert capsys.readouterr().err.endswith(line)
