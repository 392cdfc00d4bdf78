"""pytest-benchmark's files carry our stamp too, so that compare.py refuses to compare different machines."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.harness.rows import stamp


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """Called by pytest-benchmark before it writes."""
    machine_info["stamp"] = stamp()
