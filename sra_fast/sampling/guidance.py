"""Classifier-free guidance on an interval of noise levels.

    prediction = u + s (c - u)    c, u: the network with the label and with the null label, s: the scale

Sources: Ho and Salimans, "Classifier-Free Diffusion Guidance", 2022, equation (6), with s = 1 + w; Kynkäänniemi et al.,
"Applying Guidance in a Limited Interval Improves Sample and Distribution Quality in Diffusion Models", 2024.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sra_fast.errors import Refused

Network = Callable[[Tensor, Tensor, Tensor], Tensor]
"""x (B, C, H, W) float32, t (B,) float32, labels (B,) int64 -> velocity (B, C, H, W), or noise and v (B, 2C, H, W)."""

Guided = Callable[[Tensor, Tensor, Tensor, float], Tensor]
"""A `Network` that also takes the noise level, 0 = data and 1 = noise, and returns float64."""


def prediction_only(model: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, ...]]) -> Network:
    """A transformer as samplers call it: without features."""
    return lambda x, t, labels: model(x, t, labels)[0]


def guided(network: Network, *, scale: float, low: float, high: float, null_label: int, channels: int = 0) -> Guided:
    """Apply guidance to `network`.

    At low <= level <= high the network is called with the conditional and the null batch as one of 2B rows, otherwise,
    and always at scale 1, with the B conditional rows only.

    Args:
        scale: s; 1 = no guidance, 0 = the null class.
        low, high: noise levels, both included.
        null_label: the class for "no label".
        channels: guide only the first N channels; the rest are the conditional prediction (the public DiT guides 3 of
            4). 0 = all C. Channels after C, the variance of dit, are never guided.

    Returns:
        A function (x, t, labels, level) -> (B, C or 2C, H, W) float64. The level is a number on the host, so that the
        choice never waits for the device.

    Raises:
        Refused: from the returned function, when `channels` exceeds C.
    """

    def predict(x: Tensor, t: Tensor, labels: Tensor, level: float) -> Tensor:
        if scale == 1 or not low <= level <= high:
            return network(x, t, labels).double()
        count = x.shape[1]
        if channels > count:
            raise Refused("sample.guidance-channels", channels, f"must be at most {count}, the channels of x")
        both = torch.cat([labels, torch.full_like(labels, null_label)])  # (2B,)
        prediction = network(torch.cat([x, x]), torch.cat([t, t]), both).double()  # (2B, C or 2C, H, W)
        conditional, null = prediction.chunk(2)
        end = channels or count
        mixed = null[:, :end] + scale * (conditional[:, :end] - null[:, :end])
        return torch.cat([mixed, conditional[:, end:]], dim=1)

    return predict
