"""Pixels from samples, and the files they go to: a grid or single PNGs to look at, an npz for the ADM evaluation suite;
or an npz of latents.

Every file is written under a temporary name beside its own and renamed, so that a reader never finds half of one.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sra_fast.config import refuse_unless
from sra_fast.files import replacing

GAP = 96  # between black and white, to be told from either
SMALLEST_TILE = 32  # pixels; smaller images are magnified in a grid


def to_uint8(x: Tensor) -> np.ndarray:
    """Images (N, C, H, W) in [-1, 1], any floating dtype and device, as (N, H, W, C) uint8 on the host.

    Rounds 127.5 (x + 1) to the nearest level, the inverse of pixels / 127.5 - 1. The public SRA code truncates instead,
    which darkens by half a level on average.

    Raises:
        Refused: when a value is not finite.
    """
    _check_finite(x)
    levels = ((x.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return levels.permute(0, 2, 3, 1).contiguous().cpu().numpy()


def grid_columns(count: int, classes: int) -> int:
    """Columns of a grid of samples with labels in turn: one per class where there are few, else about a square."""
    return classes if 4 <= classes <= 16 else max(1, math.isqrt(count))


def save_grid(path: str | Path, pixels: np.ndarray, columns: int) -> None:
    """One PNG of all images, row by row, with grey gaps of one pixel.

    Args:
        pixels: (N, H, W, C) uint8, C = 1 or 3. Magnified by the smallest whole number that makes both sides at least
            32 pixels.
        columns: images per row.
    """
    _check(pixels)
    refuse_unless(columns > 0, "columns", columns, "must be positive")
    factor = max(1, -(-SMALLEST_TILE // min(pixels.shape[1:3])))
    tiles = pixels.repeat(factor, axis=1).repeat(factor, axis=2)
    count, height, width, channels = tiles.shape
    columns = min(columns, count)
    rows = -(-count // columns)
    canvas = np.full((rows * (height + 1) - 1, columns * (width + 1) - 1, channels), GAP, np.uint8)
    for i, tile in enumerate(tiles):
        top, left = i // columns * (height + 1), i % columns * (width + 1)
        canvas[top : top + height, left : left + width] = tile
    _save_png(Path(path), canvas)


def save_each(folder: str | Path, pixels: np.ndarray, first: int = 0) -> None:
    """One PNG per image of (N, H, W, C) uint8: `folder`/000000.png and so on, counted from `first`."""
    _check(pixels)
    for i, image in enumerate(pixels, start=first):
        _save_png(Path(folder) / f"{i:06d}.png", image)


def save_npz(path: str | Path, pixels: np.ndarray) -> None:
    """The array `arr_0`, (N, H, W, 3) uint8, as the ADM evaluation suite reads it; one channel is repeated to three."""
    _check(pixels)
    with replacing(Path(path)) as partial, partial.open("wb") as file:
        np.savez(file, np.broadcast_to(pixels, (*pixels.shape[:3], 3)))


class ImageFiles:
    """All images that a command makes, in `out`: images/ as they come, grid.png and samples.npz at the end."""

    def __init__(self, out: Path, *, images: bool, grid: int, columns: int, npz: bool) -> None:
        """`images`, `npz`: whether to write images/ and samples.npz; `grid`: images in the grid, 0 = no grid."""
        self._out, self._images, self._grid, self._columns, self._npz = out, images, grid, columns, npz
        self._made: list[np.ndarray] = []

    def add(self, x: Tensor) -> None:
        """The next images, as `to_uint8` takes them."""
        pixels = to_uint8(x)
        if self._images:  # as they come: a long run that is stopped has not been for nothing
            save_each(self._out / "images", pixels, first=sum(map(len, self._made)))
        self._made.append(pixels)

    def finish(self) -> None:
        pixels = np.concatenate(self._made)
        if self._grid:
            save_grid(self._out / "grid.png", pixels[: self._grid], self._columns)
        if self._npz:
            save_npz(self._out / "samples.npz", pixels)


class LatentsFile:
    """All latents that a command makes, in one npz: `z` (N, C, h, w) float32 and `labels` (N,) int64."""

    def __init__(self, path: Path, labels: Tensor) -> None:
        """`labels` (N,) int64 are those of all latents to come."""
        self._path, self._labels = path, labels
        self._made: list[np.ndarray] = []

    def add(self, z: Tensor) -> None:
        """The next latents (B, C, h, w) float32. Raises Refused when a value is not finite."""
        _check_finite(z)
        self._made.append(z.cpu().numpy())

    def finish(self) -> None:
        with replacing(self._path) as partial, partial.open("wb") as file:
            np.savez(file, z=np.concatenate(self._made), labels=self._labels.cpu().numpy())


def _check_finite(x: Tensor) -> None:
    bad = int((~torch.isfinite(x)).flatten(1).any(1).sum())
    refuse_unless(bad == 0, "samples", f"{bad} of {len(x)} not finite", "every value must be finite")


def _check(pixels: np.ndarray) -> None:
    fits = pixels.dtype == np.uint8 and pixels.ndim == 4 and pixels.size > 0 and pixels.shape[-1] in (1, 3)
    refuse_unless(fits, "pixels", f"{pixels.dtype} {pixels.shape}", "must be uint8 (N, H, W, 1 or 3), not empty")


def _save_png(path: Path, image: np.ndarray) -> None:
    with replacing(path) as partial:
        Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image).save(partial, format="PNG")
