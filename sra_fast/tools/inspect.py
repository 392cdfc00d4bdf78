"""`sra-fast inspect`: what a data set holds, whether its files are whole, and whether its numbers are fit to train on.

A packed set (data/manifest.py), the public layout (data/public.py), or a folder of class folders.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from sra_fast.config import DataConfig, InspectCommand, refuse_unless
from sra_fast.data import folder
from sra_fast.data.decoders import PillowDecoder, Undecodable, read_header
from sra_fast.data.folder import ImageFolder
from sra_fast.data.manifest import NAME, SETTINGS, Manifest, read_manifest
from sra_fast.data.packed import PackedSet, find_damage
from sra_fast.data.public import PublicSet, is_public
from sra_fast.data.rows import Moments
from sra_fast.errors import Refused
from sra_fast.files import write_json
from sra_fast.hardware import Hardware
from sra_fast.sampling.decoding import LatentSpace, image_decoder
from sra_fast.sampling.images import save_grid, to_uint8
from sra_fast.tools.findings import FEW, Findings, Sheet, Statistics, Sums, printable

USUAL = {True: (0.4, 2.5), False: (0.1, 2.5)}
"""Standard deviations of x, latents or not, outside of which something was forgotten. Stable Diffusion's channels have
0.6 to 0.84, and 3.3 to 4.6 without its scale (Karras et al., EDM2, 2024); pixels about 0.5, and 60 without theirs."""
ARCHIVES = "archives are not inspected: let `sra-fast prepare` make a set of them, and inspect that"
ADVICE = (
    "the `sra-fast prepare` command that made this set makes damaged files again; with --verify those with "
    "flipped bits too"
)


def inspect(options: InspectCommand) -> int:
    """Print the findings. Returns the exit code: 1 if anything is wrong.

    Raises:
        Refused: if there is no data set.
    """
    refuse_unless(options.rows > 0, "rows", options.rows, "must be positive")
    refuse_unless(options.images >= 0, "images", options.images, "must not be negative")
    root = Path(options.data)
    refuse_unless(root.is_dir() or root.suffix != ".tar", "data", options.data, ARCHIVES)
    refuse_unless(root.is_dir(), "data", options.data, "must be a folder")
    refuse_unless(not options.json or not Path(options.json).is_dir(), "json", options.json, "must be a file")
    out = Path(options.out) if options.out else root.resolve().parent / f"inspect-{root.resolve().name}.png"
    try:
        found, data = _open(root)(root, options.checksums)
    except Refused as error:  # data/ speaks of training's options
        raise Refused(re.sub("^data.(latents|images)", "data", str(error))) from error
    if data:
        (_look_at_images if isinstance(data, ImageFolder) else _look_at_moments)(found, data, options, out)
    for title, text in found.lines():
        _say(f"{title:<14}{text}")
    for warning in found.warnings:
        _say(f"warning: {warning}", sys.stderr)
    for file, reason in found.complaints():
        _say(f"wrong: {file}: {reason}", sys.stderr)
    _say(f"{'files':<14}{f'{len(found.wrong):,} wrong' if found.wrong else 'nothing wrong found'}")
    if found.advice:
        _say(found.advice, sys.stderr)
    if options.json:
        write_json(Path(options.json), found.as_json())
    return found.exit_code


def _say(line: str, stream: TextIO | None = None) -> None:
    print(printable(line).rstrip(), file=stream)


# What there is


def _open(root: Path) -> Callable[[Path, bool], tuple[Findings, Moments | ImageFolder | None]]:
    if (root / NAME).exists():
        return _packed
    if is_public(root):
        return _public
    if (root / SETTINGS).exists() or any(root.glob("*.npy")):
        return _packed
    # Beside class folders, archives are left out, as training does.
    folders = any(entry.is_dir() and not entry.name.startswith(".") for entry in root.iterdir())
    refuse_unless(folders or not any(root.glob("*.tar")), "data", str(root), ARCHIVES)
    return _folder


def _packed(root: Path, checksums: bool) -> tuple[Findings, Moments | None]:
    manifest = read_manifest(root)
    found = Findings(
        "packed set",
        root,
        checksums,
        manifest.count,
        manifest.classes,
        resolution=manifest.resolution,
        crop=manifest.crop,
        shards=len(manifest.shards),
        skipped=manifest.skipped,
        **_row(manifest),
    )
    found.bytes = _check_shards(root, manifest, checksums, found.wrong)
    if found.wrong and (root / SETTINGS).exists():  # without them, prepare takes the set for somebody else's
        found.advice = ADVICE
    try:
        moments = PackedSet(root)
    except Refused as error:
        if not found.wrong:
            found.wrong[root / NAME] = str(error).removeprefix(f"data.latents: {root}: ")
        return found, None
    found.counts = _counts(moments)
    return found, moments


def _row(rows: Manifest | Moments) -> dict[str, Any]:
    """What a set says of its rows, by the names that `Findings` has for it."""
    names = ("shape", "posterior", "flips", "scale", "shift", "vae")
    return {"dtype": str(rows.dtype), **{name: getattr(rows, name) for name in names}}


def _counts(data: Moments | ImageFolder) -> np.ndarray:
    """(classes,) int64 images of each."""
    return np.bincount(data.labels, minlength=len(data.classes))


def _check_shards(root: Path, manifest: Manifest, checksums: bool, wrong: dict[Path, str]) -> int:
    """Every file of the shards against the manifest. Returns the bytes of those that are there."""
    size = manifest.size(root)
    with _bar(size if checksums else 0, "checksums", "B") as bar:
        for shard in manifest.shards:
            damage = find_damage(root, manifest, shard, checksums, bar.update)
            wrong |= {root / name: reason for name, reason in damage.items()}
    return size


def _public(root: Path, checksums: bool) -> tuple[Findings, Moments]:
    moments = PublicSet(root)
    counts = _counts(moments)
    found = Findings("public layout", moments.root, checksums, len(moments), moments.classes, counts, **_row(moments))
    if checksums:
        for row in _bar(range(len(moments)), "reading", "file"):
            try:
                moments.moments(row)
            except (OSError, ValueError) as error:
                found.wrong[moments.file(row)] = getattr(error, "strerror", None) or str(error)
    return found, moments


def _folder(root: Path, checksums: bool) -> tuple[Findings, ImageFolder]:
    images = folder.scan(root)
    found = Findings("image folder", root, checksums, len(images), images.classes, _counts(images))
    chosen = np.arange(len(images)) if checksums else _spread(len(images), FEW)
    sides, size = [], 0
    for row in _bar(chosen.tolist(), "reading", "file"):
        try:
            file = images.read(row)
            size += len(file)
            sides.append(min(read_header(file)[:2]))
        except (OSError, ValueError) as error:
            found.wrong[root / images.files[row]] = getattr(error, "strerror", None) or str(error)
    found.bytes = size if checksums else None
    found.shorter_side = tuple(np.percentile(sides, (0, 50, 100)).tolist()) if sides else None
    found.warnings += filter(None, [images.ignored()])
    return found, images


def _bar(work: Sequence | int, what: str, unit: str) -> tqdm:
    """A progress bar over a sequence, or of a number of bytes."""
    options = {"desc": what, "unit": unit, "unit_scale": True, "disable": None, "leave": False}
    return tqdm(total=work, **options) if isinstance(work, int) else tqdm(work, **options)


# Numbers


def _spread(size: int, count: int) -> np.ndarray:
    """At most `count` of [0, size), evenly spread, in order."""
    return np.unique(np.linspace(0, size - 1, min(size, count)).astype(np.int64))


def _look_at_moments(found: Findings, moments: Moments, options: InspectCommand, out: Path) -> None:
    rows = [row for row in _spread(len(moments), options.rows) if moments.file(row) not in found.wrong]
    sums, good = Sums(), []
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
    if good:
        found.statistics = sums.statistics(moments)
        _warn(found)
    if good and options.images:
        found.sheet = _sheet(moments, good, options, out)


def _warn(found: Findings) -> None:
    """Of what looks wrong with x."""
    mean, std = (np.array([channel[name] for channel in found.statistics.channels]) for name in ("x_mean", "x_std"))
    low, high = USUAL[found.dtype != "uint8"]
    odd = np.flatnonzero((std < low) | (std > high))
    if len(odd):
        found.warnings.append(
            f"x of channel {odd[0]} has a standard deviation of {std[odd[0]]:.4g}, far from 1: is the scale right?"
        )
    far = np.flatnonzero(np.abs(mean) > high)
    if len(far):
        found.warnings.append(
            f"x of channel {far[0]} has a mean of {mean[far[0]]:.4g}, far from 0: is the shift right?"
        )


def _look_at_images(found: Findings, images: ImageFolder, options: InspectCommand, out: Path) -> None:
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
        return
    x = torch.stack(pixels).double().transpose(0, 1).flatten(1)
    figures = zip(x.mean(1).tolist(), x.std(1).tolist(), strict=True)
    found.statistics = Statistics(len(pixels), [{"x_mean": mean, "x_std": std} for mean, std in figures])
    if not options.images:
        return
    shown = decoded(_by_class(np.array(rows), images.labels, options.images).tolist())
    if shown:
        found.sheet = _saved(out, to_uint8(torch.stack(shown)), "64 x 64")


# Images


def _by_class(rows: np.ndarray, labels: np.ndarray, count: int) -> np.ndarray:
    """At most `count` of the rows, spread evenly over the classes' order."""
    ordered = rows[np.argsort(labels[rows], kind="stable")]
    return ordered[_spread(len(ordered), count)]


