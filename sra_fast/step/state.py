"""The state of training, and its update: AdamW with the EMA of the weights, which is also SRA's teacher.

Master weights, moments and EMA are fp32. The networks compute with these tensors in fp32, or with bf16 copies that each
update renews. Learning rate, step count and decay are device scalars, and a step whose gradient norm is not finite
changes nothing and is counted on the device: nothing here makes the host wait.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from sra_fast.config import Config, OptimConfig
from sra_fast.distributed import ALONE, World
from sra_fast.kernels.adamw_ema import Lists, Scalars, adamw_ema_ref
from sra_fast.model.backends import Backends
from sra_fast.model.initial import initial_weights
from sra_fast.model.layout import from_public
from sra_fast.model.transformer import Transformer
from sra_fast.step.plan import Plan
from sra_fast.step.shard import Shard

PER_PARAMETER = ("weights", "ema", "adam_m", "adam_v")
HEAD = "ap_head."  # prefix of the projection head's parameters
FIXED = "pos_embed"  # the parameter that is not trained
MAX_SKIPPED_IN_A_ROW = 64  # non-finite steps that end a run


@dataclass
class TrainState:
    """Everything a step reads and writes. All tensors are on one device and are never reallocated: a captured CUDA
    graph has their addresses.

    Names are those in memory (model/layout.py). `weights`, `ema` and the student have every parameter, the teacher
    those up to its tap, the moments those that are trained.
    """

    weights: dict[str, Tensor]  # fp32 masters
    ema: dict[str, Tensor]  # fp32
    adam_m: dict[str, Tensor]  # fp32, first moment
    adam_v: dict[str, Tensor]  # fp32, second moment
    adam_step: Tensor  # () int64, updates made
    skipped_steps: Tensor  # () int64, steps whose gradient norm was not finite
    skipped_in_a_row: Tensor  # () int64
    student: Transformer
    teacher: Transformer
    shard: Shard | None = None  # if weights, EMA and moments are this process's pieces

    @classmethod
    def create(
        cls,
        config: Config,
        backends: Backends,
        device: torch.device,
        dtype: torch.dtype,
        world: World = ALONE,
        plan: Plan | None = None,
    ) -> TrainState:
        """A new state: seeded weights, EMA equal to them, zero moments.

        Args:
            world: the processes of the run.
            plan: of their shares; None = every process has everything.
        """
        weights = from_public(initial_weights(config.model, config.run.seed, device))
        trained = trained_names(config, weights)
        zero = torch.zeros((), dtype=torch.int64, device=device)
        return cls.assemble(
            config,
            backends,
            dtype,
            world,
            plan,
            weights=weights,
            ema={name: weight.clone() for name, weight in weights.items()},
            adam_m={name: torch.zeros_like(weights[name]) for name in trained},
            adam_v={name: torch.zeros_like(weights[name]) for name in trained},
            adam_step=zero.clone(),
            skipped_steps=zero.clone(),
            skipped_in_a_row=zero.clone(),
        )

    @classmethod
    def assemble(
        cls,
        config: Config,
        backends: Backends,
        dtype: torch.dtype,
        world: World = ALONE,
        plan: Plan | None = None,
        **tensors,
    ) -> TrainState:
        """A state that owns `tensors`, all fields but the networks, with student and teacher computing in `dtype`."""
        student = Transformer.from_tensors(config.model, tensors["weights"], backends).train()
        teacher = Transformer.from_tensors(config.model, tensors["ema"], backends)
        teacher.truncate_after(0 if config.align.method == "none" else config.taps[1])
        if dtype != torch.float32:
            student, teacher = (network.to(dtype) for network in (student, teacher))  # copies
        for name, parameter in student.named_parameters():
            parameter.requires_grad_(name in tensors["adam_m"])
        if plan is None:
            return cls(**tensors, student=student, teacher=teacher)
        shapes = {name: moment.shape for name, moment in tensors["adam_m"].items()}
        shard = Shard(plan, world, shapes, tensors["weights"], dtype, student.pos_embed.device)
        shard.attach(student, shard.student)
        shard.attach(teacher, shard.teacher)
        tensors |= {name: shard.cut(tensors[name]) for name in PER_PARAMETER}
        return cls(**tensors, student=student, teacher=teacher, shard=shard)

    @property
    def trained(self) -> list[Tensor]:
        """The student's trained parameters, in the order of the moments of an unsharded state."""
        parameters = dict(self.student.named_parameters())
        return [parameters[name] for name in self.trained_names]

    @property
    def trained_names(self) -> list[str]:
        """Their names."""
        return list(self.shard.shapes if self.shard else self.adam_m)

    @property
    def has_copies(self) -> bool:
        """Whether the networks compute with copies in another dtype; in fp32 they share the tensors."""
        return self.shard is not None or self.student.pos_embed.dtype != torch.float32

    @cached_property
    def decays(self) -> list[bool]:
        """Whether weight decay applies to a parameter, in the order of the moments: to matrices, not to biases."""
        dimensions = {name: parameter.ndim for name, parameter in self.student.named_parameters()}
        return [dimensions[name] >= 2 for name in self.adam_m]

    @cached_property
    def lists(self) -> tuple[list[Tensor], ...]:
        """What an update changes, in the order of the moments: weights, m, v, EMA, and the networks' copies of weights
        and EMA (empty lists if there are none). An empty tensor stands for a parameter that the teacher lacks."""
        names = list(self.adam_m)
        owned = [[group[name] for name in names] for group in (self.weights, self.adam_m, self.adam_v, self.ema)]
        if self.shard:
            pieces = [self.shard.pieces[name] for name in names]
            flats = (self.shard.student, self.shard.teacher)
            return *owned, *([piece.of(flat) for piece in pieces] for flat in flats)
        if not self.has_copies:
            return *owned, [], []
        student, teacher = (dict(network.named_parameters()) for network in (self.student, self.teacher))
        empty = self.student.pos_embed.new_empty(0)
        student_copies = [student[name].detach() for name in names]
        teacher_copies = [teacher[name].detach() if name in teacher else empty for name in names]
        return *owned, student_copies, teacher_copies

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Any]) -> None:
        """Copy in the values of another state, by field name as `assemble` takes them: complete tensors, of which a
        sharded state takes its pieces. No tensor is reallocated."""
        for field, values in tensors.items():
            own = getattr(self, field)
            if isinstance(own, Tensor):
                own.copy_(values)
            else:
                values = self.shard.cut(values) if self.shard else values
                torch._foreach_copy_(list(own.values()), [values[name] for name in own])
        self.refresh_copies()

    def whole(self, field: str) -> dict[str, Tensor]:
        """The complete tensors of weights, EMA or a moment. A collective if the state is sharded."""
        pieces = getattr(self, field)
        return self.shard.whole(pieces) if self.shard else pieces

    @torch.no_grad()
    def refresh_copies(self) -> None:
        """Copy weights and EMA into networks that compute in another dtype."""
        if not self.has_copies:
            return
        for network, source in ((self.student, self.weights), (self.teacher, self.ema)):
            copies = dict(network.named_parameters())
            if self.shard:
                copies = {name: copy for name, copy in copies.items() if name not in self.shard.shapes}
            torch._foreach_copy_(list(copies.values()), [source[name] for name in copies])
        if self.shard:
            self.shard.publish(self.weights, self.ema)


