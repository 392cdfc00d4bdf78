"""DDPM and DDIM on a Gaussian, whose best noise prediction and whose reverse transitions are known in closed form.

As in test_sde.py, the sample is affine in its noises, and one batch of responses gives its mean and variance exactly.
"""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from test_ode import MEAN, STD
from torch import Tensor

from sra_fast.errors import Refused
from sra_fast.sampling.ddpm import chain, ddim, ddpm, kept_steps


def abar() -> list[float]:
    abar, result = 1.0, []
    for i in range(1000):
        abar *= 1 - (1e-4 + (0.02 - 1e-4) * i / 999)
        result.append(abar)
    return result


ABAR = abar()


def noise_prediction(x: Tensor, step: int) -> Tensor:
    """E[noise | x_t = x] of data N(MEAN, STD^2)."""
    abar = ABAR[step]
    return math.sqrt(1 - abar) * (x - math.sqrt(abar) * MEAN) / (abar * STD**2 + 1 - abar)


def test_published_spacing() -> None:
    steps = kept_steps(250)
    assert steps[:6] == [0, 4, 8, 12, 16, 20]
    assert steps[-3:] == [991, 995, 999]
    assert steps == [round(Fraction(999 * i, 249)) for i in range(250)]  # no ties: 249 is odd
    assert kept_steps(1000) == list(range(1000))
    assert kept_steps(2) == [0, 999]
    assert kept_steps(3) == [0, 500, 999]  # 499.5 to even
    assert kept_steps(21)[10] == 499  # 49.95 summed ten times lies below the tie at 499.5, which rounds to 500


@pytest.mark.parametrize("steps", [0, 1, 1001])
def test_impossible_spacing_is_refused(steps: int) -> None:
    with pytest.raises(Refused, match=rf"sample\.steps: {steps} given"):
        kept_steps(steps)


@pytest.mark.parametrize("steps", [2, 10, 250, 1000])
def test_respaced_betas_reproduce_abar(steps: int) -> None:
    product = 1.0
    for now in chain(steps):
        assert now.abar_before == pytest.approx(product, rel=1e-12)
        product *= 1 - now.beta
        assert product == pytest.approx(ABAR[now.step], rel=1e-12)
        assert now.abar == pytest.approx(ABAR[now.step], rel=1e-12)


def exact_variance(before: float, abar: float) -> float:
    """Var[x_{k-1} | x_k] of Gaussian data, by joint Gaussians: x_k is x_{k-1} scaled, plus noise."""
    prior = before * STD**2 + 1 - before
    scale_squared = abar / before
    return 1 / (1 / prior + scale_squared / (1 - scale_squared))


def test_ddpm_is_exact_with_the_exact_variance() -> None:
    """With the true variance in v, every transition is the true one: in 20 steps the moments hold to rounding."""
    steps = 20
    told = []
    abar = [ABAR[round(i * 999 / 19)] for i in range(steps)]
    before = [1.0, *abar[:-1]]

    def prediction(x: Tensor, step: int) -> Tensor:
        k = round(step * 19 / 999)
        told.append(step)
        beta = 1 - abar[k] / before[k]
        v = 0.0
        if k > 0:
            low, high = math.log(beta * (1 - before[k]) / (1 - abar[k])), math.log(beta)
            v = 2 * (math.log(exact_variance(before[k], abar[k])) - low) / (high - low) - 1
            assert -1 <= v <= 1  # the true variance lies in the published range
        return torch.cat([noise_prediction(x, step), torch.full_like(x, v)], dim=1)

    start = torch.zeros(steps + 1, 1, 1, 1, dtype=torch.float64)  # rows as in test_sde.moments
    start[1] = math.sqrt(abar[-1] * STD**2 + 1 - abar[-1])
    start += math.sqrt(abar[-1]) * MEAN  # the true marginal at the noisy end, which is not quite N(0, 1)

    def noise(j: int) -> Tensor:
        impulse = torch.zeros_like(start)
        impulse[2 + j] = 1
        return impulse

    result = ddpm(prediction, start, steps=steps, noise=noise).flatten()
    assert told == [round(i * 999 / 19) for i in reversed(range(steps))]
    assert float(result[0]) == pytest.approx(MEAN, abs=1e-10)
    variance = float((result[1:] - result[0]).square().sum())
    # The last step returns the mean of the data given x_0: it lacks their remaining variance.
    remaining = 1 / (1 / STD**2 + abar[0] / (1 - abar[0]))
    assert variance == pytest.approx(STD**2 - remaining, rel=1e-9)


def test_ddpm_variance_at_both_ends_of_its_range() -> None:
    """One noise of one, no prediction of noise: v = 1 is beta, v = -1 the posterior variance; two steps, by hand."""
    abar, before = ABAR[999], ABAR[0]
    beta = 1 - abar / before
    for v, variance in ((1.0, beta), (-1.0, beta * (1 - before) / (1 - abar))):
        x = torch.zeros(1, 1, 1, 1, dtype=torch.float64)
        result = ddpm(
            lambda x, step, v=v: torch.cat([torch.zeros_like(x), torch.full_like(x, v)], dim=1),
            x,
            steps=2,
            noise=lambda j: torch.ones(1, 1, 1, 1, dtype=torch.float64),
        )
        # The last step's mean, when no noise is predicted, is x / sqrt(abar_0).
        assert float(result) == pytest.approx(math.sqrt(variance) / math.sqrt(before), rel=1e-9)


def test_ddim_of_a_point_is_exact_in_two_steps() -> None:
    x = torch.randn(4, 1, 2, 2, dtype=torch.float64)

    def prediction(x: Tensor, step: int) -> Tensor:
        noise = (x - math.sqrt(ABAR[step]) * MEAN) / math.sqrt(1 - ABAR[step])
        return torch.cat([noise, torch.full_like(x, float("nan"))], dim=1)  # v must not matter

    torch.testing.assert_close(ddim(prediction, x, steps=2), torch.full_like(x, MEAN), rtol=1e-9, atol=1e-9)


def test_ddim_converges_to_the_flow_of_a_gaussian() -> None:
    """The flow keeps the quantile: x_T's standard score under its marginal is the data's."""
    x = torch.linspace(-3, 3, 7, dtype=torch.float64).view(7, 1, 1, 1)
    abar = ABAR[999]
    exact = MEAN + STD * (x - math.sqrt(abar) * MEAN) / math.sqrt(abar * STD**2 + 1 - abar)

    def prediction(x: Tensor, step: int) -> Tensor:
        return torch.cat([noise_prediction(x, step), torch.zeros_like(x)], dim=1)

    errors = [float((ddim(prediction, x, steps=steps) - exact).abs().max()) for steps in (125, 250, 500)]
    assert errors[1] < 0.6 * errors[0]
    assert errors[2] < 0.6 * errors[1]
    assert errors[2] < 0.01
