"""What this device reaches: a large copy, and a large matrix product in each precision of training.

    python -m benchmarks.bench_roofs

Every other benchmark measures the roofs it divides by in its own run (harness/timing.py); these rows keep raw samples.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from benchmarks.harness import options
from benchmarks.harness.rows import folder, row, stamp, write
from benchmarks.harness.tables import finish
from benchmarks.harness.timing import measure, operations


def main(arguments: Sequence[str] | None = None) -> int:
    parser = options.parser("bench_roofs", __doc__, needs_device=True)
    parser.add_argument("--repeats", type=options.positive, default=30)
    args = parser.parse_args(arguments)
    torch.set_float32_matmul_precision("high")  # TF32 for fp32 products on a GPU, as in training
    measured = operations(args.device)
    calls = {name: operation.call for name, operation in measured.items()}
    taken = measure(calls, device=args.device, repeats=args.repeats, warmup=3)
    now = stamp(args.device)
    rows = [
        row("roof", {"of": name}, taken[name], stamp=now, bytes=operation.bytes or None, flops=operation.flops or None)
        for name, operation in measured.items()
    ]
    return finish(rows, write(folder(now), "roofs", rows, now))


if __name__ == "__main__":
    raise SystemExit(main())
