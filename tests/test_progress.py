"""A log file gets one complete line at a time."""

from __future__ import annotations

import io
import sys

import pytest

from sra_fast import progress
from sra_fast.progress import Progress


def test_a_log_file_gets_lines_and_no_carriage_returns(capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    with Progress(30, "encoding", done=10) as bar:
        bar.update(10)
        bar.set_postfix(loss="0.5")
        bar.write("a.png: left out")
        bar.update(10)
    text = capsys.readouterr().err
    lines = text.splitlines()
    assert text.endswith("\n")
    assert "\r" not in text
    assert [line.split(" in ")[0] for line in lines] == [
        "encoding: 33 %, 10/30",
        "encoding: 67 %, 20/30",
        "a.png: left out",
        "encoding: 100 %, 30/30",
        "encoding: 100 %, 30/30",
    ]
    assert "loss=0.5" in lines[-1]


def test_short_work_gets_one_line_at_its_end(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(Progress(range(5), "reading", "file")) == [0, 1, 2, 3, 4]
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("reading: 100 %, 5/5 in 00:00")


def fail(count: int) -> None:
    with Progress(5, "reading") as bar:
        bar.update(count)
        raise OSError("disk full")


def test_work_that_fails_leaves_stderr_to_the_error_message(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(OSError, match="disk full"):
        fail(2)
    assert capsys.readouterr().err == ""


def test_hidden_progress_still_writes_messages(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(5, hidden=True) as bar:
        bar.update(5)
        bar.write("a.png: left out")
    assert capsys.readouterr().err == "a.png: left out\n"


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stderr", terminal)
    with Progress(5, "reading") as bar:
        bar.update(5)
    assert "\r" in terminal.getvalue()
    assert "100%|" in terminal.getvalue()
