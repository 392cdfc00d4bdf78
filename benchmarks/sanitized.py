"""The kernels, forward and backward, under compute-sanitizer, at small shapes with tails.

    python -m benchmarks.sanitized memcheck      reads and writes outside of what was allocated
    python -m benchmarks.sanitized racecheck     hazards in shared memory
    python -m benchmarks.sanitized initcheck     reads of what was never written
    python -m benchmarks.sanitized plain         the same launches without it

Exit code 1 if it finds something or if the launches fail, 69 where there is no GPU or no compute-sanitizer (it comes
with the CUDA toolkit), with one line on stderr that says so.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.harness.parts import LAUNCHER, ROOT

TOOLS = ("memcheck", "racecheck", "initcheck")
NOT_FOUND = 69  # EX_UNAVAILABLE of sysexits.h
FOUND = 86  # exit code of compute-sanitizer, told apart from those of the program
DONE = "all results are finite"

# B, T, D, dtypes of rows and modulation. One column beyond a tile, unequal chunks of tokens, no tail at all.
SHAPES = (
    (3, 19, 13, torch.float32, torch.float32),
    (2, 37, 1153, torch.bfloat16, torch.float32),
    (2, 16, 384, torch.bfloat16, torch.bfloat16),
)


def _norms(device: torch.device) -> Iterator[list[Tensor]]:
    from sra_fast.kernels.adaln import adaln, gated_adaln

    for batch, tokens, width, dtype, modulation in SHAPES:
        x, branch = (_rows(batch, tokens, width, dtype, device) for _ in range(2))
        # The last of six: the end of its last row is the end of the allocation.
        *_, gate, shift, scale = torch.randn(batch, 6 * width, dtype=modulation, device=device).chunk(6, dim=-1)
        yield _both(adaln, x, shift, scale)
        yield _both(gated_adaln, x, branch, gate, shift, scale)


def _distances(device: torch.device) -> Iterator[list[Tensor]]:
    from sra_fast.kernels.alignment import DISTANCES, alignment

    for batch, tokens, width, dtype, _ in SHAPES:
        student, teacher = (_rows(batch, tokens, width, dtype, device) for _ in range(2))
        for distance in DISTANCES:
            yield _both(lambda s, t=teacher, name=distance: alignment(s, t, name), student)


def _perturb(device: torch.device) -> Iterator[list[Tensor]]:
    from benchmarks.kernel_cases import make_case

    case = make_case("perturb", "s", 3, device, torch.float32)
    if "fused" in case.implementations:
        yield list(case.implementations["fused"](*case.inputs))


def _updates(device: torch.device) -> Iterator[list[Tensor]]:
    """The compiled optimizer on aligned and other tensors, with every dtype of gradients and copies."""
    from sra_fast import kernels
    from sra_fast.kernels.adamw_ema import Lists, Scalars, adamw_ema
    from sra_fast.kernels.gradient_norm import gradient_norm

    if device.type == "cuda" and (obstacle := kernels.library.why_unavailable(on_gpu=True)):
        raise RuntimeError(obstacle)  # or what was not looked at would pass for clean
    for gradients, copies in ((torch.float32, torch.bfloat16), (torch.bfloat16, torch.float16), (torch.float16, None)):

        def some(dtype: torch.dtype = torch.float32, like: float = 1.0) -> list[Tensor]:
            whole = [like * torch.rand(size + 1, device=device).to(dtype) for size in (1, 70_001, 8192, 0)]
            return [tensor[1:] if i % 2 else tensor[:-1] for i, tensor in enumerate(whole)]

        lists = Lists(some(gradients), *(some() for _ in range(4)), *((some(copies), some(copies)) if copies else ()))
        step, skipped = (torch.zeros((), dtype=torch.int64, device=device) for _ in range(2))
        rates = [torch.full((), value, device=device) for value in (1e-2, 0.99, 1.0, 2.0)]
        scalars = Scalars(gradient_norm(lists.gradients), step, skipped, *rates)
        adamw_ema(lists, scalars, betas=(0.9, 0.999), eps=1e-8, weight_decay=(0.1,), zero_gradients=True)
        yield [tensor for tensors in lists for tensor in tensors]


FAMILIES: tuple[Callable[[torch.device], Iterator[list[Tensor]]], ...] = (_norms, _distances, _perturb, _updates)


def _rows(batch: int, tokens: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.randn(batch, tokens, width, dtype=dtype, device=device)


def _both(function: Callable, *inputs: Tensor) -> list[Tensor]:
    """Outputs and all gradients."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    made = function(*leaves)
    outputs = [made] if isinstance(made, Tensor) else list(made)
    gradients = torch.autograd.grad(outputs, leaves, [torch.randn_like(out) for out in outputs])
    return [*outputs, *gradients]


def launch_all(device: torch.device) -> None:
    """Every kernel at every shape.

    Raises:
        ValueError: on a result that is not finite.
    """
    for family in FAMILIES:
        for number, results in enumerate(family(device)):
            for place, result in enumerate(results):
                if result.is_floating_point() and not bool(result.isfinite().all()):
                    raise ValueError(f"{family.__name__}, call {number}: result {place} is not finite")
    print(DONE, flush=True)


def compute_sanitizer() -> str | None:
    """Its path: on PATH, or in the CUDA toolkit that torch would compile with."""
    from torch.utils.cpp_extension import CUDA_HOME

    beside = str(Path(CUDA_HOME) / "bin") if CUDA_HOME else None
    return shutil.which("compute-sanitizer") or (shutil.which("compute-sanitizer", path=beside) if beside else None)


def sanitize(tool: str, program: str) -> int:
    """Run `plain` in a process of its own under a tool. Returns the exit code."""
    command = [program, "--tool", tool, "--target-processes", "application-only", "--error-exitcode", str(FOUND)]
    # Calls that torch makes to see what there is may fail; those that matter raise.
    command += ["--report-api-errors", "no", "--print-limit", "20"] if tool == "memcheck" else ["--print-limit", "20"]
    command += [sys.executable, str(LAUNCHER), str(ROOT), "benchmarks.sanitized", "plain"]
    # An allocation for each tensor, so that what is beyond it belongs to nobody.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    ran = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(ran.stdout, end="")
    if ran.returncode == 0 and DONE in ran.stdout:
        return 0
    lines = [line for line in ran.stdout.splitlines() if line.strip()]
    reason = "it found something" if ran.returncode == FOUND else f"the launches failed (exit code {ran.returncode})"
    print("\n".join([*lines[-20:], f"compute-sanitizer {tool}: {reason}"]), file=sys.stderr)
    return 1


def main(arguments: Sequence[str] | None = None) -> int:
    """The program. Returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sanitized", description=__doc__.splitlines()[0])
    parser.add_argument("tool", choices=(*TOOLS, "plain"))
    tool = parser.parse_args(arguments).tool
    program = "" if tool == "plain" else compute_sanitizer()
    if program is None or not torch.cuda.is_available():
        print("compute-sanitizer not found" if program is None else "there is no GPU", file=sys.stderr)
        return NOT_FOUND
    if tool != "plain":
        return sanitize(tool, program)
    launch_all(torch.device("cuda"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
