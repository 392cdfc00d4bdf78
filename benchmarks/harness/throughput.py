"""How many images a second a loader or decoder delivers, by wall clock and by CPU time.

CPU time includes worker processes: beside a GPU, loaders share the cores with everything else the host does.
"""

from __future__ import annotations

import resource
import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.harness.rows import Row, Samples, row
from benchmarks.harness.stamp import stamp
from benchmarks.harness.timing import Call, CpuClock, measure


@dataclass(frozen=True)
class Candidate:
    """Something that delivers images."""

    run: Call
    images: int  # that one `run` delivers
    ours: bool
    params: dict[str, Any]  # of its row; `batch` is among them
    levels_off: float | None = None  # mean difference of its pixels from the reference's, in grey levels of 255


def cpu_seconds() -> float:
    """CPU time of this process and of its children that have ended."""
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(part.ru_utime + part.ru_stime for part in usage)


class ThroughputClock(CpuClock):
    """Wall time to the end of the device's work; CPU time takes the place of host time."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def prepare(self, call: Call) -> tuple[None, Call]:
        return None, call  # measuring memory would take one more epoch

    def sample(self, call: Call) -> tuple[float, float]:
        wall, cpu = time.perf_counter(), cpu_seconds()
        call()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return 1e3 * (time.perf_counter() - wall), 1e3 * (cpu_seconds() - cpu)


def measure_rows(
    name: str,
    candidates: dict[str, Candidate],
    device: torch.device,
    *,
    repeats: int,
    bytes_per_image: int,
    private: Sequence[Path | str | None] = (),
) -> list[Row]:
    """Rows of all candidates, interleaved: times of a batch, and images per second by either clock. Paths among the
    `private` arguments are left out of the command."""
    calls = {loader: candidate.run for loader, candidate in candidates.items()}
    taken = measure(calls, device=device, repeats=repeats, warmup=1, clock=ThroughputClock(device))
    now = stamp(device)
    now["command"] = without_paths(now["command"], private)
    return [_row(name, loader, candidates[loader], taken[loader], now, bytes_per_image) for loader in candidates]


def _row(
    name: str, loader: str, candidate: Candidate, taken: Samples, now: dict[str, Any], bytes_per_image: int
) -> Row:
    if taken.error:
        raise torch.OutOfMemoryError(f"{loader}: {taken.error}")
    batch = candidate.params["batch"]
    ms = tuple(batch / candidate.images * call_ms for call_ms in taken.ms)
    cpu_ms = [batch / candidate.images * call_ms for call_ms in taken.host_samples_ms]
    params = {"loader": loader, **candidate.params}
    return row(name, params, Samples(ms, ms), stamp=now, bytes=bytes_per_image * batch) | {
        "images_per_s": 1e3 * batch / float(np.median(ms)),
        "cpu_samples_ms": cpu_ms,
        "images_per_cpu_s": 1e3 * batch / float(np.median(cpu_ms)),
        "ours": candidate.ours,
        "levels_off": candidate.levels_off,
    }


def without_paths(command: str, arguments: Sequence[Path | str | None]) -> str:
    """The command with DIR for every argument that is a path of this machine: one that exists, or an absolute one."""
    paths = {Path(path) for path in arguments if path and (Path(path).exists() or Path(path).is_absolute())}

    def replaced(word: str) -> str:
        option, _, value = word.partition("=")
        if word and Path(word) in paths:
            return "DIR"
        return f"{option}=DIR" if value and Path(value) in paths else word

    return shlex.join(map(replaced, shlex.split(command)))
