"""`sra-fast profile`: trace training steps, and write and print where their time goes."""

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
from typing import Any, TypeVar

import torch
from torch.profiler import ProfilerActivity

from sra_fast.config import DIGITS_FOLDER, Config, ProfileConfig, to_dict
from sra_fast.data.stream import Batch
from sra_fast.distributed import refuse_several_processes
from sra_fast.errors import Refused
from sra_fast.files import refuse_unwritable, replacing, write_json
from sra_fast.hardware import Hardware, set_deterministic
from sra_fast.memory import refuse_training
from sra_fast.model.backends import EXECUTIONS, Backends
from sra_fast.step.graph import WARM_UP
from sra_fast.step.ring import MetricRing
from sra_fast.step.runner import StepRunner
from sra_fast.step.state import TrainState
from sra_fast.step.step import TrainingStep
from sra_fast.tools.breakdown import CATEGORIES, STAGES, Breakdown, Event, Stages, breakdown, stages_of
from sra_fast.tuning.choice import decide

FORMAT_VERSION = 1
LARGEST_TRACE = 16 * 2**20  # bytes; TensorBoard opens larger traces slowly
LATENTS = {"input_size": 32, "channels": 4, "classes": 1000}  # ImageNet at 256 pixels, encoded by the SD autoencoder

T = TypeVar("T")


def profile(config: Config, settings: ProfileConfig, report: Callable[[str], None] = print) -> int:
    """Trace steps of a run on random images; no data set is read. Returns the exit code.

    Raises:
        Refused: if it cannot start; nothing has been written then.
    """
    refuse_several_processes("profile")
    hardware = Hardware.choose(config.train.device, config.train.precision, "train.device")
    if settings.nvtx and hardware.device.type != "cuda":
        raise Refused("profile.nvtx", settings.nvtx, "needs an NVIDIA GPU, and none is used here")
    config, out = with_sizes(config), Path(settings.out)
    refuse_training(config, hardware)
    existing = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise Refused("profile.out", settings.out, f"must be a folder, but {existing} is a file")
    refuse_unwritable(out, "profile.out")
    Backends.resolve(config, hardware)  # refuses what is not available
    config = decide(config, hardware, report)
    backends = Backends.resolve(config, hardware)
    executions = _executions(backends)
    if settings.nvtx:
        with _step(config, hardware, executions[-1], settings.warmup) as step:
            _with_nvtx(step, settings)
        report(f"{settings.steps} steps, {executions[-1]}, ran between cudaProfilerStart and cudaProfilerStop")
        return 0
    traces, stages = [], None
    for execution in executions:
        report(f"tracing  {EXECUTIONS[execution]}")
        path = out / f"{config.run.name}-{execution}.{time.time_ns()}.pt.trace.json.gz"
        arguments = (config, hardware, settings, execution, path, stages)
        if len(executions) == 1:
            entry, stages = _trace_execution(*arguments)
        else:
            entry, stages = _run_in_process(_trace_execution, *arguments)
        traces.append(entry)
        for line in _table(entry):
            report(line)
        if path.stat().st_size > LARGEST_TRACE:
            report(f"{path} has {path.stat().st_size / 2**20:.0f} MiB; fewer --profile.steps make it smaller")
    write_json(out / "profile.json", {**_circumstances(config, backends, hardware), "traces": traces})
    report(f"profile.json and traces are in {out}; view them with: tensorboard --logdir {out}")
    return 0


def with_sizes(config: Config) -> Config:
    """Fill in the model's sizes, which training takes from its data: those of --data.images if set, else of ImageNet
    latents."""
    data, model = config.data, config.model
    sizes = LATENTS
    if data.images:
        classes = 10 if data.images == DIGITS_FOLDER else LATENTS["classes"]
        sizes = {"input_size": data.resolution, "channels": data.channels, "classes": classes}
    return replace(config, model=replace(model, **{name: getattr(model, name) or sizes[name] for name in sizes}))


def _executions(backends: Backends) -> tuple[str, ...]:
    """What to trace. Kernels replayed by a CUDA graph carry no ranges; their stages are taken from a trace of the same
    step without the graph. Only the replays show the idle time of training."""
    return ("compiled", "graph") if backends.execution == "graph" else (backends.execution,)


@contextmanager
def _step(config: Config, hardware: Hardware, execution: str, warmup: int) -> Iterator[Callable[[], None]]:
    """A function that executes one training step, after `warmup` steps. Its batch is always the same and comes from
    host memory, as from a decoder on the CPU."""
    model, size, device = config.model, config.train.batch, hardware.device
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(size, model.channels, model.input_size, model.input_size, generator=generator)
    batch = Batch(x, torch.randint(model.classes, (size,), generator=generator), torch.arange(size))
    if config.deterministic:
        set_deterministic(True)
    backends = Backends.resolve(config, hardware)
    state = TrainState.create(config, backends, device, hardware.dtype)
    step, ring = TrainingStep(config, backends, device), MetricRing(1, device)
    runner = StepRunner(step, state, ring, execution, report_failure=lambda line: None)
    with _kernels_of_compiled_steps(execution):
        # A graph is captured after WARM_UP ordinary steps, and uploaded by its first replay.
        for _ in range(warmup + (WARM_UP + 1 if execution == "graph" else 0)):
            runner(batch, config.optim.lr, config.align.weight)
        if runner.failure:
            raise Refused(f"train.execution: the step could not be captured as a CUDA graph ({runner.failure})")
        yield lambda: runner(batch, config.optim.lr, config.align.weight)


