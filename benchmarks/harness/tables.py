"""Rows as tables: steps, ops with their implementations side by side, updates, data, roofs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks.harness.rows import Row, digits, markdown, percent, spread
from sra_fast.config import SIZES

STEP_HEAD = ("step", "images/s", "x public", "ms", "p20 ... p80", "TFLOP/s", "of roof", "of peak", "GiB")
KERNEL_HEAD = ("op", "size", "batch", "dtype", "pass", "µs", "fastest", "GB/s", "of roof")
UPDATE_HEAD = ("update", "size", "ms", "p20 ... p80", "x defaults", "GB/s", "of roof", "GiB")
ROOF_HEAD = ("roof", "ms", "p20 ... p80", "GB/s", "TFLOP/s")
DATA_HEAD = ("data", "by", "images/s", "x rival", "images/CPU-s", "x rival", "ms a batch", "p20 ... p80")


class Section(NamedTuple):
    """Rows that share a table."""

    title: str
    rows: list[Row]
    table: str


def kind(row: Row) -> str:
    """The program that measured it: "step", "op", "update", "data" or "roof"."""
    if "loader" in row["params"]:
        return "data"
    if "implementation" in row["params"]:
        return "op"
    return "update" if row["name"] == "optimizer" else row["name"]


def title(row: Row) -> str:
    """That of its section. A model with a batch has its own, such as "SiT-XL/2, 256 tokens, batch 32"."""
    if kind(row) != "step":
        return TABLES[kind(row)][0]
    params = row["params"]
    depth = f" of {params['depth']} blocks" if params.get("depth") else ""
    return f"SiT-{params['size'].upper()}/2{depth}, {params['tokens']} tokens, batch {params['batch']}"


def sections(rows: Sequence[Row]) -> list[Section]:
    """All rows: steps of the largest model first, then ops, updates, data and roofs."""
    groups: dict[str, list[Row]] = {}
    for row in sorted(rows, key=_place):
        groups.setdefault(title(row), []).append(row)
    return [Section(title, some, TABLES[kind(some[0])][1](some)) for title, some in groups.items()]


def _place(row: Row) -> tuple[int, ...]:
    params = row["params"]
    if kind(row) != "step":
        return (list(TABLES).index(kind(row)),)
    return 0, -list(SIZES).index(params["size"]), params["tokens"], params["batch"], params.get("depth", 0)


def show(rows: Sequence[Row]) -> str:
    """All tables with their titles, for a terminal."""
    return "\n\n".join(f"{section.title}\n\n{section.table}" for section in sections(rows))


def finish(rows: Sequence[Row], path: Path) -> int:
    """Print the tables, where the samples are, and what failed its gate. Returns a program's exit code."""
    print(show(rows))
    print(f"raw samples in {path}")
    wrong = [row["error"] for row in rows if row.get("error", "").startswith("disagrees")]
    for error in wrong:
        print(f"no number: {error}")
    return 1 if wrong else 0


def images_per_s(rows: Sequence[Row], step: str) -> float | None:
    """Of the step of that name; None without a number."""
    return next((row.get("images_per_s") for row in rows if row["params"]["rung"] == step), None)


def step_table(rows: Sequence[Row]) -> str:
    """Steps of one model against the public recipe, and what self-alignment adds to a step."""
    public = images_per_s(rows, "public")
    lines = []
    for row in rows:
        ms, name, images = row["median_ms"], row["params"]["rung"], row.get("images_per_s")
        if not ms:
            lines.append([name, row.get("error", "")])
            continue
        ratio = f"{images / public:.2f}" if images and public else ""
        shares = [percent(row["roof_share"]), percent(row.get("peak_share"))]
        memory = digits(row["peak_memory_gib"])
        lines.append([name, digits(images), ratio, digits(ms), spread(row), rate(row, "flops"), *shares, memory])
    aligned, plain = images_per_s(rows, "ours"), images_per_s(rows, "ours, plain SiT")
    cost = f"\n\nA step with SRA takes {plain / aligned:.2f} x the time of plain SiT." if aligned and plain else ""
    return markdown(STEP_HEAD, lines) + cost


