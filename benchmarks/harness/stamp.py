"""The circumstances of a measurement, without which it cannot be compared with another."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]

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
