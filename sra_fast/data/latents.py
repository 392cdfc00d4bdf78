"""Moments that a VAE made of images, read back: packed in shards (manifest.py), or one file each as the public code
has them.

    <DIR>/vae-sd/dataset.json                       {"labels": [["00000/img-mean-std-00000000.npy", 0], ...]}
    <DIR>/vae-sd/00000/img-mean-std-00000000.npy    (8, 32, 32) float32: 4 means, 4 standard deviations, unscaled

Rows are read with `pread` straight to where they are wanted, not through a memory map: a shard that has been cut short
is then an error with a name, where a map would end the process. Threads may share a set.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import threading
import warnings
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sra_fast.config import Refused, refuse_unless
from sra_fast.data.manifest import NAME, Factor, Shard, read_manifest
from sra_fast.kernels.perturb import Stored
from sra_fast.kernels.philox import Draw, uniforms

OPEN_FILES = 512  # shards kept open at a time
PUBLIC_SCALE = 0.18215  # of Stable Diffusion's VAE, which the public sets are made with


class Moments(ABC):
    """A data set of stored rows.

    Attributes:
        root: its folder.
        classes: their names; a label is a position in it.
        labels: (N,) int64.
        shape, dtype: of a row, see `Manifest`.
        posterior, scale, shift: what the numbers are, see `Manifest`.
        vae: where the VAE came from, if known.
        flips: whether every row has a mirrored one.
        fingerprint: equal for equal data, wherever they lie.
    """

    root: Path
    classes: tuple[str, ...]
    labels: np.ndarray
    shape: tuple[int, int, int]
    dtype: np.dtype
    posterior: bool
    scale: Factor
    shift: Factor
    vae: str
    flips: bool
    fingerprint: str

    @property
    def channels(self) -> int:
        """Of x."""
        return self.shape[0] // 2 if self.posterior else self.shape[0]

    def stored(self, device: torch.device) -> Stored:
        """What makes x of a row."""
        shift, scale = (
            torch.from_numpy(np.broadcast_to(np.float32(factor), self.channels).copy()).to(device)
            for factor in (self.shift, self.scale)
        )
        return Stored(self.posterior, shift, scale)

    @abstractmethod
    def read(self, rows: np.ndarray, flipped: np.ndarray, out: memoryview) -> None:
        """The bytes of rows (B,) int64, in their order; mirrored where `flipped`, (B,) bool, says so.

        Raises:
            Refused: naming the file that is missing, cut short or of another kind.
        """

    @abstractmethod
    def file(self, row: int) -> Path:
        """Where a row is stored."""

    def gather(self, rows: np.ndarray, flipped: np.ndarray | None = None, pinned: bool = False) -> Tensor:
        """(B, *shape) of some rows, as they are stored; arguments as `read`."""
        x = torch.empty((len(rows), *self.shape), dtype=_TORCH[self.dtype.name], pin_memory=pinned)
        flipped = np.zeros(len(rows), dtype=bool) if flipped is None else flipped
        self.read(rows, flipped, memoryview(x.numpy().reshape(-1).view(np.uint8)))
        return x


_TORCH = {"float16": torch.float16, "float32": torch.float32, "uint8": torch.uint8}


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
        _refuse_classes(root, self.labels, self.classes)

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
        header(self.root / shard.labels, (shard.rows,), np.dtype(np.int64))
        return _load(self.root / shard.labels)


def header(path: Path, shape: tuple[int, ...], dtype: np.dtype) -> int:
    """Where the numbers of an .npy file begin, if it holds just those that it should.

    Raises:
        Refused: naming the file, what it holds and what it should.
    """
    found, kind, begin = _header(path)
    if (found, kind) != (shape, dtype):
        raise Refused(f"data.latents: {path}: {kind} {found} given; must be {dtype} {shape}, as {NAME} says")
    return begin


def _header(path: Path) -> tuple[tuple[int, ...], np.dtype, int]:
    """(shape, dtype, where the numbers begin) of an .npy file in C order that is as long as it says."""
    try:
        with path.open("rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of headers that Python 2 wrote
            version = np.lib.format.read_magic(file)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, fortran, dtype = read(file)
            begin, size = file.tell(), os.fstat(file.fileno()).st_size
    except Exception as error:  # NumPy parses a damaged header as Python and raises nearly anything
        raise _unreadable(path, error) from error
    if fortran or dtype.hasobject:
        raise Refused(f"data.latents: {path}: must hold numbers in C order")
    wanted = begin + dtype.itemsize * math.prod(shape)
    if size != wanted:
        raise Refused(f"data.latents: {path}: {size:,} bytes long; must be {wanted:,}")
    return shape, dtype, begin


def _load(path: Path) -> np.ndarray:
    """An .npy file whose header has been looked at."""
    try:
        return np.load(path)
    except (OSError, ValueError, EOFError) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> Refused:
    reason = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
    return Refused(f"data.latents: {path}: cannot be read ({reason})")


def _refuse_classes(root: Path, labels: np.ndarray, classes: tuple[str, ...]) -> None:
    """Every label has a class and every class a row."""
    count = len(classes)
    if labels.min() < 0 or labels.max() >= count:
        off = int(labels.min() if labels.min() < 0 else labels.max())
        raise Refused(f"data.latents: {root}: label {off} found; must be in [0, {count})")
    missing = np.flatnonzero(np.bincount(labels, minlength=count) == 0)
    if len(missing):
        raise Refused(f"data.latents: {root}: class {missing[0]} ({classes[missing[0]]}) has no images")


class PublicSet(Moments):
    """The public code's layout, one file an image: slower, and read as it is.

    Raises:
        Refused: if dataset.json or its first file cannot serve.
    """

    def __init__(self, root: Path) -> None:
        self.root = root / "vae-sd" if (root / "vae-sd").is_dir() else root
        path = self.root / "dataset.json"
        try:
            pairs = json.loads(path.read_text())["labels"]
            self.files = tuple(str(name) for name, _ in pairs)
            numbers = [label for _, label in pairs]
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise Refused(f"data.latents: {path}: cannot be read ({' '.join(str(error).split())})") from error
        refuse_unless(bool(self.files), "data.latents", str(path), "must name at least one file")
        for name, label in zip(self.files, numbers, strict=True):
            known = type(label) is int and label < len(self.files)  # as every class has a file
            refuse_unless(known, f"data.latents: {path}: label of {name}", label, "must be the number of a class")
            inside = not Path(name).is_absolute() and ".." not in Path(name).parts
            refuse_unless(inside, f"data.latents: {path}: file", name, "must be the path of a file below")
        self.labels = np.array(numbers, dtype=np.int64)
        self.classes = tuple(str(label) for label in range(int(self.labels.max()) + 1))
        _refuse_classes(self.root, self.labels, self.classes)
        self.dtype, self.posterior, self.scale, self.shift = np.dtype(np.float32), True, PUBLIC_SCALE, 0.0
        self.vae, self.flips = "", False
        self._known, self._size = (b"", self.dtype), 0  # header and length of the first file
        self.shape = self.moments(0).shape
        facts = json.dumps([self.shape, self.files, self.labels.tolist()])
        self.fingerprint = f"public {hashlib.sha256(facts.encode()).hexdigest()}"

    def read(self, rows: np.ndarray, flipped: np.ndarray, out: memoryview) -> None:
        made = np.frombuffer(out, dtype=self.dtype).reshape(-1, *self.shape)
        for place, row in enumerate(rows.tolist()):
            made[place] = self.moments(row)

    def file(self, row: int) -> Path:
        return self.root / self.files[row]

    def moments(self, row: int) -> np.ndarray:
        """(2C, h, h) float32. A leading dimension of 1 is left out, as the public reader does.

        Raises:
            Refused: naming a file that cannot be read or is of another shape.
        """
        path = self.file(row)
        known, kind = self._known
        try:
            file = path.read_bytes()
        except OSError as error:
            raise _unreadable(path, error) from error
        if known and file.startswith(known) and len(file) == self._size:  # parsing a header takes longer than reading
            return np.frombuffer(file, kind, offset=len(known)).reshape(self.shape).astype(np.float32, copy=False)
        shape, dtype, begin = _header(path)
        shape = shape[1:] if len(shape) == 4 and shape[0] == 1 else shape
        if dtype.kind != "f" or len(shape) != 3 or shape[0] % 2 or shape[1] != shape[2] or 0 in shape:
            raise Refused(f"data.latents: {path}: {dtype} {shape} given; must be means and deviations (2C, h, h)")
        if row and shape != self.shape:
            raise Refused(f"data.latents: {path}: {shape} given; must be {self.shape}, as the first file is")
        if not known:
            self._known, self._size = (file[:begin], dtype), len(file)
        return _load(path).reshape(shape).astype(np.float32, copy=False)


def open_moments(root: Path) -> Moments:
    """The set in a folder, packed or in the public layout.

    Raises:
        Refused: if there is neither.
    """
    return PublicSet(root) if is_public(root) and not (root / NAME).exists() else PackedSet(root)


def is_public(root: Path) -> bool:
    """Whether a folder has the public layout."""
    return any((folder / "dataset.json").is_file() for folder in (root, root / "vae-sd"))


@dataclass(frozen=True, eq=False)
class Rows:
    """Some rows of a set, in an order of their own."""

    moments: Moments
    index: np.ndarray
    """(n,) int64."""

    def __len__(self) -> int:
        return len(self.index)

    @property
    def classes(self) -> tuple[str, ...]:
        """Of the whole set."""
        return self.moments.classes

    @property
    def labels(self) -> np.ndarray:
        """(n,) int64."""
        return self.moments.labels[self.index]

    def take(self, rows: np.ndarray) -> Rows:
        """Some of these rows, (m,) int64 or a mask."""
        return replace(self, index=self.index[rows])


def split(moments: Moments, held_out_share: float) -> tuple[Rows, Rows]:
    """Rows to train on, and rows held out: those whose own random number is below the share, whatever the run's seed.

    Raises:
        Refused: if either side would be empty.
    """
    rows = torch.arange(len(moments.labels))
    out = (uniforms(0, rows, Draw.HELD_OUT)[:, 0] < held_out_share).numpy()
    refuse_unless(
        0 < out.sum() < len(out),
        "data.held-out",
        held_out_share,
        f"must leave rows on both sides, but it holds out {out.sum()} of {len(out)}",
    )
    return Rows(moments, np.flatnonzero(~out)), Rows(moments, np.flatnonzero(out))
