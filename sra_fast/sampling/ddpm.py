"""Sampling of denoising diffusion on a respaced chain: DDPM (ancestral, learned variance) and DDIM (eta = 0).

A chain of K steps keeps K of the 1,000 original ones and their abar, from which follow its betas, beta_k = 1 - abar_k /
abar_{k-1}. The network always gets the original step. Nothing is clipped. Both make K network calls.

    x_0 = (x_k - sqrt(1 - abar_k) noise) / sqrt(abar_k)
    DDPM:  x_{k-1} ~ N(mean(x_k, x_0), exp(f log beta_k + (1 - f) log beta~_k)),  f = (v + 1) / 2;  no noise at the last
    DDIM:  x_{k-1} = sqrt(abar_{k-1}) x_0 + sqrt(1 - abar_{k-1}) noise

Sources: Ho et al., "Denoising Diffusion Probabilistic Models", 2020, equations (6) and (7); Nichol and Dhariwal,
"Improved Denoising Diffusion Probabilistic Models", 2021, equations (15) (learned range) and (19) (respacing), and
their code (spacing); Song et al., "Denoising Diffusion Implicit Models", 2021, equation (12).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import accumulate, repeat
from typing import NamedTuple

from torch import Tensor

from sra_fast.errors import Refused
from sra_fast.objective.ddpm import DIFFUSION_STEPS, betas, posterior

Prediction = Callable[[Tensor, int], Tensor]
"""(x (B, C, H, W) float64, original step in [0, 999]) -> (B, 2C, H, W) float64: noise, then v, nominally in [-1, 1]."""


class Transition(NamedTuple):
    """Coefficients of the step from x_k to x_{k-1}."""

    step: int  # the original step, as the network gets it
    abar: float  # abar_k
    abar_before: float  # abar_{k-1}; 1 at k = 0
    beta: float
    variance: float  # beta~_k; 0 at k = 0, where no noise is drawn
    mean_of_x0: float
    mean_of_xt: float


def kept_steps(steps: int) -> list[int]:
    """`steps` of the original steps, ascending, spread evenly from 0 to 999: `space_timesteps` with one section.

    Raises:
        Refused: outside [2, 1000]. (One step would be step 0 alone, which cannot start from noise.)
    """
    if not 2 <= steps <= DIFFUSION_STEPS:
        raise Refused("sample.steps", steps, f"must be in [2, {DIFFUSION_STEPS}] for dit")
    stride = (DIFFUSION_STEPS - 1) / (steps - 1)
    # Summed, not multiplied: the published code accumulates the stride, and its rounding errors break ties.
    return [round(position) for position in accumulate(repeat(stride, steps - 1), initial=0.0)]


def chain(steps: int) -> list[Transition]:
    """The respaced chain in ascending order of noise: `steps` transitions in float64."""
    original = kept_steps(steps)
    abar = (1 - betas()).cumprod(0)[original]
    columns = (column.tolist() for column in (abar, *posterior(abar)))
    return [Transition(*row) for row in zip(original, *columns, strict=True)]


def _data(x: Tensor, noise: Tensor, abar: float) -> Tensor:
    """x_0 implied by x_k and its noise."""
    return (x - (1 - abar) ** 0.5 * noise) / abar**0.5


def ddpm(prediction: Prediction, x: Tensor, *, steps: int, noise: Callable[[int], Tensor]) -> Tensor:
    """Ancestral sampling.

    Args:
        prediction: see `Prediction`.
        x: (B, C, H, W) float64, standard normal.
        steps: length of the chain, in [2, 1000].
        noise: step j in [0, steps - 1), counted from the noisy end -> standard normal, like x; none at the last.

    Returns:
        Like x.
    """
    for j, now in enumerate(reversed(chain(steps))):
        predicted_noise, v = prediction(x, now.step).chunk(2, dim=1)  # each (B, C, H, W)
        x = now.mean_of_x0 * _data(x, predicted_noise, now.abar) + now.mean_of_xt * x
        if j < steps - 1:
            log_beta, log_posterior = math.log(now.beta), math.log(now.variance)
            share = (v + 1) / 2
            x = x + (0.5 * (share * log_beta + (1 - share) * log_posterior)).exp() * noise(j)
    return x


def ddim(prediction: Prediction, x: Tensor, *, steps: int) -> Tensor:
    """Deterministic sampling (eta = 0). Arguments as in `ddpm`; v is ignored."""
    for now in reversed(chain(steps)):
        predicted_noise = prediction(x, now.step).chunk(2, dim=1)[0]
        data = _data(x, predicted_noise, now.abar)
        x = now.abar_before**0.5 * data + (1 - now.abar_before) ** 0.5 * predicted_noise
    return x
