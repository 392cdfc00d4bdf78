"""The roofs of this device, measured: the rates of a large copy and of a large matrix product."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from sra_fast.tuning.timing import GIB, Call, Samples, measure

COPY_BYTES = {"cuda": 4 * GIB, "cpu": GIB // 4}  # read plus written, well beyond the caches
SUSTAINED_MS = 1500.0
MATMUL_SIZE = {"cuda": 8192, "cpu": 1024}


class Operation(NamedTuple):
    """A call with the bytes or the FLOPs (2 per multiply-add) that it takes."""

    call: Call
    bytes: int = 0
    flops: int = 0


def operations(device: torch.device) -> dict[str, Operation]:
    """A large copy (bytes read + written) and square matrix product, of random numbers: zeros draw less power."""
    source = torch.randn(COPY_BYTES[device.type] // 8, device=device)  # half is read, half written
    target = torch.empty_like(source)
    size = MATMUL_SIZE[device.type]
    full = [torch.randn(size, size, device=device) for _ in range(3)]
    half = [operand.bfloat16() for operand in full]
    return {
        "copy": Operation(lambda: target.copy_(source), bytes=8 * len(source)),
        "matmul bf16": Operation(lambda: torch.mm(*half[:2], out=half[2]), flops=2 * size**3),
        "matmul fp32": Operation(lambda: torch.mm(*full[:2], out=full[2]), flops=2 * size**3),
    }


def sustained(operation: Operation, device: torch.device, burst_ms: float) -> Samples:
    """Samples of one call among as many as fill `SUSTAINED_MS`: what is left of the burst rate when the power limit and
    the temperature bind, as in training.

    Args:
        burst_ms: of a single call.
    """
    count = math.ceil(SUSTAINED_MS / burst_ms)

    def calls() -> None:
        for _ in range(count):
            operation.call()

    samples = measure({"": calls}, device=device, repeats=3, warmup=1)[""]
    return Samples(tuple(ms / count for ms in samples.ms), tuple(ms / count for ms in samples.host_samples_ms))


def roofs(device: torch.device, dtype: torch.dtype = torch.bfloat16) -> dict[str, float]:
    """Measure `copy_gb_per_s` (1e9 bytes, read + written) and `matmul_tflop_per_s` (1e12 FLOP) of a dtype now, in short
    bursts."""
    measured = operations(device)
    copy, matmul = measured["copy"], measured["matmul bf16" if dtype == torch.bfloat16 else "matmul fp32"]
    samples = measure({"copy": copy.call, "matmul": matmul.call}, device=device, repeats=20, warmup=3)
    return {
        "copy_gb_per_s": copy.bytes / (samples["copy"].median_ms or math.inf) / 1e6,
        "matmul_tflop_per_s": matmul.flops / (samples["matmul"].median_ms or math.inf) / 1e9,
    }
