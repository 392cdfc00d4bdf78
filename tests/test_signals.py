"""The first signal is remembered, the second interrupts, and afterwards the handlers are as before."""

from __future__ import annotations

import contextlib
import os
import pty
import signal
import sys
import time

import pytest
from small_run import arguments, checkpoints, metrics

from sra_fast.training.signals import StopRequest

SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


@pytest.mark.parametrize(("first", "second"), [SIGNALS[:2], SIGNALS[1::-1], SIGNALS[2:0:-1]])
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


def test_a_hangup_that_nohup_ignores_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            signal.raise_signal(signal.SIGHUP)
        assert stop.signal == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_closed_terminal_saves_the_run(root):
    """Nothing can be printed any more, and the first to notice must not be the run."""
    child, terminal = pty.fork()
    if child == 0:
        os.environ["OMP_NUM_THREADS"] = "1"
        words = arguments(root, train__images=8_000_000)
        os.execv(sys.executable, [sys.executable, "-m", "sra_fast.cli", *words])
    folder = root / "runs/a"
    while not (folder / "metrics.jsonl").exists() or len(metrics(folder)) < 3:
        time.sleep(0.05)
        assert os.waitpid(child, os.WNOHANG) == (0, 0), os.read(terminal, 4096)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 128 + signal.SIGHUP
    (name,) = checkpoints(folder)
    assert metrics(folder)[-1]["images_seen"] == int(name) > 0
