"""The metrics of the last steps."""

from __future__ import annotations

import pytest
import torch

from sra_fast.step.ring import MetricRing
from sra_fast.step.step import Metrics


@pytest.mark.parametrize("pushed", [1, 4, 5, 11])
def test_the_newest_rows_come_oldest_first(pushed: int) -> None:
    ring = MetricRing(4, torch.device("cpu"))
    for k in range(pushed):
        ring.push(Metrics(*(torch.tensor(float(10 * k + column)) for column in range(6))))
    for rows in range(1, min(pushed, 4) + 1):
        expected = [Metrics(*(10.0 * k + column for column in range(6))) for k in range(pushed - rows, pushed)]
        assert ring.last(rows) == expected