def _kernels_of_compiled_steps(execution: str) -> AbstractContextManager:
    """Within this context, traces show the CPU kernels of compiled steps."""
    if execution == "eager":
        return nullcontext()
    # Private, but the public way, `torch.compile(options=...)`, would have to go through TrainingStep.compile. Imported
    # here because it loads the whole compiler.
    from torch._inductor import config

    return config.patch({"cpp.enable_kernel_profile": True})


def _trace_execution(
    config: Config,
    hardware: Hardware,
    settings: ProfileConfig,
    execution: str,
    path: Path,
    stages: Stages | None,
) -> tuple[dict[str, Any], Stages]:
    """(figures of one execution, stages of its kernels). Writes the trace to `path`.

    Args:
        stages: of the same step's kernels without a CUDA graph, for a graph.
    """
    gpu = hardware.device.type == "cuda"
    with _step(config, hardware, execution, settings.warmup) as step:
        untraced_ms = _ms_per_step(step, settings.steps, gpu)
        events = _trace(step, settings, path, gpu)
    if gpu and not any(event.get("cat") == "kernel" for event in events):
        raise Refused(f"{path}: no GPU kernel was recorded; another profiler may be using CUPTI")
    figures = _entry(breakdown(events, stages=stages), execution, path, untraced_ms, config.train.batch, settings.top)
    return figures, stages_of(events)


def _run_in_process(function: Callable[..., T], *arguments: Any) -> T:
    """Call a function in a process of its own. A CUDA graph captured after CUPTI was used in the same process may lose
    all kernels or crash (pytorch/pytorch pull request 112507), and CUPTI slows down what is timed after it."""
    try:
        with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as pool:
            return pool.submit(function, *arguments).result()
    except BrokenProcessPool as error:
        raise Refused("profile: the process that traced the steps died") from error


def _ms_per_step(step: Callable[[], None], steps: int, gpu: bool) -> float:
    """Time of a step without the profiler, which slows down the host."""
    if gpu:
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(steps):
        step()
    if gpu:
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - start) / steps


def _trace(step: Callable[[], None], settings: ProfileConfig, path: Path, gpu: bool) -> list[Event]:
    """Trace steps and return the events. TensorBoard's plugin recognises the file by its name,
    `<worker>.<time>.pt.trace.json.gz`. The first traced step fills the device's queue, and the last only ends the
    window."""
    activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA] if gpu else [ProfilerActivity.CPU]
    active = settings.steps + 2
    with replacing(path) as partial:
        with torch.profiler.profile(
            activities=activities,
            schedule=torch.profiler.schedule(wait=0, warmup=1, active=active, repeat=1),
            on_trace_ready=lambda profiler: profiler.export_chrome_trace(str(partial)),
            record_shapes=settings.shapes,
            with_stack=settings.stack,
            profile_memory=settings.memory,
        ) as profiler:
            for _ in range(1 + active):
                step()
                profiler.step()
        content = partial.read_bytes()
        partial.write_bytes(gzip.compress(content, mtime=0))
    return json.loads(content, strict=False)["traceEvents"]


def _with_nvtx(step: Callable[[], None], settings: ProfileConfig) -> None:
    """Run steps for Nsight Systems to record, with an NVTX range for every op and every range of the step."""
    torch.cuda.synchronize()
    with torch.cuda.profiler.profile(), torch.autograd.profiler.emit_nvtx(record_shapes=settings.shapes):
        for number in range(settings.steps):
            with torch.cuda.nvtx.range(f"step {number}"):
                step()
        torch.cuda.synchronize()


def _entry(result: Breakdown, execution: str, path: Path, untraced_ms: float, batch: int, top: int) -> dict[str, Any]:
    """Figures of one trace, as JSON values."""
    return {
        "execution": execution,
        "file": path.name,
        "steps": result.steps,
        "ms_per_step": result.step_ms,
        "untraced_ms_per_step": untraced_ms,
        "untraced_images_per_s": 1e3 * batch / untraced_ms,
        "breakdown": {
            name: {"ms": result.ms[name], "share": result.shares[name], "busy_ms": result.busy_ms.get(name, 0.0)}
            for name in CATEGORIES
        },
        "stages_ms": {name.removeprefix(STAGES): ms for name, ms in result.stages_ms.items()},
        "kernels_per_step": sum(kernel.calls for kernel in result.kernels),
        "top_kernels": [asdict(kernel) for kernel in result.kernels[:top]],
    }


def _circumstances(config: Config, backends: Backends, hardware: Hardware) -> dict[str, Any]:
    """Machine, versions and configuration that the figures were measured with."""
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
            "accumulate": train.micro_batches,
            "precision": hardware.precision,
            "method": config.align.method,
        },
        "resolved": backends.names,
        "config": to_dict(config),
    }


def _table(entry: dict[str, Any]) -> Iterator[str]:
    """Lines that print the figures of one trace."""
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
