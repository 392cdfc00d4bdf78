"""Which implementation computes each op of a run: decided once, printed, and saved with the results."""

from __future__ import annotations

from sra_fast.config import Config
from sra_fast.hardware import Hardware
from sra_fast.model.attention import choose


def resolve(config: Config, hardware: Hardware) -> dict[str, str]:
    """{op: what computes it}: "fused" or "reference" for the ops of sra_fast.kernels, the backend for attention.

    Raises:
        Refused: for a wish that cannot be granted.
    """
    model = config.model
    head = model.hidden // model.heads
    backend = choose(model.attention, hardware.device, hardware.dtype, head, config.deterministic)
    return {**config.kernels.resolve(), "attention": backend}
