"""Pauses for validation, previews and saving do not count for the speed of training."""

from __future__ import annotations

import time

import pytest

from sra_fast.training.rhythm import Clock


def test_pauses_count_for_the_total_and_not_for_the_lap(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    clock = Clock(before_s=50.0)
    now += 3
    with clock.paused():
        now += 10
    now += 4
    assert (clock.lap_s(), clock.total_s()) == (7, 67)
    now += 2
    assert (clock.lap_s(), clock.total_s()) == (2, 69)
