"""When things are due during training, and how long it has taken."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True)
class Every:
    """Due when a step crosses a multiple of `images`; 0 = never."""

    images: int
    batch: int

    def due(self, images_seen: int) -> bool:
        """Whether the step that ended at `images_seen` crossed a multiple."""
        return self.images > 0 and images_seen // self.images > (images_seen - self.batch) // self.images


class Clock:
    """Wall-clock time of a run: in total, and since the last lap without the pauses (validation, previews, saving).

    Args:
        before_s: seconds that the run took before it was resumed.
    """

    def __init__(self, before_s: float) -> None:
        self._start = time.monotonic() - before_s
        self._lap_start = time.monotonic()

    def total_s(self) -> float:
        return time.monotonic() - self._start

    def lap_s(self) -> float:
        """Seconds since the last call."""
        now = time.monotonic()
        elapsed, self._lap_start = now - self._lap_start, now
        return elapsed

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time in this block does not count for the lap."""
        start = time.monotonic()
        yield
        self._lap_start += time.monotonic() - start
