"""Which implementation computes each op of a run: decided once, printed, and saved with the results."""

from __future__ import annotations

from sra_fast.config import Config
from sra_fast.config.checks import refuse_unless
from sra_fast.hardware import Hardware
from sra_fast.model.attention import choose


def resolve(config: Config, hardware: Hardware) -> dict[str, str]:
    """{op: what computes it}: "fused" or "reference" for the ops of sra_fast.kernels, the backend for attention. DiT's
    perturb has no kernel: its tables are read in plain PyTorch.

    Raises:
        Refused: for a wish that cannot be granted.
    """
    model, ops = config.model, config.kernels.resolve(hardware.architecture)
    if model.family == "dit":
        allowed = "must be auto or reference for model.family = dit"
        refuse_unless(config.kernels.perturb != "fused", "kernels.perturb", "fused", allowed)
        ops["perturb"] = "reference (ddpm)"
    head = model.hidden // model.heads
    backend = choose(model.attention, hardware.device, hardware.dtype, head, config.deterministic)
    return {**ops, "attention": backend}
