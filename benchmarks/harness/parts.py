"""Programs run one after another under one budget of time: what crashes, hangs or runs out of memory takes nothing else
with it.

Each part is a process group of its own that gets a share of the time that is left, and is killed whole at its end.
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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
LAUNCHER = Path(__file__).parents[1] / "in_tree.py"

OK, FAILED, NOT_RUN, NOT_HERE = "ok", "failed", "not run (time)", "not run"
LEAST_S = 3.0  # below this nothing can even be imported
SAID_LINES = 30


@dataclass(frozen=True)
class Part:
    """One program.

    Attributes:
        name: in the report.
        module, arguments: `python -m MODULE ARGUMENTS`; "{folder}" in an argument becomes the folder for its results.
        share: of the time that is left when it begins, which it may use.
        most_s: seconds that it may use however many are left.
        must_end: whether taking longer than its share is a failure, and not merely a lack of time.
        nothing_to_do: exit codes other than 0 that are no failure.
        not_here: exit codes by which it says that this machine lacks what it needs; the last line it says is what.
    """

    name: str
    module: str
    arguments: tuple[str, ...] = ()
    share: float = 0.5
    most_s: float = math.inf
    must_end: bool = False
    nothing_to_do: tuple[int, ...] = ()
    not_here: tuple[int, ...] = ()


@dataclass(frozen=True)
class Outcome:
    """What became of a part."""

    name: str
    command: str
    seconds: float
    outcome: str
    """"ok", "failed", "not run (time)" or "not run"."""
    reason: str = ""
    """Why not ok."""
    stderr: tuple[str, ...] = ()
    """The last lines of a failed part's stderr."""

    def json(self) -> dict[str, Any]:
        """As it is written down."""
        return asdict(self)


def run_parts(
    parts: Sequence[Part], budget_s: float, folder: Path, after_each: Callable[[list[Outcome]], None]
) -> list[Outcome]:
    """Run all parts in order, as far as the budget goes.

    Args:
        parts: the most important first.
        budget_s: seconds for all together.
        folder: each part's results go to a folder of its own in there, `<number>-<module>`; $SRA_FAST_RESULTS names it.
        after_each: called with the outcomes so far.
    """
    end = time.monotonic() + budget_s
    outcomes: list[Outcome] = []
    for number, part in enumerate(parts):
        left = end - time.monotonic()
        limit = min(left * part.share, part.most_s)
        place = folder / f"{number:02d}-{part.module.rpartition('.')[2]}"
        place.mkdir(parents=True, exist_ok=True)
        if limit < LEAST_S:
            outcomes.append(Outcome(part.name, command(part, place), 0.0, NOT_RUN, f"{left:.0f} s were left"))
        else:
            print(f"\n== {part.name} (up to {limit:.0f} s)", flush=True)
            outcomes.append(run_part(part, limit, place))
            print(f"== {part.name}: {say(outcomes[-1])}", flush=True)
        after_each(outcomes)
    return outcomes


def say(outcome: Outcome) -> str:
    """One line."""
    return f"{outcome.outcome}, {outcome.seconds:.0f} s" + (f": {outcome.reason}" if outcome.reason else "")


def command(part: Part, place: Path) -> str:
    """As one would type it."""
    return shlex.join(["python", "-m", part.module, *_arguments(part, place)])


def _arguments(part: Part, place: Path) -> list[str]:
    return [argument.replace("{folder}", str(place)) for argument in part.arguments]


def run_part(part: Part, limit_s: float, place: Path) -> Outcome:
    """Run one, for at most so long."""
    words = [sys.executable, str(LAUNCHER), str(ROOT), part.module, *_arguments(part, place)]
    began = time.monotonic()
    with tempfile.TemporaryFile() as stderr:
        process = subprocess.Popen(
            words,
            cwd=ROOT,
            env={**os.environ, "SRA_FAST_RESULTS": str(place), "PYTHONUNBUFFERED": "1"},
            stderr=stderr,
            start_new_session=True,
        )
        try:
            code = process.wait(timeout=limit_s)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _kill_group(process)  # also workers that a crash has left behind, with the GPU's memory
        seconds = time.monotonic() - began
        stderr.seek(0)
        said = stderr.read().decode(errors="replace").splitlines()[-SAID_LINES:]
    if code == 0:
        return Outcome(part.name, command(part, place), seconds, OK)
    if code in part.nothing_to_do:
        return Outcome(part.name, command(part, place), seconds, OK, "nothing to do here")
    if code in part.not_here:
        return Outcome(part.name, command(part, place), seconds, NOT_HERE, said[-1] if said else f"exit code {code}")
    if code is None:
        outcome, reason = (FAILED if part.must_end else NOT_RUN), f"killed after {seconds:.0f} s, its share of the time"
    else:
        outcome = FAILED
        reason = f"exit code {code}" if code > 0 else f"ended by signal {-code} ({signal.Signals(-code).name})"
    return Outcome(part.name, command(part, place), seconds, outcome, reason, tuple(said))


def _kill_group(process: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
