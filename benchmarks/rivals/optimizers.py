"""The rivals of our update: torch's AdamW by its defaults and at its best, and NVIDIA apex's."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from sra_fast.config import OptimConfig
from sra_fast.errors import Refused


class Way(NamedTuple):
    """One way to update.

    Attributes:
        call: one whole update, from the gradients to the copies.
        gradients: that it reads, and may scale in place.
        results: weights, EMA and their bf16 copies (student, teacher), each in the order of the gradients.
    """

    call: Callable[[], None]
    gradients: list[Tensor]
    results: tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]


def rival_way(
    start: dict[str, Tensor],
    gradients: list[Tensor],
    config: OptimConfig,
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW,
    clip: Callable[[list[Tensor], float], object] = torch.nn.utils.clip_grad_norm_,
    foreach: bool = True,
) -> Way:
    """An AdamW, then EMA and copies by foreach functions, or in a Python loop as in the public code."""
    weights = [weight.clone().requires_grad_() for weight in start.values()]
    ema = [weight.detach().clone() for weight in weights]
    student, teacher = ([weight.detach().bfloat16() for weight in weights] for _ in range(2))
    for weight, gradient in zip(weights, gradients, strict=True):
        weight.grad = gradient.float().clone()
    groups = [
        {"params": [weight for weight in weights if weight.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [weight for weight in weights if weight.ndim <= 1], "weight_decay": 0.0},
    ]
    adamw = optimizer(groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps)

    @torch.no_grad()
    def call() -> None:
        clip(weights, config.clip)
        adamw.step()
        if foreach:
            torch._foreach_lerp_(ema, weights, 1 - config.ema_decay)
            torch._foreach_copy_(student, weights)
            torch._foreach_copy_(teacher, ema)
            return
        for average, weight, copy, average_copy in zip(ema, weights, student, teacher, strict=True):
            average.mul_(config.ema_decay).add_(weight, alpha=1 - config.ema_decay)
            copy.copy_(weight)
            average_copy.copy_(average)

    own_gradients = [weight.grad for weight in weights if weight.grad is not None]
    return Way(call, own_gradients, (weights, ema, student, teacher))


def apex_way(start: dict[str, Tensor], gradients: list[Tensor], config: OptimConfig) -> Way:
    """apex's multi-tensor norm and FusedAdam, on a GPU.

    Raises:
        Refused: if apex or its compiled part is not installed.
    """
    try:
        import amp_C  # noqa: F401
        from apex.contrib.clip_grad import clip_grad_norm_
        from apex.optimizers import FusedAdam
    except ImportError as error:
        raise Refused(f"needs NVIDIA apex with its CUDA extensions ({error})") from error
    return rival_way(start, gradients, config, partial(FusedAdam, adam_w_mode=True), clip_grad_norm_)
