"""The launches, bytes and FLOPs of a training step on a GPU, counted without one.

    python -m benchmarks.count_step --size xl --batch 32                   the step that a GPU runs by default
    python -m benchmarks.count_step --size s --depth 3 --ops reference     of other kernels
    python -m benchmarks.count_step --record                               write count_step.json
    python -m benchmarks.count_step --check                                exit code 1 if a step is worse than on record

The step is compiled for an H200 by PyTorch's CPU build and run on fake tensors (static/). Bytes are those of inputs and
outputs, each once; an operator of PyTorch counts as one launch, although some are several; and the floor is the time in
which these bytes and FLOPs can be moved and computed at the stated roofs. It is no measurement: caches, the achieved
bandwidth and launch gaps are not seen.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.static import guard, why_unavailable  # noqa: F401 # isort: skip  before torch

from benchmarks.harness import options
from benchmarks.harness.rows import markdown
from sra_fast.config import SIZES
from sra_fast.files import read_json, write_json

if TYPE_CHECKING:
    from benchmarks.static.launches import Launch
    from benchmarks.static.step import Count

RECORD = Path(__file__).with_name("count_step.json")
OPS = ("best", "reference", "fused")
EXECUTIONS = ("compiled", "eager")
# Of an H200: a sustained bf16 product and a copy.
TFLOPS, TB_PER_S = 790.0, 4.3
MORE = 1.01  # times the bytes on record: more is worse
RECORDED = [  # (size, batch, depth, family, ops, execution): small, because the tests count them
    ("s", 8, 3, "sit", "best", "compiled"),
    ("s", 8, 3, "sit", "reference", "compiled"),
    ("s", 8, 3, "dit", "best", "compiled"),
    ("s", 8, 3, "sit", "best", "eager"),
    ("s", 8, 3, "sit", "reference", "eager"),
]
RECORDED_XL = [("xl", 32, 0, "sit", ops, "compiled") for ops in OPS]


def complaints(name: str, now: dict[str, Any], before: dict[str, Any]) -> Iterator[str]:
    """How a count is worse than the one on record: more launches or more bytes, in all or in a part; or wrong."""
    yield from (f"{name}: {what}" for what in now["wrong"])
    parts = [("all", now, before)]
    empty = {"launches": 0, "gb": 0.0}
    parts += [(part, sums, before["parts"].get(part, empty)) for part, sums in now["parts"].items()]
    for part, new, old in parts:
        if new["launches"] > old["launches"]:
            yield f"{name}: {part}: {new['launches']} launches, {old['launches']} on record"
        if new["gb"] > old["gb"] * MORE + 1e-4:
            yield f"{name}: {part}: {new['gb']:.4f} GB, {old['gb']:.4f} on record"


def show(launches: Sequence[Launch], total: Count, most: int) -> str:
    """Two tables: parts of the step, and the launches with the most bytes."""
    lines = [
        [name, f"{part['launches']:,.0f}", f"{part['gb']:.2f}", f"{part['gflop']:,.0f}", f"{part['floor_ms']:.2f}"]
        for name, part in [*total.parts.items(), ("all", asdict(total))]
    ]
    tables = markdown(("part", "launches", "GB", "GFLOP", "floor, ms"), lines)
    same = Counter((one.phase, one.kind, one.name, one.shape, one.bytes) for one in launches)
    heaviest = sorted(same.items(), key=lambda item: -item[0][4] * item[1])[:most]
    lines = [
        [f"{phase}, {kind}", name, shape, f"{number:,}", f"{size / 1e6:.2f}", f"{size * number / 1e9:.2f}"]
        for (phase, kind, name, shape, size), number in heaviest
    ]
    return tables + "\n\n" + markdown(("part", "launch", "shape", "times", "MB each", "GB"), lines)


def title(size: str, batch: int, depth: int, family: str, ops: str, execution: str) -> str:
    """The name of a count on record."""
    blocks = f", {depth} blocks" if depth else ""
    return f"{family}-{size}-2{blocks}, batch {batch}, {ops}, {execution}"


def versions() -> dict[str, str]:
    """What the record depends on besides the code."""
    return {name: version(name).partition("+")[0] for name in ("torch", "triton")}


def compare(cases: Sequence[tuple[str, int, int, str, str, str]], record: bool) -> int:
    """Count cases, and write them to the record or compare them with it. Returns the exit code."""
    from benchmarks.static import device, step

    before = read_json(RECORD) if RECORD.exists() else {"versions": versions(), "counts": {}}
    if before["versions"] != versions() and not record:
        print(f"{RECORD.name} is of {before['versions']}, not {versions()}: nothing is compared")
        return 0
    mode, worse = device.pretend(), []
    for case in cases:
        name = title(*case)
        launches, wrong = step.launches_of(step.configuration(*case[:5]), case[5], mode)
        total = asdict(step.count(launches, wrong, TFLOPS, TB_PER_S))
        print(
            f"{name}: {total['launches']:,} launches, {total['gb']:.3f} GB, floor {total['floor_ms']:.2f} ms",
            flush=True,
        )
        if record:
            before["counts"][name] = total
        else:
            worse += complaints(name, total, before["counts"][name])
    if record:
        names = [title(*case) for case in (*RECORDED, *RECORDED_XL)]
        counts = {name: before["counts"][name] for name in names if name in before["counts"]}
        write_json(RECORD, {"versions": versions(), "counts": counts})
    print("\n".join(worse) or ("recorded" if record else "no step is worse than on record"))
    return 1 if worse else 0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = options.parser("count_step", __doc__)
    parser.add_argument("--size", choices=SIZES, default="xl")
    parser.add_argument("--batch", type=options.positive, default=32)
    parser.add_argument("--depth", type=options.depth, default=0, help="number of blocks; 0 = the size's")
    parser.add_argument("--family", choices=("sit", "dit"), default="sit")
    parser.add_argument("--ops", choices=OPS, default="best", help="best = every kernel of ours")
    parser.add_argument("--execution", choices=EXECUTIONS, default="compiled")
    parser.add_argument("--most", type=options.positive, default=25, help="launches to list")
    parser.add_argument("--tflops", type=float, default=TFLOPS, help="roof of products")
    parser.add_argument("--tb-per-s", type=float, default=TB_PER_S, help="roof of memory")
    parser.add_argument("--json", type=Path, help="also write the sums to this file")
    parser.add_argument("--record", action="store_true", help="count the recorded steps and write the record")
    parser.add_argument("--check", action="store_true", help="count the recorded steps and compare them")
    parser.add_argument("--xl", action="store_true", help="with --record or --check: SiT-XL/2, minutes")
    command = parser.parse_args(arguments)
    if reason := why_unavailable():
        print(f"count_step: {reason}")
        return 0
    if command.record or command.check:
        return compare(RECORDED_XL if command.xl else RECORDED, command.record)
    from benchmarks.static import device, step

    config = step.configuration(command.size, command.batch, command.depth, command.family, command.ops)
    launches, wrong = step.launches_of(config, command.execution, device.pretend())
    total = step.count(launches, wrong, command.tflops, command.tb_per_s)
    print(show(launches, total, command.most))
    print("\n".join(wrong))
    if command.json:
        write_json(command.json, asdict(total))
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
