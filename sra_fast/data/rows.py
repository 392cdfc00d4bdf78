"""A data set of stored rows: latents, moments of a posterior, or pixels. packed.py and public.py have the layouts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sra_fast.errors import Damaged, Refused
from sra_fast.kernels.perturb import Stored
from sra_fast.kernels.philox import Draw, uniforms
from sra_fast.vae import Factor, per_channel


class RowSet(ABC):
    """A data set of stored rows.

    Attributes:
        root: its folder.
        classes: their names; a label is a position in it.
        labels: (N,) int64.
        shape, dtype: of a row, see `Manifest`.
        posterior, scale, shift: how x is computed from a row, see `Manifest`.
        vae: folder or hub id of the VAE, empty if unknown.
        flips: whether every row has a mirrored one.
        fingerprint: equal for equal data, wherever it is stored.
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

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def channels(self) -> int:
        """Channels of x."""
        return self.shape[0] // 2 if self.posterior else self.shape[0]

    def stored(self, device: torch.device) -> Stored:
        """The parameters that turn a row into x, on the device."""
        shift, scale = (
            torch.from_numpy(per_channel(factor, self.channels).astype(np.float32)).to(device)
            for factor in (self.shift, self.scale)
        )
        return Stored(self.posterior, shift, scale)

    @abstractmethod
    def read(self, rows: np.ndarray, flipped: np.ndarray, out: memoryview) -> None:
        """Write the bytes of rows (B,) int64, in this order, to `out`; mirrored ones where flipped (B,) bool is set.

        Raises:
            Damaged: if a file is missing, cut short or of another kind.
        """

    @abstractmethod
    def file(self, row: int) -> Path:
        """The file that holds a row."""

    def gather(self, rows: np.ndarray, flipped: np.ndarray | None = None, pinned: bool = False) -> Tensor:
        """(B, *shape) of these rows, as they are stored; arguments and errors as for `read`."""
        x = torch.empty((len(rows), *self.shape), dtype=_TORCH[self.dtype.name], pin_memory=pinned)
        flipped = np.zeros(len(rows), dtype=bool) if flipped is None else flipped
        self.read(rows, flipped, x.numpy().reshape(-1).view(np.uint8).data)
        return x


def check_finite(row_set: RowSet, rows: np.ndarray, x: Tensor) -> None:
    """Raise Damaged, naming the file, if one of these rows (B, *shape), as they are stored, is not finite."""
    extremes = x.aminmax()  # NaN if there is one; in a tenth of the time of isfinite
    if extremes.min.isfinite() and extremes.max.isfinite():
        return
    row = int(rows[int((~x.flatten(1).isfinite().all(dim=1)).nonzero()[0, 0])])
    raise Damaged(row_set.file(row), f"row {row} of the set has a number that is not finite")


_TORCH = {"float16": torch.float16, "float32": torch.float32, "uint8": torch.uint8}


def check_classes(root: Path, labels: np.ndarray, classes: tuple[str, ...]) -> None:
    """Raise Damaged if a class has no row. Labels are known to be in [0, len(classes))."""
    missing = np.flatnonzero(np.bincount(labels, minlength=len(classes)) == 0)
    if len(missing):
        raise Damaged(root, f"class {missing[0]} ({classes[missing[0]]}) has no images")


@dataclass(frozen=True, eq=False)
class Rows:
    """Some rows of a set, in an order of their own."""

    row_set: RowSet
    index: np.ndarray
    """(n,) int64."""

    def __len__(self) -> int:
        return len(self.index)

    @property
    def classes(self) -> tuple[str, ...]:
        """Classes of the whole set."""
        return self.row_set.classes

    @property
    def labels(self) -> np.ndarray:
        """(n,) int64."""
        return self.row_set.labels[self.index]

    def take(self, rows: np.ndarray) -> Rows:
        """A subset; rows: (m,) int64 positions or a mask."""
        return replace(self, index=self.index[rows])


def split(row_set: RowSet, held_out_share: float) -> tuple[Rows, Rows]:
    """Split into (training, held-out) rows. A row is held out if its own random number is below the share, whatever
    the run's seed.

    Raises:
        Refused: if either side would be empty.
    """
    numbers = torch.arange(len(row_set))
    held_out = (uniforms(0, numbers, Draw.HELD_OUT)[:, 0] < held_out_share).numpy()
    if not 0 < held_out.sum() < len(held_out):
        counts = f"{held_out.sum()} of {len(held_out)}"
        raise Refused("data.held-out", held_out_share, f"must leave rows on both sides, but holds out {counts}")
    return Rows(row_set, np.flatnonzero(~held_out)), Rows(row_set, np.flatnonzero(held_out))
