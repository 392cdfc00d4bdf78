"""Write the shards of a packed set (manifest.py): each completely or not at all, each by one process.

    moments-00000.npy, labels-00000.npy, moments_flip-00000.npy
    shard-00000.json       the shard's record, written last: a shard without it does not exist
    .prepare.lock          byte 0 is locked by the process that decides about the whole set, byte 1 + s by the one that
                           makes shard s

Byte-range locks (POSIX) end with their process, however it dies; they work across machines on NFS, and a child process
that outlives a killed parent does not hold them.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from io import BufferedRandom
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sra_fast.data.manifest import NAME, Manifest, Shard, Skipped, read_manifest
from sra_fast.data.packed import find_damage
from sra_fast.errors import Damaged, Refused
from sra_fast.files import read_file, replacing, sync, write_text
from sra_fast.progress import Progress

LOCK = ".prepare.lock"
WHOLE_SET = -1  # in place of a shard's number
RECORD_VERSION = 2  # 1 had no checksum


class Part(NamedTuple):
    """Some consecutive source images, encoded."""

    rows: np.ndarray
    """(k, *shape), of the images that could be read."""
    flips: np.ndarray | None
    """(k, *shape), of the mirrored images."""
    labels: np.ndarray
    """(k,) int64."""
    skipped: tuple[Skipped, ...]
    """The images that could not be read."""


@dataclass(frozen=True)
class Record:
    """The content of a finished shard."""

    rows: int
    sizes: dict[str, int]
    """{file: bytes}; empty if none of its images could be read: then it has no files."""
    shard: Shard | None
    skipped: tuple[Skipped, ...]


class Claims:
    """Locks that divide the work between processes. Create one per process: closing a second one would release the
    locks of the first."""

    def __init__(self, root: Path) -> None:
        self._path = root / LOCK
        self._file = self._open()

    def _open(self) -> int:
        return os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)

    @contextmanager
    def hold(self, number: int, wait: bool) -> Iterator[bool]:
        """Lock shard `number`, or `WHOLE_SET`, for the block. Yields whether this process has the lock, which it always
        has with `wait`."""
        operation = fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB
        try:
            fcntl.lockf(self._file, operation, 1, number + 1)
            while not self._is_current():  # removed while we waited: a new process would lock another file
                os.close(self._file)
                self._file = self._open()
                fcntl.lockf(self._file, operation, 1, number + 1)
        except (BlockingIOError, PermissionError):
            yield False
            return
        except OSError as error:
            raise Damaged(self._path, f"this file system has no locks ({error.strerror})") from error
        try:
            yield True
        finally:
            fcntl.lockf(self._file, fcntl.LOCK_UN, 1, number + 1)

    def _is_current(self) -> bool:
        try:
            return os.fstat(self._file).st_ino == self._path.stat().st_ino
        except FileNotFoundError:
            return False

    def close(self, remove: bool = False) -> None:
        """Release everything. With `remove` also delete the lock file, unless another process has locked the whole set:
        then that process deletes it."""
        if remove and self._path.exists():
            with self.hold(WHOLE_SET, wait=False) as locked:
                if locked:
                    self._path.unlink(missing_ok=True)
        os.close(self._file)


def write_shard(
    root: Path, number: int, parts: Iterable[Part], *, shape: Sequence[int], dtype: np.dtype, flips: bool
) -> Record:
    """Write a shard part by part, in constant memory.

    Args:
        shape, dtype: of a row.
        flips: whether parts have mirrored rows.

    Raises:
        Refused: if the disk is full or cannot be written. Then, and if `parts` raises, the shard does not exist.
    """
    labels: list[np.ndarray] = []
    skipped: list[Skipped] = []
    names = [f"moments-{number:05d}.npy"] + ([f"moments_flip-{number:05d}.npy"] if flips else [])
    with ExitStack() as stack:
        files = [stack.enter_context(_writing(root / name, shape, dtype)) for name in names]
        for part in parts:
            for file, rows in zip(files, (part.rows, part.flips), strict=False):
                file.append(rows)  # pyright: ignore[reportArgumentType]: with `flips`, parts have mirrored rows
            labels.append(part.labels)
            skipped += part.skipped
    all_labels = np.concatenate(labels).astype(np.int64, copy=False)
    names.append(f"labels-{number:05d}.npy")
    with _writing(root / names[-1], (), np.dtype(np.int64)) as file:
        file.append(all_labels)
    files.append(file)
    if not len(all_labels):
        for name in names:
            (root / name).unlink()
        record = Record(0, {}, None, tuple(skipped))
    else:
        hashes = {file.path.name: file.sha256 for file in files}
        sizes = {name: (root / name).stat().st_size for name in names}
        flip = (names[1], hashes[names[1]]) if flips else ("", "")
        shard = Shard(names[0], len(all_labels), hashes[names[0]], names[-1], hashes[names[-1]], *flip)
        record = Record(len(all_labels), sizes, shard, tuple(skipped))
    try:
        sync(root)  # the names of the files must reach the disk before the record does
    except OSError as error:
        raise Refused(f"{root}: could not be written ({error.strerror})") from error
    fields = {"version": RECORD_VERSION, **asdict(record)}
    write_text(root / _record_name(number), json.dumps({**fields, "sha256": _sum(fields)}))
    return record


def read_record(root: Path, number: int) -> Record | None:
    """The record of a shard. None if the shard does not exist, its record is damaged, or a file has another size: the
    shard is then made again."""
    try:
        fields = json.loads(read_file(root / _record_name(number)))
        if fields.pop("sha256") != _sum(fields):
            return None
        shard = Shard(**fields["shard"]) if fields["shard"] else None
        record = Record(fields["rows"], fields["sizes"], shard, tuple(Skipped(**file) for file in fields["skipped"]))
        complete = all((root / name).stat().st_size == size for name, size in record.sizes.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return record if complete and fields["version"] == RECORD_VERSION else None


def _sum(fields: dict[str, Any]) -> str:
    """SHA-256, in hex, of a record's fields."""
    return hashlib.sha256(json.dumps(fields).encode()).hexdigest()


