"""ODE samplers against the exact flow of a Gaussian: data N(m, s^2) turns noise x into m + s x."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sra_fast.sampling.ode import euler, heun

MEAN, STD = 0.7, 0.4


def velocity(path: str) -> Callable[[Tensor, float], Tensor]:
    """E[alpha' x0 + sigma' noise | x_t = x], from the posterior mean of the data."""

    def at(x: Tensor, t: float) -> Tensor:
        half = math.pi / 2
        alpha, sigma, d_alpha, d_sigma = (
            (1 - t, t, -1, 1)
            if path == "linear"
            else (math.cos(half * t), math.sin(half * t), -half * math.sin(half * t), half * math.cos(half * t))
        )
        surprise = (x - alpha * MEAN) / (alpha**2 * STD**2 + sigma**2)
        return d_alpha * (MEAN + alpha * STD**2 * surprise) + d_sigma * sigma * surprise

    return at


@pytest.mark.parametrize("path", ["linear", "cosine"])
@pytest.mark.parametrize(("sampler", "order"), [(euler, 1), (heun, 2)])
def test_converges_to_the_exact_flow_at_its_order(sampler: Callable, order: int, path: str) -> None:
    x = torch.linspace(-3, 3, 7, dtype=torch.float64)
    exact = MEAN + STD * x
    error = {steps: float((sampler(velocity(path), x, steps=steps) - exact).abs().max()) for steps in (100, 200)}
    assert math.log2(error[100] / error[200]) == pytest.approx(order, abs=0.15)
    assert error[200] < 10 * 200.0**-order


def test_euler_evaluates_at_the_start_of_each_step() -> None:
    times = []
    euler(lambda x, t: times.append(t) or x, torch.ones(1, dtype=torch.float64), steps=4)
    assert times == [1, 0.75, 0.5, 0.25]


def test_heun_evaluates_at_both_ends_but_for_the_last_step() -> None:
    times = []
    heun(lambda x, t: times.append(t) or x, torch.ones(1, dtype=torch.float64), steps=4)
    assert times == [1, 0.75, 0.75, 0.5, 0.5, 0.25, 0.25]


@pytest.mark.parametrize("sampler", [euler, heun])
def test_one_step_is_eulers(sampler: Callable) -> None:
    x = torch.tensor([1.5], dtype=torch.float64)
    assert torch.equal(sampler(lambda x, t: 3 * x, x, steps=1), x - 3 * x)


@pytest.mark.parametrize("sampler", [euler, heun])
def test_input_is_not_changed(sampler: Callable) -> None:
    x = torch.ones(2, dtype=torch.float64)
    sampler(lambda x, t: x, x, steps=3)
    assert torch.equal(x, torch.ones(2, dtype=torch.float64))
