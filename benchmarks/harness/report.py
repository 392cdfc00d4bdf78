"""Results of many programs as one folder of at most 7 files, none above 16 MiB, small enough to commit:

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
from sra_fast.errors import Refused
from sra_fast.files import replacing, write_json

MAX_TRACES = 2
MAX_BYTES = 16 * 2**20
PROFILE = "profile.json"


def gather(staging: Path, out: Path, outcomes: Sequence[Outcome], stamp: dict[str, Any]) -> None:
    """Write `out` anew from the parts' folders in `staging`. Called after every part, so that a killed report keeps
    what was measured."""
    out.mkdir(parents=True, exist_ok=True)
    rows, remarks = _rows(staging)
    steps = [row for row in rows if tables.kind(row) == "step"]
    others = [row for row in rows if tables.kind(row) != "step"]
    for name, some in (("step", steps), ("kernels", others)):
        if some:
            write(out, name, some, stamp)
    remarks += _copy_profile(staging, out)
    for path in sorted(out.iterdir()):
        if path.stat().st_size > MAX_BYTES:
            remarks.append(_left_out(path))
            path.unlink()
    parts = [asdict(outcome) for outcome in outcomes]
    write_json(out / "report.json", {"format_version": 1, "stamp": stamp, "parts": parts, "remarks": remarks})
    with replacing(out / "report.md") as partial:
        partial.write_text(_text(outcomes, steps, others, stamp, remarks))


def _rows(staging: Path) -> tuple[list[Row], list[str]]:
    """(all rows, remarks). Of a row that two parts have measured the first with numbers counts: more important parts
    run first, and take turns with more rivals."""
    by_key: dict[tuple[str, str], Row] = {}
    remarks = []
    for path in sorted(staging.glob("*/*.json")):
        if path.name == PROFILE:
            continue
        try:
            content = read(path)
        except Refused as error:
            remarks.append(str(error))
            continue
        for row in content["rows"]:
            if cut := re.search(r"-depth(\d+)$", content["name"]):  # a model cut short is another model
                row["params"].setdefault("depth", int(cut[1]))
            key = row["name"], str(sorted(row["params"].items()))
            if key not in by_key or not by_key[key]["samples_ms"]:
                by_key[key] = row
    return list(by_key.values()), remarks


def _copy_profile(staging: Path, out: Path) -> list[str]:
    """Copy the newest profile and its smallest traces; returns remarks on those left out."""
    folders = sorted({path.parent for path in staging.glob(f"*/{PROFILE}")})
    if not folders:
        return []
    shutil.copy(folders[-1] / PROFILE, out / PROFILE)
    traces = sorted(folders[-1].glob("*.pt.trace.json.gz"), key=lambda path: path.stat().st_size)
    for trace in traces[:MAX_TRACES]:
        shutil.copy(trace, out / trace.name)
    return [_left_out(trace) for trace in traces[MAX_TRACES:]]


def _left_out(path: Path) -> str:
    return f"left out: {path.name}, {path.stat().st_size / 2**20:.1f} MiB"


def _text(
    outcomes: Sequence[Outcome], steps: Sequence[Row], others: Sequence[Row], stamp: dict[str, Any], remarks: list[str]
) -> str:
    """report.md."""
    versions = ", ".join(f"{name} {version}" for name, version in stamp["versions"].items() if version)
    changed = " with changes" if stamp["dirty"] else ""
    commands = [[o.name, o.outcome, f"{o.seconds:.0f}", o.reason, f"`{o.command}`"] for o in outcomes]
    blocks = [
        f"# {stamp['device']}, {stamp['date'][:10]}",
        f"Commit {stamp['commit'] or 'unknown'}{changed}; {versions}; driver {stamp['driver'] or '-'}; power limit "
        f"{stamp['power_limit_w'] or '-'} W; {stamp['threads']} threads.",
        f"`{stamp['command']}`",
        "## Parts",
        markdown(("part", "outcome", "s", "why", "command"), commands),
    ]
    for outcome in outcomes:
        if outcome.outcome == FAILED:
            stderr = "\n".join(("```", *outcome.stderr, "```"))
            blocks += [f"{outcome.name} failed: {outcome.reason}", stderr]
    blocks += remarks
    for title, table in tables.sections([*steps, *others]).items():
        blocks += [f"## {title}", table]
    if all(outcome.outcome == OK for outcome in outcomes):
        blocks.append("All parts ran.")
    return "\n\n".join(filter(None, blocks)) + "\n"
