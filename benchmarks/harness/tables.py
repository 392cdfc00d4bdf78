"""Rows as the tables of reports and READMEs: steps, ops with their implementations side by side, updates, data."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.harness.rows import Row, digits, markdown, percent, spread

STEP_HEAD = ("step", "images/s", "x public", "ms", "p20 ... p80", "TFLOP/s", "of roof", "of peak", "GiB")
SUMMARY_HEAD = ("model", "tokens", "batch", "public", "best rival", "ours", "ours / public", "ours / best rival")
KERNEL_HEAD = ("op", "size", "batch", "dtype", "pass", "µs", "fastest", "GB/s", "of roof")
UPDATE_HEAD = ("update", "size", "ms", "p20 ... p80", "x defaults", "GB/s", "of roof", "GiB")
DATA_HEAD = ("data", "by", "images/s", "x rival", "images/CPU-s", "x rival", "ms a batch", "p20 ... p80")

Family = tuple[str, int, int, int]  # size, tokens, batch, and the depth if it is not the size's, else 0


def is_step(row: Row) -> bool:
    """Whether it is a row of bench_step."""
    return row["name"] == "step"


def is_update(row: Row) -> bool:
    """Whether it is a row of bench_optimizer."""
    return row["name"] == "optimizer"


def is_data(row: Row) -> bool:
    """Whether it is a row of bench_data."""
    return "loader" in row["params"]


def is_kernel(row: Row) -> bool:
    """Whether it is a row of bench_kernels."""
    return "implementation" in row["params"]


def families(rows: Sequence[Row]) -> dict[Family, list[Row]]:
    """Rows of bench_step by model and batch."""
    grouped: dict[Family, list[Row]] = {}
    for row in filter(is_step, rows):
        params = row["params"]
        family = (params["size"], params["tokens"], params["batch"], params.get("depth", 0))
        grouped.setdefault(family, []).append(row)
    return grouped


def model_name(family: Family) -> str:
    """SiT-XL/2, or "SiT-XL/2 of 3 blocks" if it is cut short."""
    return f"SiT-{family[0].upper()}/2" + (f" of {family[3]} blocks" if family[3] else "")


def title(family: Family) -> str:
    """SiT-XL/2, 256 tokens, batch 32."""
    return f"{model_name(family)}, {family[1]} tokens, batch {family[2]}"


def step_table(rows: Sequence[Row]) -> str:
    """One family's steps against the public recipe. "of roof" is the share of the matrix product measured in the same
    run, "of peak" of the data sheet's."""
    public = _images_per_s(rows, "public")
    lines = []
    for row in rows:
        ms, name = row["median_ms"], row["params"]["rung"]
        if not ms:
            lines.append([name, row.get("error", "")])
            continue
        speed = row["images_per_s"]
        lines.append(
            [
                name,
                digits(speed),
                f"{speed / public:.2f}" if public else "",
                digits(ms),
                spread(row),
                digits(row["flops"] and row["flops"] / ms / 1e9),
                percent(row["roof_share"]),
                percent(row.get("peak_share")),
                digits(row["peak_memory_gib"]),
            ]
        )
    return markdown(STEP_HEAD, lines)


def alignment_cost(rows: Sequence[Row]) -> str:
    """What self-alignment adds to a step, in a sentence; '' if one of the two rows is missing."""
    ms = {row["params"]["rung"]: row["median_ms"] for row in rows}
    aligned, plain = ms.get("ours"), ms.get("ours, plain SiT")
    return f"A step with SRA takes {aligned / plain:.2f} x the time of plain SiT." if aligned and plain else ""


def summary_table(by_family: dict[Family, Sequence[Row]]) -> str:
    """Images/s of several families: the public recipe, the fastest of its variants, and ours."""
    lines = []
    for family, rows in by_family.items():
        public, ours = _images_per_s(rows, "public"), _images_per_s(rows, "ours")
        rivals = [row.get("images_per_s") for row in rows if not row["params"]["rung"].startswith("ours")]
        best = max(filter(None, rivals), default=None)
        ratios = [f"{ours / other:.2f}" if ours and other else "" for other in (public, best)]
        model = [model_name(family), str(family[1]), str(family[2])]
        lines.append([*model, digits(public), digits(best), digits(ours), *ratios])
    return markdown(SUMMARY_HEAD, lines)


def kernel_table(rows: Sequence[Row]) -> str:
    """Ops: the medians of all implementations in one line, and what the fastest of the op itself reaches."""
    grouped: dict[tuple[str, ...], list[Row]] = {}
    for row in filter(is_kernel, rows):
        shape = [str(row["params"].get(name, "")) for name in ("size", "batch", "dtype", "pass")]
        grouped.setdefault((row["name"], *shape), []).append(row)
    lines = []
    for key, group in grouped.items():
        medians = [f"{row['params']['implementation']} {_microseconds(row)}" for row in group]
        timed = [row for row in group if row["median_ms"] and not row["params"].get("another_function")]
        line = [*key, ", ".join(medians)]
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
    rows = list(filter(is_update, rows))
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
    rows = list(filter(is_data, rows))
    clocks = ("images_per_s", "images_per_cpu_s")
    best: dict[tuple[str, str], float] = {}
    for row in rows:
        for clock in clocks:
            if not row["ours"]:
                best[row["name"], clock] = max(row[clock], best.get((row["name"], clock), 0.0))
    lines = []
    for row in rows:
        files = row["params"].get("files")
        made_up = "made-up " if row["params"].get("made_up") else ""
        line = [row["name"] + (f", {files} {made_up}JPEGs" if files else ""), row["params"]["loader"]]
        for clock in clocks:
            rival = best.get((row["name"], clock))
            line += [digits(row[clock]), f"{row[clock] / rival:.2f}" if rival else ""]
        lines.append([*line, digits(row["median_ms"]), spread(row)])
    return markdown(DATA_HEAD, lines)


def _images_per_s(rows: Sequence[Row], rung: str) -> float | None:
    return next((row.get("images_per_s") for row in rows if row["params"]["rung"] == rung), None)
