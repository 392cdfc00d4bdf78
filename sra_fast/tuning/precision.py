"""Which compute type is faster on a CPU: some have units for bf16 products (AMX), others have instructions for them and
still compute them at half the rate of fp32."""

from __future__ import annotations

from functools import cache

import torch

from sra_fast.tuning.timing import measure

SIZE = 512  # of the square matrices: a few milliseconds


@cache
def bf16_speed() -> float:
    """The rate of a bf16 matrix product on this CPU, divided by that of fp32."""
    full = [torch.ones(SIZE, SIZE) for _ in range(2)]
    half = [matrix.bfloat16() for matrix in full]
    calls = {"fp32": lambda: torch.mm(*full), "bf16": lambda: torch.mm(*half)}
    taken = {name: samples.median_ms for name, samples in measure(calls, device="cpu", repeats=7, warmup=2).items()}
    return (taken["fp32"] or 0.0) / (taken["bf16"] or 1.0)


def advice(precision: str) -> str:
    """A hint for a run that computes in `precision`, "fp32" or "bf16", on this CPU; '' if that is the faster one."""
    speed = bf16_speed()
    faster, ratio = ("bf16", speed) if speed > 1 else ("fp32", 1 / max(speed, 1e-9))
    if faster == precision or ratio < 1.2:  # a step is not only products: a small difference says nothing
        return ""
    return f"{faster} products are {ratio:.1f} x as fast here: --train.precision {faster}"
