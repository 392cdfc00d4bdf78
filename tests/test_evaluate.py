"""Distances against closed forms, and whether good, bad and copied samples are told apart."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

from sra_fast.config import EvaluateConfig, ModelConfig, SampleConfig
from sra_fast.errors import Refused
from sra_fast.evaluation import evaluate as evaluation
from sra_fast.evaluation.evaluate import Report, evaluate, features, nearest_distance
from sra_fast.evaluation.frechet import frechet_distance

sklearn_datasets = pytest.importorskip("sklearn.datasets")

BARS = EvaluateConfig(
    samples=350,
    min_class_accuracy=0.95,
    min_class_accuracy_guided=0.95,
    max_frechet_ratio=3.0,
    min_nearest_ratio=0.5,
)


def whitened(count, size, seed=0):
    """(count, size) rows with mean exactly zero and covariance exactly one."""
    x = np.random.default_rng(seed).standard_normal((count, size))
    q, _ = np.linalg.qr(x - x.mean(0))
    return q * math.sqrt(count - 1)


def covariance(size, seed):
    root = np.random.default_rng(seed).standard_normal((size, size))
    return root @ root.T + 0.1 * np.eye(size)


def gaussian_distance(mean_a, cov_a, mean_b, cov_b):
    """By the textbook formula with a general matrix square root."""
    return ((mean_a - mean_b) ** 2).sum() + np.trace(cov_a + cov_b - 2 * sqrtm(cov_a @ cov_b).real)


def test_frechet_of_known_means_and_variances_is_exact():
    deviations = np.array([[1.0, 2.0, 0.5], [3.0, 0.0, 0.5]])
    means = np.array([[0.0, 1.0, -1.0], [2.0, 1.0, 0.0]])
    a, b = (whitened(50, 3, seed) * deviations[seed] + means[seed] for seed in (0, 1))
    expected = ((means[0] - means[1]) ** 2).sum() + ((deviations[0] - deviations[1]) ** 2).sum()
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("size", [1, 2, 17])
def test_frechet_of_known_covariances_is_scipys(size):
    covs, means = [covariance(size, seed) for seed in (1, 2)], np.random.default_rng(3).standard_normal((2, size))
    a, b = (whitened(80, size, i) @ np.linalg.cholesky(covs[i]).T + means[i] for i in (0, 1))
    expected = gaussian_distance(means[0], covs[0], means[1], covs[1])
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-10)
    assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-10)


def test_frechet_of_large_samples_approaches_that_of_their_gaussians():
    generator = np.random.default_rng(0)
    mean, cov = np.array([1.0, -2.0]), np.array([[2.0, 0.7], [0.7, 0.5]])
    a, b = generator.standard_normal((200_000, 2)), generator.multivariate_normal(mean, cov, 200_000)
    assert frechet_distance(a, b) == pytest.approx(gaussian_distance(np.zeros(2), np.eye(2), mean, cov), rel=0.01)


def test_frechet_of_equal_sets_is_zero_also_for_singular_covariances():
    x = np.random.default_rng(0).random((30, 64))  # fewer rows than features
    assert frechet_distance(x, x[::-1]) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(x, x + 2) == pytest.approx(4 * 64, rel=1e-6)


def test_frechet_is_computed_in_float64():
    x = np.random.default_rng(0).random((500, 8)).astype(np.float32) + 1000
    assert frechet_distance(x, x + np.float32(0.5)) == pytest.approx(8 * 0.25, rel=1e-6)


def test_nearest_distance_by_brute_force():
    generator = np.random.default_rng(0)
    a, b = generator.random((13, 5)), generator.random((29, 5))
    expected = np.mean([min(np.linalg.norm(row - other) for other in b) for row in a])
    assert nearest_distance(a, b) == pytest.approx(expected, rel=1e-12)
    assert nearest_distance(b[:7], b) == 0


def test_features_are_the_saved_pixels():
    x = torch.tensor([[-1.0, 1.0], [0.0, 1.2]]).view(1, 1, 2, 2)
    assert features(x).tolist() == [[0, 1, 128 / 255, 1]]
    rgb = torch.linspace(-1, 1, 12).view(1, 3, 2, 2)
    assert features(rgb).shape == (1, 12)


# The whole evaluation, with given images in place of a network's


class Digits:
    """scikit-learn's digits in three parts: training, held out, and fresh ones that play the part of samples."""

    def __init__(self):
        digits = sklearn_datasets.load_digits()
        order = np.random.default_rng(0).permutation(len(digits.images))
        x = torch.from_numpy(digits.images[order] / 8 - 1).float()[:, None]
        y = torch.from_numpy(digits.target[order])
        self.train, self.held_out, self.fresh = ((x[part], y[part]) for part in np.split(np.arange(1797), [1000, 1400]))


@pytest.fixture(scope="module")
def digits():
    return Digits()


def of_classes(images, labels, wanted):
    """For each wanted class an image of it, each used once where there are enough."""
    queues = {label: (labels == label).nonzero().flatten().tolist() for label in range(10)}
    used = dict.fromkeys(queues, 0)
    rows = []
    for label in wanted.tolist():
        rows.append(queues[label][used[label] % len(queues[label])])
        used[label] += 1
    return images[rows]


