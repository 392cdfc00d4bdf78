"""A function of fixed buffers as one CUDA graph: one launch by the host for all of its kernels."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import suppress

import torch

WARM_UP = 3
"""Ordinary calls before the capture: compilation, autotuning and the libraries' workspaces belong there."""


class Captured:
    """Calls a function as it stands at first, then captures it, and from then on replays the capture.

    Every call does its work exactly once: a capture only records, and is followed by its first replay. Calls are in
    order with everything else on the current stream. If the capture fails, the reason is said and calls go on as they
    began.

    Args:
        function: without arguments or results; reads and writes buffers that stay where they are.
        stream: of their own for warm-up and capture: the default stream cannot be captured, and what autograd remembers
            of streams must be the same in both. Graphs that share a pool share it too.
        pool: of memory, from `torch.cuda.graph_pool_handle`, to be shared by graphs that run one after the other.
        warm_up: ordinary calls before the capture.
        say: where the reason of a failure goes.
    """

    def __init__(
        self,
        function: Callable[[], None],
        stream: torch.cuda.Stream,
        pool: tuple[int, int],
        warm_up: int = WARM_UP,
        say: Callable[[str], None] | None = None,
    ) -> None:
        self._function, self._stream, self._pool = function, stream, pool
        self._say = say or (lambda line: print(line, file=sys.stderr))
        self._before = warm_up
        self._graph: torch.cuda.CUDAGraph | None = None
        self._broken: torch.cuda.CUDAGraph | None = None
        self.failure: str | None = None
        """Why there is no graph, if a capture was tried in vain."""

    @property
    def captured(self) -> bool:
        """Whether calls are replays."""
        return self._graph is not None

    def __call__(self) -> None:
        if self._graph is None and self._before == 0 and self.failure is None:
            self._capture()
        if self._graph is not None:
            self._graph.replay()
            return
        self._before = max(0, self._before - 1)
        current = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            self._function()
        current.wait_stream(self._stream)

    def _capture(self) -> None:
        before, graph = torch.cuda.current_stream(self._stream.device), torch.cuda.CUDAGraph()
        try:
            # thread_local: a reader's thread may talk to the device meanwhile, which in the default mode would spoil
            # the capture.
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                self._function()
        except Exception as error:  # of any kind: what cannot be captured can still be run
            self._give_up(error, graph, before)
        else:
            self._graph = graph

    def _give_up(self, error: BaseException, graph: torch.cuda.CUDAGraph, before: torch.cuda.Stream) -> None:
        """Back to where the capture began. torch.cuda.graph does not get there by itself if ending the capture fails
        too: the stream stays current, the pool open, and the random generator in the belief that it is captured."""
        while error.__context__ is not None:  # the end of a broken capture only says that it is broken
            error = error.__context__
        self.failure = (str(error) or type(error).__name__).splitlines()[0]
        self._say(f"no CUDA graph: {self.failure}; steps are launched kernel by kernel, which is slower")
        self._broken = graph  # the allocator may still point to it
        torch.cuda.set_stream(before)
        torch.cuda.synchronize(before.device)
        index = before.device.index
        with suppress(Exception):
            torch._C._cuda_endAllocateToPool(index, self._pool)
        with suppress(Exception):
            generator = torch.cuda.default_generators[index]
            generator.graphsafe_set_state(generator.clone_state())
