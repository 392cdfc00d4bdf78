"""Every op of a training step: in eager PyTorch, under torch.compile, and fused where there is a kernel.

    python -m benchmarks.bench_kernels --sizes s xl --batch 32
    python -m benchmarks.bench_kernels --ops attention --sizes xl
    pytest benchmarks/bench_kernels.py --benchmark-only --benchmark-save-data -k "adaln and compiled"

Bytes and FLOPs are spelled out in sra_fast/tuning/cases.py. On a GPU a sample is one replay of a CUDA graph, as in a
training step, from a cold L2 cache, because the ops in between have evicted its inputs. On a CPU caches are warm, and
small inputs may exceed the roof. An implementation whose results disagree with the reference gets no number.

pytest-benchmark records the same samples; the row is beside them under extra_info.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.harness import options
from benchmarks.harness.roofs import roofs
from benchmarks.harness.rows import Row, folder, row, stamp, write
from benchmarks.harness.tables import finish
from sra_fast.config import SIZES
from sra_fast.kernels.perturb import Stored
from sra_fast.tuning.cases import OPS, Case, check, make_case, prepared, truth
from sra_fast.tuning.timing import GateFailed, Samples, measure

# perturb reads moments, as packed latents are stored.
SHIFT, SCALE = 0.0, 0.18215
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def defaults(device: torch.device) -> dict[str, Any]:
    """Sizes, batch, dtype, samples and warm-up for a device."""
    if device.type == "cuda":
        return {"sizes": ["s", "xl"], "batch": 32, "dtype": "bf16", "repeats": 100, "warmup": 5}
    return {"sizes": ["s"], "batch": 4, "dtype": "fp32", "repeats": 30, "warmup": 3}


def case_of(
    op: str, size: str, batch: int, device: torch.device, dtype: torch.dtype, names: Sequence[str] | None = None
) -> Case:
    """An op at the shape that it has in a preset of that size on 256 tokens."""
    shift, scale = (torch.full((4,), value, device=device) for value in (SHIFT, SCALE))
    return make_case(op, options.sit(size, batch=batch), device, dtype, Stored(True, shift, scale), names)


def case_rows(
    case: Case, which: str, args: argparse.Namespace, size: str, device_roofs: dict[str, float] | None = None
) -> list[Row]:
    """Rows of all implementations of a case in one pass; `args` are those of the command. Those that agree with the
    reference are interleaved, the others have an error."""
    torch._dynamo.reset()  # its limit of recompilations is per function, not per shape
    right = truth(case, which)
    calls, taken = {}, {}
    for name in case.implementations:
        try:
            check(case, name, which, right)
            calls[name] = prepared(case, name, which)
        except GateFailed as error:
            taken[name] = Samples(error=f"disagrees with the reference: {error}")
    del right
    graph = args.device.type == "cuda"
    taken |= measure(calls, device=args.device, graph=graph, repeats=args.repeats, warmup=args.warmup)
    now = stamp(args.device)
    shared = {"size": size, "batch": args.batch, "dtype": "fp32" if case.op == "perturb" else args.dtype, "pass": which}
    amounts = {"bytes": case.bytes(which), "flops": case.flops(which) or None}
    return [
        row(case.op, {**shared, "implementation": name}, taken[name], stamp=now, roofs=device_roofs, **amounts)
        for name in case.implementations
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """The program. Returns its exit code: 1 if an implementation disagrees with the reference."""
    parser = options.parser("bench_kernels", __doc__, needs_device=True)
    parser.add_argument("--ops", nargs="+", choices=OPS, default=list(OPS), metavar="OP", help=", ".join(OPS))
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), help="default: s and xl on a GPU, s on a CPU")
    parser.add_argument("--batch", type=options.positive, help="images; default: 32 on a GPU, 4 on a CPU")
    parser.add_argument("--dtype", choices=list(DTYPES), help="default: bf16 on a GPU, fp32 on a CPU")
    parser.add_argument("--implementations", nargs="+", metavar="NAME", help="only these, and the reference")
    parser.add_argument("--repeats", type=options.positive, help="samples of each; default: 100 on a GPU, 30 on a CPU")
    parser.add_argument(
        "--warmup", type=options.positive, help="calls before sampling; default: 5 on a GPU, 3 on a CPU"
    )
    args = parser.parse_args(arguments)
    for name, value in defaults(args.device).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    device_roofs, now = roofs(args.device, DTYPES[args.dtype]), stamp(args.device)
    rows: list[Row] = []
    known: set[str] = set()
    for size in args.sizes:
        for op in args.ops:
            case = case_of(op, size, args.batch, args.device, DTYPES[args.dtype], args.implementations)
            known |= set(case.implementations)
            for which in case.passes:
                rows += case_rows(case, which, args, size, device_roofs)
            path = write(folder(now), "kernels", rows, now)  # after each op, so that a kill costs only one
    if unknown := set(args.implementations or ()) - known:
        parser.error(f"--implementations: {', '.join(sorted(unknown))} given; there were {', '.join(sorted(known))}")
    return finish(rows, path)


CLOCK = [0.0]  # seconds; pytest-benchmark reads it, and each call of `test_kernel`'s benchmark adds a sample to it


def pytest_generate_tests(metafunc: Any) -> None:
    """A test per op, size, pass and implementation that this device has."""
    import pytest  # the command does not need it

    device = options.default_device()
    chosen = defaults(device)
    replayed = pytest.mark.benchmark(timer=lambda: CLOCK[0])
    tests = []
    for size in chosen["sizes"]:
        for op in OPS:
            case = case_of(op, size, 1, device, DTYPES[chosen["dtype"]])
            for which in case.passes:
                tests += [pytest.param(op, size, which, name, marks=replayed) for name in case.implementations]
    metafunc.parametrize(("op", "size", "which", "implementation"), tests)


def test_kernel(benchmark: Any, op: str, size: str, which: str, implementation: str) -> None:
    """One row, measured as the command measures it and recorded by pytest-benchmark."""
    device = options.default_device()
    args = argparse.Namespace(device=device, **defaults(device))
    case = case_of(op, size, args.batch, device, DTYPES[args.dtype], [implementation])
    rows = {row["params"]["implementation"]: row for row in case_rows(case, which, args, size)}
    measured = rows[implementation]
    assert "error" not in measured, measured["error"]
    samples = iter(measured["samples_ms"])

    def replay() -> None:
        CLOCK[0] += next(samples) / 1e3

    benchmark.pedantic(replay, rounds=len(measured["samples_ms"]), iterations=1)
    benchmark.extra_info["row"] = measured


if __name__ == "__main__":
    raise SystemExit(main())