@pytest.fixture
def report_on(digits, monkeypatch):
    """The report on samples that make(labels, guidance) returns."""

    def call(make, bars=BARS, **changes):
        def generate(network, labels, indices, *, config, model, path, progress):
            assert labels.tolist() == [i % 10 for i in range(bars.samples)]
            assert indices.tolist() == list(range(bars.samples))
            return make(labels, config.guidance)

        monkeypatch.setattr(evaluation, "generate", generate)
        parts = {"train": digits.train, "held_out": digits.held_out, **changes}
        return evaluate(
            torch.nn.Linear(1, 1),
            parts["train"],
            parts["held_out"],
            model=ModelConfig(input_size=8, channels=1, classes=10),
            path="linear",
            sample=SampleConfig(guidance=7.0),
            config=bars,
        )

    return call


def test_new_real_images_pass_every_bar(report_on, digits):
    report = report_on(lambda labels, guidance: of_classes(*digits.fresh, labels))
    assert report.failures(BARS) == []
    assert report.class_accuracy > 0.97
    assert report.real_accuracy > 0.97
    assert 0.8 < report.nearest_train_ratio < 1.2
    assert report.frechet_distance / report.frechet_distance_real < 2


def test_copies_of_training_images_fail_by_their_nearness_alone(report_on, digits):
    report = report_on(lambda labels, guidance: of_classes(*digits.train, labels))
    assert report.nearest_train_ratio < 1e-6
    (failure,) = report.failures(BARS)
    assert failure.startswith("nearest_train_ratio: ")


def test_noise_fails_accuracy_and_frechet(report_on):
    generator = torch.Generator().manual_seed(0)
    report = report_on(lambda labels, guidance: torch.randn(len(labels), 1, 8, 8, generator=generator))
    names = [failure.split(":")[0] for failure in report.failures(BARS)]
    assert names == ["class_accuracy", "class_accuracy_guided", "frechet_distance / frechet_distance_real"]
    assert report.class_accuracy < 0.3


def test_one_image_per_class_fails_frechet(report_on, digits):
    """Collapse to ten images is right by class and far in distribution."""
    first = torch.stack([digits.fresh[0][digits.fresh[1] == label][0] for label in range(10)])
    report = report_on(lambda labels, guidance: first[labels])
    assert "frechet_distance / frechet_distance_real" in [f.split(":")[0] for f in report.failures(BARS)]


def test_right_images_under_wrong_classes_fail_accuracy(report_on, digits):
    report = report_on(lambda labels, guidance: of_classes(*digits.fresh, (labels + 1) % 10))
    assert report.class_accuracy < 0.05
    assert report.frechet_distance / report.frechet_distance_real < 2


def test_guidance_one_is_judged_apart_from_guidance_as_configured(report_on, digits):
    seen = []

    def make(labels, guidance):
        seen.append(guidance)
        return of_classes(*digits.fresh, labels if guidance == 1 else (labels + 1) % 10)

    report = report_on(make, dataclasses.replace(BARS, guidance=2.5))
    assert sorted(seen) == [1.0, 2.5]
    assert report.class_accuracy > 0.95 > 0.05 > report.class_accuracy_guided


@pytest.mark.parametrize(
    ("field", "value", "name"),
    [
        ("class_accuracy", 0.94, "class_accuracy"),
        ("class_accuracy_guided", 0.94, "class_accuracy_guided"),
        ("frechet_distance", 3.1, "frechet_distance / frechet_distance_real"),
        ("nearest_train_ratio", 0.4, "nearest_train_ratio"),
        ("nearest_train_ratio", math.nan, "nearest_train_ratio"),
        ("frechet_distance", math.nan, "frechet_distance / frechet_distance_real"),
    ],
)
def test_each_failing_bar_is_named_with_its_value(field, value, name):
    good = Report(0.95, 0.95, 1.0, 3.0, 1.0, 0.5)
    assert good.failures(BARS) == []
    (failure,) = dataclasses.replace(good, **{field: value}).failures(BARS)
    assert failure.startswith(f"{name}: {value:.2g}")
    assert dataclasses.replace(good, **{field: value}).failures(EvaluateConfig()) == []


def test_a_real_distance_of_zero_is_a_failure_and_no_crash():
    (failure,) = Report(1.0, 1.0, 1.0, 3.0, 0.0, 1.0).failures(BARS)
    assert failure.startswith("frechet_distance")


def test_held_out_copies_of_training_images_do_not_crash(report_on, digits):
    copies = tuple(part[:300] for part in digits.train)
    report = report_on(lambda labels, guidance: of_classes(*digits.fresh, labels), held_out=copies)
    assert not math.isnan(report.class_accuracy)


@pytest.mark.parametrize("size", [64, 33])
def test_large_images_are_refused(report_on, size):
    large = torch.zeros(20, 3, size, size), torch.arange(20) % 10
    with pytest.raises(Refused, match="must be at most 3072"):
        report_on(None, train=large, held_out=large)


def test_too_many_images_are_refused(report_on):
    many = torch.zeros(1, 1, 8, 8).expand(20_001, 1, 8, 8), torch.zeros(20_001, dtype=torch.int64)
    with pytest.raises(Refused, match="must be at most 20000"):
        report_on(None, train=many)
