"""pytest-benchmark's files carry the same stamp as ours, so that compare.py refuses what cannot be compared."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.harness.stamp import stamp


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """Called by pytest-benchmark before it writes."""
    machine_info["stamp"] = stamp()
