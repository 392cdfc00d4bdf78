"""Ctrl-C, SIGTERM and SIGHUP (a closed terminal) as a request to stop between two training steps."""

from __future__ import annotations

import os
import signal
import stat
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class StopRequest:
    """Context manager, in the main thread: remembers the first of `SIGNALS` in `signal`; a second one raises
    KeyboardInterrupt with its number. A signal that was ignored before, as SIGHUP is under nohup, stays ignored."""

    def __init__(self) -> None:
        self.signal = 0  # number of the signal received, 0 = none
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        self._previous = {
            number: signal.signal(number, self._handle)
            for number in SIGNALS
            if signal.getsignal(number) is not signal.SIG_IGN
        }
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if self.signal:
            raise KeyboardInterrupt(number)
        self.signal = number
        try:  # not print: the signal may arrive in the middle of another write to stderr
            os.write(2, b"\nfinishing the step and saving; press Ctrl-C again to stop at once\n")
        except OSError:  # the terminal is gone; whatever is printed from here on must not end the run unsaved
            nowhere = os.open(os.devnull, os.O_WRONLY)
            for descriptor in (1, 2):
                if stat.S_ISCHR(os.fstat(descriptor).st_mode):
                    os.dup2(nowhere, descriptor)
