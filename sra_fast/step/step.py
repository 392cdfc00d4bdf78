"""One training step as one function of (state, batch): draw, two forwards, losses, backward, update, metrics.

The host decides nothing from device values here: no `.item()`, no branch on a tensor, shapes fixed. Metrics go into a
ring buffer on the device that the trainer reads when it logs. runner.py says how a step is executed: as it stands,
compiled, or as one CUDA graph.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.profiler import record_function

from sra_fast.config import Config
from sra_fast.kernels import implementation
from sra_fast.kernels.adamw_ema import adamw_ema_ref, parameter_ref
from sra_fast.kernels.perturb import Settings, Stored, draw_ref
from sra_fast.objective import Noised
from sra_fast.objective.alignment import Losses, training_losses
from sra_fast.objective.ddpm import DIFFUSION_STEPS, Diffusion
from sra_fast.objective.flow import Flow
from sra_fast.step.state import TrainState, update


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
        self._slot = torch.zeros((), dtype=torch.int64, device=device)
        self._rows = torch.arange(rows, device=device)

    def push(self, metrics: Metrics) -> None:
        """Write one row over the oldest."""
        here = (self._rows == self._slot)[:, None]
        self.buffer.copy_(torch.where(here, torch.stack(metrics), self.buffer))
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
        stored: how the batches' data become images or latents; None: they are.
    """

    def __init__(
        self, config: Config, resolved: dict[str, str], device: torch.device, stored: Stored | None = None
    ) -> None:
        self.config, self.stored = config, stored
        self.objective = make_objective(config, device)
        if isinstance(self.objective, Flow):
            self._draw = implementation("perturb", resolved)
        self.settings = Settings(
            seed=config.run.seed,
            path=config.objective.path,
            times=config.objective.times,
            t_max=config.align.t_max,
            null_label=config.model.classes,
            label_dropout=config.objective.label_dropout,
            shared_label_dropout=config.align.shared_label_dropout,
        )
        self._align = implementation("alignment", resolved)
        # What a compiled step replaces, see `compile`.
        self._perturb, self._distance = self.perturb, self.distance
        self._gradient_norm = implementation("gradient_norm", resolved)
        self._adamw_ema = implementation("adamw_ema", resolved)

    def compile(self, state: TrainState, whole: bool = True) -> None:
        """From now on, compute by torch.compile what is more than a product or two: both networks' blocks, the head,
        the draws, the distance and the update. It happens in the first steps.

        The blocks share one compiled function, the parameters another: compile time does not grow with depth.

        Args:
            state: whose networks take part.
            whole: refuse to compile a block in pieces. Attention by a package that torch.compile does not look into
                needs False.
        """
        for network in (state.student, state.teacher):
            for block in network.blocks:
                block.compile(fullgraph=whole, dynamic=False)
        state.student.ap_head.compile(fullgraph=True, dynamic=False)
        self._perturb = torch.compile(self.perturb, fullgraph=True, dynamic=False)
        self._distance = torch.compile(self.distance, fullgraph=True, dynamic=False)
        if self._adamw_ema is adamw_ema_ref:
            parameter = torch.compile(parameter_ref, fullgraph=True, dynamic=True)
            self._adamw_ema = partial(adamw_ema_ref, parameter=parameter)

    def perturb(self, x: Tensor, labels: Tensor, number: Tensor) -> tuple[Noised, Tensor, Tensor]:
        """All random draws of a batch and what they make of it: (noised, labels, teacher's labels). Of SiT in one pass.

        Args:
            x: (B, C, H, W) float32, or as `stored` says; labels, number: (B,) int64, number = position of each image in
                the run.
        """
        if isinstance(self.objective, Flow):
            *noised, dropped, teachers = self._draw(x, labels, number, self.settings, self.stored)
            return Noised(*noised), dropped, teachers
        clean, noise, t, t_teacher, dropped, teachers = draw_ref(
            x, labels, number, self.settings, self.stored, DIFFUSION_STEPS
        )
        return self.objective.noised(clean, noise, t, t_teacher), dropped, teachers

    def distance(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The run's alignment distance of features, (B, T, D) each: a scalar."""
        return self._align(student, teacher, self.config.align.distance)

    def losses(self, state: TrainState, x: Tensor, labels: Tensor, number: Tensor, weight: Tensor) -> Losses:
        """Losses of one micro-batch, with a graph to the student's parameters."""
        with record_function("sra_fast::perturb"):
            noised, dropped, teacher_dropped = self._perturb(x, labels, number)
        student, teacher = _ranged("student", state.student), _ranged("teacher", state.teacher.features)
        return training_losses(
            self.objective,
            student,
            None if self.config.align.method == "none" else teacher,
            _ranged("loss", self._distance),
            noised,
            dropped,
            teacher_dropped,
            weight,
            self.config.taps,
        )

    def gradients(
        self, state: TrainState, x: Tensor, labels: Tensor, number: Tensor, weight: Tensor
    ) -> tuple[list[Tensor], Tensor]:
        """(gradients in the order of `state.trained`, the three losses as one (3,) float32) of one micro-batch, as its
        share of the whole: over `train.accumulate` micro-batches both add up. Several are in fp32, to be added; a
        single one's gradients keep the compute dtype."""
        parts = self.config.train.accumulate
        losses = self.losses(state, x, labels, number, weight)
        with record_function("sra_fast::backward"):
            gradients = torch.autograd.grad(losses.total / parts, state.trained)
        if parts > 1:
            gradients = [g.float() for g in gradients]
        return list(gradients), torch.stack([loss.detach() for loss in losses]) / parts

    def apply(self, state: TrainState, gradients: list[Tensor], losses: Tensor, lr: Tensor) -> Metrics:
        """Update the state by the sums over all micro-batches of what `gradients` returns."""
        with record_function("sra_fast::update"):
            norm, decay = update(state, gradients, lr, self.config.optim, self._gradient_norm, self._adamw_ema)
        return Metrics(*losses, norm, lr, decay)

    def __call__(
        self, state: TrainState, x: Tensor, labels: Tensor, number: Tensor, lr: Tensor, weight: Tensor
    ) -> Metrics:
        """One optimizer step.

        Args:
            state: updated in place.
            x, labels, number: the whole batch, split into `train.accumulate` micro-batches here.
            lr, weight: () float32, learning rate and alignment weight.
        """
        size = len(x) // self.config.train.accumulate
        first, *others = zip(x.split(size), labels.split(size), number.split(size), strict=True)
        gradients, losses = self.gradients(state, *first, weight)
        for micro in others:
            more, its_losses = self.gradients(state, *micro, weight)
            torch._foreach_add_(gradients, more)
            losses = losses + its_losses
        return self.apply(state, gradients, losses, lr)


def _ranged(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function under a name that profilers show."""
    return record_function(f"sra_fast::{name}")(function)


def make_objective(config: Config, device: torch.device) -> Flow | Diffusion:
    """What the run's network learns."""
    return Flow() if config.model.family == "sit" else Diffusion(device)
