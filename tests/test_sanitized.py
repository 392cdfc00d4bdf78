"""The kernels under compute-sanitizer: what counts as clean, with stand-ins for the tool; and that the launches that it
watches are made and looked at, in Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import sanitized
from benchmarks.harness.parts import UNAVAILABLE
from benchmarks.sanitized import DONE, ERRORS_FOUND

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
    ("body", "code", "said"),
    [
        (f"echo '{DONE}'", 0, ""),
        ("exit 0", 1, "the launches failed (exit code 0)"),  # nothing was launched
        (f"echo '{DONE}'; echo 'Invalid __global__ read of size 4 bytes'; exit {ERRORS_FOUND}", 1, "it reports errors"),
        ("echo 'CUDA error'; exit 1", 1, "the launches failed (exit code 1)"),
    ],
)
def test_what_counts_as_clean(tool, capsys, body: str, code: int, said: str) -> None:
    tool(body)
    assert sanitized.main(["racecheck"]) == code
    errors = capsys.readouterr().err
    assert said in errors.splitlines()[-1] if said else errors == ""
    assert "Invalid" not in body or "Invalid __global__ read" in errors


def test_the_tool_is_asked_for_what_it_can_see(tool, capsys) -> None:
    tool(f"echo \"$@\"; echo cached: $PYTORCH_NO_CUDA_MEMORY_CACHING; echo '{DONE}'")
    assert sanitized.main(["memcheck"]) == 0
    words, cached, _ = capsys.readouterr().out.splitlines()
    assert words.startswith("--tool memcheck ")
    assert f" --error-exitcode {ERRORS_FOUND} " in words
    assert words.endswith(" benchmarks.sanitized plain")
    assert cached == "cached: 1"  # no cache: an allocation for each tensor


@pytest.mark.parametrize("name", ["memcheck", "plain"])
def test_what_is_missing_is_said_in_one_line(monkeypatch, capsys, name: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sanitized, "compute_sanitizer", lambda: None)
    assert sanitized.main([name]) == UNAVAILABLE
    wanted = "there is no GPU" if name == "plain" else "compute-sanitizer not found"
    assert capsys.readouterr().err == f"{wanted}\n"


def test_a_result_that_is_not_finite_is_found(monkeypatch) -> None:
    results = [torch.ones(2), torch.tensor([1.0, float("inf")])]
    monkeypatch.setattr(sanitized, "FAMILIES", (lambda device: iter([results]),))
    with pytest.raises(ValueError, match=r"call 0: result 1 is not finite"):
        sanitized.launch_all(torch.device("cpu"))


WAYS = ("_adaln", "_alignment_channels", "_alignment_tokens")
KERNELS = {f"{way}_{which}" for way in WAYS for which in ("backward", "forward")} | {"_adaln_total", "_alignment_mean"}
COUNTED = """
import sys, torch
sys.path.insert(0, "tests")
import interpreter  # which mends Triton's
from triton.runtime import interpreter as triton_interpreter
from benchmarks import sanitized
names, run = set(), triton_interpreter.InterpretedFunction.run
def noted(kernel, *arguments, **options):
    names.add(kernel.fn.__name__)
    return run(kernel, *arguments, **options)
triton_interpreter.InterpretedFunction.run = noted
sanitized.FAMILIES, sanitized.SHAPES = sanitized.FAMILIES[:2], sanitized.SHAPES[:1]
sanitized.launch_all(torch.device("cpu"))
print(sorted(names))
"""


def test_every_kernel_is_launched() -> None:
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", COUNTED]
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-2000:]
    done, names = ran.stdout.splitlines()
    assert done == DONE
    assert names == str(sorted(KERNELS))
