"""Where the time of a step went, read from a trace of torch.profiler (Chrome's trace events, times in us).

What was busy, and when, comes from the device's kernels, copies and fills. A trace without any is a CPU's: there every
op is busy for its self time, the time in it that no op called by it takes, so that no moment counts twice.

    window   from the first kernel of one step to the first kernel of another, on the busiest stream: whole periods
             with the gaps between steps, however far the host and its copies run ahead (on a CPU, from the beginning
             of a step to that of another)
    moment   one with nothing busy is idle; one with several kernels at once, on several streams, belongs to the first
             of their categories in the order of CATEGORIES
    share    of the window; the shares of CATEGORIES add up to 1

So communication counts where nothing hides it, and idle where the device truly waits; `busy_ms` has each category's
own time, whatever ran beside it.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any, NamedTuple

GEMM, ATTENTION, NORM, OPTIMIZER, OTHER, COMMUNICATION, IDLE = CATEGORIES = (
    "gemm",
    "attention",
    "norm_elementwise",  # whatever is a matter of bytes: normalisation, elementwise, reductions, copies, random draws
    "optimizer",
    "other",  # what no rule knows: nothing, on a GPU; views, allocation, dispatch and autograd's own work, on a CPU
    "communication",
    "idle",
)
STAGES = "sra_fast::"  # the step's record_function ranges begin with it
UPDATE = "sra_fast::update"
STEP = re.compile(r"ProfilerStep#(\d+)")

# First match wins. Kernels of PyTorch, cuBLAS, cuDNN and NCCL carry their names' C++ and template arguments, so that a
# flash kernel's has "cutlass" in it; Inductor's carry the names of all ops fused into them, so that an elementwise
# kernel's may have "mm" or "attention" in it.
_VIEWS = (
    r"as_strided|(unsafe_)?view|reshape|transpose|permute|expand|slice|select|narrow|split|chunk|t|alias|detach|"
    r"squeeze|unsqueeze|flatten|unflatten|unbind"
)
_CALLERS = r"empty|to|to_copy|clone|contiguous|linear|matmul|resolve|promote|result|item|is|lift|resize"
RULES = tuple(
    (category, re.compile(pattern))
    for category, pattern in (
        (COMMUNICATION, r"^(nccl|gloo:|_?c10d)"),
        (ATTENTION, r"^triton_(tem_)?\w*flex_\w*attention"),
        (GEMM, r"^triton_(tem_|mm)"),
        (OPTIMIZER, r"^(sra_fast::)?\w*(adamw|gradient_norm)\w*$|\bsra::|FusedAdam|^aten::_fused_adam"),
        (NORM, r"^(graph_\d+_)?(triton|cpp)_"),
        (NORM, r"^(sra_fast::)?\w*(adaln|gated_residual|alignment|perturb)\w*$"),
        # cuDNN's backward has two helpers that name no attention.
        (ATTENTION, r"flash|fmha|sdpa|attention|cudnn::fusion::(compute_dot_do_o|convert_dq)"),
        (GEMM, r"gemm|gemv|cutlass|cublas|nvjet|xmma|splitK|convolve|[dw]grad_|fprop"),
        (GEMM, r"^aten::_?(addmm|mm|bmm|baddbmm|addbmm|addmv|mv|dot)(_\w*)?$|^mkl\w*::\w*linear"),
        (GEMM, r"^aten::_?(\w*_)?convolution"),
        (NORM, r"^Mem(cpy|set)|\bat::|at_cuda_detail|\bcub::|\bcudnn::|elementwise|reduce_kernel"),
        (OTHER, rf"^aten::_?({_VIEWS}|{_CALLERS})(_\w*)?$"),  # compute nothing themselves, as all others of aten do
        (NORM, r"^aten::"),
    )
)
Event = dict[str, Any]
Stages = Mapping[str, Sequence[str]]


class Span(NamedTuple):
    """Something busy from `start` to `end` (us)."""

    start: float
    end: float
    name: str
    stage: str = ""
    """The innermost of the step's ranges that it was launched in."""
    step: int = -1
    """Number of the step that launched it, of those traced; only of a GPU's."""
    calls: int = 1
    """0 for what is left of a CPU op after an op that it called."""


@dataclass(frozen=True)
class Kernel:
    """All calls of one kernel, per step. Times of kernels on several streams may add up to more than the step."""

    name: str
    category: str
    calls: float
    ms: float
    share: float


