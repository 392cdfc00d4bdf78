"""DiT's objective against an independent derivation: Gaussian conditioning instead of the published coefficients."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from sra_fast.objective import Noised
from sra_fast.objective.ddpm import DIFFUSION_STEPS, Diffusion, betas

BETA = 1e-4 + (0.02 - 1e-4) * np.arange(1000) / 999
ABAR = np.exp(np.log1p(-BETA).cumsum())


def posterior(t: int) -> tuple[float, float]:
    """(c_0, variance) of q(x_{t-1} | x_t, x_0) = N(c_0 x_0 + c_t x_t, variance), t >= 1: the product of the Gaussians
    N(x_{t-1}; sqrt(abar_{t-1}) x_0, 1 - abar_{t-1}) and N(x_t; sqrt(1 - beta) x_{t-1}, beta)."""
    before, beta = ABAR[t - 1], BETA[t]
    variance = 1 / (1 / (1 - before) + (1 - beta) / beta)
    return variance * math.sqrt(before) / (1 - before), variance


def batch(*steps: int) -> tuple[Noised, Tensor, Tensor]:
    """(noised, prediction of the noise, variance fraction) at the given steps, float64."""
    generator = torch.Generator().manual_seed(0)
    x, noise, error, fraction = torch.randn(4, len(steps), 2, 3, 3, generator=generator, dtype=torch.float64)
    t = torch.tensor(steps, dtype=torch.float32)
    noised = Diffusion().noised(0.5 * x, noise, t, (t - 1).clamp(1, 999))
    return noised, noise + 0.3 * error, fraction.tanh()


def test_betas_and_abar_are_the_published_schedule() -> None:
    assert DIFFUSION_STEPS == 1000
    np.testing.assert_allclose(betas().numpy(), BETA, rtol=1e-12)
    ones = torch.ones(3, 1, 1, 1, dtype=torch.float64)
    for zero_noise, table in ((True, np.sqrt(ABAR)), (False, np.sqrt(1 - ABAR))):
        x, noise = (ones, 0 * ones) if zero_noise else (0 * ones, ones)
        x_t = Diffusion().noised(x, noise, torch.tensor([0.0, 500.0, 999.0]), torch.ones(3)).x_t
        np.testing.assert_allclose(x_t.flatten().numpy(), table[[0, 500, 999]], rtol=1e-10)


def test_teacher_sees_the_same_image_and_noise_at_its_own_step() -> None:
    noised, _, _ = batch(0, 1, 500, 999)
    for row, step in enumerate((1, 1, 499, 998)):
        wanted = math.sqrt(ABAR[step]) * noised.x[row] + math.sqrt(1 - ABAR[step]) * noised.target[row]
        torch.testing.assert_close(noised.x_teacher[row], wanted, atol=1e-10, rtol=0)
    x, noise, t = torch.randn(1, 1, 2, 2), torch.randn(1, 1, 2, 2), torch.ones(1)
    noised = Diffusion().noised(x, noise, t, t)
    assert noised.target is noise
    assert noised.x is x


@pytest.mark.parametrize("step", [1, 2, 10, 500, 999])
def test_exact_noise_and_the_posterior_variance_have_no_divergence(step: int) -> None:
    noised, _, _ = batch(step)
    bound = Diffusion().bound(noised.target, torch.full_like(noised.target, -1.0), noised)
    assert float(bound.abs().max()) < 1e-9


def bound_in_numpy(noised: Noised, predicted: Tensor, fraction: Tensor, row: int, step: int) -> float:
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
    wanted = [bound_in_numpy(noised, predicted, fraction, row, step) for row, step in enumerate(steps)]
    np.testing.assert_allclose(Diffusion().bound(predicted, fraction, noised).numpy(), wanted, rtol=1e-8)


def at_step_zero(x: Tensor, error: float, v: float) -> tuple[Noised, Tensor, Tensor]:
    """One batch at t = 0 whose prediction is off by `error` in x_0."""
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    noised = Diffusion().noised(x, noise, torch.zeros(len(x)), torch.ones(len(x)))
    predicted = noise - error * math.sqrt(ABAR[0]) / math.sqrt(1 - ABAR[0])
    return noised, predicted, torch.full_like(x, v)


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
    noised, predicted, fraction = at_step_zero(x, error, v)
    got = Diffusion().bound(predicted, fraction, noised)
    # The published tanh approximation of the normal CDF is off by up to 2e-4: 4e-4 of a mass above 0.1, in bits.
    assert float(mass.min()) > 0.1
    np.testing.assert_allclose(got.numpy(), (-mass.log2()).flatten().numpy(), atol=4e-4 / 0.1 / math.log(2))


def test_loss_is_noise_error_plus_bound() -> None:
    noised, predicted, fraction = batch(0, 1, 500, 999)
    loss = Diffusion().loss(torch.cat([predicted, fraction], 1), noised)
    mse = ((predicted - noised.target).numpy() ** 2).mean()
    bounds = Diffusion().bound(predicted, fraction, noised).numpy()
    assert float(loss) == pytest.approx(mse + bounds.mean(), rel=1e-12)


def test_the_bound_trains_the_variance_alone() -> None:
    noised, predicted, fraction = batch(0, 1, 500, 999)
    prediction = torch.cat([predicted, fraction], 1).requires_grad_()
    (gradient,) = torch.autograd.grad(Diffusion().loss(prediction, noised), prediction)
    of_noise, of_variance = gradient.chunk(2, 1)
    torch.testing.assert_close(of_noise, 2 * (predicted - noised.target) / predicted.numel(), atol=1e-14, rtol=1e-12)
    assert bool((of_variance != 0).all())


def test_gradient_of_the_variance() -> None:
    noised, predicted, fraction = batch(0, 1, 500, 999)

    def loss(v: Tensor) -> Tensor:
        return Diffusion().loss(torch.cat([predicted, v], 1), noised)

    assert torch.autograd.gradcheck(loss, [fraction.requires_grad_()])


def test_gradients_stay_finite_for_wild_predictions() -> None:
    noised, predicted, fraction = batch(0, 1, 500, 999)
    noised = Noised(*(value.float() for value in noised))
    prediction = torch.cat([1e3 * predicted, 5 * fraction], 1).float().requires_grad_()
    loss = Diffusion().loss(prediction, noised)
    loss.backward()
    assert bool(loss.isfinite())
    assert bool(prediction.grad.isfinite().all())


def test_a_bf16_prediction_is_compared_in_fp32() -> None:
    noised, predicted, fraction = batch(1, 500, 999)
    prediction = torch.cat([predicted, fraction], 1).bfloat16()
    loss = Diffusion().loss(prediction, Noised(*(value.float() for value in noised)))
    assert loss.dtype == torch.float32
    assert float(loss) == pytest.approx(float(Diffusion().loss(prediction.double(), noised)), rel=1e-3)
