"""AdamW with the EMA of the weights, which is also SRA's teacher: state, schedules and the update.

Masters, moments and EMA are fp32. The networks compute from them directly in fp32, or from bf16 copies that
`TrainState.refresh` renews after each update. Learning rate, step and decay are device scalars, and a step whose
gradient norm is not finite changes nothing and is counted on the device: nothing here makes the host wait.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sra_fast.config import Config, OptimConfig
from sra_fast.model.initial import initial_weights
from sra_fast.model.transformer import Ops, Transformer, around

HEAD = "ap_head."
MOST_SKIPPED_IN_A_ROW = 64  # so many non-finite steps end a run


@dataclass
class TrainState:
    """Everything a step reads and writes. All tensors live on one device.

    `weights`, `ema` and both networks hold every parameter; the moments only those that are trained.
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
        with torch.device("meta"):
            model = Transformer(config.model, ops)
        weights = initial_weights(model, config.run.seed, device)
        trained = [name for name, p in model.named_parameters() if p.requires_grad]
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
        parameters = dict(self.student.named_parameters())
        return [parameters[name] for name in self.adam_m]

    @torch.no_grad()
    def refresh(self) -> None:
        """Copy masters and EMA into networks that compute in another dtype; in fp32 the networks hold the very
        tensors."""
        if self.student.pos_embed.dtype == torch.float32:
            return
        for model, source in ((self.student, self.weights), (self.teacher, self.ema)):
            named = dict(model.named_parameters())
            torch._foreach_copy_(list(named.values()), [source[name] for name in named])


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


@torch.no_grad()
def update(state: TrainState, gradients: Sequence[Tensor], lr: Tensor, config: OptimConfig) -> tuple[Tensor, Tensor]:
    """Clip, AdamW, EMA and the copies for the networks. Returns (gradient norm before clipping, EMA decay), float32
    scalars.

    If the norm is not finite, weights, moments, EMA and the update count keep every bit and the skip counters go up.

    Args:
        state: updated in place.
        gradients: in the order of `state.trained`, any floating dtype.
        lr: () float32.
        config: of the optimizer.
    """
    norm = gradient_norm(gradients)
    finite = norm.isfinite()
    decay = ema_decay(config, state.adam_step)
    state.adam_step += finite
    state.skipped_steps += ~finite
    # The count stays where it ends the run, so that a later finite step cannot hide it from the next look.
    over = state.skipped_in_a_row >= MOST_SKIPPED_IN_A_ROW
    state.skipped_in_a_row.copy_(torch.where(over, state.skipped_in_a_row, (state.skipped_in_a_row + 1) * ~finite))
    names = list(state.adam_m)
    adamw_ema_ref(
        [state.weights[name] for name in names],
        gradients,
        list(state.adam_m.values()),
        list(state.adam_v.values()),
        [state.ema[name] for name in names],
        # Decay acts on matrices; biases have nothing to decay towards.
        weight_decay=[config.weight_decay if state.weights[name].ndim > 1 else 0.0 for name in names],
        lr=lr,
        step=state.adam_step,
        norm=norm,
        ema_decay=decay,
        clip=config.clip,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
    )
    state.refresh()
    return norm, decay


def adamw_ema_ref(
    weights: list[Tensor],
    gradients: Sequence[Tensor],
    m: list[Tensor],
    v: list[Tensor],
    ema: list[Tensor],
    *,
    weight_decay: Sequence[float],
    lr: Tensor,
    step: Tensor,
    norm: Tensor,
    ema_decay: Tensor,
    clip: float,
    betas: tuple[float, float],
    eps: float,
) -> None:
    """Reference AdamW and EMA in plain PyTorch, in place.

        g = gradient * min(1, clip / (norm + 1e-6))
        m = beta1 m + (1 - beta1) g          v = beta2 v + (1 - beta2) g^2
        w = (1 - lr decay) w - lr (m / (1 - beta1^step)) / (sqrt(v / (1 - beta2^step)) + eps)
        ema = ema_decay ema + (1 - ema_decay) w

    A non-finite norm changes nothing: the gradient is replaced by zeros and every rate by the one that leaves its
    tensor as it is.

    Args:
        weights, m, v, ema: lists of fp32 tensors.
        gradients: tensors of the same shapes, any floating dtype.
        weight_decay: per tensor.
        lr, norm, ema_decay: () float32; step: () int64, counting this update.
        clip: largest norm; 0 = no clipping.
        betas, eps: of Adam.

    Source: Loshchilov and Hutter, "Decoupled Weight Decay Regularization", 2019, algorithm 2.
    """
    finite = norm.isfinite()
    zero = torch.zeros_like(norm)
    rate = torch.where(finite, lr, zero)
    blend1, blend2, blend_ema = (torch.where(finite, 1 - keep, zero) for keep in (*betas, ema_decay))
    corrected = step.clamp(min=1).double()
    bias1, bias2 = ((1 - beta**corrected).float() for beta in betas)
    scale = (clip / (norm + 1e-6)).clamp(max=1) if clip else torch.ones_like(norm)
    g = [torch.where(finite, gradient.float() * scale, zero) for gradient in gradients]

    torch._foreach_mul_(m, 1 - blend1)
    torch._foreach_add_(m, torch._foreach_mul(g, blend1))
    torch._foreach_mul_(v, 1 - blend2)
    torch._foreach_add_(v, torch._foreach_mul(torch._foreach_mul(g, g), blend2))

    denominator = torch._foreach_sqrt(v)
    torch._foreach_div_(denominator, bias2.sqrt())
    torch._foreach_add_(denominator, eps)
    step_size = torch._foreach_div(m, denominator)
    torch._foreach_mul_(step_size, rate / bias1)
    if any(weight_decay):
        for weight, decay in zip(weights, weight_decay, strict=True):
            weight.mul_(1 - rate * decay)
    torch._foreach_sub_(weights, step_size)

    gap = torch._foreach_sub(weights, ema)
    torch._foreach_mul_(gap, blend_ema)
    torch._foreach_add_(ema, gap)
