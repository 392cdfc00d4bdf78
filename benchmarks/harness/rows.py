"""Measurements as rows, the circumstances without which they cannot be compared, and files of both."""

from __future__ import annotations

import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sra_fast.errors import Refused
from sra_fast.files import read_json, write_json
from sra_fast.tuning.timing import Samples

ROOT = Path(__file__).parents[2]
FORMAT_VERSION = 1
RESULTS = ROOT / "benchmarks" / "results"
FIELDS_OF_STAMP = ("device", "versions", "clocks", "commit", "command")

Row = dict[str, Any]

# nvmlClocksEventReasons (nvml.h), from the lowest bit. The first is no reason to doubt a number.
THROTTLE_REASONS = ("gpu_idle", "applications_clocks_setting", "sw_power_cap", "hw_slowdown", "sync_boost")
THROTTLE_REASONS += ("sw_thermal_slowdown", "hw_thermal_slowdown", "hw_power_brake_slowdown", "display_clock_setting")

QUERY = {  # our name -> nvidia-smi's
    "sm_mhz": "clocks.sm",
    "sm_max_mhz": "clocks.max.sm",
    "memory_mhz": "clocks.mem",
    "temperature_c": "temperature.gpu",
    "power_w": "power.draw",
    "power_limit_w": "power.limit",
    "throttle_reasons": "clocks_throttle_reasons.active",
    "driver": "driver_version",
}
CLOCKS = ("sm_mhz", "sm_max_mhz", "memory_mhz", "temperature_c", "power_w")


def _percentile(values: Sequence[float], percent: float) -> float | None:
    return float(np.percentile(values, percent)) if values else None


def row(
    name: str,
    params: dict[str, Any],
    samples: Samples,
    *,
    stamp: dict[str, Any],
    bytes: int | None = None,
    flops: int | None = None,
    roofs: dict[str, Any] | None = None,
) -> Row:
    """One measurement with its circumstances, in JSON values.

    Args:
        name, params: identify the row. Whole steps are named "step"; compare.py has a threshold of its own for them.
        stamp: from `stamp`.
        bytes: that one call must read and write, each input and output once.
        flops: of one call, 2 per multiply-add.
        roofs: from `roofs.roofs`. `roof_share` is the longer time of bytes and flops at the roofs, over the median.
    """
    median = samples.median_ms
    return {
        "name": name,
        "params": params,
        "samples_ms": list(samples.ms),
        "median_ms": median,
        "p20_ms": _percentile(samples.ms, 20),
        "p80_ms": _percentile(samples.ms, 80),
        "host_ms": _percentile(samples.host_samples_ms, 50),
        "bytes": bytes,
        "flops": flops,
        "roof_share": _roof_share(median, bytes, flops, roofs),
        "peak_memory_gib": samples.peak_memory_gib,
        **{field: stamp[field] for field in FIELDS_OF_STAMP},
        **({"error": samples.error} if samples.error else {}),
    }


def _roof_share(ms: float | None, bytes: int | None, flops: int | None, roofs: dict[str, Any] | None) -> float | None:
    if ms is None or roofs is None or not (bytes or flops):
        return None
    copy_ms = (bytes or 0) / roofs["copy_gb_per_s"] / 1e6
    matmul_ms = (flops or 0) / roofs["matmul_tflop_per_s"] / 1e9
    return max(copy_ms, matmul_ms) / ms


def stamp(device: torch.device | str | None = None) -> dict[str, Any]:
    """What a reader needs to judge a number of `device` (None = the GPU if there is one), or to measure it again; None
    for what is unknown. Clocks, power and throttle reasons are those of this moment: take it right after measuring."""
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    is_gpu = device.type == "cuda"
    gpu = _query_gpu(device) if is_gpu else dict.fromkeys(QUERY)
    commit, dirty = _commit()
    return {
        "kind": device.type,
        "device": torch.cuda.get_device_name(device) if is_gpu else _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "clocks": {name: gpu[name] for name in CLOCKS} if is_gpu else None,
        **{name: gpu[name] for name in ("power_limit_w", "throttle_reasons", "driver")},
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "triton": _installed("triton"),
            "cudnn": torch.backends.cudnn.version(),
            "cuda": torch.version.cuda,
        },
        "commit": commit,
        "dirty": dirty,
        "command": command(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def command() -> str:
    """How this process was started, with the interpreter's name instead of its path."""
    return shlex.join([Path(sys.orig_argv[0]).name, *sys.orig_argv[1:]])


def circumstances(stamp: dict[str, Any]) -> str:
    """A stamp in a line: machine, versions, commit, date."""
    machine = [stamp["device"], f"{stamp['threads']} threads"] if stamp["kind"] == "cpu" else [stamp["device"]]
    if stamp["power_limit_w"]:
        machine.append(f"{stamp['power_limit_w']:.0f} W, driver {stamp['driver']}")
    versions = [f"{name} {stamp['versions'][name]}" for name in ("torch", "triton", "cuda") if stamp["versions"][name]]
    commit = (stamp["commit"] or "unknown")[:7] + (" with changes" if stamp["dirty"] else "")
    return ", ".join([*machine, *versions, f"commit {commit}", stamp["date"][:10]])


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _output(*command: str) -> str | None:
    try:
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() if result.returncode == 0 else None


def _cpu_model() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, None) or platform.processor() or platform.machine()


