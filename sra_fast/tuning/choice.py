"""Decides `auto` on a GPU: for each op the fastest implementation that agrees with the reference, measured on this
device at the shapes of the run.

The choices are kept: in the configuration that a run saves, so that it resumes with the same bits, and in a file per
user (`cache_file`), so that the next run of the same shapes starts at once.
"""

from __future__ import annotations

import gc
import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from sra_fast.config import Config, to_dict
from sra_fast.errors import Refused
from sra_fast.files import read_json, to_json, write_json
from sra_fast.hardware import Hardware
from sra_fast.kernels import library
from sra_fast.kernels.perturb import Stored
from sra_fast.model.backends import choose_execution, undecided
from sra_fast.progress import warn
from sra_fast.tuning.cases import Case, check, make_case, prepared, truth
from sra_fast.tuning.timing import GateFailed, Samples, measure

REPEATS, WARMUP = 20, 3
CHECKED_SAMPLES = 8  # of attention: the reference needs memory for the scores, and samples do not depend on each other
VERSIONS = ("torch", "triton", "flash-attn", "flash-attn-3", "flash-attn-4")


def decide(
    config: Config,
    hardware: Hardware,
    report: Callable[[str], None],
    stored: Stored | None = None,
    before: Config | None = None,
) -> Config:
    """The configuration with every `auto` of its ops decided. On a CPU nothing is measured.

    Args:
        config: with the model's sizes filled in.
        hardware: of the run.
        report: called with lines for the user.
        stored: how batches are stored.
        before: the configuration of the checkpoint from which a run resumes: its choices are kept.
    """
    if hardware.device.type != "cuda":
        return config
    ops = undecided(config, hardware)
    key = to_json(_circumstances(config, hardware, stored))
    kept: dict[str, str] = {}
    if not config.kernels.retune:
        kept = _read_cache().get(key, {}) | (_choices_of(before) if before else {})  # the checkpoint's precede
    choices = {op: kept[op] for op, names in ops.items() if kept.get(op) in names}
    if left := {op: names for op, names in ops.items() if op not in choices}:
        report(f"tuning   measuring {', '.join(left)}: once for this device and these shapes")
        start = perf_counter()
        measured = measure_ops(left, config, hardware, report, stored)
        report(f"tuning   took {perf_counter() - start:.0f} s; choices are kept in {cache_file()}")
        _write_cache(key, measured)
        choices |= measured
    return _with_choices(config, choices)


def measure_ops(
    ops: Mapping[str, tuple[str, ...]],
    config: Config,
    hardware: Hardware,
    report: Callable[[str], None],
    stored: Stored | None = None,
) -> dict[str, str]:
    """{op: its fastest implementation that agrees with the reference}. Reports a line for each op.

    Args:
        ops: {op: names of its implementations, as `undecided` returns them}.
    """
    execution = choose_execution(config.train.execution, hardware.device)
    choices = {}
    for op, names in ops.items():
        case = make_case(op, config, hardware.device, hardware.dtype, stored)
        reference = "eager" if execution == "eager" else "compiled"
        implementations = {name: reference if name == "reference" else name for name in names}
        try:
            taken = time_implementations(case, implementations, hardware.device, graph=execution == "graph")
        except Exception as error:  # of the reference, which may lack memory: the run can still start
            taken = {names[0]: Samples(error=_first_line(error))}
        medians = {name: samples.median_ms for name, samples in taken.items() if samples.median_ms is not None}
        choices[op] = min(medians, key=medians.__getitem__, default=names[0])
        report(f"tuning   {op}: {', '.join(_described(taken))}")
        del case
        if reference == "compiled":
            torch.compiler.reset()  # a function may be compiled only so often
        gc.collect()
        if hardware.device.type == "cuda":
            torch.cuda.empty_cache()
    return choices


