"""How a step is executed: as it stands, compiled, or as one CUDA graph over fixed buffers.

All three compute the same. On a GPU all three read fixed buffers that the next batch travels to while the step before
runs; the graph leaves the host one copy and one launch per step.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sra_fast.config import refuse_unless
from sra_fast.data.stream import Batch
from sra_fast.model.attention import PACKAGES
from sra_fast.step.graph import Captured
from sra_fast.step.inputs import Prefetch, scalar
from sra_fast.step.state import TrainState
from sra_fast.step.step import MetricRing, TrainingStep

EXECUTIONS = {
    "eager": "eager",
    "compiled": "compiled by torch.compile, in the first steps",
    "graph": "one CUDA graph of the compiled step, captured after the first steps",
}
MOST_UNROLLED = 8  # micro-batches within one graph


def choose_execution(wish: str, device: torch.device) -> str:
    """ "eager", "compiled" or "graph". auto: the graph on a GPU; on a CPU the step as it stands, because there
    compiling takes a minute or two that short runs never earn back.

    Raises:
        Refused: for a wish that cannot be granted here.
    """
    gpu = device.type == "cuda"
    if wish == "eager" or (wish == "auto" and not gpu):
        return "eager"
    reason = _why_not_compiled(device)
    refuse_unless(wish == "auto" or reason is None, "train.execution", wish, f"needs {reason}")
    refuse_unless(
        wish != "graph" or gpu, "train.execution", wish, "needs an NVIDIA GPU; must be auto, eager or compiled"
    )
    if wish != "auto":
        return wish
    return "graph" if reason is None else "eager"


def _why_not_compiled(device: torch.device) -> str | None:
    """What torch.compile lacks on this machine."""
    if device.type == "cuda":
        from torch.utils._triton import has_triton

        return None if has_triton() else "Triton (pip install triton)"
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        get_cpp_compiler()
    except Exception:  # Inductor's own kind of error
        return "a C++ compiler (g++ or clang++)"
    return None


def _can_fetch_ahead(device: torch.device) -> bool:
    return device.type == "cuda"


class StepRunner:
    """Executes the steps of a run and keeps their metrics.

    Args:
        step: what to execute.
        state: what it trains.
        ring: where metrics go.
        execution: "eager", "compiled" or "graph", see `choose_execution`. "graph" is a graph of the compiled step.
        attention: the run's backend.
        say: where a failed capture is announced; None = stderr.
    """

    def __init__(
        self,
        step: TrainingStep,
        state: TrainState,
        ring: MetricRing,
        execution: str,
        attention: str = "sdpa",
        say: Callable[[str], None] | None = None,
    ) -> None:
        self.step, self.state, self.ring = step, state, ring
        self.device = ring.buffer.device
        self._graphs: list[Captured] = []
        if execution != "eager":
            step.compile(state, whole=attention not in PACKAGES)
        self._has_fixed_buffers = _can_fetch_ahead(self.device)
        self._wants_graph, self._say, self._prefetch = execution == "graph", say, None

    def __call__(self, batch: Batch, lr: float, weight: float) -> None:
        """One optimizer step on a whole batch.

        Args:
            batch: on any device.
            lr, weight: learning rate and alignment weight.
        """
        if self._has_fixed_buffers:
            if self._prefetch is None:
                self._prepare(batch.x)
            self._prefetch(batch, lr, weight)
            self._step_from_fixed()
            return
        lr, weight = scalar(lr, self.device), scalar(weight, self.device)
        self.ring.push(self.step(self.state, *batch, lr, weight))

    @property
    def failure(self) -> str | None:
        """Why there is no CUDA graph although one was wanted."""
        return next((graph.failure for graph in self._graphs if graph.failure), None)

    def _prepare(self, x: Tensor) -> None:
        """Make the buffers for batches like this one's x, and what steps from them."""
        graph, parts = self._wants_graph, self.step.config.train.accumulate
        self._prefetch = Prefetch(tuple(x.shape), self.device, x.dtype)
        if graph:
            stream, pool = torch.cuda.Stream(self.device), torch.cuda.graph_pool_handle()

        def captured(function: Callable[[], None]) -> Callable[[], None]:
            if not graph:
                return function
            self._graphs.append(Captured(function, stream, pool, say=self._say))
            return self._graphs[-1]

        whole = self._prefetch.fixed
        if parts <= MOST_UNROLLED:

            def all_at_once() -> None:
                metrics = self.step(self.state, whole.x, whole.labels, whole.number, whole.lr, whole.weight)
                self.ring.push(metrics)

            self._step_from_fixed = captured(all_at_once)
            return
        size = len(whole.labels) // parts
        micro = (whole.x[:size].clone(), whole.labels[:size].clone(), whole.number[:size].clone())
        sums = [torch.zeros_like(parameter, dtype=torch.float32) for parameter in self.state.trained]
        losses = torch.zeros(3, device=self.device)

        def accumulate() -> None:
            gradients, its_losses = self.step.gradients(self.state, *micro, whole.weight)
            torch._foreach_add_(sums, gradients)
            losses.add_(its_losses)

        def finish() -> None:
            self.ring.push(self.step.apply(self.state, sums, losses, whole.lr))
            torch._foreach_zero_([*sums, losses])

        accumulate, finish = captured(accumulate), captured(finish)

        def one_by_one() -> None:
            for k in range(parts):
                for held, given in zip(micro, (whole.x, whole.labels, whole.number), strict=True):
                    held.copy_(given[k * size : (k + 1) * size])
                accumulate()
            finish()

        self._step_from_fixed = one_by_one
