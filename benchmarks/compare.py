"""Which rows got slower: `python -m benchmarks.compare OLD NEW`, each a file of results or a folder of them.

A row is "slower" if three things hold for its slow-down, new median over old median:

    it matters      it exceeds the threshold (3 % for kernels, 1.5 % for steps)
    it is real      its confidence interval lies above zero
    it is measured  the interval is narrow enough: its half-width is at most twice the threshold, or its lower end is
                    still above the half-width

The threshold alone would call noise a slow-down, and the interval alone would fail a build over 0.1 %. Demanding that
the interval's lower end exceed the threshold would let most slow-downs of 3 % to 5 % pass. The third condition keeps a
machine that was busy during half of one run from failing a build: such rows are "too noisy" and should be measured
again.

The interval comes from resampling blocks of consecutive samples, because neighbours in time are alike (clocks,
temperature, other work on the machine) and resampling single samples would make it too narrow (Kuensch, "The Jackknife
and the Bootstrap for General Stationary Observations", 1989; circular, Politis and Romano, 1992).

No interval accounts for a drift as long as the run itself. On a machine whose noise lasts for 20 samples, 200 samples
raised no false alarm in 300 comparisons of equals, and 20 samples up to 24: measure for several times as long as the
noise lasts, and measure old and new in turns.

Exit code 0: nothing got slower. 1: something did, or the files cannot be compared; the last line says which.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from benchmarks.harness import options
from benchmarks.harness.rows import markdown, read
from sra_fast.errors import Refused
from sra_fast.files import read_json

Rows = dict[str, list[dict[str, Any]]]  # title -> one row per run in which it was measured

RESAMPLES = 1000
MIN_SAMPLES = 8  # with 7, even smallest and largest enclose the median with less than 99 % confidence: 1 - 2^-6
MATCHING = ("device", "driver", "power_limit_w", "threads", "versions.torch", "versions.triton")
HEAD = ("name", "params", "old", "new", "new / old", "interval", "verdict")


class Change(NamedTuple):
    """Old and new median in ms, and their ratio with its confidence interval."""

    old_ms: float
    new_ms: float
    ratio: float
    low: float
    high: float

    def verdict(self, threshold: float) -> str:
        """slower, faster, same or too noisy; threshold 0.03 = 3 %."""
        change, half_width, limit = math.log(self.ratio), math.log(self.high / self.low) / 2, math.log1p(threshold)
        if half_width > 2 * limit and abs(change) <= 2 * half_width:
            return "too noisy"
        if abs(change) <= max(limit, half_width):
            return "same"
        return "slower" if change > 0 else "faster"


def change(old: Sequence[Sequence[float]], new: Sequence[Sequence[float]], confidence: float = 0.99) -> Change:
    """The ratio of the medians with its two-sided interval. Each of `old` and `new` holds a run's samples in ms, in the
    order they were taken; the median is over all runs."""
    generator = np.random.default_rng(0)  # the same files give the same verdict
    old_runs, new_runs = ([np.asarray(run) for run in runs] for runs in (old, new))
    (old_logs, old_blocks), (new_logs, new_blocks) = (_log_medians(runs, generator) for runs in (old_runs, new_runs))
    # The bootstrap's spread with Student's quantile rather than its own tails: with a handful of blocks the tails are
    # too thin, and the spread comes out small by (k - 1) / k as any variance about the sample's own mean does.
    variance = old_logs.var() * old_blocks / (old_blocks - 1) + new_logs.var() * new_blocks / (new_blocks - 1)
    half_width = student_quantile((1 + confidence) / 2, old_blocks + new_blocks - 2) * math.sqrt(variance)
    old_ms, new_ms = (float(np.median(np.concatenate(runs))) for runs in (old_runs, new_runs))
    ratio = new_ms / old_ms
    return Change(old_ms, new_ms, ratio, ratio * math.exp(-half_width), ratio * math.exp(half_width))


def _log_medians(runs: list[NDArray[np.float64]], generator: np.random.Generator) -> tuple[NDArray[np.float64], int]:
    """(log of the median of each resample, number of blocks in one). Blocks stay within their run, wrapping around at
    its end, and hold n^(2/3) samples: with sqrt(n), noise that lasts for 20 samples raised false alarms. At least three
    blocks are needed for a spread."""
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
    """Quantile of Student's t from the normal one, within 1 % for 4 or more degrees of freedom at 99 % (Abramowitz and
    Stegun, 26.7.5). numpy has none, and nothing else here needs scipy."""
    z, v = NormalDist().inv_cdf(probability), freedom
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / v + second / v**2 + third / v**3


def load(path: Path) -> tuple[dict[str, Any], Rows]:
    """(stamp, rows) of a file, or of all files of a folder. A row in several files was measured in several runs. Reads
    our own format and pytest-benchmark's with `--benchmark-save-data`.

    Raises:
        Refused: if there are no rows, samples are missing, or the files' stamps differ.
    """
    files = [path]
    if path.is_dir():  # which may also hold traces and summaries
        files = [file for file in sorted(path.glob("*.json")) if {"rows", "benchmarks"} & set(read_json(file))]
    stamps: list[dict[str, Any]] = []
    rows: Rows = {}
    for file in files:
        stamp, file_rows = _load_file(file)
        stamps.append(stamp)
        if different := differences(stamps[0], stamp):
            raise Refused(f"{file}: stamp", "; ".join(different), f"must match {files[0]}")
        titles = [_title(row) for row in file_rows]
        for title, row in zip(titles, file_rows, strict=True):
            if titles.count(title) > 1:
                raise Refused(f"{file}: row", title, "must occur once")
            count = len(row.get("samples_ms") or ())
            if count < MIN_SAMPLES and not row.get("error"):
                rule = f"must be at least {MIN_SAMPLES} raw samples: a summary cannot tell noise from change"
                raise Refused(f"{file}: samples of {title}", count, rule)
            rows.setdefault(title, []).append(row)
    if not rows:
        raise Refused(str(path), "no rows", "must be results, or a folder of them")
    return stamps[0], rows


def _title(row: dict[str, Any]) -> str:
    """Identifies the row: name (a=1, b=x)."""
    return f"{row['name']} ({_params(row)})" if row["params"] else row["name"]


def _params(row: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in sorted(row["params"].items()))


def _load_file(file: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    content = read_json(file)
    if not (isinstance(content, dict) and "benchmarks" in content):
        content = read(file)
        return content["stamp"], content["rows"]
    # pytest-benchmark: seconds per call; benchmarks/conftest.py adds our stamp to machine_info
    machine = content["machine_info"]
    stamp = machine.get("stamp") or {"device": machine["cpu"].get("brand_raw"), "versions": {}}
    rows = []
    for entry in content["benchmarks"]:
        samples = [1e3 * seconds for seconds in entry["stats"].get("data") or ()]
        rows.append({"name": entry["name"], "params": entry.get("params") or {}, "samples_ms": samples})
    return stamp, rows


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """The fields in which two stamps must match and do not, as text."""

    def value(stamp: Any, field: str) -> Any:
        for part in field.split("."):
            stamp = (stamp or {}).get(part)
        return stamp

    pairs = ((field, value(old, field), value(new, field)) for field in MATCHING)
    return [f"{field}: {before} before, {after} now" for field, before, after in pairs if before != after]


def _judge(old: list[dict[str, Any]], new: list[dict[str, Any]], threshold: float, confidence: float) -> list[str]:
    """Cells of one row: old, new, ratio, interval and verdict."""
    before, after = (next((run["error"] for run in runs if run.get("error")), "ran") for runs in (old, new))
    if {before, after} != {"ran"}:
        verdict = "not compared"
        if "ran" in (before, after) and not any(error.startswith("not run") for error in (before, after)):
            verdict = "slower" if before == "ran" else "faster"  # losing its time is worse than any slow-down
        return [before, after, "", "", verdict]
    result = change([run["samples_ms"] for run in old], [run["samples_ms"] for run in new], confidence)
    interval = f"{result.low - 1:+.1%} ... {result.high - 1:+.1%}"
    numbers = [f"{result.old_ms:.4g} ms", f"{result.new_ms:.4g} ms", f"{result.ratio:.3f}", interval]
    return [*numbers, result.verdict(threshold)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare, print a Markdown table, and return the exit code."""
    parser = options.parser("compare", __doc__)
    parser.add_argument("old", type=Path, metavar="OLD")
    parser.add_argument("new", type=Path, metavar="NEW")
    parser.add_argument("--kernel-threshold", type=float, default=0.03, help="share; default: %(default)s")
    parser.add_argument("--step-threshold", type=float, default=0.015, help="share; default: %(default)s")
    parser.add_argument("--confidence", type=float, default=0.99, help="of the intervals; default: %(default)s")
    parser.add_argument("--allow-different-stamp", action="store_true", help="compare all the same, and say so")
    args = parser.parse_args(arguments)
    try:
        for name in ("kernel_threshold", "step_threshold"):
            if getattr(args, name) <= 0:
                raise Refused(name, getattr(args, name), "must be positive")
        if not 0 < args.confidence < 1:
            raise Refused("confidence", args.confidence, "must be between 0 and 1")
        return _compare(args)
    except Refused as error:
        print(f"cannot be compared: {error}", file=sys.stderr)
        return 1