def rate(row: Row, amount: str) -> str:
    """Its bytes in GB/s, or its flops in TFLOP/s."""
    return digits(row[amount] and row[amount] / row["median_ms"] / {"bytes": 1e6, "flops": 1e9}[amount])


def kernel_table(rows: Sequence[Row]) -> str:
    """Ops: the medians of all implementations in one line, and what the fastest reaches."""
    grouped: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        shape = [str(row["params"].get(name, "")) for name in ("size", "batch", "dtype", "pass")]
        grouped.setdefault((row["name"], *shape), []).append(row)
    lines = []
    for key, group in grouped.items():
        line = [*key, ", ".join(f"{row['params']['implementation']} {_microseconds(row)}" for row in group)]
        timed = [row for row in group if row["median_ms"]]
        if timed:
            best = min(timed, key=lambda row: row["median_ms"])
            line += [best["params"]["implementation"], rate(best, "bytes"), percent(best["roof_share"])]
        lines.append(line)
    return markdown(KERNEL_HEAD, lines)


def _microseconds(row: Row) -> str:
    if row["median_ms"]:
        return digits(1e3 * row["median_ms"])
    return "disagrees" if row.get("error", "").startswith("disagrees") else "-"


def update_table(rows: Sequence[Row]) -> str:
    """Ways to do the work that follows the backward pass."""
    defaults = {row["params"]["size"]: row["median_ms"] for row in rows if row["params"]["way"] == "torch, defaults"}
    lines = []
    for row in rows:
        ms, size, way = row["median_ms"], row["params"]["size"], row["params"]["way"]
        if not ms:
            lines.append([way, size, row.get("error", "")])
            continue
        share = percent(row["roof_share"])
        if not share:  # the roof itself, which may be of fewer parameters
            way += f" ({row['params']['parameters'] / 1e6:.0f} M parameters)"
        ratio = f"{defaults[size] / ms:.2f}" if defaults.get(size) and share else ""
        memory = digits(row["peak_memory_gib"])
        lines.append([way, size, digits(ms), spread(row), ratio, rate(row, "bytes"), share, memory])
    return markdown(UPDATE_HEAD, lines)


def data_table(rows: Sequence[Row]) -> str:
    """Images delivered per second of wall and CPU time, each compared with the rival that is best by that clock."""
    clocks = ("images_per_s", "images_per_cpu_s")
    rivals = [row for row in rows if not row["ours"]]
    lines = []
    for row in rows:
        files = row["params"].get("files")
        made_up = "made-up " if row["params"].get("made_up") else ""
        line = [row["name"] + (f", {files} {made_up}JPEGs" if files else ""), row["params"]["loader"]]
        for clock in clocks:
            best = max((rival[clock] for rival in rivals if rival["name"] == row["name"]), default=None)
            line += [digits(row[clock]), f"{row[clock] / best:.2f}" if best else ""]
        lines.append([*line, digits(row["median_ms"]), spread(row)])
    return markdown(DATA_HEAD, lines)


def roof_table(rows: Sequence[Row]) -> str:
    """Copies and matrix products."""
    lines = [
        [row["params"]["of"], digits(row["median_ms"]), spread(row), rate(row, "bytes"), rate(row, "flops")]
        for row in rows
    ]
    return markdown(ROOF_HEAD, lines)


TABLES: dict[str, tuple[str, Callable[[Sequence[Row]], str]]] = {  # by kind: title, and how to show the rows
    "step": ("", step_table),
    "op": ("Ops", kernel_table),
    "update": ("Updates", update_table),
    "data": ("Data", data_table),
    "roof": ("Roofs", roof_table),
}
