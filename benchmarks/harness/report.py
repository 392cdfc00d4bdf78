"""Results of many programs as one folder: at most 8 files, none above 16 MiB, so that it travels and can be committed.

report.json      the parts, with what became of each
report.md        the same, and all tables
step.json        rows of whole steps          kernels.json   all other rows
steps.png        images/s                     profile.json   figures of a profiled step, and its traces
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import tables
from benchmarks.harness.parts import FAILED, OK, Outcome
from benchmarks.harness.rows import Row, markdown, read, table, write
from sra_fast.errors import Refused
from sra_fast.files import replacing, write_json

MOST_FILES = 8
LARGEST = 16 * 2**20  # bytes
PROFILE = "profile.json"


def gather(staging: Path, out: Path, outcomes: Sequence[Outcome], stamp: dict[str, Any]) -> None:
    """Write the folder anew from what the parts have left so far: a report that is itself killed keeps all of it.

    Args:
        staging: folders of the parts.
        out: the folder; other files in it are left alone.
        outcomes: of the parts that had their turn.
        stamp: of the whole.
    """
    out.mkdir(parents=True, exist_ok=True)
    rows, remarks = _rows(staging)
    kept = {"step": [row for row in rows if tables.is_step(row)]}
    kept["kernels"] = [row for row in rows if not tables.is_step(row)]
    for name, some in kept.items():
        if some:
            write(out, name, some, stamp)
    remarks += _copy_profile(staging, out)
    remarks += chart(kept["step"], out / "steps.png")
    for path in sorted(out.iterdir()):
        if path.stat().st_size > LARGEST:
            remarks.append(f"left out: {path.name}, {path.stat().st_size / 2**20:.0f} MiB")
            path.unlink()
    write_json(
        out / "report.json",
        {"format_version": 1, "stamp": stamp, "parts": [outcome.json() for outcome in outcomes], "remarks": remarks},
    )
    with replacing(out / "report.md") as partial:
        partial.write_text(_text(outcomes, kept["step"], kept["kernels"], stamp, remarks))


def _rows(staging: Path) -> tuple[list[Row], list[str]]:
    """(all rows, remarks). A row that two parts have measured is the first one's that has numbers: what matters more
    comes first, and takes its turns with more rivals."""
    found: dict[tuple[str, str], Row] = {}
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
            # A model cut short for a quick look is another model.
            if cut := re.search(r"-depth(\d+)$", content["name"]):
                row["params"].setdefault("depth", int(cut[1]))
            key = row["name"], str(sorted(row["params"].items()))
            if key not in found or not found[key]["samples_ms"]:
                found[key] = row
    return list(found.values()), remarks


def _copy_profile(staging: Path, out: Path) -> list[str]:
    """Copy the newest profile and as many of its traces as may be, and say what was left out."""
    remarks: list[str] = []
    folders = sorted({path.parent for path in staging.glob(f"*/{PROFILE}")})
    if not folders:
        return remarks
    shutil.copy(folders[-1] / PROFILE, out / PROFILE)
    places = MOST_FILES - len({"report.json", "report.md", "step.json", "kernels.json", "steps.png", PROFILE})
    for trace in sorted(folders[-1].glob("*.pt.trace.json.gz"), key=lambda path: path.stat().st_size):
        if places and trace.stat().st_size <= LARGEST:
            shutil.copy(trace, out / trace.name)
            places -= 1
        else:
            remarks.append(f"left out: {trace.name}, {trace.stat().st_size / 2**20:.1f} MiB")
    return remarks


def chart(rows: Sequence[Row], path: Path) -> list[str]:
    """Bars of images/s by rung, one panel per model and batch. Remarks instead where it cannot be drawn."""
    families = {
        family: [row for row in found if row.get("images_per_s")] for family, found in tables.families(rows).items()
    }
    families = {family: found for family, found in families.items() if found}
    if not families:
        return ["no chart: no step was measured"]
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return ["no chart: matplotlib is not installed (pip install matplotlib)"]
    heights = [0.3 * len(found) + 0.7 for found in families.values()]
    figure = Figure(figsize=(8, sum(heights) + 0.3), layout="constrained")
    panels = figure.subplots(len(families), 1, squeeze=False, height_ratios=heights)[:, 0]
    for panel, (family, found) in zip(panels, families.items(), strict=True):
        names = [row["params"]["rung"] for row in found]
        colours = ["tab:orange" if name.startswith("ours") else "tab:gray" for name in names]
        bars = panel.barh(range(len(found)), [row["images_per_s"] for row in found], color=colours)
        panel.bar_label(bars, fmt="%.4g", padding=3)
        panel.set_yticks(range(len(found)), names)
        panel.invert_yaxis()
        panel.margins(x=0.12)
        panel.set_title(tables.title(family), loc="left", fontsize=10)
    panels[-1].set_xlabel(f"images/s, {rows[0]['device']}")
    with replacing(path) as partial:
        figure.savefig(partial, format="png", dpi=110)
    return []


def _text(
    outcomes: Sequence[Outcome], steps: Sequence[Row], others: Sequence[Row], stamp: dict[str, Any], remarks: list[str]
) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in stamp["versions"].items() if version)
    changed = " with changes" if stamp["dirty"] else ""
    lines = [
        f"# {stamp['device']}, {stamp['date'][:10]}",
        "",
        f"Commit {stamp['commit'] or 'unknown'}{changed}; {versions}; driver {stamp['driver'] or '-'}; power limit "
        f"{stamp['power_limit_w'] or '-'} W; {stamp['threads']} threads.",
        "",
        f"`{stamp['command']}`",
        "",
        "## Parts",
        "",
        markdown(
            ("part", "outcome", "s", "why", "command"),
            [[o.name, o.outcome, f"{o.seconds:.0f}", o.reason, f"`{o.command}`"] for o in outcomes],
        ),
    ]
    for outcome in outcomes:
        if outcome.outcome == FAILED:
            lines += ["", f"{outcome.name} failed: {outcome.reason}", "", "```", *outcome.stderr, "```"]
    lines += [f"\n{remark}" for remark in remarks]
    for family, found in tables.families(steps).items():
        lines += ["", f"## {tables.title(family)}", "", tables.step_table(found), "", tables.alignment_cost(found)]
    for title, wanted, made in (
        ("Ops", tables.is_kernel, tables.kernel_table),
        ("Update", tables.is_update, tables.update_table),
        ("Data", tables.is_data, tables.data_table),
        ("Roofs", lambda row: row["name"] == "roof", table),
    ):
        found = [row for row in others if wanted(row)]
        if found:
            lines += ["", f"## {title}", "", made(found)]
    if all(outcome.outcome == OK for outcome in outcomes):
        lines += ["", "All parts ran."]
    return "\n".join(lines) + "\n"
