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
    draw_ref,
    drop_labels,
    flow_times,
    interpolate,
    path_coefficients,
    perturb_ref,
)
from sra_fast.kernels.philox import Draw, normals, uniforms

MANY = torch.arange(20_000)
PUBLISHED = Settings(
    seed=3,
    path="linear",
    times="uniform",
    t_max=0.2,
    null_label=10,
    label_dropout=0.1,
    shared_label_dropout=True,
)


def batch(numbers: Tensor) -> tuple[Tensor, Tensor]:
    """An image and a label for each image number."""
    return torch.randn(64, 3, 4, 4, generator=torch.Generator().manual_seed(0))[numbers % 64], numbers % 10


def kolmogorov(values: Tensor, cdf: Tensor) -> float:
    """sqrt(n) times the largest distance between the empirical distribution and `cdf`; 1.95 is the 0.1 % point."""
    theory, n = cdf[values.argsort()].double(), len(values)
    steps = torch.arange(n + 1, dtype=torch.float64) / n
    return math.sqrt(n) * float(torch.maximum(theory - steps[:-1], steps[1:] - theory).max())


def test_path_coefficients_are_the_published_ones() -> None:
    t = torch.linspace(0, 1, 11, dtype=torch.float64)
    ones = torch.ones_like(t)
    for got, wanted in zip(path_coefficients("linear", t), (1 - t, t, -ones, ones), strict=True):
        assert torch.equal(got, wanted)
    alpha, sigma, _, _ = path_coefficients("cosine", t)
    torch.testing.assert_close(alpha, (math.pi / 2 * t).cos())
    torch.testing.assert_close(alpha.square() + sigma.square(), ones)


