"""The public SiT-SRA layout: one .npy file per image, labels in one JSON file.

    <DIR>/vae-sd/dataset.json                       {"labels": [["00000/img-mean-std-00000000.npy", 0], ...]}
    <DIR>/vae-sd/00000/img-mean-std-00000000.npy    (8, 32, 32) float32: 4 means, 4 standard deviations, unscaled

It can be trained on directly, or converted to a packed set.
"""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path

import numpy as np

from sra_fast.data import npy
from sra_fast.data.rows import RowSet, check_classes
from sra_fast.errors import Damaged
from sra_fast.files import read_file

# Of Stable Diffusion's VAE, which made the published files.
CHANNELS, SCALE, DOWNSAMPLING = 4, 0.18215, 8


class PublicSet(RowSet):
    """One row per file, sorted by name as in the public code; see `RowSet`.

    Attributes:
        root: the folder of dataset.json.
        files: paths below root.
        shape: of the first file that can be read; the others must have the same.

    Raises:
        Damaged: if dataset.json is invalid, or no file can be read.
    """

    def __init__(self, root: Path) -> None:
        self.root = root / "vae-sd" if (root / "vae-sd").is_dir() else root
        self.files, self.labels = _read_labels(self.root / "dataset.json")
        self.classes = tuple(str(label) for label in range(int(self.labels.max()) + 1))
        check_classes(self.root, self.labels, self.classes)
        self.dtype, self.posterior, self.scale, self.shift = np.dtype(np.float32), True, SCALE, 0.0
        self.vae, self.flips = "", False
        self._known_header, self._known_dtype, self._known_size = b"", self.dtype, 0  # of the first file read
        self.shape = self._first_shape()
        facts = json.dumps([self.shape, self.files, self.labels.tolist()])
        self.fingerprint = f"public {hashlib.sha256(facts.encode()).hexdigest()}"

    def file(self, row: int) -> Path:
        return self.root / self.files[row]

    def read(self, rows: np.ndarray, flipped: np.ndarray, out: memoryview) -> None:
        x = np.frombuffer(out, dtype=self.dtype).reshape(-1, *self.shape)
        for place, row in enumerate(rows.tolist()):
            x[place] = self.read_row(row)

    def read_row(self, row: int) -> np.ndarray:
        """(2C, h, h) float32.

        Raises:
            Damaged: if the file cannot be read (caused by an OSError), is damaged or has another shape.
        """
        path = self.file(row)
        try:
            file = read_file(path)
            # Parsing a header takes longer than reading a file, and the headers are usually all the same.
            if self._known_header and file.startswith(self._known_header) and len(file) == self._known_size:
                x = np.frombuffer(file, self._known_dtype, offset=len(self._known_header)).reshape(self.shape)
                return x.astype(np.float32, copy=False)
            x, header = _parse(file)
        except OSError as error:
            raise Damaged(path, error.strerror or error) from error
        except ValueError as error:
            raise Damaged(path, error) from error
        if x.shape != self.shape:
            raise Damaged(path, f"shape {x.shape}, not {self.shape} as the first file")
        if not self._known_header:
            self._known_header, self._known_dtype, self._known_size = file[: header.begin], header.dtype, len(file)
        return x

    def _first_shape(self) -> tuple[int, int, int]:
        reason = ""
        for row in range(len(self)):
            try:
                return _parse(read_file(self.file(row)))[0].shape
            except (OSError, ValueError) as error:
                reason = reason or f"the first, {self.file(row)}: {getattr(error, 'strerror', None) or error}"
        raise Damaged(self.root, f"none of {len(self)} files can be read ({reason})")


def is_public(root: Path) -> bool:
    """Whether a folder has the public layout."""
    return any((folder / "dataset.json").is_file() for folder in (root, root / "vae-sd"))


def _read_labels(path: Path) -> tuple[tuple[str, ...], np.ndarray]:
    """(files, labels (N,) int64) of dataset.json, sorted by name."""
    try:
        pairs = [(str(name), label) for name, label in json.loads(read_file(path))["labels"]]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        form = 'must be {"labels": [[file, label], ...]}'
        raise Damaged(path, f"{form}; cannot be read ({' '.join(str(error).split())})") from error
    if not pairs:
        raise Damaged(path, "must name at least one file")
    pairs.sort(key=lambda pair: pair[0])
    for place, (name, label) in enumerate(pairs):
        if type(label) is not int or not 0 <= label < len(pairs):  # every class has at least one file
            raise Damaged(path, f"label of {name}: {label!r} given; must be the number of a class")
        if name.startswith("/") or (".." in name and ".." in Path(name).parts):
            raise Damaged(path, f"file: {name!r} given; must be a path below the folder")
        if place and name == pairs[place - 1][0]:
            raise Damaged(path, f"file: {name!r} given; must be named once")
    return tuple(name for name, _ in pairs), np.array([label for _, label in pairs], dtype=np.int64)


def _parse(file: bytes) -> tuple[np.ndarray, npy.Header]:
    """((2C, h, h) float32, header). A leading dimension of 1 is dropped, as in the public code."""
    header = npy.read_header(io.BytesIO(file), len(file))
    shape = header.shape[1:] if len(header.shape) == 4 and header.shape[0] == 1 else header.shape
    if header.dtype.kind != "f" or len(shape) != 3 or shape[0] % 2 or shape[1] != shape[2] or 0 in shape:
        raise ValueError(f"{header.dtype} {shape}, not means and deviations (2C, h, h)")
    x = np.frombuffer(file, header.dtype, offset=header.begin).reshape(shape)
    return x.astype(np.float32, copy=False), header
