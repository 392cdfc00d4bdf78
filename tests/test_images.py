"""Output files: pixels are rounded and laid out as readers expect, and no incomplete file is left behind."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sra_fast.errors import Refused
from sra_fast.sampling.images import save_each, save_grid, save_latents, save_npz, to_uint8


def test_every_level_survives_the_round_trip() -> None:
    """k / 127.5 - 1 gives level k again. Truncation loses levels, because the float32 quotient may be just below."""
    levels = torch.arange(256, dtype=torch.uint8)
    pixels = to_uint8((levels.float() / 127.5 - 1).view(1, 1, 16, 16))
    assert pixels.dtype == np.uint8
    assert pixels.flatten().tolist() == list(range(256))


def test_pixels_are_rounded_clamped_and_laid_out_by_channel_last() -> None:
    x = torch.tensor([-7.0, -1.0, 0.9 / 127.5 - 1, 1.4 / 127.5 - 1, 1.0, 7.0]).view(1, 3, 1, 2)
    pixels = to_uint8(x)
    assert pixels.shape == (1, 1, 2, 3)
    assert pixels[0, 0].tolist() == [[0, 1, 255], [0, 1, 255]]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_values_that_are_not_finite_are_refused(bad: float, tmp_path: Path) -> None:
    x = torch.zeros(3, 1, 2, 2)
    x[1, 0, 1, 1] = bad
    for write in (to_uint8, lambda x: save_latents(tmp_path / "latents.npz", [x], torch.zeros(3))):
        with pytest.raises(Refused, match="samples: '1 of 3 not finite' given"):
            write(x)
    assert list(tmp_path.iterdir()) == []


def random_pixels(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


@pytest.mark.parametrize("channels", [1, 3])
def test_grid_magnifies_small_images_and_parts_them_by_one_pixel(tmp_path: Path, channels: int) -> None:
    pixels = random_pixels(5, 8, 8, channels)
    save_grid(tmp_path / "new" / "grid.png", pixels, columns=3)
    with Image.open(tmp_path / "new" / "grid.png") as image:
        read = np.asarray(image).reshape(65, 98, channels)
    for i in range(5):
        top, left = 33 * (i // 3), 33 * (i % 3)
        tile = read[top : top + 32, left : left + 32]
        assert np.array_equal(tile, pixels[i].repeat(4, 0).repeat(4, 1))
    assert (read[32] == 96).all()
    assert (read[:, 32] == 96).all()
    assert (read[33:, 66:] == 96).all()  # the place of a sixth image
    save_grid(tmp_path / "large.png", random_pixels(2, 32, 40, channels), columns=8)
    with Image.open(tmp_path / "large.png") as image:
        assert image.size == (81, 32)  # not magnified


@pytest.mark.parametrize("channels", [1, 3])
def test_each_image_is_a_file_by_its_number(tmp_path: Path, channels: int) -> None:
    pixels = random_pixels(3, 4, 6, channels)
    save_each(tmp_path, pixels, first=41)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["000041.png", "000042.png", "000043.png"]
    for i, expected in enumerate(pixels, start=41):
        with Image.open(tmp_path / f"{i:06d}.png") as image:
            assert image.mode == {1: "L", 3: "RGB"}[channels]
            assert np.array_equal(np.asarray(image).reshape(expected.shape), expected)


@pytest.mark.parametrize("channels", [1, 3])
def test_npz_is_what_the_adm_suite_reads(tmp_path: Path, channels: int) -> None:
    pixels = random_pixels(3, 4, 6, channels)
    save_npz(tmp_path / "samples.npz", pixels)
    with np.load(tmp_path / "samples.npz") as read:
        assert read.files == ["arr_0"]
        array = read["arr_0"]
    assert array.dtype == np.uint8
    assert array.shape == (3, 4, 6, 3)
    assert array.flags.c_contiguous  # the suite reads rows from the stream
    for channel in range(3):
        assert np.array_equal(array[..., channel], pixels[..., channel % channels])


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = random_pixels(1, 4, 4, 3)
    save_npz(tmp_path / "samples.npz", pixels)

    def fail(file, *arrays) -> None:
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(np, "savez", fail)
    with pytest.raises(Refused, match=r"samples.npz: could not be written \(disk full\)"):
        save_npz(tmp_path / "samples.npz", 255 - pixels)
    assert [file.name for file in tmp_path.iterdir()] == ["samples.npz"]
    with np.load(tmp_path / "samples.npz") as read:
        assert np.array_equal(read["arr_0"], pixels)


@pytest.mark.parametrize("shape", [(0, 4, 4, 3), (1, 4, 4, 4), (4, 4, 3)])
def test_pixels_that_are_no_images_are_refused(tmp_path: Path, shape: tuple[int, ...]) -> None:
    for save in (save_npz, save_each, lambda path, pixels: save_grid(path, pixels, 2)):
        with pytest.raises(Refused, match="pixels: "):
            save(tmp_path / "x", np.zeros(shape, np.uint8))
