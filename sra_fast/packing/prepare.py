"""`sra-fast prepare`: images, or the public layout, to a packed set (manifest.py).

Source images are taken in the order of their names, a shard from every `rows_per_shard` of them; what cannot be decoded
is left out of its shard, so that no label and no other shard moves. Every process takes the next shard that nobody is
making; when there is none left it waits for the others, and makes what a killed one has left. Of a complete set it
makes again what is damaged.

The folder holds prepare.json, what the set is made of, from the first moment on, and manifest.json from the last. The
bytes are the same whoever made which shard and whatever was killed in between; on a GPU, for the same batch.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from sra_fast.config import PrepareCommand, refuse_unless
from sra_fast.data.folder import ImageFolder
from sra_fast.data.manifest import NAME, SETTINGS, Manifest, Skipped, read_manifest
from sra_fast.data.packed import find_damage
from sra_fast.data.public import PublicSet, is_public
from sra_fast.errors import Refused
from sra_fast.files import read_json, write_text
from sra_fast.hardware import set_deterministic
from sra_fast.packing.archives import open_images
from sra_fast.packing.encoding import FromImages, FromPublic, Maker
from sra_fast.packing.shards import (
    LOCK,
    WHOLE,
    Claims,
    Part,
    Record,
    assemble,
    read_record,
    remove_record,
    remove_records,
    write_shard,
)

MENDING = ".mending"
SETTINGS_VERSION = 1


def prepare(config: PrepareCommand) -> Manifest:
    """Make a packed set, or go on making it, or help others to.

    Returns:
        what the whole set is, once it is whole.

    Raises:
        Refused: on wrong input, before anything is written; on a folder that holds something else; with `strict` on the
            first undecodable image; on a full disk. What is finished by then stays.
    """
    began = time.monotonic()
    rank, world = _environment(0, "RANK", "SLURM_PROCID"), _environment(1, "WORLD_SIZE", "SLURM_NTASKS", least=1)
    if torch.cuda.is_available() and config.device != "cpu":
        torch.cuda.set_device(_environment(0, "LOCAL_RANK", "SLURM_LOCALID") % torch.cuda.device_count())
    out = Path(config.out)
    _refuse_place(out, config.images)
    maker = _maker(config)
    shards = -(-len(maker.source) // config.rows_per_shard)
    try:
        out.mkdir(parents=True, exist_ok=True)
        claims = Claims(out)
    except OSError as error:
        raise Refused(f"out: {config.out!r} given; cannot be written ({error.strerror})") from error
    try:
        with claims.hold(WHOLE, wait=True):
            whole = _settle(out, maker.settings)
            if rank == 0:
                print(f"{maker.describe()}; {shards} shards")
                if isinstance(maker.source, ImageFolder) and (ignored := maker.source.ignored()):
                    print(f"images: {ignored}", file=sys.stderr)
            if whole:
                made = _mend(out, maker, shards, config) if rank == 0 else 0
                remove_records(out, shards)  # whoever completed it may have been killed before they were gone
        if not whole:
            with _reproducible():
                order = [(rank * shards // world + place) % shards for place in range(shards)]
                made = _make(out, maker, claims, order, config, rank)
            with claims.hold(WHOLE, wait=True):
                if not (out / NAME).exists():
                    _complete(out, maker, shards)
                remove_records(out, shards)
    finally:
        # Once there is a manifest the lock guards nothing; and a folder that was refused is left as it was.
        claims.close(remove=(out / NAME).exists() or not (out / SETTINGS).exists())
    manifest = read_manifest(out)
    _report(out, manifest, made, time.monotonic() - began, rank)
    return manifest


def _environment(default: int, *names: str, least: int = 0) -> int:
    """What a launcher says of this process: torchrun by the first name, Slurm by the second."""
    for name in names:
        if given := os.environ.get(name):
            refuse_unless(given.isdecimal() and int(given) >= least, name, given, f"must be a number, {least} or more")
            return int(given)
    return default


def _refuse_place(out: Path, images: str) -> None:
    refuse_unless(not out.exists() or out.is_dir(), "out", str(out), "must be a folder")
    inside = images and Path(images).is_dir() and out.resolve().is_relative_to(Path(images).resolve())
    refuse_unless(not inside, "out", str(out), "must not lie among the images, where it would look like a class")


def _maker(config: PrepareCommand) -> Maker:
    try:
        if not config.from_public:
            return FromImages(config, open_images(config.images))
        public = Path(config.from_public)
        refuse_unless(is_public(public), "from-public", str(public), "must be a folder with vae-sd/dataset.json")
        return FromPublic(config, PublicSet(public))
    except Refused as error:  # data/ speaks of training's options
        raise Refused(re.sub("^data.latents", "from-public", str(error)).removeprefix("data.")) from error


def _settle(out: Path, settings: dict[str, Any]) -> bool:
    """Begin the set, or find it to be one of the same settings; whether it is complete.

    Raises:
        Refused: if the folder holds something else: naming it.
    """
    path, settings = out / SETTINGS, {"version": SETTINGS_VERSION, **settings}
    if not path.exists():
        strange = sorted({entry.name for entry in out.iterdir()} - {LOCK, f"{SETTINGS}.tmp"})
        if strange:
            raise Refused(f"out: {str(out)!r} given; must be empty or a set begun by this command: has {strange[0]}")
        write_text(path, json.dumps(settings, indent=1) + "\n")
        return False
    before, now = read_json(path), json.loads(json.dumps(settings))
    refuse_unless(isinstance(before, dict), "out", str(path), "must be an object")
    for name in [*now, *before]:
        if before.get(name) != now.get(name):
            raise Refused(f"{_difference(name, before, now, out)}; go on with that, or take another --out")
    return (out / NAME).exists()


def _difference(name: str, before: dict[str, Any], now: dict[str, Any], out: Path) -> str:
    """How the settings that a set was begun with differ from those of now."""
    begun = f"the set in {out} was begun with"
    if name in ("images", "from-public"):
        counts = [settings.get("image-count", 0) for settings in (before, now)]
        counted = f": {counts[0]:,} images then, {counts[1]:,} now" if all(counts) else ""
        return f"{name}: others given than {begun}{counted}"
    if name == "vae-weights":
        return f"vae: another one given than {begun}"
    return f"{name}: {now.get(name)!r} given; {begun} {before.get(name)!r}"


def _make(out: Path, maker: Maker, claims: Claims, order: list[int], config: PrepareCommand, rank: int) -> int:
    """Make shards, in this order, until all are there, whoever made them. Returns how many images were encoded here."""
    known = {number for number in order if _is_made(out, number, config.strict)}
    made, before = 0, sum(len(_images_of(number, maker, config)) for number in known)
    with _bar(len(maker.source), rank, before) as bar:
        # First what nobody is making, then what others are: a claim that becomes free without a record was theirs who
        # died.
        for wait in (False, True):
            for number in order:
                if number in known:
                    continue
                with claims.hold(number, wait) as mine:
                    if not mine:
                        continue
                    if _is_made(out, number, config.strict):
                        bar.update(len(_images_of(number, maker, config)))
                    elif (out / NAME).exists():  # another process has completed the set meanwhile
                        return made
                    else:
                        _make_shard(out, maker, number, config, bar)
                        made += len(_images_of(number, maker, config))
                    known.add(number)
    return made


def _is_made(out: Path, number: int, strict: bool) -> bool:
    """Whether a shard is there. Raises Refused if it is one that `strict` forbids."""
    record = read_record(out, number)
    if strict and record and record.skipped:
        _refuse_skipped(record.skipped[0])
    return record is not None


def _refuse_skipped(file: Skipped) -> None:
    raise Refused(f"images: {file.file}: undecodable ({file.reason}) and left out before; strict allows none")


def _images_of(number: int, maker: Maker, config: PrepareCommand) -> range:
    """The source images of a shard."""
    size = config.rows_per_shard
    return range(number * size, min(len(maker.source), (number + 1) * size))


def _make_shard(folder: Path, maker: Maker, number: int, config: PrepareCommand, bar: tqdm) -> Record:
    images = _images_of(number, maker, config)
    parts = _watched(maker.parts(images.start, images.stop), bar, config.strict)
    return write_shard(folder, number, parts, shape=maker.shape, dtype=maker.dtype, flips=maker.flips)


def _complete(out: Path, maker: Maker, shards: int) -> None:
    """Write the manifest of a set whose shards are all there.

    Raises:
        Refused: if a class has lost all its images. The shards that lack them are then made again by the next call.
    """
    records = [read_record(out, number) for number in range(shards)]
    for number, record in enumerate(records):
        if record is None:
            raise Refused(f"out: {out}: shard {number} has vanished; run the same command again")
    skipped = [(number, file) for number, record in enumerate(records) for file in record.skipped]
    if skipped:
        label_of = dict(zip(maker.source.files, maker.source.labels.tolist(), strict=True))
        left = np.bincount(maker.source.labels, minlength=len(maker.source.classes))
        np.subtract.at(left, [label_of[file.file] for _, file in skipped], 1)
        lost = [(number, file) for number, file in skipped if not left[label_of[file.file]]]
        if lost and left.any():
            for number, _ in lost:
                remove_record(out, number)
            first = lost[0][1]
            raise Refused(
                f"images: no image of class {maker.source.classes[label_of[first.file]]!r} can be decoded, the first, "
                f"{first.file}, because: {first.reason}; mend it and run the same command again"
            )
    assemble(out, records, **maker.facts)


def _mend(out: Path, maker: Maker, shards: int, config: PrepareCommand) -> int:
    """Make the damaged files of a complete set again. Returns how many images were encoded.

    Each shard is made aside, and takes its place when it is what the manifest says.

    Raises:
        Refused: if one does not become that, or the manifest is not of this set.
    """
    manifest, aside = read_manifest(out), out / MENDING
    names = {f"moments-{number:05d}.npy": number for number in range(shards)}
    fits = (manifest.shape, np.dtype(manifest.dtype)) == (tuple(maker.shape), maker.dtype)
    if not fits or any(shard.file not in names for shard in manifest.shards):
        raise Refused(f"out: {out / NAME}: is not of this set; remove it, and all is made again")
    if config.strict and manifest.skipped:
        _refuse_skipped(manifest.skipped[0])
    shutil.rmtree(aside, ignore_errors=True)  # of one who was killed
    damaged = {}
    with _bar(manifest.size(out) if config.verify else 0, unit="B") as bar:
        for shard in manifest.shards:
            if damage := find_damage(out, manifest, shard, config.verify, bar.update):
                damaged[names[shard.file]] = shard, damage
    made = 0
    with _reproducible(), _bar(sum(len(_images_of(number, maker, config)) for number in damaged)) as bar:
        for number, (shard, damage) in damaged.items():
            for name, reason in damage.items():
                bar.write(f"{out / name}: {reason}; made again", file=sys.stderr)
            aside.mkdir()
            record = _make_shard(aside, maker, number, config, bar)
            if record.shard == shard:
                for name in damage:
                    (aside / name).replace(out / name)
            shutil.rmtree(aside)
            if record.shard != shard:
                raise Refused(
                    f"out: {out / shard.file}: made again, but not what {NAME} says: the images or this machine's "
                    f"arithmetic have changed; the set is as it was: take another --out"
                )
            made += len(_images_of(number, maker, config))
    return made


def _bar(total: int, rank: int = 0, before: int = 0, unit: str = "img") -> tqdm:
    """Images/s and time left: live on a terminal, and every ten seconds in a log file."""
    every, scaled = 0.2 if sys.stderr.isatty() else 10.0, unit == "B"
    return tqdm(
        total=total, initial=before, unit=unit, unit_scale=scaled, mininterval=every, disable=rank > 0 or not total
    )


def _watched(parts: Iterable[Part], bar: tqdm, strict: bool) -> Iterator[Part]:
    """The same, seen by the bar; what is left out is said."""
    for part in parts:
        for file in part.skipped:
            if strict:
                raise Refused(f"images: {file.file}: undecodable ({file.reason}); strict allows none")
            bar.write(f"{file.file}: undecodable ({file.reason}); left out", file=sys.stderr)
        yield part
        bar.update(len(part.labels) + len(part.skipped))


@contextmanager
def _reproducible() -> Iterator[None]:
    """Deterministic, and fp32 is fp32: on a GPU cuDNN would round what it multiplies to TF32's 11 bits."""
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.allow_tf32
    set_deterministic(True)
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        set_deterministic(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def _report(out: Path, manifest: Manifest, made: int, seconds: float, rank: int) -> None:
    rate = f", {made / seconds:,.1f} images/s here" if made else ", complete before"
    if rank > 0:
        print(f"rank {rank}: {made:,} images{rate}")
        return
    print(
        f"{manifest.count:,} images of {manifest.shape} {manifest.dtype} in {len(manifest.shards)} shards, "
        f"{len(manifest.skipped):,} skipped, {seconds:.1f} s{rate}, {manifest.size(out):,} bytes: {out}"
    )
