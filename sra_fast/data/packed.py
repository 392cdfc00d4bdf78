"""Read packed sets: rows in shards of some thousand, with a manifest (manifest.py).

Rows are read with `pread` directly into the output, not through a memory map: a shard that has been cut short then
raises an error with its name, where a map would end the process with SIGBUS. Threads may share a set.
"""

from __future__ import annotations

import errno
import hashlib
import os
import resource
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from sra_fast.data import npy
from sra_fast.data.manifest import NAME, Manifest, Shard, read_manifest
from sra_fast.data.public import CHANNELS, PublicSet, is_public
from sra_fast.data.rows import RowSet, check_classes
from sra_fast.errors import Damaged
from sra_fast.files import open_regular, retried

OPEN_FILES = 512  # shards kept open; at most half of what the system lets this process open
CHUNK = 1 << 22  # bytes hashed at a time


class PackedSet(RowSet):
    """A set that `sra-fast prepare` wrote.

    Raises:
        Damaged: if the manifest is invalid or a file beside it does not match it, naming the file.
    """

    def __init__(self, root: Path) -> None:
        self._open: dict[str, int] = {}
        self._lock = threading.Lock()  # guards _open: a batch and the held-out rows may be read at the same time
        self.root, self.manifest = root, read_manifest(root)
        m = self.manifest
        self.classes, self.shape, self.dtype, self.posterior = m.classes, m.shape, np.dtype(m.dtype), m.posterior
        self.scale, self.shift, self.vae, self.flips = m.scale, m.shift, m.vae, m.flips
        self.fingerprint = m.fingerprint()
        self._first = np.cumsum([0, *(shard.rows for shard in m.shards)])
        self._row_bytes = self.dtype.itemsize * int(np.prod(m.shape))
        # For each shard: the file and, if there is one, the mirrored file, each with the offset of its rows.
        self._files = [
            [(name, _check_rows(root / name, shard, m)) for name in (shard.file, shard.flip) if name]
            for shard in m.shards
        ]
        self.labels = np.concatenate([_read_labels(root / shard.labels, shard, m) for shard in m.shards])
        check_classes(root, self.labels, self.classes)

    def file(self, row: int) -> Path:
        return self.root / self._files[int(np.searchsorted(self._first, row, side="right")) - 1][0][0]

    def read(self, rows: np.ndarray, flipped: np.ndarray, out: memoryview) -> None:
        shards = np.searchsorted(self._first, rows, side="right") - 1
        size = self._row_bytes
        starts = (rows - self._first[shards]) * size
        begin = 0
        with self._lock:
            for shard, start, mirrored in zip(shards.tolist(), starts.tolist(), flipped.tolist(), strict=True):
                name, offset = self._files[shard][mirrored]
                try:
                    count = self._read_row(name, out[begin : begin + size], offset + start)
                except OSError:
                    try:
                        count = retried(partial(self._read_row, name, out[begin : begin + size], offset + start))
                    except OSError as error:
                        raise _unreadable(self.root / name, error) from error
                if count != size:
                    raise Damaged(self.root / name, f"cut short; row {start // size} is incomplete")
                begin += size

    def _read_row(self, name: str, out: memoryview, offset: int) -> int:
        descriptor = self._open[name] if name in self._open else self._descriptor(name)
        return os.preadv(descriptor, [out], offset)

    def _descriptor(self, name: str) -> int:
        """Open a shard, and close those opened longest ago if there are too many, for us or for the system."""
        allowed = min(OPEN_FILES, max(1, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2))
        while name not in self._open:
            while len(self._open) >= allowed:
                os.close(self._open.pop(next(iter(self._open))))
            try:
                self._open[name] = open_regular(self.root / name)
            except OSError as error:
                if error.errno != errno.EMFILE or not self._open:
                    raise
                allowed = len(self._open)
        return self._open[name]

    def close(self) -> None:
        """Close the shards; the next read opens them again."""
        with self._lock:
            while self._open:
                os.close(self._open.popitem()[1])

    __del__ = close


def find_damage(
    root: Path, manifest: Manifest, shard: Shard, checksums: bool, progress: Callable[[int], object]
) -> dict[str, str]:
    """Compare a shard's files with the manifest: {damaged file: what is wrong with it}.

    Args:
        checksums: also read the files completely and compare their SHA-256.
        progress: called with the number of bytes that were read.
    """
    damage = {}
    for name, sha256 in shard.files().items():
        path = root / name
        try:
            if name == shard.labels:
                _read_labels(path, shard, manifest)
            else:
                _check_rows(path, shard, manifest)
            if checksums and (digest := _sha256(path, progress)) != sha256:
                raise Damaged(path, f"SHA-256 {digest}; the manifest has {sha256}")
        except Damaged as error:
            damage[name] = error.reason
    return damage


def _check_rows(path: Path, shard: Shard, manifest: Manifest) -> int:
    """The offset of the rows in a shard's file. Raises Damaged unless it holds what the manifest says."""
    return _check_header(path, (shard.rows, *manifest.shape), np.dtype(manifest.dtype))


def _read_labels(path: Path, shard: Shard, manifest: Manifest) -> np.ndarray:
    """(n,) int64 labels of a shard. Raises Damaged unless they are valid."""
    _check_header(path, (shard.rows,), np.dtype(np.int64))
    try:
        labels = np.load(path)
    except (OSError, ValueError, EOFError) as error:
        raise _unreadable(path, error) from error
    classes = len(manifest.classes)
    outside = np.flatnonzero((labels < 0) | (labels >= classes))
    if len(outside):
        raise Damaged(path, f"label {labels[outside[0]]} of row {outside[0]}; must be in [0, {classes})")
    return labels


def _check_header(path: Path, shape: tuple[int, ...], dtype: np.dtype) -> int:
    try:
        with os.fdopen(open_regular(path), "rb") as file:
            header = npy.read_header(file, os.fstat(file.fileno()).st_size)
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error
    if (header.shape, header.dtype) != (shape, dtype):
        raise Damaged(path, f"holds {header.dtype} {header.shape}; must be {dtype} {shape}, as {NAME} says")
    return header.begin


def _sha256(path: Path, progress: Callable[[int], object]) -> str:
    digest = hashlib.sha256()
    try:
        with os.fdopen(open_regular(path), "rb") as file:
            while chunk := file.read(CHUNK):
                digest.update(chunk)
                progress(len(chunk))
    except OSError as error:
        raise _unreadable(path, error) from error
    return digest.hexdigest()


def _unreadable(path: Path, error: Exception) -> Damaged:
    return Damaged(path, f"cannot be read ({getattr(error, 'strerror', None) or error})")


def open_row_set(root: Path) -> RowSet:
    """Open the set in a folder, packed or in the public layout.

    Raises:
        Damaged: if there is neither, or its files cannot be used.
    """
    if not is_public(root) or (root / NAME).exists():
        return PackedSet(root)
    public = PublicSet(root)
    if public.channels != CHANNELS:
        raise Damaged(
            public.root,
            f"has latents of {public.channels} channels; must be {CHANNELS}, Stable Diffusion's: "
            "convert others with `sra-fast prepare --from-public`, naming their --vae",
        )
    return public
