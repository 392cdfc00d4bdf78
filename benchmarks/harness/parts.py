"""Programs run one after another within a time budget. A part that crashes, hangs or runs out of memory costs only
itself: each runs in a process group of its own with a share of the remaining time, and is killed as a whole at its end.
"""

from __future__ import annotations

import contextlib
import math
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.harness.stamp import ROOT

LAUNCHER = ROOT / "benchmarks" / "in_tree.py"
OK, FAILED, NOT_RUN, NOT_HERE = "ok", "failed", "not run (time)", "not run"
UNAVAILABLE = 69  # exit code of a program that lacks something here: EX_UNAVAILABLE of sysexits.h
MIN_SECONDS = 3.0  # in less than this nothing can even be imported
STDERR_LINES = 30


@dataclass(frozen=True)
class Part:
    """`python -m MODULE ARGUMENTS`; "{folder}" in an argument becomes the folder for its results."""

    name: str
    module: str
    arguments: tuple[str, ...] = ()
    share: float = 0.5  # of the remaining time that it may use
    max_seconds: float = math.inf
    must_end: bool = False  # whether running out of its share is a failure rather than a lack of time


@dataclass(frozen=True)
class Outcome:
    """How a part ended."""

    name: str
    command: str
    seconds: float
    outcome: str  # OK, FAILED, NOT_RUN or NOT_HERE
    reason: str = ""
    stderr: tuple[str, ...] = ()  # its last lines, if the part failed

    def __str__(self) -> str:
        return f"{self.outcome}, {self.seconds:.0f} s" + (f": {self.reason}" if self.reason else "")


def run_parts(
    parts: Sequence[Part], budget_s: float, folder: Path, after_each: Callable[[list[Outcome]], None]
) -> list[Outcome]:
    """Run the parts in order, the most important first, as far as the budget goes. Each writes its results to
    `<folder>/<number>-<module>`, which $SRA_FAST_RESULTS names; `after_each` gets the outcomes so far."""
    end = time.monotonic() + budget_s
    outcomes: list[Outcome] = []
    for number, part in enumerate(parts):
        remaining = end - time.monotonic()
        limit = min(remaining * part.share, part.max_seconds)
        results = folder / f"{number:02d}-{part.module.rpartition('.')[2]}"
        results.mkdir(parents=True, exist_ok=True)
        if limit < MIN_SECONDS:
            outcomes.append(Outcome(part.name, _command(part, results), 0.0, NOT_RUN, f"{remaining:.0f} s were left"))
        else:
            print(f"\n== {part.name} (up to {limit:.0f} s)", flush=True)
            outcomes.append(_run_part(part, limit, results))
            print(f"== {part.name}: {outcomes[-1]}", flush=True)
        after_each(outcomes)
    return outcomes


def _command(part: Part, results: Path) -> str:
    return shlex.join(["python", "-m", part.module, *_arguments(part, results)])


def _arguments(part: Part, results: Path) -> list[str]:
    return [argument.replace("{folder}", str(results)) for argument in part.arguments]


def _run_part(part: Part, limit_s: float, results: Path) -> Outcome:
    start = time.monotonic()
    with tempfile.TemporaryFile() as stderr:
        process = subprocess.Popen(
            [sys.executable, str(LAUNCHER), str(ROOT), part.module, *_arguments(part, results)],
            cwd=ROOT,
            env={**os.environ, "SRA_FAST_RESULTS": str(results), "PYTHONUNBUFFERED": "1"},
            stderr=stderr,
            start_new_session=True,
        )
        try:
            code = process.wait(timeout=limit_s)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _kill_group(process)  # including workers that a crash has left behind, with the GPU's memory
        seconds = time.monotonic() - start
        stderr.seek(0)
        lines = stderr.read().decode(errors="replace").splitlines()[-STDERR_LINES:]
    outcome, reason = _judge(part, code, seconds, lines)
    shown = tuple(lines) if outcome in (FAILED, NOT_RUN) else ()
    return Outcome(part.name, _command(part, results), seconds, outcome, reason, shown)


def _judge(part: Part, code: int | None, seconds: float, stderr: list[str]) -> tuple[str, str]:
    if code is None:
        return (FAILED if part.must_end else NOT_RUN), f"killed after {seconds:.0f} s, its share of the time"
    if code == 0:
        return OK, ""
    if code == UNAVAILABLE:
        return NOT_HERE, stderr[-1] if stderr else f"exit code {code}"
    return FAILED, f"exit code {code}" if code > 0 else f"ended by signal {-code} ({signal.Signals(-code).name})"


def _kill_group(process: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
