"""One training step as one function of (state, batch): draw, two forwards, losses, backward, update, metrics.

The host decides nothing from device values here: no `.item()`, no branch on a tensor, shapes fixed. Metrics go into a
ring buffer on the device that the trainer reads when it logs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sra_fast.config import Config
from sra_fast.kernels import implementation
from sra_fast.objective import Noised
from sra_fast.objective.alignment import Losses, training_losses
from sra_fast.objective.ddpm import DIFFUSION_STEPS, Diffusion
from sra_fast.objective.flow import Flow
from sra_fast.optim import TrainState, update


class Metrics(NamedTuple):
    """One row of the ring buffer, float32 scalars."""

    loss: Tensor
    velocity_loss: Tensor  # the generative loss; DiT's noise and variance loss goes by the same name
    alignment_loss: Tensor
    grad_norm: Tensor  # before clipping
    lr: Tensor
    ema_decay: Tensor


class MetricRing:
    """The last `rows` steps' metrics, on the device."""

    def __init__(self, rows: int, device: torch.device) -> None:
        self.buffer = torch.zeros(rows, len(Metrics._fields), device=device)
        self._slot = torch.zeros(1, dtype=torch.int64, device=device)

    def push(self, metrics: Metrics) -> None:
        """Write one row over the oldest."""
        self.buffer.index_copy_(0, self._slot, torch.stack(metrics)[None])
        self._slot.add_(1).remainder_(self.buffer.shape[0])

    def last(self, rows: int) -> list[Metrics]:
        """The newest `rows` rows, oldest first, as floats. Waits for the device."""
        newest = self.buffer.roll(-int(self._slot), dims=0)[len(self.buffer) - rows :]
        return [Metrics(*row) for row in newest.tolist()]


class TrainingStep:
    """The step of one run, with everything fixed that does not change between steps.

    Args:
        config: of the run, with the model's sizes filled in.
        resolved: implementation of each op, see `kernels.resolve`.
        device: where the state lives.
    """

    def __init__(self, config: Config, resolved: dict[str, str], device: torch.device) -> None:
        self.config = config
        self.objective = make_objective(config, device)
        self._draw = implementation("perturb", resolved)
        self._alignment = implementation("alignment", resolved)

    def perturb(self, x: Tensor, labels: Tensor, number: Tensor) -> tuple[Noised, Tensor, Tensor]:
        """All random draws of a batch and what they make of it: (noised, labels, teacher's labels). One pass over the
        batch has its seam here.

        Args:
            x: (B, C, H, W) float32; labels, number: (B,) int64, number = position of each image in the run.
        """
        c = self.config
        drawn = self._draw(
            x,
            labels,
            number,
            seed=c.run.seed,
            family=c.model.family,
            path=c.objective.path,
            times=c.objective.times,
            diffusion_steps=DIFFUSION_STEPS,
            t_max=c.align.t_max,
            null_label=c.model.classes,
            label_dropout=c.objective.label_dropout,
            shared_label_dropout=c.align.shared_label_dropout,
        )
        noised = self.objective.noised(drawn.x, drawn.noise, drawn.t, drawn.t_teacher)
        return noised, drawn.labels, drawn.teacher_labels

    def losses(self, state: TrainState, x: Tensor, labels: Tensor, number: Tensor, weight: Tensor) -> Losses:
        """Losses of one micro-batch, with a graph to the student's parameters."""
        noised, dropped, teacher_dropped = self.perturb(x, labels, number)
        teacher = None if self.config.align.method == "none" else state.teacher.features
        distance = self._distance
        return training_losses(
            self.objective, state.student, teacher, distance, noised, dropped, teacher_dropped, weight, self.config.taps
        )

    def _distance(self, student: Tensor, teacher: Tensor) -> Tensor:
        return self._alignment(student, teacher, self.config.align.distance)

    def __call__(
        self, state: TrainState, x: Tensor, labels: Tensor, number: Tensor, lr: Tensor, weight: Tensor
    ) -> Metrics:
        """One optimizer step.

        Args:
            state: updated in place.
            x, labels, number: the whole batch, split into `train.accumulate` micro-batches here.
            lr, weight: () float32, learning rate and alignment weight.
        """
        parts = self.config.train.accumulate
        parameters = state.trained
        gradients: list[Tensor] | None = None
        rows = []
        size = len(x) // parts
        for micro in zip(x.split(size), labels.split(size), number.split(size), strict=True):
            losses = self.losses(state, *micro, weight)
            new = torch.autograd.grad(losses.total / parts, parameters)
            if parts > 1:  # one micro-batch keeps the compute dtype; several are added in fp32
                new = [g.float() for g in new]
            gradients = list(new) if gradients is None else torch._foreach_add(gradients, new)
            rows.append(torch.stack([loss.detach() for loss in losses]))
        loss, generative, alignment = torch.stack(rows).mean(0)
        norm, decay = update(state, gradients, lr, self.config.optim)
        return Metrics(loss, generative, alignment, norm, lr, decay)


def make_objective(config: Config, device: torch.device) -> Flow | Diffusion:
    """What the run's network learns."""
    return Flow(config.objective.path) if config.model.family == "sit" else Diffusion(device)
