"""Batches of stored rows, gathered ahead of the trainer.

Image number n is row `order.rows(seed, n)` of the training rows. If the set has mirrored rows, a coin of
(seed, n, FLIP) chooses between the two. There are no worker processes: a row is a single read of some kilobytes.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from sra_fast.data.order import rows
from sra_fast.data.rows import Rows, check_finite
from sra_fast.data.stream import Batch, Stream
from sra_fast.kernels.philox import Draw, uniforms

BLOCK = 1 << 15
"""Image numbers whose rows are computed together, which makes the order's arithmetic cheap compared to the reads."""


class LatentStream(Stream):
    """Batches of rows as they are stored, on the CPU; see `Stream`.

    Args:
        training: the rows to train on.
        seed: the run's 64-bit seed.
        batch: images per batch.
        first_image: image number of the first image.
        every: see `Stream`.
        pinned: gather into page-locked memory, from which a GPU copies asynchronously.

    Raises:
        Damaged: from `next`, naming a file that has become unreadable.
    """

    def __init__(
        self, training: Rows, *, seed: int, batch: int, first_image: int, every: int = 0, pinned: bool = False
    ) -> None:
        self.bad = {}
        self._training, self._seed, self._batch, self._pinned = training, seed, batch, pinned
        self._block = first_image, np.empty(0, dtype=np.int64), np.empty(0, dtype=bool)
        super().__init__(batch, first_image, torch.device("cpu"), every)

    def read_batch(self, first: int) -> tuple[Batch, int]:
        chosen, flipped = self._order(first)
        index = self._training.index[chosen]
        x = self._training.row_set.gather(index, flipped, self._pinned)
        check_finite(self._training.row_set, index, x)
        labels = torch.from_numpy(self._training.row_set.labels[index])
        return Batch(x, labels, torch.arange(first, first + self._batch)), 0

    def _order(self, first: int) -> tuple[np.ndarray, np.ndarray]:
        """(rows (B,) int64, flipped (B,) bool) of the batch that starts at image number `first`."""
        begin, order, flips = self._block
        if first + self._batch > begin + len(order):
            begin, count = first, max(BLOCK, self._batch)
            order = rows(self._seed, first, count, len(self._training))
            flips = np.zeros(count, dtype=bool)
            if self._training.row_set.flips:
                flips = (uniforms(self._seed, torch.arange(first, first + count), Draw.FLIP)[:, 0] < 0.5).numpy()
            self._block = begin, order, flips
        part = slice(first - begin, first - begin + self._batch)
        return order[part], flips[part]


def load(chosen: Rows, device: torch.device) -> tuple[Tensor, Tensor]:
    """Load all of these rows: (x (N, *shape) as stored, labels (N,) int64), on the device."""
    x = chosen.row_set.gather(chosen.index)
    check_finite(chosen.row_set, chosen.index, x)
    return x.to(device), torch.from_numpy(chosen.labels).to(device)
