"""Everything that needs a GPU, the most important first, in one call and within one time budget.

    make gpu-report                                     on a machine with a GPU
    python -m benchmarks.gpu_report --budget-s 480
    python -m benchmarks.gpu_report --device cpu        the same programs at small sizes

Every part is a process of its own: if one fails, the report names it with the end of its stderr, and the others go on.
Parts for which no time is left read "not run (time)", those that need something this machine lacks "not run". Exit code
1 if a part failed; 0 also if parts were not reached.

After every part results are collected in a folder <device>-<date>-<commit> below benchmarks/results, or below $OUT or
--out. It has at most 7 files, small enough to commit:

    report.json      the parts and how each ended
    report.md        the same, and all tables
    step.json        rows of whole steps          kernels.json   all other rows
    profile.json     figures of a profiled step, beside its traces
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
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.harness import options, tables
from benchmarks.harness.parts import FAILED, NOT_RUN, OK, ROOT, Outcome, Part, run_parts
from benchmarks.harness.rows import RESULTS, Row, circumstances, command, folder, markdown, read, write
from sra_fast.files import write_json, write_text

SMOKE = ("--size", "s", "--depth", "3", "--batch", "32", "--repeats", "3")
MAX_TRACES = 2
MAX_BYTES = 16 * 2**20
PROFILE = "profile.json"
SANITIZERS = ("memcheck", "racecheck", "initcheck")
# bench_step writes after each pair: ours and the public recipe come before the strongest rival, which takes longest to
# compile, and before the variants between them.
ENDS = ("ours", "ours, fused ops", "public", "+ CUDA graph")
BETWEEN = ("bf16 teacher to its tap", "+ torch.compile", "+ fused AdamW, foreach EMA", "+ no host reads")
BETWEEN += ("+ cuDNN attention",)
VARIANTS = ("ours compiled", "ours eager", "ours fp32", "ours deterministic", "ours, plain SiT")


def correctness(share: float, kernels: bool = False) -> Part:
    """The tests that need a GPU, of kernels or of everything else, from the files that have some: other files may need
    packages that are not installed here. Most tests of kernels are marked by tests/interpreter.py."""
    texts = {f"tests/{path.name}": path.read_text() for path in sorted((ROOT / "tests").glob("test_*.py"))}
    marked = {file for file, text in texts.items() if "mark.gpu" in text or "@kernel" in text}
    of_kernels = {file for file in marked if "kernel" in file or "@kernel" in texts[file]}
    arguments = ("-v", "--durations=0", "-m", "gpu", *sorted(of_kernels if kernels else marked - of_kernels))
    if find_spec("xdist"):  # most of the time is compilation, on the host
        arguments = ("-n", "auto", "--maxprocesses", "8", *arguments)
    return Part("kernels" if kernels else "correctness", "pytest", arguments, share, must_end=True)


def sanitizer(tool: str) -> Part:
    """The kernels under a tool of compute-sanitizer."""
    return Part(tool, "benchmarks.sanitized", (tool,), 0.3, max_seconds=90)


def steps(size: str, tokens: int, batch: int | str, rungs: Sequence[str] = ENDS, *more: str, label: str = "") -> Part:
    """Whole steps of one model at one batch: a kill costs no other."""
    arguments = ("--size", size, "--tokens", str(tokens), "--batch", str(batch), "--rungs", *rungs, *more)
    name = f"SiT-{size.upper()}/2, {tokens} tokens, batch {batch}" + (f": {label}" if label else "")
    return Part(name, "benchmarks.bench_step", arguments, 0.5)


def parts_for_gpu() -> list[Part]:
    """The most important first. Each may use its share of the time that is then left."""
    profile = ("profile", "sit-xl-2", "--train.batch", "32", "--profile.out", "{folder}")
    return [
        # Seconds: does anything run at all?
        Part("smoke", "benchmarks.bench_step", (*SMOKE, "--rungs", *ENDS[:3]), 0.3, max_seconds=60),
        steps("xl", 256, 32),
        steps("xl", 256, 128, ENDS[:3]),
        correctness(0.5),
        correctness(0.5, kernels=True),
        Part("profile", "sra_fast.cli", profile, 0.6, max_seconds=90),
        Part("ops", "benchmarks.bench_kernels", ("--sizes", "xl", "--batch", "32"), 0.4),
        Part("update", "benchmarks.bench_optimizer", ("--size", "xl"), 0.4),
        Part("roofs", "benchmarks.bench_roofs", share=0.3),
        *(sanitizer(tool) for tool in SANITIZERS),
        Part("data", "benchmarks.bench_data", ("--repeats", "3", "--passes", "1"), 0.4, max_seconds=90),
        steps("xl", 256, 256),
        *(steps("xl", 256, batch, ("ours", *BETWEEN), label="between") for batch in (32, 256)),
        *(steps("xl", 256, batch, VARIANTS, label="variants") for batch in (32, 256)),
        *(steps(size, 256, batch) for size in ("s", "b", "l") for batch in (32, 256)),
        steps("xl", 1024, 32),
        steps("xl", 256, "auto-check", ("ours", "public")),
        Part("ops of SiT-S", "benchmarks.bench_kernels", ("--sizes", "s", "--batch", "32")),
        *(steps(size, 256, batch) for size in ("s", "b", "l") for batch in (64, 128)),
        *(steps("xl", 256, batch, ("+ CUDA graph",), label="strongest rival") for batch in (64, 128)),
        *(steps(size, 1024, 32) for size in ("l", "b", "s")),
    ]


def parts_for_cpu() -> list[Part]:
    """The same programs, at sizes that take seconds."""
    few = ("--device", "cpu", "--repeats", "8", "--warmup", "1")
    ways = ("--ways", "torch, defaults", "reference, eager")
    profile = ("profile", "sit-s-2", "--model.depth", "3", "--train.batch", "1", "--train.device", "cpu")
    traced = ("--train.execution", "eager", "--profile.steps", "1", "--profile.warmup", "1")
    return [
        correctness(0.5),
        correctness(0.5, kernels=True),
        sanitizer(SANITIZERS[0]),
        Part("roofs", "benchmarks.bench_roofs", few[:4]),
        Part("ops", "benchmarks.bench_kernels", ("--batch", "1", "--implementations", "eager", *few)),
        Part("update", "benchmarks.bench_optimizer", ("--depth", "3", *ways, *few)),
        steps("s", 256, 1, ("public", "ours eager"), "--depth", "3", *few),
        Part("profile", "sra_fast.cli", (*profile, *traced, "--profile.out", "{folder}")),
        Part("data", "benchmarks.bench_data", ("--device", "cpu", "--quick")),
    ]


def gather(staging: Path, out: Path, outcomes: Sequence[Outcome], stamp: dict[str, Any]) -> None:
    """Write `out` anew from the parts' folders in `staging`. Called after every part, so that a killed report keeps
    what was measured."""
    out.mkdir(parents=True, exist_ok=True)
    rows = _rows(staging)
    steps = [row for row in rows if tables.kind(row) == "step"]
    others = [row for row in rows if tables.kind(row) != "step"]
    for name, some in (("step", steps), ("kernels", others)):
        if some:
            write(out, name, some, stamp)
    remarks = _copy_profile(staging, out)
    parts = [asdict(outcome) for outcome in outcomes]
    write_json(out / "report.json", {"format_version": 1, "stamp": stamp, "parts": parts, "remarks": remarks})
    write_text(out / "report.md", _text(outcomes, rows, stamp, remarks))


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
            key = row["name"], str(sorted(row["params"].items()))
            if key not in by_key or not by_key[key]["samples_ms"]:
                by_key[key] = row
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


def _text(outcomes: Sequence[Outcome], rows: Sequence[Row], stamp: dict[str, Any], remarks: list[str]) -> str:
    """report.md."""
    parts = [[o.name, o.outcome, f"{o.seconds:.0f}", o.reason, f"`{o.command}`"] for o in outcomes]
    head = ("part", "outcome", "s", "why", "command")
    blocks = [f"# {circumstances(stamp)}", f"`{stamp['command']}`", "## Parts", markdown(head, parts)]
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


def report(parts: Sequence[Part], budget_s: float, device: str, results: Path) -> int:
    """Run the parts, collect their results and print how each ended. Returns the exit code."""
    stamp = stamp_of(device)
    out = folder(stamp, results)
    with tempfile.TemporaryDirectory(prefix="sra-fast-report-") as temporary:
        staging = Path(temporary)

        def gather_so_far(outcomes: list[Outcome]) -> None:
            try:
                gather(staging, out, outcomes, stamp)
            except Exception:  # whatever it is, the remaining parts are worth more; the last `gather` may raise
                traceback.print_exc()

        outcomes = run_parts(parts, budget_s, staging, gather_so_far)
        gather(staging, out, outcomes, stamp)
    print()
    for outcome in outcomes:
        print(f"{outcome.name:>32}  {outcome}")
    failed = [outcome.name for outcome in outcomes if outcome.outcome == FAILED]
    missed = sum(outcome.outcome == NOT_RUN for outcome in outcomes)
    print(f"report in {out}" + (f"; {missed} of {len(outcomes)} parts not run (time)" if missed else ""))
    if failed:
        print(f"failed: {', '.join(failed)}")
    return 1 if failed else 0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = options.parser("gpu_report", __doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--budget-s", type=float, default=480, help="seconds for all parts; default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT") or RESULTS), help="default: %(default)s")
    parser.add_argument("--parts", nargs="+", metavar="NAME", help="only these, by name")
    args = parser.parse_args(arguments)
    parts = parts_for_gpu() if args.device == "cuda" else parts_for_cpu()
    names = [part.name for part in parts]
    if unknown := set(args.parts or ()) - set(names):
        parser.error(f"--parts: {', '.join(sorted(unknown))} given; must be among {'; '.join(names)}")
    chosen = [part for part in parts if not args.parts or part.name in args.parts]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the running part is killed too
    try:
        return report(chosen, args.budget_s, args.device, args.out)
    except subprocess.CalledProcessError as error:
        *_, reason = ["no reason given", *(error.stderr or "").splitlines()]
        print(f"no {args.device} device is usable here ({reason}); try --device cpu", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
