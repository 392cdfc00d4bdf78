"""`sra-fast prepare`: images, or the public layout, to a packed set (manifest.py).

Source images are taken in the order of their names, a shard from every `rows_per_shard` of them; what cannot be decoded
is left out of its shard, so that no label and no other shard moves. Every process takes the next shard that nobody is
making; when there is none left it waits for the others, and makes what a killed one has left.

The folder holds prepare.json, what the set is made of, from the first moment on, and manifest.json from the last. The
bytes are the same whoever made which shard and whatever was killed in between; on a GPU, for the same batch.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from sra_fast.config import PrepareConfig, Refused, refuse_unless
from sra_fast.data.archives import open_images
from sra_fast.data.encoding import FromImages, FromPublic, Maker
from sra_fast.data.manifest import NAME, Manifest, read_manifest
from sra_fast.data.public import PublicSet, is_public
from sra_fast.data.shards import (
    LOCK,
    WHOLE,
    Claims,
    Part,
    Record,
    assemble,
    read_record,
    remove_records,
    write_shard,
    write_text,
)
from sra_fast.hardware import set_deterministic
from sra_fast.metrics import read_json

SETTINGS = "prepare.json"
SETTINGS_VERSION = 1


def prepare(config: PrepareConfig) -> Manifest:
    """Make a packed set, or go on making it, or help others to.

    Returns:
        what the whole set is, once it is whole.

    Raises:
        Refused: on wrong input, before anything is written; on a folder that holds something else; with `strict` on the
            first undecodable image; on a full disk. What is finished by then stays.
    """
    began = time.monotonic()
    rank, world, local = _environment("RANK", 0), _environment("WORLD_SIZE", 1), _environment("LOCAL_RANK", 0)
    if torch.cuda.is_available() and config.device != "cpu":
        torch.cuda.set_device(local % torch.cuda.device_count())
    out = Path(config.out)
    _refuse_place(out, config.images)
    maker = _maker(config)
    shards = -(-len(maker.source) // config.rows_per_shard)
    out.mkdir(parents=True, exist_ok=True)
    claims, made = Claims(out), 0
    try:
        with claims.hold(WHOLE, wait=True):
            whole = _settle(out, maker.settings)
            if whole:  # and whoever completed it may have been killed before they were gone
                remove_records(out, shards)
        if rank == 0:
            print(f"{maker.describe()}; {shards} shards")
        if not whole:
            with _reproducible():
                order = [(rank * shards // world + place) % shards for place in range(shards)]
                records, made = _make(out, maker, claims, order, config)
            with claims.hold(WHOLE, wait=True):
                if not (out / NAME).exists():
                    assemble(out, [records[number] for number in range(shards)], **maker.facts)
                remove_records(out, shards)
    finally:
        # Once there is a manifest the lock guards nothing; and a folder that was refused is left as it was.
        claims.close(remove=(out / NAME).exists() or not (out / SETTINGS).exists())
    manifest = read_manifest(out)
    _report(out, manifest, made, time.monotonic() - began)
    return manifest


def _environment(name: str, default: int) -> int:
    """What a launcher, such as torchrun, says of this process."""
    given = os.environ.get(name, str(default))
    refuse_unless(given.isdecimal(), name, given, "must be a number")
    return int(given)


def _refuse_place(out: Path, images: str) -> None:
    refuse_unless(not out.exists() or out.is_dir(), "out", str(out), "must be a folder")
    inside = images and Path(images).is_dir() and out.resolve().is_relative_to(Path(images).resolve())
    refuse_unless(not inside, "out", str(out), "must not lie among the images, where it would look like a class")


def _maker(config: PrepareConfig) -> Maker:
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
            hashed = name in ("images", "from-public", "vae-weights")
            given, was = ("others", "others") if hashed else (repr(now.get(name)), repr(before.get(name)))
            raise Refused(
                f"{name}: {given} given; the set in {out} was begun with {was}: go on so, or take another --out"
            )
    return (out / NAME).exists()


def _make(
    out: Path, maker: Maker, claims: Claims, order: list[int], config: PrepareConfig
) -> tuple[dict[int, Record], int]:
    """({shard: record} of all shards, or of some if another process has completed the set meanwhile; images made
    here)."""
    count, size = len(maker.source), config.rows_per_shard
    records = {number: record for number in order if (record := read_record(out, number))}
    for record in records.values():
        _refuse_skipped(record, config.strict)
    done, made = sum(min(size, count - number * size) for number in records), 0
    with tqdm(total=count, initial=done, unit="img", disable=None) as bar:
        # First what nobody is making, then what others are: a claim that becomes free without a record was theirs who
        # died.
        for wait in (False, True):
            for number in order:
                if number in records:
                    continue
                with claims.hold(number, wait) as mine:
                    if not mine:
                        continue
                    first, last = number * size, min(count, (number + 1) * size)
                    if record := read_record(out, number):
                        _refuse_skipped(record, config.strict)
                        bar.update(last - first)
                    # In this order: records go when the manifest is there.
                    elif (out / NAME).exists():
                        return records, made
                    else:
                        parts = _watched(maker.parts(first, last), bar, config.strict)
                        record = write_shard(
                            out, number, parts, shape=maker.shape, dtype=maker.dtype, flips=maker.flips
                        )
                        made += last - first
                    records[number] = record
    return records, made


def _watched(parts: Iterable[Part], bar: tqdm, strict: bool) -> Iterator[Part]:
    """The same, seen by the bar; what is left out is said."""
    for part in parts:
        for file in part.skipped:
            if strict:
                raise Refused(f"images: {file.file}: undecodable ({file.reason}); strict allows none")
            bar.write(f"{file.file}: undecodable ({file.reason}); left out", file=sys.stderr)
        yield part
        bar.update(len(part.labels) + len(part.skipped))


def _refuse_skipped(record: Record, strict: bool) -> None:
    if strict and record.skipped:
        file = record.skipped[0]
        raise Refused(f"images: {file.file}: undecodable ({file.reason}) and left out before; strict allows none")


@contextmanager
def _reproducible() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    set_deterministic(True)
    try:
        yield
    finally:
        set_deterministic(before)


def _report(out: Path, manifest: Manifest, made: int, seconds: float) -> None:
    size = sum((out / name).stat().st_size for shard in manifest.shards for name in shard.files())
    rate = f", {made / seconds:,.1f} images/s here" if made else ", complete before"
    print(
        f"{manifest.count:,} images of {manifest.shape} {manifest.dtype} in {len(manifest.shards)} shards, "
        f"{len(manifest.skipped):,} skipped, {seconds:.1f} s{rate}, {size:,} bytes: {out}"
    )
