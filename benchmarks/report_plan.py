"""What gpu_report.py runs, the most important first, and how long each part is expected to take.

The expected seconds below are estimates for an H200. Those of the last report on such a device replace them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.harness.parts import OK, ROOT, Part
from sra_fast.errors import Damaged
from sra_fast.files import read_json

SMOKE = ("--size", "s", "--depth", "3", "--batch", "32", "--repeats", "3")
SANITIZERS = ("memcheck", "racecheck", "initcheck")
# The strongest rival takes longest to compile, and is a part of its own, beside ours.
ENDS = ("ours", "ours, fused ops", "public")
STRONGEST = ("ours", "+ CUDA graph")
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
    name, expected = ("kernels", 100) if kernels else ("correctness", 120)
    return Part(name, "pytest", arguments, expected, share, must_end=True)


def sanitizer(tool: str) -> Part:
    """The kernels under a tool of compute-sanitizer."""
    return Part(tool, "benchmarks.sanitized", (tool,), 60, 0.3, max_seconds=90)


def steps(size: str, tokens: int, batch: int | str, rungs: Sequence[str] = ENDS, *more: str, label: str = "") -> Part:
    """Whole steps of one model at one batch: a kill costs no other."""
    arguments = ("--size", size, "--tokens", str(tokens), "--batch", str(batch), "--rungs", *rungs, *more)
    name = f"SiT-{size.upper()}/2, {tokens} tokens, batch {batch}" + (f": {label}" if label else "")
    return Part(name, "benchmarks.bench_step", arguments, 75)


def parts_for_gpu() -> list[Part]:
    """The most important first. Each may use its share of the remaining time, or more if it is expected to need it."""
    profile = ("profile", "sit-xl-2", "--train.batch", "32", "--profile.out", "{folder}")
    xl, label = ("xl", 256), "strongest rival"
    return [
        # Does anything run at all? One rung: with nothing cached, compiling two took most of 60 s on an H200.
        Part("smoke", "benchmarks.bench_step", (*SMOKE, "--rungs", ENDS[1]), 35, 0.4, max_seconds=90),
        steps(*xl, 32),
        replace(steps(*xl, 32, STRONGEST, label=label), expected_s=100),
        steps(*xl, 128),
        steps(*xl, 256),
        correctness(0.5),
        correctness(0.5, kernels=True),
        Part("ops", "benchmarks.bench_kernels", ("--sizes", "xl", "--batch", "32"), 60, 0.4),
        Part("update", "benchmarks.bench_optimizer", ("--size", "xl"), 30, 0.4),
        Part("profile", "sra_fast.cli", profile, 60, 0.6, max_seconds=120),
        Part("data", "benchmarks.bench_data", ("--repeats", "3", "--passes", "1"), 60, 0.4, max_seconds=90),
        Part("roofs", "benchmarks.bench_roofs", (), 20, 0.3),
        *(sanitizer(tool) for tool in SANITIZERS),
        steps(*xl, 256, STRONGEST, label=label),
        *(steps(*xl, batch, ("ours", *BETWEEN), label="between") for batch in (32, 256)),
        *(steps(*xl, batch, VARIANTS, label="variants") for batch in (32, 256)),
        *(steps(size, 256, batch, (*ENDS, STRONGEST[1])) for size in ("s", "b", "l") for batch in (32, 256)),
        steps("xl", 1024, 32, (*ENDS, STRONGEST[1])),
        steps(*xl, "auto-check", ("ours", "public")),
        Part("ops of SiT-S", "benchmarks.bench_kernels", ("--sizes", "s", "--batch", "32"), 40),
        *(steps(size, 256, batch, (*ENDS, STRONGEST[1])) for size in ("s", "b", "l") for batch in (64, 128)),
        *(steps(*xl, batch, STRONGEST, label=label) for batch in (64, 128)),
        *(steps(size, 1024, 32, (*ENDS, STRONGEST[1])) for size in ("l", "b", "s")),
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


def learned(parts: Sequence[Part], folders: Sequence[Path], device: str = "") -> list[Part]:
    """The parts, with the seconds that they took in the last report on this GPU, or on another one.

    Args:
        folders: whose folders may have reports.
        device: name of the GPU.
    """
    seconds: dict[str, float] = {}
    reports = [report for folder in folders for report in _reports(folder)]
    for report in sorted(reports, key=lambda report: (report["stamp"]["device"] == device, report["stamp"]["date"])):
        seconds |= {part["name"]: part["seconds"] for part in report["parts"] if part["outcome"] == OK}
    return [replace(part, expected_s=round(seconds.get(part.name, part.expected_s), 1)) for part in parts]


def _reports(results: Path) -> Iterator[dict[str, Any]]:
    for path in results.glob("*/report.json"):
        try:
            report = read_json(path)
        except Damaged:
            continue
        if report["stamp"]["kind"] == "cuda":
            yield report
