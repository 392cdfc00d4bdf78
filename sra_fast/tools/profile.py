"""Running steps under the profiler: what is traced, what is written, what is printed."""

from __future__ import annotations

import gzip
import json
import platform
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, replace
from datetime import UTC, datetime
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import torch

from sra_fast.config import DIGITS_FOLDER, Config, ProfileConfig, refuse_unless, to_dict
from sra_fast.data.stream import Batch
from sra_fast.distributed import refuse_several_processes
from sra_fast.errors import Refused
from sra_fast.files import replacing, write_json
from sra_fast.hardware import Hardware, set_deterministic
from sra_fast.model.backends import resolve
from sra_fast.model.transformer import Ops
from sra_fast.step.graph import WARM_UP
from sra_fast.step.runner import EXECUTIONS, StepRunner, choose_execution
from sra_fast.step.state import TrainState
from sra_fast.step.step import MetricRing, TrainingStep
from sra_fast.tools.breakdown import CATEGORIES, STAGES, Breakdown, Event, Stages, breakdown, stages_of

FORMAT_VERSION = 1
LARGEST_TRACE = 16 * 2**20  # bytes; TensorBoard takes long to open more
LATENTS = {"input_size": 32, "channels": 4, "classes": 1000}  # ImageNet at 256 pixels behind the SD autoencoder

T = TypeVar("T")


def profile(config: Config, settings: ProfileConfig, report: Callable[[str], None] = print) -> int:
    """Trace steps of a run on random images; no data set is read. Returns the exit code.

    Raises:
        Refused: on anything that keeps it from starting; nothing has been written then.
    """
    refuse_several_processes()
    hardware = Hardware.choose(config.train.device, config.train.precision)
    gpu = hardware.device.type == "cuda"
    refuse_unless(gpu or not settings.nvtx, "profile.nvtx", settings.nvtx, "needs an NVIDIA GPU, and none is used here")
    config, out = with_sizes(config), Path(settings.out)
    existing = next(path for path in (out, *out.absolute().parents) if path.exists())
    refuse_unless(existing.is_dir(), "profile.out", settings.out, f"must be a folder, but {existing} is a file")
    resolved, executions = resolve(config, hardware), _executions(config, hardware)
    if settings.nvtx:
        with _step(config, resolved, hardware, executions[-1], settings.warmup) as step:
            _with_nvtx(step, settings)
        report(f"{settings.steps} steps, {executions[-1]}, ran between cudaProfilerStart and cudaProfilerStop")
        return 0
    traces, stages = [], None
    for execution in executions:
        report(f"tracing  {EXECUTIONS[execution]}")
        path = out / f"{config.run.name}-{execution}.{time.time_ns()}.pt.trace.json.gz"
        job = (config, resolved, hardware, settings, execution, path, stages)
        entry, stages = _traced(*job) if len(executions) == 1 else _in_its_own_process(_traced, *job)
        traces.append(entry)
        for line in _table(entry):
            report(line)
        if path.stat().st_size > LARGEST_TRACE:
            report(f"{path} has {path.stat().st_size / 2**20:.0f} MiB; fewer --profile.steps make it smaller")
    write_json(out / "profile.json", {**_circumstances(config, resolved, hardware), "traces": traces})
    report(f"profile.json and traces are in {out}; to look at them: tensorboard --logdir {out}")
    return 0


def with_sizes(config: Config) -> Config:
    """The configuration with the model's sizes filled in, which training reads from its data: those of --data.images
    where the preset has some, else of ImageNet latents."""
    data, model = config.data, config.model
    sizes = LATENTS
    if data.images:
        classes = 10 if data.images == DIGITS_FOLDER else LATENTS["classes"]
        sizes = {"input_size": data.resolution, "channels": data.channels, "classes": classes}
    return replace(config, model=replace(model, **{name: getattr(model, name) or sizes[name] for name in sizes}))


