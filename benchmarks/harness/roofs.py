"""The fastest this device moves and multiplies: the roofs that other rows are compared with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from benchmarks.harness.timing import GIB, measure

COPY_BYTES = {"cuda": 4 * GIB, "cpu": GIB // 4}  # read plus written, well beyond the caches
MATMUL_SIZE = {"cuda": 8192, "cpu": 1024}


class Operation(NamedTuple):
    """A call with the bytes or the FLOPs (2 per multiply-add) that it takes."""

    call: Callable[[], object]
    bytes: int | None = None
    flops: int | None = None


def operations(
    device: torch.device, copy_bytes: int | None = None, matmul_size: int | None = None
) -> dict[str, Operation]:
    """A large copy (bytes read plus bytes written), and a large square matrix product in each precision of training, of
    random normal numbers: zeros draw less power and run faster than real data."""
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
    """Measure `copy_gb_per_s` (1e9 bytes, read + written) and `matmul_tflop_per_s` (1e12 FLOP, bf16) now; also returns
    the sizes `copy_bytes` and `matmul_size`, see `operations`."""
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
