"""DiT's objective against an independent derivation: Gaussian conditioning instead of the published coefficients."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from sra_fast.kernels.perturb import NoisedBatch, Settings, diffusion_times, drop_labels, perturb_ddpm
from sra_fast.kernels.philox import Draw, normals
from sra_fast.objective.ddpm import DIFFUSION_STEPS, Diffusion, betas

BETA = 1e-4 + (0.02 - 1e-4) * np.arange(1000) / 999
ABAR = np.exp(np.log1p(-BETA).cumsum())


def posterior(t: int) -> tuple[float, float]:
    """(c_0, variance) of q(x_{t-1} | x_t, x_0) = N(c_0 x_0 + c_t x_t, variance), t >= 1: the product of the Gaussians
    N(x_{t-1}; sqrt(abar_{t-1}) x_0, 1 - abar_{t-1}) and N(x_t; sqrt(1 - beta) x_{t-1}, beta)."""
    before, beta = ABAR[t - 1], BETA[t]
    variance = 1 / (1 / (1 - before) + (1 - beta) / beta)
    return variance * math.sqrt(before) / (1 - before), variance


def noised_at(x: Tensor, noise: Tensor, *steps: int) -> NoisedBatch:
    """x and noise at these steps. The loss uses neither the teacher's part nor the labels."""
    abar = torch.from_numpy(ABAR[list(steps)]).view(-1, 1, 1, 1)
    t, unused = torch.tensor(steps, dtype=torch.float32), torch.empty(0)
    x_t = abar.sqrt() * x + (1 - abar).sqrt() * noise
    return NoisedBatch(t, unused, x_t, unused, target=noise, labels=unused, teacher_labels=unused, x=x)


def batch(*steps: int) -> tuple[NoisedBatch, Tensor, Tensor]:
    """(noised, prediction of the noise, variance fraction) at the given steps, float64."""
    generator = torch.Generator().manual_seed(0)
    x, noise, error, fraction = torch.randn(4, len(steps), 2, 3, 3, generator=generator, dtype=torch.float64)
    return noised_at(0.5 * x, noise, *steps), noise + 0.3 * error, fraction.tanh()


def in_fp32(noised: NoisedBatch) -> NoisedBatch:
    return NoisedBatch(*(tensor.float() for tensor in noised))


def test_betas_and_levels_are_the_published_schedule() -> None:
    assert DIFFUSION_STEPS == 1000
    np.testing.assert_allclose(betas().numpy(), BETA, rtol=1e-12)
    np.testing.assert_allclose(Diffusion().levels.signal.numpy(), np.sqrt(ABAR), rtol=1e-10)
    np.testing.assert_allclose(Diffusion().levels.noise.numpy(), np.sqrt(1 - ABAR), rtol=1e-10)


