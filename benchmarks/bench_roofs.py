"""What this device reaches: a large copy, and a large matrix product in each precision of training, once at a time and
without a pause for longer than a GPU's power limit allows its highest clocks.

    python -m benchmarks.bench_roofs

Every other benchmark measures the roofs it divides by in its own run (harness/roofs.py); these rows keep raw samples.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from benchmarks.harness import options
from benchmarks.harness.roofs import SUSTAINED_MS, operations, sustained
from benchmarks.harness.rows import folder, row, stamp, write
from benchmarks.harness.tables import finish
from sra_fast.tuning.timing import measure


def main(arguments: Sequence[str] | None = None) -> int:
    parser = options.parser("bench_roofs", __doc__, needs_device=True)
    parser.add_argument("--repeats", type=options.positive, default=30)
    args = parser.parse_args(arguments)
    torch.set_float32_matmul_precision("high")  # TF32 for fp32 products on a GPU, as in training
    measured = operations(args.device)
    calls = {name: operation.call for name, operation in measured.items()}
    taken = measure(calls, device=args.device, repeats=args.repeats, warmup=3)
    if args.device.type == "cuda":
        for name, operation in list(measured.items()):
            longer = f"{name}, for {SUSTAINED_MS / 1e3:g} s"
            measured[longer] = operation
            taken[longer] = sustained(operation, args.device, taken[name].median_ms or SUSTAINED_MS)
    now = stamp(args.device)
    rows = [
        row("roof", {"of": name}, taken[name], stamp=now, bytes=operation.bytes or None, flops=operation.flops or None)
        for name, operation in measured.items()
    ]
    return finish(rows, write(folder(now), "roofs", rows, now))


if __name__ == "__main__":
    raise SystemExit(main())