@pytest.mark.parametrize("path", PATHS)
def test_velocity_is_the_time_derivative_of_the_interpolant(path: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x, noise = torch.randn(2, 9, 2, 3, 3, generator=generator, dtype=torch.float64)
    t, h = torch.linspace(0.05, 0.95, 9, dtype=torch.float64), 1e-5
    after, before = (interpolate(path, x, noise, t + step)[0] for step in (h, -h))
    torch.testing.assert_close(interpolate(path, x, noise, t)[1], (after - before) / (2 * h), atol=1e-8, rtol=1e-8)


@pytest.mark.parametrize("path", PATHS)
def test_the_interpolant_runs_from_data_to_noise(path: str) -> None:
    x, noise = torch.randn(2, 3, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(interpolate(path, x, noise, torch.zeros(3))[0], x)
    torch.testing.assert_close(interpolate(path, x, noise, torch.ones(3))[0], noise, atol=1e-6, rtol=0)


def test_uniform_times_are_uniform() -> None:
    t, _ = flow_times(3, MANY, "linear", "uniform", 0.2)
    assert t.dtype == torch.float32
    assert kolmogorov(t, t) < 1.95


@pytest.mark.parametrize("path", PATHS)
def test_lognormal_times_make_sigma_over_alpha_lognormal(path: str) -> None:
    t = flow_times(3, MANY, path, "lognormal", 0.2)[0].double()
    alpha, sigma, _, _ = path_coefficients(path, t)
    assert kolmogorov(t, torch.special.ndtr((sigma / alpha).log())) < 1.95


@pytest.mark.parametrize("times", ["uniform", "lognormal"])
@pytest.mark.parametrize("t_max", [0.2, 1.0])
def test_teacher_time_is_the_student_time_less_a_uniform_share_of_t_max(times: str, t_max: float) -> None:
    t, t_teacher = flow_times(3, MANY, "linear", times, t_max)
    assert bool((t_teacher <= t).all())
    assert bool((t_teacher >= 0).all())
    inside = t > t_max  # where nothing was clamped
    if inside.any():
        share = (t - t_teacher)[inside] / t_max
        assert kolmogorov(share, share) < 1.95
        assert abs(float(torch.corrcoef(torch.stack([share, t[inside]]))[0, 1])) < 4 / math.sqrt(int(inside.sum()))
    wanted = (t - t_max * uniforms(3, MANY, Draw.TEACHER_TIME)[:, 0]).clamp(0, 1)
    assert torch.equal(t_teacher, wanted)
    assert bool((t_teacher == 0).any())


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
    if len(offset):
        assert (int(offset.min()), int(offset.max())) == (0, largest)
    assert bool((t_teacher >= 1).all())
    assert bool((t_teacher <= t)[t > 0].all())


def test_diffusion_step_zero_gets_the_noisier_teacher_as_published() -> None:
    t, t_teacher = diffusion_times(3, MANY, 1000, 0.2)
    assert int((t == 0).sum()) > 0
    assert bool((t_teacher[t == 0] == 1).all())


def test_label_dropout_has_its_rate_and_is_independent_of_label_and_time() -> None:
    labels = MANY % 10
    dropped = drop_labels(3, MANY, labels, 10, 0.1) == 10
    n = len(MANY)
    assert float(dropped.float().mean()) == pytest.approx(0.1, abs=4 * math.sqrt(0.09 / n))
    t = flow_times(3, MANY, "linear", "uniform", 0.2)[0]
    for other in (labels, t, uniforms(3, MANY, Draw.TEACHER_TIME)[:, 0]):
        assert abs(float(torch.corrcoef(torch.stack([dropped.float(), other.float()]))[0, 1])) < 4 / math.sqrt(n)


def test_label_dropout_leaves_the_others_alone() -> None:
    labels = MANY % 10
    after = drop_labels(3, MANY, labels, 10, 0.3)
    assert after.dtype == torch.int64
    assert torch.equal(after[after != 10], labels[after != 10])
    assert torch.equal(drop_labels(3, MANY, labels, 10, 0.0), labels)


def test_shared_dropout_hands_the_teacher_the_students_labels() -> None:
    drawn = draw_ref(*batch(MANY), MANY, PUBLISHED)
    assert torch.equal(drawn.teacher_labels, drawn.labels)
    assert bool((drawn.labels == 10).any())


def test_unshared_dropout_is_the_teachers_own() -> None:
    drawn = draw_ref(*batch(MANY), MANY, PUBLISHED._replace(shared_label_dropout=False))
    student, teacher, n = drawn.labels == 10, drawn.teacher_labels == 10, len(MANY)
    assert float(teacher.float().mean()) == pytest.approx(0.1, abs=4 * math.sqrt(0.09 / n))
    assert float((student & teacher).float().mean()) == pytest.approx(0.01, abs=4 * math.sqrt(0.01 / n))
    assert torch.equal(drawn.teacher_labels[~teacher], (MANY % 10)[~teacher])


def test_noise_is_the_noise_stream_and_the_image_is_left_alone() -> None:
    number = torch.arange(5)
    x, labels = batch(number)
    drawn = draw_ref(x, labels, number, PUBLISHED)
    assert torch.equal(drawn.x, x)
    assert torch.equal(drawn.noise.flatten(1), normals(3, number, Draw.NOISE, 48))


@pytest.mark.parametrize("path", PATHS)
def test_perturb_is_the_interpolant_of_what_is_drawn(path: str) -> None:
    number, settings = torch.arange(5), PUBLISHED._replace(path=path)
    drawn, made = draw_ref(*batch(number), number, settings), perturb_ref(*batch(number), number, settings)
    assert torch.equal(made.x_t, interpolate(path, drawn.x, drawn.noise, drawn.t)[0])
    assert torch.equal(made.target, interpolate(path, drawn.x, drawn.noise, drawn.t)[1])
    assert torch.equal(made.x_teacher, interpolate(path, drawn.x, drawn.noise, drawn.t_teacher)[0])
    for name in ("t", "t_teacher", "labels", "teacher_labels"):
        assert torch.equal(getattr(made, name), getattr(drawn, name)), name


def moments(numbers: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """(B, 6, 2, 3) means and standard deviations of 3 channels, and labels; the same for numbers 64 apart."""
    generator = torch.Generator().manual_seed(0)
    mean, std = 3 * torch.randn(64, 3, 2, 3, generator=generator), 0.1 + torch.rand(64, 3, 2, 3, generator=generator)
    return torch.cat([mean, std], dim=1)[numbers % 64].to(dtype), numbers % 10


AS_IT_IS = torch.zeros(3), torch.ones(3)
LATENTS = Stored(True, torch.tensor([0.5, -1.0, 2.0]), torch.tensor([0.18215, 2.0, 0.75]))


def test_many_samples_of_a_posterior_have_its_mean_and_deviation() -> None:
    number, n = 64 * MANY, len(MANY)  # one image, many times
    data, _ = moments(number)
    mean, std = data[0].double().chunk(2)
    x = clean_ref(data, number, 3, Stored(True, *AS_IT_IS)).double()
    assert x.shape == (n, 3, 2, 3)
    assert bool(((x.mean(0) - mean).abs() < 4 * std / math.sqrt(n)).all())
    assert bool(((x.std(0) - std).abs() < 4 * std / math.sqrt(2 * n)).all())
    normal = ((x - mean) / std).flatten(1)
    for column in normal.T:
        assert kolmogorov(column, torch.special.ndtr(column)) < 1.95
    correlation = torch.corrcoef(normal.T) - torch.eye(18)
    assert float(correlation.abs().max()) < 5 / math.sqrt(n)


def test_a_posterior_sample_has_a_stream_of_its_own() -> None:
    number, stored = torch.arange(50), Stored(True, *AS_IT_IS)
    data, labels = moments(number)
    mean, std = data.chunk(2, dim=1)
    drawn = draw_ref(data, labels, number, PUBLISHED, stored)
    own = normals(3, number, Draw.POSTERIOR, 18).view_as(mean)
    torch.testing.assert_close(drawn.x, mean + std * own, rtol=0, atol=1e-6)
    assert torch.equal(drawn.noise.flatten(1), normals(3, number, Draw.NOISE, 18))
    assert abs(float(torch.corrcoef(torch.stack([own.flatten(), drawn.noise.flatten()]))[0, 1])) < 4 / math.sqrt(900)


def test_another_image_number_or_seed_takes_another_sample_of_the_same_posterior() -> None:
    number = torch.arange(64)
    data, _ = moments(number)
    one = clean_ref(data, number, 3, LATENTS)
    for other in (clean_ref(data, number + 64, 3, LATENTS), clean_ref(data, number, 4, LATENTS)):
        assert not (one == other).any()


def test_a_posterior_without_deviation_is_its_mean() -> None:
    data, _ = moments(torch.arange(8))
    data[:, 3:] = 0
    assert torch.equal(clean_ref(data, torch.arange(8), 3, Stored(True, *AS_IT_IS)), data[:, :3])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.uint8])
def test_the_shift_of_a_channel_is_taken_off_and_the_rest_scaled_in_float32(dtype: torch.dtype) -> None:
    data = torch.randint(256, (4, 3, 2, 3), generator=torch.Generator().manual_seed(0)).to(dtype)
    _, shift, scale = LATENTS
    x = clean_ref(data, torch.arange(4), 3, Stored(False, shift, scale))
    assert x.dtype == torch.float32
    for channel in range(3):
        right = (data[:, channel].double() - float(shift[channel])) * float(scale[channel])
        torch.testing.assert_close(x[:, channel].double(), right, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("changes", "stored", "steps"),
    [
        ({}, None, None),
        ({"times": "lognormal", "path": "cosine"}, None, None),
        ({}, None, 1000),
        ({"shared_label_dropout": False}, None, None),
        ({}, LATENTS, None),
        ({}, LATENTS, 1000),
    ],
    ids=["published", "lognormal", "dit", "unshared", "posterior", "dit's posterior"],
)
def test_an_image_number_draws_the_same_in_any_batch(changes: dict, stored: Stored | None, steps: int | None) -> None:
    settings = PUBLISHED._replace(label_dropout=0.5, **changes)
    together, of = torch.tensor([5, 6, 2**32 + 7, 8, 2**40]), moments if stored else batch
    whole = draw_ref(*of(together), together, settings, stored, steps)
    for rows in ([3], [4, 0], [2, 1, 3]):
        part = draw_ref(*of(together[rows]), together[rows], settings, stored, steps)
        for name, got, wanted in zip(whole._fields, part, whole, strict=True):
            assert torch.equal(got, wanted[rows]), name


def test_another_seed_draws_otherwise() -> None:
    number = torch.arange(8)
    one, other = (draw_ref(*batch(number), number, PUBLISHED._replace(seed=seed)) for seed in (3, 4))
    for name in ("noise", "t", "t_teacher"):
        assert not (getattr(one, name) == getattr(other, name)).any(), name


def test_unknown_names_are_refused_with_the_allowed_ones() -> None:
    with pytest.raises(ValueError, match="path: 'spiral' given; must be one of linear, cosine"):
        path_coefficients("spiral", torch.zeros(1))
    with pytest.raises(ValueError, match="times: 'never' given; must be one of uniform, lognormal"):
        flow_times(0, torch.arange(1), "linear", "never", 0.2)
