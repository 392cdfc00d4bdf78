"""Ctrl-C and SIGTERM as a request to stop between two training steps."""

from __future__ import annotations

import os
import signal
from types import FrameType
from typing import Any


class StopRequest:
    """Context manager, in the main thread: remembers the first SIGINT or SIGTERM in `signal`; a second one raises
    KeyboardInterrupt."""

    def __init__(self) -> None:
        self.signal = 0  # number of the signal received, 0 = none
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        self._previous = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if self.signal:
            raise KeyboardInterrupt
        self.signal = number
        # Not print: the signal may arrive in the middle of another write to stderr.
        os.write(2, b"\nfinishing the step and saving; press Ctrl-C again to stop at once\n")