def _compare(args: argparse.Namespace) -> int:
    (old_stamp, old), (new_stamp, new) = load(args.old), load(args.new)
    different = differences(old_stamp, new_stamp)
    if different and not args.allow_different_stamp:
        rule = "must match, or the ratio says nothing about the code (--allow-different-stamp compares all the same)"
        raise Refused("stamps", "; ".join(different), rule)
    if missing := [title for title in old if title not in new]:
        raise Refused(f"{args.new}: rows missing", ", ".join(missing), f"must hold every row of {args.old}")
    lines, verdicts = [], []
    for title, runs in new.items():
        name = runs[0]["name"]
        threshold = args.step_threshold if name == "step" else args.kernel_threshold
        cells = _judge(old[title], runs, threshold, args.confidence) if title in old else ["", "", "", "", "new"]
        lines.append([name, _params(runs[0]), *cells])
        verdicts.append(cells[-1])
    print(markdown(HEAD, lines))
    for difference in different:
        print(f"different stamps, compared all the same: {difference}")
    slower = [title for title, verdict in zip(new, verdicts, strict=True) if verdict == "slower"]
    counts = ", ".join(f"{verdicts.count(verdict)} {verdict}" for verdict in dict.fromkeys(verdicts))
    print(f"slower: {'; '.join(slower)}" if slower else f"nothing got slower: {counts}")
    return 1 if slower else 0


if __name__ == "__main__":
    sys.exit(main())
