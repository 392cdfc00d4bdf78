"""Paths, times, label dropout and posterior samples against their closed forms and distributions."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from sra_fast.kernels.perturb import (
    PATHS,
    Settings,
    Stored,
    clean_ref,
    diffusion_times,
    drop_labels,
    flow_times,
    interpolate,
    path_coefficients,
    perturb_ddpm,
    perturb_ref,
)
from sra_fast.kernels.philox import Draw, normals, uniforms
from sra_fast.objective.ddpm import Diffusion

MANY = torch.arange(20_000)
N = len(MANY)
SETTINGS = Settings(
    seed=3, path="linear", times="uniform", t_max=0.2, null_label=10, label_dropout=0.1, shared_label_dropout=True
)


def images(number: Tensor) -> tuple[Tensor, Tensor]:
    """An image and a label for each image number; the same for numbers 64 apart."""
    return torch.randn(64, 3, 2, 3, generator=torch.Generator().manual_seed(0))[number % 64], number % 10


def moments(number: Tensor) -> tuple[Tensor, Tensor]:
    """(B, 6, 2, 3) means and standard deviations of 3 channels, and labels; the same for numbers 64 apart."""
    std = 0.1 + torch.rand(64, 3, 2, 3, generator=torch.Generator().manual_seed(1))
    mean, labels = images(number)
    return torch.cat([3 * mean, std[number % 64]], dim=1), labels


def kolmogorov(values: Tensor, cdf: Tensor) -> float:
    """sqrt(n) times the largest distance between the empirical distribution and `cdf`; 1.95 is the 0.1 % point."""
    theory, n = cdf[values.argsort()].double(), len(values)
    steps = torch.arange(n + 1, dtype=torch.float64) / n
    return math.sqrt(n) * float(torch.maximum(theory - steps[:-1], steps[1:] - theory).max())


def correlation(a: Tensor, b: Tensor) -> float:
    """In standard errors."""
    return (
        abs(float(torch.corrcoef(torch.stack([a.flatten().double(), b.flatten().double()]))[0, 1])) * a.numel() ** 0.5
    )


@pytest.mark.parametrize("path", PATHS)
def test_velocity_is_the_time_derivative_of_an_interpolant_from_data_to_noise(path: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x, noise = torch.randn(2, 9, 2, 3, 3, generator=generator, dtype=torch.float64)
    t, h = torch.linspace(0.05, 0.95, 9, dtype=torch.float64), 1e-5
    after, before = (interpolate(path, x, noise, t + step)[0] for step in (h, -h))
    torch.testing.assert_close(interpolate(path, x, noise, t)[1], (after - before) / (2 * h), atol=1e-8, rtol=1e-8)
    torch.testing.assert_close(interpolate(path, x, noise, 0 * t)[0], x, atol=0, rtol=0)
    torch.testing.assert_close(interpolate(path, x, noise, 0 * t + 1)[0], noise, atol=1e-15, rtol=0)
    alpha, sigma, _, _ = path_coefficients(path, t)
    torch.testing.assert_close(alpha + sigma if path == "linear" else alpha**2 + sigma**2, torch.ones_like(t))


@pytest.mark.parametrize("path", PATHS)
def test_times_are_uniform_or_make_sigma_over_alpha_lognormal(path: str) -> None:
    t, _ = flow_times(3, MANY, path, "uniform", 0.2)
    assert t.dtype == torch.float32
    assert kolmogorov(t, t) < 1.95
    t = flow_times(3, MANY, path, "lognormal", 0.2)[0].double()
    alpha, sigma, _, _ = path_coefficients(path, t)
    assert kolmogorov(t, torch.special.ndtr((sigma / alpha).log())) < 1.95


@pytest.mark.parametrize("t_max", [0.2, 1.0])
def test_teacher_time_is_the_student_time_less_a_uniform_share_of_t_max(t_max: float) -> None:
    t, t_teacher = flow_times(3, MANY, "linear", "uniform", t_max)
    offset = t_max * uniforms(3, MANY, Draw.TEACHER_TIME)[:, 0]
    assert torch.equal(t_teacher, (t - offset).clamp(0, 1))
    assert kolmogorov(offset / t_max, offset / t_max) < 1.95
    assert correlation(offset, t) < 4


@pytest.mark.parametrize("t_max", [0.2, 0.1, 1.0])
def test_diffusion_times_are_the_published_integers(t_max: float) -> None:
    t, t_teacher = diffusion_times(3, MANY, 1000, t_max)
    assert torch.equal(t, t.floor())
    assert torch.equal(t_teacher, t_teacher.floor())
    assert (int(t.min()), int(t.max())) == (0, 999)
    counts = torch.bincount(t.long(), minlength=1000)  # chi-square with 999 degrees of freedom, 5 sigma
    assert float((counts - 20.0).square().sum() / 20) < 999 + 5 * math.sqrt(2 * 999)
    largest = int(1000 * t_max) - 1  # randint's upper bound is excluded
    offset = (t - t_teacher)[t > largest + 1]
    assert len(offset) == 0 or (int(offset.min()), int(offset.max())) == (0, largest)
    assert bool((t_teacher <= t)[t > 0].all())
    assert bool((t_teacher[t == 0] == 1).all())  # step 0 gets a noisier teacher, as published
    assert bool((t_teacher >= 1).all())


def test_label_dropout_has_its_rate_and_is_independent_of_label_and_time() -> None:
    labels = MANY % 10
    after = drop_labels(3, MANY, labels, 10, 0.1)
    dropped = after == 10
    assert after.dtype == torch.int64
    assert torch.equal(after[~dropped], labels[~dropped])
    assert float(dropped.float().mean()) == pytest.approx(0.1, abs=4 * math.sqrt(0.09 / N))
    for other in (labels, *flow_times(3, MANY, "linear", "uniform", 0.2)):
        assert correlation(dropped, other) < 4
    assert torch.equal(drop_labels(3, MANY, labels, 10, 0.0), labels)


def test_the_teachers_labels_are_the_students_or_have_a_dropout_of_their_own() -> None:
    noised = perturb_ref(*images(MANY), MANY, SETTINGS)
    assert noised.teacher_labels is noised.labels
    noised = perturb_ref(*images(MANY), MANY, SETTINGS._replace(shared_label_dropout=False))
    student, teacher = noised.labels == 10, noised.teacher_labels == 10
    assert float(teacher.float().mean()) == pytest.approx(0.1, abs=4 * math.sqrt(0.09 / N))
    assert float((student & teacher).float().mean()) == pytest.approx(0.01, abs=4 * math.sqrt(0.01 / N))
    assert torch.equal(noised.teacher_labels[~teacher], (MANY % 10)[~teacher])


@pytest.mark.parametrize("path", PATHS)
def test_both_networks_see_one_image_and_noise_at_their_own_times(path: str) -> None:
    number = torch.arange(5)
    x, labels = images(number)
    noise = normals(3, number, Draw.NOISE, 18).view_as(x)
    noised = perturb_ref(x, labels, number, SETTINGS._replace(path=path))
    times = flow_times(3, number, path, "uniform", 0.2)
    assert all(torch.equal(*pair) for pair in zip((noised.t, noised.t_teacher), times, strict=True))
    x_t, velocity = interpolate(path, x, noise, noised.t)
    assert torch.equal(noised.x_t, x_t)
    assert torch.equal(noised.target, velocity)
    assert torch.equal(noised.x_teacher, interpolate(path, x, noise, noised.t_teacher)[0])


# Stored data

UNSCALED = torch.zeros(3), torch.ones(3)
LATENTS = Stored(True, torch.tensor([0.5, -1.0, 2.0]), torch.tensor([0.18215, 2.0, 0.75]))


def test_many_samples_of_a_posterior_have_its_mean_and_deviation() -> None:
    number = 64 * MANY  # one image, many times
    data, _ = moments(number)
    mean, std = data[0].double().chunk(2)
    x = clean_ref(data, number, 3, Stored(True, *UNSCALED)).double()
    assert x.shape == (N, 3, 2, 3)
    normal = ((x - mean) / std).flatten(1)
    for column in normal.T:
        assert kolmogorov(column, torch.special.ndtr(column)) < 1.95
    assert float((torch.corrcoef(normal.T) - torch.eye(18)).abs().max()) < 5 / math.sqrt(N)
    noise = normals(3, number, Draw.NOISE, 18)
    assert correlation(normal, noise) < 4
    assert not (x == clean_ref(data, number, 4, Stored(True, *UNSCALED))).any()
    assert not (x[1:] == x[:-1]).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.uint8])
def test_shift_and_scale_act_per_channel_in_float32(dtype: torch.dtype) -> None:
    data = torch.randint(256, (4, 3, 2, 3), generator=torch.Generator().manual_seed(0)).to(dtype)
    shift, scale = LATENTS.shift.view(3, 1, 1), LATENTS.scale.view(3, 1, 1)
    x = clean_ref(data, torch.arange(4), 3, LATENTS._replace(posterior=False))
    assert x.dtype == torch.float32
    torch.testing.assert_close(x.double(), (data.double() - shift.double()) * scale.double(), rtol=1e-6, atol=0)
    certain = torch.cat([data, torch.zeros_like(data)], 1)  # a posterior without deviation is its mean
    assert torch.equal(clean_ref(certain, torch.arange(4), 3, LATENTS), x)


@pytest.mark.parametrize("stored", [None, LATENTS], ids=["images", "moments"])
@pytest.mark.parametrize("family", ["sit", "dit"])
def test_an_image_number_draws_the_same_in_any_batch(stored: Stored | None, family: str) -> None:
    settings = SETTINGS._replace(label_dropout=0.5, times="lognormal", shared_label_dropout=False)
    data = moments if stored else images

    def noised(number: Tensor, seed: int = 3):
        inputs = (*data(number), number, settings._replace(seed=seed), stored)
        return perturb_ref(*inputs) if family == "sit" else perturb_ddpm(*inputs, Diffusion().levels)

    number = torch.tensor([5, 6, 2**32 + 7, 8, 2**40])
    batch = noised(number)
    for rows in ([3], [4, 0], [2, 1, 3]):
        for name, part, expected in zip(batch._fields, noised(number[rows]), batch, strict=True):
            assert part is expected is None or torch.equal(part, expected[rows]), name
    assert not (noised(number, seed=4).x_t == batch.x_t).any()
