"""Self-representation alignment: an early block learns from a later block of the network's own EMA, at lower noise.

A method of self-guidance answers six questions, and SRA's answers are:

    which taps       student block m, teacher block n, m < n (Config.taps, by default the published pairs)
    which teacher    the EMA of the student, in eval mode, run up to block n
    which input      the same x and noise at the lower time t_teacher, and the labels after dropout
    which target     block n's output itself; only the student has a projection head
    which distance   AlignConfig.distance, in float32
    which weight     AlignConfig.weight over time, see `alignment_weight`

Source: Jiang et al., "No Other Representation Component Is Needed: Diffusion Transformers Can Provide Representation
Guidance by Themselves" (SRA), arXiv 2505.02831, section 3, and its public code.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.profiler import record_function

from sra_fast.config import AlignConfig
from sra_fast.kernels.perturb import NoisedBatch
from sra_fast.objective.ddpm import Diffusion
from sra_fast.objective.flow import Flow


class Losses(NamedTuple):
    """Scalars in float32. total = generative + weight * alignment."""

    total: Tensor
    generative: Tensor
    alignment: Tensor


class Alignment(NamedTuple):
    """What is aligned, and how.

    Attributes:
        student_tap, teacher_tap: the blocks whose outputs are aligned, 1-based.
        distance: (student features, teacher features), each (B, T, D) -> scalar.
    """

    student_tap: int
    teacher_tap: int
    distance: Callable[[Tensor, Tensor], Tensor]


def alignment_weight(config: AlignConfig, epoch: int) -> float:
    """Weight of the alignment loss in a 0-based epoch: constant up to weight_hold_epochs, then it decays by a factor of
    10 per weight_decade_epochs. SRA's code: 0.2 * 10^-((epoch - 149) / 1000) past epoch 149."""
    if config.method == "none":
        return 0.0
    if not config.weight_decade_epochs or epoch <= config.weight_hold_epochs:
        return config.weight
    return config.weight * 10 ** (-(epoch - config.weight_hold_epochs) / config.weight_decade_epochs)


def training_losses(
    objective: Flow | Diffusion,
    alignment: Alignment | None,
    student: Callable[..., tuple[Tensor, Tensor | None]],
    teacher: Callable[..., Tensor],
    batch: NoisedBatch,
    weight: Tensor | float,
) -> Losses:
    """All losses of one batch.

    Args:
        objective: what the student predicts.
        alignment: blocks and distance; None trains the plain model, and the teacher is not called.
        student: (x, t, labels, tap) -> (prediction, projected features of block `tap`).
        teacher: (x, t, labels, tap) -> features of block `tap`.
        batch: inputs of both, and the target.
        weight: of the alignment loss.
    """
    with record_function("sra_fast::student"):
        tap = alignment.student_tap if alignment else 0
        prediction, features = student(batch.x_t, batch.t, batch.labels, tap)
    with record_function("sra_fast::loss"):
        generative = objective.loss(prediction, batch)
    if alignment is None:
        return Losses(generative, generative, torch.zeros_like(generative))
    with record_function("sra_fast::teacher"), torch.no_grad():
        target = teacher(batch.x_teacher, batch.t_teacher, batch.teacher_labels, alignment.teacher_tap)
    with record_function("sra_fast::loss"):
        assert features is not None, "the student was called with a tap"
        distance = alignment.distance(features, target)
    return Losses(generative + weight * distance, generative, distance)