def test_both_networks_see_the_same_image_and_noise_at_their_own_steps() -> None:
    number = torch.tensor([5, 6, 2**32 + 7])
    x = torch.randn(3, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    settings = Settings(3, "linear", "uniform", 0.2, 10, 0.5, False)
    noised = perturb_ddpm(x, torch.arange(3), number, settings, None, Diffusion().levels)
    assert torch.equal(noised.x, x)
    assert torch.equal(noised.target.flatten(1), normals(3, number, Draw.NOISE, 18))
    assert torch.equal(noised.labels, drop_labels(3, number, torch.arange(3), 10, 0.5))
    assert torch.equal(torch.stack([noised.t, noised.t_teacher]), torch.stack(diffusion_times(3, number, 1000, 0.2)))
    for t, x_t in ((noised.t, noised.x_t), (noised.t_teacher, noised.x_teacher)):
        expected = noised_at(x, noised.target, *t.int().tolist()).x_t
        assert x_t.dtype == torch.float32
        torch.testing.assert_close(x_t.double(), expected, atol=1e-6, rtol=0)


def bound_in_numpy(noised: NoisedBatch, predicted: Tensor, fraction: Tensor, row: int, step: int) -> float:
    """Bits per dimension of one sample: log(s_p / s_q) + (s_q^2 + d^2) / (2 s_p^2) - 1/2."""
    x, x_t, noise, v = (value[row].numpy() for value in (noised.x, noised.x_t, predicted, fraction))
    c_0, variance = posterior(step)
    predicted_x = (x_t - math.sqrt(1 - ABAR[step]) * noise) / math.sqrt(ABAR[step])
    difference = c_0 * (predicted_x - x)  # both means share c_t x_t
    log_p = (v + 1) / 2 * math.log(BETA[step]) + (1 - v) / 2 * math.log(variance)
    nats = 0.5 * (log_p - math.log(variance)) + (variance + difference**2) / (2 * np.exp(log_p)) - 0.5
    return float(nats.mean()) / math.log(2)


def test_divergence_is_the_gaussian_one_in_bits_per_dimension() -> None:
    steps = (1, 2, 10, 500, 999)
    noised, predicted, fraction = batch(*steps)
    expected = [bound_in_numpy(noised, predicted, fraction, row, step) for row, step in enumerate(steps)]
    np.testing.assert_allclose(Diffusion().bound(predicted, fraction, noised).numpy(), expected, rtol=1e-8)


@pytest.mark.parametrize(("error", "v"), [(0.0, -1.0), (0.0, 1.0), (0.005, 0.3), (-0.01, 0.0)])
def test_step_zero_is_the_likelihood_of_a_pixel(error: float, v: float) -> None:
    levels = torch.tensor([0, 1, 100, 200, 254, 255], dtype=torch.float64).view(-1, 1, 1, 1)
    x = levels / 127.5 - 1
    log_variance = (v + 1) / 2 * math.log(BETA[0]) + (1 - v) / 2 * math.log(posterior(1)[1])
    deviation = math.exp(0.5 * log_variance)
    mean = x + error  # at t = 0 the posterior mean is x_0 itself

    def mass_below(edge: Tensor) -> Tensor:
        return torch.special.ndtr((edge - mean) / deviation)

    mass = mass_below(x + 1 / 255) - mass_below(x - 1 / 255)
    mass[0], mass[-1] = mass_below(x + 1 / 255)[0], (1 - mass_below(x - 1 / 255))[-1]
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    predicted = noise - error * math.sqrt(ABAR[0]) / math.sqrt(1 - ABAR[0])  # off by `error` in x_0
    bound = Diffusion().bound(predicted, torch.full_like(x, v), noised_at(x, noise, *[0] * len(x)))
    # The published tanh approximation of the normal CDF is off by up to 2e-4: 4e-4 of a mass above 0.1, in bits.
    assert float(mass.min()) > 0.1
    np.testing.assert_allclose(bound.numpy(), (-mass.log2()).flatten().numpy(), atol=4e-4 / 0.1 / math.log(2))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_loss_is_noise_error_plus_bound_in_at_least_fp32(dtype: torch.dtype) -> None:
    noised, predicted, fraction = batch(1, 500, 999)
    prediction = torch.cat([predicted, fraction], 1).to(dtype)
    predicted, fraction = prediction.double().chunk(2, 1)
    bounds = Diffusion().bound(predicted, fraction, noised)
    loss = Diffusion().loss(prediction, noised if dtype == torch.float64 else in_fp32(noised))
    assert loss.dtype == torch.promote_types(dtype, torch.float32)
    expected = (predicted - noised.target).square().mean() + bounds.mean()
    assert float(loss) == pytest.approx(float(expected), rel=1e-12 if dtype == torch.float64 else 1e-3)


def test_the_bound_trains_the_variance_alone() -> None:
    noised, predicted, fraction = batch(0, 1, 500, 999)
    prediction = torch.cat([predicted, fraction], 1).requires_grad_()
    (gradient,) = torch.autograd.grad(Diffusion().loss(prediction, noised), prediction)
    of_noise, of_variance = gradient.chunk(2, 1)
    torch.testing.assert_close(of_noise, 2 * (predicted - noised.target) / predicted.numel(), atol=1e-14, rtol=1e-12)
    assert bool((of_variance != 0).all())

    def loss(v: Tensor) -> Tensor:
        return Diffusion().loss(torch.cat([predicted, v], 1), noised)

    assert torch.autograd.gradcheck(loss, [fraction.requires_grad_()])


def test_gradients_stay_finite_for_wild_predictions() -> None:
    noised, predicted, fraction = batch(0, 1, 500, 999)
    prediction = torch.cat([1e3 * predicted, 5 * fraction], 1).float().requires_grad_()
    loss = Diffusion().loss(prediction, in_fp32(noised))
    loss.backward()
    assert bool(loss.isfinite())
    assert bool(prediction.grad.isfinite().all())
