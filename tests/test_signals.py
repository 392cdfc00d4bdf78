"""The first signal is remembered, the second interrupts, and afterwards the handlers are as before."""

from __future__ import annotations

import contextlib
import signal

import pytest

from sra_fast.training.signals import StopRequest

SIGNALS = [signal.SIGINT, signal.SIGTERM]


@pytest.mark.parametrize(("first", "second"), [SIGNALS, SIGNALS[::-1]])
def test_the_first_signal_is_remembered_and_the_second_interrupts(first, second, capfd):
    before = [signal.getsignal(number) for number in SIGNALS]
    stop = StopRequest()
    with contextlib.suppress(KeyboardInterrupt), stop:
        signal.raise_signal(first)
        assert stop.signal == first
        assert "again to stop at once" in capfd.readouterr().err
        signal.raise_signal(second)
        pytest.fail("not interrupted")
    assert stop.signal == first
    assert [signal.getsignal(number) for number in SIGNALS] == before
