"""`sra-fast inspect`: what a data set holds, whether its files are whole, and whether its numbers are fit to train on.

A packed set (data/manifest.py), the public layout (data/public.py), or a folder of class folders.
"""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import tyro
from torch import Tensor
from tqdm import tqdm

from sra_fast.config import DataConfig, Refused, refuse_unless
from sra_fast.data import folder
from sra_fast.data.folder import ImageFolder
from sra_fast.data.images import PillowDecoder, Undecodable, read_header
from sra_fast.data.latents import PackedSet, header
from sra_fast.data.manifest import NAME, Manifest, Skipped, read_manifest
from sra_fast.data.moments import Moments
from sra_fast.data.public import PublicSet, is_public
from sra_fast.hardware import Hardware
from sra_fast.sampling.decoding import LatentSpace, image_maker
from sra_fast.sampling.images import save_grid, to_uint8

FEW = 16  # classes, channels and skipped files listed one by one
PIECE = 1 << 22  # bytes read at a time
USUAL = {True: (0.4, 2.5), False: (0.1, 2.5)}
"""Standard deviations of x, latents or not, outside of which something was forgotten. Stable Diffusion's channels have
0.6 to 0.84, and 3.3 to 4.6 without its scale (Karras et al., EDM2, 2024); pixels about 0.5, and 60 without theirs."""


@dataclass(frozen=True)
class InspectOptions:
    """Look at a data set: counts, classes, statistics and some images; and read all of it, for damage."""

    data: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DATA")]
    """A packed set, the public code's moments, or a folder of class folders."""
    out: str = ""
    """PNG of some images; empty = inspect-<name>.png beside the set."""
    checksums: bool = True
    """Read every file and compare its checksum; where there are none, look whether it is whole."""
    vae: str = ""
    """VAE for the images: a folder, or an id on the Hugging Face hub; empty = the one that the set names."""
    rows: int = 1024
    """Rows of the statistics, spread evenly; 128 images of a folder at most."""
    images: int = 36
    """Images on the PNG, spread evenly over the classes; 0 = no PNG."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Of the VAE; auto = the GPU where there is one."""


