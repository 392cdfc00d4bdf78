"""How many images a second something delivers, by the wall clock and by CPU time.

CPU time is that of the process and of its workers: beside a GPU, loaders share the cores with all else that the host
does.
"""

from __future__ import annotations

import resource
import shlex
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from benchmarks.harness import tables, timing
from benchmarks.harness.rows import Row, digits, read
from benchmarks.harness.timing import Samples
from sra_fast.errors import Refused

GOALS = {  # of the best of ours whose name has this in it, over the best rival
    ("latents", "images_per_cpu_s"): ("", 20.0),
    ("decode", "images_per_cpu_s"): ("DALI", 1.0),
    ("decode on a GPU", "images_per_s"): ("DALI", 1.5),
}
GOAL_OVER_STEP = 2.0  # of the best of ours over the fastest measured step, by the wall clock


class Candidate(NamedTuple):
    """Something that delivers images."""

    run: Callable[[], int]
    """Deliver some, and return how many."""
    ours: bool
    params: dict[str, Any]
    levels_off: float | None = None
    """Mean difference of its pixels from the reference's, in grey levels of 255."""


class Taken(NamedTuple):
    """One sample."""

    images: int
    wall_s: float
    cpu_s: float


def cpu_s() -> float:
    """CPU time of this process so far, and of its children that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(part.ru_utime + part.ru_stime for part in used)


def measure(candidates: dict[str, Candidate], repeats: int, device: torch.device) -> dict[str, list[Taken]]:
    """Samples of every candidate after one to warm up; in turns, starting each round with the next one."""

    def sample(run: Callable[[], int]) -> Taken:
        wall, cpu = time.perf_counter(), cpu_s()
        images = run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return Taken(images, time.perf_counter() - wall, cpu_s() - cpu)

    names, taken = list(candidates), {name: [] for name in candidates}
    for name in names:
        sample(candidates[name].run)
    for _ in range(repeats):
        for name in names:
            taken[name].append(sample(candidates[name].run))
        names = names[1:] + names[:1]
    return taken


def rows(name: str, candidates: dict[str, Candidate], chosen: Any, device: torch.device, bytes_each: int) -> list[Row]:
    """Rows of measured candidates: times of a batch, and images per second of either clock."""
    taken, stamp = measure(candidates, chosen.repeats, device), timing.stamp(device)
    stamp["command"] = without_places(stamp["command"], (chosen.jpegs, chosen.vae))
    made = []
    for loader, samples in taken.items():
        params = {"loader": loader, **candidates[loader].params}
        ms = tuple(1e3 * one.wall_s / one.images * params["batch"] for one in samples)
        cpu_ms = [1e3 * one.cpu_s / one.images * params["batch"] for one in samples]
        row = timing.row(name, params, Samples(ms, ms), stamp=stamp, bytes=bytes_each * params["batch"])
        row |= {"images_per_s": 1e3 * params["batch"] / float(np.median(ms)), "cpu_samples_ms": cpu_ms}
        row |= {"images_per_cpu_s": 1e3 * params["batch"] / float(np.median(cpu_ms)), "ours": candidates[loader].ours}
        row |= {"levels_off": candidates[loader].levels_off}
        made.append(row)
    return made


def without_places(command: str, given: Sequence[Path | str | None]) -> str:
    """The command, with DIR for every argument that is a path of this machine: one that exists, or an absolute one."""
    places = {Path(path) for path in given if path and (Path(path).exists() or Path(path).is_absolute())}

    def told(word: str) -> str:
        option, _, value = word.partition("=")
        if word and Path(word) in places:
            return "DIR"
        return f"{option}=DIR" if value and Path(value) in places else word

    return shlex.join(map(told, shlex.split(command)))


def fastest_step(results: Iterable[Path]) -> Row | None:
    """The row of a whole training step, of any model on any device, that takes the most images a second. Files of other
    content are passed over, and models cut short for a quick look."""
    steps = []
    for path in results:
        try:
            content = read(path)
        except Refused:
            continue
        if "-depth" not in content["name"]:
            steps += [row for row in content["rows"] if tables.is_step(row) and not row["params"].get("depth")]
    return max((row for row in steps if row.get("images_per_s")), key=lambda row: row["images_per_s"], default=None)


def report(made: Sequence[Row], step: Row | None = None) -> str:
    """A table of one kind of rows, whether the best of ours reaches the goal by either clock, and whether it keeps up
    with a step."""
    name, mine = made[0]["name"], [row for row in made if row["ours"]]
    rivals = [row for row in made if not row["ours"]]
    lines = [name, "", tables.data_table(made), ""]
    for clock in ("images_per_cpu_s", "images_per_s") if rivals else ():
        whose, goal = GOALS.get((name, clock), ("", None))
        judged = [row for row in mine if whose in row["params"]["loader"]] or mine
        best = max(judged, key=lambda row: row[clock])
        ratio = best[clock] / max(row[clock] for row in rivals)
        line = f"{clock}: {best['params']['loader']} {ratio:.2f} x the best rival"
        lines.append(f"{line}; goal {goal:g}: {'reached' if ratio >= goal else 'missed'}" if goal else line)
    if step:
        best = max(mine, key=lambda row: row["images_per_s"])
        ratio, family = best["images_per_s"] / step["images_per_s"], tables.families([step])
        what = f"{tables.title(next(iter(family)))} on {step['device']}: {digits(step['images_per_s'])} images/s"
        reached = "reached" if ratio >= GOAL_OVER_STEP else "missed"
        lines.append(
            f"images_per_s: {best['params']['loader']} {digits(ratio)} x the fastest measured step ({what}); "
            f"goal {GOAL_OVER_STEP:g}: {reached}"
        )
    return "\n".join(lines) + "\n"
