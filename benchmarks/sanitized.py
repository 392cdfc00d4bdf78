"""The kernels, forward and backward, under compute-sanitizer, at small shapes with tails.

    python -m benchmarks.sanitized memcheck      reads and writes outside of allocations
    python -m benchmarks.sanitized racecheck     hazards in shared memory
    python -m benchmarks.sanitized initcheck     reads of uninitialised memory
    python -m benchmarks.sanitized plain         the same launches without a tool

Exit code 1 if a tool reports an error or the launches fail; 69, with one line on stderr, if there is no GPU or no
compute-sanitizer (it comes with the CUDA toolkit).
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from benchmarks.harness.parts import LAUNCHER, ROOT, UNAVAILABLE
from benchmarks.kernel_cases import make_case
from sra_fast.kernels.adaln import adaln, gated_adaln
from sra_fast.kernels.adamw_ema import Lists, Scalars, adamw_ema
from sra_fast.kernels.alignment import DISTANCES, alignment
from sra_fast.kernels.gradient_norm import gradient_norm
from sra_fast.kernels.registry import why_unavailable

TOOLS = ("memcheck", "racecheck", "initcheck")
ERRORS_FOUND = 86  # compute-sanitizer's exit code, distinct from those of the program
DONE = "all results are finite"

# B, T, D, dtypes of rows and modulation: one column more than a tile, unequal chunks of tokens, no tail.
SHAPES = (
    (3, 19, 13, torch.float32, torch.float32),
    (2, 37, 1153, torch.bfloat16, torch.float32),
    (2, 16, 384, torch.bfloat16, torch.bfloat16),
)


def _norms(device: torch.device) -> Iterator[list[Tensor]]:
    for batch, tokens, width, dtype, modulation in SHAPES:
        x, branch = (torch.randn(batch, tokens, width, dtype=dtype, device=device) for _ in range(2))
        # The last of six: the end of its last row is the end of the allocation.
        *_, gate, shift, scale = torch.randn(batch, 6 * width, dtype=modulation, device=device).chunk(6, dim=-1)
        yield _outputs_and_gradients(adaln, x, shift, scale)
        yield _outputs_and_gradients(gated_adaln, x, branch, gate, shift, scale)


def _distances(device: torch.device) -> Iterator[list[Tensor]]:
    for batch, tokens, width, dtype, _ in SHAPES:
        student, teacher = (torch.randn(batch, tokens, width, dtype=dtype, device=device) for _ in range(2))
        for distance in DISTANCES:
            yield _outputs_and_gradients(lambda s, t=teacher, name=distance: alignment(s, t, name), student)


def _perturb(device: torch.device) -> Iterator[list[Tensor]]:
    case = make_case("perturb", "s", 3, device, torch.float32)
    if "fused" in case.implementations:
        yield list(case.implementations["fused"](*case.inputs))


def _updates(device: torch.device) -> Iterator[list[Tensor]]:
    """The compiled optimizer on aligned and unaligned tensors, with every dtype of gradients and copies."""
    if device.type == "cuda" and (reason := why_unavailable("adamw_ema", "sm")):
        raise RuntimeError(reason)  # otherwise the tool would pass without having seen the kernel
    for gradients, copies in ((torch.float32, torch.bfloat16), (torch.bfloat16, torch.float16), (torch.float16, None)):

        def tensors(dtype: torch.dtype = torch.float32) -> list[Tensor]:
            allocations = [torch.rand(size + 1, device=device).to(dtype) for size in (1, 70_001, 8192, 0)]
            return [tensor[1:] if i % 2 else tensor[:-1] for i, tensor in enumerate(allocations)]

        networks = (tensors(copies), tensors(copies)) if copies else ()
        lists = Lists(tensors(gradients), *(tensors() for _ in range(4)), *networks)
        step, skipped = (torch.zeros((), dtype=torch.int64, device=device) for _ in range(2))
        rates = [torch.full((), value, device=device) for value in (1e-2, 0.99, 1.0, 2.0)]
        scalars = Scalars(gradient_norm(lists.gradients), step, skipped, *rates)
        adamw_ema(lists, scalars, betas=(0.9, 0.999), eps=1e-8, weight_decay=(0.1,), zero_gradients=True)
        yield [tensor for tensors in lists for tensor in tensors]


FAMILIES: tuple[Callable[[torch.device], Iterator[list[Tensor]]], ...] = (_norms, _distances, _perturb, _updates)


def _outputs_and_gradients(function: Callable, *inputs: Tensor) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    result = function(*leaves)
    outputs = [result] if isinstance(result, Tensor) else list(result)
    gradients = torch.autograd.grad(outputs, leaves, [torch.randn_like(out) for out in outputs])
    return [*outputs, *gradients]


def launch_all(device: torch.device) -> None:
    """Launch every kernel at every shape; raises ValueError if a result is not finite."""
    for family in FAMILIES:
        for number, results in enumerate(family(device)):
            for index, result in enumerate(results):
                if result.is_floating_point() and not bool(result.isfinite().all()):
                    raise ValueError(f"{family.__name__}, call {number}: result {index} is not finite")
    print(DONE, flush=True)


def compute_sanitizer() -> str | None:
    """Its path: on PATH, or in the CUDA toolkit that torch would compile with."""
    from torch.utils.cpp_extension import CUDA_HOME

    return shutil.which("compute-sanitizer", path=f"{os.environ['PATH']}:{CUDA_HOME}/bin")


def sanitize(tool: str, program: str) -> int:
    """Run `plain` in a process under a tool. Returns the exit code."""
    command = [program, "--tool", tool, "--target-processes", "application-only", "--error-exitcode", str(ERRORS_FOUND)]
    command += ["--print-limit", "20"]
    if tool == "memcheck":  # API calls by which torch probes the device may fail; those that matter raise
        command += ["--report-api-errors", "no"]
    command += [sys.executable, str(LAUNCHER), str(ROOT), "benchmarks.sanitized", "plain"]
    # One allocation per tensor, so that a read beyond its end is an error.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    result = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    code = result.returncode
    print(result.stdout, end="")
    if code == 0 and DONE in result.stdout:
        return 0
    reason = "it reports errors" if code == ERRORS_FOUND else f"the launches failed (exit code {code})"
    print(f"{result.stdout[-2000:]}\ncompute-sanitizer {tool}: {reason}", file=sys.stderr)
    return 1


def main(arguments: Sequence[str] | None = None) -> int:
    """The program. Returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sanitized", description=str(__doc__).splitlines()[0])
    parser.add_argument("tool", choices=(*TOOLS, "plain"))
    tool = parser.parse_args(arguments).tool
    program = "" if tool == "plain" else compute_sanitizer()
    if program is None or not torch.cuda.is_available():
        print("compute-sanitizer not found" if program is None else "there is no GPU", file=sys.stderr)
        return UNAVAILABLE
    if tool != "plain":
        return sanitize(tool, program)
    launch_all(torch.device("cuda"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
