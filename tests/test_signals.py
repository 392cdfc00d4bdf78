"""The first signal is noted, the second interrupts, and afterwards everything is as before."""

from __future__ import annotations

import contextlib
import signal

import pytest

from sra_fast.training.signals import StopRequest

SIGNALS = [signal.SIGINT, signal.SIGTERM]


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_is_noted_and_said(number, capfd):
    with StopRequest() as stop:
        assert stop.signal == 0
        signal.raise_signal(number)
        assert stop.signal == number
    assert "again to stop at once" in capfd.readouterr().err


@pytest.mark.parametrize("first", SIGNALS)
@pytest.mark.parametrize("second", SIGNALS)
def test_the_second_signal_interrupts(first, second):
    with StopRequest() as stop:
        signal.raise_signal(first)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(second)
        assert stop.signal == first


def test_handlers_come_back_even_after_an_error():
    before = [signal.getsignal(number) for number in SIGNALS]
    with contextlib.suppress(MemoryError), StopRequest():
        assert [signal.getsignal(number) for number in SIGNALS] != before
        raise MemoryError
    assert [signal.getsignal(number) for number in SIGNALS] == before
