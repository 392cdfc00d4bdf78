"""Measurements kept: one row per candidate, files of rows with their stamp, and the table a person reads."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sra_fast.config import refuse_unless
from sra_fast.files import read_json, write_json

if TYPE_CHECKING:
    from benchmarks.harness.timing import Samples

FORMAT_VERSION = 1
RESULTS = Path(__file__).parents[1] / "results"

Row = dict[str, Any]


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
        name: what was measured. Rows of whole training steps are named "step" or "step/..."; compare.py holds those to
            its threshold for steps, and everything else to the one for kernels.
        params: shape, dtype and switches; with the name they tell this row from all others.
        samples: the timings.
        stamp: from `stamp.stamp`.
        bytes: that a call must read and write, each input and output once.
        flops: of a call, 2 per multiply-add.
        roofs: from `timing.roofs`. `roof_share` is the time that bytes or flops would take at them, whichever is
            longer, over the measured median.
    """
    return {
        "name": name,
        "params": params,
        "samples_ms": list(samples.ms),
        "median_ms": samples.median_ms,
        "p20_ms": samples.p20_ms,
        "p80_ms": samples.p80_ms,
        "host_ms": samples.host_ms,
        "bytes": bytes,
        "flops": flops,
        "roof_share": _roof_share(samples.median_ms, bytes, flops, roofs),
        "peak_memory_gib": samples.peak_memory_gib,
        **{field: stamp[field] for field in ("device", "versions", "clocks", "commit", "command")},
        **({"error": samples.error} if samples.error else {}),
    }


def _roof_share(ms: float | None, bytes: int | None, flops: int | None, roofs: dict[str, Any] | None) -> float | None:
    if ms is None or roofs is None or not (bytes or flops):
        return None
    copy_ms = (bytes or 0) / roofs["copy_gb_per_s"] / 1e6
    matmul_ms = (flops or 0) / roofs["matmul_tflop_per_s"] / 1e9
    return max(copy_ms, matmul_ms) / ms


def folder(stamp: dict[str, Any], results: Path | None = None) -> Path:
    """Where results of this stamp belong: `<results>/<device>-<date>-<commit>`, with benchmarks/results for None. Then
    $SRA_FAST_RESULTS, if set, is the very folder: ab.py and gpu_report.py gather what other processes write."""
    if results is None and (gathered := os.environ.get("SRA_FAST_RESULTS")):
        return Path(gathered)
    results = results or RESULTS
    device = "cpu" if stamp["kind"] == "cpu" else stamp["device"].lower().removeprefix("nvidia ")
    commit = (stamp["commit"] or "unknown")[:7]
    return results / f"{re.sub('[^a-z0-9]+', '-', device)}-{stamp['date'][:10]}-{commit}"


def write(results_dir: Path, name: str, rows: Sequence[Row], stamp: dict[str, Any]) -> Path:
    """Write `<results_dir>/<name>.json` whole or not at all, and return its path. The folder is made."""
    results_dir.mkdir(parents=True, exist_ok=True)
    path = results_dir / f"{name}.json"
    write_json(path, {"format_version": FORMAT_VERSION, "name": name, "stamp": stamp, "rows": list(rows)})
    return path


def read(file: Path) -> dict[str, Any]:
    """`format_version`, `name`, `stamp` and `rows` of a file from `write`.

    Raises:
        Refused: if it is anything else.
    """
    content = read_json(file)
    fields = {"format_version", "name", "stamp", "rows"}
    refuse_unless(
        isinstance(content, dict) and fields <= set(content), str(file), "other content", "must be a file of results"
    )
    found = content["format_version"]
    refuse_unless(found == FORMAT_VERSION, f"{file}: format_version", found, f"must be {FORMAT_VERSION}")
    return content


COLUMNS = ("name", "params", "median ms", "p20 ... p80", "host ms", "GB/s", "TFLOP/s", "of roof", "GiB")


def table(rows: Sequence[Row]) -> str:
    """Rows as a Markdown table. A row without numbers says why."""
    return markdown(COLUMNS, [_cells(row) for row in rows])


def _cells(row: Row) -> list[str]:
    start = [row["name"], say(row["params"])]
    if row.get("error"):
        return [*start, row["error"], *[""] * (len(COLUMNS) - 3)]
    ms, share = row["median_ms"], row["roof_share"]
    return [
        *start,
        digits(ms),
        f"{digits(row['p20_ms'])} ... {digits(row['p80_ms'])}",
        digits(row["host_ms"]),
        digits(row["bytes"] and row["bytes"] / ms / 1e6),
        digits(row["flops"] and row["flops"] / ms / 1e9),
        "" if share is None else f"{share:.1%}",
        digits(row["peak_memory_gib"]),
    ]


def say(params: dict[str, Any]) -> str:
    """Parameters in one cell: a=1, b=x."""
    return ", ".join(f"{name}={value}" for name, value in params.items())


def digits(value: float | None) -> str:
    """Four significant digits, and an empty cell for None."""
    if value is None:
        return ""
    return f"{value:.4g}" if abs(value) < 1e4 else f"{value:.0f}"


def markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table with its columns aligned, so that it also reads well in a terminal."""
    cells = [[text.replace("|", "\\|") for text in line] for line in (head, *lines)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(head))]
    padded = [[text.ljust(width) for text, width in zip(line, widths, strict=True)] for line in cells]
    padded.insert(1, ["-" * width for width in widths])
    return "\n".join(f"| {' | '.join(line)} |" for line in padded)
