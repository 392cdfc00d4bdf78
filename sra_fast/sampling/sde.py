"""The reverse-time SDE of SiT, integrated by the Euler-Maruyama method.

    dx = (v - w s / 2) dt + sqrt(w) dB      v: velocity, s: score, w(t) = 2 t, time running from 1 (noise) to 0 (data)

    s(x, t) = (alpha v - alpha' x) / (sigma (alpha' sigma - alpha sigma'))

Every w gives the same marginals in the limit of small steps. w = 2 t is twice sigma on the linear path, the form
"sigma" of SiT's code; on the cosine path w stays 2 t as in the public SRA code, although that is not twice sigma there.
The times are equally spaced from 1 to 0.04, then 0; the last step adds no noise.

Sources: Ma et al., "SiT", 2024, section 2 (reverse-time SDE; score from velocity); the public SRA code (times, w).
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from sra_fast.kernels.perturb import path_coefficients
from sra_fast.sampling.ode import Velocity

LAST_TIME = 0.04  # published: from here one long step without noise


def score_from_velocity(path: str, x: Tensor, velocity: Tensor, t: float) -> Tensor:
    """grad log p_t(x) of a path ("linear" or "cosine"), for 0 < t <= 1: float64, shaped like x and velocity.

    The public code's ((alpha/alpha') v - x) / (sigma^2 - (alpha/alpha') sigma' sigma), with numerator and denominator
    multiplied by alpha', because alpha' approaches 0 with t on the cosine path. At t = 1 it is -x, the noise's score.
    """
    time = torch.tensor(t, dtype=torch.float64)
    alpha, sigma, d_alpha, d_sigma = (value.item() for value in path_coefficients(path, time))
    return (alpha * velocity - d_alpha * x) / (sigma * (d_alpha * sigma - alpha * d_sigma))


def euler_maruyama(velocity: Velocity, x: Tensor, *, path: str, steps: int, noise: Callable[[int], Tensor]) -> Tensor:
    """x at t = 0 from x at t = 1; `steps` network calls.

    Args:
        velocity: see `Velocity`.
        x: (B, ...) float64, standard normal.
        path: "linear" or "cosine", for the score.
        noise: step k in [0, steps - 1) -> standard normal, like x. The last step draws none.

    Returns:
        Like x.
    """
    times = [*torch.linspace(1, LAST_TIME, steps, dtype=torch.float64).tolist(), 0.0]
    for k, (t, t_next) in enumerate(pairwise(times)):
        w, dt = 2 * t, t_next - t
        v = velocity(x, t)
        x = x + dt * (v - 0.5 * w * score_from_velocity(path, x, v, t))
        if t_next > 0:
            x = x + (w * -dt) ** 0.5 * noise(k)
    return x