@dataclass
class Findings:
    """What is known of a set.

    Attributes:
        facts: lines for people, each with its title.
        classes, labels: see `Moments`; no labels where they cannot be read.
        skipped: see `Manifest`.
        wrong: files and what is wrong with them.
        warnings: what may be meant as it is.
    """

    facts: list[tuple[str, str]]
    classes: tuple[str, ...] = ()
    labels: np.ndarray | None = None
    skipped: tuple[Skipped, ...] = ()
    wrong: dict[Path, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


def inspect(options: InspectOptions) -> int:
    """Print the findings. Returns the exit code: 1 if anything is wrong.

    Raises:
        Refused: if there is no data set.
    """
    refuse_unless(options.rows > 0, "rows", options.rows, "must be positive")
    refuse_unless(options.images >= 0, "images", options.images, "must not be negative")
    root = Path(options.data)
    refuse_unless(root.is_dir(), "data", options.data, "must be a folder")
    out = Path(options.out) if options.out else root.resolve().parent / f"inspect-{root.resolve().name}.png"
    try:
        found, data = _open(root)(root, options.checksums)
    except Refused as error:  # data/ speaks of training's options
        raise Refused(re.sub("^data.(latents|images)", "data", str(error))) from error
    lines = []
    if data:
        lines = (_images_lines if isinstance(data, ImageFolder) else _moments_lines)(found, data, options, out)
    for title, text in (*found.facts, *_class_lines(found), *_skipped_lines(found.skipped), *lines):
        print(f"{title:<14}{text}".rstrip())
    for warning in found.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    for file, reason in sorted(found.wrong.items()):
        print(f"wrong: {file}: {reason}", file=sys.stderr)
    print(f"{'files':<14}{f'{len(found.wrong):,} wrong' if found.wrong else 'nothing wrong found'}")
    return 1 if found.wrong else 0


# What there is


def _open(root: Path) -> Callable[[Path, bool], tuple[Findings, Moments | ImageFolder | None]]:
    if (root / NAME).exists():
        return _packed
    if is_public(root):
        return _public
    begun = (root / "prepare.json").exists() or any(root.glob("*.npy"))
    return _packed if begun else _folder


def _packed(root: Path, checksums: bool) -> tuple[Findings, Moments | None]:
    manifest = read_manifest(root)
    found = Findings([], manifest.classes, skipped=manifest.skipped)
    sizes = _check_shards(root, manifest, checksums, found.wrong)
    pixels = manifest.dtype == "uint8"
    kind = "pixels" if pixels else "means and deviations" if manifest.posterior else "latents"
    side = manifest.resolution
    found.facts += [
        ("packed set", str(root)),
        ("images", f"{manifest.count:,} of {side} x {side} pixels, crop {manifest.crop}"),
        ("rows", f"{manifest.shape} {manifest.dtype}: {kind}{', and of mirrored images' if manifest.flips else ''}"),
        ("shards", f"{len(manifest.shards):,}, {sum(sizes):,} bytes"),
        *_space(manifest.vae, manifest.scale, manifest.shift),
    ]
    try:
        moments = PackedSet(root)
    except Refused as error:
        if not found.wrong:
            found.wrong[root / NAME] = str(error).removeprefix(f"data.latents: {root}: ")
        return found, None
    found.labels = moments.labels
    return found, moments


def _check_shards(root: Path, manifest: Manifest, checksums: bool, wrong: dict[Path, str]) -> list[int]:
    """Every file of the shards against the manifest. Returns the sizes of those that are there."""
    wanted = {}
    for shard in manifest.shards:
        rows = (shard.rows, *manifest.shape), np.dtype(manifest.dtype)
        wanted |= {name: (*rows, sha256) for name, sha256 in shard.files().items()}
        wanted[shard.labels] = (shard.rows,), np.dtype(np.int64), shard.labels_sha256
    sizes = {name: (root / name).stat().st_size for name in wanted if (root / name).is_file()}
    labels = {shard.labels for shard in manifest.shards}
    with _bar(sum(sizes.values()) if checksums else 0, "checksums", "B") as bar:
        for name, (shape, dtype, sha256) in wanted.items():
            path = root / name
            try:
                header(path, shape, dtype)
                if name in labels:
                    _check_labels(path, np.load(path), len(manifest.classes))
                if checksums and (read := _sha256(path, bar)) != sha256:
                    raise Refused(f"SHA-256 {read}; the manifest has {sha256}")
            except (Refused, OSError) as error:
                wrong[path] = str(error).removeprefix(f"data.latents: {path}: ")
    return list(sizes.values())


def _check_labels(path: Path, labels: np.ndarray, classes: int) -> None:
    outside = np.flatnonzero((labels < 0) | (labels >= classes))
    if len(outside):
        raise Refused(f"label {labels[outside[0]]} of row {outside[0]}; must be in [0, {classes})")


def _sha256(path: Path, bar: tqdm) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(PIECE):
            digest.update(piece)
            bar.update(len(piece))
    return digest.hexdigest()


def _public(root: Path, checksums: bool) -> tuple[Findings, Moments]:
    moments = PublicSet(root)
    found = Findings([], moments.classes, moments.labels)
    if checksums:
        for row in _bar(range(len(moments)), "reading", "file"):
            try:
                moments.moments(row)
            except (OSError, ValueError) as error:
                found.wrong[moments.file(row)] = getattr(error, "strerror", None) or str(error)
    found.facts += [
        ("public layout", str(moments.root)),
        ("images", f"{len(moments):,}, a file each"),
        ("rows", f"{moments.shape} float32: means and deviations"),
        *_space("", moments.scale, moments.shift),
    ]
    return found, moments


def _folder(root: Path, checksums: bool) -> tuple[Findings, ImageFolder]:
    images = folder.scan(root)
    found = Findings([], images.classes, images.labels)
    chosen = np.arange(len(images)) if checksums else _spread(len(images), FEW)
    sides, size = [], 0
    for row in _bar(chosen.tolist(), "reading", "file"):
        try:
            file = images.read(row)
            size += len(file)
            sides.append(min(read_header(file)[:2]))
        except (OSError, ValueError) as error:
            found.wrong[root / images.files[row]] = getattr(error, "strerror", None) or str(error)
    read = f"{size:,} bytes" if checksums else f"{len(chosen)} of them read"
    shorter = np.percentile(sides, (0, 50, 100)) if sides else (0, 0, 0)
    found.facts += [
        ("image folder", str(root)),
        ("images", f"{len(images):,} JPEG and PNG files, {read}"),
        ("shorter side", "{:.0f} smallest, {:.0f} median, {:.0f} largest".format(*shorter)),
    ]
    return found, images


def _space(vae: str, scale: object, shift: object) -> list[tuple[str, str]]:
    return [("VAE", vae or "not named"), ("scale, shift", f"{scale}, {shift}: x = (z - shift) * scale")]


def _bar(work: Sequence | int, what: str, unit: str) -> tqdm:
    """A progress bar over a sequence, or of a number of bytes."""
    options = {"desc": what, "unit": unit, "unit_scale": True, "disable": None, "leave": False}
    return tqdm(total=work, **options) if isinstance(work, int) else tqdm(work, **options)


# Classes and skipped files


def _class_lines(found: Findings) -> Iterator[tuple[str, str]]:
    if found.labels is None:
        return
    counts, names = np.bincount(found.labels, minlength=len(found.classes)), found.classes
    low, high = counts.argmin(), counts.argmax()
    quantiles = "{:,.0f} {:,.0f} {:,.0f}".format(*np.percentile(counts, (10, 50, 90)))
    ends = f"smallest {names[low]} with {counts[low]:,}, largest {names[high]} with {counts[high]:,}"
    yield "classes", f"{len(names):,}: {ends}; 10%, half and 90% of them have up to {quantiles}"
    if len(names) <= FEW:
        for name, count in zip(names, counts.tolist(), strict=True):
            yield "", f"{name[:20]:<20} {count:>9,} {'#' * -(-40 * count // int(counts.max()))}"


def _skipped_lines(skipped: Sequence[Skipped]) -> Iterator[tuple[str, str]]:
    if skipped:
        yield "skipped", f"{len(skipped):,}"
        for file in skipped[:10]:
            yield "", f"{file.file}: {file.reason}"


# Numbers


def _spread(size: int, count: int) -> np.ndarray:
    """At most `count` of [0, size), evenly spread, in order."""
    return np.unique(np.linspace(0, size - 1, min(size, count)).astype(np.int64))


def _moments_lines(found: Findings, moments: Moments, options: InspectOptions, out: Path) -> list[tuple[str, str]]:
    rows = [row for row in _spread(len(moments), options.rows) if moments.file(row) not in found.wrong]
    sums, good = _Sums(), []
    for row in _bar(rows, "statistics", "row"):
        try:
            values = moments.gather(np.array([row]))[0].double()
        except Refused as error:
            found.wrong[moments.file(row)] = str(error).removeprefix(f"data.latents: {moments.file(row)}: ")
            continue
        mean, deviation = values.chunk(2) if moments.posterior else (values, torch.zeros_like(values))
        if not values.isfinite().all() or deviation.min() < 0:
            found.wrong.setdefault(moments.file(row), f"row {row} of the set is not finite, or deviates by less than 0")
            continue
        sums.add(mean, deviation)
        good.append(row)
    lines = []
    if good:
        lines = [("statistics", f"of {len(good):,} rows"), *_table(sums, moments, found.warnings)]
    return lines + (_sheet(moments, good, options, out) if options.images and good else [])


class _Sums:
    """Of the values of each channel: means and deviations of a posterior, and their squares."""

    def __init__(self) -> None:
        self.count, self._sums = 0, torch.zeros(())

    def add(self, mean: Tensor, deviation: Tensor) -> None:
        """(C, h, w) float64 each, of one row."""
        powers = (mean, mean**2, deviation, deviation**2)
        self._sums = self._sums + torch.stack([power.mean((1, 2)) for power in powers])
        self.count += 1

    def figures(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """(mean, variance) of the means, and the deviations' (mean, mean square), each (C,) float64."""
        mean, square, deviation, variance = (self._sums / self.count).numpy()
        return mean, (square - mean**2).clip(0), deviation, variance


def _table(sums: _Sums, moments: Moments, warnings: list[str]) -> Iterator[tuple[str, str]]:
    """The figures of each channel, and of x; what looks wrong with x goes to the warnings."""
    mean, variance, deviation, within = sums.figures()
    shift, scale = (np.broadcast_to(np.float64(factor), moments.channels) for factor in (moments.shift, moments.scale))
    mean_x, std_x = (mean - shift) * scale, np.sqrt(variance + within) * np.abs(scale)  # of what the posteriors give
    shown = {f"{'means' if moments.posterior else 'values'}: mean": mean, "std": np.sqrt(variance)}
    if moments.posterior:
        shown |= {"deviations: mean": deviation, " std": np.sqrt((within - deviation**2).clip(0))}
    shown |= {"x: mean": mean_x, "  std": std_x}
    widths = [max(9, len(name) + 2) for name in shown]
    yield "", "channel" + "".join(f"{name.strip():>{width}}" for name, width in zip(shown, widths, strict=True))
    for channel in range(min(moments.channels, FEW)):
        cells = zip(shown.values(), widths, strict=True)
        yield "", f"{channel:>7}" + "".join(f"{values[channel]:>{width}.4g}" for values, width in cells)
    if moments.channels > FEW:
        yield "", f"and {moments.channels - FEW} more; of x, std from {std_x.min():.4g} to {std_x.max():.4g}"
    low, high = USUAL[moments.dtype != np.uint8]
    odd = np.flatnonzero((std_x < low) | (std_x > high))
    if len(odd):
        warnings.append(
            f"x of channel {odd[0]} has a standard deviation of {std_x[odd[0]]:.4g}, far from 1: is the scale right?"
        )
    far = np.flatnonzero(np.abs(mean_x) > high)
    if len(far):
        warnings.append(f"x of channel {far[0]} has a mean of {mean_x[far[0]]:.4g}, far from 0: is the shift right?")


def _images_lines(found: Findings, images: ImageFolder, options: InspectOptions, out: Path) -> list[tuple[str, str]]:
    decoder = PillowDecoder(DataConfig(resolution=64), torch.device("cpu"))
    rows = _spread(len(images), min(options.rows, 128))
    rows = [row for row in rows.tolist() if images.root / images.files[row] not in found.wrong]

    def decoded(chosen: Iterable[int]) -> list[Tensor]:
        made = []
        for row in chosen:
            try:
                made.append(decoder.decode([images.read(row)])[0])
            except (Undecodable, OSError) as error:
                reason = error.reasons[0] if isinstance(error, Undecodable) else error.strerror
                found.wrong[images.root / images.files[row]] = reason
        return made

    pixels = decoded(_bar(rows, "statistics", "img"))
    if not pixels:
        return []
    x = torch.stack(pixels).double().transpose(0, 1).flatten(1)
    figures = ", ".join(f"{mean:.4g} and {std:.4g}" for mean, std in zip(x.mean(1), x.std(1), strict=True))
    lines = [
        ("statistics", f"of {len(pixels):,} images at 64 x 64, in [-1, 1]: red, green, blue have mean and"),
        ("", f"standard deviation {figures}"),
    ]
    if not options.images:
        return lines
    shown = decoded(_by_class(np.array(rows), images.labels, options.images).tolist())
    return lines + _saved(out, to_uint8(torch.stack(shown)), "64 x 64") if shown else lines


# Images


def _by_class(rows: np.ndarray, labels: np.ndarray, count: int) -> np.ndarray:
    """At most `count` of the rows, spread evenly over the classes' order."""
    ordered = rows[np.argsort(labels[rows], kind="stable")]
    return ordered[_spread(len(ordered), count)]


def _sheet(moments: Moments, rows: list[int], options: InspectOptions, out: Path) -> list[tuple[str, str]]:
    z = moments.gather(_by_class(np.array(rows), moments.labels, options.images)).float()
    z = z.chunk(2, dim=1)[0] if moments.posterior else z
    if moments.dtype == np.uint8:
        return _saved(out, z.byte().permute(0, 2, 3, 1).numpy(), "the pixels as they are stored")
    vae, device = options.vae or moments.vae, Hardware.choose(options.device).device
    try:
        make = image_maker(LatentSpace(vae, 1.0, 0.0), device)
        parts = [make(part.to(device)).cpu() for part in _bar(z.split(4), "decoding", "batch")]
        return _saved(out, to_uint8(torch.cat(parts)), f"the means decoded by {vae}")
    except Refused as error:
        missing = str(error)
    channels = z[:, :3] if z.shape[1] >= 3 else z[:, :1]
    low, high = (channels.transpose(0, 1).flatten(1).quantile(q, dim=1)[:, None, None] for q in (0.01, 0.99))
    stretched = (channels - low) / (high - low).clamp_min(1e-6) * 2 - 1
    return [*_saved(out, to_uint8(stretched), f"no VAE: {channels.shape[1]} of the channels, stretched"), ("", missing)]


def _saved(out: Path, pixels: np.ndarray, caption: str) -> list[tuple[str, str]]:
    save_grid(out, pixels, int(np.ceil(np.sqrt(len(pixels)))))
    return [("images in", f"{out} ({caption})")]