def assemble(root: Path, records: Sequence[Record], **facts: Any) -> Manifest:
    """Write the manifest.

    Args:
        records: of all shards, in order.
        facts: the fields of `Manifest` other than those that follow from the shards.

    Raises:
        Damaged: if there are no images, a class has none, or a file has changed since its shard was finished, perhaps
            by an earlier start of the command.
    """
    shards = tuple(record.shard for record in records if record.shard)
    skipped = tuple(file for record in records for file in record.skipped)
    manifest = Manifest(count=sum(record.rows for record in records), shards=shards, skipped=skipped, **facts)
    if not shards:
        first = f"; first failure: {skipped[0].file} ({skipped[0].reason})" if skipped else ""
        raise Damaged(root, f"none of {len(skipped)} images can be read{first}")
    counts = np.zeros(len(manifest.classes), np.int64)
    with Progress(manifest.size(root), "checksums", "B") as bar:
        for number, record in enumerate(records):
            if record.shard:
                for name, reason in find_damage(root, manifest, record.shard, True, bar.update).items():
                    remove_record(root, number)
                    rule = "changed since it was written; the same command makes it again"
                    raise Damaged(root / name, f"{reason}: {rule}")
                counts += np.bincount(np.load(root / record.shard.labels), minlength=len(counts))
    if not counts.all():
        raise Damaged(root, f"no image of class {manifest.classes[counts.argmin()]!r} can be read")
    write_text(root / NAME, json.dumps(asdict(manifest), indent=1) + "\n")
    return read_manifest(root)


def remove_record(root: Path, number: int) -> None:
    """Delete the record of a shard, which is then made again."""
    (root / _record_name(number)).unlink(missing_ok=True)


def remove_records(root: Path, count: int) -> None:
    """Delete the records of `count` shards, which are not needed once there is a manifest."""
    for number in range(count):
        remove_record(root, number)


def _record_name(number: int) -> str:
    return f"shard-{number:05d}.json"


class _RowWriter:
    """An .npy file whose number of rows is known only at its end, with the same bytes as `np.save` writes."""

    def __init__(self, path: Path, file: BufferedRandom, shape: Sequence[int], dtype: np.dtype) -> None:
        self.path, self.sha256 = path, ""
        self._file, self._shape, self._dtype = file, tuple(shape), dtype
        self._rows = 0
        self._begin = self._write_header()

    def append(self, rows: np.ndarray) -> None:
        """(k, *shape) of the file's dtype."""
        if rows.shape[1:] != self._shape or rows.dtype != self._dtype:
            raise ValueError(f"{self.path}: {rows.dtype} {rows.shape[1:]} rows for {self._dtype} {self._shape}")
        self._file.write(np.ascontiguousarray(rows).data)
        self._rows += len(rows)

    def finish(self) -> None:
        """Write the final header, fsync the file and compute its SHA-256."""
        self._file.seek(0)
        if self._write_header() != self._begin:  # NumPy pads a header so that any number of rows fits
            raise RuntimeError("the .npy header has grown")
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.seek(0)
        self.sha256 = hashlib.file_digest(self._file, "sha256").hexdigest()

    def _write_header(self) -> int:
        """Returns its length."""
        description = {"descr": self._dtype.str, "fortran_order": False, "shape": (self._rows, *self._shape)}
        np.lib.format.write_array_header_1_0(self._file, description)
        return self._file.tell()


@contextmanager
def _writing(path: Path, shape: Sequence[int], dtype: np.dtype) -> Iterator[_RowWriter]:
    with replacing(path) as temporary, open(temporary, "w+b") as file:
        writer = _RowWriter(path, file, shape, dtype)
        yield writer
        writer.finish()
