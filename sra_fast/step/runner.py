"""Executes the steps of a run: eager, compiled, or as one CUDA graph over fixed buffers.

All three compute the same. On a GPU all three read fixed buffers, to which the next batch is copied while the previous
step runs; with the graph the host does one copy and one launch per step.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sra_fast.data.stream import Batch
from sra_fast.step.graph import Captured
from sra_fast.step.inputs import Prefetch, scalar
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
        if self._prefetch is None:
            self._prefetch = self._allocate(batch.x)
        self._prefetch(batch, lr, weight)
        self._execute()

    @property
    def failure(self) -> str | None:
        """Why there is no CUDA graph, if capturing one failed."""
        return next((graph.failure for graph in self._graphs if graph.failure), None)

    def _allocate(self, x: Tensor) -> Prefetch:
        """Buffers for batches whose x has this shape and dtype, and graphs over these buffers."""
        prefetch = Prefetch(tuple(x.shape), self.device, x.dtype)
        self._inputs = prefetch.fixed
        parts = self.step.config.train.accumulate
        if parts <= MAX_UNROLLED:
            (self._execute,) = self._graph_of(self._run_step)
            return prefetch
        self._micro_batch = Batch(*(tensor.clone() for tensor in self._inputs.batch.split(parts)[0]))
        self._sums = [torch.zeros_like(parameter, dtype=torch.float32) for parameter in self.state.trained]
        self._losses = torch.zeros(3, device=self.device)
        self._accumulate, self._finish = self._graph_of(self._add_gradients, self._apply_sums)
        self._execute = self._run_micro_batches
        return prefetch

    def _graph_of(self, *functions: Callable[[], None]) -> list[Callable[[], None]]:
        """The functions as CUDA graphs, which share a stream and a memory pool; unchanged without graphs."""
        if not self._use_graph:
            return list(functions)
        stream, pool = torch.cuda.Stream(self.device), torch.cuda.graph_pool_handle()
        self._graphs = [Captured(function, stream, pool, report=self._report_failure) for function in functions]
        return list(self._graphs)

    def _run_step(self) -> None:
        inputs = self._inputs
        self.ring.push(self.step(self.state, inputs.batch, inputs.lr, inputs.weight))

    def _run_micro_batches(self) -> None:
        for micro_batch in self._inputs.batch.split(self.step.config.train.accumulate):
            for buffer, tensor in zip(self._micro_batch, micro_batch, strict=True):
                buffer.copy_(tensor)
            self._accumulate()
        self._finish()

    def _add_gradients(self) -> None:
        gradients, losses = self.step.gradients(self.state, self._micro_batch, self._inputs.weight)
        torch._foreach_add_(self._sums, gradients)
        self._losses.add_(losses)

    def _apply_sums(self) -> None:
        self.ring.push(self.step.apply(self.state, self._sums, self._losses, self._inputs.lr))
        torch._foreach_zero_([*self._sums, self._losses])


def _uses_fixed_buffers(device: torch.device) -> bool:
    return device.type == "cuda"
