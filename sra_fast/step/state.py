"""AdamW with the EMA of the weights, which is also SRA's teacher: state, schedules and the update.

Masters, moments and EMA are fp32. The networks compute from them directly in fp32, or from bf16 copies that each update
renews. Learning rate, step and decay are device scalars, and a step whose gradient norm is not finite changes nothing
and is counted on the device: nothing here makes the host wait.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from sra_fast.config import Config, OptimConfig
from sra_fast.kernels.adamw_ema import Lists, Scalars, adamw_ema_ref
from sra_fast.kernels.gradient_norm import gradient_norm_ref
from sra_fast.model.initial import initial_weights
from sra_fast.model.layout import joined
from sra_fast.model.transformer import Ops, Transformer, around

HEAD = "ap_head."
FIXED = "pos_embed"
MOST_SKIPPED_IN_A_ROW = 64  # so many non-finite steps end a run


@dataclass
class TrainState:
    """Everything a step reads and writes. All tensors live on one device, and stay where they are: a captured graph
    has their addresses.

    Names are those in memory (model/layout.py). `weights`, `ema` and both networks hold every parameter; the moments
    only those that are trained.
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

    @classmethod
    def create(cls, config: Config, ops: Ops, device: torch.device, dtype: torch.dtype) -> TrainState:
        """A fresh state: seeded weights, EMA equal to them, zero moments."""
        weights = joined(initial_weights(config.model, config.run.seed, device))
        trained = [name for name in weights if name != FIXED]
        if config.align.method == "none":
            trained = [name for name in trained if not name.startswith(HEAD)]
        zero = torch.zeros((), dtype=torch.int64, device=device)
        return cls.assemble(
            config,
            ops,
            dtype,
            weights=weights,
            ema={name: w.clone() for name, w in weights.items()},
            adam_m={name: torch.zeros_like(weights[name]) for name in trained},
            adam_v={name: torch.zeros_like(weights[name]) for name in trained},
            adam_step=zero.clone(),
            skipped_steps=zero.clone(),
            skipped_in_a_row=zero.clone(),
        )

    @classmethod
    def assemble(cls, config: Config, ops: Ops, dtype: torch.dtype, **tensors) -> TrainState:
        """A state around existing tensors, with student and teacher computing in `dtype`."""

        student = around(config.model, tensors["weights"], ops).train()
        teacher = around(config.model, tensors["ema"], ops).until(
            0 if config.align.method == "none" else config.taps[1]
        )
        if dtype != torch.float32:
            student, teacher = (network.to(dtype) for network in (student, teacher))  # new tensors
        for name, parameter in student.named_parameters():
            parameter.requires_grad_(name in tensors["adam_m"])
        return cls(**tensors, student=student, teacher=teacher)

    @property
    def trained(self) -> list[Tensor]:
        """The student's trained parameters, in the order of the moments."""
        parameters = dict(self.student.named_parameters())
        return [parameters[name] for name in self.adam_m]

    @cached_property
    def lists(self) -> tuple[list[Tensor], ...]:
        """What an update changes: weights, m, v, EMA, and the networks' copies of weights and EMA, empty where the
        networks hold the very tensors. In the order of the moments, cut as `cut` cuts gradients. The teacher's copies
        end at its tap: a tensor without elements stands for each of the rest."""
        names = list(self.adam_m)
        held = [[group[name] for name in names] for group in (self.weights, self.adam_m, self.adam_v, self.ema)]
        if not self.has_copies:
            return *held, [], []
        student, teacher = (dict(network.named_parameters()) for network in (self.student, self.teacher))
        none = self.student.pos_embed.new_empty(0)
        copies = []
        for name in names:
            copies += [teacher[name].detach(), *[none] * (name in self._cuts)] if name in teacher else [none]
        return *map(self.cut, [*held, [student[name].detach() for name in names]]), copies

    @cached_property
    def _cuts(self) -> dict[str, int]:
        """Rows of a parameter that the teacher has, where it has only some: of the modulation of all blocks."""
        own = dict(self.teacher.named_parameters()) if self.has_copies else {}
        return {
            name: len(own[name]) for name in self.adam_m if name in own and len(own[name]) < len(self.weights[name])
        }

    def cut(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Tensors in the order of the moments, those of which the teacher has the first rows cut behind these."""
        pieces = []
        for name, tensor in zip(self.adam_m, tensors, strict=True):
            rows = self._cuts.get(name)
            pieces += [tensor] if rows is None else [tensor[:rows], tensor[rows:]]
        return pieces

    @property
    def has_copies(self) -> bool:
        """Whether the networks compute from copies in another dtype; in fp32 they hold the very tensors."""
        return self.student.pos_embed.dtype != torch.float32

    @torch.no_grad()
    def load(self, tensors: Mapping[str, dict[str, Tensor] | Tensor]) -> None:
        """Take over the values of another state, as `assemble` takes them, by copy: every tensor stays where it is."""
        for field, given in tensors.items():
            held = getattr(self, field)
            if isinstance(held, Tensor):
                held.copy_(given)
            else:
                torch._foreach_copy_(list(held.values()), [given[name] for name in held])
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Copy masters and EMA into networks that compute in another dtype."""
        if not self.has_copies:
            return
        for model, source in ((self.student, self.weights), (self.teacher, self.ema)):
            names, copies = zip(*model.named_parameters(), strict=True)
            torch._foreach_copy_(
                list(copies), [source[name][: len(own)] for name, own in zip(names, copies, strict=True)]
            )


def learning_rate(config: Config, images_seen: int) -> float:
    """Learning rate of the step that begins after `images_seen` images: linear warm-up, then constant or a half
    cosine to zero."""
    optim, total = config.optim, config.train.images
    warmup = min(1.0, (images_seen + config.train.batch) / optim.warmup_images) if optim.warmup_images else 1.0
    if optim.schedule == "constant":
        return optim.lr * warmup
    progress = max(0, images_seen - optim.warmup_images) / max(1, total - optim.warmup_images)
    return optim.lr * warmup * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def ema_decay(config: OptimConfig, updates: Tensor) -> Tensor:
    """EMA decay of the update that follows `updates` others: min(decay, (1 + k) / (10 + k)) with warm-up, a float32
    scalar."""
    constant = torch.full((), config.ema_decay, dtype=torch.float32, device=updates.device)
    return torch.minimum(constant, (1 + updates) / (10 + updates)) if config.ema_warmup else constant


@torch.no_grad()
def update(
    state: TrainState,
    gradients: Sequence[Tensor],
    lr: Tensor,
    config: OptimConfig,
    norm_of: Callable[..., Tensor] = gradient_norm_ref,
    adamw_ema: Callable[..., None] = adamw_ema_ref,
) -> tuple[Tensor, Tensor]:
    """Clip, AdamW, EMA and the copies for the networks. Returns (gradient norm before clipping, EMA decay), float32
    scalars.

    If the norm is not finite, weights, moments, EMA and the update count keep every bit and the skip counters go up.

    Args:
        state: updated in place.
        gradients: in the order of `state.trained`, of one floating dtype.
        lr: () float32.
        config: of the optimizer.
        norm_of, adamw_ema: implementations of the two ops, see kernels/gradient_norm.py and kernels/adamw_ema.py.
    """
    gradients = [gradient.contiguous() for gradient in gradients]
    norm, decay = norm_of(gradients), ema_decay(config, state.adam_step)
    finite = norm.isfinite()
    # The count stays where it ends the run, so that a later finite step cannot hide it from the next look.
    over = state.skipped_in_a_row >= MOST_SKIPPED_IN_A_ROW
    state.skipped_in_a_row.copy_(torch.where(over, state.skipped_in_a_row, (state.skipped_in_a_row + 1) * ~finite))
    clip, loss_scale = (torch.full((), value, device=norm.device) for value in (config.clip, 1.0))
    lists = Lists(state.cut(gradients), *state.lists)
    adamw_ema(
        lists,
        Scalars(norm, state.adam_step, state.skipped_steps, lr, decay, clip, loss_scale),
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        # Decay acts on matrices; biases have nothing to decay towards.
        weight_decay=(config.weight_decay, 0.0),
        group=[int(weight.ndim < 2) for weight in lists.weights],
    )
    return norm, decay
