"""Ctrl-C and SIGTERM as a wish that the loop grants between two steps."""

from __future__ import annotations

import os
import signal
from types import FrameType


class StopRequest:
    """While active, the first SIGINT or SIGTERM is remembered in `signal`; a second one interrupts at once.

    Use as a context manager, in the main thread.
    """

    def __init__(self) -> None:
        self.signal = 0  # its number, 0 = none
        self._previous: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        self._previous = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if self.signal:
            raise KeyboardInterrupt
        self.signal = number
        # Not print: the signal may have come in the middle of another write to stderr.
        os.write(2, b"\nfinishing the step and saving; once more to stop at once\n")
