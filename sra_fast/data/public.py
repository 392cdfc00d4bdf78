"""The public SiT-SRA layout, file by file, for conversion: one .npy an image, labels in one JSON file.

<DIR>/vae-sd/dataset.json                       {"labels": [["00000/img-mean-std-00000000.npy", 0], ...]}
<DIR>/vae-sd/00000/img-mean-std-00000000.npy    (8, 32, 32) or (1, 8, 32, 32) float32: means, standard deviations
"""

from __future__ import annotations

import hashlib
import io
from pathlib import Path

import numpy as np

from sra_fast.config import Refused, refuse_unless
from sra_fast.metrics import read_json

SCALE = 0.18215  # of Stable Diffusion's VAE, which made them
DOWNSAMPLING = 8


class PublicFiles:
    """Names and labels, sorted by name as the public reader sorts them. `row` below is a position in `files`.

    Attributes:
        root: the folder of dataset.json.
        classes: "0", "1", ...
        files: paths below root.
        labels: (len(files),) int64.
        shape: (2C, h, h) of the first file that can be read; the others must have it too.

    Raises:
        Refused: if dataset.json cannot serve, or no file can be read.
    """

    def __init__(self, given: str) -> None:
        root = Path(given)
        self.root = root / "vae-sd" if (root / "vae-sd").is_dir() else root
        path = self.root / "dataset.json"
        refuse_unless(path.is_file(), "from-public", given, "must be a folder with vae-sd/dataset.json")
        try:
            pairs = sorted((str(name), int(label)) for name, label in read_json(path)["labels"])
        except (KeyError, TypeError, ValueError) as error:
            raise Refused(f'from-public: {path}: must be {{"labels": [[file, label], ...]}} ({error})') from error
        refuse_unless(bool(pairs), "from-public", str(path), "must name at least one file")
        self.files = tuple(name for name, _ in pairs)
        self.labels = np.array([label for _, label in pairs], dtype=np.int64)
        refuse_unless(len(set(self.files)) == len(pairs), "from-public", str(path), "names a file twice")
        refuse_unless(self.labels.min() >= 0, "from-public", str(path), "has a label below 0")
        rows = np.bincount(self.labels)
        refuse_unless(bool(rows.all()), "from-public", str(path), f"class {rows.argmin()} of {len(rows)} has no file")
        self.classes = tuple(str(label) for label in range(len(rows)))
        self.shape = self._first_shape()

    def __len__(self) -> int:
        return len(self.files)

    def read(self, row: int) -> np.ndarray:
        """(2C, h, h) float32.

        Raises:
            OSError: if the file cannot be read.
            ValueError: if it is damaged, has another shape, or holds what no moments can be or float16 cannot hold.
        """
        moments = self._load(row)
        if moments.shape != self.shape:
            raise ValueError(f"shape {moments.shape}, not {self.shape}")
        if not (np.abs(moments) <= np.finfo(np.float16).max).all():  # NaN too
            raise ValueError("not finite, or beyond float16")
        if moments[len(moments) // 2 :].min() < 0:
            raise ValueError("a standard deviation below 0")
        return moments

    def fingerprint(self) -> str:
        """SHA-256, in hex, of all names and labels, and the shape."""
        return hashlib.sha256(repr((self.files, self.labels.tolist(), self.shape)).encode()).hexdigest()

    def _load(self, row: int) -> np.ndarray:
        file = (self.root / self.files[row]).read_bytes()
        try:
            moments = np.load(io.BytesIO(file), allow_pickle=False)
        except (ValueError, EOFError, OSError) as error:
            raise ValueError("empty file" if not file else str(error)) from error
        if not isinstance(moments, np.ndarray) or moments.dtype.kind != "f":
            raise ValueError("no array of floating-point numbers")
        moments = moments[0] if moments.ndim == 4 and len(moments) == 1 else moments
        if moments.ndim != 3 or len(moments) % 2 or moments.shape[1] != moments.shape[2] or not moments.size:
            raise ValueError(f"shape {moments.shape}, not (2C, h, h)")
        return moments.astype(np.float32, copy=False)

    def _first_shape(self) -> tuple[int, int, int]:
        reason = ""
        for row in range(len(self)):
            try:
                return self._load(row).shape
            except (OSError, ValueError) as error:
                reason = reason or f"the first: {getattr(error, 'strerror', None) or error}"
        raise Refused(f"from-public: {self.root}: none of {len(self)} files can be read ({reason})")
