"""Packed sets, read back: moments in shards of some thousand rows, with a manifest (manifest.py).

Rows are read with `pread` straight to where they are wanted, not through a memory map: a shard that has been cut short
is then an error with a name, where a map would end the process. Threads may share a set.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np

from sra_fast.config import refuse_unless
from sra_fast.data import npy
from sra_fast.data.manifest import NAME, Manifest, Shard, read_manifest
from sra_fast.data.public import CHANNELS, PublicSet, is_public
from sra_fast.data.rows import Moments, refuse_classes
from sra_fast.errors import Refused

OPEN_FILES = 512  # shards kept open at a time
PIECE = 1 << 22  # bytes of a checksum read at a time


class PackedSet(Moments):
    """What `sra-fast prepare` wrote.

    Raises:
        Refused: if the manifest and the files beside it do not belong together: naming the file.
    """

    def __init__(self, root: Path) -> None:
        self._open: dict[str, int] = {}
        self._lock = threading.Lock()  # over the open files: a batch and the held-out rows may be read at once
        self.root, self.manifest = root, read_manifest(root)
        m = self.manifest
        self.classes, self.shape, self.dtype, self.posterior = m.classes, m.shape, np.dtype(m.dtype), m.posterior
        self.scale, self.shift, self.vae, self.flips = m.scale, m.shift, m.vae, m.flips
        self.fingerprint = m.fingerprint()
        self._first = np.cumsum([0, *(shard.rows for shard in m.shards)])
        self._row_bytes = self.dtype.itemsize * int(np.prod(m.shape))
        # By shard: the file, and the mirrored one, each with where its rows begin.
        self._files = [
            [
                (name, header(root / name, (shard.rows, *m.shape), self.dtype))
                for name in (shard.file, shard.flip)
                if name
            ]
            for shard in m.shards
        ]
        self.labels = np.concatenate([self._labels(shard) for shard in m.shards])
        refuse_classes(root, self.labels, self.classes)

    def read(self, rows: np.ndarray, flipped: np.ndarray, out: memoryview) -> None:
        with self._lock:
            self._read(rows, flipped, out)

    def file(self, row: int) -> Path:
        return self.root / self._files[int(np.searchsorted(self._first, row, side="right")) - 1][0][0]

    def _read(self, rows: np.ndarray, flipped: np.ndarray, out: memoryview) -> None:
        shards = np.searchsorted(self._first, rows, side="right") - 1
        size = self._row_bytes
        starts = (rows - self._first[shards]) * size
        begin = 0
        for shard, start, mirrored in zip(shards.tolist(), starts.tolist(), flipped.tolist(), strict=True):
            name, header_bytes = self._files[shard][mirrored]
            try:
                descriptor = self._open[name] if name in self._open else self._descriptor(name)
                count = os.preadv(descriptor, [out[begin : begin + size]], header_bytes + start)
            except OSError as error:
                raise Refused(f"data.latents: {self.root / name}: cannot be read ({error.strerror})") from error
            if count != size:
                raise Refused(f"data.latents: {self.root / name}: cut short; row {start // size} is not whole")
            begin += size

    def _descriptor(self, name: str) -> int:
        """Opens a shard; the one opened longest ago makes room."""
        if len(self._open) >= OPEN_FILES:
            os.close(self._open.pop(next(iter(self._open))))
        self._open[name] = os.open(self.root / name, os.O_RDONLY)
        return self._open[name]

    def close(self) -> None:
        """Close the shards; reading opens them again."""
        with self._lock:
            while self._open:
                os.close(self._open.popitem()[1])

    __del__ = close

    def _labels(self, shard: Shard) -> np.ndarray:
        path = self.root / shard.labels
        header(path, (shard.rows,), np.dtype(np.int64))
        try:
            return np.load(path)
        except (OSError, ValueError, EOFError) as error:
            raise _unreadable(path, error) from error


def header(path: Path, shape: tuple[int, ...], dtype: np.dtype) -> int:
    """Where the numbers of an .npy file begin, if it holds just those that it should.

    Raises:
        Refused: naming the file, what it holds and what it should.
    """
    try:
        with path.open("rb") as file:
            found = npy.read_header(file, os.fstat(file.fileno()).st_size)
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error
    if (found.shape, found.dtype) != (shape, dtype):
        raise Refused(
            f"data.latents: {path}: {found.dtype} {found.shape} given; must be {dtype} {shape}, as {NAME} says"
        )
    return found.begin


def find_damage(
    root: Path, manifest: Manifest, shard: Shard, checksums: bool, read: Callable[[int], object]
) -> dict[str, str]:
    """{file of a shard: what is wrong with it}.

    Args:
        checksums: read the files whole, too.
        read: is told of bytes when they have been read.
    """
    damage = {}
    for name, sha256 in shard.files().items():
        path = root / name
        try:
            if name == shard.labels:
                header(path, (shard.rows,), np.dtype(np.int64))
                _refuse_labels(np.load(path), len(manifest.classes))
            else:
                header(path, (shard.rows, *manifest.shape), np.dtype(manifest.dtype))
            if checksums and (found := _sha256(path, read)) != sha256:
                raise Refused(f"SHA-256 {found}; the manifest has {sha256}")
        except (Refused, OSError) as error:
            damage[name] = str(error).removeprefix(f"data.latents: {path}: ")
    return damage


def _refuse_labels(labels: np.ndarray, classes: int) -> None:
    outside = np.flatnonzero((labels < 0) | (labels >= classes))
    if len(outside):
        raise Refused(f"label {labels[outside[0]]} of row {outside[0]}; must be in [0, {classes})")


def _sha256(path: Path, read: Callable[[int], object]) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(PIECE):
            digest.update(piece)
            read(len(piece))
    return digest.hexdigest()


def _unreadable(path: Path, error: Exception) -> Refused:
    return Refused(f"data.latents: {path}: cannot be read ({getattr(error, 'strerror', None) or error})")


def open_moments(root: Path) -> Moments:
    """The set in a folder, packed or in the public layout.

    Raises:
        Refused: if there is neither.
    """
    if not is_public(root) or (root / NAME).exists():
        return PackedSet(root)
    public = PublicSet(root)
    wanted = f"must be {CHANNELS}, Stable Diffusion's: `sra-fast prepare --from-public` takes others, with their --vae"
    refuse_unless(public.channels == CHANNELS, f"data.latents: {root}: channels", public.channels, wanted)
    return public
