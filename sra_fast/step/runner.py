"""Executes the steps of a run: eager, compiled, or as one CUDA graph over fixed buffers.

All three give the same result. On a GPU all three read fixed buffers, to which the next batch is copied while the
previous step runs; with the graph the host does one copy and one launch per step (of up to 8 micro-batches).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch

from sra_fast.data.stream import Batch
from sra_fast.step.graph import Captured
from sra_fast.step.inputs import Inputs, Prefetch, scalar
from sra_fast.step.ring import MetricRing
from sra_fast.step.state import TrainState
from sra_fast.step.step import TrainingStep

MAX_UNROLLED = 8  # micro-batches in one graph


class StepRunner:
    """Executes steps and keeps their metrics.

    Args:
        step: what to execute.
        state: what it trains.
        ring: where metrics go.
        execution: "eager", "compiled" or "graph" (a CUDA graph of the compiled step).
        report_failure: called with one line if the graph cannot be captured; None = print it to stderr.
    """

    def __init__(
        self,
        step: TrainingStep,
        state: TrainState,
        ring: MetricRing,
        execution: str,
        report_failure: Callable[[str], None] | None = None,
    ) -> None:
        self.step, self.state, self.ring = step, state, ring
        self.device = ring.buffer.device
        self._use_graph, self._report_failure = execution == "graph", report_failure
        self._graphs: list[Captured] = []
        self._prefetch: Prefetch | None = None
        self._run: Callable[[], None] | None = None  # one step from the fixed buffers
        if execution != "eager":
            step.compile(state)

    def __call__(self, batch: Batch, lr: float, weight: float) -> None:
        """One optimizer step.

        Args:
            batch: all images of the step, on any device.
            lr, weight: learning rate and alignment weight.
        """
        if not _uses_fixed_buffers(self.device):
            self.ring.push(self.step(self.state, batch, scalar(lr, self.device), scalar(weight, self.device)))
            return
        if self._prefetch is None or self._run is None:
            self._prefetch = Prefetch(tuple(batch.x.shape), self.device, batch.x.dtype)
            self._run = self._over(self._prefetch.fixed)
        self._prefetch(batch, lr, weight)
        self._run()

    @property
    def failure(self) -> str | None:
        """Why there is no CUDA graph, if capturing one failed."""
        return next((graph.failure for graph in self._graphs if graph.failure), None)

    def _over(self, inputs: Inputs) -> Callable[[], None]:
        """A function that runs one step on fixed buffers, with one graph, or with two for many micro-batches."""
        if self.step.sync or self.step.parts_per_process <= MAX_UNROLLED:
            (run,) = self._as_graphs(partial(self._run_step, inputs))
            return run
        micro_batches = _MicroBatches(self.step, self.state, self.ring, inputs)
        return partial(micro_batches.run, *self._as_graphs(micro_batches.add_gradients, micro_batches.update))

    def _run_step(self, inputs: Inputs) -> None:
        self.ring.push(self.step(self.state, inputs.batch, inputs.lr, inputs.weight))

    def _as_graphs(self, *functions: Callable[[], None]) -> Sequence[Callable[[], None]]:
        """The functions as CUDA graphs, which share a stream and a memory pool; unchanged without graphs."""
        if not self._use_graph:
            return functions
        stream, pool = torch.cuda.Stream(self.device), torch.cuda.MemPool()
        self._graphs = [Captured(function, stream, pool, report=self._report_failure) for function in functions]
        return self._graphs


class _MicroBatches:
    """A step of more micro-batches than a graph holds: one function adds a micro-batch's gradients, another updates the
    state. Both work on fixed buffers."""

    def __init__(self, step: TrainingStep, state: TrainState, ring: MetricRing, inputs: Inputs) -> None:
        self._step, self._state, self._ring, self._inputs = step, state, ring, inputs
        self._parts = step.parts_per_process
        self._batch = Batch(*(tensor.clone() for tensor in inputs.batch.split(self._parts)[0]))
        self._sums = [torch.zeros_like(parameter, dtype=torch.float32) for parameter in state.trained]
        self._losses = inputs.x.new_zeros(3, dtype=torch.float32)

    def run(self, add_gradients: Callable[[], None], update: Callable[[], None]) -> None:
        """One step by the two functions below, or by graphs of them."""
        for micro_batch in self._inputs.batch.split(self._parts):
            for buffer, tensor in zip(self._batch, micro_batch, strict=True):
                buffer.copy_(tensor)
            add_gradients()
        update()

    def add_gradients(self) -> None:
        """Add gradients and losses of the micro-batch in the buffer."""
        gradients, losses = self._step.gradients(self._state, self._batch, self._inputs.weight)
        torch._foreach_add_(self._sums, gradients)
        self._losses.add_(losses)

    def update(self) -> None:
        """Update the state from the sums, and clear them."""
        self._ring.push(self._step.apply(self._state, self._sums, self._losses, None, self._inputs.lr))
        torch._foreach_zero_([*self._sums, self._losses])


def _uses_fixed_buffers(device: torch.device) -> bool:
    return device.type == "cuda"