def _executions(config: Config, hardware: Hardware) -> tuple[str, ...]:
    """What to trace. Kernels in a CUDA graph have lost the ranges they were launched in, so that for a run that replays
    one, the same step is traced without it first; only the replays have the idle time of training."""
    chosen = choose_execution(config.train.execution, hardware.device)
    return ("compiled", "graph") if chosen == "graph" else (chosen,)


@contextmanager
def _step(
    config: Config, resolved: dict[str, str], hardware: Hardware, execution: str, warmup: int
) -> Iterator[Callable[[], None]]:
    """One whole step, executed as training executes it, after `warmup` others. Its batch is always the same and comes
    from the host's memory, as from a decoder on the CPU."""
    model, size, device = config.model, config.train.batch, hardware.device
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(size, model.channels, model.input_size, model.input_size, generator=generator)
    batch = Batch(x, torch.randint(model.classes, (size,), generator=generator), torch.arange(size))
    if config.deterministic:
        set_deterministic(True)
    state = TrainState.create(config, Ops.select(resolved), device, hardware.dtype)
    step, ring = TrainingStep(config, resolved, device), MetricRing(1, device)
    runner = StepRunner(step, state, ring, execution, resolved["attention"], say=lambda line: None)
    with _kernels_of_compiled_steps(execution):
        # A graph is captured after ordinary steps of its own, and its first replay uploads it.
        for _ in range(warmup + (WARM_UP + 1 if execution == "graph" else 0)):
            runner(batch, config.optim.lr, config.align.weight)
        if runner.failure:
            raise Refused(f"train.execution: the step could not be captured as a CUDA graph ({runner.failure})")
        yield lambda: runner(batch, config.optim.lr, config.align.weight)


def _kernels_of_compiled_steps(execution: str) -> AbstractContextManager:
    """In here a CPU's compiled kernels show in traces."""
    if execution == "eager":
        return nullcontext()
    from torch._inductor import config  # here, because it brings in all of the compiler

    return config.patch({"cpp.enable_kernel_profile": True})


def _traced(
    config: Config,
    resolved: dict[str, str],
    hardware: Hardware,
    settings: ProfileConfig,
    execution: str,
    path: Path,
    stages: Stages | None,
) -> tuple[dict[str, Any], Stages]:
    """(figures of one execution, the stages of its kernels), with its trace written to `path`."""
    gpu = hardware.device.type == "cuda"
    with _step(config, resolved, hardware, execution, settings.warmup) as step:
        untraced_ms = _ms_per_step(step, settings.steps, gpu)
        events = _trace(step, settings, path, gpu)
    if gpu and not any(event.get("cat") == "kernel" for event in events):
        raise Refused(f"{path}: no GPU kernel was recorded; another profiler may be using CUPTI")
    found = breakdown(events, stages=stages)
    return _entry(found, execution, path, untraced_ms, config.train.batch, settings.top), stages_of(events)


def _in_its_own_process(function: Callable[..., T], *arguments: Any) -> T:
    """One trace in a process: CUDA graphs captured after CUPTI was in use in theirs have been seen to lose all kernels
    or to crash (pytorch/pytorch pull request 112507), and what CUPTI leaves behind slows what is timed after it."""
    try:
        with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as pool:
            return pool.submit(function, *arguments).result()
    except BrokenProcessPool as error:
        raise Refused("profile: the process that traced the steps died; nothing is known of them") from error


def _ms_per_step(step: Callable[[], None], steps: int, gpu: bool) -> float:
    """Time of a step without the profiler, whose own work makes the host slower."""
    if gpu:
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(steps):
        step()
    if gpu:
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - start) / steps


