"""AdamW with the EMA of the weights, which is also SRA's teacher: state, schedules and the update.

Masters, moments and EMA are fp32. The networks compute from them directly in fp32, or from bf16 copies that each update
renews. Learning rate, step and decay are device scalars, and a step whose gradient norm is not finite changes nothing
and is counted on the device: nothing here makes the host wait.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sra_fast.config import Config, OptimConfig
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

        def own(source: dict[str, Tensor]) -> dict[str, Tensor]:
            return source if dtype == torch.float32 else {name: w.to(dtype) for name, w in source.items()}

        student = around(config.model, own(tensors["weights"]), ops).train()
        for name, parameter in student.named_parameters():
            parameter.requires_grad_(name in tensors["adam_m"])
        return cls(**tensors, student=student, teacher=around(config.model, own(tensors["ema"]), ops))

    @property
    def trained(self) -> list[Tensor]:
        """The student's trained parameters, in the order of the moments."""
        return _named(self.student, self.adam_m)

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
            torch._foreach_copy_(_named(model, source), list(source.values()))


def _named(model: Transformer, names: Mapping[str, Tensor]) -> list[Tensor]:
    parameters = dict(model.named_parameters())
    return [parameters[name] for name in names]


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


def gradient_norm(gradients: Sequence[Tensor]) -> Tensor:
    """Global 2-norm of all gradients: a float32 scalar."""
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(list(gradients), dtype=torch.float32)))


class Rates(NamedTuple):
    """What one update does to every parameter: float32 scalars on the device. A step that is skipped has a `scale` of
    zero, and rates that leave every tensor as it is."""

    finite: Tensor  # bool
    scale: Tensor  # of the gradient: min(1, clip / (norm + 1e-6))
    blend1: Tensor  # 1 - beta1
    blend2: Tensor  # 1 - beta2
    bias1: Tensor  # 1 - beta1^step
    bias2: Tensor  # sqrt(1 - beta2^step)
    lr: Tensor
    blend_ema: Tensor  # 1 - ema_decay


def rates(lr: Tensor, step: Tensor, norm: Tensor, ema_decay: Tensor, clip: float, betas: tuple[float, float]) -> Rates:
    """The rates of one update.

    Args:
        lr, norm, ema_decay: () float32; step: () int64, counting this update.
        clip: largest norm; 0 = no clipping.
        betas: of Adam.
    """
    finite = norm.isfinite()
    zero = torch.zeros_like(norm)
    blends = [torch.where(finite, 1 - keep, zero) for keep in (*betas, ema_decay)]
    corrected = step.clamp(min=1).double()
    bias1, bias2 = ((1 - beta**corrected).float() for beta in betas)
    scale = (clip / (norm + 1e-6)).clamp(max=1) if clip else torch.ones_like(norm)
    return Rates(finite, scale, *blends[:2], bias1, bias2.sqrt(), torch.where(finite, lr, zero), blends[2])


def adamw_ema_ref(
    weight: Tensor,
    gradient: Tensor,
    m: Tensor,
    v: Tensor,
    ema: Tensor,
    copies: Sequence[Tensor],
    rates: Rates,
    weight_decay: float,
    eps: float,
) -> None:
    """Reference AdamW, EMA and copies of one parameter in plain PyTorch, in place.

        g = gradient * min(1, clip / (norm + 1e-6))
        m = beta1 m + (1 - beta1) g          v = beta2 v + (1 - beta2) g^2
        w = (1 - lr decay) w - lr (m / (1 - beta1^step)) / (sqrt(v / (1 - beta2^step)) + eps)
        ema = ema_decay ema + (1 - ema_decay) w

    Args:
        weight, m, v, ema: fp32, of one shape.
        gradient: of that shape, any floating dtype.
        copies: of weight and EMA in the networks' dtype; empty where the networks hold the very tensors.
        rates: of this update. If the norm was not finite, every tensor keeps its bits.
        weight_decay: decoupled.
        eps: of Adam.

    Source: Loshchilov and Hutter, "Decoupled Weight Decay Regularization", 2019, algorithm 2.
    """
    r = rates
    g = torch.where(r.finite, gradient.float() * r.scale, 0)
    m.lerp_(g, r.blend1)
    v.mul_(1 - r.blend2).addcmul_(g, g * r.blend2)
    step_size = (m / v.sqrt().div_(r.bias2).add_(eps)).mul_(r.lr / r.bias1)
    if weight_decay:
        weight.mul_(1 - r.lr * weight_decay)
    weight.sub_(step_size)
    ema.lerp_(weight, r.blend_ema)
    for copy, source in zip(copies, (weight, ema), strict=False):
        copy.copy_(source)


@torch.no_grad()
def update(
    state: TrainState,
    gradients: Sequence[Tensor],
    lr: Tensor,
    config: OptimConfig,
    adamw_ema: Callable[..., None] = adamw_ema_ref,
) -> tuple[Tensor, Tensor]:
    """Clip, AdamW, EMA and the copies for the networks. Returns (gradient norm before clipping, EMA decay), float32
    scalars.

    If the norm is not finite, weights, moments, EMA and the update count keep every bit and the skip counters go up.

    Args:
        state: updated in place.
        gradients: in the order of `state.trained`, any floating dtype.
        lr: () float32.
        config: of the optimizer.
        adamw_ema: `adamw_ema_ref` or the same, compiled.
    """
    norm = gradient_norm(gradients)
    finite = norm.isfinite()
    decay = ema_decay(config, state.adam_step)
    state.adam_step += finite
    state.skipped_steps += ~finite
    # The count stays where it ends the run, so that a later finite step cannot hide it from the next look.
    over = state.skipped_in_a_row >= MOST_SKIPPED_IN_A_ROW
    state.skipped_in_a_row.copy_(torch.where(over, state.skipped_in_a_row, (state.skipped_in_a_row + 1) * ~finite))
    of_all = rates(lr, state.adam_step, norm, decay, config.clip, (config.beta1, config.beta2))
    names = state.adam_m
    students, teachers = _named(state.student, names), _named(state.teacher, names)
    for name, gradient, student, teacher in zip(names, gradients, students, teachers, strict=True):
        weight, ema = state.weights[name], state.ema[name]
        # Decay acts on matrices; biases have nothing to decay towards.
        decay_of_this = config.weight_decay if weight.ndim > 1 else 0.0
        tensors = [_flat(t) for t in (weight, gradient.contiguous(), state.adam_m[name], state.adam_v[name], ema)]
        copies = [_flat(t) for t in (student, teacher)] if state.has_copies else []
        adamw_ema(*tensors, copies, of_all, decay_of_this, config.eps)
    return norm, decay


def _flat(tensor: Tensor) -> Tensor:
    """The tensor's memory in one dimension, so that one compiled function serves every shape. `.data`, because a view
    would bring its base, and a function compiled for each shape of that, along."""
    return tensor.view(-1).data
