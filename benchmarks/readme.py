"""The generated tables of README.md (short) and benchmarks/README.md (all): `python -m benchmarks.readme`.

For each device they show the newest committed file that has a model's steps, an op, an update or a source of data.
`--check` writes nothing and exits with 1 if a README differs from the results under version control; `--print` shows
the tables of all results of this machine.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

from benchmarks.harness import options, tables
from benchmarks.harness.rows import ROOT, Row, circumstances, digits, markdown
from sra_fast.files import read_json, replacing

OTHER_QUESTIONS = re.compile("-depth|auto-check")  # a model cut short for a quick look; which batches fit
BEGIN, END = "<!-- performance: begin -->", "<!-- performance: end -->"
NOTE = "<!-- written by `python -m benchmarks.readme` from benchmarks/results/; changes here are lost -->"
SHORT_HEAD = ("device", "training step", "public, images/s", "ours, images/s", "x public", "ours fp32", "x public")
CPU = "CPU: "  # before a CPU's name
NOT_MEASURED = "not yet measured (`make gpu-report`)"
ALL = "[benchmarks/README.md](benchmarks/README.md#results) has every row with its machine, command and raw samples."


Devices = dict[str, dict[tuple, list[Row]]]  # device -> family -> its newest rows


def result_files(root: Path, tracked_only: bool) -> list[Path]:
    """Files below benchmarks/results; only those that git tracks if asked for, where there is a git repository."""
    results = root / "benchmarks" / "results"
    files = sorted(results.glob("*/*.json"))
    if tracked_only:
        listed = subprocess.run(["git", "ls-files", "-z", "--", "."], cwd=results, capture_output=True, text=True)
        if listed.returncode == 0:
            tracked = {results / name for name in listed.stdout.split("\0")}
            files = [file for file in files if file in tracked]
    return files


def newest(files: Sequence[Path], root: Path) -> Devices:
    """Rows with the file they are from as "source", CPUs last."""
    devices: Devices = {}
    contents = [(str(file.relative_to(root)), read_json(file)) for file in files]
    results = [(path, content) for path, content in contents if {"name", "rows", "stamp"} <= set(content)]
    for path, content in sorted(results, key=lambda result: result[1]["stamp"]["date"]):
        if OTHER_QUESTIONS.search(content["name"]):
            continue
        stamp = content["stamp"]
        command = re.sub(r"^\S*/", "", stamp["command"])  # python without its path
        source = f"<sub>{circumstances(stamp)}; `{command}`; raw samples in `{path}`</sub>"
        families: dict[tuple, list[Row]] = {}
        for row in content["rows"]:
            if not row["params"].get("depth") and tables.kind(row) != "roof":
                families.setdefault(_family(row), []).append(row | {"source": source})
        if families:
            name = f"{CPU}{stamp['device']}, {stamp['threads']} threads" if stamp["kind"] == "cpu" else stamp["device"]
            devices.setdefault(name, {}).update(families)
    return dict(sorted(devices.items(), key=lambda item: (item[0].startswith(CPU), item[0])))


def _has_gpu(devices: Devices) -> bool:
    return not all(device.startswith(CPU) for device in devices)


def _family(row: Row) -> tuple:
    """Rows that only make sense together: a model's steps, an op at a shape, a model's updates, a source of data."""
    params = row["params"]
    return tables.title(row), row["name"], params.get("size"), params.get("batch") if tables.kind(row) == "op" else None


def short_section(devices: Devices) -> str:
    """One step of each device: of its largest model, with few tokens and a small batch."""
    lines = [] if _has_gpu(devices) else [["NVIDIA GPU", NOT_MEASURED]]
    for device, families in devices.items():
        title, rows, _ = tables.sections([*chain(*families.values())])[0]  # the first is of steps, if there are any
        if tables.kind(rows[0]) == "step":
            public, *ours = (tables.images_per_s(rows, name) for name in ("public", "ours", "ours fp32"))
            ratios = [f"{rate / public:.2f}" if public and rate else "" for rate in ours]
            both = [digits(ours[0]), ratios[0], digits(ours[1]), ratios[1]]
            lines.append([device, title, digits(public), *both])
    return "\n\n".join([BEGIN, NOTE, markdown(SHORT_HEAD, lines), ALL, END])


def long_section(devices: Devices) -> str:
    """All tables of all devices, each with its sources."""
    blocks = [] if _has_gpu(devices) else [f"**NVIDIA GPU**: {NOT_MEASURED}."]
    for device, families in devices.items():
        blocks.append(f"**{device}**")
        for title, rows, table in tables.sections([*chain(*families.values())]):
            blocks += [f"{title}:", table, *dict.fromkeys(row["source"] for row in rows)]
    return "\n\n".join([BEGIN, NOTE, *blocks, END])


def replaced(text: str, section: str) -> str:
    """A README with this section between its markers. Raises ValueError if they do not occur once each."""
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"README.md: must hold {BEGIN} and {END} once each")
    before, _, rest = text.partition(BEGIN)
    return before + section + rest.partition(END)[2]


def main(arguments: Sequence[str] | None = None, root: Path = ROOT) -> int:
    """The program. Returns its exit code: 1 if --check finds a stale README."""
    parser = options.parser("readme", __doc__)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--check", action="store_true", help="write nothing; exit 1 if a README is stale")
    what.add_argument("--print", action="store_true", help="show all tables instead of writing them")
    args = parser.parse_args(arguments)
    devices = newest(result_files(root, tracked_only=args.check), root)
    if args.print:
        print("\n".join(line for line in long_section(devices).splitlines() if not line.startswith("<!--")))
        return 0
    stale = False
    for name, section in (("README.md", short_section(devices)), ("benchmarks/README.md", long_section(devices))):
        path = root / name
        text = path.read_text()
        updated = replaced(text, section)
        if updated != text and args.check:
            print(f"{name} is stale: `git add` new results, then run `python -m benchmarks.readme`", file=sys.stderr)
            stale = True
        elif updated != text:
            with replacing(path) as partial:
                partial.write_text(updated)
    return int(stale)


if __name__ == "__main__":
    sys.exit(main())
