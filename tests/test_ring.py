"""The metrics of the last steps."""

from __future__ import annotations

import torch

from sra_fast.step.ring import MetricRing
from sra_fast.step.step import Metrics


def test_the_newest_rows_come_oldest_first() -> None:
    ring = MetricRing(4, torch.device("cpu"))
    rows = [Metrics(*(10.0 * k + column for column in range(6))) for k in range(11)]
    for k, row in enumerate(rows, start=1):
        ring.push(Metrics(*map(torch.tensor, row)))
        for count in range(1, min(k, 4) + 1):
            assert ring.last(count) == rows[k - count : k]
