"""The fastest this device moves and multiplies: the roofs that other rows are compared with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.harness.timing import GIB, measure

COPY_BYTES = {"cuda": 4 * GIB, "cpu": GIB // 4}  # read plus written, well beyond the caches
MATMUL_SIZE = {"cuda": 8192, "cpu": 1024}


@dataclass(frozen=True)
class Operation:
    """A call with the bytes or the FLOPs (2 per multiply-add) that it takes."""

    call: Callable[[], object]
    bytes: int | None = None
    flops: int | None = None


def operations(
    device: torch.device, copy_bytes: int | None = None, matmul_size: int | None = None
) -> dict[str, Operation]:
    """A large copy, and a large matrix product in each precision of training.

    Operands are random normal numbers: zeros draw less power and run faster than real data.

    Args:
        device: to measure.
        copy_bytes: bytes read plus bytes written; None = `COPY_BYTES`.
        matmul_size: n of the (n, n) x (n, n) product; None = `MATMUL_SIZE`.
    """
    source = torch.randn((copy_bytes or COPY_BYTES[device.type]) // 8, device=device)  # half is read, half written
    target = torch.empty_like(source)
    size = matmul_size or MATMUL_SIZE[device.type]
    full = [torch.randn(size, size, device=device) for _ in range(3)]
    half = [operand.bfloat16() for operand in full]
    return {
        "copy": Operation(lambda: target.copy_(source), bytes=8 * len(source)),
        "matmul bf16": Operation(lambda: torch.mm(*half[:2], out=half[2]), flops=2 * size**3),
        "matmul fp32": Operation(lambda: torch.mm(*full[:2], out=full[2]), flops=2 * size**3),
    }


def roofs(device: torch.device | str, copy_bytes: int | None = None, matmul_size: int | None = None) -> dict[str, Any]:
    """Measure both roofs now. Arguments are those of `operations`.

    Returns:
        `copy_gb_per_s` (1e9 bytes, read + written), `matmul_tflop_per_s` (1e12 FLOP, of bf16), and the sizes
        `copy_bytes` and `matmul_size`.
    """
    device = torch.device(device)
    measured = operations(device, copy_bytes, matmul_size)
    copy, matmul = measured["copy"], measured["matmul bf16"]
    samples = measure({"copy": copy.call, "matmul": matmul.call}, device=device, repeats=20, warmup=3)
    return {
        "copy_gb_per_s": copy.bytes / samples["copy"].median_ms / 1e6,
        "matmul_tflop_per_s": matmul.flops / samples["matmul"].median_ms / 1e9,
        "copy_bytes": copy.bytes,
        "matmul_size": matmul_size or MATMUL_SIZE[device.type],
    }
