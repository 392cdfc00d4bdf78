"""Results of many programs as one folder of at most 7 files, small enough to commit:

report.json      the parts and how each ended
report.md        the same, and all tables
step.json        rows of whole steps          kernels.json   all other rows
profile.json     figures of a profiled step, beside its traces
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.harness import tables
from benchmarks.harness.parts import FAILED, OK, Outcome
from benchmarks.harness.rows import Row, markdown, read, write
from benchmarks.harness.stamp import circumstances
from sra_fast.files import write_json, write_text

MAX_TRACES = 2
MAX_BYTES = 16 * 2**20
PROFILE = "profile.json"


def gather(staging: Path, out: Path, outcomes: Sequence[Outcome], stamp: dict[str, Any]) -> None:
    """Write `out` anew from the parts' folders in `staging`. Called after every part, so that a killed report keeps
    what was measured."""
    out.mkdir(parents=True, exist_ok=True)
    rows = _rows(staging)
    steps = [row for row in rows if tables.kind(row) == "step"]
    others = [row for row in rows if tables.kind(row) != "step"]
    for name, some in (("step", steps), ("kernels", others)):
        if some:
            write(out, name, some, stamp)
    remarks = _copy_profile(staging, out)
    parts = [asdict(outcome) for outcome in outcomes]
    write_json(out / "report.json", {"format_version": 1, "stamp": stamp, "parts": parts, "remarks": remarks})
    write_text(out / "report.md", _text(outcomes, rows, stamp, remarks))


def _rows(staging: Path) -> list[Row]:
    """Of a row that two parts have measured the first with numbers counts: more important parts run first, and take
    turns with more rivals."""
    by_key: dict[tuple[str, str], Row] = {}
    for path in sorted(staging.glob("*/*.json")):
        if path.name == PROFILE:
            continue
        content = read(path)
        for row in content["rows"]:
            if cut := re.search(r"-depth(\d+)$", content["name"]):  # a model cut short is another model
                row["params"].setdefault("depth", int(cut[1]))
            key = row["name"], str(sorted(row["params"].items()))
            if key not in by_key or not by_key[key]["samples_ms"]:
                by_key[key] = row
    return list(by_key.values())


def _copy_profile(staging: Path, out: Path) -> list[str]:
    """Copy the newest profile and its smallest traces; returns remarks on those left out."""
    remarks = []
    for profile in sorted(staging.glob(f"*/{PROFILE}"))[-1:]:
        shutil.copy(profile, out)
        traces = sorted(profile.parent.glob("*.pt.trace.json.gz"), key=lambda path: path.stat().st_size)
        for number, trace in enumerate(traces):
            size = trace.stat().st_size
            if number < MAX_TRACES and size <= MAX_BYTES:
                shutil.copy(trace, out)
            else:
                remarks.append(f"left out: {trace.name}, {size / 2**20:.1f} MiB")
    return remarks


def _text(outcomes: Sequence[Outcome], rows: Sequence[Row], stamp: dict[str, Any], remarks: list[str]) -> str:
    """report.md."""
    parts = [[o.name, o.outcome, f"{o.seconds:.0f}", o.reason, f"`{o.command}`"] for o in outcomes]
    head = ("part", "outcome", "s", "why", "command")
    blocks = [f"# {circumstances(stamp)}", f"`{stamp['command']}`", "## Parts", markdown(head, parts)]
    for outcome in outcomes:
        if outcome.outcome == FAILED:
            stderr = "\n".join(outcome.stderr)
            blocks += [f"{outcome.name} failed: {outcome.reason}", f"```\n{stderr}\n```"]
    blocks += remarks
    for title, _, table in tables.sections(rows):
        blocks += [f"## {title}", table]
    if all(outcome.outcome == OK for outcome in outcomes):
        blocks.append("All parts ran.")
    return "\n\n".join(blocks) + "\n"
