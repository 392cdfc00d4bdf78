"""The kernels under compute-sanitizer: what counts as clean, with stand-ins for the tool."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from benchmarks import sanitized
from benchmarks.harness.parts import UNAVAILABLE
from benchmarks.report_plan import correctness
from benchmarks.sanitized import ERRORS_FOUND, TESTS

ROOT = Path(__file__).parents[1]


@pytest.fixture
def tool(tmp_path, monkeypatch):
    """A function that puts a compute-sanitizer with that body first on PATH."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    def make(body: str) -> None:
        path = tmp_path / "compute-sanitizer"
        path.write_text(f"#!/bin/sh\n{body}\n")
        path.chmod(0o755)

    return make


@pytest.mark.parametrize(
    ("body", "code", "message"),
    [
        ("echo '90 passed in 9 s'", 0, ""),
        ("exit 0", 1, "kernels were not launched"),
        ("echo '72 passed, 18 skipped in 9 s'", 1, "kernels were not launched"),
        (f"echo '9 passed'; echo 'Invalid __global__ read of size 4'; exit {ERRORS_FOUND}", 1, "it reports errors"),
        ("echo 'CUDA error'; exit 1", 1, "the tests failed (exit code 1)"),
    ],
)
def test_what_counts_as_clean(tool, capsys, body: str, code: int, message: str) -> None:
    tool(body)
    assert sanitized.main(["racecheck"]) == code
    errors = capsys.readouterr().err
    assert message in errors.splitlines()[-1] if message else errors == ""
    assert "Invalid" not in body or "Invalid __global__ read" in errors


def test_the_tool_is_asked_for_what_it_can_see(tool, capsys) -> None:
    tool("echo \"$@\"; echo caching off: $PYTORCH_NO_CUDA_MEMORY_CACHING; echo '9 passed'")
    assert sanitized.main(["memcheck"]) == 0
    words, caching, _ = capsys.readouterr().out.splitlines()
    assert words.startswith("--tool memcheck ")
    assert f" --error-exitcode {ERRORS_FOUND} " in words
    assert words.endswith(" ".join(TESTS))
    assert caching == "caching off: 1"


def test_it_runs_tests_that_need_a_gpu() -> None:
    files = {word for kernels in (False, True) for word in correctness(0.5, kernels).arguments}
    for test in TESTS:
        file, name = test.split("::")
        assert file in files
        assert f"\ndef {name}(" in (ROOT / file).read_text()


@pytest.mark.parametrize("name", ["memcheck", "plain"])
def test_what_is_missing_is_said_in_one_line(monkeypatch, capsys, name: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sanitized, "compute_sanitizer", lambda: None)
    assert sanitized.main([name]) == UNAVAILABLE
    message = "there is no GPU" if name == "plain" else "compute-sanitizer not found"
    assert capsys.readouterr().err == f"{message}\n"
