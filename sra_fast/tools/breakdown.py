"""Breakdown of a step's time by category of work, from a trace of torch.profiler (Chrome trace events, times in us).

On a GPU, the device's kernels, copies and fills count as busy. In a trace without any, from a CPU, every op is busy for
its self time, which excludes the ops it calls.

    window   from the first kernel of one step to the first kernel of a later one, on the busiest stream: whole periods,
             including the gaps between steps, however far ahead the host runs (on a CPU, between beginnings of steps)
    overlap  a moment with several kernels on several streams counts for the first of their categories in the order of
             CATEGORIES; a moment with none is idle
    share    of the window; the shares of all categories add up to 1

So communication counts only where nothing hides it, and idle only where the whole device waits. `busy_ms` has the time
in which a category was busy at all.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any, NamedTuple

GEMM, ATTENTION, NORM, OPTIMIZER, OTHER, COMMUNICATION, IDLE = CATEGORIES = (
    "gemm",
    "attention",
    "norm_elementwise",  # limited by memory bandwidth: norms, elementwise, reductions, copies, random draws
    "optimizer",
    "other",  # matched by no rule: nothing on a GPU; on a CPU views, allocation, dispatch and autograd's own work
    "communication",
    "idle",
)
STAGES = "sra_fast::"  # prefix of the step's record_function ranges
UPDATE = "sra_fast::update"
STEP = re.compile(r"ProfilerStep#(\d+)")

# The first match wins. Kernel names of PyTorch, cuBLAS, cuDNN and NCCL include C++ template arguments, so a flash
# kernel's contains "cutlass". Inductor's contain the names of all fused ops, so an elementwise kernel's may contain
# "mm" or "attention".
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
        # Two helpers of cuDNN's backward pass do not have attention in their names.
        (ATTENTION, r"flash|fmha|sdpa|attention|cudnn::fusion::(compute_dot_do_o|convert_dq)"),
        (GEMM, r"gemm|gemv|cutlass|cublas|nvjet|xmma|splitK|convolve|[dw]grad_|fprop"),
        (GEMM, r"^aten::_?(addmm|mm|bmm|baddbmm|addbmm|addmv|mv|dot)(_\w*)?$|^mkl\w*::\w*linear"),
        (GEMM, r"^aten::_?(\w*_)?convolution"),
        (NORM, r"^Mem(cpy|set)|\bat::|at_cuda_detail|\bcub::|\bcudnn::|elementwise|reduce_kernel"),
        (OTHER, rf"^aten::_?({_VIEWS}|{_CALLERS})(_\w*)?$"),  # these compute nothing themselves, unlike other aten ops
        (NORM, r"^aten::"),
    )
)
Event = dict[str, Any]
Stages = Mapping[str, Sequence[str]]
"""{name of a kernel: the stages of its calls in one step, in order}"""


class Span(NamedTuple):
    """A time in which a kernel or CPU op is busy, in us."""

    start: float
    end: float
    name: str
    stage: str = ""
    """The innermost range of the step that it was launched in."""
    step: int = -1
    """Index of the traced step that launched it (GPU only); -1 = unknown."""
    stream: tuple[Any, ...] = ()
    calls: int = 1
    """0 for the rest of a CPU op after an op that it called."""

    @property
    def category(self) -> str:
        return category(self.name, self.stage)

    def clip(self, start: float, end: float) -> Span:
        calls = self.calls if start <= self.start < end else 0
        return self._replace(start=max(self.start, start), end=min(self.end, end), calls=calls)


@dataclass(frozen=True)
class Kernel:
    """All calls of one kernel, per step. Overlapping kernels may add up to more than the step."""

    name: str
    category: str
    calls: float
    ms: float
    share: float


@dataclass(frozen=True)
class Breakdown:
    """The average traced step."""

    steps: int
    step_ms: float
    ms: dict[str, float]
    """{category: time attributed to it}; adds up to step_ms."""
    busy_ms: dict[str, float]
    """{category: time in which any kernel of it ran}."""
    stages_ms: dict[str, float]
    """{range of the step: time in which any kernel launched in it ran}; "" = launched in none."""
    kernels: tuple[Kernel, ...]
    """Longest first."""

    @property
    def shares(self) -> dict[str, float]:
        """{category: share of the step's time}."""
        return {category: ms / self.step_ms for category, ms in self.ms.items()}


def breakdown(events: Sequence[Event], skip: int = 1, stages: Stages | None = None) -> Breakdown:
    """Attribute the time of the traced steps to categories, stages and kernels.

    Args:
        events: `traceEvents` of a trace with `ProfilerStep#` ranges.
        skip: steps to leave out at the beginning, while the device's queue fills.
        stages: for a CUDA graph, whose kernels are launched outside all ranges: `stages_of` the same step's trace
            without the graph.

    Raises:
        ValueError: if no whole step is left. The last traced step ends the window and is not part of it.
    """
    spans = _gpu_spans(events, stages or {})
    starts = _gpu_step_starts(spans) if spans else _host_step_starts(events)
    spans = spans or _cpu_spans(events)
    starts = starts[skip:]
    if len(starts) < 2:
        raise ValueError(f"{len(starts)} steps with work in them after the first {skip}; at least 2 are needed")
    start, end, steps = starts[0], starts[-1], len(starts) - 1
    spans = [span.clip(start, end) for span in spans if span.end > start and span.start < end]
    to_ms = 1e-3 / steps  # us of all steps -> ms of one
    attributed = attribute(spans)
    attributed[IDLE] = end - start - sum(attributed.values())
    return Breakdown(
        steps=steps,
        step_ms=(end - start) * to_ms,
        ms={category: attributed[category] * to_ms for category in CATEGORIES},
        busy_ms={category: us * to_ms for category, us in busy_time(spans, lambda span: span.category).items()},
        stages_ms={stage: us * to_ms for stage, us in busy_time(spans, lambda span: span.stage).items()},
        kernels=_kernels(spans, steps, end - start),
    )


def _kernels(spans: Iterable[Span], steps: int, window: float) -> tuple[Kernel, ...]:
    calls: Counter[tuple[str, str]] = Counter()
    us: dict[tuple[str, str], float] = defaultdict(float)
    for span in spans:
        calls[span.name, span.category] += span.calls
        us[span.name, span.category] += span.end - span.start
    kernels = [Kernel(*key, calls[key] / steps, time * 1e-3 / steps, time / window) for key, time in us.items()]
    return tuple(sorted(kernels, key=lambda kernel: (-kernel.ms, kernel.name)))


def stages_of(events: Sequence[Event], step: int = 1) -> Stages:
    """The stages of all kernel calls of one step of a GPU trace with ranges; empty for a CPU trace.

    Args:
        events: as for `breakdown`.
        step: index of the traced step.
    """
    stages: dict[str, list[str]] = defaultdict(list)
    for span in sorted(_gpu_spans(events, {})):
        if span.step == step:
            stages[span.name].append(span.stage)
    return stages


@cache
def category(name: str, stage: str = "") -> str:
    """The category of a kernel or CPU op, by its name and the range of the step that launched it. Everything in the
    update except communication counts as the optimizer's."""
    matched = next((category for category, pattern in RULES if pattern.search(name)), OTHER)
    return OPTIMIZER if stage == UPDATE and matched != COMMUNICATION else matched


def _select(events: Iterable[Event], *categories: str) -> list[Event]:
    """The complete events of Chrome's trace categories."""
    return [event for event in events if event.get("ph") == "X" and event.get("cat") in categories]


def _gpu_spans(events: Sequence[Event], known_stages: Stages) -> list[Span]:
    """Spans of a GPU's kernels, copies and fills. The correlation id of a kernel identifies the call that launched it,
    and with it its range and step; all kernels of a CUDA graph have the same launch."""
    calls = _select(events, "cuda_runtime", "cuda_driver")
    launch_times = {e["args"]["correlation"]: e["ts"] for e in calls if "correlation" in e.get("args", {})}
    steps, ranges = _host_step_starts(events), _Ranges(events)
    spans: list[Span] = []
    counts: Counter[tuple[int, str]] = Counter()
    for event in sorted(_select(events, "kernel", "gpu_memcpy", "gpu_memset"), key=lambda event: event["ts"]):
        name, launched = event["name"], launch_times.get(event["args"].get("correlation"), -1.0)
        step = bisect_right(steps, launched) - 1  # -1: launched before the first step, or launch not recorded
        known, number = known_stages.get(name, ()), counts[step, name]
        stage = ranges.at(launched) or (known[number] if number < len(known) else "")
        counts[step, name] += 1
        spans.append(Span(event["ts"], event["ts"] + event["dur"], name, stage, step, (event["pid"], event["tid"])))
    return spans


def _gpu_step_starts(spans: Sequence[Span]) -> list[float]:
    """Start of each step's first kernel on the busiest stream."""
    busy: dict[tuple[Any, ...], float] = defaultdict(float)
    for span in spans:
        busy[span.stream] += span.end - span.start
    busiest = max(busy, key=lambda stream: busy[stream])
    starts: dict[int, float] = {}
    for span in sorted(spans):
        if span.stream == busiest and span.step >= 0:
            starts.setdefault(span.step, span.start)
    return [start for _, start in sorted(starts.items())]


def _host_step_starts(events: Iterable[Event]) -> list[float]:
    """When the host began each step."""
    return sorted(event["ts"] for event in _select(events, "user_annotation") if STEP.fullmatch(event["name"]))


def _cpu_spans(events: Sequence[Event]) -> list[Span]:
    """Self times of a CPU's ops."""
    threads: dict[Any, list[Event]] = defaultdict(list)
    for event in _select(events, "cpu_op"):
        threads[event["pid"], event["tid"]].append(event)
    ranges = _Ranges(events)
    return [span for ops in threads.values() for span in _self_times(ops, ranges)]


def _self_times(ops: Iterable[Event], ranges: _Ranges) -> Iterator[Span]:
    """The ops of one thread without the ops they call; an op that calls three others gives four spans."""
    running: list[Span] = []  # call stack, outermost first; `start` is where the op last resumed

    def finish(moment: float) -> Iterator[Span]:
        """Pop the ops that end by this moment."""
        while running and running[-1].end <= moment:
            finished = running.pop()
            yield finished
            if running:
                running[-1] = running[-1]._replace(start=finished.end)

    for event in sorted(ops, key=lambda event: (event["ts"], -event["dur"])):
        yield from finish(event["ts"])
        span = Span(event["ts"], event["ts"] + event["dur"], event["name"], ranges.at(event["ts"]))
        if running:
            span = span._replace(end=min(span.end, running[-1].end))  # rounding may put it past its caller's end
            yield running[-1]._replace(end=span.start)
            running[-1] = running[-1]._replace(calls=0)
        running.append(span)
    yield from finish(float("inf"))


class _Ranges:
    """The step's ranges of all threads: the backward pass launches kernels from another thread than the range's."""

    def __init__(self, events: Iterable[Event]) -> None:
        ranges = [event for event in _select(events, "user_annotation") if event["name"].startswith(STAGES)]
        self._ranges = sorted((event["ts"], event["ts"] + event["dur"], event["name"]) for event in ranges)
        self._starts = [start for start, _, _ in self._ranges]

    def at(self, moment: float) -> str:
        """Name of the innermost range at that moment, or an empty string."""
        for index in reversed(range(bisect_right(self._starts, moment))):
            _, end, name = self._ranges[index]
            if moment < end:
                return name
        return ""


def attribute(spans: Sequence[Span]) -> dict[str, float]:
    """{category: us in which it is the first of the busy ones in the order of CATEGORIES}."""
    edges = [(span.start, 1, span.category) for span in spans] + [(span.end, -1, span.category) for span in spans]
    edges.sort(key=lambda edge: edge[0])
    us: dict[str, float] = dict.fromkeys(CATEGORIES, 0.0)
    active: Counter[str] = Counter()
    for (moment, change, label), (following, _, _) in pairwise(edges):
        active[label] += change
        busy = next((category for category in CATEGORIES if active[category]), None)
        if busy:
            us[busy] += following - moment
    return us


def busy_time(spans: Iterable[Span], key: Callable[[Span], str]) -> dict[str, float]:
    """{key of a span: us in which any span with this key is busy}."""
    us: dict[str, float] = defaultdict(float)
    covered_until: dict[str, float] = {}
    for span in sorted(spans):
        label = key(span)
        covered = covered_until.get(label, span.start)
        us[label] += max(0.0, span.end - max(span.start, covered))
        covered_until[label] = max(span.end, covered)
    return dict(us)
