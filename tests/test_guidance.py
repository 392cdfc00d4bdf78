"""Guidance: its formula, where it applies, what it costs, and which channels it leaves alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sra_fast.errors import Refused
from sra_fast.sampling.guidance import guided

NULL = 10


class Recorder:
    """A network whose prediction in channel k is (k + 1) x label + t, and that keeps the rows of every call."""

    def __init__(self, channels: int) -> None:
        self.channels, self.calls = channels, []

    def __call__(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        self.calls.append((x, t, labels))
        factor = torch.arange(1, self.channels + 1, dtype=x.dtype).view(1, -1, 1, 1)
        column = labels.to(x.dtype).view(-1, 1, 1, 1) * factor + t.view(-1, 1, 1, 1)
        return column.expand(-1, -1, *x.shape[2:]).clone()


def batch(channels: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(3, channels, 2, 2), torch.full((3,), 0.5), torch.tensor([0, 4, 7])


def expected(labels: Tensor, scales: list[float]) -> Tensor:
    """(B, C): u + s (c - u) of `Recorder`, with one scale per channel."""
    columns = []
    for k, scale in enumerate(scales, start=1):
        conditional, null = k * labels.double() + 0.5, k * NULL + 0.5
        columns.append(null + scale * (conditional - null))
    return torch.stack(columns, dim=1)


@pytest.mark.parametrize(
    ("outputs", "channels", "scales"),
    [
        (4, 0, [3, 3, 3, 3]),  # sit: every channel
        (4, 3, [3, 3, 3, 1]),  # the public three-channel rule
        (8, 0, [3, 3, 3, 3, 1, 1, 1, 1]),  # dit: the variance is the conditional half's
        (8, 3, [3, 3, 3, 1, 1, 1, 1, 1]),
    ],
)
def test_formula_per_channel(outputs: int, channels: int, scales: list[float]) -> None:
    network = Recorder(outputs)
    x, t, labels = batch()
    predict = guided(network, scale=3, low=0, high=1, null_label=NULL, channels=channels)
    prediction = predict(x, t, labels, 0.5)
    assert prediction.dtype == torch.float64
    torch.testing.assert_close(prediction, expected(labels, scales)[..., None, None].expand(-1, -1, 2, 2))


def test_scale_zero_is_the_null_class() -> None:
    x, t, labels = batch()
    predict = guided(Recorder(4), scale=0, low=0, high=1, null_label=NULL)
    assert torch.equal(predict(x, t, labels, 0.5), predict(x, t, torch.full_like(labels, NULL), 0.5))


def test_one_call_of_both_halves() -> None:
    network = Recorder(4)
    x, t, labels = batch()
    guided(network, scale=3, low=0, high=1, null_label=NULL)(x, t, labels, 0.5)
    ((rows, times, classes),) = network.calls
    assert torch.equal(rows, torch.cat([x, x]))
    assert torch.equal(times, torch.cat([t, t]))
    assert classes.tolist() == [0, 4, 7, NULL, NULL, NULL]


@pytest.mark.parametrize(("level", "rows"), [(0.29, 3), (0.3, 6), (0.5, 6), (0.7, 6), (0.71, 3)])
def test_interval_includes_its_ends_and_costs_nothing_outside(level: float, rows: int) -> None:
    network = Recorder(4)
    x, t, labels = batch()
    prediction = guided(network, scale=3, low=0.3, high=0.7, null_label=NULL)(x, t, labels, level)
    assert [len(call[0]) for call in network.calls] == [rows]
    scale = 3 if rows == 6 else 1
    torch.testing.assert_close(prediction[..., 0, 0], expected(labels, [scale] * 4))


def test_scale_one_never_doubles_the_batch() -> None:
    network = Recorder(4)
    x, t, labels = batch()
    prediction = guided(network, scale=1, low=0, high=1, null_label=NULL)(x, t, labels, 0.5)
    assert [len(call[0]) for call in network.calls] == [3]
    assert torch.equal(prediction, network(x, t, labels).double())


def test_more_guided_channels_than_there_are_is_refused() -> None:
    x, t, labels = batch(channels=1)
    with pytest.raises(Refused, match=r"sample\.guidance-channels: 3 given"):
        guided(Recorder(2), scale=3, low=0, high=1, null_label=NULL, channels=3)(x, t, labels, 0.5)
