"""Rows as the tables of reports and READMEs: steps, ops with their implementations side by side, updates, data."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.harness.rows import Row, digits, markdown, percent, spread, text_of

STEP_HEAD = ("step", "images/s", "x public", "ms", "p20 ... p80", "TFLOP/s", "of roof", "of peak", "GiB")
SUMMARY_HEAD = ("model", "tokens", "batch", "public", "best rival", "ours", "ours / public", "ours / best rival")
KERNEL_HEAD = ("op", "size", "batch", "dtype", "pass", "µs", "fastest", "GB/s", "of roof")
UPDATE_HEAD = ("update", "size", "ms", "p20 ... p80", "x defaults", "GB/s", "of roof", "GiB")
ROOF_HEAD = ("roof", "ms", "p20 ... p80", "GB/s", "TFLOP/s")
DATA_HEAD = ("data", "by", "images/s", "x rival", "images/CPU-s", "x rival", "ms a batch", "p20 ... p80")

Family = tuple[str, int, int, int]  # size, tokens, batch, and the depth if it is not the size's, else 0


def kind(row: Row) -> str:
    """The program that measured it: "step", "update", "data", "op" or "roof"."""
    if "loader" in row["params"]:
        return "data"
    if "implementation" in row["params"]:
        return "op"
    return {"optimizer": "update"}.get(row["name"], row["name"])


def families(rows: Sequence[Row]) -> dict[Family, list[Row]]:
    """Rows of whole steps by model and batch."""
    grouped: dict[Family, list[Row]] = {}
    for row in rows:
        if kind(row) != "step":
            continue
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
    """One family's steps against the public recipe, and what self-alignment adds to a step."""
    public = images_per_s(rows, "public")
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
    ms = {row["params"]["rung"]: row["median_ms"] for row in rows}
    aligned, plain = ms.get("ours"), ms.get("ours, plain SiT")
    cost = f"\n\nA step with SRA takes {aligned / plain:.2f} x the time of plain SiT." if aligned and plain else ""
    return markdown(STEP_HEAD, lines) + cost


def summary_table(by_family: dict[Family, Sequence[Row]]) -> str:
    """Images/s of several families: the public recipe, the fastest of its variants, and ours."""
    lines = []
    for family, rows in by_family.items():
        public, ours = images_per_s(rows, "public"), images_per_s(rows, "ours")
        rivals = [row.get("images_per_s") for row in rows if not row["params"]["rung"].startswith("ours")]
        best = max(filter(None, rivals), default=None)
        ratios = [f"{ours / other:.2f}" if ours and other else "" for other in (public, best)]
        model = [model_name(family), str(family[1]), str(family[2])]
        lines.append([*model, digits(public), digits(best), digits(ours), *ratios])
    return markdown(SUMMARY_HEAD, lines)


def kernel_table(rows: Sequence[Row]) -> str:
    """Ops: the medians of all implementations in one line, and what the fastest of the op itself reaches."""
    grouped: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
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


def images_per_s(rows: Sequence[Row], rung: str) -> float | None:
    """Of the row of that name; None without a number."""
    return next((row.get("images_per_s") for row in rows if row["params"]["rung"] == rung), None)


def roof_table(rows: Sequence[Row]) -> str:
    """Copies and matrix products."""
    lines = []
    for row in rows:
        rates = [amount and amount / row["median_ms"] for amount in (row["bytes"], row["flops"])]
        speeds = [digits(rates[0] and rates[0] / 1e6), digits(rates[1] and rates[1] / 1e9)]
        lines.append([text_of(row["params"]), digits(row["median_ms"]), spread(row), *speeds])
    return markdown(ROOF_HEAD, lines)


def sections(rows: Sequence[Row]) -> dict[str, str]:
    """title -> table, for every kind of rows that there is."""
    found = {title(family): step_table(some) for family, some in families(rows).items()}
    others = {"Ops": ("op", kernel_table), "Update": ("update", update_table)}
    others |= {"Data": ("data", data_table), "Roofs": ("roof", roof_table)}
    for name, (wanted, make_table) in others.items():
        some = [row for row in rows if kind(row) == wanted]
        if some:
            found[name] = make_table(some)
    return found


def show(rows: Sequence[Row]) -> str:
    """All tables with their titles, for a terminal."""
    return "\n\n".join(f"{name}\n\n{table}" for name, table in sections(rows).items())
