"""Output files of sampling: a PNG grid, single PNGs, an npz for the ADM evaluation suite, or an npz of latents.

Every file is written under a temporary name and renamed, so that it is never seen incomplete.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sra_fast.errors import Refused
from sra_fast.files import replacing

GAP = 96  # grey level, distinct from black and white
SMALLEST_TILE = 32  # pixels; a grid magnifies smaller images


def to_uint8(x: Tensor) -> np.ndarray:
    """Convert images (N, C, H, W) in [-1, 1], any floating dtype and device, to (N, H, W, C) uint8 on the host.

    Rounds 127.5 (x + 1) to the nearest level, the inverse of pixels / 127.5 - 1. The public SRA code truncates, which
    darkens images by half a level on average.

    Raises:
        Refused: if a value is not finite.
    """
    _check_finite(x)
    levels = ((x.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return levels.permute(0, 2, 3, 1).contiguous().cpu().numpy()


def grid_columns(count: int, classes: int) -> int:
    """Columns of a grid of samples with labels 0, 1, 2, ...: one per class for 4 to 16 classes, else about a square."""
    return classes if 4 <= classes <= 16 else max(1, math.isqrt(count))


def save_grid(path: str | Path, pixels: np.ndarray, columns: int) -> None:
    """Write one PNG of all images, row by row, with grey gaps of one pixel.

    Args:
        pixels: (N, H, W, C) uint8, C = 1 or 3. Magnified by the smallest integer that makes both sides at least 32
            pixels.
        columns: images per row.
    """
    _check(pixels)
    if columns <= 0:
        raise Refused("columns", columns, "must be positive")
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
    """Write one PNG per image of (N, H, W, C) uint8: `folder`/000000.png and so on, numbered from `first`."""
    _check(pixels)
    for i, image in enumerate(pixels, start=first):
        _save_png(Path(folder) / f"{i:06d}.png", image)


def save_npz(path: str | Path, pixels: np.ndarray) -> None:
    """Write the array `arr_0`, (N, H, W, 3) uint8, as the ADM evaluation suite reads it. Grey is repeated to RGB."""
    _check(pixels)
    with replacing(Path(path)) as partial, partial.open("wb") as file:
        np.savez(file, np.broadcast_to(pixels, (*pixels.shape[:3], 3)))


def save_images(
    out: Path, batches: Iterable[Tensor], *, images: bool = True, grid: int = 0, columns: int = 1, npz: bool = True
) -> None:
    """Write images to a folder: images/ batch by batch, so that an interrupted run keeps them, then grid.png and
    samples.npz.

    Args:
        out: the folder.
        batches: (B, C, H, W) in [-1, 1] each.
        images, npz: whether to write images/ and samples.npz.
        grid: number of images in the grid; 0 = no grid.
        columns: images per row of the grid.
    """
    kept, count = [], 0
    for batch in batches:
        pixels = to_uint8(batch)
        if images:
            save_each(out / "images", pixels, first=count)
        if npz or count < grid:
            kept.append(pixels)
        count += len(batch)
    if grid:
        save_grid(out / "grid.png", np.concatenate(kept)[:grid], columns)
    if npz:
        save_npz(out / "samples.npz", np.concatenate(kept))


def save_latents(path: Path, batches: Iterable[Tensor], labels: Tensor) -> None:
    """Write an npz of `z` (N, C, h, w) float32 and `labels` (N,) int64 from finite batches (B, C, h, w) of z."""
    arrays = []
    for z in batches:
        _check_finite(z)
        arrays.append(z.cpu().numpy())
    with replacing(path) as partial, partial.open("wb") as file:
        np.savez(file, z=np.concatenate(arrays), labels=labels.cpu().numpy())


def _check_finite(x: Tensor) -> None:
    bad = int((~torch.isfinite(x)).flatten(1).any(1).sum())
    if bad:
        raise Refused("samples", f"{bad} of {len(x)} not finite", "every value must be finite")


def _check(pixels: np.ndarray) -> None:
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.size == 0 or pixels.shape[-1] not in (1, 3):
        raise Refused("pixels", f"{pixels.dtype} {pixels.shape}", "must be uint8 (N, H, W, 1 or 3), not empty")


def _save_png(path: Path, image: np.ndarray) -> None:
    with replacing(path) as partial:
        Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image).save(partial, format="PNG")