def _trace(step: Callable[[], None], settings: ProfileConfig, path: Path, gpu: bool) -> list[Event]:
    """Trace steps into a file that TensorBoard's plugin knows by its name, `<worker>.<time>.pt.trace.json.gz`, and
    return its events. The first step traced fills the device's queue and the last one only ends the window."""
    activities = [torch.profiler.ProfilerActivity.CPU, *([torch.profiler.ProfilerActivity.CUDA] if gpu else [])]
    active = settings.steps + 2
    with TemporaryDirectory() as folder:
        raw = Path(folder) / "trace.json"
        with torch.profiler.profile(
            activities=activities,
            schedule=torch.profiler.schedule(wait=0, warmup=1, active=active, repeat=1),
            on_trace_ready=lambda profiler: profiler.export_chrome_trace(str(raw)),
            record_shapes=settings.shapes,
            with_stack=settings.stack,
            profile_memory=settings.memory,
        ) as profiler:
            for _ in range(1 + active):
                step()
                profiler.step()
        content = raw.read_bytes()
    with replacing(path) as partial:
        partial.write_bytes(gzip.compress(content, mtime=0))
    return json.loads(content, strict=False)["traceEvents"]


def _with_nvtx(step: Callable[[], None], settings: ProfileConfig) -> None:
    """Steps that Nsight Systems records: every op and every range of the step is an NVTX range."""
    torch.cuda.synchronize()
    with torch.cuda.profiler.profile(), torch.autograd.profiler.emit_nvtx(record_shapes=settings.shapes):
        for number in range(settings.steps):
            with torch.cuda.nvtx.range(f"step {number}"):
                step()
        torch.cuda.synchronize()


def _entry(found: Breakdown, execution: str, path: Path, untraced_ms: float, batch: int, top: int) -> dict[str, Any]:
    """One trace, in JSON values."""
    return {
        "execution": execution,
        "file": path.name,
        "steps": found.steps,
        "ms_per_step": found.step_ms,
        "untraced_ms_per_step": untraced_ms,
        "untraced_images_per_s": 1e3 * batch / untraced_ms,
        "breakdown": {
            name: {"ms": found.ms[name], "share": found.shares[name], "busy_ms": found.busy_ms.get(name, 0.0)}
            for name in CATEGORIES
        },
        "stages_ms": {name.removeprefix(STAGES): ms for name, ms in found.stages_ms.items()},
        "kernels_per_step": sum(kernel.calls for kernel in found.kernels),
        "top_kernels": [asdict(kernel) for kernel in found.kernels[:top]],
    }


def _circumstances(config: Config, resolved: dict[str, str], hardware: Hardware) -> dict[str, Any]:
    """What the figures hold for."""
    model, train = config.model, config.train
    return {
        "format_version": FORMAT_VERSION,
        "device": hardware.name,
        "threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        },
        "command": shlex.join([Path(sys.orig_argv[0]).name, *sys.orig_argv[1:]]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "params": {
            "run": config.run.name,
            "tokens": model.tokens,
            "batch": train.batch,
            "accumulate": train.accumulate,
            "precision": hardware.precision,
            "method": config.align.method,
        },
        "resolved": resolved,
        "config": to_dict(config),
    }


def _table(entry: dict[str, Any]) -> Iterator[str]:
    """A trace for people."""
    yield (
        f"{entry['execution']}: {entry['ms_per_step']:.2f} ms a step (mean of {entry['steps']}), "
        f"{entry['untraced_ms_per_step']:.2f} ms without the profiler ({entry['untraced_images_per_s']:.1f} images/s)"
    )
    yield f"{'':>18} {'ms':>9} {'share':>7} {'busy ms':>9}"
    for name, part in entry["breakdown"].items():
        busy = "" if name == "idle" else f"{part['busy_ms']:9.3f}"
        yield f"{name:>18} {part['ms']:9.3f} {part['share']:7.1%} {busy}".rstrip()
    if set(entry["stages_ms"]) - {""}:
        yield "stages, ms         " + ", ".join(f"{name or 'none'} {ms:.3f}" for name, ms in entry["stages_ms"].items())
    yield f"{'':>18} {'ms':>9} {'share':>7} {'calls':>9}  of {entry['kernels_per_step']:.0f} a step"
    for kernel in entry["top_kernels"]:
        name = kernel["name"] if len(kernel["name"]) <= 80 else kernel["name"][:77] + "..."
        yield f"{kernel['category']:>18} {kernel['ms']:9.3f} {kernel['share']:7.1%} {kernel['calls']:9.1f}  {name}"
