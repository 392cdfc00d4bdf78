"""Candidates timed against each other in one process: A B C B C A C A B ...

What makes a number here worth keeping:
- no number at all unless the results agree with the reference (`gate`);
- candidates are interleaved, so that a clock that falls or a neighbour that wakes up meets all of them;
- every sample is kept, and the summary is the median with the 20th and 80th percentile, not the mean;
- roofs are measured on the same device in the same run, not read off a data sheet.

The cold cache and the quantiles are those of triton.testing.do_bench; the interleaving and the graph replay follow the
benchmark guide of Dao-AILab/quack ("interleave variants at single-launch granularity and compare medians").
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.harness.rows import Row, folder, read, row, table, write
from benchmarks.harness.stamp import stamp

__all__ = ["GateFailed", "Row", "Samples", "folder", "measure", "read", "roofs", "row", "stamp", "table", "write"]

GIB = 2**30


class GateFailed(AssertionError):
    """Results that disagree with the reference: their speed is of no interest."""


@dataclass(frozen=True)
class Samples:
    """All timings of one candidate, in the order they were taken."""

    ms: tuple[float, ...] = ()
    """Milliseconds per call: of the device on a GPU, of the wall clock on a CPU."""
    host_samples_ms: tuple[float, ...] = ()
    """Milliseconds per call until the host has the call behind it; on a CPU the same as `ms`."""
    peak_memory_gib: float | None = None
    """Highest memory in use, with everything else that lives in the process: allocated device memory during the warm-up
    and one more call on a GPU (a graph's replay allocates nothing), resident memory during one warm call on a CPU.
    None where the system does not say."""
    error: str | None = None
    """Why there are no samples."""

    def joined(self, other: Samples) -> Samples:
        """These timings and then those of another measurement of the same candidate."""
        memory = [peak for peak in (self.peak_memory_gib, other.peak_memory_gib) if peak is not None]
        host = self.host_samples_ms + other.host_samples_ms
        return Samples(self.ms + other.ms, host, min(memory, default=None), self.error or other.error)

    @property
    def median_ms(self) -> float | None:
        """The median, None without samples."""
        return _percentile(self.ms, 50)

    @property
    def p20_ms(self) -> float | None:
        """The 20th percentile, interpolated linearly."""
        return _percentile(self.ms, 20)

    @property
    def p80_ms(self) -> float | None:
        """The 80th percentile, interpolated linearly."""
        return _percentile(self.ms, 80)

    @property
    def host_ms(self) -> float | None:
        """Median host time per call."""
        return _percentile(self.host_samples_ms, 50)


def _percentile(values: tuple[float, ...], percent: float) -> float | None:
    return float(np.percentile(values, percent)) if values else None


def measure(
    candidates: dict[str, Callable[[], None]],
    *,
    device: torch.device | str,
    repeats: int,
    warmup: int,
    inner: int = 1,
    cold_l2: bool = False,
    graph: bool = False,
    gate: Callable[[], None] | None = None,
) -> dict[str, Samples]:
    """Time every candidate `repeats` times, interleaved, starting each round with the next one.

    On a GPU without `graph`, launch gaps of the host are part of the time of kernels below some 100 us unless a cold
    cache is asked for, whose flush keeps the device busy while the host runs ahead.

    Args:
        candidates: name -> what to time; called without arguments, results ignored.
        device: where they compute.
        repeats: samples of each, at least 1.
        warmup: calls of each before the first sample, at least 1: compilation and autotuning belong there.
        inner: calls per sample; the sample is their time divided by this.
        cold_l2: empty the GPU's L2 cache before each sample, outside the timed window. Needs inner = 1.
        graph: capture `inner` calls in one CUDA graph and time its replay. Only on a GPU.
        gate: called first; raises `GateFailed` when results disagree with the reference.

    Returns:
        Samples by name. A candidate that runs out of memory has no samples but an `error`; the others go on.

    Raises:
        GateFailed: from the gate, before anything is timed.
        ValueError: if the arguments cannot be.
    """
    device = torch.device(device)
    if min(repeats, warmup, inner) < 1:
        raise ValueError(f"repeats, warmup, inner: {repeats}, {warmup}, {inner} given; each must be at least 1")
    if cold_l2 and inner > 1:
        raise ValueError(f"cold_l2 with inner = {inner}: only the first call would find a cold cache; inner must be 1")
    if (cold_l2 or graph) and device.type != "cuda":
        raise ValueError(f"cold_l2 and graph need a CUDA device; {device} given")
    if gate is not None:
        gate()
    clock = _GpuClock(device, inner, cold_l2, graph) if device.type == "cuda" else _CpuClock(inner)
    ready: dict[str, Callable[[], None]] = {}
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in candidates}
    peaks: dict[str, float | None] = {}
    errors: dict[str, str] = {}

    def survives(name: str, work: Callable[[], None]) -> None:
        try:
            work()
        except (RuntimeError, MemoryError) as error:
            if not _out_of_memory(error):
                raise
            errors[name] = f"out of memory ({(str(error) or type(error).__name__).splitlines()[0]})"
            ready.pop(name, None)
        if name in errors:  # outside the handler, whose traceback holds the candidate's tensors
            clock.release()

    def prepare(name: str) -> None:
        clock.begin()
        for _ in range(warmup):
            candidates[name]()
        peaks[name], ready[name] = clock.prepare(candidates[name])

    for name in candidates:
        survives(name, lambda name=name: prepare(name))
    order = list(candidates)
    for _ in range(repeats):
        for name in [name for name in order if name in ready]:
            survives(name, lambda name=name: taken[name].append(clock.sample(ready[name])))
        order = order[1:] + order[:1]
    return {
        name: Samples(error=errors[name])
        if name in errors
        else Samples(tuple(ms for ms, _ in taken[name]), tuple(host for _, host in taken[name]), peaks[name])
        for name in candidates
    }


class _CpuClock:
    """Wall time of `inner` calls."""

    def __init__(self, inner: int) -> None:
        self.inner = inner

    def begin(self) -> None:
        """Nothing: resident memory is looked at when all is warm."""

    def prepare(self, call: Callable[[], None]) -> tuple[float | None, Callable[[], None]]:
        """(peak memory of one call in GiB, what to sample)."""
        status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
        try:
            reset.write_text("5")  # resets the peak of resident memory, see proc_pid_clear_refs(5)
        except OSError:
            return None, call
        call()
        peak = next((line for line in status.read_text().splitlines() if line.startswith("VmHWM:")), None)
        return (int(peak.split()[1]) * 1024 / GIB if peak else None), call

    def sample(self, call: Callable[[], None]) -> tuple[float, float]:
        """(time, host time) per call in ms."""
        start = time.perf_counter_ns()
        for _ in range(self.inner):
            call()
        ms = (time.perf_counter_ns() - start) / 1e6 / self.inner
        return ms, ms

    def release(self) -> None:
        """Give back what a failed candidate left."""
        gc.collect()


class _GpuClock:
    """Events around `inner` calls, or around one replay of a graph of them."""

    def __init__(self, device: torch.device, inner: int, cold_l2: bool, graph: bool) -> None:
        self.device, self.inner, self.graph = device, inner, graph
        # Twice the cache evicts all of it; 256 MiB also keeps the device busy for some 60 us, in which the host queues
        # the sample, so that the events do not measure launch gaps.
        size = max(2 * torch.cuda.get_device_properties(device).L2_cache_size, 256 * 2**20)
        self.flush = torch.empty(size, dtype=torch.int8, device=device) if cold_l2 else None

    def begin(self) -> None:
        """Memory counts from here."""
        torch.cuda.synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)

    def prepare(self, call: Callable[[], None]) -> tuple[float, Callable[[], None]]:
        """(peak memory since `begin` in GiB, what to sample)."""
        call = self._captured(call) if self.graph else self._repeated(call)
        if not self.graph:  # a replay allocates nothing: the capture did
            call()
        torch.cuda.synchronize(self.device)
        return torch.cuda.max_memory_allocated(self.device) / GIB, call

    def _repeated(self, call: Callable[[], None]) -> Callable[[], None]:
        def repeated() -> None:
            for _ in range(self.inner):
                call()

        return repeated

    def _captured(self, call: Callable[[], None]) -> Callable[[], None]:
        # Capture wants its warm-up on a side stream (pytorch.org/docs/stable/notes/cuda.html, "CUDA Graphs").
        side = torch.cuda.Stream(self.device)
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side):
            call()
        torch.cuda.current_stream(self.device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
            self._repeated(call)()
        graph.replay()  # the first replay uploads the graph
        return graph.replay

    def sample(self, call: Callable[[], None]) -> tuple[float, float]:
        """(device time, host time) per call in ms."""
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize(self.device)
        if self.flush is not None:
            self.flush.zero_()
        begin.record(torch.cuda.current_stream(self.device))
        start = time.perf_counter_ns()
        call()
        host = (time.perf_counter_ns() - start) / 1e6
        end.record(torch.cuda.current_stream(self.device))
        end.synchronize()
        return begin.elapsed_time(end) / self.inner, host / self.inner

    def release(self) -> None:
        """Give back what a failed candidate left."""
        gc.collect()
        torch.cuda.empty_cache()


def _out_of_memory(error: BaseException | None) -> bool:
    """Whether memory ran out, now or, as when a graph capture is torn down, in the error that led to this one."""
    while error is not None:
        if isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def roofs(device: torch.device | str, copy_bytes: int | None = None, matmul_size: int | None = None) -> dict[str, Any]:
    """What this device reaches, now: the bandwidth of a large copy and the rate of a large bf16 matrix product.

    Operands are random normal numbers: zeros draw less power and run faster than any real data will.

    Args:
        device: to measure.
        copy_bytes: bytes read plus bytes written; None = 4 GiB on a GPU, 256 MiB on a CPU, both well beyond the caches.
        matmul_size: n of the (n, n) x (n, n) product; None = 8192 on a GPU, 1024 on a CPU.

    Returns:
        `copy_gb_per_s` (1e9 bytes, read + written), `matmul_tflop_per_s` (1e12 FLOP, 2 per multiply-add), and the
        sizes `copy_bytes` and `matmul_size`.
    """
    device = torch.device(device)
    gpu = device.type == "cuda"
    copy_bytes = copy_bytes or (4 * GIB if gpu else GIB // 4)
    size = matmul_size or (8192 if gpu else 1024)
    source = torch.randn(copy_bytes // 8, device=device)  # float32: copy_bytes / 2 to read, as many to write
    target = torch.empty_like(source)
    a, b = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    out = torch.empty_like(a)
    candidates = {"copy": lambda: target.copy_(source), "matmul": lambda: torch.mm(a, b, out=out)}
    taken = measure(candidates, device=device, repeats=20, warmup=3)
    return {
        "copy_gb_per_s": 8 * len(source) / taken["copy"].median_ms / 1e6,
        "matmul_tflop_per_s": 2 * size**3 / taken["matmul"].median_ms / 1e9,
        "copy_bytes": 8 * len(source),
        "matmul_size": size,
    }
