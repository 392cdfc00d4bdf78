"""Self-representation alignment: a network's early block learns from a later block of its own average, at lower noise.

A method of self-guidance answers six questions, and SRA's answers are:

    which taps       student block m, teacher block n, m < n (AlignConfig.taps: the published pairs)
    which teacher    the EMA of the student, in eval mode, run no further than block n
    what it sees     the same x and noise at the lower time t_teacher, and the labels after dropout
    which target     block n's output as it is; only the student has a projection head
    which distance   AlignConfig.distance, in float32
    which weight     AlignConfig.weight over time, `alignment_weight` below

Source: Jiang et al., "No Other Representation Component Is Needed: Diffusion Transformers Can Provide Representation
Guidance by Themselves" (SRA), arXiv 2505.02831, section 3, and its public code.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from sra_fast.config import AlignConfig
from sra_fast.objective import Noised
from sra_fast.objective.ddpm import Diffusion
from sra_fast.objective.flow import Flow


class Losses(NamedTuple):
    """Scalars in float32. total = generative + weight * alignment."""

    total: Tensor
    generative: Tensor
    alignment: Tensor


def alignment_weight(config: AlignConfig, epoch: int) -> float:
    """Weight of the alignment loss in a 0-based epoch: constant up to weight_hold_epochs, then tenfold less every
    weight_decade_epochs. SRA's code: 0.2 * 10^-((epoch - 149) / 1000) past epoch 149."""
    if config.method == "none":
        return 0.0
    if not config.weight_decade_epochs or epoch <= config.weight_hold_epochs:
        return config.weight
    return config.weight * 10 ** (-(epoch - config.weight_hold_epochs) / config.weight_decade_epochs)


def training_losses(
    objective: Flow | Diffusion,
    student: Callable[..., tuple[Tensor, Tensor | None]],
    teacher: Callable[..., Tensor] | None,
    distance: Callable[[Tensor, Tensor], Tensor],
    noised: Noised,
    labels: Tensor,
    teacher_labels: Tensor,
    weight: Tensor | float,
    taps: tuple[int, int],
) -> Losses:
    """All losses of one batch.

    Args:
        objective: what the student predicts.
        student: (x, t, labels, tap=m) -> (prediction, projected features of block m).
        teacher: (x, t, labels, tap=n) -> features of block n; None trains the plain model.
        distance: (student features, teacher features), each (B, T, D) -> scalar.
        noised: the batch.
        labels, teacher_labels: (B,) int64 after label dropout.
        weight: of the alignment loss.
        taps: (m, n), 1-based.
    """
    if teacher is None:
        prediction, _ = student(noised.x_t, noised.t, labels)
        generative = objective.loss(prediction, noised)
        return Losses(generative, generative, torch.zeros_like(generative))
    prediction, features = student(noised.x_t, noised.t, labels, tap=taps[0])
    with torch.no_grad():
        target = teacher(noised.x_teacher, noised.t_teacher, teacher_labels, tap=taps[1])
    generative, alignment = objective.loss(prediction, noised), distance(features, target)
    return Losses(generative + weight * alignment, generative, alignment)
