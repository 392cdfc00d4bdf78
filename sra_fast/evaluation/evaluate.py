"""What a run's samples are worth, measured against real images the network has never seen.

    class accuracy       share of samples that a judge trained on real training images recognises as the class asked for
    Frechet distance     of samples to held-out images in pixel space; beside it that of training to held-out images
    nearest-train ratio  mean distance of samples to their nearest training image, over that of held-out images:
                         1 is as far from the training set as new real images are, 0 is a copy of it

Features are the pixels themselves, in [0, 1], flattened: honest for small images, meaningless for large ones, which
are refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sized
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch
from torch import Tensor

from sra_fast.config import EvaluateConfig, ModelConfig, SampleConfig, refuse_unless
from sra_fast.evaluation.frechet import frechet_distance
from sra_fast.evaluation.judge import Judge, require_scikit_learn
from sra_fast.model.transformer import Transformer
from sra_fast.sampling.generate import balanced_labels, generate
from sra_fast.sampling.images import to_uint8

LARGEST_IMAGE = 3 * 32 * 32  # values
LARGEST_SET = 20_000  # images; the judge's training time grows with the square


@dataclass(frozen=True)
class Report:
    """Figures of one evaluation, under the names of summary.json."""

    class_accuracy: float
    class_accuracy_guided: float
    real_accuracy: float  # the judge on real held-out images: how far it can be trusted
    frechet_distance: float
    frechet_distance_real: float
    nearest_train_ratio: float

    def failures(self, bars: EvaluateConfig) -> list[str]:
        """One line for each bar that is not reached."""
        ratio = _ratio(self.frechet_distance, self.frechet_distance_real)
        checks = [
            ("class_accuracy", self.class_accuracy, ">=", bars.min_class_accuracy),
            ("class_accuracy_guided", self.class_accuracy_guided, ">=", bars.min_class_accuracy_guided),
            ("frechet_distance / frechet_distance_real", ratio, "<=", bars.max_frechet_ratio),
            ("nearest_train_ratio", self.nearest_train_ratio, ">=", bars.min_nearest_ratio),
        ]
        return [
            f"{name}: {value:.4g}; must be {sign} {bar:g}"
            for name, value, sign, bar in checks
            if bar and not (value >= bar if sign == ">=" else value <= bar)
        ]

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


def features(x: Tensor) -> np.ndarray:
    """Images (N, C, H, W) in [-1, 1] -> (N, H W C) float64 pixels in [0, 1], rounded to 8 bits as they would be
    saved."""
    return to_uint8(x).reshape(len(x), -1) / 255.0


def nearest_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Mean over a's rows of the Euclidean distance to the nearest row of b."""
    distances = torch.cdist(torch.from_numpy(a), torch.from_numpy(b), compute_mode="donot_use_mm_for_euclid_dist")
    return float(distances.min(dim=1).values.mean())


def refuse_unless_possible(values: int, classes: int, train: Sized, held_out: Sized) -> None:
    """Refuse what `evaluate` cannot judge, before a run is spent on it.

    Args:
        values: per image, C H W.
        classes: of the model.
        train, held_out: anything with the sets' lengths.
    """
    refuse_unless(values <= LARGEST_IMAGE, "evaluate: values per image", values, f"must be at most {LARGEST_IMAGE}")
    refuse_unless(len(train) <= LARGEST_SET, "evaluate: training images", len(train), f"must be at most {LARGEST_SET}")
    refuse_unless(len(held_out) > 1, "evaluate: held-out images", len(held_out), "must be at least 2")
    refuse_unless(classes > 1, "evaluate: classes", classes, "must be at least 2")
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
    """Generate `config.samples` images without guidance and as many with, classes in equal shares, and compare them
    with real ones.

    Args:
        network: in evaluation mode; usually the EMA.
        train, held_out: (images (N, C, H, W) float32 in [-1, 1], labels (N,) int64).
        model, path, sample: as `sampling.generate`; guidance and count come from `config`.
        progress: called with the number of images after each batch.
    """
    device = next(network.parameters()).device
    refuse_unless_possible(train[0][0].numel(), model.classes, train[0], held_out[0])
    labels = balanced_labels(config.samples, model.classes).to(device)

    def samples(guidance: float) -> np.ndarray:
        settings = replace(sample, guidance=guidance)
        indices = torch.arange(config.samples, device=device)
        return features(
            generate(network_of(network), labels, indices, config=settings, model=model, path=path, progress=progress)
        )

    real, real_labels = features(train[0]), train[1].cpu().numpy()
    unseen, unseen_labels = features(held_out[0]), held_out[1].cpu().numpy()
    plain, guided, wanted = samples(1.0), samples(config.guidance), labels.cpu().numpy()
    judge = Judge(real, real_labels)
    return Report(
        class_accuracy=judge.accuracy(plain, wanted),
        class_accuracy_guided=judge.accuracy(guided, wanted),
        real_accuracy=judge.accuracy(unseen, unseen_labels),
        frechet_distance=frechet_distance(plain, unseen),
        frechet_distance_real=frechet_distance(real, unseen),
        nearest_train_ratio=_ratio(nearest_distance(plain, real), nearest_distance(unseen, real)),
    )


def _ratio(a: float, b: float) -> float:
    return a / b if b else math.inf


def network_of(model: Transformer) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The prediction alone, as samplers call it."""
    return lambda x, t, labels: model(x, t, labels)[0]