def _sheet(moments: Moments, rows: list[int], options: InspectCommand, out: Path) -> Sheet:
    z = moments.gather(_by_class(np.array(rows), moments.labels, options.images)).float()
    z = z.chunk(2, dim=1)[0] if moments.posterior else z
    if moments.dtype == np.uint8:
        return _saved(out, z.byte().permute(0, 2, 3, 1).numpy(), "the pixels as they are stored")
    vae, device = options.vae or moments.vae, Hardware.choose(options.device).device
    try:
        make = image_decoder(LatentSpace(vae, 1.0, 0.0), device)
        parts = [make(part.to(device)).cpu() for part in _bar(z.split(4), "decoding", "batch")]
        return _saved(out, to_uint8(torch.cat(parts)), f"the means decoded by {vae}")
    except Refused as error:
        missing = str(error)
    channels = z[:, :3] if z.shape[1] >= 3 else z[:, :1]
    low, high = (channels.transpose(0, 1).flatten(1).quantile(q, dim=1)[:, None, None] for q in (0.01, 0.99))
    stretched = (channels - low) / (high - low).clamp_min(1e-6) * 2 - 1
    return _saved(out, to_uint8(stretched), f"no VAE: {channels.shape[1]} of the channels, stretched", missing)


def _saved(out: Path, pixels: np.ndarray, shows: str, missing: str = "") -> Sheet:
    save_grid(out, pixels, int(np.ceil(np.sqrt(len(pixels)))))
    return Sheet(out, shows, missing)
