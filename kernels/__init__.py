"""The ops of a training step, one file each: formula, reference in plain PyTorch and, where one has earned its place,
a fused kernel.

This package imports nothing else of sra_fast. `resolve` turns the wishes of a config into one implementation per op,
once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from . import adaln, alignment, gated_adaln, perturb
from .language import missing

CHOICES = ("auto", "fused", "reference")

IMPLEMENTATIONS: dict[str, dict[str, Callable]] = {
    "adaln": {"reference": adaln.adaln_ref, "fused": adaln.adaln},
    "gated_adaln": {"reference": gated_adaln.gated_adaln_ref, "fused": gated_adaln.gated_adaln},
    # No kernel: torch.compile makes one pass of it together with what surrounds it.
    "gated_residual": {"reference": gated_adaln.gated_residual_ref},
    "alignment": {"reference": alignment.alignment_ref, "fused": alignment.alignment},
    "perturb": {"reference": perturb.draw_ref},
}


def resolve(
    choices: Mapping[str, str], implementations: Mapping[str, Mapping[str, Callable]] = IMPLEMENTATIONS
) -> dict[str, str]:
    """What will be used for each op: {op: "fused" | "reference"}.

    Args:
        choices: {op: one of `CHOICES`}.

    Raises:
        ValueError: on an op or choice that does not exist, and on `fused` for an op without a fused kernel: a slow
            path is never taken in silence.
    """
    resolved = {}
    for op, choice in choices.items():
        if op not in implementations:
            raise ValueError(f"kernels.{op}: no such op; must be one of {', '.join(implementations)}")
        if choice not in CHOICES:
            raise ValueError(f"kernels.{op}: {choice!r} given; must be one of {', '.join(CHOICES)}")
        if choice == "fused" and "fused" not in implementations[op]:
            raise ValueError(f"kernels.{op}: 'fused' given, but this op has no fused kernel; must be auto or reference")
        if choice == "fused" and (obstacle := missing()):
            raise ValueError(f"kernels.{op}: 'fused' given, but {obstacle}; must be auto or reference")
        # A fused kernel is taken by `auto` only where a benchmark shows it winning; none has been measured yet.
        resolved[op] = "fused" if choice == "fused" else "reference"
    return resolved


def implementation(op: str, resolved: Mapping[str, str]) -> Callable:
    """The function that computes `op` under a result of `resolve`."""
    return IMPLEMENTATIONS[op][resolved[op]]
