"""What `sra-fast inspect` has found of a data set, told twice: as lines for people, and as one object for programs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sra_fast.data.manifest import Skipped
from sra_fast.data.rows import Moments
from sra_fast.vae import Factor, per_channel

FEW = 16  # classes, channels and files listed one by one
BINS, ENDS = 8, 5  # of many classes: bars of their sizes; smallest and largest ones named
BAR = 40  # characters of the longest bar


@dataclass(frozen=True)
class Statistics:
    """Of the numbers of some rows.

    Attributes:
        rows: how many.
        channels: {name: number} of each channel, all in the order of `TITLES`.
    """

    rows: int
    channels: list[dict[str, float]]


@dataclass(frozen=True)
class Sheet:
    """The PNG of some images: its file, what it shows, and why that is not more."""

    file: Path
    shows: str
    missing: str = ""


@dataclass
class Findings:
    """What is known of a set; None is what is not, or what its kind does not have.

    Attributes:
        kind: "packed set", "public layout" or "image folder".
        data: its folder.
        checksums: whether all of it was read.
        images: how many.
        classes, counts: their names, and (classes,) int64 images of each.
        resolution, crop: of the images that were packed.
        shape, dtype, posterior, flips, scale, shift, vae: see `Manifest`.
        shards, bytes: how many; of the files that are there.
        shorter_side: of the images of a folder: smallest, median, largest, in pixels.
        skipped: see `Manifest`.
        statistics, sheet: see there.
        wrong: files and what is wrong with them.
        warnings: what may be meant as it is.
        advice: what to do about what is wrong, if that is known.
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

    def complaints(self) -> list[tuple[Path, str]]:
        """(file, what is wrong with it), sorted."""
        return sorted(self.wrong.items())

    def as_json(self) -> dict[str, Any]:
        """All of it, in values that JSON has. Classes are a list, as a manifest may give two of them one name."""
        counts = [None] * len(self.classes) if self.counts is None else self.counts.tolist()
        made = vars(self) | {
            "data": str(self.data),
            "classes": [{"name": n, "images": count} for n, count in zip(self.classes, counts, strict=True)],
            "skipped": [asdict(file) for file in self.skipped],
            "statistics": self.statistics and asdict(self.statistics),
            "sheet": self.sheet and asdict(self.sheet) | {"file": str(self.sheet.file)},
            "wrong": [{"file": str(file), "reason": reason} for file, reason in self.complaints()],
            "exit_code": self.exit_code,
        }
        return {name: _escaped(value) for name, value in made.items() if name != "counts"}

    def lines(self) -> Iterator[tuple[str, str]]:
        """(title, text), without the complaints."""
        yield self.kind, str(self.data)
        yield "images", f"{self.images:,}{self._of_images()}"
        if self.shape is not None:
            holds = "pixels" if self.dtype == "uint8" else "means and deviations" if self.posterior else "latents"
            yield "rows", f"{self.shape} {self.dtype}: {holds}{', and of mirrored images' if self.flips else ''}"
        if self.shards is not None:
            yield "shards", f"{self.shards:,}, {self.bytes:,} bytes"
        if self.shape is not None:
            yield "VAE", self.vae or "not named"
            yield "scale, shift", f"{_factor(self.scale)}, {_factor(self.shift)}: x = (z - shift) * scale"
        if self.shorter_side is not None:
            yield "shorter side", "{:.0f} smallest, {:.0f} median, {:.0f} largest".format(*self.shorter_side)
        if self.counts is not None:
            yield from class_lines(self.classes, self.counts)
        if self.skipped:
            yield "skipped", f"{len(self.skipped):,}"
            yield from (("", f"{file.file}: {file.reason}") for file in self.skipped[:10])
        if self.statistics:
            yield from (table if self.shape else _colours)(self.statistics)
        if self.sheet:
            yield "images in", f"{self.sheet.file} ({self.sheet.shows})"
            yield from [("", self.sheet.missing)] if self.sheet.missing else []

    def _of_images(self) -> str:
        if self.kind == "packed set":
            return f" of {self.resolution} x {self.resolution} pixels, crop {self.crop}"
        if self.kind == "public layout":
            return ", a file each"
        read = f"{self.bytes:,} bytes" if self.checksums else f"{min(FEW, self.images)} of them read"
        return f" JPEG and PNG files, {read}"


def printable(text: str) -> str:
    r"""The same, with bytes of a file name that are not UTF-8 as \udcff: a strict stream refuses what Python has for
    them."""
    return text.encode("utf-8", "backslashreplace").decode()


