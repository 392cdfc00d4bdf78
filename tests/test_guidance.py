"""Guidance: its formula, where it applies, what it costs, and which channels it leaves alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sra_fast.errors import Refused
from sra_fast.sampling.guidance import guided

NULL = 10


class Recorder:
    """A network that predicts (k + 1) x label + t in channel k and records its calls."""

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
    assert [classes.tolist() for _, _, classes in network.calls] == [[0, 4, 7, NULL, NULL, NULL]]
    torch.testing.assert_close(prediction, expected(labels, scales)[..., None, None].expand(-1, -1, 2, 2))


def test_scale_zero_is_the_null_class() -> None:
    x, t, labels = batch()
    predict = guided(Recorder(4), scale=0, low=0, high=1, null_label=NULL)
    assert torch.equal(predict(x, t, labels, 0.5), predict(x, t, torch.full_like(labels, NULL), 0.5))


@pytest.mark.parametrize(
    ("scale", "level", "rows"), [(3, 0.29, 3), (3, 0.3, 6), (3, 0.7, 6), (3, 0.71, 3), (1, 0.5, 3)]
)
def test_interval_includes_its_ends_and_costs_nothing_outside(scale: float, level: float, rows: int) -> None:
    network = Recorder(4)
    x, t, labels = batch()
    prediction = guided(network, scale=scale, low=0.3, high=0.7, null_label=NULL)(x, t, labels, level)
    assert [len(call[0]) for call in network.calls] == [rows]
    scale = scale if rows == 6 else 1
    torch.testing.assert_close(prediction[..., 0, 0], expected(labels, [scale] * 4))


def test_more_guided_channels_than_there_are_is_refused() -> None:
    x, t, labels = batch(channels=1)
    with pytest.raises(Refused, match=r"sample\.guidance-channels: 3 given"):
        guided(Recorder(2), scale=3, low=0, high=1, null_label=NULL, channels=3)(x, t, labels, 0.5)
