"""Evaluation of samples against held-out real images.

    class accuracy       share of samples that a classifier trained on the real training images assigns to their class
    Frechet distance     between samples and held-out images, in pixel space; for reference, also between training and
                         held-out images
    nearest-train ratio  mean distance of samples to their nearest training image, divided by that of held-out images:
                         1 for new images, 0 for copies of the training set

Features are the flattened pixels in [0, 1]: meaningful for small images only; large ones are refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sized
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch
from torch import Tensor

from sra_fast.config import EvaluateConfig, ModelConfig, SampleConfig
from sra_fast.errors import Refused
from sra_fast.evaluation.frechet import frechet_distance
from sra_fast.evaluation.judge import Judge, require_scikit_learn
from sra_fast.model.transformer import Transformer
from sra_fast.sampling.generate import balanced_labels, generate
from sra_fast.sampling.guidance import prediction_only
from sra_fast.sampling.images import to_uint8

LARGEST_IMAGE = 3 * 32 * 32  # values
LARGEST_SET = 20_000  # images; training the classifier takes quadratic time


@dataclass(frozen=True)
class Report:
    """Results of one evaluation, with the names of summary.json."""

    class_accuracy: float
    class_accuracy_guided: float
    real_accuracy: float  # of the classifier on held-out images: an upper limit for samples
    frechet_distance: float
    frechet_distance_real: float
    nearest_train_ratio: float

    def failures(self, config: EvaluateConfig) -> list[str]:
        """One line for each threshold that is missed."""
        ratio = _ratio(self.frechet_distance, self.frechet_distance_real)
        checks = [
            ("class_accuracy", self.class_accuracy, ">=", config.min_class_accuracy),
            ("class_accuracy_guided", self.class_accuracy_guided, ">=", config.min_class_accuracy_guided),
            ("frechet_distance / frechet_distance_real", ratio, "<=", config.max_frechet_ratio),
            ("nearest_train_ratio", self.nearest_train_ratio, ">=", config.min_nearest_ratio),
        ]
        return [
            f"{name}: {value:.4g}; must be {sign} {limit:g}"
            for name, value, sign, limit in checks
            if limit and not (value >= limit if sign == ">=" else value <= limit)  # so that NaN fails
        ]

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


def features(x: Tensor) -> np.ndarray:
    """Images (N, C, H, W) in [-1, 1] -> (N, H W C) float64 pixels in [0, 1], rounded to 8 bits as in a file."""
    return to_uint8(x).reshape(len(x), -1) / 255.0


def nearest_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Mean Euclidean distance from the rows of a to their nearest row of b."""
    distances = torch.cdist(torch.from_numpy(a), torch.from_numpy(b), compute_mode="donot_use_mm_for_euclid_dist")
    return float(distances.min(dim=1).values.mean())


def check_inputs(values: int, classes: int, train: Sized, held_out: Sized) -> None:
    """Check that `evaluate` can run; training calls this before it starts.

    Args:
        values: values per image, C H W.
        classes: number of classes.
        train, held_out: the sets, or anything of their lengths.

    Raises:
        Refused: if the images or the training set are too large, there are too few images or classes, or scikit-learn
            is not installed.
    """
    if values > LARGEST_IMAGE:
        raise Refused("evaluate: values per image", values, f"must be at most {LARGEST_IMAGE}")
    if len(train) > LARGEST_SET:
        raise Refused("evaluate: training images", len(train), f"must be at most {LARGEST_SET}")
    if len(held_out) < 2:
        raise Refused("evaluate: held-out images", len(held_out), "must be at least 2")
    if classes < 2:
        raise Refused("evaluate: classes", classes, "must be at least 2")
    require_scikit_learn()


def evaluate(
    network: Transformer,
    train: tuple[Tensor, Tensor],
    held_out: tuple[Tensor, Tensor],
    *,
    model: ModelConfig,
    path: str,
    sample: SampleConfig,
    config: EvaluateConfig,
    progress: Callable[[int], object] | None = None,
) -> Report:
    """Generate `config.samples` images without guidance and as many with, equally many of each class, and compare them
    with real images.

    Args:
        network: in evaluation mode; usually the EMA.
        train, held_out: (images (N, C, H, W) float32 in [-1, 1], labels (N,) int64).
        model, path, sample: as in `sampling.generate`; guidance and count are those of `config`.
        progress: called after each batch with the number of images in it.
    """
    device = next(network.parameters()).device
    check_inputs(train[0][0].numel(), model.classes, train[0], held_out[0])
    labels = balanced_labels(config.samples, model.classes).to(device)
    indices = torch.arange(config.samples, device=device)

    def samples(guidance: float) -> np.ndarray:
        settings = replace(sample, guidance=guidance)
        x = generate(
            prediction_only(network), labels, indices, config=settings, model=model, path=path, progress=progress
        )
        return features(x)

    real, new = features(train[0]), features(held_out[0])
    unguided, guided = samples(1.0), samples(config.guidance)
    judge, sample_labels = Judge(real, train[1].cpu().numpy()), labels.cpu().numpy()
    return Report(
        class_accuracy=judge.accuracy(unguided, sample_labels),
        class_accuracy_guided=judge.accuracy(guided, sample_labels),
        real_accuracy=judge.accuracy(new, held_out[1].cpu().numpy()),
        frechet_distance=frechet_distance(unguided, new),
        frechet_distance_real=frechet_distance(real, new),
        nearest_train_ratio=_ratio(nearest_distance(unguided, real), nearest_distance(new, real)),
    )


def _ratio(a: float, b: float) -> float:
    return a / b if b else math.inf
