"""The generated tables of README.md (short) and benchmarks/README.md (all): `python -m benchmarks.readme`.

For each device they show the newest file that has a model's steps, an op, an update or a source of data. `--check`
writes nothing and exits with 1 if a README differs from the results under version control; `--print` shows the tables
of all results of this machine.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness import tables
from benchmarks.harness.rows import Row, digits, markdown
from benchmarks.harness.stamp import ROOT
from sra_fast.config import SIZES
from sra_fast.files import read_json, replacing

Family = tuple[str | int, ...]  # of steps as in tables.py, ("op", op, size, batch), ("update", size) or ("data", name)
OTHER_QUESTIONS = re.compile("-depth|auto-check")  # a model cut short for a quick look; which batches fit
BEGIN, END = "<!-- performance: begin -->", "<!-- performance: end -->"
NOTE = "<!-- written by `python -m benchmarks.readme` from benchmarks/results/; changes here are lost -->"
SHORT_HEAD = ("device", "training step", "public, images/s", "ours, images/s", "x public")
NOT_MEASURED = "not yet measured (`make gpu-report`)"


@dataclass(frozen=True)
class Measured:
    """Rows of one family in the newest file that has them; `path` is relative to the repository."""

    rows: list[Row]
    stamp: dict[str, Any]
    path: str


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


def newest(files: Sequence[Path], root: Path) -> dict[str, dict[Family, Measured]]:
    """device -> family -> rows. All CPUs are one device."""
    devices: dict[str, dict[Family, Measured]] = {}
    for file in files:
        content = read_json(file)
        if not (isinstance(content, dict) and {"name", "rows", "stamp"} <= set(content)):
            continue
        if OTHER_QUESTIONS.search(content["name"]):
            continue
        stamp = content["stamp"]
        families = devices.setdefault("CPU" if stamp["kind"] == "cpu" else stamp["device"], {})
        for family, rows in _families([row for row in content["rows"] if not row["params"].get("depth")]).items():
            if family not in families or families[family].stamp["date"] < stamp["date"]:
                families[family] = Measured(rows, stamp, str(file.relative_to(root)))
    return {device: families for device, families in devices.items() if families}


def _families(rows: list[Row]) -> dict[Family, list[Row]]:
    groups: dict[Family, list[Row]] = {**tables.families(rows)}
    for row in rows:
        kind, params = tables.kind(row), row["params"]
        if kind == "op":
            groups.setdefault(("op", row["name"], params["size"], params["batch"]), []).append(row)
        elif kind == "update":
            groups.setdefault(("update", params["size"]), []).append(row)
        elif kind == "data":
            groups.setdefault(("data", row["name"]), []).append(row)
    return groups


def short_section(devices: dict[str, dict[Family, Measured]]) -> str:
    """The training step of each device's largest model."""
    lines = []
    for device in _sorted(devices):
        for family, measured in list(_steps(devices[device]).items())[:1]:
            public, ours = (tables.images_per_s(measured.rows, name) for name in ("public", "ours"))
            ratio = f"{ours / public:.2f}" if public and ours else ""
            lines.append([device, tables.title(family), digits(public), digits(ours), ratio])
    if not any(device != "CPU" for device in devices):
        lines.insert(0, ["NVIDIA GPU", NOT_MEASURED])
    rest = (
        "[benchmarks/README.md](benchmarks/README.md#results) has every row with its machine, command and raw samples."
    )
    return "\n\n".join([BEGIN, NOTE, markdown(SHORT_HEAD, lines), rest, END])


def long_section(devices: dict[str, dict[Family, Measured]]) -> str:
    """All tables."""
    blocks = [_device(device, devices[device]) for device in _sorted(devices)]
    if not any(device != "CPU" for device in devices):
        blocks.insert(0, f"**NVIDIA GPU**: {NOT_MEASURED}.")
    return "\n\n".join([BEGIN, NOTE, *blocks, END])


def _sorted(devices: dict[str, Any]) -> list[str]:
    return sorted(devices, key=lambda device: (device == "CPU", device))


def _device(name: str, families: dict[Family, Measured]) -> str:
    steps = _steps(families)
    blocks = [f"**{name}**"]
    if steps:
        first, largest = next(iter(steps.items()))
        blocks += [f"Training steps of {tables.title(first)}:", tables.step_table(largest.rows), _source(largest)]
        others = {family: measured for family, measured in steps.items() if family != first}
        if others:
            summary = tables.summary_table({family: measured.rows for family, measured in others.items()})
            blocks += ["Other sizes, images/s:", summary, *dict.fromkeys(map(_source, others.values()))]
    for title, kind, table in (
        ("Ops:", "op", tables.kernel_table),
        ("Updates:", "update", tables.update_table),
        ("Data:", "data", tables.data_table),
    ):
        some = [families[family] for family in families if family[0] == kind]
        if some:
            rows = [row for measured in some for row in measured.rows]
            blocks += [title, table(rows), *dict.fromkeys(map(_source, some))]
    return "\n\n".join(blocks)


def _steps(families: dict[Family, Measured]) -> dict[tables.Family, Measured]:
    """Families of steps: the largest model first, then few tokens before many, and small batches before large."""
    sizes = list(SIZES)
    steps = [family for family in families if family[0] in sizes]
    return {family: families[family] for family in sorted(steps, key=lambda f: (-sizes.index(f[0]), *f[1:]))}


def _source(measured: Measured) -> str:
    stamp = measured.stamp
    versions = [f"{name} {stamp['versions'][name]}" for name in ("torch", "triton", "cuda") if stamp["versions"][name]]
    machine = [stamp["device"], f"{stamp['threads']} threads"] if stamp["kind"] == "cpu" else [stamp["device"]]
    if stamp["power_limit_w"]:
        machine.append(f"{stamp['power_limit_w']:.0f} W, driver {stamp['driver']}")
    commit = (stamp["commit"] or "unknown")[:7] + (" with changes" if stamp["dirty"] else "")
    command = re.sub(r"^\S*/", "", stamp["command"])  # python without its path
    circumstances = ", ".join([*machine, *versions, f"commit {commit}", stamp["date"][:10]])
    return f"<sub>{circumstances}; `{command}`; raw samples in `{measured.path}`</sub>"


def replaced(text: str, section: str) -> str:
    """A README with this section between its markers.

    Raises:
        ValueError: if the markers do not occur once each.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"README.md: must hold {BEGIN} and {END} once each")
    before, _, rest = text.partition(BEGIN)
    return before + section + rest.partition(END)[2]


def main(arguments: Sequence[str] | None = None, root: Path = ROOT) -> int:
    """The program. Returns its exit code: 1 if --check finds a stale README."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.readme", description=__doc__.splitlines()[0])
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
        if updated == text:
            continue
        if args.check:
            print(f"{name} is stale: `git add` new results, then run `python -m benchmarks.readme`", file=sys.stderr)
            stale = True
        else:
            with replacing(path) as partial:
                partial.write_text(updated)
    return int(stale)


if __name__ == "__main__":
    sys.exit(main())