def _commit() -> tuple[str | None, bool | None]:
    """(hash, whether tracked files differ from it). $SRA_FAST_COMMIT may end in "-dirty"."""
    if commit := os.environ.get("SRA_FAST_COMMIT"):
        return commit.removesuffix("-dirty"), commit.endswith("-dirty")
    changes = _output("git", "status", "--porcelain", "--untracked-files=no")
    return _output("git", "rev-parse", "HEAD"), None if changes is None else bool(changes)


def _query_gpu(device: torch.device) -> dict[str, Any]:
    uuid = torch.cuda.get_device_properties(device).uuid  # not the index: CUDA_VISIBLE_DEVICES may renumber
    query = f"--query-gpu={','.join(QUERY.values())}"
    return parse_query(_output("nvidia-smi", f"--id=GPU-{uuid}", query, "--format=csv,noheader,nounits"))


def parse_query(line: str | None) -> dict[str, Any]:
    """One comma-separated answer to `QUERY` as numbers and names; None for everything the driver does not report."""
    values = [value.strip() for value in line.split(",")] if line else []
    if len(values) != len(QUERY):
        return dict.fromkeys(QUERY)
    parsed: dict[str, Any] = {}
    for name, value in zip(QUERY, values, strict=True):
        if value.strip("[]").lower() in ("n/a", "not supported", "unknown error"):
            parsed[name] = None
        elif name == "throttle_reasons":
            parsed[name] = [reason for bit, reason in enumerate(THROTTLE_REASONS) if int(value, 16) >> bit & 1]
        else:
            parsed[name] = value if name == "driver" else float(value)
    return parsed


def folder(stamp: dict[str, Any], results: Path | None = None) -> Path:
    """`<results>/<device>-<date>-<commit>`, by default below benchmarks/results. Without `results`, $SRA_FAST_RESULTS
    overrides it: ab.py and gpu_report.py collect what other processes write."""
    if results is None and (override := os.environ.get("SRA_FAST_RESULTS")):
        return Path(override)
    device = "cpu" if stamp["kind"] == "cpu" else stamp["device"].lower().removeprefix("nvidia ")
    commit = (stamp["commit"] or "unknown")[:7]
    return (results or RESULTS) / f"{re.sub('[^a-z0-9]+', '-', device)}-{stamp['date'][:10]}-{commit}"


def write(directory: Path, name: str, rows: Sequence[Row], stamp: dict[str, Any]) -> Path:
    """Write `<directory>/<name>.json` atomically and return its path. Creates the directory."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{name}.json"
    write_json(path, {"format_version": FORMAT_VERSION, "name": name, "stamp": stamp, "rows": list(rows)})
    return path


def read(file: Path) -> dict[str, Any]:
    """`format_version`, `name`, `stamp` and `rows` of a file from `write`. Raises Refused if it is anything else."""
    content = read_json(file)
    if not (isinstance(content, dict) and {"format_version", "name", "stamp", "rows"} <= set(content)):
        raise Refused(str(file), "other content", "must be a file of results")
    version = content["format_version"]
    if version != FORMAT_VERSION:
        raise Refused(f"{file}: format_version", version, f"must be {FORMAT_VERSION}")
    return content


def digits(value: float | None) -> str:
    """Four significant digits; '' for None."""
    if value is None:
        return ""
    return f"{value:.4g}" if abs(value) < 1e4 else f"{value:.0f}"


def percent(share: float | None) -> str:
    """0.25 as 25.0%; '' for None."""
    return "" if share is None else f"{share:.1%}"


def spread(row: Row) -> str:
    """The 20th and 80th percentile."""
    return f"{digits(row['p20_ms'])} ... {digits(row['p80_ms'])}"


def markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table with aligned columns. Short lines are filled up with empty cells."""
    filled = [[*line, *[""] * (len(head) - len(line))] for line in lines]
    cells = [[text.replace("|", "\\|") for text in line] for line in (head, *filled)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(head))]
    padded = [[text.ljust(width) for text, width in zip(line, widths, strict=True)] for line in cells]
    padded.insert(1, ["-" * width for width in widths])
    return "\n".join(f"| {' | '.join(line)} |" for line in padded)
