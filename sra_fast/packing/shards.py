"""Shards of a packed set (manifest.py) while it is being made: written whole or not at all, each by one process.

    moments-00000.npy, labels-00000.npy, moments_flip-00000.npy
    shard-00000.json       what is in them; written last, so a shard without it does not exist
    .prepare.lock          byte 0 is held by who decides about the whole set, byte 1 + s by who makes shard s

Locks of byte ranges (POSIX) end with their process, however it dies; they work across machines on NFS, and a child that
a killed process leaves behind does not keep them.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from sra_fast.data.manifest import NAME, Manifest, Shard, Skipped, read_manifest
from sra_fast.errors import Refused
from sra_fast.files import replacing, sync, write_text

LOCK = ".prepare.lock"
WHOLE = -1  # the number that stands for the set as a whole
RECORD_VERSION = 1


class Part(NamedTuple):
    """Some consecutive source images, encoded."""

    rows: np.ndarray
    """(k, *shape), of those that could be read."""
    flips: np.ndarray | None
    """The same of the mirrored images."""
    labels: np.ndarray
    """(k,) int64."""
    skipped: tuple[Skipped, ...]
    """The others."""


@dataclass(frozen=True)
class Record:
    """What is in a finished shard."""

    rows: int
    sizes: dict[str, int]
    """{file: bytes}; empty where none of its images could be read: then it has no files."""
    shard: Shard | None
    skipped: tuple[Skipped, ...]


class Claims:
    """Who works at what. A second one in the same process would end the locks of the first when it is closed."""

    def __init__(self, root: Path) -> None:
        self._path = root / LOCK
        self._file = self._opened()

    def _opened(self) -> int:
        return os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)

    @contextmanager
    def hold(self, number: int, wait: bool) -> Iterator[bool]:
        """Claim shard `number`, or `WHOLE`, for the block: whether it is ours. With `wait` it is, in the end."""
        how = fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB
        try:
            fcntl.lockf(self._file, how, 1, number + 1)
            while not self._is_current():  # it was removed while we waited: who comes now locks another file
                os.close(self._file)
                self._file = self._opened()
                fcntl.lockf(self._file, how, 1, number + 1)
        except (BlockingIOError, PermissionError):
            yield False
            return
        except OSError as error:
            raise Refused(f"out: {self._path}: this file system has no locks ({error.strerror})") from error
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
        """Free everything; `remove` the lock file too, unless another process holds the whole: it will."""
        if remove and self._path.exists():
            with self.hold(WHOLE, wait=False) as mine:
                if mine:
                    self._path.unlink(missing_ok=True)
        os.close(self._file)


def write_shard(
    root: Path, number: int, parts: Iterable[Part], *, shape: Sequence[int], dtype: np.dtype, flips: bool
) -> Record:
    """Write a shard as its parts come, in constant memory.

    Args:
        shape, dtype: of a row.
        flips: whether parts bring mirrored rows.

    Raises:
        Refused: if the disk is full or cannot be written. Then, and if `parts` raise, there is no such shard.
    """
    labels: list[np.ndarray] = []
    skipped: list[Skipped] = []
    names = [f"moments-{number:05d}.npy"] + ([f"moments_flip-{number:05d}.npy"] if flips else [])
    with ExitStack() as stack:
        files = [stack.enter_context(_writing(root / name, shape, dtype)) for name in names]
        for part in parts:
            for file, rows in zip(files, (part.rows, part.flips), strict=False):
                file.append(rows)
            labels.append(part.labels)
            skipped += part.skipped
    whole = np.concatenate(labels).astype(np.int64, copy=False)
    names.append(f"labels-{number:05d}.npy")
    with _writing(root / names[-1], (), np.dtype(np.int64)) as file:
        file.append(whole)
    files.append(file)
    if not len(whole):
        for name in names:
            (root / name).unlink()
        record = Record(0, {}, None, tuple(skipped))
    else:
        hashes = {file.path.name: file.sha256 for file in files}
        sizes = {name: (root / name).stat().st_size for name in names}
        flip = (names[1], hashes[names[1]]) if flips else ("", "")
        shard = Shard(names[0], len(whole), hashes[names[0]], names[-1], hashes[names[-1]], *flip)
        record = Record(len(whole), sizes, shard, tuple(skipped))
    sync(root)  # the files' names reach the disk before the record that vouches for them
    write_text(root / _record_name(number), json.dumps({"version": RECORD_VERSION, **asdict(record)}))
    return record


def read_record(root: Path, number: int) -> Record | None:
    """What was written of a shard; None if it is not there, or not whole."""
    try:
        given = json.loads((root / _record_name(number)).read_text())
        shard = Shard(**given["shard"]) if given["shard"] else None
        record = Record(given["rows"], given["sizes"], shard, tuple(Skipped(**file) for file in given["skipped"]))
        whole = all((root / name).stat().st_size == size for name, size in record.sizes.items())
    except (OSError, ValueError, KeyError, TypeError):
        return None  # it is made again
    return record if whole and given["version"] == RECORD_VERSION else None


def assemble(root: Path, records: Sequence[Record], **facts: object) -> Manifest:
    """Write the manifest.

    Args:
        records: of all shards, in order.
        facts: the fields of `Manifest` that are not of the shards.

    Raises:
        Refused: if there are no images, or a class has none.
    """
    shards = tuple(record.shard for record in records if record.shard)
    skipped = tuple(file for record in records for file in record.skipped)
    manifest = Manifest(count=sum(record.rows for record in records), shards=shards, skipped=skipped, **facts)
    if not shards:
        first = f", the first, {skipped[0].file}, because: {skipped[0].reason}" if skipped else ""
        raise Refused(f"out: {root}: none of {len(skipped)} images can be read{first}")
    counts = np.zeros(len(manifest.classes), np.int64)
    for shard in shards:
        labels = np.load(root / shard.labels)
        if labels.min() < 0 or labels.max() >= len(counts):
            raise Refused(f"out: {root / shard.labels}: labels must be in [0, {len(counts)}), as there are classes")
        counts += np.bincount(labels, minlength=len(counts))
    if not counts.all():
        raise Refused(f"out: {root}: no image of class {manifest.classes[counts.argmin()]!r} can be read")
    write_text(root / NAME, json.dumps(asdict(manifest), indent=1) + "\n")
    return read_manifest(root)


def remove_record(root: Path, number: int) -> None:
    """Forget a shard: it is then made again."""
    (root / _record_name(number)).unlink(missing_ok=True)


def remove_records(root: Path, count: int) -> None:
    """Remove what was noted of `count` shards, once the manifest has it."""
    for number in range(count):
        remove_record(root, number)


def _record_name(number: int) -> str:
    return f"shard-{number:05d}.json"


class _Rows:
    """An .npy file whose number of rows is known at its end; the bytes are those of `np.save`."""

    def __init__(self, path: Path, file: BinaryIO, shape: Sequence[int], dtype: np.dtype) -> None:
        self.path, self.sha256 = path, ""
        self._file, self._shape, self._dtype = file, tuple(shape), dtype
        self._rows = 0
        self._begin = self._header()

    def append(self, rows: np.ndarray) -> None:
        """(k, *shape) of the file's dtype."""
        if rows.shape[1:] != self._shape or rows.dtype != self._dtype:
            raise ValueError(f"{self.path}: {rows.dtype} {rows.shape[1:]} rows for {self._dtype} {self._shape}")
        self._file.write(np.ascontiguousarray(rows).data)
        self._rows += len(rows)

    def finish(self) -> None:
        self._file.seek(0)
        if self._header() != self._begin:  # NumPy leaves room in a header for any number of rows
            raise RuntimeError("the .npy header has grown")
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.seek(0)
        self.sha256 = hashlib.file_digest(self._file, "sha256").hexdigest()

    def _header(self) -> int:
        """Write it, and return its length."""
        description = {"descr": self._dtype.str, "fortran_order": False, "shape": (self._rows, *self._shape)}
        np.lib.format.write_array_header_1_0(self._file, description)
        return self._file.tell()


@contextmanager
def _writing(path: Path, shape: Sequence[int], dtype: np.dtype) -> Iterator[_Rows]:
    with replacing(path) as partial, open(partial, "w+b") as file:
        rows = _Rows(path, file, shape, dtype)
        yield rows
        rows.finish()
