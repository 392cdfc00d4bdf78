"""Programs run one after another within a time budget. A part that crashes, hangs or runs out of memory costs only
itself: each runs in a process group of its own with a share of the remaining time, and is killed as a whole at its end.
"""

from __future__ import annotations

import contextlib
import io
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
MARGIN = 1.5  # times what a part is expected to take: it may take as much, whatever its share
MIN_SECONDS = 3.0  # in less than this nothing can even be imported
STDERR_LINES = 30

Ending = tuple[float, str, str, tuple[str, ...]]  # the last four fields of an `Outcome`


@dataclass(frozen=True)
class Part:
    """`python -m MODULE ARGUMENTS`; "{folder}" in an argument becomes the folder for its results."""

    name: str
    module: str
    arguments: tuple[str, ...] = ()
    expected_s: float = 0.0  # on a GPU: an estimate, until a report has measured it
    share: float = 0.5  # of the remaining time that it may use, if that is more than it is expected to take
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


def limit_s(part: Part, remaining_s: float) -> float:
    """Seconds after which a part is killed; 0 if it is not worth starting, so that shorter parts after it can run."""
    if remaining_s < part.expected_s:
        return 0.0
    limit = max(part.share * remaining_s, min(MARGIN * part.expected_s, remaining_s))
    limit = min(limit, part.max_seconds)
    return limit if limit >= MIN_SECONDS else 0.0


def run_parts(
    parts: Sequence[Part],
    budget_s: float,
    folder: Path,
    after_each: Callable[[list[Outcome]], None],
    run: Callable[..., Ending] | None = None,
    now: Callable[[], float] = time.monotonic,
) -> list[Outcome]:
    """Run the parts in order, the most important first, as far as the budget goes. Each writes its results to
    `<folder>/<number>-<module>`, which $SRA_FAST_RESULTS names.

    Args:
        after_each: gets the outcomes so far.
        run, now: in place of a process and the clock, see `simulated`.
    """
    end = now() + budget_s
    outcomes: list[Outcome] = []
    for number, part in enumerate(parts):
        remaining = end - now()
        limit = limit_s(part, remaining)
        results = folder / f"{number:02d}-{part.module.rpartition('.')[2]}"
        arguments = [argument.replace("{folder}", str(results)) for argument in part.arguments]
        command = shlex.join(["python", "-m", part.module, *arguments])
        if limit:
            expected = f"about {part.expected_s:.0f} s, " if part.expected_s else ""
            print(f"\n== {part.name} ({expected}up to {limit:.0f} s)", flush=True)
            outcomes.append(Outcome(part.name, command, *(run or _run)(part, arguments, limit, results)))
            print(f"== {part.name}: {outcomes[-1]}", flush=True)
        else:
            outcomes.append(Outcome(part.name, command, 0.0, NOT_RUN, f"{max(0, remaining):.0f} s were left"))
        after_each(outcomes)
    return outcomes


def simulated(parts: Sequence[Part], budget_s: float) -> list[tuple[Outcome, float]]:
    """(outcome, second at which it ends) of each part if all take what is expected. Nothing is run."""
    clock, ends = [0.0], []

    def run(part: Part, arguments: list[str], limit: float, results: Path) -> Ending:
        seconds = min(part.expected_s, limit)
        clock[0] += seconds
        return seconds, OK if seconds == part.expected_s else NOT_RUN, "", ()

    with contextlib.redirect_stdout(io.StringIO()):
        outcomes = run_parts(parts, budget_s, Path(), lambda _: ends.append(clock[0]), run, lambda: clock[0])
    return list(zip(outcomes, ends, strict=True))


def _run(part: Part, arguments: list[str], limit: float, results: Path) -> Ending:
    results.mkdir(parents=True, exist_ok=True)
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
            code = process.wait(timeout=limit)
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
