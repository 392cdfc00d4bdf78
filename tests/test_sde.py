"""The SDE sampler on a Gaussian, whose score, velocity and marginals are known.

The velocity of Gaussian data is affine in x, so the sample is affine in its noises. One batch therefore carries the
sample without noise and its response to each noise alone, which give mean and variance exactly, without luck.
"""

from __future__ import annotations

import math

import pytest
import torch
from test_ode import MEAN, STD, coefficients, velocity
from torch import Tensor

from sra_fast.sampling.sde import euler_maruyama, score_from_velocity

LAST = 0.04


def moments(path: str, steps: int) -> tuple[float, float]:
    """Mean and variance of the sampler's output over all its noises."""
    x = torch.zeros(steps + 1, dtype=torch.float64)  # row 0: no noise; row 2 + k: noise 1 in step k alone
    x[1] = 1  # row 1: initial noise 1

    def noise(k: int) -> Tensor:
        impulse = torch.zeros_like(x)
        impulse[2 + k] = 1
        return impulse

    result = euler_maruyama(velocity(path), x, path=path, steps=steps, noise=noise)
    return float(result[0]), float((result[1:] - result[0]).square().sum())


@pytest.mark.parametrize("path", ["linear", "cosine"])
@pytest.mark.parametrize("t", [1.0, 0.7, 0.3, LAST, 1e-6])
def test_score_of_a_gaussian(path: str, t: float) -> None:
    alpha, sigma, *_ = coefficients(path, t)
    x = torch.linspace(-3, 3, 7, dtype=torch.float64)
    score = score_from_velocity(path, x, velocity(path)(x, t), t)
    # Near data the score is a difference of size sigma, divided by sigma: at 1e-6, six of sixteen digits are lost.
    torch.testing.assert_close(score, -(x - alpha * MEAN) / (alpha**2 * STD**2 + sigma**2), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("path", ["linear", "cosine"])
def test_moments_converge_to_the_marginal(path: str) -> None:
    """In the limit of small steps: the true marginal at t = 0.04, then the published last step, an affine map of it."""
    alpha, sigma, *_ = coefficients(path, LAST)
    variance = alpha**2 * STD**2 + sigma**2

    def last_step(x: float) -> float:
        v = float(velocity(path)(torch.tensor(x, dtype=torch.float64), LAST))
        return x - LAST * (v + LAST * (x - alpha * MEAN) / variance)

    true_mean = last_step(alpha * MEAN)
    true_variance = (last_step(1.0) - last_step(0.0)) ** 2 * variance
    assert true_mean == pytest.approx(MEAN, abs=0.02)  # and that is near the data
    assert true_variance == pytest.approx(STD**2, rel=0.05)

    errors = []
    for steps in (200, 400):
        mean, variance_of_sample = moments(path, steps)
        errors.append((abs(mean - true_mean), abs(variance_of_sample - true_variance)))
    for coarse, fine in zip(*errors, strict=True):
        assert fine < 0.01
        assert fine < 0.6 * coarse or fine < 1e-9  # of first order


@pytest.mark.parametrize("path", ["linear", "cosine"])
def test_two_steps_by_hand(path: str) -> None:
    x, n = torch.randn(2, 5, dtype=torch.float64)
    v = velocity(path)

    def drift(x: Tensor, t: float) -> Tensor:
        alpha, sigma, d_alpha, d_sigma = coefficients(path, t)
        ratio = alpha / d_alpha
        score = (ratio * v(x, t) - x) / (sigma**2 - ratio * d_sigma * sigma)
        return v(x, t) - 0.5 * (2 * t) * score

    middle = x - 0.96 * drift(x, 1.0) + math.sqrt(2 * 1.0) * math.sqrt(0.96) * n
    expected = middle - 0.04 * drift(middle, 0.04)
    result = euler_maruyama(v, x, path=path, steps=2, noise=lambda k: n)
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)


def test_published_times_calls_and_noises() -> None:
    times, drawn = [], []

    def at(x: Tensor, t: float) -> Tensor:
        times.append(t)
        return x

    def noise(k: int) -> Tensor:
        drawn.append(k)
        return torch.zeros(1, dtype=torch.float64)

    euler_maruyama(at, torch.ones(1, dtype=torch.float64), path="linear", steps=250, noise=noise)
    assert len(times) == 250
    assert times[0] == 1
    assert times[1] == pytest.approx(1 - 0.96 / 249, abs=1e-15)
    assert times[-1] == pytest.approx(0.04, abs=1e-15)
    assert drawn == list(range(249))  # the last step has none
