"""Everything that needs a GPU, the most important first, in one call and within one time budget.

    make gpu-report                                     on a machine with a GPU
    python -m benchmarks.gpu_report --budget-s 480
    python -m benchmarks.gpu_report --parts smoke ops   only these parts
    python -m benchmarks.gpu_report --into FOLDER       add to the report of an earlier call
    python -m benchmarks.gpu_report --dry-run           what the budget is expected to reach; nothing runs
    python -m benchmarks.gpu_report --device cpu        the same programs at small sizes

Every part is a process of its own: if one fails, the report names it with the end of its stderr, and the others go on.
Parts that are not expected to fit into the time that is left read "not run (time)", and shorter ones after them run;
those that need something this machine lacks read "not run". Exit code 1 if a part failed; 0 also if parts were not
reached.

After every part results are collected in a folder <device>-<date>-<commit> below benchmarks/results, or below $OUT or
--out. It has at most 7 files, small enough to commit:

    report.json      the parts and how each ended
    report.md        the same, and all tables
    step.json        rows of whole steps          kernels.json   all other rows
    profile.json     figures of a profiled step, beside its traces

A second call for the same folder, by date and commit or by --into, adds to it: a row that it measures replaces the
earlier one, a part that ran keeps its outcome until it runs again.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.harness import options, tables
from benchmarks.harness.parts import FAILED, NOT_RUN, OK, ROOT, Outcome, Part, run_parts, simulated
from benchmarks.harness.rows import RESULTS, Row, circumstances, command, folder, markdown, read, write
from benchmarks.report_plan import learned, parts_for_cpu, parts_for_gpu
from sra_fast.errors import Refused
from sra_fast.files import read_json, write_json, write_text

MAX_TRACES = 2
MAX_BYTES = 16 * 2**20
PROFILE = "profile.json"
SHARED = ("kind", "device", "commit", "versions")  # of the stamps of all calls that add to one report


class Earlier(NamedTuple):
    """What earlier calls have left in a folder."""

    stamps: list[dict[str, Any]]
    outcomes: list[Outcome]
    rows: list[Row]


NOTHING = Earlier([], [], [])


def read_earlier(out: Path, stamp: dict[str, Any]) -> Earlier:
    """The report in a folder, to which a call with this stamp adds; empty if there is none.

    Raises:
        Refused: if it is of another device, commit or versions: its rows could not be compared.
    """
    if not (out / "report.json").exists():
        return NOTHING
    report = read_json(out / "report.json")
    for field in SHARED:
        if report["stamp"][field] != stamp[field]:
            raise Refused(f"{out}: {field}", stamp[field], f"must be that of its report, {report['stamp'][field]}")
    outcomes = [Outcome(**{**part, "stderr": tuple(part["stderr"])}) for part in report["parts"]]
    files = (out / f"{name}.json" for name in ("step", "kernels"))
    rows = [row for file in files if file.exists() for row in read(file)["rows"]]
    return Earlier(report["calls"], outcomes, rows)


def gather(
    staging: Path, out: Path, outcomes: Sequence[Outcome], stamp: dict[str, Any], earlier: Earlier = NOTHING
) -> None:
    """Write `out` anew from the parts' folders in `staging` and what earlier calls left. Called after every part, so
    that a killed report keeps what was measured."""
    out.mkdir(parents=True, exist_ok=True)
    rows = _merged_rows(earlier.rows, _rows(staging))
    outcomes = _merged_outcomes(earlier.outcomes, outcomes)
    steps = [row for row in rows if tables.kind(row) == "step"]
    others = [row for row in rows if tables.kind(row) != "step"]
    for name, some in (("step", steps), ("kernels", others)):
        if some:
            write(out, name, some, stamp)
    remarks = _copy_profile(staging, out)
    parts = [asdict(outcome) for outcome in outcomes]
    calls = [*earlier.stamps, stamp]
    content = {"format_version": 1, "stamp": stamp, "calls": calls, "parts": parts, "remarks": remarks}
    write_json(out / "report.json", content)
    write_text(out / "report.md", _text(outcomes, rows, calls, remarks))


def _merged_rows(earlier: Sequence[Row], later: Sequence[Row]) -> list[Row]:
    """The later of two rows of the same name and parameters, unless only the earlier one has numbers."""
    by_key = {_key(row): row for row in earlier}
    for row in later:
        if row["samples_ms"] or not by_key.get(_key(row), row)["samples_ms"]:
            by_key[_key(row)] = row
    return list(by_key.values())


def _merged_outcomes(earlier: Sequence[Outcome], later: Sequence[Outcome]) -> list[Outcome]:
    """The later of two outcomes of a part, unless it says that there was no time for what the earlier call ran."""
    by_name = {outcome.name: outcome for outcome in earlier}
    for outcome in later:
        if outcome.outcome != NOT_RUN or by_name.get(outcome.name, outcome).outcome == NOT_RUN:
            by_name[outcome.name] = outcome
    return list(by_name.values())


def _key(row: Row) -> tuple[str, str]:
    return row["name"], str(sorted(row["params"].items()))


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
            if _key(row) not in by_key or not by_key[_key(row)]["samples_ms"]:
                by_key[_key(row)] = row
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


def _text(outcomes: Sequence[Outcome], rows: Sequence[Row], calls: list[dict[str, Any]], remarks: list[str]) -> str:
    """report.md.

    Args:
        calls: the stamps of all calls that have added to the report.
    """
    parts = [[o.name, o.outcome, f"{o.seconds:.0f}", o.reason, f"`{o.command}`"] for o in outcomes]
    head = ("part", "outcome", "s", "why", "command")
    commands = [f"`{stamp['command']}`, {stamp['date']}" for stamp in calls]
    blocks = [f"# {circumstances(calls[-1])}", *commands, "## Parts", markdown(head, parts)]
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


def stamp_of(device: str) -> dict[str, Any]:
    """The device's stamp, taken in another process: this one must not occupy GPU memory. Raises CalledProcessError if
    there is no such device."""
    code = f"import json; from benchmarks.harness.rows import stamp; print(json.dumps(stamp({device!r})))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return {**json.loads(result.stdout.splitlines()[-1]), "command": command()}


def report(parts: Sequence[Part], budget_s: float, device: str, results: Path, into: Path | None = None) -> int:
    """Run the parts, collect their results and print how each ended. Returns the exit code.

    Args:
        results: folder in which the report has a folder of its own.
        into: that folder, if it exists already.
    """
    stamp = stamp_of(device)
    out = into or folder(stamp, results)
    earlier = read_earlier(out, stamp)
    parts = learned(parts, (RESULTS, results), stamp["device"])
    with tempfile.TemporaryDirectory(prefix="sra-fast-report-") as temporary:
        staging = Path(temporary)

        def gather_so_far(outcomes: list[Outcome]) -> None:
            try:
                gather(staging, out, outcomes, stamp, earlier)
            except Exception:  # whatever it is, the remaining parts are worth more; the last `gather` may raise
                traceback.print_exc()

        outcomes = run_parts(parts, budget_s, staging, gather_so_far)
        gather(staging, out, outcomes, stamp, earlier)
    print()
    for outcome in outcomes:
        print(f"{outcome.name:>32}  {outcome}")
    failed = [outcome.name for outcome in outcomes if outcome.outcome == FAILED]
    missed = sum(outcome.outcome == NOT_RUN for outcome in outcomes)
    print(f"report in {out}" + (f"; {missed} of {len(outcomes)} parts not run (time)" if missed else ""))
    if failed:
        print(f"failed: {', '.join(failed)}")
    return 1 if failed else 0


def plan_table(parts: Sequence[Part], budget_s: float) -> str:
    """What the budget is expected to reach: each part with its expected seconds and when it ends."""
    lines = [
        [outcome.name, f"{part.expected_s:.0f}", f"{end:.0f}" if outcome.outcome == OK else outcome.outcome]
        for part, (outcome, end) in zip(parts, simulated(parts, budget_s), strict=True)
    ]
    return markdown(("part", "expected, s", f"of {budget_s:.0f} s, ends at"), lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = options.parser("gpu_report", __doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--budget-s", type=float, default=480, help="seconds for all parts; default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT") or RESULTS), help="default: %(default)s")
    parser.add_argument("--parts", nargs="+", metavar="NAME", help="only these, by name")
    parser.add_argument("--into", type=Path, metavar="FOLDER", help="add to the report in this folder")
    parser.add_argument("--dry-run", action="store_true", help="print what the budget is expected to reach")
    args = parser.parse_args(arguments)
    if args.into and not (args.into / "report.json").is_file():
        parser.error(f"--into: '{args.into}' given; must be a folder with a report.json")
    parts = parts_for_gpu() if args.device == "cuda" else parts_for_cpu()
    names = [part.name for part in parts]
    if unknown := set(args.parts or ()) - set(names):
        parser.error(f"--parts: {', '.join(sorted(unknown))} given; must be among {'; '.join(names)}")
    chosen = [part for part in parts if not args.parts or part.name in args.parts]
    if args.dry_run:
        print(plan_table(learned(chosen, (RESULTS, args.out)), args.budget_s))
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the running part is killed too
    try:
        return report(chosen, args.budget_s, args.device, args.out, args.into)
    except Refused as error:
        print(error, file=sys.stderr)
        return 2
    except subprocess.CalledProcessError as error:
        *_, reason = ["no reason given", *(error.stderr or "").splitlines()]
        print(f"no {args.device} device is usable here ({reason}); try --device cpu", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
