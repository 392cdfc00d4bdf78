"""The first signal is remembered, the second interrupts, and afterwards the handlers are as before."""

from __future__ import annotations

import contextlib
import signal

import pytest

from sra_fast.training.signals import StopRequest

SIGNALS = [signal.SIGINT, signal.SIGTERM]


@pytest.mark.parametrize(("first", "second"), [SIGNALS, SIGNALS[::-1]])
def test_the_first_signal_is_remembered_and_the_second_interrupts(first, second, capfd):
    with StopRequest() as stop:
        assert stop.signal == 0
        signal.raise_signal(first)
        assert stop.signal == first
        assert "again to stop at once" in capfd.readouterr().err
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(second)
        assert stop.signal == first


def test_handlers_are_restored_even_after_an_error():
    before = [signal.getsignal(number) for number in SIGNALS]
    with contextlib.suppress(MemoryError), StopRequest():
        assert [signal.getsignal(number) for number in SIGNALS] != before
        raise MemoryError
    assert [signal.getsignal(number) for number in SIGNALS] == before
