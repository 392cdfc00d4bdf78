"""Rows as tables: steps, ops with their implementations side by side, updates, data, roofs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.harness.rows import Row, digits, markdown, percent, spread
from sra_fast.config import SIZES

STEP_HEAD = ("step", "images/s", "x public", "ms", "p20 ... p80", "TFLOP/s", "of roof", "of peak", "GiB")
KERNEL_HEAD = ("op", "size", "batch", "dtype", "pass", "µs", "fastest", "GB/s", "of roof")
UPDATE_HEAD = ("update", "size", "ms", "p20 ... p80", "x defaults", "GB/s", "of roof", "GiB")
ROOF_HEAD = ("roof", "ms", "p20 ... p80", "GB/s", "TFLOP/s")
DATA_HEAD = ("data", "by", "images/s", "x rival", "images/CPU-s", "x rival", "ms a batch", "p20 ... p80")

Family = tuple[Any, ...]  # (kind, what was measured): rows that belong into one table


def kind(row: Row) -> str:
    """The program that measured it: "step", "op", "update", "data" or "roof"."""
    if "loader" in row["params"]:
        return "data"
    if "implementation" in row["params"]:
        return "op"
    return "update" if row["name"] == "optimizer" else row["name"]


def family(row: Row) -> Family:
    """(kind, ...): model and batch of a step, name and shape of an op, size of an update, name of data."""
    params = row["params"]
    if kind(row) == "step":
        return "step", params["size"], params["tokens"], params["batch"], params.get("depth", 0)
    return kind(row), row["name"], params.get("size", ""), params.get("batch", 0) if kind(row) == "op" else 0


def model(step: Family) -> str:
    """SiT-XL/2, 256 tokens, batch 32."""
    _, size, tokens, batch, depth = step
    return f"SiT-{size.upper()}/2" + (f" of {depth} blocks" if depth else "") + f", {tokens} tokens, batch {batch}"


def sections(rows: Sequence[Row]) -> dict[str, str]:
    """title -> table of all rows: steps of the largest model first, then ops, updates, data and roofs."""
    sizes = list(SIZES)
    steps = {family(row) for row in rows if kind(row) == "step"}
    shown = {}
    for step in sorted(steps, key=lambda step: (-sizes.index(step[1]), *step[2:])):
        shown[model(step)] = step_table([row for row in rows if family(row) == step])
    for title, (wanted, make_table) in OTHERS.items():
        some = [row for row in rows if kind(row) == wanted]
        if some:
            shown[title] = make_table(some)
    return shown


def show(rows: Sequence[Row]) -> str:
    """All tables with their titles, for a terminal."""
    return "\n\n".join(f"{title}\n\n{table}" for title, table in sections(rows).items())


def images_per_s(rows: Sequence[Row], step: str) -> float | None:
    """Of the step of that name; None without a number."""
    return next((row.get("images_per_s") for row in rows if row["params"]["rung"] == step), None)


def step_table(rows: Sequence[Row]) -> str:
    """Steps of one family against the public recipe, and what self-alignment adds to a step."""
    public = images_per_s(rows, "public")
    lines = []
    for row in rows:
        ms, name = row["median_ms"], row["params"]["rung"]
        if not ms:
            lines.append([name, row.get("error", "")])
            continue
        lines.append(
            [
                name,
                digits(row["images_per_s"]),
                f"{row['images_per_s'] / public:.2f}" if public else "",
                digits(ms),
                spread(row),
                digits(row["flops"] and row["flops"] / ms / 1e9),
                percent(row["roof_share"]),
                percent(row.get("peak_share")),
                digits(row["peak_memory_gib"]),
            ]
        )
    ms = {row["params"]["rung"]: row["median_ms"] for row in rows}
    aligned, plain = ms.get("ours"), ms.get("ours, plain SiT")
    cost = f"\n\nA step with SRA takes {aligned / plain:.2f} x the time of plain SiT." if aligned and plain else ""
    return markdown(STEP_HEAD, lines) + cost


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
            rate = digits(best["bytes"] / best["median_ms"] / 1e6)
            line += [best["params"]["implementation"], rate, percent(best["roof_share"])]
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
        rate = digits(row["bytes"] / ms / 1e6)
        lines.append([way, size, digits(ms), spread(row), ratio, rate, share, digits(row["peak_memory_gib"])])
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
    lines = []
    for row in rows:
        ms = row["median_ms"]
        rates = [digits(row["bytes"] and row["bytes"] / ms / 1e6), digits(row["flops"] and row["flops"] / ms / 1e9)]
        lines.append([row["params"]["of"], digits(ms), spread(row), *rates])
    return markdown(ROOF_HEAD, lines)


OTHERS: dict[str, tuple[str, Callable[[Sequence[Row]], str]]] = {
    "Ops": ("op", kernel_table),
    "Updates": ("update", update_table),
    "Data": ("data", data_table),
    "Roofs": ("roof", roof_table),
}
