"""A function over fixed buffers as one CUDA graph: the host launches all of its kernels at once."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch

from sra_fast.progress import warn

WARM_UP = 3  # calls before the capture: compilation, autotuning and the libraries' workspaces must not be captured


class Captured:
    """Runs a function a few times, captures it in a CUDA graph, and replays the graph from then on.

    Every call does the work exactly once: a capture only records, and the first replay follows at once. Calls are
    ordered with all other work on the current stream. If the capture fails, the reason is reported and calls keep
    running the function.

    Args:
        function: without arguments or results; reads and writes buffers that are never reallocated.
        stream: for warm-up and capture. The default stream cannot be captured, and autograd remembers streams, so that
            both need the same one. Graphs that share a pool also share the stream.
        pool: of memory; graphs that run one after the other can share it.
        warm_up: calls before the capture.
        report: called with one line if the capture fails; None = print it to stderr.

    Attributes:
        failure: why there is no graph, if the capture failed.
    """

    def __init__(
        self,
        function: Callable[[], None],
        stream: torch.cuda.Stream,
        pool: torch.cuda.MemPool,
        warm_up: int = WARM_UP,
        report: Callable[[str], None] | None = None,
    ) -> None:
        self._function, self._stream = function, stream
        self._pool: torch.cuda.MemPool | None = pool
        self._report = report or warn
        self._warm_up_left = warm_up
        self._graph: torch.cuda.CUDAGraph | None = None
        self.failure: str | None = None

    @property
    def captured(self) -> bool:
        """Whether calls are replays."""
        return self._graph is not None

    def __call__(self) -> None:
        if self._graph is None and self._warm_up_left == 0 and self.failure is None:
            self._capture()
        if self._graph is not None:
            self._graph.replay()
            return
        self._warm_up_left = max(0, self._warm_up_left - 1)
        current = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            self._function()
        current.wait_stream(self._stream)

    def _capture(self) -> None:
        pool, self._pool = self._pool, None
        assert pool is not None, "there is only one attempt"
        current, users = torch.cuda.current_stream(self._stream.device), pool.use_count()
        graph = torch.cuda.CUDAGraph()
        try:
            # thread_local: in the default mode, CUDA calls of the data reader's thread would invalidate the capture.
            options: Any = {"pool": pool.id, "stream": self._stream, "capture_error_mode": "thread_local"}
            with torch.cuda.graph(graph, **options):
                self._function()
        except Exception as error:  # of any kind: what cannot be captured can still be run
            self.failure = _first_line(error)
        else:
            self._graph, self._pool = graph, pool
            return
        del graph
        _recover(pool, users, current)
        del pool  # its memory was for the activations of the whole step, which the next calls need elsewhere
        torch.cuda.empty_cache()
        self._report(f"no CUDA graph: {self.failure}; steps are launched kernel by kernel, which is slower")


def _recover(pool: torch.cuda.MemPool, users: int, current: torch.cuda.Stream) -> None:
    """Restore what torch.cuda.graph leaves behind if a capture fails: the current stream, the allocator's pool, and the
    state of the random generator.

    Args:
        pool: of the capture.
        users: of the pool before the capture.
        current: the stream that was current before the capture.
    """
    torch.cuda.set_stream(current)
    torch.cuda.synchronize(current.device)
    index = current.device.index
    with suppress(Exception):
        # CUDAGraph.capture_end raises before it stops allocating from the pool (until torch 2.12), and no public
        # function does only that. Without this call, all later allocations of this stream would come from the pool.
        torch._C._cuda_endAllocateToPool(index, pool.id)
    with suppress(Exception):
        # The graph took a reference to the pool, and returns it only after a capture that succeeded
        # (https://github.com/pytorch/pytorch/pull/190348).
        for _ in range(pool.use_count() - users):
            torch._C._cuda_releasePool(index, pool.id)
    with suppress(Exception):
        # The default generator still counts as captured, and would refuse to draw.
        generator = torch.cuda.default_generators[index]
        generator.graphsafe_set_state(generator.clone_state())


def _first_line(error: BaseException) -> str:
    """The first line of the error that invalidated the capture: the last one only says that it is invalid."""
    while error.__context__ is not None:
        error = error.__context__
    return (str(error) or type(error).__name__).splitlines()[0]
