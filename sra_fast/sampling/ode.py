"""The probability-flow ODE dx/dt = v(x, t) from noise (t = 1) to data (t = 0), on equal steps.

Euler's method, and Heun's, which averages the slopes at both ends of a step; its last step is Euler's. They make steps
and 2 steps - 1 network calls. Source: Karras et al., "Elucidating the Design Space of Diffusion-Based Generative
Models", 2022, algorithm 1, and the public SRA code.

Each slope is guided by its own noise level; in the public code the level at the start of a Heun step decides for both
slopes.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

Velocity = Callable[[Tensor, float], Tensor]
"""(x (B, ...) float64, t in [0, 1]) -> dx/dt, like x."""


def _times(steps: int) -> list[float]:
    return torch.linspace(1, 0, steps + 1, dtype=torch.float64).tolist()


def euler(velocity: Velocity, x: Tensor, *, steps: int) -> Tensor:
    """Explicit Euler, of first order: x at t = 0 from x (B, ...) float64 at t = 1."""
    times = _times(steps)
    for t, t_next in pairwise(times):
        x = x + (t_next - t) * velocity(x, t)
    return x


def heun(velocity: Velocity, x: Tensor, *, steps: int) -> Tensor:
    """Heun's method, of second order: x at t = 0 from x (B, ...) float64 at t = 1."""
    times = _times(steps)
    for t, t_next in pairwise(times):
        slope = velocity(x, t)
        ahead = x + (t_next - t) * slope
        x = ahead if t_next == 0 else x + (t_next - t) * (0.5 * slope + 0.5 * velocity(ahead, t_next))
    return x
