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

from benchmarks.harness.rows import ROOT

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
        arguments = [argument.replace("{folder}", str(results)) for argument in part.arguments]
        command = shlex.join(["python", "-m", part.module, *arguments])
        if limit < MIN_SECONDS:
            outcomes.append(Outcome(part.name, command, 0.0, NOT_RUN, f"{remaining:.0f} s were left"))
        else:
            print(f"\n== {part.name} (up to {limit:.0f} s)", flush=True)
            outcomes.append(Outcome(part.name, command, *_run(part, arguments, limit, results)))
            print(f"== {part.name}: {outcomes[-1]}", flush=True)
        after_each(outcomes)
    return outcomes


def _run(part: Part, arguments: list[str], limit_s: float, results: Path) -> tuple[float, str, str, tuple[str, ...]]:
    """The last four fields of its outcome."""
    start = time.monotonic()
    with tempfile.TemporaryFile() as file:
        process = subprocess.Popen(
            [sys.executable, str(LAUNCHER), str(ROOT), part.module, *arguments],
            cwd=ROOT,
            env={**os.environ, "SRA_FAST_RESULTS": str(results), "PYTHONUNBUFFERED": "1"},
            stderr=file,
            start_new_session=True,
        )
        try:
            code = process.wait(timeout=limit_s)
        except subprocess.TimeoutExpired:
            code = None
        finally:  # also ends workers that a crash has left behind, with the GPU's memory
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        seconds = time.monotonic() - start
        file.seek(0)
        stderr = file.read().decode(errors="replace").splitlines()[-STDERR_LINES:]
    if code == 0:
        return seconds, OK, "", ()
    if code is None:
        reason = f"killed after {seconds:.0f} s, its share of the time"
        return seconds, FAILED if part.must_end else NOT_RUN, reason, tuple(stderr)
    if code == UNAVAILABLE:
        return seconds, NOT_HERE, stderr[-1] if stderr else f"exit code {code}", ()
    reason = f"exit code {code}" if code > 0 else f"ended by signal {-code} ({signal.Signals(-code).name})"
    return seconds, FAILED, reason, tuple(stderr)
