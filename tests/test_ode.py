"""ODE samplers against the exact flow of a Gaussian: data N(m, s^2) turns noise x into m + s x."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sra_fast.sampling.ode import euler, heun

MEAN, STD = 0.7, 0.4


def coefficients(path: str, t: float) -> tuple[float, float, float, float]:
    """alpha, sigma and their derivatives."""
    if path == "linear":
        return 1 - t, t, -1, 1
    half = math.pi / 2
    return math.cos(half * t), math.sin(half * t), -half * math.sin(half * t), half * math.cos(half * t)


def velocity(path: str) -> Callable[[Tensor, float], Tensor]:
    """E[dx_t/dt | x_t = x] by regression: mean of dx_t/dt + covariance with x_t / variance of x_t (x - mean of x_t)."""

    def at(x: Tensor, t: float) -> Tensor:
        alpha, sigma, d_alpha, d_sigma = coefficients(path, t)
        slope = (alpha * d_alpha * STD**2 + sigma * d_sigma) / (alpha**2 * STD**2 + sigma**2)
        return d_alpha * MEAN + slope * (x - alpha * MEAN)

    return at


@pytest.mark.parametrize("path", ["linear", "cosine"])
@pytest.mark.parametrize(("sampler", "order"), [(euler, 1), (heun, 2)])
def test_converges_to_the_exact_flow_at_its_order(sampler: Callable, order: int, path: str) -> None:
    x = torch.linspace(-3, 3, 7, dtype=torch.float64)
    exact = MEAN + STD * x
    error = {steps: float((sampler(velocity(path), x, steps=steps) - exact).abs().max()) for steps in (100, 200)}
    assert math.log2(error[100] / error[200]) == pytest.approx(order, abs=0.15)
    assert error[200] < 10 * 200.0**-order


@pytest.mark.parametrize(
    ("sampler", "expected"), [(euler, [1, 0.75, 0.5, 0.25]), (heun, [1, 0.75, 0.75, 0.5, 0.5, 0.25, 0.25])]
)
def test_times_of_the_network_calls(sampler: Callable, expected: list[float]) -> None:
    times = []
    sampler(lambda x, t: times.append(t) or x, torch.ones(1, dtype=torch.float64), steps=4)
    assert times == expected