def time_implementations(
    case: Case, implementations: Mapping[str, str], device: torch.device, graph: bool
) -> dict[str, Samples]:
    """Time forward and backward pass of those that agree with the reference, fastest first; the others have an error.

    Args:
        implementations: {name: key of case.implementations}.
        graph: as in `measure`.
    """
    which = case.passes[-1]
    checked = case
    if case.op == "attention":
        checked = replace(case, inputs=tuple(x[:CHECKED_SAMPLES] for x in case.inputs))
    right = truth(checked, which)
    calls: dict[str, Callable[[], object]] = {}
    failed: dict[str, Samples] = {}
    for name, implementation in implementations.items():
        try:
            if implementation != case.reference:
                check(checked, implementation, which, right)
            call = prepared(case, implementation, which)
            error = measure({name: call}, device=device, repeats=1, warmup=WARMUP, graph=graph)[name].error
        except Exception as raised:  # of any kind: the others can still run
            error = _first_line(raised)
        if error:
            failed[name] = Samples(error=error)
        else:
            calls[name] = call
    taken = measure(calls, device=device, repeats=REPEATS, warmup=1, graph=graph) if calls else {}
    return dict(sorted(taken.items(), key=lambda item: item[1].median_ms or 0)) | failed


def _described(taken: Mapping[str, Samples]) -> Iterator[str]:
    for name, samples in taken.items():
        if samples.median_ms is None:
            yield f"without {name} ({samples.error})"
        else:
            yield f"{name} {samples.median_ms:.3g} ms"


def _first_line(error: Exception) -> str:
    kind = "" if isinstance(error, GateFailed) else f"{type(error).__name__}: "
    return (kind + str(error)).strip().splitlines()[0]


def _choices_of(config: Config) -> dict[str, str]:
    """The choices that a configuration has: by `decide` or by a user."""
    kernels = {op: name for op, name in to_dict(config.kernels).items() if name in ("fused", "reference")}
    return {**kernels, "attention": config.model.attention}


def _with_choices(config: Config, choices: Mapping[str, str]) -> Config:
    kernels = {op: name for op, name in choices.items() if op != "attention"}
    model = replace(config.model, attention=choices.get("attention", config.model.attention))
    return replace(config, model=model, kernels=replace(config.kernels, **kernels))


# The cache


def cache_file() -> Path:
    """Where the choices of earlier runs are: below $XDG_CACHE_HOME, by default ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sra_fast" / "choices.json"


def _circumstances(config: Config, hardware: Hardware, stored: Stored | None) -> dict[str, Any]:
    """What the choices depend on: device, versions, the code of the kernels, and the shapes."""
    return {
        "device": hardware.name,
        "architecture": hardware.architecture,
        "versions": {name: _version(name) for name in VERSIONS},
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "kernels": _code(),
        "dtype": hardware.precision,
        "images": config.train.batch // config.train.micro_batches,
        "accumulate": config.train.micro_batches > 1,
        "execution": config.train.execution,
        "deterministic": config.deterministic,
        "distance": config.align.distance,
        "posterior": stored and stored.posterior,
        "model": {**to_dict(config.model), "attention": ""},
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _code() -> str:
    """A hash of the kernels' sources and of the compiled library."""
    folder = Path(library.__file__).parent
    files = [*sorted(folder.glob("*.py")), folder.parent / library.NAME]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files if file.exists())).hexdigest()[:16]


def _read_cache() -> dict[str, dict[str, str]]:
    """{circumstances: {op: choice}}; empty if there is no readable file."""
    try:
        content = read_json(cache_file()) if cache_file().exists() else {}
    except (OSError, Refused):
        return {}
    well_formed = isinstance(content, dict) and all(isinstance(entry, dict) for entry in content.values())
    return content if well_formed else {}


def _write_cache(key: str, measured: Mapping[str, str]) -> None:
    """Add what was measured under these circumstances to what is there."""
    cache = _read_cache()
    try:
        cache_file().parent.mkdir(parents=True, exist_ok=True)
        write_json(cache_file(), {**cache, key: {**cache.get(key, {}), **measured}})
    except (OSError, Refused) as error:
        warn(f"tuning: the choices are not kept for the next run: {error}")