@dataclass(frozen=True)
class Breakdown:
    """One step, averaged over those traced."""

    steps: int
    step_ms: float
    ms: dict[str, float]
    """Category -> time attributed to it; adds up to step_ms."""
    busy_ms: dict[str, float]
    """Category -> time in which any kernel of it ran."""
    stages_ms: dict[str, float]
    """Range of the step -> time in which any kernel launched in it ran; "" = launched in none."""
    kernels: tuple[Kernel, ...]
    """Longest first."""

    @property
    def shares(self) -> dict[str, float]:
        """Category -> share of the step's time."""
        return {category: ms / self.step_ms for category, ms in self.ms.items()}


def breakdown(events: Sequence[Event], skip: int = 1, stages: Stages | None = None) -> Breakdown:
    """Attribute the time of the traced steps.

    Args:
        events: `traceEvents` of a trace with `ProfilerStep#` ranges.
        skip: steps at the beginning to leave out, because the device's queue was still empty.
        stages: from `stages_of` the same steps launched kernel by kernel, for the trace of a CUDA graph, whose kernels
            were launched all at once and in no range.

    Raises:
        ValueError: if no whole step is left. The last step traced ends the window and is not part of it.
    """
    complete = [event for event in events if event.get("ph") == "X"]
    if found := _device(complete, stages or {}):
        spans, first = found
        bounds = [moment for _, moment in sorted(first.items())]
    else:
        spans, bounds = _host(complete)
    bounds = bounds[skip:]
    if len(bounds) < 2:
        raise ValueError(f"{len(bounds)} steps with work in them after the first {skip}; at least 2 are needed")
    start, end, steps = bounds[0], bounds[-1], len(bounds) - 1
    spans = [s._replace(start=max(s.start, start), end=min(s.end, end), calls=s.calls * (start <= s.start < end))
             for s in spans if s.end > start and s.start < end]  # fmt: skip
    labels = [category(span.name, span.stage) for span in spans]
    ms = 1e-3 / steps  # us of all steps -> ms of one
    attributed = _attributed(spans, labels)
    attributed[IDLE] = end - start - sum(attributed.values())
    totals: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0, 0.0])
    for span, label in zip(spans, labels, strict=True):
        total = totals[span.name, label]
        total[0] += span.calls
        total[1] += span.end - span.start
    kernels = [
        Kernel(name, label, calls / steps, time * ms, time / (end - start))
        for (name, label), (calls, time) in totals.items()
    ]
    return Breakdown(
        steps=steps,
        step_ms=(end - start) * ms,
        ms={label: attributed[label] * ms for label in CATEGORIES},
        busy_ms={label: time * ms for label, time in _union(spans, labels).items()},
        stages_ms={stage: time * ms for stage, time in _union(spans, [span.stage for span in spans]).items()},
        kernels=tuple(sorted(kernels, key=lambda kernel: (-kernel.ms, kernel.name))),
    )


def stages_of(events: Sequence[Event], step: int = 1) -> Stages:
    """The stages of all calls of a kernel in one step, in their order, from a GPU trace with ranges; empty for a CPU's.

    Args:
        events: as for `breakdown`.
        step: which of those traced.
    """
    found = _device([event for event in events if event.get("ph") == "X"], {})
    stages: dict[str, list[str]] = defaultdict(list)
    for span in sorted(found[0] if found else ()):
        if span.step == step:
            stages[span.name].append(span.stage)
    return stages


@cache
def category(name: str, stage: str = "") -> str:
    """What a kernel or CPU op counts as.

    Args:
        name: as the trace has it.
        stage: range of the step that it was launched in. All that the update launches is the optimizer's, but for
            communication.
    """
    found = next((label for label, pattern in RULES if pattern.search(name)), OTHER)
    return OPTIMIZER if stage == UPDATE and found != COMMUNICATION else found


