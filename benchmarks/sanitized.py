"""The GPU tests that run every kernel on small shapes, under compute-sanitizer.

    python -m benchmarks.sanitized memcheck      reads and writes outside of allocations
    python -m benchmarks.sanitized racecheck     hazards in shared memory
    python -m benchmarks.sanitized initcheck     reads of uninitialised memory
    python -m benchmarks.sanitized plain         the same tests without a tool

Exit code 1 if a tool reports an error, or a test fails or skips; 69, with one line on stderr, if there is no GPU or no
compute-sanitizer (it comes with the CUDA toolkit).
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence

import torch

from benchmarks.harness import options
from benchmarks.harness.parts import LAUNCHER, ROOT, UNAVAILABLE

TOOLS = ("memcheck", "racecheck", "initcheck")
TESTS = (
    "tests/test_adaln.py::test_kernel_is_as_exact_as_pytorch",
    "tests/test_alignment_kernel.py::test_kernel_is_as_exact_as_pytorch",
    "tests/test_perturb_kernel.py::test_kernel_is_as_exact_as_pytorch",
    "tests/test_gpu_optimizer.py::test_a_gpu_computes_the_bits_of_a_cpu",
)
ERRORS_FOUND = 86  # compute-sanitizer's exit code, distinct from pytest's


def compute_sanitizer() -> str | None:
    """Its path: on PATH, or in the CUDA toolkit that torch would compile with."""
    from torch.utils.cpp_extension import CUDA_HOME

    return shutil.which("compute-sanitizer", path=f"{os.environ['PATH']}:{CUDA_HOME}/bin")


def run(*command: str) -> int:
    """Run the tests in a process, under a tool if there is one. Returns the exit code."""
    tests = [sys.executable, str(LAUNCHER), str(ROOT), "pytest", "-q", "-p", "no:cacheprovider", *TESTS]
    # One allocation per tensor, of its size (tests/interpreter.py), so that a read beyond its end is an error.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "SRA_FAST_EXACT_ALLOCATIONS": "1"}
    result = subprocess.run(
        [*command, *tests], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    print(result.stdout, end="")
    if result.returncode == ERRORS_FOUND:
        reason = "it reports errors"
    elif result.returncode:
        reason = f"the tests failed (exit code {result.returncode})"
    elif not re.search(r"^\d+ passed(?!.* skipped)", result.stdout, re.MULTILINE):
        reason = "tests were skipped, so that kernels were not launched"
    else:
        return 0
    print(f"{result.stdout[-2000:]}\n{reason}", file=sys.stderr)
    return 1


def main(arguments: Sequence[str] | None = None) -> int:
    parser = options.parser("sanitized", __doc__)
    parser.add_argument("tool", choices=(*TOOLS, "plain"))
    tool = parser.parse_args(arguments).tool
    program = "" if tool == "plain" else compute_sanitizer()
    if program is None or not torch.cuda.is_available():
        print("compute-sanitizer not found" if program is None else "there is no GPU", file=sys.stderr)
        return UNAVAILABLE
    if not program:
        return run()
    command = [program, "--tool", tool, "--target-processes", "application-only", "--error-exitcode", str(ERRORS_FOUND)]
    command += ["--print-limit", "20"]
    if tool == "memcheck":  # API calls by which torch probes the device may fail; those that matter raise
        command += ["--report-api-errors", "no"]
    return run(*command)


if __name__ == "__main__":
    sys.exit(main())
