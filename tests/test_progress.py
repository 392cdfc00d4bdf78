"""A log file gets one complete line at a time."""

from __future__ import annotations

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


def test_short_work_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(Progress(range(5), "reading", "file")) == [0, 1, 2, 3, 4]
    assert capsys.readouterr().err == ""
