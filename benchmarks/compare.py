"""Which rows got slower: `python -m benchmarks.compare OLD NEW`, each a file of results or a folder of them.

A row is "slower" when three things hold of its slow-down, new median over old median:

    it matters      it exceeds the threshold (3 % for kernels, 1.5 % for steps)
    it is real      its confidence interval lies above zero
    it is measured  the interval is no wider than the samples can bear: its half-width is at most twice the threshold,
                    or its lower end is still above the half-width

The threshold alone would call noise a slow-down, and the interval alone would fail a build over 0.1 %. Demanding that
the interval's lower end exceed the threshold would let most slow-downs of 3 % to 5 % pass. The third keeps a machine
that was busy with something else during half of one run from failing a build: such rows are "too noisy" and are to be
measured again.

The interval comes from resampling blocks of consecutive samples, because neighbours in time are alike (clocks,
temperature, other work on the machine): resampling single ones would promise too much (Kuensch, "The Jackknife and the
Bootstrap for General Stationary Observations", 1989; circular, Politis and Romano, 1992).

No interval knows of a drift as long as the run itself. On a machine whose noise lasts for 20 samples, 200 samples
raised no false alarm in 300 comparisons of equals, and 20 samples up to 24: measure for several times as long as the
noise lasts, and measure old and new in turns.

Exit code 0: nothing got slower. 1: something did, or the files cannot be compared; the last line says which.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.harness.rows import markdown, read, say
from sra_fast.config import refuse_unless
from sra_fast.errors import Refused
from sra_fast.files import read_json

Key = tuple[str, tuple[tuple[str, str], ...]]  # name, and params as sorted text
Rows = dict[Key, list[dict[str, Any]]]  # one entry per run in which the row was measured

RESAMPLES = 1000
MIN_SAMPLES = 8  # of 7, not even the smallest and the largest enclose the median with 99 % confidence: 1 - 2^-6
MATCHING = ("device", "driver", "power_limit_w", "threads", "versions.torch", "versions.triton")


@dataclass(frozen=True)
class Change:
    """New over old, both as they were and with its uncertainty."""

    old_ms: float
    new_ms: float
    ratio: float
    low: float
    high: float

    def verdict(self, threshold: float) -> str:
        """slower, faster, same or too noisy, at a threshold given as a share (0.03 = 3 %)."""
        change, half_width = math.log(self.ratio), math.log(self.high / self.low) / 2
        matters = abs(change) > math.log1p(threshold)
        real = abs(change) > half_width
        measured = half_width <= 2 * math.log1p(threshold) or abs(change) > 2 * half_width
        if not measured:
            return "too noisy"
        return ("slower" if change > 0 else "faster") if matters and real else "same"


def change(old: Sequence[Sequence[float]], new: Sequence[Sequence[float]], confidence: float = 0.99) -> Change:
    """The ratio of the medians with its interval.

    Args:
        old, new: per run of a benchmark, its samples in ms in the order they were taken; the median is over all runs.
        confidence: of the two-sided interval.
    """
    generator = np.random.default_rng(0)  # the same files give the same verdict
    before, after = (_log_medians([np.asarray(run) for run in runs], generator) for runs in (old, new))
    # The bootstrap's spread with Student's quantile rather than its own tails: with a handful of blocks the tails are
    # too thin, and the spread comes out small by (k - 1) / k as any variance about the sample's own mean does.
    variances = [logs.var() * blocks / (blocks - 1) for logs, blocks in (before, after)]
    quantile = student_quantile((1 + confidence) / 2, before[1] + after[1] - 2)
    half_width = quantile * math.sqrt(sum(variances))
    old_ms, new_ms = (float(np.median(np.concatenate([np.asarray(run) for run in runs]))) for runs in (old, new))
    ratio = new_ms / old_ms
    return Change(old_ms, new_ms, ratio, ratio * math.exp(-half_width), ratio * math.exp(half_width))


def _log_medians(runs: list[NDArray[np.float64]], generator: np.random.Generator) -> tuple[NDArray[np.float64], int]:
    """(log of the median of each resample, number of blocks in one). Blocks stay within their run, which they
    wrap around, and hold n^(2/3) samples: with sqrt(n), noise that lasts for 20 samples raised false alarms. Three
    blocks are the fewest whose spread says anything."""
    resampled, total = [], 0
    for samples in runs:
        n = len(samples)
        length = max(1, min(math.ceil(n ** (2 / 3)), n // 3))
        blocks = -(-n // length)
        starts = generator.integers(0, n, (RESAMPLES, blocks, 1))
        index = (starts + np.arange(length)) % n  # (R, blocks, length)
        resampled.append(samples[index.reshape(RESAMPLES, -1)[:, :n]])
        total += blocks
    return np.log(np.median(np.concatenate(resampled, axis=1), axis=1)), total


def student_quantile(probability: float, freedom: int) -> float:
    """Quantile of Student's t from the normal one, to 1 % from 4 degrees of freedom on at 99 % (Abramowitz and Stegun,
    26.7.5); numpy has none, and scipy is not needed anywhere else here."""
    z, v = NormalDist().inv_cdf(probability), freedom
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / v + second / v**2 + third / v**3


def load(path: Path) -> tuple[dict[str, Any], Rows]:
    """(stamp, rows) of a file, or of all files of a folder. A row that is in several files was measured in several
    runs. Understands our own format and pytest-benchmark's with `--benchmark-save-data`.

    Raises:
        Refused: if there is nothing to compare in it, samples are missing, or its files' stamps differ.
    """
    files = [path]
    if path.is_dir():  # which may also hold traces and summaries
        files = [file for file in sorted(path.glob("*.json")) if {"rows", "benchmarks"} & set(read_json(file))]
    refuse_unless(bool(files), str(path), "a folder without results", "must hold at least one file of them")
    stamps, rows = [], {}
    for file in files:
        stamp, found = _load_file(file)
        stamps.append(stamp)
        seen = set()
        for row in found:
            key = (row["name"], tuple(sorted((name, str(value)) for name, value in row["params"].items())))
            refuse_unless(key not in seen, f"{file}: row", _title(key), "must be there once")
            seen.add(key)
            if not row.get("error"):
                samples = row.get("samples_ms") or []
                refuse_unless(
                    len(samples) >= MIN_SAMPLES,
                    f"{file}: samples of {_title(key)}",
                    len(samples),
                    f"must be at least {MIN_SAMPLES} raw samples: a summary cannot tell noise from change",
                )
            rows.setdefault(key, []).append(row)
    for file, stamp in zip(files, stamps, strict=True):
        apart = differences(stamps[0], stamp)
        refuse_unless(not apart, f"{file}: stamp", "; ".join(apart), f"must match {files[0]}")
    refuse_unless(bool(rows), str(path), "no rows", "must hold some")
    return stamps[0], rows


def _load_file(file: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    content = read_json(file)
    if not (isinstance(content, dict) and "benchmarks" in content):
        content = read(file)
        return content["stamp"], content["rows"]
    # pytest-benchmark: seconds per call, and a machine_info to which a conftest may have added our stamp
    machine = content["machine_info"]
    stamp = machine.get("stamp") or {"device": machine["cpu"].get("brand_raw"), "versions": {}}
    rows = [
        {
            "name": entry["name"],
            "params": entry.get("params") or {},
            "samples_ms": [1e3 * seconds for seconds in entry["stats"].get("data") or ()],
        }
        for entry in content["benchmarks"]
    ]
    return stamp, rows


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """The fields in which two stamps must match and do not, in words."""

    def value(stamp: dict[str, Any], field: str) -> Any:
        for part in field.split("."):
            stamp = (stamp or {}).get(part)
        return stamp

    pairs = ((field, value(old, field), value(new, field)) for field in MATCHING)
    return [f"{field}: {before} before, {after} now" for field, before, after in pairs if before != after]


def _title(key: Key) -> str:
    return f"{key[0]} ({say(dict(key[1]))})" if key[1] else key[0]


def _judge(old: list[dict[str, Any]], new: list[dict[str, Any]], threshold: float, confidence: float) -> list[str]:
    """Old, new, ratio, interval and verdict of one row, as cells."""
    errors = [next((run["error"] for run in runs if run.get("error")), None) for runs in (old, new)]
    if any(errors):
        before, after = errors
        if any(error and error.startswith("not run") for error in errors) or all(errors):
            verdict = "not compared"
        else:  # a row that had a time and now has none is worse than any slow-down
            verdict = "slower" if after else "faster"
        return [before or "ran", after or "ran", "", "", verdict]
    found = change([run["samples_ms"] for run in old], [run["samples_ms"] for run in new], confidence)
    interval = f"{found.low - 1:+.1%} ... {found.high - 1:+.1%}"
    numbers = [f"{found.old_ms:.4g} ms", f"{found.new_ms:.4g} ms", f"{found.ratio:.3f}", interval]
    return [*numbers, found.verdict(threshold)]


def is_step(name: str) -> bool:
    """Whether a row measures whole training steps and is held to the threshold for them."""
    return name == "step" or name.startswith(("step/", "step[", "test_step"))


HEAD = ("name", "params", "old", "new", "new / old", "interval", "verdict")


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare, print a Markdown table, and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description=__doc__.splitlines()[0])
    parser.add_argument("old", type=Path, metavar="OLD")
    parser.add_argument("new", type=Path, metavar="NEW")
    parser.add_argument("--kernel-threshold", type=float, default=0.03, help="share; default: %(default)s")
    parser.add_argument("--step-threshold", type=float, default=0.015, help="share; default: %(default)s")
    parser.add_argument("--confidence", type=float, default=0.99, help="of the intervals; default: %(default)s")
    parser.add_argument("--allow-different-stamp", action="store_true", help="compare all the same, and say so")
    options = parser.parse_args(arguments)
    try:
        for name in ("kernel_threshold", "step_threshold"):
            refuse_unless(getattr(options, name) > 0, name, getattr(options, name), "must be positive")
        refuse_unless(0 < options.confidence < 1, "confidence", options.confidence, "must be between 0 and 1")
        return _compare(options)
    except Refused as error:
        print(f"cannot be compared: {error}", file=sys.stderr)
        return 1


def _compare(options: argparse.Namespace) -> int:
    (old_stamp, old), (new_stamp, new) = load(options.old), load(options.new)
    apart = differences(old_stamp, new_stamp)
    refuse_unless(
        not apart or options.allow_different_stamp,
        "stamps",
        "; ".join(apart),
        "must match, or the ratio says nothing about the code (--allow-different-stamp compares all the same)",
    )
    gone = [_title(key) for key in old if key not in new]
    refuse_unless(not gone, f"{options.new}: rows missing", ", ".join(gone), f"must hold every row of {options.old}")
    lines, verdicts = [], []
    for key, runs in new.items():
        threshold = options.step_threshold if is_step(key[0]) else options.kernel_threshold
        blank = ["", "", "", "", "new"]
        cells = _judge(old[key], runs, threshold, options.confidence) if key in old else blank
        lines.append([key[0], say(dict(key[1])), *cells])
        verdicts.append(cells[-1])
    print(markdown(HEAD, lines))
    for difference in apart:
        print(f"different stamps, compared all the same: {difference}")
    slower = [_title(key) for key, verdict in zip(new, verdicts, strict=True) if verdict == "slower"]
    counts = ", ".join(f"{verdicts.count(verdict)} {verdict}" for verdict in dict.fromkeys(verdicts))
    print(f"slower: {'; '.join(slower)}" if slower else f"nothing got slower: {counts}")
    return 1 if slower else 0


if __name__ == "__main__":
    sys.exit(main())