def _escaped(value: Any) -> Any:
    """The same, with every text printable: half of a surrogate pair is an error to most readers of JSON."""
    if isinstance(value, dict):
        return {name: _escaped(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_escaped(item) for item in value]
    return printable(value) if isinstance(value, str) else value


# Classes


def class_lines(names: Sequence[str], counts: np.ndarray) -> Iterator[tuple[str, str]]:
    """Bars: of each class where there are few, else of how many classes have how many images.

    Args:
        counts: (classes,) int64 images of each.
    """
    quantiles = "{:,.0f} {:,.0f} {:,.0f}".format(*np.percentile(counts, (10, 50, 90)))
    spread = f"10%, half and 90% of them have up to {quantiles}"
    smallest, largest = (
        [f"{names[label]} with {counts[label]:,}" for label in np.argsort(key, kind="stable")[:ENDS].tolist()]
        for key in (counts, -counts)
    )
    if len(names) <= FEW:
        yield "classes", f"{len(names):,}: smallest {smallest[0]}, largest {largest[0]}; {spread}"
        for name, count in zip(names, counts.tolist(), strict=True):
            yield "", f"{printable(name)[:20]:<20} {count:>9,} {_bar(count, int(counts.max()))}"
        return
    yield "classes", f"{len(names):,}: {spread}"
    bins = size_bins(counts)
    texts = [f"{first:,} to {last:,} images" if last > first else f"{first:,} images" for first, last, _ in bins]
    width, most = max(map(len, texts)), max(count for *_, count in bins)
    for text, (*_, count) in zip(texts, bins, strict=True):
        yield "", f"{text:>{width}} {count:>9,} {_bar(count, most)}"
    yield "smallest", ", ".join(smallest)
    yield "largest", ", ".join(largest)


def size_bins(counts: np.ndarray) -> list[tuple[int, int, int]]:
    """(fewest images, most images, classes that have so many) of at most BINS bins, of whole numbers and equally wide,
    which hold every class; the last ends with the largest."""
    low, high = int(counts.min()), int(counts.max())
    width = -(-(high - low + 1) // BINS)
    held = np.bincount((counts - low) // width)
    firsts = range(low, high + 1, width)
    return [(first, min(first + width - 1, high), count) for first, count in zip(firsts, held.tolist(), strict=True)]


def _bar(count: int, most: int) -> str:
    return "#" * -(-BAR * count // most)


# Numbers


def _factor(factor: Factor) -> str:
    """A number as it is; of many the first ones, as the table of channels has them all."""
    if not isinstance(factor, tuple):
        return str(factor)
    return "[" + " ".join(f"{one:.4g}" for one in factor[:4]) + (" ...]" if len(factor) > 4 else "]")


class Sums:
    """Of the values of each channel: means and deviations of a posterior, and their squares."""

    def __init__(self) -> None:
        self.count, self._sums = 0, torch.zeros(())

    def add(self, mean: Tensor, deviation: Tensor) -> None:
        """(C, h, w) float64 each, of one row."""
        powers = (mean, mean**2, deviation, deviation**2)
        self._sums = self._sums + torch.stack([power.mean((1, 2)) for power in powers])
        self.count += 1

    def statistics(self, moments: Moments) -> Statistics:
        """Of what is stored, and of x, which the posteriors give."""
        mean, square, deviation, within = (self._sums / self.count).numpy()
        variance = (square - mean**2).clip(0)
        shift, scale = (per_channel(factor, moments.channels) for factor in (moments.shift, moments.scale))
        figures = {"mean": mean, "std": np.sqrt(variance)}
        if moments.posterior:
            figures |= {"deviation_mean": deviation, "deviation_std": np.sqrt((within - deviation**2).clip(0))}
        figures |= {"x_mean": (mean - shift) * scale, "x_std": np.sqrt(variance + within) * np.abs(scale)}
        rows = zip(*(values.tolist() for values in figures.values()), strict=True)
        return Statistics(self.count, [dict(zip(figures, row, strict=True)) for row in rows])


TITLES = {
    "mean": "values: mean",
    "std": "std",
    "deviation_mean": "deviations: mean",
    "deviation_std": "std",
    "x_mean": "x: mean",
    "x_std": "std",
}


def table(statistics: Statistics) -> Iterator[tuple[str, str]]:
    """A row a channel, each column as wide as its widest number."""
    channels = statistics.channels
    titles = TITLES | ({"mean": "means: mean"} if "deviation_mean" in channels[0] else {})
    listed = channels[:FEW]
    columns = [["channel", *map(str, range(len(listed)))]]
    columns += [[titles[name], *(f"{channel[name]:.4g}" for channel in listed)] for name in channels[0]]
    widths = [max(map(len, column)) for column in columns]
    yield "statistics", f"of {statistics.rows:,} rows"
    for cells in zip(*columns, strict=True):
        yield "", "  ".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))
    if len(channels) > FEW:
        stds = [channel["x_std"] for channel in channels]
        yield "", f"and {len(channels) - FEW} more; of x, std from {min(stds):.4g} to {max(stds):.4g}"


def _colours(statistics: Statistics) -> Iterator[tuple[str, str]]:
    figures = ", ".join(f"{channel['x_mean']:.4g} and {channel['x_std']:.4g}" for channel in statistics.channels)
    what = "at 64 x 64, in [-1, 1]: red, green, blue have mean and"
    yield "statistics", f"of {statistics.rows:,} images {what}"
    yield "", f"standard deviation {figures}"
