"""Distances against closed forms and scipy; good, bad and copied samples are told apart."""

from __future__ import annotations

import dataclasses
import math
from itertools import cycle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

from sra_fast.config import EvaluateConfig, ModelConfig, SampleConfig
from sra_fast.errors import Refused
from sra_fast.evaluation import evaluate as evaluation
from sra_fast.evaluation.evaluate import Report, check_inputs, evaluate, features, nearest_distance
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


@pytest.mark.parametrize("size", [1, 2, 17])
def test_frechet_of_known_covariances_is_scipys(size):
    covs, means = [covariance(size, seed) for seed in (1, 2)], np.random.default_rng(3).standard_normal((2, size))
    a, b = (whitened(80, size, i) @ np.linalg.cholesky(covs[i]).T + means[i] for i in (0, 1))
    expected = gaussian_distance(means[0], covs[0], means[1], covs[1])
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-10)
    assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-10)


def test_frechet_of_equal_sets_is_zero_also_for_singular_covariances():
    x = np.random.default_rng(0).random((30, 64))  # fewer rows than features
    assert frechet_distance(x, x[::-1]) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(x, x + 2) == pytest.approx(4 * 64, rel=1e-6)
    x = np.random.default_rng(0).random((500, 8)).astype(np.float32) + 1000  # sums in float32 lose digits here
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


@pytest.fixture(scope="module")
def digits():
    """scikit-learn's digits in three parts: training, held out, and `fresh`, used as samples."""
    data = sklearn_datasets.load_digits()
    order = np.random.default_rng(0).permutation(len(data.images))
    x = torch.from_numpy(data.images[order] / 8 - 1).float()[:, None]
    y = torch.from_numpy(data.target[order])
    parts = zip(("train", "held_out", "fresh"), np.split(np.arange(1797), [1000, 1400]), strict=True)
    return SimpleNamespace(**{name: (x[rows], y[rows]) for name, rows in parts})


def of_classes(images, labels, wanted):
    """For each wanted class an image of it, each used once as far as they go."""
    rows = {label: cycle((labels == label).nonzero().flatten().tolist()) for label in range(10)}
    return images[[next(rows[label]) for label in wanted.tolist()]]


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


def failed(report):
    """Names of the missed thresholds."""
    return [failure.split(":")[0] for failure in report.failures(BARS)]


FRECHET = "frechet_distance / frechet_distance_real"


def test_new_real_images_pass_every_threshold(report_on, digits):
    report = report_on(lambda labels, guidance: of_classes(*digits.fresh, labels))
    assert failed(report) == []
    assert report.class_accuracy > 0.97
    assert report.real_accuracy > 0.97
    assert 0.8 < report.nearest_train_ratio < 1.2
    assert report.frechet_distance / report.frechet_distance_real < 2


def test_copies_of_training_images_fail_by_their_nearness_alone(report_on, digits):
    report = report_on(lambda labels, guidance: of_classes(*digits.train, labels))
    assert report.nearest_train_ratio < 1e-6
    assert failed(report) == ["nearest_train_ratio"]


def test_noise_fails_accuracy_and_frechet(report_on):
    generator = torch.Generator().manual_seed(0)
    report = report_on(lambda labels, guidance: torch.randn(len(labels), 1, 8, 8, generator=generator))
    assert failed(report) == ["class_accuracy", "class_accuracy_guided", FRECHET]
    assert report.class_accuracy < 0.3


def test_one_image_per_class_fails_frechet(report_on, digits):
    """Ten images have the right classes and the wrong distribution."""
    first = torch.stack([digits.fresh[0][digits.fresh[1] == label][0] for label in range(10)])
    assert FRECHET in failed(report_on(lambda labels, guidance: first[labels]))


def test_guided_samples_are_judged_apart(report_on, digits):
    seen = []

    def make(labels, guidance):
        seen.append(guidance)
        return of_classes(*digits.fresh, labels if guidance == 1 else (labels + 1) % 10)  # guided: wrong classes

    report = report_on(make, dataclasses.replace(BARS, guidance=2.5))
    assert sorted(seen) == [1.0, 2.5]
    assert report.class_accuracy > 0.95 > 0.05 > report.class_accuracy_guided
    assert report.frechet_distance / report.frechet_distance_real < 2


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
def test_each_missed_threshold_is_named_with_its_value(field, value, name):
    good = Report(0.95, 0.95, 1.0, 3.0, 1.0, 0.5)
    assert good.failures(BARS) == []
    (failure,) = dataclasses.replace(good, **{field: value}).failures(BARS)
    assert failure.startswith(f"{name}: {value:.2g}")
    assert dataclasses.replace(good, **{field: value}).failures(EvaluateConfig()) == []


def test_a_real_distance_of_zero_is_a_failure_and_no_crash():
    assert failed(Report(1.0, 1.0, 1.0, 3.0, 0.0, 1.0)) == [FRECHET]


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((3 * 33 * 33, 10, 100, 100), "values per image: 3267 given; must be at most 3072"),
        ((64, 10, 20_001, 100), "training images: 20001 given; must be at most 20000"),
        ((64, 10, 100, 1), "held-out images: 1 given; must be at least 2"),
        ((64, 1, 100, 100), "classes: 1 given; must be at least 2"),
    ],
)
def test_sets_that_cannot_be_judged_are_refused(sizes, message):
    values, classes, train, held_out = sizes
    with pytest.raises(Refused, match=message):
        check_inputs(values, classes, range(train), range(held_out))


def test_evaluate_checks_its_inputs(report_on):
    large = torch.zeros(20, 3, 33, 33), torch.arange(20) % 10
    with pytest.raises(Refused, match="must be at most 3072"):
        report_on(None, train=large, held_out=large)
