"""The public SiT-SRA layout: one .npy an image, labels in one JSON file.

    <DIR>/vae-sd/dataset.json                       {"labels": [["00000/img-mean-std-00000000.npy", 0], ...]}
    <DIR>/vae-sd/00000/img-mean-std-00000000.npy    (8, 32, 32) float32: 4 means, 4 standard deviations, unscaled

It trains as it is, a file a row, or is converted to a packed set.
"""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path

import numpy as np

from sra_fast.config import refuse_unless
from sra_fast.data import npy
from sra_fast.data.rows import Moments, refuse_classes
from sra_fast.errors import Refused

# Of Stable Diffusion's VAE, which made the published ones.
CHANNELS, SCALE, DOWNSAMPLING = 4, 0.18215, 8


class PublicSet(Moments):
    """A row a file, sorted by name as the public reader sorts them; see `Moments`.

    Attributes:
        root: the folder of dataset.json.
        files: paths below root.
        shape: of the first file that can be read; the others must have it too.

    Raises:
        Refused: if dataset.json cannot serve, or no file can be read.
    """

    def __init__(self, root: Path) -> None:
        self.root = root / "vae-sd" if (root / "vae-sd").is_dir() else root
        self.files, self.labels = _read_labels(self.root / "dataset.json")
        self.classes = tuple(str(label) for label in range(int(self.labels.max()) + 1))
        refuse_classes(self.root, self.labels, self.classes)
        self.dtype, self.posterior, self.scale, self.shift = np.dtype(np.float32), True, SCALE, 0.0
        self.vae, self.flips = "", False
        self._known, self._size = (b"", self.dtype), 0  # head and length of a file like the others
        self.shape = self._first_shape()
        facts = json.dumps([self.shape, self.files, self.labels.tolist()])
        self.fingerprint = f"public {hashlib.sha256(facts.encode()).hexdigest()}"

    def read(self, rows: np.ndarray, flipped: np.ndarray, out: memoryview) -> None:
        made = np.frombuffer(out, dtype=self.dtype).reshape(-1, *self.shape)
        for place, row in enumerate(rows.tolist()):
            try:
                made[place] = self.moments(row)
            except (OSError, ValueError) as error:
                reason = getattr(error, "strerror", None) or error
                raise Refused(f"data.latents: {self.file(row)}: cannot be read ({reason})") from error

    def file(self, row: int) -> Path:
        return self.root / self.files[row]

    def moments(self, row: int) -> np.ndarray:
        """(2C, h, h) float32.

        Raises:
            OSError: if the file cannot be read.
            ValueError: if it is damaged or has another shape.
        """
        file = self.file(row).read_bytes()
        known, dtype = self._known
        if known and file.startswith(known) and len(file) == self._size:  # parsing a head takes longer than reading
            return np.frombuffer(file, dtype, offset=len(known)).reshape(self.shape).astype(np.float32, copy=False)
        moments, head = _parsed(file)
        if moments.shape != self.shape:
            raise ValueError(f"shape {moments.shape}, not {self.shape} as the first file")
        if not known:
            self._known, self._size = (file[: head.begin], head.dtype), len(file)
        return moments

    def _first_shape(self) -> tuple[int, int, int]:
        reason = ""
        for row in range(len(self)):
            try:
                return _parsed(self.file(row).read_bytes())[0].shape
            except (OSError, ValueError) as error:
                reason = reason or f"the first, {self.file(row)}: {getattr(error, 'strerror', None) or error}"
        raise Refused(f"data.latents: {self.root}: none of {len(self)} files can be read ({reason})")


def is_public(root: Path) -> bool:
    """Whether a folder has the public layout."""
    return any((folder / "dataset.json").is_file() for folder in (root, root / "vae-sd"))


def _read_labels(path: Path) -> tuple[tuple[str, ...], np.ndarray]:
    """(files, labels (N,) int64) of dataset.json, sorted by name."""
    try:
        pairs = [(str(name), label) for name, label in json.loads(path.read_text())["labels"]]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        form = 'must be {"labels": [[file, label], ...]}'
        raise Refused(f"data.latents: {path}: {form}; cannot be read ({' '.join(str(error).split())})") from error
    refuse_unless(bool(pairs), "data.latents", str(path), "must name at least one file")
    pairs.sort(key=lambda pair: pair[0])
    for place, (name, label) in enumerate(pairs):  # of a million: no words before they are needed
        if type(label) is not int or not 0 <= label < len(pairs):  # as every class has a file
            raise Refused(f"data.latents: {path}: label of {name}: {label!r} given; must be the number of a class")
        if name.startswith("/") or (".." in name and ".." in Path(name).parts):
            raise Refused(f"data.latents: {path}: file: {name!r} given; must be the path of a file below")
        if place and name == pairs[place - 1][0]:
            raise Refused(f"data.latents: {path}: file: {name!r} given; must be named once")
    return tuple(name for name, _ in pairs), np.array([label for _, label in pairs], dtype=np.int64)


def _parsed(file: bytes) -> tuple[np.ndarray, npy.Header]:
    """((2C, h, h) float32, head). A leading dimension of 1 is left out, as the public reader does."""
    head = npy.read_header(io.BytesIO(file), len(file))
    shape = head.shape[1:] if len(head.shape) == 4 and head.shape[0] == 1 else head.shape
    if head.dtype.kind != "f" or len(shape) != 3 or shape[0] % 2 or shape[1] != shape[2] or 0 in shape:
        raise ValueError(f"{head.dtype} {shape}, not means and deviations (2C, h, h)")
    moments = np.frombuffer(file, head.dtype, offset=head.begin).reshape(shape)
    return moments.astype(np.float32, copy=False), head