def trained_names(config: Config, names: Iterable[str]) -> list[str]:
    """The names of the parameters that are trained, among those of a network."""
    without = (FIXED, HEAD) if config.align.method == "none" else (FIXED,)
    return [name for name in names if not name.startswith(without)]


def learning_rate(config: Config, images_seen: int) -> float:
    """Learning rate of the step that starts after `images_seen` images: linear warm-up, then constant, or a half cosine
    down to zero."""
    optim, total = config.optim, config.train.images
    warmup = min(1.0, (images_seen + config.train.batch) / optim.warmup_images) if optim.warmup_images else 1.0
    if optim.schedule == "constant":
        return optim.lr * warmup
    progress = max(0, images_seen - optim.warmup_images) / max(1, total - optim.warmup_images)
    return optim.lr * warmup * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def ema_decay(config: OptimConfig, updates: Tensor) -> Tensor:
    """EMA decay of the update after `updates` others, a float32 scalar: min(decay, (1 + k) / (10 + k)) with warm-up."""
    constant = torch.full((), config.ema_decay, dtype=torch.float32, device=updates.device)
    return torch.minimum(constant, (1 + updates) / (10 + updates)) if config.ema_warmup else constant


@torch.no_grad()
def update(
    state: TrainState,
    gradients: Sequence[Tensor],
    norm: Tensor,
    lr: Tensor,
    config: OptimConfig,
    adamw_ema: Callable[..., None] = adamw_ema_ref,
) -> Tensor:
    """Clip, AdamW, EMA and the networks' copies. Returns the EMA decay, a float32 scalar.

    If the norm is not finite, weights, moments, EMA and the step count keep every bit and the skip counters go up.

    Args:
        state: updated in place.
        gradients: in the order of the moments, contiguous, of one floating dtype.
        norm: () float32, of the whole gradient, before clipping.
        lr: () float32.
        config: of the optimizer.
        adamw_ema: implementation of that op.
    """
    decay = ema_decay(config, state.adam_step)
    finite = norm.isfinite()
    # The counter stops at the limit, so that a later finite step cannot hide it from the next look of the host.
    at_limit = state.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW
    state.skipped_in_a_row.copy_(torch.where(at_limit, state.skipped_in_a_row, (state.skipped_in_a_row + 1) * ~finite))
    clip, loss_scale = (torch.full((), value, device=norm.device) for value in (config.clip, 1.0))
    lists = Lists(gradients, *state.lists)
    adamw_ema(
        lists,
        Scalars(norm, state.adam_step, state.skipped_steps, lr, decay, clip, loss_scale),
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        weight_decay=(config.weight_decay, 0.0),
        group=[int(not decays) for decays in state.decays],
    )
    return decay
