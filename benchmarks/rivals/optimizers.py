"""The rivals of our update: torch's AdamW by its defaults and at its best, and NVIDIA apex's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

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


def torch_way(start: dict[str, Tensor], gradients: list[Tensor], config: OptimConfig, fused: bool) -> Way:
    """torch's AdamW by its defaults, with EMA and copies parameter by parameter in a Python loop as in the public code;
    or, with `fused`, all that PyTorch offers: the fused AdamW and foreach functions for the rest."""
    weights = [weight.clone().requires_grad_() for weight in start.values()]
    ema = [weight.detach().clone() for weight in weights]
    student, teacher = ([weight.detach().bfloat16() for weight in weights] for _ in range(2))
    for weight, gradient in zip(weights, gradients, strict=True):
        weight.grad = gradient.float().clone()
    optimizer = torch.optim.AdamW(**_arguments(weights, config), fused=True if fused else None)

    @torch.no_grad()
    def average_and_copy() -> None:
        if fused:
            torch._foreach_lerp_(ema, weights, 1 - config.ema_decay)
            torch._foreach_copy_(student, weights)
            torch._foreach_copy_(teacher, ema)
            return
        for average, weight, copy, average_copy in zip(ema, weights, student, teacher, strict=True):
            average.mul_(config.ema_decay).add_(weight, alpha=1 - config.ema_decay)
            copy.copy_(weight)
            average_copy.copy_(average)

    def call() -> None:
        torch.nn.utils.clip_grad_norm_(weights, config.clip)
        optimizer.step()
        average_and_copy()

    own_gradients = [weight.grad for weight in weights if weight.grad is not None]
    return Way(call, own_gradients, (weights, ema, student, teacher))


def apex_way(start: dict[str, Tensor], gradients: list[Tensor], config: OptimConfig) -> Way:
    """apex's multi-tensor norm and FusedAdam; foreach functions for the EMA and the copies. GPU only.

    Raises:
        Refused: if apex, or its compiled part, is missing.
    """
    way = torch_way(start, gradients, config, fused=True)
    weights, ema, student, teacher = way.results
    try:
        from apex.contrib.clip_grad import clip_grad_norm_
        from apex.optimizers import FusedAdam

        optimizer = FusedAdam(**_arguments(weights, config), adam_w_mode=True)
    except (ImportError, RuntimeError) as error:
        raise Refused(f"needs NVIDIA apex ({error})") from error

    @torch.no_grad()
    def call() -> None:
        clip_grad_norm_(weights, config.clip)
        optimizer.step()
        torch._foreach_lerp_(ema, weights, 1 - config.ema_decay)
        torch._foreach_copy_(student, weights)
        torch._foreach_copy_(teacher, ema)

    return way._replace(call=call)


def _arguments(weights: list[Tensor], config: OptimConfig) -> dict[str, Any]:
    """Arguments of an AdamW that decays matrices only."""
    groups = [
        {"params": [weight for weight in weights if weight.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [weight for weight in weights if weight.ndim <= 1], "weight_decay": 0.0},
    ]
    return {"params": groups, "lr": config.lr, "betas": (config.beta1, config.beta2), "eps": config.eps}
