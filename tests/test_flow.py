"""SiT's objective against its closed form."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from sra_fast.kernels.perturb import interpolate
from sra_fast.objective import Noised
from sra_fast.objective.flow import Flow

PATHS = {  # alpha, sigma, alpha', sigma'
    "linear": lambda t: (1 - t, t, -np.ones_like(t), np.ones_like(t)),
    "cosine": lambda t: (
        np.cos(math.pi * t / 2),
        np.sin(math.pi * t / 2),
        -math.pi / 2 * np.sin(math.pi * t / 2),
        math.pi / 2 * np.cos(math.pi * t / 2),
    ),
}


def batch() -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x, noise, prediction and the two times."""
    generator = torch.Generator().manual_seed(0)
    x, noise, prediction = torch.randn(3, 4, 2, 3, 3, generator=generator, dtype=torch.float64)
    t = torch.tensor([0.0, 0.3, 0.7, 1.0], dtype=torch.float64)
    return x, noise, prediction, t, 0.8 * t


def noised_on(path: str, x: Tensor, noise: Tensor, t: Tensor, t_teacher: Tensor) -> Noised:
    (x_t, target), (x_teacher, _) = (interpolate(path, x, noise, time) for time in (t, t_teacher))
    return Noised(t, t_teacher, x_t, x_teacher, target)


@pytest.mark.parametrize("path", PATHS)
def test_student_and_teacher_see_the_same_image_and_noise_at_their_own_times(path: str) -> None:
    x, noise, _, t, t_teacher = batch()
    noised = noised_on(path, x, noise, t, t_teacher)
    for got, time in ((noised.x_t, t), (noised.x_teacher, t_teacher)):
        alpha, sigma, _, _ = (torch.from_numpy(c)[:, None, None, None] for c in PATHS[path](time.numpy()))
        torch.testing.assert_close(got, alpha * x + sigma * noise, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("path", PATHS)
def test_loss_is_the_mean_squared_error_of_the_velocity_at_the_students_time(path: str) -> None:
    x, noise, prediction, t, t_teacher = batch()
    _, _, d_alpha, d_sigma = (c[:, None, None, None] for c in PATHS[path](t.numpy()))
    velocity = d_alpha * x.numpy() + d_sigma * noise.numpy()
    loss = Flow().loss(prediction, noised_on(path, x, noise, t, t_teacher))
    assert float(loss) == pytest.approx(((prediction.numpy() - velocity) ** 2).mean(), rel=1e-12)


def test_linear_velocity_is_noise_minus_data() -> None:
    x, noise, _, t, t_teacher = batch()
    assert torch.equal(noised_on("linear", x, noise, t, t_teacher).target, noise - x)


@pytest.mark.parametrize("path", PATHS)
def test_gradient(path: str) -> None:
    x, noise, prediction, t, t_teacher = batch()
    noised = noised_on(path, x, noise, t, t_teacher)
    assert torch.autograd.gradcheck(lambda p: Flow().loss(p, noised), [prediction.requires_grad_()])


def test_a_bf16_prediction_is_compared_in_fp32() -> None:
    x, noise, prediction, t, t_teacher = (value.float() for value in batch())
    noised = noised_on("linear", x, noise, t, t_teacher)
    loss = Flow().loss(prediction.bfloat16(), noised)
    assert loss.dtype == torch.float32
    exact = (prediction.bfloat16().double() - (noise - x).double()).square().mean()
    assert float(loss) == pytest.approx(float(exact), rel=1e-6)
