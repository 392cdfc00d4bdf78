"""What this device reaches: a large copy, and a large matrix product in each precision of training.

    python -m benchmarks.bench_roofs

Every other benchmark measures the roofs it divides by in its own run (timing.roofs); these rows keep the raw samples.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

import torch

from benchmarks.harness import timing

COPY_BYTES = {"cuda": 4 * timing.GIB, "cpu": timing.GIB // 4}  # read and written, well beyond the caches
MATMUL_SIZE = {"cuda": 8192, "cpu": 1024}


def candidates(device: torch.device) -> dict[str, tuple[Callable[[], None], int | None, int | None]]:
    """name -> (call, bytes, FLOPs). Operands are random normal numbers, as in timing.roofs."""
    source = torch.randn(COPY_BYTES[device.type] // 8, device=device)
    target = torch.empty_like(source)
    size = MATMUL_SIZE[device.type]
    full = [torch.randn(size, size, device=device) for _ in range(2)]
    half = [operand.bfloat16() for operand in full]
    outs = {operand.dtype: torch.empty_like(operand) for operand in (full[0], half[0])}
    flops = 2 * size**3
    return {
        "copy": (lambda: target.copy_(source), 8 * len(source), None),
        "matmul bf16": (lambda: torch.mm(*half, out=outs[torch.bfloat16]), None, flops),
        # TF32 on a GPU, see main
        "matmul fp32": (lambda: torch.mm(*full, out=outs[torch.float32]), None, flops),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """The program. Returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_roofs", description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(arguments)
    torch.set_float32_matmul_precision("high")
    found = candidates(options.device)
    calls = {name: call for name, (call, _, _) in found.items()}
    taken = timing.measure(calls, device=options.device, repeats=options.repeats, warmup=3)
    stamp = timing.stamp(options.device)
    made = [
        timing.row("roof", {"of": name}, samples, stamp=stamp, bytes=found[name][1], flops=found[name][2])
        for name, samples in taken.items()
    ]
    path = timing.write(timing.folder(stamp), "roofs", made, stamp)
    print(timing.table(made))
    print(f"raw samples in {path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
