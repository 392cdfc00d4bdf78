"""Candidates timed against each other in one process: A B C B C A C A B ...

The cold cache and the quantiles are those of triton.testing.do_bench; interleaving and graph replay follow the
benchmark guide of Dao-AILab/quack ("interleave variants at single-launch granularity and compare medians").
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from sra_fast.errors import is_out_of_memory

GIB = 2**30
Call = Callable[[], object]


class GateFailed(AssertionError):
    """Results disagree with the reference, so their speed does not count."""


@dataclass(frozen=True)
class Samples:
    """All timings of one candidate, in the order they were taken."""

    ms: tuple[float, ...] = ()  # per call: device time on a GPU, wall time on a CPU
    host_samples_ms: tuple[float, ...] = ()  # per call until it returns to the host; on a CPU the same
    peak_memory_gib: float | None = None  # with everything else in the process: allocated on a GPU, resident on a CPU
    error: str | None = None  # why there are no samples

    def joined(self, other: Samples) -> Samples:
        """These timings followed by those of another measurement of the same candidate."""
        memory = [peak for peak in (self.peak_memory_gib, other.peak_memory_gib) if peak is not None]
        host = self.host_samples_ms + other.host_samples_ms
        return Samples(self.ms + other.ms, host, min(memory, default=None), self.error or other.error)

    @property
    def median_ms(self) -> float | None:
        """The median; None without samples."""
        return statistics.median(self.ms) if self.ms else None


def measure(
    candidates: Mapping[str, Call],
    *,
    device: torch.device | str,
    repeats: int,
    warmup: int,
    graph: bool = False,
    clock: CpuClock | GpuClock | None = None,
) -> dict[str, Samples]:
    """Time every candidate `repeats` times, interleaved; each round starts with the next candidate.

    Args:
        candidates: name -> call to time; its result is ignored.
        device: where they compute.
        repeats: samples of each, at least 1.
        warmup: calls of each before the first sample, at least 1, for compilation and autotuning.
        graph: time each call as it runs within a training step on a GPU: as the replay of a CUDA graph, from an L2
            cache that is emptied outside the timed window. Without it, the host's launch gaps are part of the time.
        clock: takes the samples; None = the device's own.

    Returns:
        Samples by name. A candidate that runs out of memory has an `error` instead; the others go on.
    """
    device = torch.device(device)
    if min(repeats, warmup) < 1:
        raise ValueError(f"repeats, warmup: {repeats}, {warmup} given; each must be at least 1")
    if graph and device.type != "cuda":
        raise ValueError(f"graph needs a CUDA device; {device} given")
    clock = clock or (GpuClock(device, graph) if device.type == "cuda" else CpuClock())
    ready: dict[str, Call] = {}
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in candidates}
    peaks: dict[str, float | None] = {}
    errors: dict[str, str] = {}
    order = list(candidates)
    for is_first in [True] + repeats * [False]:
        for name in [name for name in order if name not in errors]:
            try:
                if is_first:
                    peaks[name], ready[name] = clock.prepare(candidates[name], warmup)
                else:
                    taken[name].append(clock.sample(ready[name]))
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                errors[name] = f"out of memory ({(str(error) or type(error).__name__).splitlines()[0]})"
                ready.pop(name, None)
            if name in errors:  # outside the handler, whose traceback holds the candidate's tensors
                clock.release()
        if not is_first:
            order = order[1:] + order[:1]
    return {
        name: Samples(error=errors[name])
        if name in errors
        else Samples(tuple(ms for ms, _ in taken[name]), tuple(host for _, host in taken[name]), peaks[name])
        for name in candidates
    }


class CpuClock:
    """Wall time."""

    def prepare(self, call: Call, warmup: int) -> tuple[float | None, Call]:
        """Call it `warmup` times. Returns (peak memory in GiB, the call to sample)."""
        for _ in range(warmup):
            call()
        status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
        try:
            reset.write_text("5")  # resets the peak of resident memory, see proc_pid_clear_refs(5)
        except OSError:
            return None, call
        call()
        peak = next((line for line in status.read_text().splitlines() if line.startswith("VmHWM:")), None)
        return (int(peak.split()[1]) * 1024 / GIB if peak else None), call

    def sample(self, call: Call) -> tuple[float, float]:
        """(time, host time) in ms."""
        start = time.perf_counter_ns()
        call()
        ms = (time.perf_counter_ns() - start) / 1e6
        return ms, ms

    def release(self) -> None:
        """Free what a failed candidate left."""
        gc.collect()


class GpuClock:
    """CUDA events around a call, or around the replay of its graph."""

    def __init__(self, device: torch.device, graph: bool) -> None:
        self.device, self.graph = device, graph
        # Twice the cache evicts all of it; 256 MiB also keeps the device busy for some 60 us, in which the host queues
        # the sample, so that the events do not measure launch gaps.
        size = max(2 * torch.cuda.get_device_properties(device).L2_cache_size, 256 * 2**20)
        self.flush = torch.empty(size, dtype=torch.int8, device=device) if graph else None

    def prepare(self, call: Call, warmup: int) -> tuple[float, Call]:
        torch.cuda.synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        for _ in range(warmup):
            call()
        if self.graph:
            call = self._captured(call)  # a replay allocates nothing: the capture did
        else:
            call()
        torch.cuda.synchronize(self.device)
        return torch.cuda.max_memory_allocated(self.device) / GIB, call

    def _captured(self, call: Call) -> Call:
        # Capture needs a warm-up on a side stream (pytorch.org/docs/stable/notes/cuda.html, "CUDA Graphs").
        side = torch.cuda.Stream(self.device)
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side):
            call()
        torch.cuda.current_stream(self.device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
            call()
        graph.replay()  # the first replay uploads the graph
        return graph.replay

    def sample(self, call: Call) -> tuple[float, float]:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        stream = torch.cuda.current_stream(self.device)
        torch.cuda.synchronize(self.device)
        if self.flush is not None:
            self.flush.zero_()
        begin.record(stream)
        start = time.perf_counter_ns()
        call()
        host = (time.perf_counter_ns() - start) / 1e6
        end.record(stream)
        end.synchronize()
        return begin.elapsed_time(end), host

    def release(self) -> None:
        gc.collect()
        torch.cuda.empty_cache()
