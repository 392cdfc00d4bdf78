"""Metrics of the last steps, kept on the device until the host logs."""

from __future__ import annotations

import torch

from sra_fast.step.step import Metrics


class MetricRing:
    """The metrics of the last `rows` steps, on the device."""

    def __init__(self, rows: int, device: torch.device) -> None:
        self.buffer = torch.zeros(rows, len(Metrics._fields), device=device)
        self._slot = torch.zeros((), dtype=torch.int64, device=device)
        self._rows = torch.arange(rows, device=device)

    def push(self, metrics: Metrics) -> None:
        """Overwrite the oldest row."""
        is_slot = (self._rows == self._slot)[:, None]
        self.buffer.copy_(torch.where(is_slot, torch.stack(metrics), self.buffer))
        self._slot.add_(1).remainder_(self.buffer.shape[0])

    def last(self, rows: int) -> list[Metrics]:
        """The newest `rows` rows, oldest first, as floats. Waits for the device."""
        newest = self.buffer.roll(-int(self._slot), dims=0)[len(self.buffer) - rows :]
        return [Metrics(*row) for row in newest.tolist()]
