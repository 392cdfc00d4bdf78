"""The results of `sra-fast inspect`: as lines of text and as one JSON object."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sra_fast.data.manifest import Skipped
from sra_fast.errors import printable
from sra_fast.vae import Factor, per_channel

FEW = 16  # classes and channels that are listed one by one
TITLES = {
    "mean": "mean",
    "std": "std",
    "deviation_mean": "deviations: mean",
    "deviation_std": "std",
    "x_mean": "x: mean",
    "x_std": "std",
}


class Statistics(NamedTuple):
    """Statistics of some rows: {name: number} for each channel, with the names and order of `TITLES`."""

    rows: int
    channels: list[dict[str, float]]


class Sheet(NamedTuple):
    """A PNG of some images: its file, what it shows, and why it does not show more."""

    file: Path
    shows: str
    missing: str = ""


@dataclass
class Findings:
    """What is known about a set; None: unknown or not applicable.

    Attributes:
        kind: "packed set", "public layout" or "image folder".
        data: its folder.
        checksums: whether all files were read.
        images: number of images.
        classes, counts: names of the classes, and (classes,) int64 images of each.
        resolution, crop: of the images that were packed.
        shape, dtype, posterior, flips, scale, shift, vae: see `Manifest`.
        shards, bytes: number of shards; total size of the existing files.
        shorter_side: of a folder's images: smallest, median, largest, in pixels.
        skipped: see `Manifest`.
        wrong: {file: what is wrong with it}.
        warnings: what may be intended.
        advice: how to repair what is wrong, if that is known.
    """

    kind: str
    data: Path
    checksums: bool
    images: int
    classes: tuple[str, ...]
    counts: np.ndarray | None = None
    resolution: int | None = None
    crop: str | None = None
    shape: tuple[int, int, int] | None = None
    dtype: str | None = None
    posterior: bool | None = None
    flips: bool | None = None
    scale: Factor | None = None
    shift: Factor | None = None
    vae: str | None = None
    shards: int | None = None
    bytes: int | None = None
    shorter_side: tuple[float, float, float] | None = None
    skipped: tuple[Skipped, ...] = ()
    statistics: Statistics | None = None
    sheet: Sheet | None = None
    wrong: dict[Path, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    advice: str = ""

    @property
    def exit_code(self) -> int:
        return 1 if self.wrong else 0

    def as_json(self) -> dict[str, Any]:
        """All results as JSON values. Classes are a list, because a manifest may use a name twice."""
        counts = [None] * len(self.classes) if self.counts is None else self.counts.tolist()
        values = vars(self) | {
            "classes": [{"name": n, "images": count} for n, count in zip(self.classes, counts, strict=True)],
            "skipped": [asdict(file) for file in self.skipped],
            "statistics": self.statistics and self.statistics._asdict(),
            "sheet": self.sheet and self.sheet._asdict(),
            "wrong": [{"file": file, "reason": reason} for file, reason in sorted(self.wrong.items())],
            "exit_code": self.exit_code,
        }
        del values["counts"]
        return _to_json(values)

    def lines(self) -> Iterator[tuple[str, str]]:
        """(title, text) of each line, without warnings and what is wrong."""
        yield self.kind, str(self.data)
        yield "images", f"{self.images:,}{self._about_images()}"
        if self.shape:
            content = "pixels" if self.dtype == "uint8" else "means and deviations" if self.posterior else "latents"
            yield "rows", f"{self.shape} {self.dtype}: {content}{', with mirrored rows' if self.flips else ''}"
        if self.shards:
            yield "shards", f"{self.shards:,}, {self.bytes:,} bytes"
        if self.scale is not None and self.shift is not None:
            yield "VAE", self.vae or "not named"
            yield "scale, shift", f"{_shorten(self.scale)}, {_shorten(self.shift)}: x = (z - shift) * scale"
        if self.shorter_side:
            yield "shorter side", "{:.0f} smallest, {:.0f} median, {:.0f} largest".format(*self.shorter_side)
        if self.counts is not None:
            yield "classes", self._about_classes(self.counts)
        if self.skipped:
            yield "skipped", f"{len(self.skipped):,}"
            yield from (("", f"{file.file}: {file.reason}") for file in self.skipped[:10])
        if self.statistics:
            of_images = "" if self.shape else " images at 64 x 64, in [-1, 1]"
            yield "statistics", f"of {self.statistics.rows:,}{of_images or ' rows'}"
            yield from (("", row) for row in _table(self.statistics.channels))
        if self.sheet:
            yield "images in", f"{self.sheet.file} ({self.sheet.shows})"
            yield from [("", self.sheet.missing)] if self.sheet.missing else []

    def _about_images(self) -> str:
        if self.kind == "packed set":
            return f" of {self.resolution} x {self.resolution} pixels, crop {self.crop}"
        if self.kind == "public layout":
            return ", one file each"
        read = f"{min(FEW, self.images)} of them read" if self.bytes is None else f"{self.bytes:,} bytes"
        return f" JPEG and PNG files, {read}"

    def _about_classes(self, images_of: np.ndarray) -> str:
        counts = images_of.tolist()
        if len(counts) <= FEW:
            named = zip(self.classes, counts, strict=True)
            images = ", ".join(f"{label} {name} {count:,}" for label, (name, count) in enumerate(named))
            return f"{len(counts):,} (number, name, images): {images}"
        smallest, largest = int(images_of.argmin()), int(images_of.argmax())
        quantiles = "{:,.0f} / {:,.0f} / {:,.0f}".format(*np.percentile(counts, (10, 50, 90)))
        return (
            f"{len(counts):,}: smallest {self.classes[smallest]} with {counts[smallest]:,} images, "
            f"largest {self.classes[largest]} with {counts[largest]:,}; 10 / 50 / 90 % quantiles {quantiles}"
        )


def _to_json(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _to_json(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_to_json(item) for item in value]
    return printable(str(value)) if isinstance(value, str | Path) else value


class ChannelSums:
    """Running sums of each channel's values, for means and standard deviations.

    Args:
        posterior: whether rows have means and standard deviations of a posterior rather than values.
    """

    def __init__(self, posterior: bool) -> None:
        self.count, self._posterior, self._sums = 0, posterior, torch.zeros(())

    def add(self, row: Tensor) -> bool:
        """Add a row, (C, h, w) or (2C, h, w) float64. Returns False, and adds nothing, if it has numbers that are not
        finite or a negative standard deviation."""
        mean, deviation = row.chunk(2) if self._posterior else (row, torch.zeros_like(row))
        if not row.isfinite().all() or deviation.min() < 0:
            return False
        powers = (mean, mean**2, deviation, deviation**2)
        self._sums = self._sums + torch.stack([power.mean((1, 2)) for power in powers])
        self.count += 1
        return True

    def statistics(self, scale: Factor, shift: Factor) -> Statistics:
        """Statistics of the rows and of x = (z - shift) * scale, where z is a sample of the posterior."""
        mean, square, deviation, deviation_square = (self._sums / self.count).numpy()
        variance = (square - mean**2).clip(0)
        shifts, scales = (per_channel(factor, len(mean)) for factor in (shift, scale))
        columns = {"mean": mean, "std": np.sqrt(variance)}
        if self._posterior:
            columns["deviation_mean"] = deviation
            columns["deviation_std"] = np.sqrt((deviation_square - deviation**2).clip(0))
        columns["x_mean"] = (mean - shifts) * scales
        columns["x_std"] = np.sqrt(variance + deviation_square) * np.abs(scales)
        rows = zip(*(values.tolist() for values in columns.values()), strict=True)
        return Statistics(self.count, [dict(zip(columns, row, strict=True)) for row in rows])


def _table(channels: list[dict[str, float]]) -> Iterator[str]:
    """One line per channel, with columns as wide as their widest cell."""
    listed = channels[:FEW]
    columns = [["channel", *map(str, range(len(listed)))]]
    columns += [[TITLES[name], *(f"{channel[name]:.4g}" for channel in listed)] for name in channels[0]]
    widths = [max(map(len, column)) for column in columns]
    for cells in zip(*columns, strict=True):
        yield "  ".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))
    if len(channels) > FEW:
        stds = [channel["x_std"] for channel in channels]
        yield f"and {len(channels) - FEW} more; std of x from {min(stds):.4g} to {max(stds):.4g}"


def _shorten(factor: Factor) -> str:
    """A number as it is, or the first four of several."""
    if not isinstance(factor, tuple):
        return str(factor)
    return "[" + " ".join(f"{number:.4g}" for number in factor[:4]) + (" ...]" if len(factor) > 4 else "]")
