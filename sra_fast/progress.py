"""Progress on stderr: a live bar on a terminal, plain lines in a log file."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from tqdm import tqdm

from sra_fast.errors import printable

SECONDS_BETWEEN_LINES = 10.0


_is_silent = False


@contextmanager
def silent(is_silent: bool = True) -> Iterator[None]:
    """Within this context, `warn` prints nothing: another process does the same work and prints the same lines."""
    global _is_silent
    before, _is_silent = _is_silent, is_silent
    try:
        yield
    finally:
        _is_silent = before


def warn(line: str) -> None:
    """Print a line on stderr. If that is impossible, because its disk is full or its terminal closed, the work that the
    line is about goes on without it."""
    if _is_silent:
        return
    with suppress(OSError):  # a single write, so that lines of other threads do not mix with it
        sys.stderr.write(f"{printable(line)}\n")
        sys.stderr.flush()


def say(line: str) -> None:
    """Print a line on stdout. If its reader has gone, as in `sra-fast train ... | head -1`, or its disk is full,
    nothing more is printed there, and the work goes on."""
    try:
        print(line, flush=True)
    except OSError:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115


class Progress(tqdm):
    """How much of some work is done, how fast it goes, and how long it will take.

    On a terminal this is a tqdm bar. Elsewhere it prints at most one line every ten seconds, and nothing about work
    that takes less. Use it as a context manager and call `update(n)`, or iterate over it to get a sequence's items.

    Args:
        work: number of units in total, or the sequence to iterate over.
        description: name of the work.
        unit: what is counted: "img", "file", "B".
        done: units that were done before and do not count for the rate.
        hidden: show nothing; `write` still prints.
    """

    def __init__(
        self,
        work: int | Sequence[Any],
        description: str = "",
        unit: str = "img",
        *,
        done: int = 0,
        hidden: bool = False,
    ) -> None:
        total, items = (work, None) if isinstance(work, int) else (len(work), work)
        options: dict[str, Any] = {"unit_scale": total >= 10_000}  # 12.5k instead of 12500
        if not sys.stderr.isatty():
            options |= {
                "file": _LineFile(),
                "delay": SECONDS_BETWEEN_LINES,
                "mininterval": SECONDS_BETWEEN_LINES,
                "miniters": 1,  # otherwise a thread of tqdm prints more lines where updates slow down
                "position": 0,  # tqdm would place a second bar by moving the cursor
                "bar_format": "{desc}: {percentage:.0f} %, {n_fmt}/{total_fmt} in {elapsed}, {remaining} left, "
                "{rate_fmt}{postfix}",
            }
        super().__init__(items, description, total, unit=unit, initial=done, disable=hidden, **options)

    def __iter__(self) -> Iterator[Any]:
        with self:
            for item in self.iterable:
                yield item
                self.update()

    def write(self, line: str) -> None:
        """Print a line on stderr without disturbing the bar."""
        tqdm.write(printable(line), file=sys.stderr)

    def set_postfix(self, **values: object) -> None:
        """Show these values behind the rate from the next update on."""
        super().set_postfix(values, refresh=False)


class _LineFile:
    """Ends what tqdm writes with a newline, where tqdm begins it with a carriage return."""

    def __init__(self) -> None:
        self._stream = sys.stderr

    def write(self, text: str) -> None:
        if text := text.strip():
            with suppress(OSError):
                self._stream.write(f"{text}\n")

    def flush(self) -> None:
        with suppress(OSError):
            self._stream.flush()
