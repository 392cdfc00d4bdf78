"""`sra-fast prepare`: encode images, or convert the public layout, to a packed set (manifest.py).

Source images are taken in the order of their names, and each `rows_per_shard` of them make a shard. Undecodable images
are left out of their shard, so the other shards do not change. Every process takes the next shard that no other
process is making; when there is none left it waits for the others, and makes what a killed one has left unfinished.
Damaged files of a complete set are made again.

prepare.json, the settings of the set, is written first and manifest.json last. The bytes are the same whichever process
made which shard and whenever one was killed; on a GPU, for the same batch.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sra_fast.config import PrepareCommand
from sra_fast.data.manifest import NAME, SETTINGS, Manifest, Skipped, read_manifest
from sra_fast.data.packed import find_damage
from sra_fast.data.public import PublicSet, is_public
from sra_fast.distributed import place
from sra_fast.errors import Damaged, Refused
from sra_fast.files import read_json, write_text
from sra_fast.hardware import set_deterministic
from sra_fast.packing.archives import open_images
from sra_fast.packing.encoding import Encoder, ImageEncoder, PublicConverter
from sra_fast.packing.shards import (
    LOCK,
    WHOLE_SET,
    Claims,
    Part,
    Record,
    assemble,
    read_record,
    remove_record,
    remove_records,
    write_shard,
)
from sra_fast.progress import Progress, say, warn

REPAIR_FOLDER = ".mending"
SETTINGS_VERSION = 1


def prepare(config: PrepareCommand) -> Manifest:
    """Make a packed set, continue one that was interrupted, or join other processes that are making it.

    Returns:
        the manifest of the finished set.

    Raises:
        Refused: on wrong input, before anything is written; if the folder holds something else; with `strict`, on the
            first undecodable image; on a full disk. Finished shards are kept.
    """
    start = time.monotonic()
    rank, world, local_rank = place()
    if torch.cuda.is_available() and config.device != "cpu":
        torch.cuda.set_device(local_rank % torch.cuda.device_count())
    out = Path(config.out)
    _check_out(out, config.images)
    encoder = _open_encoder(config)
    try:
        out.mkdir(parents=True, exist_ok=True)
        claims = Claims(out)
    except OSError as error:
        raise Refused("out", config.out, f"cannot be written ({error.strerror})") from error
    try:
        with claims.hold(WHOLE_SET, wait=True):
            complete = _begin(out, encoder.settings)
            if rank == 0:
                say(f"{encoder.describe()}; {encoder.shards} shards")
                if not isinstance(encoder.source, PublicSet) and (ignored := encoder.source.ignored()):
                    warn(f"images: {ignored}")
            if complete:
                encoded = _repair(out, encoder, config) if rank == 0 else 0
                remove_records(out, encoder.shards)  # left if the process that wrote the manifest was killed
        if not complete:
            with _reproducible():
                encoded = _make_shards(out, encoder, claims, config, rank, world)
            with claims.hold(WHOLE_SET, wait=True):
                if not (out / NAME).exists():
                    _write_manifest(out, encoder)
                remove_records(out, encoder.shards)
    finally:
        # A finished set needs no lock; and a folder that was refused is left as it was.
        claims.close(remove=(out / NAME).exists() or not (out / SETTINGS).exists())
    manifest = read_manifest(out)
    _report(out, manifest, encoded, time.monotonic() - start, rank)
    return manifest


def _check_out(out: Path, images: str) -> None:
    if out.exists() and not out.is_dir():
        raise Refused("out", str(out), "must be a folder")
    if images and Path(images).is_dir() and out.resolve().is_relative_to(Path(images).resolve()):
        raise Refused("out", str(out), "must not be inside the folder of images, where it would look like a class")


def _open_encoder(config: PrepareCommand) -> Encoder:
    try:
        if config.images:
            return ImageEncoder(config, open_images(config.images))
        public = Path(config.from_public)
        if not is_public(public):
            raise Damaged(public, "must be a folder with vae-sd/dataset.json")
        return PublicConverter(config, PublicSet(public))
    except Damaged as error:
        raise Refused(f"{'images' if config.images else 'from-public'}: {error}") from error


def _begin(out: Path, settings: dict[str, Any]) -> bool:
    """Write the settings of a new set, or compare them with those of the set in the folder. Returns whether the set is
    complete.

    Raises:
        Refused: if the folder holds something else, or a set of other settings.
    """
    path, settings = out / SETTINGS, {"version": SETTINGS_VERSION, **settings}
    if not path.exists():
        others = sorted({entry.name for entry in out.iterdir()} - {LOCK, f"{SETTINGS}.tmp"})
        if others:
            raise Refused("out", str(out), f"must be empty or a set begun by this command: has {others[0]}")
        write_text(path, json.dumps(settings, indent=1) + "\n")
        return False
    before, now = read_json(path), json.loads(json.dumps(settings))
    if not isinstance(before, dict):
        raise Refused("out", str(path), "must be an object")
    for name in [*now, *before]:
        if before.get(name) != now.get(name):
            raise Refused(f"{_difference(name, before, now, out)}; use the earlier value, or choose another --out")
    return (out / NAME).exists()


def _difference(name: str, before: dict[str, Any], now: dict[str, Any], out: Path) -> str:
    begun = f"the set in {out} was begun with"
    if name in ("images", "from-public"):
        counts = [settings.get("image-count", 0) for settings in (before, now)]
        counted = f": {counts[0]:,} images then, {counts[1]:,} now" if all(counts) else ""
        return f"{name}: not what {begun}{counted}"
    if name == "vae-weights":
        return f"vae: not the one that {begun}"
    return f"{name}: {now.get(name)!r} given; {begun} {before.get(name)!r}"


def _make_shards(out: Path, encoder: Encoder, claims: Claims, config: PrepareCommand, rank: int, world: int) -> int:
    """Make shards until all exist, whichever process made them. Returns the number of images encoded here."""
    shards = encoder.shards
    order = [(rank * shards // world + place) % shards for place in range(shards)]
    done = {number for number in order if _is_finished(out, number, config.strict)}
    encoded, before = 0, sum(len(encoder.images(number)) for number in done)
    with Progress(len(encoder.source), "encoding", done=before, hidden=rank > 0) as bar:
        # First the shards that no process is making; then wait for the others. A claim that becomes free without a
        # record belonged to a process that was killed.
        for wait in (False, True):
            for number in order:
                if number in done:
                    continue
                with claims.hold(number, wait) as locked:
                    if not locked:
                        continue
                    if _is_finished(out, number, config.strict):
                        bar.update(len(encoder.images(number)))
                    elif (out / NAME).exists():  # another process has completed the set and deleted the records
                        return encoded
                    else:
                        _make_shard(out, encoder, number, config, bar)
                        encoded += len(encoder.images(number))
                    done.add(number)
    return encoded


def _is_finished(out: Path, number: int, strict: bool) -> bool:
    """Whether a shard is finished. If `strict` forbids the images that were left out, they are read again."""
    record = read_record(out, number)
    return record is not None and not (strict and record.skipped)


def _refuse_skipped(file: Skipped) -> None:
    rule = "strict allows none; choose another --out"
    raise Refused(f"images: {file.file}: undecodable ({file.reason}) and left out of the finished set; {rule}")


def _make_shard(folder: Path, encoder: Encoder, number: int, config: PrepareCommand, bar: Progress) -> Record:
    with closing(encoder.parts(number)) as parts:  # its thread is joined here, also after a refusal
        reported = _report_parts(parts, bar, config.strict)
        return write_shard(folder, number, reported, shape=encoder.shape, dtype=encoder.dtype, flips=encoder.flips)


def _report_parts(parts: Iterable[Part], bar: Progress, strict: bool) -> Iterator[Part]:
    """The same parts, with progress and skipped images reported. Raises Refused if `strict` forbids one."""
    for part in parts:
        for file in part.skipped:
            if strict:
                raise Refused(f"images: {file.file}: undecodable ({file.reason}); strict allows none")
            bar.write(f"{file.file}: undecodable ({file.reason}); left out")
        yield part
        bar.update(len(part.labels) + len(part.skipped))


def _write_manifest(out: Path, encoder: Encoder) -> None:
    """Write the manifest when all shards exist.

    Raises:
        Refused: if a class has lost all its images. The next call makes only the shards again that lack them.
    """
    records = []
    for number in range(encoder.shards):
        record = read_record(out, number)
        if record is None:
            raise Damaged(out, f"shard {number} has vanished; run the same command again")
        records.append(record)
    skipped = [(number, file) for number, record in enumerate(records) for file in record.skipped]
    if skipped:
        label_of = dict(zip(encoder.source.files, encoder.source.labels.tolist(), strict=True))
        remaining = np.bincount(encoder.source.labels, minlength=len(encoder.source.classes))
        np.subtract.at(remaining, [label_of[file.file] for _, file in skipped], 1)
        lost = [(number, file) for number, file in skipped if not remaining[label_of[file.file]]]
        for number, _ in lost:  # read again by the next start, when they may have been repaired
            remove_record(out, number)
        if lost and remaining.any():
            file, reason = lost[0][1].file, lost[0][1].reason
            raise Refused(
                f"images: no image of class {encoder.source.classes[label_of[file]]!r} can be decoded; first failure: "
                f"{file} ({reason}); repair it and run the same command again"
            )
    assemble(out, records, **encoder.facts)


def _repair(out: Path, encoder: Encoder, config: PrepareCommand) -> int:
    """Make the damaged files of a complete set again. Returns the number of images encoded.

    Each shard is made in another folder, and its files are moved into place only if they match the manifest.

    Raises:
        Refused: if they do not, or the manifest belongs to another set.
    """
    manifest, folder = read_manifest(out), out / REPAIR_FOLDER
    numbers = {f"moments-{number:05d}.npy": number for number in range(encoder.shards)}
    same_rows = (manifest.shape, np.dtype(manifest.dtype)) == (tuple(encoder.shape), encoder.dtype)
    if not same_rows or any(shard.file not in numbers for shard in manifest.shards):
        raise Damaged(out / NAME, "belongs to another set; remove it, and all is made again")
    if config.strict and manifest.skipped:
        _refuse_skipped(manifest.skipped[0])
    shutil.rmtree(folder, ignore_errors=True)  # left by a killed process
    damaged = {}
    with Progress(manifest.size(out), "checksums", "B", hidden=not config.verify) as bar:
        for shard in manifest.shards:
            if damage := find_damage(out, manifest, shard, config.verify, bar.update):
                damaged[numbers[shard.file]] = shard, damage
    count = sum(len(encoder.images(number)) for number in damaged)
    with _reproducible(), Progress(count, "encoding", hidden=not count) as bar:
        for number, (shard, damage) in damaged.items():
            for name, reason in damage.items():
                bar.write(f"{out / name}: {reason}; made again")
            folder.mkdir()
            record = _make_shard(folder, encoder, number, config, bar)
            if record.shard == shard:
                for name in damage:
                    (folder / name).replace(out / name)
            shutil.rmtree(folder)
            if record.shard != shard:
                raise Damaged(
                    out / shard.file,
                    f"made again, but does not match {NAME}: the images, or the results of this machine, have changed. "
                    f"The set is as it was; choose another --out",
                )
    return count


@contextmanager
def _reproducible() -> Iterator[None]:
    """Deterministic algorithms, and no TF32, in which cuDNN would otherwise round fp32 factors to 11 bits."""
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.allow_tf32
    set_deterministic(True)
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        set_deterministic(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def _report(out: Path, manifest: Manifest, encoded: int, seconds: float, rank: int) -> None:
    rate = f", {encoded / seconds:,.1f} images/s here" if encoded else ", already complete"
    if rank > 0:
        say(f"rank {rank}: {encoded:,} images{rate}")
        return
    say(
        f"{manifest.count:,} images of {manifest.shape} {manifest.dtype} in {len(manifest.shards)} shards, "
        f"{len(manifest.skipped):,} skipped, {seconds:.1f} s{rate}, {manifest.size(out):,} bytes: {out}"
    )
