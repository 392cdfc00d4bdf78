"""Denoising diffusion, the objective of DiT: noise prediction with a learned variance.

    q(x_t | x_0) = N(sqrt(abar_t) x_0, (1 - abar_t) I),  abar_t = prod_{s <= t} (1 - beta_s)

1,000 linear betas from 1e-4 to 0.02; the network predicts the noise and, per element, a fraction v that places the
reverse variance between its two bounds. Loss = mse(noise) + the variational bound in bits per dimension, which trains
v alone.

Sources: Ho et al., "Denoising Diffusion Probabilistic Models", 2020 (equations by number below); Nichol and Dhariwal,
"Improved Denoising Diffusion Probabilistic Models", 2021, section 3.1 (learned range); Peebles and Xie, "DiT", 2023.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from sra_fast.kernels.perturb import NoisedBatch, NoiseLevels

DIFFUSION_STEPS = 1000


def betas() -> Tensor:
    """The 1,000 linear betas: (1000,) float64."""
    return torch.linspace(1e-4, 0.02, DIFFUSION_STEPS, dtype=torch.float64)


class Posterior(NamedTuple):
    """q(x_{k-1} | x_k, x_0) at every step of a chain: mean = mean_of_x0 x_0 + mean_of_xt x_k. Ho et al., (7)."""

    abar_before: Tensor  # abar_{k-1}; 1 at the first step
    beta: Tensor
    variance: Tensor  # 0 at the first step
    mean_of_x0: Tensor
    mean_of_xt: Tensor


def posterior(abar: Tensor) -> Posterior:
    """The posterior of the chain with these abar, (K,) float64, decreasing: all 1,000 steps or a selection of them."""
    before = torch.cat([abar.new_ones(1), abar[:-1]])
    beta = 1 - abar / before
    variance = beta * (1 - before) / (1 - abar)
    return Posterior(
        before, beta, variance, beta * before.sqrt() / (1 - abar), (1 - before) * (1 - beta).sqrt() / (1 - abar)
    )


class Diffusion:
    """DiT's objective, on tables of 1,000 float64 entries. The noise is drawn and added in kernels/perturb.py."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        abar = (1 - betas()).cumprod(0)
        q = posterior(abar)
        tables = {
            "signal": abar.sqrt(),
            "noise": (1 - abar).sqrt(),
            "log_beta": betas().log(),
            # The first posterior variance is zero; its logarithm is replaced by the second's, as published.
            "log_posterior": torch.cat([q.variance[1:2], q.variance[1:]]).log(),
            "mean_of_x0": q.mean_of_x0,
            "mean_of_xt": q.mean_of_xt,
        }
        self._tables = {name: table.to(device) for name, table in tables.items()}

    @property
    def levels(self) -> NoiseLevels:
        """The noise levels, on the device."""
        return NoiseLevels(self._tables["signal"], self._tables["noise"])

    def _at(self, name: str, t: Tensor, like: Tensor) -> Tensor:
        """Table entries at steps t, shaped to broadcast over `like`, in its dtype."""
        table = self._tables[name][t.long()]
        return table.view(-1, *[1] * (like.ndim - 1)).to(like.dtype)

    def loss(self, prediction: Tensor, batch: NoisedBatch) -> Tensor:
        """mse(noise) + variational bound, mean over all elements: a scalar.

        Args:
            prediction: (B, 2C, H, W): noise, then v in [-1, 1] (not enforced).
        """
        prediction = prediction.to(torch.promote_types(prediction.dtype, torch.float32))
        predicted_noise, fraction = prediction.chunk(2, dim=1)
        squared_error = (predicted_noise - batch.target).square().mean()
        # The bound must not move the mean: the published code detaches it.
        return squared_error + self.bound(predicted_noise.detach(), fraction, batch).mean()

    def bound(self, predicted_noise: Tensor, fraction: Tensor, batch: NoisedBatch) -> Tensor:
        """One term of the variational bound per sample, in bits per dimension: (B,).

        KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)) for t > 0, the decoder's negative log-likelihood for t = 0 (Ho
        et al., (5)).
        """
        x, x_t, t = batch.x, batch.x_t, batch.t
        assert x is not None, "batches of DiT have the clean images"
        log_beta, log_posterior = self._at("log_beta", t, x), self._at("log_posterior", t, x)
        share = (fraction + 1) / 2
        log_variance = share * log_beta + (1 - share) * log_posterior  # Nichol and Dhariwal, (15)
        predicted_x = (x_t - self._at("noise", t, x) * predicted_noise) / self._at("signal", t, x)
        mean_of_x0, mean_of_xt = self._at("mean_of_x0", t, x), self._at("mean_of_xt", t, x)
        true_mean = mean_of_x0 * x + mean_of_xt * x_t  # Ho et al., (7)
        mean = mean_of_x0 * predicted_x + mean_of_xt * x_t
        divergence = _gaussian_divergence(true_mean, log_posterior, mean, log_variance).flatten(1).mean(1)
        decoder = -_discretized_log_likelihood(x, mean, 0.5 * log_variance).flatten(1).mean(1)
        return torch.where(t == 0, decoder, divergence) / math.log(2)


def _gaussian_divergence(mean_q: Tensor, log_variance_q: Tensor, mean_p: Tensor, log_variance_p: Tensor) -> Tensor:
    """KL(N(mean_q, .) || N(mean_p, .)) per element, in nats."""
    ratio = (log_variance_q - log_variance_p).exp()
    distance = (mean_q - mean_p).square() * (-log_variance_p).exp()
    return 0.5 * (log_variance_p - log_variance_q - 1 + ratio + distance)


def _discretized_log_likelihood(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """log of a Gaussian's mass on the 1/255-wide bin around x in [-1, 1]; the outer bins reach to infinity. Ho et
    al., (13)."""
    centered, inverse = x - mean, (-log_scale).exp()
    upper, lower = _normal_cdf(inverse * (centered + 1 / 255)), _normal_cdf(inverse * (centered - 1 / 255))
    tiny = 1e-12
    inner = (upper - lower).clamp(min=tiny).log()
    lowest, highest = upper.clamp(min=tiny).log(), (1 - lower).clamp(min=tiny).log()
    return torch.where(x < -0.999, lowest, torch.where(x > 0.999, highest, inner))


def _normal_cdf(x: Tensor) -> Tensor:
    """The tanh approximation of the normal CDF that the published code uses (Page, 1977)."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
