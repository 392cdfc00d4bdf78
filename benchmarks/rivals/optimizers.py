"""The rivals of our update: torch's AdamW by its defaults and at its best, and NVIDIA apex's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sra_fast.config import OptimConfig


@dataclass
class Way:
    """One way to update, with its own tensors.

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
    own_gradients = [gradient.float().clone() for gradient in gradients]
    for weight, gradient in zip(weights, own_gradients, strict=True):
        weight.grad = gradient
    optimizer = torch.optim.AdamW(_groups(weights, config), **_settings(config), fused=True if fused else None)

    @torch.no_grad()
    def average_and_copy() -> None:
        if fused:
            _foreach_average_and_copy(config, weights, ema, student, teacher)
            return
        for average, weight, copy, average_copy in zip(ema, weights, student, teacher, strict=True):
            average.mul_(config.ema_decay).add_(weight, alpha=1 - config.ema_decay)
            copy.copy_(weight)
            average_copy.copy_(average)

    def call() -> None:
        torch.nn.utils.clip_grad_norm_(weights, config.clip)
        optimizer.step()
        average_and_copy()

    return Way(call, own_gradients, (weights, ema, student, teacher))


def apex_way(start: dict[str, Tensor], gradients: list[Tensor], config: OptimConfig) -> Way:
    """NVIDIA apex's multi-tensor norm and FusedAdam; EMA and copies by foreach functions."""
    from apex.contrib.clip_grad import clip_grad_norm_
    from apex.optimizers import FusedAdam

    way = torch_way(start, gradients, config, fused=True)
    weights = way.results[0]
    adam = FusedAdam(_groups(weights, config), **_settings(config), adam_w_mode=True)

    @torch.no_grad()
    def call() -> None:
        clip_grad_norm_(weights, config.clip)
        adam.step()
        _foreach_average_and_copy(config, *way.results)

    return replace(way, call=call)


def _settings(config: OptimConfig) -> dict[str, Any]:
    return {"lr": config.lr, "betas": (config.beta1, config.beta2), "eps": config.eps}


def _groups(weights: list[Tensor], config: OptimConfig) -> list[dict[str, Any]]:
    """Weight decay for matrices only."""
    matrices = [weight for weight in weights if weight.ndim > 1]
    vectors = [weight for weight in weights if weight.ndim <= 1]
    return [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]


def _foreach_average_and_copy(
    config: OptimConfig, weights: list[Tensor], ema: list[Tensor], student: list[Tensor], teacher: list[Tensor]
) -> None:
    torch._foreach_lerp_(ema, weights, 1 - config.ema_decay)
    torch._foreach_copy_(student, weights)
    torch._foreach_copy_(teacher, ema)
