"""The README's section on performance, made from the newest results: `python -m benchmarks.readme`.

Of each device, the newest file that holds a model's steps, an op, an update or a source of data. `--check` writes
nothing and exits with 1 if the README says something else than the results that are under version control; `--print`
shows the section of all results here.
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
from benchmarks.harness.rows import RESULTS, Row
from sra_fast.config import SIZES
from sra_fast.files import read_json, replacing

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
Family = tuple[str | int, ...]  # of steps as in tables.py, ("op", op, size, batch), ("update", size) or ("data", name)
OTHER_QUESTIONS = re.compile("-depth|auto-check")  # a model cut short for a quick look; which batches fit
BEGIN, END = "<!-- performance: begin -->", "<!-- performance: end -->"
NOTE = "<!-- written by `python -m benchmarks.readme` from benchmarks/results/; changes here are lost -->"


@dataclass(frozen=True)
class Found:
    """Rows of one family in the newest file that has them."""

    rows: list[Row]
    stamp: dict[str, Any]
    path: str  # from the root


def result_files(results: Path, tracked_only: bool) -> list[Path]:
    """Files below benchmarks/results, those that git knows where it is asked for and there is one."""
    files = sorted(results.glob("*/*.json"))
    if tracked_only:
        listed = subprocess.run(["git", "ls-files", "-z", "--", "."], cwd=results, capture_output=True, text=True)
        if listed.returncode == 0:
            known = {results / name for name in listed.stdout.split("\0")}
            files = [file for file in files if file in known]
    return files


def newest(files: Sequence[Path], root: Path = ROOT) -> dict[str, dict[Family, Found]]:
    """device -> family -> rows. "CPU" is one device whatever its model."""
    found: dict[str, dict[Family, Found]] = {}
    for file in files:
        content = read_json(file)
        if not (isinstance(content, dict) and {"name", "rows", "stamp"} <= set(content)):
            continue
        if OTHER_QUESTIONS.search(content["name"]):
            continue
        stamp = content["stamp"]
        device = "CPU" if stamp["kind"] == "cpu" else stamp["device"]
        whole = [row for row in content["rows"] if not row["params"].get("depth")]
        groups: dict[Family, list[Row]] = {**tables.families(whole)}
        for row in whole:
            if tables.is_kernel(row):
                groups.setdefault(("op", row["name"], row["params"]["size"], row["params"]["batch"]), []).append(row)
            elif tables.is_update(row):
                groups.setdefault(("update", row["params"]["size"]), []).append(row)
            elif tables.is_data(row):
                groups.setdefault(("data", row["name"]), []).append(row)
        for family, rows in groups.items():
            held = found.setdefault(device, {}).get(family)
            if held is None or held.stamp["date"] < stamp["date"]:
                found[device][family] = Found(rows, stamp, str(file.relative_to(root)))
    return found


def section(found: dict[str, dict[Family, Found]]) -> str:
    """What stands between the markers, with them."""
    gpus = sorted(device for device in found if device != "CPU")
    blocks = [_device(gpu, found[gpu]) for gpu in gpus] or ["**NVIDIA GPU**: not yet measured (`make gpu-report`)."]
    if "CPU" in found:
        blocks.append(_device("CPU", found["CPU"]))
    return "\n\n".join([BEGIN, NOTE, *blocks, END])


def _device(name: str, families: dict[Family, Found]) -> str:
    steps = {family: families[family] for family in _by_weight(families)}
    blocks = [f"**{name}**"]
    if steps:
        first, largest = next(iter(steps.items()))
        blocks += [f"Training steps of {tables.title(first)}:", tables.step_table(largest.rows)]
        blocks += [*filter(None, [tables.alignment_cost(largest.rows)]), _source(largest)]
        others = {family: found for family, found in steps.items() if family != first}
        if others:
            blocks += ["Other sizes, images/s:", tables.summary_table({f: found.rows for f, found in others.items()})]
            blocks += dict.fromkeys(_source(found) for found in others.values())
    for title, kind, table in (
        ("Ops:", "op", tables.kernel_table),
        ("Updates:", "update", tables.update_table),
        ("Data:", "data", tables.data_table),
    ):
        found = [families[family] for family in families if family[0] == kind]
        if found:
            blocks += [title, table([row for some in found for row in some.rows])]
            blocks += dict.fromkeys(_source(some) for some in found)
    return "\n\n".join(blocks)


def _by_weight(families: dict[Family, Found]) -> list[tables.Family]:
    """Families of steps, the largest model first, then few tokens before many and the batch that is common."""
    sizes = list(SIZES)
    steps = [family for family in families if family[0] in sizes]
    return sorted(steps, key=lambda family: (-sizes.index(family[0]), *family[1:]))


def _source(found: Found) -> str:
    stamp = found.stamp
    versions = [f"{name} {stamp['versions'][name]}" for name in ("torch", "triton", "cuda") if stamp["versions"][name]]
    machine = [stamp["device"], f"{stamp['threads']} threads"] if stamp["kind"] == "cpu" else [stamp["device"]]
    if stamp["power_limit_w"]:
        machine.append(f"{stamp['power_limit_w']:.0f} W, driver {stamp['driver']}")
    commit = (stamp["commit"] or "unknown")[:7] + (" with changes" if stamp["dirty"] else "")
    command = re.sub(r"^\S*/", "", stamp["command"])  # python without its path
    circumstances = ", ".join([*machine, *versions, f"commit {commit}", stamp["date"][:10]])
    return f"<sub>{circumstances}; `{command}`; raw samples in `{found.path}`</sub>"


def replaced(readme: str, made: str) -> str:
    """The README with the section in place of what stands between the markers.

    Raises:
        ValueError: if the markers are not there, once each.
    """
    if readme.count(BEGIN) != 1 or readme.count(END) != 1:
        raise ValueError(f"README.md: must hold {BEGIN} and {END} once each")
    before, _, rest = readme.partition(BEGIN)
    return before + made + rest.partition(END)[2]


def main(arguments: Sequence[str] | None = None, readme: Path = README, results: Path = RESULTS) -> int:
    """The program. Returns its exit code: 1 if --check finds the README stale."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.readme", description=__doc__.splitlines()[0])
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--check", action="store_true", help="write nothing; exit 1 if the README is stale")
    what.add_argument("--print", action="store_true", help="show the section instead of writing it")
    options = parser.parse_args(arguments)
    made = section(newest(result_files(results, tracked_only=options.check), results.parents[1]))
    if options.print:
        print("\n".join(line for line in made.splitlines() if not line.startswith("<!--")))
        return 0
    text = readme.read_text()
    now = replaced(text, made)
    if options.check:
        if now != text:
            print(
                "README.md is stale: `git add` new results, then `python -m benchmarks.readme` writes its section",
                file=sys.stderr,
            )
        return int(now != text)
    if now != text:
        with replacing(readme) as partial:
            partial.write_text(now)
    return 0


if __name__ == "__main__":
    sys.exit(main())
