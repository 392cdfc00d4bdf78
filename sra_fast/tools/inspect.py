"""`sra-fast inspect`: describe a data set, check its files for damage, and its numbers for fitness to train on.

A packed set (data/manifest.py), the public layout (data/public.py), or a folder of class folders.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from torch import Tensor

from sra_fast.config import DataConfig, InspectCommand
from sra_fast.data import folder
from sra_fast.data.decoders import PillowDecoder, Undecodable
from sra_fast.data.folder import ImageFolder
from sra_fast.data.image_file import read_header
from sra_fast.data.manifest import NAME, SETTINGS, Manifest, read_manifest
from sra_fast.data.packed import PackedSet, find_damage
from sra_fast.data.public import PublicSet, is_public
from sra_fast.data.rows import RowSet
from sra_fast.errors import Damaged, Refused, printable
from sra_fast.files import refuse_unwritable, write_json
from sra_fast.hardware import Hardware
from sra_fast.progress import Progress
from sra_fast.sampling.decoding import LatentSpace, image_decoder
from sra_fast.sampling.images import save_grid, to_uint8
from sra_fast.tools.findings import FEW, ChannelSums, Findings, Sheet, Statistics

USUAL_STD = {False: (0.4, 2.5), True: (0.1, 2.5)}  # latents, pixels
"""Standard deviations of x outside of these suggest a wrong scale. Stable Diffusion's channels have 0.6 to 0.84, and
3.3 to 4.6 without its scale (Karras et al., EDM2, 2024); pixels about 0.5, and 60 without theirs."""
SIDE, MAX_IMAGES = 64, 128  # images of a folder: resolution and number of those decoded
ARCHIVES = "archives are not inspected: let `sra-fast prepare` make a set of them, and inspect that"
ADVICE = (
    "the `sra-fast prepare` command that made this set makes damaged files again; with --verify those with "
    "flipped bits too"
)


def inspect(options: InspectCommand) -> int:
    """Print the results. Returns the exit code: 1 if anything is wrong.

    Raises:
        Refused: if there is no data set.
    """
    root = Path(options.data)
    if not root.is_dir():
        raise Refused("data", options.data, ARCHIVES if root.suffix == ".tar" else "must be a folder")
    if options.json and Path(options.json).is_dir():
        raise Refused("json", options.json, "must be a file")
    for option in ("json", "out"):
        if file := getattr(options, option):
            refuse_unwritable(Path(file), option)
            if Path(file).exists() and Path(file).resolve().is_relative_to(root.resolve()):
                raise Refused(option, file, "must not replace a file of the data set")
    png = Path(options.out) if options.out else root.resolve().parent / f"inspect-{root.resolve().name}.png"
    try:
        findings, data = _open(root)(root, options.checksums)
    except Damaged as error:
        raise Refused(f"data: {error}") from error
    if isinstance(data, ImageFolder):
        _inspect_images(findings, data, options, png)
    elif data:
        _inspect_rows(findings, data, options, png)
    _print(findings)
    if options.json:
        write_json(Path(options.json), findings.as_json())
    return findings.exit_code


def _print(findings: Findings) -> None:
    def write(line: str, stream: TextIO | None = None) -> None:
        print(printable(line).rstrip(), file=stream)

    for title, text in findings.lines():
        write(f"{title:<14}{text}")
    for warning in findings.warnings:
        write(f"warning: {warning}", sys.stderr)
    for file, reason in sorted(findings.wrong.items()):
        write(f"wrong: {file}: {reason}", sys.stderr)
    write(f"{'files':<14}{f'{len(findings.wrong):,} wrong' if findings.wrong else 'nothing wrong found'}")
    if findings.advice:
        write(findings.advice, sys.stderr)


def _open(root: Path) -> Callable[[Path, bool], tuple[Findings, RowSet | ImageFolder | None]]:
    """The function that opens this kind of data set and checks its files."""
    if (root / NAME).exists():
        return _open_packed
    if is_public(root):
        return _open_public
    if (root / SETTINGS).exists() or any(root.glob("*.npy")):
        return _open_packed
    # Archives beside class folders are ignored, as in training.
    folders = any(entry.is_dir() and not entry.name.startswith(".") for entry in root.iterdir())
    if not folders and any(root.glob("*.tar")):
        raise Refused("data", str(root), ARCHIVES)
    return _open_folder


def _open_packed(root: Path, checksums: bool) -> tuple[Findings, PackedSet | None]:
    manifest = read_manifest(root)
    findings = Findings(
        "packed set",
        root,
        checksums,
        manifest.count,
        manifest.classes,
        resolution=manifest.resolution,
        crop=manifest.crop,
        shards=len(manifest.shards),
        bytes=manifest.size(root),
        skipped=manifest.skipped,
        **_row_facts(manifest),
    )
    with Progress(manifest.size(root) if checksums else 0, "checksums", "B") as bar:
        for shard in manifest.shards:
            damage = find_damage(root, manifest, shard, checksums, bar.update)
            findings.wrong |= {root / name: reason for name, reason in damage.items()}
    if findings.wrong and (root / SETTINGS).exists():  # `prepare` repairs only the sets that it made
        findings.advice = ADVICE
    try:
        row_set = PackedSet(root)
    except Damaged as error:
        if not findings.wrong:
            findings.wrong[root / NAME] = error.reason
        return findings, None
    findings.counts = _class_counts(row_set)
    return findings, row_set


def _open_public(root: Path, checksums: bool) -> tuple[Findings, PublicSet]:
    rows = PublicSet(root)
    facts = _row_facts(rows)
    findings = Findings("public layout", rows.root, checksums, len(rows), rows.classes, _class_counts(rows), **facts)
    for row in Progress(range(len(rows) if checksums else 0), "reading", "file"):
        try:
            rows.read_row(row)
        except Damaged as error:
            findings.wrong[Path(error.path)] = error.reason
    return findings, rows


def _open_folder(root: Path, checksums: bool) -> tuple[Findings, ImageFolder]:
    images = folder.scan(root)
    findings = Findings("image folder", root, checksums, len(images), images.classes, _class_counts(images))
    sides, size = [], 0
    for row in Progress(_spread(len(images), len(images) if checksums else FEW).tolist(), "reading", "file"):
        try:
            file = images.read(row)
            size += len(file)
            header = read_header(file)
            sides.append(min(header.width, header.height))
        except (OSError, ValueError) as error:
            findings.wrong[root / images.files[row]] = getattr(error, "strerror", None) or str(error)
    findings.bytes = size if checksums else None
    findings.shorter_side = tuple(np.percentile(sides, (0, 50, 100)).tolist()) if sides else None
    findings.warnings += filter(None, [images.ignored()])
    return findings, images


def _row_facts(rows: Manifest | RowSet) -> dict[str, Any]:
    names = ("shape", "posterior", "flips", "scale", "shift", "vae")
    return {"dtype": str(rows.dtype), **{name: getattr(rows, name) for name in names}}


def _class_counts(data: RowSet | ImageFolder) -> np.ndarray:
    return np.bincount(data.labels, minlength=len(data.classes))


def _spread(size: int, count: int) -> np.ndarray:
    """At most `count` numbers of [0, size), evenly spread, in order."""
    return np.unique(np.linspace(0, size - 1, min(size, count)).astype(np.int64))


def _spread_over_classes(rows: list[int], labels: np.ndarray, count: int) -> np.ndarray:
    """At most `count` of the rows, evenly spread in the order of their classes."""
    ordered = np.array(rows)[np.argsort(labels[rows], kind="stable")]
    return ordered[_spread(len(ordered), count)]


def _inspect_rows(findings: Findings, row_set: RowSet, options: InspectCommand, png: Path) -> None:
    """Add statistics and the PNG of some rows."""
    rows = [row for row in _spread(len(row_set), options.rows).tolist() if row_set.file(row) not in findings.wrong]
    sums, valid = ChannelSums(row_set.posterior), []
    for row in Progress(rows, "statistics", "row"):
        try:
            values = row_set.gather(np.array([row]))[0].double()
        except Damaged as error:
            findings.wrong[Path(error.path)] = error.reason
            continue
        if sums.add(values):
            valid.append(row)
        else:
            reason = f"row {row} of the set has a number that is not finite, or a deviation below 0"
            findings.wrong.setdefault(row_set.file(row), reason)
    if not valid:
        return
    findings.statistics = sums.statistics(row_set.scale, row_set.shift)
    findings.warnings += _check_scale(findings.statistics.channels, *USUAL_STD[findings.dtype == "uint8"])
    if options.images:
        with _as_warning(findings):
            findings.sheet = _draw_rows(row_set, valid, options, png)


def _check_scale(channels: list[dict[str, float]], low: float, high: float) -> Iterator[str]:
    """Warnings about the first channel of x with an unusual standard deviation, and with an unusual mean."""
    for channel, std in enumerate(numbers["x_std"] for numbers in channels):
        if not low <= std <= high:
            yield f"x of channel {channel} has a standard deviation of {std:.4g}, far from 1: is the scale right?"
            break
    for channel, mean in enumerate(numbers["x_mean"] for numbers in channels):
        if abs(mean) > high:
            yield f"x of channel {channel} has a mean of {mean:.4g}, far from 0: is the shift right?"
            break


def _draw_rows(row_set: RowSet, rows: list[int], options: InspectCommand, png: Path) -> Sheet:
    """Pixels as they are, latents through the VAE or, without one, some channels of them."""
    z = row_set.gather(_spread_over_classes(rows, row_set.labels, options.images)).float()
    z = z.chunk(2, dim=1)[0] if row_set.posterior else z
    if row_set.dtype == np.uint8:
        return _save(png, z.byte().permute(0, 2, 3, 1).numpy(), "the pixels as they are stored")
    vae, device = options.vae or row_set.vae, Hardware.choose(options.device).device
    try:
        decode = image_decoder(LatentSpace(vae, 1.0, 0.0), device)
        images = [decode(part.to(device)).cpu() for part in Progress(z.split(4), "decoding", "batch")]
        return _save(png, to_uint8(torch.cat(images)), f"the means decoded by {vae}")
    except Refused as error:
        missing = str(error)
    channels = z[:, :3] if z.shape[1] >= 3 else z[:, :1]
    low, high = (channels.transpose(0, 1).flatten(1).quantile(q, dim=1)[:, None, None] for q in (0.01, 0.99))
    stretched = (channels - low) / (high - low).clamp_min(1e-6) * 2 - 1
    return _save(png, to_uint8(stretched), f"no VAE: {channels.shape[1]} of the channels, stretched", missing)


def _inspect_images(findings: Findings, images: ImageFolder, options: InspectCommand, png: Path) -> None:
    """Add statistics and the PNG of some images."""
    decoder = PillowDecoder(DataConfig(resolution=SIDE), torch.device("cpu"))
    rows = _spread(len(images), min(options.rows, MAX_IMAGES)).tolist()
    rows = [row for row in rows if images.root / images.files[row] not in findings.wrong]

    def decoded(chosen: Iterable[int]) -> list[Tensor]:
        pixels = []
        for row in chosen:
            try:
                pixels.append(decoder.decode([images.read(row)])[0])
            except (Undecodable, OSError) as error:
                reason = error.reasons[0] if isinstance(error, Undecodable) else error.strerror or str(error)
                findings.wrong[images.root / images.files[row]] = reason
        return pixels

    if not (pixels := decoded(Progress(rows, "statistics", "img"))):
        return
    x = torch.stack(pixels).double().transpose(0, 1).flatten(1)
    figures = zip(x.mean(1).tolist(), x.std(1).tolist(), strict=True)
    findings.statistics = Statistics(len(pixels), [{"x_mean": mean, "x_std": std} for mean, std in figures])
    if options.images and (shown := decoded(_spread_over_classes(rows, images.labels, options.images).tolist())):
        with _as_warning(findings):
            findings.sheet = _save(png, to_uint8(torch.stack(shown)), f"{SIDE} x {SIDE}")


@contextmanager
def _as_warning(findings: Findings) -> Iterator[None]:
    """A picture that cannot be written says nothing about the set."""
    try:
        yield
    except Refused as error:
        findings.warnings.append(f"no sample images: {error}")


def _save(png: Path, pixels: np.ndarray, shows: str, missing: str = "") -> Sheet:
    save_grid(png, pixels, int(np.ceil(np.sqrt(len(pixels)))))
    return Sheet(png, shows, missing)
