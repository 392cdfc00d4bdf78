"""Registers, spills, shared memory and load width of every Triton kernel, on three architectures, without a GPU.

    python -m benchmarks.kernel_resources            shows them, and what is worse than kernel_resources.json says
    python -m benchmarks.kernel_resources --write    takes them over

Kernels are compiled as their launchers call them at the widths of SiT-S, B, L and XL. Exit code 1 if one spills, needs
more registers, stack or shared memory than is on record, or loads less than 128 bits at a time where a row allows it.
What a kernel needs also depends on the compiler: the record names the Triton it holds for, and another version is
held to spills and load width alone.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import triton
from torch import Tensor

from benchmarks.machine_code import ARCHITECTURES, Launch, compiled, recorded, resources
from benchmarks.record import markdown
from sra_fast.config import SIZES
from sra_fast.kernels import adaln, alignment, gated_adaln
from sra_fast.metrics import read_json, write_json

RECORD = Path(__file__).with_name("kernel_resources.json")
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}  # fp16 compiles to what bf16 does but for the conversions
DISTANCES = ("cosine", "cosine_channel", "smooth_l1")  # l1 and l2 differ from the last by an instruction or two
BATCH, TOKENS = 32, 256
MUST_NOT_GROW = ("registers", "stack", "shared")
WIDEST = 128  # bits
Found = dict[str, dict[str, int]]  # "adaln._forward, D = 1152, bf16, sm_90" -> resources


def _norms(x: Tensor, vector: Tensor) -> None:
    per_token = torch.empty(x.shape[:2])
    adaln._launch_forward(x, vector, vector, 1e-6)
    adaln._launch_backward(x, x, vector, per_token, per_token, x.dtype)
    gated_adaln._launch_forward(x, x, vector, vector, vector, 1e-6)
    gated_adaln._launch_backward(x, x, x, x, vector, vector, per_token, per_token, x.dtype)


def _distances(x: Tensor, vector: Tensor) -> None:
    with patch.object(alignment, "_check"):  # tensors here are on the CPU; nothing reads them
        for distance in DISTANCES:
            _, coefficients = alignment._alignment._init_fn(x, x, distance)
            alignment._alignment_backward._init_fn(torch.empty(()), x, x, coefficients, distance)


CALLS: tuple[Callable[[Tensor, Tensor], None], ...] = (_norms, _distances)


def launches() -> Iterator[tuple[str, Launch]]:
    """(description without the architecture, launch) of every kernel at every width and dtype, as the model calls it:
    modulations are views into one tensor."""
    for width in sorted({hidden for _, hidden, _ in SIZES.values()}):
        for name, dtype in DTYPES.items():
            x = torch.empty(BATCH, TOKENS, width, dtype=dtype)
            vector = torch.empty(BATCH, 6 * width, dtype=dtype)[:, :width]
            seen: set[str] = set()
            with recorded() as made:
                for call in CALLS:
                    call(x, vector)
            for launch in made:
                distance = dict(launch.constants).get("DISTANCE")
                described = f"{launch.name}{f' {distance}' if distance else ''}, D = {width}, {name}"
                if described not in seen:
                    seen.add(described)
                    yield described, launch


def measure(every: Sequence[tuple[str, Launch]], architectures: Sequence[int] = ARCHITECTURES) -> Found:
    """Resources of all launches on the architectures. ptxas and cuobjdump are other processes: threads keep the cores
    busy."""
    jobs = [(f"{described}, sm_{capability}", launch, capability) for described, launch in every
            for capability in architectures]  # fmt: skip

    def one(job: tuple[str, Launch, int]) -> tuple[str, dict[str, int]]:
        described, launch, capability = job
        return described, resources(compiled(launch, capability)).json()

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(pool.map(one, jobs))


def complaints(found: Found, record: dict[str, Any]) -> list[str]:
    """What is wrong, or worse than on record, a line each."""
    said = []
    comparable = record["triton"] == triton.__version__
    for name, now in found.items():
        before = record["kernels"].get(name)
        if now["spills"]:
            said.append(f"{name}: {now['spills']} instructions spill registers")
        if 0 < now["load_bits"] < WIDEST and not name.startswith(("rows.", "alignment._mean")):
            said.append(f"{name}: loads {now['load_bits']} bits at a time; must be {WIDEST}")
        if before is None:
            said.append(f"{name}: not on record (--write)")
        elif comparable:
            said += [
                f"{name}: {now[field]} {field}, {before[field]} on record"
                for field in MUST_NOT_GROW
                if now[field] > before[field]
            ]
    return said


def table(found: Found) -> str:
    """For people."""
    fields = list(next(iter(found.values())))
    return markdown(
        ["kernel", *fields], [[name, *(str(now[field]) for field in fields)] for name, now in found.items()]
    )


def main(arguments: Sequence[str] | None = None, record: Path = RECORD) -> int:
    """The program. Returns its exit code: 1 if there is something to complain about."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernel_resources", description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="take the numbers over into kernel_resources.json")
    chosen = parser.parse_args(arguments)
    found = measure(list(launches()))
    print(table(found))
    on_record = {"triton": triton.__version__, "kernels": found} if chosen.write else read_json(record)
    if chosen.write:
        write_json(record, on_record)
    said = complaints(found, on_record)
    for line in said:
        print(line)
    return 1 if said else 0


if __name__ == "__main__":
    raise SystemExit(main())
