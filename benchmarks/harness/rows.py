"""Measurements as rows: what a row holds, and files of rows with their stamp."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness.stamp import ROOT
from sra_fast.errors import Refused
from sra_fast.files import read_json, write_json

FORMAT_VERSION = 1
RESULTS = ROOT / "benchmarks" / "results"
FIELDS_OF_STAMP = ("device", "versions", "clocks", "commit", "command")

Row = dict[str, Any]


@dataclass(frozen=True)
class Samples:
    """All timings of one candidate, in the order they were taken."""

    ms: tuple[float, ...] = ()  # per call: device time on a GPU, wall time on a CPU
    host_samples_ms: tuple[float, ...] = ()  # per call until it returns to the host; on a CPU the same
    peak_memory_gib: float | None = None  # with everything else in the process: allocated on a GPU, resident on a CPU
    error: str | None = None  # why there are no samples

    def joined(self, other: Samples) -> Samples:
        """These timings followed by those of another measurement of the same candidate."""
        memory = [peak for peak in (self.peak_memory_gib, other.peak_memory_gib) if peak is not None]
        host = self.host_samples_ms + other.host_samples_ms
        return Samples(self.ms + other.ms, host, min(memory, default=None), self.error or other.error)

    @property
    def median_ms(self) -> float | None:
        """The median; None without samples."""
        return _percentile(self.ms, 50)


def _percentile(values: Sequence[float], percent: float) -> float | None:
    return float(np.percentile(values, percent)) if values else None


def row(
    name: str,
    params: dict[str, Any],
    samples: Samples,
    *,
    stamp: dict[str, Any],
    bytes: int | None = None,
    flops: int | None = None,
    roofs: dict[str, Any] | None = None,
) -> Row:
    """One measurement with its circumstances, in JSON values.

    Args:
        name, params: identify the row. Whole steps are named "step"; compare.py has a threshold of its own for them.
        stamp: from `stamp.stamp`.
        bytes: that one call must read and write, each input and output once.
        flops: of one call, 2 per multiply-add.
        roofs: from `roofs.roofs`. `roof_share` is the longer time of bytes and flops at the roofs, over the median.
    """
    median = samples.median_ms
    return {
        "name": name,
        "params": params,
        "samples_ms": list(samples.ms),
        "median_ms": median,
        "p20_ms": _percentile(samples.ms, 20),
        "p80_ms": _percentile(samples.ms, 80),
        "host_ms": _percentile(samples.host_samples_ms, 50),
        "bytes": bytes,
        "flops": flops,
        "roof_share": _roof_share(median, bytes, flops, roofs),
        "peak_memory_gib": samples.peak_memory_gib,
        **{field: stamp[field] for field in FIELDS_OF_STAMP},
        **({"error": samples.error} if samples.error else {}),
    }


def _roof_share(ms: float | None, bytes: int | None, flops: int | None, roofs: dict[str, Any] | None) -> float | None:
    if ms is None or roofs is None or not (bytes or flops):
        return None
    copy_ms = (bytes or 0) / roofs["copy_gb_per_s"] / 1e6
    matmul_ms = (flops or 0) / roofs["matmul_tflop_per_s"] / 1e9
    return max(copy_ms, matmul_ms) / ms


def folder(stamp: dict[str, Any], results: Path | None = None) -> Path:
    """`<results>/<device>-<date>-<commit>`, by default below benchmarks/results. Without `results`, $SRA_FAST_RESULTS
    overrides it: ab.py and gpu_report.py collect what other processes write."""
    if results is None and (override := os.environ.get("SRA_FAST_RESULTS")):
        return Path(override)
    device = "cpu" if stamp["kind"] == "cpu" else stamp["device"].lower().removeprefix("nvidia ")
    commit = (stamp["commit"] or "unknown")[:7]
    return (results or RESULTS) / f"{re.sub('[^a-z0-9]+', '-', device)}-{stamp['date'][:10]}-{commit}"


def write(directory: Path, name: str, rows: Sequence[Row], stamp: dict[str, Any]) -> Path:
    """Write `<directory>/<name>.json` atomically and return its path. Creates the directory."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{name}.json"
    write_json(path, {"format_version": FORMAT_VERSION, "name": name, "stamp": stamp, "rows": list(rows)})
    return path


def read(file: Path) -> dict[str, Any]:
    """`format_version`, `name`, `stamp` and `rows` of a file from `write`.

    Raises:
        Refused: if it is anything else.
    """
    content = read_json(file)
    if not (isinstance(content, dict) and {"format_version", "name", "stamp", "rows"} <= set(content)):
        raise Refused(str(file), "other content", "must be a file of results")
    version = content["format_version"]
    if version != FORMAT_VERSION:
        raise Refused(f"{file}: format_version", version, f"must be {FORMAT_VERSION}")
    return content


def digits(value: float | None) -> str:
    """Four significant digits; '' for None."""
    if value is None:
        return ""
    return f"{value:.4g}" if abs(value) < 1e4 else f"{value:.0f}"


def percent(share: float | None) -> str:
    """0.25 as 25.0%; '' for None."""
    return "" if share is None else f"{share:.1%}"


def spread(row: Row) -> str:
    """The 20th and 80th percentile."""
    return f"{digits(row['p20_ms'])} ... {digits(row['p80_ms'])}"


def markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table with aligned columns. Short lines are filled up with empty cells."""
    filled = [[*line, *[""] * (len(head) - len(line))] for line in lines]
    cells = [[text.replace("|", "\\|") for text in line] for line in (head, *filled)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(head))]
    padded = [[text.ljust(width) for text, width in zip(line, widths, strict=True)] for line in cells]
    padded.insert(1, ["-" * width for width in widths])
    return "\n".join(f"| {' | '.join(line)} |" for line in padded)
