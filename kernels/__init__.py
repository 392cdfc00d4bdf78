"""The ops of a training step, one file each: formula, reference in plain PyTorch and, where one has earned its place,
a fused kernel, in Triton or in the compiled library.

This package imports nothing else of sra_fast. `resolve` turns the wishes of a config into one implementation per op,
once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from . import adaln, adamw_ema, alignment, gated_adaln, gradient_norm, language, library, perturb

CHOICES = ("auto", "fused", "reference")

IMPLEMENTATIONS: dict[str, dict[str, Callable]] = {
    "adaln": {"reference": adaln.adaln_ref, "fused": adaln.adaln},
    "gated_adaln": {"reference": gated_adaln.gated_adaln_ref, "fused": gated_adaln.gated_adaln},
    # No kernel: torch.compile makes one pass of it together with what surrounds it.
    "gated_residual": {"reference": gated_adaln.gated_residual_ref},
    "alignment": {"reference": alignment.alignment_ref, "fused": alignment.alignment},
    "perturb": {"reference": perturb.perturb_ref, "fused": perturb.perturb},
    "gradient_norm": {"reference": gradient_norm.gradient_norm_ref, "fused": gradient_norm.gradient_norm},
    "adamw_ema": {"reference": adamw_ema.adamw_ema_ref, "fused": adamw_ema.adamw_ema},
}
COMPILED = ("gradient_norm", "adamw_ema")  # of csrc/; the others are Triton's

# Where `auto` takes the fused op: on architectures for which a result under benchmarks/results shows it winning. The
# two of the optimizer are measured together: optimizer-*.json.
WINS: dict[str, tuple[str, ...]] = {"gradient_norm": ("cpu",), "adamw_ema": ("cpu",)}


def missing(op: str, architecture: str) -> str:
    """What stands in the way of an op's fused kernel, with the cure; empty: nothing.

    Args:
        architecture: "cpu", or that of a GPU, such as "sm_90".
    """
    if op in COMPILED:
        return library.missing() if architecture == "cpu" else library.missing_on_a_gpu()
    if architecture == "cpu" and not language.INTERPRETED:
        return language.missing() or "it runs on GPUs"
    return language.missing()


def resolve(
    choices: Mapping[str, str],
    architecture: str = "cpu",
    implementations: Mapping[str, Mapping[str, Callable]] = IMPLEMENTATIONS,
) -> dict[str, str]:
    """What will be used for each op: {op: "fused" | "reference"}.

    Args:
        choices: {op: one of `CHOICES`}.
        architecture: see `missing`.

    Raises:
        ValueError: on an op or choice that does not exist, and on `fused` where the kernel cannot be had: a slow path
            is never taken in silence.
    """
    resolved = {}
    for op, choice in choices.items():
        if op not in implementations:
            raise ValueError(f"kernels.{op}: no such op; must be one of {', '.join(implementations)}")
        if choice not in CHOICES:
            raise ValueError(f"kernels.{op}: {choice!r} given; must be one of {', '.join(CHOICES)}")
        if choice == "fused" and "fused" not in implementations[op]:
            raise ValueError(f"kernels.{op}: 'fused' given, but this op has no fused kernel; must be auto or reference")
        if choice == "fused" and (obstacle := missing(op, architecture)):
            raise ValueError(f"kernels.{op}: 'fused' given, but {obstacle}; must be auto or reference")
        won = choice == "auto" and architecture in WINS.get(op, ()) and not missing(op, architecture)
        resolved[op] = "fused" if choice == "fused" or won else "reference"
    return resolved


def implementation(op: str, resolved: Mapping[str, str]) -> Callable:
    """The function that computes `op` under a result of `resolve`."""
    return IMPLEMENTATIONS[op][resolved[op]]