def _device(events: Sequence[Event], known: Stages) -> tuple[list[Span], dict[int, float]] | None:
    """(busy times of a GPU, number of each step -> its first), None without a GPU. Kernels know the call that launched
    them by its correlation id, and with it their range and their step; all kernels of a CUDA graph share one launch."""
    kernels = [event for event in events if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    if not kernels:
        return None
    calls = [event for event in events if event.get("cat") in ("cuda_runtime", "cuda_driver")]
    launched = {event["args"]["correlation"]: event["ts"] for event in calls if "correlation" in event.get("args", {})}
    begun, ranges = _steps(events), _Ranges(events)
    busy: Counter[Any] = Counter()
    for event in kernels:
        busy[event["pid"], event["tid"]] += event["dur"]
    ((main, _),) = busy.most_common(1)
    spans, first = [], {}
    made: Counter[tuple[int, str]] = Counter()
    for event in sorted(kernels, key=lambda event: event["ts"]):
        moment, name = launched.get(event["args"].get("correlation"), -1.0), event["name"]
        step = bisect_right(begun, moment) - 1  # -1: launched before the first step, or nobody knows when
        alike, number = known.get(name, ()), made[step, name]
        stage = ranges.at(moment) or (alike[number] if number < len(alike) else "")
        made[step, name] += 1
        spans.append(_span(event, stage, step))
        if (event["pid"], event["tid"]) == main:
            first.setdefault(step, event["ts"])
    first.pop(-1, None)
    return spans, first


def _host(events: Sequence[Event]) -> tuple[list[Span], list[float]]:
    """(self times of a CPU's ops, beginning of each step)."""
    threads: dict[Any, list[Event]] = defaultdict(list)
    for event in events:
        if event.get("cat") == "cpu_op":
            threads[event["pid"], event["tid"]].append(event)
    stages = _Ranges(events)
    spans = [span for ops in threads.values() for span in _self_times(ops, stages)]
    return spans, _steps(events)


def _self_times(ops: Iterable[Event], stages: _Ranges) -> Iterable[Span]:
    """The ops of one thread without what the ops they call take; an op interrupted by three others has four spans."""
    running: list[Span] = []  # from the outermost to the one that computes; `start` is where it last went on

    def until(moment: float) -> Iterable[Span]:
        while running and running[-1].end <= moment:
            done = running.pop()
            yield done
            if running:
                running[-1] = running[-1]._replace(start=done.end)

    for event in sorted(ops, key=lambda event: (event["ts"], -event["dur"])):
        yield from until(event["ts"])
        span = _span(event, stages.at(event["ts"]))
        if running:
            # Times are rounded: what begins inside ends inside.
            span = span._replace(end=min(span.end, running[-1].end))
            yield running[-1]._replace(end=span.start)
            running[-1] = running[-1]._replace(calls=0)
        running.append(span)
    yield from until(float("inf"))


def _span(event: Event, stage: str, step: int = -1) -> Span:
    return Span(event["ts"], event["ts"] + event["dur"], event["name"], stage, step)


def _steps(events: Iterable[Event]) -> list[float]:
    """When the host began each step."""
    return sorted(e["ts"] for e in events if e.get("cat") == "user_annotation" and STEP.fullmatch(e["name"]))


class _Ranges:
    """The step's own ranges. The backward pass launches from a thread of its own while the range waits in another, so
    that threads do not matter."""

    def __init__(self, events: Iterable[Event]) -> None:
        found = [e for e in events if e.get("cat") == "user_annotation" and e["name"].startswith(STAGES)]
        self._ranges = sorted((event["ts"], event["ts"] + event["dur"], event["name"]) for event in found)
        self._starts = [start for start, _, _ in self._ranges]

    def at(self, moment: float) -> str:
        """The innermost at that moment, or an empty string."""
        for index in reversed(range(bisect_right(self._starts, moment))):
            _, end, name = self._ranges[index]
            if moment < end:
                return name
        return ""


def _attributed(spans: Sequence[Span], labels: Sequence[str]) -> Counter[str]:
    """Category -> us in which it is the first of those busy."""
    edges = [
        edge
        for span, label in zip(spans, labels, strict=True)
        for edge in ((span.start, 1, label), (span.end, -1, label))
    ]
    time, active = Counter(dict.fromkeys(CATEGORIES, 0.0)), Counter()
    edges.sort(key=lambda edge: edge[0])
    for (moment, change, label), (following, _, _) in pairwise([*edges, (edges[-1][0], 0, "")] if edges else ()):
        active[label] += change
        if following > moment and (busy := next((c for c in CATEGORIES if active[c]), None)):
            time[busy] += following - moment
    return time


def _union(spans: Sequence[Span], labels: Sequence[str]) -> dict[str, float]:
    """Label -> us in which any span of it is busy."""
    time: Counter[str] = Counter()
    reached: dict[str, float] = {}
    for span, label in sorted(zip(spans, labels, strict=True)):
        time[label] += max(0.0, span.end - max(span.start, reached.get(label, span.start)))
        reached[label] = max(span.end, reached.get(label, span.end))
    return dict(time)
