"""One training step as one function of (state, batch): draw, two forward passes, losses, backward pass, update.

Nothing here reads a device value on the host: no `.item()`, no branch on a tensor, fixed shapes. Metrics go into a ring
buffer on the device that the trainer reads when it logs. runner.py executes the step: eager, compiled, or as one CUDA
graph.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.profiler import record_function

from sra_fast.config import Config
from sra_fast.data.stream import Batch
from sra_fast.kernels.adamw_ema import adamw_ema_ref, parameter_ref
from sra_fast.kernels.perturb import NoisedBatch, Settings, Stored, perturb_ddpm
from sra_fast.model.attention import PACKAGES
from sra_fast.model.backends import Backends
from sra_fast.objective.alignment import Alignment, Losses, training_losses
from sra_fast.objective.ddpm import Diffusion
from sra_fast.objective.flow import Flow
from sra_fast.step.state import TrainState, update
from sra_fast.step.sync import Synchronisation


class Metrics(NamedTuple):
    """What one step reports: float32 scalars."""

    loss: Tensor
    velocity_loss: Tensor  # the generative loss; DiT's noise and variance loss has the same name
    alignment_loss: Tensor
    grad_norm: Tensor  # before clipping
    lr: Tensor
    ema_decay: Tensor


class TrainingStep:
    """The training step of a run: everything about it that does not change from step to step.

    Args:
        config: of the run, with the model's sizes filled in.
        backends: what computes each op.
        device: of the state.
        stored: how to compute x from stored data; None if batches have x itself.
        sync: sums the gradients in a fixed order, or those of several processes; None = of this process alone.
        processes: that share the micro-batches of a step.
    """

    def __init__(
        self,
        config: Config,
        backends: Backends,
        device: torch.device,
        stored: Stored | None = None,
        sync: Synchronisation | None = None,
        processes: int = 1,
    ) -> None:
        self.config, self.backends, self.stored = config, backends, stored
        self.sync, self.parts = sync, config.train.micro_batches
        self.parts_per_process = self.parts // processes
        self.objective = Flow() if config.model.family == "sit" else Diffusion(device)
        self.settings = Settings(
            seed=config.run.seed,
            path=config.objective.path,
            times=config.objective.times,
            t_max=config.align.t_max,
            null_label=config.model.classes,
            label_dropout=config.objective.label_dropout,
            shared_label_dropout=config.align.shared_label_dropout,
        )
        # `compile` replaces these three.
        self._perturb, self._distance, self._adamw_ema = self.perturb, self.distance, backends.adamw_ema

    def __call__(self, state: TrainState, batch: Batch, lr: Tensor, weight: Tensor) -> Metrics:
        """One optimizer step.

        Args:
            state: updated in place.
            batch: all images of the step that this process computes; split into micro-batches here.
            lr, weight: () float32, learning rate and alignment weight.
        """
        if self.sync:
            if state.shard:
                state.shard.gather()
            micro_batches = batch.split(self.parts_per_process)
            sums = self.sync.reduce(self.gradients(state, part, weight) for part in micro_batches)
            if state.shard:
                state.shard.wait()  # for copies that no network has used
            return self.apply(state, *sums, lr)
        first, *others = batch.split(self.parts)
        gradients, losses = self.gradients(state, first, weight)
        if others:
            gradients = [gradient.float() for gradient in gradients]
        for micro_batch in others:
            more_gradients, more_losses = self.gradients(state, micro_batch, weight)
            torch._foreach_add_(gradients, more_gradients)  # of two dtypes: no fp32 copy is written and read again
            losses = losses + more_losses
        return self.apply(state, gradients, losses, None, lr)

    def gradients(self, state: TrainState, batch: Batch, weight: Tensor) -> tuple[list[Tensor], Tensor]:
        """(gradients in the order of `state.trained`, contiguous and in the compute dtype, losses (3,) float32) of one
        micro-batch.

        Both are the micro-batch's share: they add up, in fp32, over the micro-batches of the step.
        """
        losses = self.losses(state, batch, weight)
        with record_function("sra_fast::backward"):
            gradients = torch.autograd.grad(losses.total / self.parts, state.trained)
        return [gradient.contiguous() for gradient in gradients], torch.stack(
            [loss.detach() for loss in losses]
        ) / self.parts

    def losses(self, state: TrainState, batch: Batch, weight: Tensor) -> Losses:
        """Losses of one micro-batch, with a graph to the student's parameters."""
        with record_function("sra_fast::perturb"):
            noised = self._perturb(batch)
        alignment = None if self.config.align.method == "none" else Alignment(*self.config.taps, self._distance)
        return training_losses(self.objective, alignment, state.student, state.teacher.features, noised, weight)

    def apply(
        self, state: TrainState, gradients: list[Tensor], losses: Tensor, norm: Tensor | None, lr: Tensor
    ) -> Metrics:
        """Update the state from gradients and losses summed over all micro-batches.

        Args:
            norm: of the whole gradient; None = that of `gradients`.
        """
        with record_function("sra_fast::update"):
            if norm is None:
                norm = self.backends.gradient_norm(gradients)
            decay = update(state, gradients, norm, lr, self.config.optim, self._adamw_ema)
        loss, generative, alignment = losses.unbind()
        return Metrics(loss, generative, alignment, norm, lr, decay)

    def perturb(self, batch: Batch) -> NoisedBatch:
        """All random draws of a batch, and what student and teacher see."""
        inputs = (batch.x, batch.labels, batch.number, self.settings, self.stored)
        if isinstance(self.objective, Diffusion):
            return perturb_ddpm(*inputs, self.objective.levels)
        return self.backends.perturb(*inputs)

    def distance(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The run's alignment distance between features, (B, T, D) each: a scalar."""
        return self.backends.alignment(student, teacher, self.config.align.distance)

    def compile(self, state: TrainState) -> None:
        """Compile the beginning and the blocks of both networks, the head, the draws, the distance and, if it is the
        reference, a parameter's update. torch.compile runs during the first steps.

        Blocks share one compiled function, and so do the parameters' updates: compile time does not grow with depth.

        Args:
            state: its networks are compiled in place.
        """
        # torch.compile does not trace into attention packages, so a block that uses one has a graph break.
        fullgraph = self.backends.names["attention"] not in PACKAGES
        for network in (state.student, state.teacher):
            network.begin = torch.compile(network.begin, fullgraph=True, dynamic=False)
            for block in network.blocks:
                block.compile(fullgraph=fullgraph, dynamic=False)
        state.student.ap_head.compile(fullgraph=True, dynamic=False)
        self._perturb = torch.compile(self.perturb, fullgraph=True, dynamic=False)
        self._distance = torch.compile(self.distance, fullgraph=True, dynamic=False)
        if self._adamw_ema is adamw_ema_ref:
            parameter = torch.compile(parameter_ref, fullgraph=True, dynamic=True)
            self._adamw_ema = partial(adamw_ema_ref, parameter=parameter)
