"""Rows that a VAE made of images, in whatever layout they are stored: latents.py has packed sets, public.py the public
code's."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sra_fast.config import refuse_unless
from sra_fast.errors import Refused
from sra_fast.kernels.perturb import Stored
from sra_fast.kernels.philox import Draw, uniforms
from sra_fast.vae import Factor, per_channel


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

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def channels(self) -> int:
        """Of x."""
        return self.shape[0] // 2 if self.posterior else self.shape[0]

    def stored(self, device: torch.device) -> Stored:
        """What makes x of a row."""
        shift, scale = (
            torch.from_numpy(per_channel(factor, self.channels).astype(np.float32)).to(device)
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


def refuse_classes(root: Path, labels: np.ndarray, classes: tuple[str, ...]) -> None:
    """Refuse a set unless every label has a class and every class a row."""
    count = len(classes)
    if labels.min() < 0 or labels.max() >= count:
        off = int(labels.min() if labels.min() < 0 else labels.max())
        raise Refused(f"data.latents: {root}: label {off} found; must be in [0, {count})")
    missing = np.flatnonzero(np.bincount(labels, minlength=count) == 0)
    if len(missing):
        raise Refused(f"data.latents: {root}: class {missing[0]} ({classes[missing[0]]}) has no images")


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
