"""Triton, or where it is not installed stand-ins under which files with kernels can still be imported."""

from __future__ import annotations

from typing import Any

import torch

try:
    import triton
    import triton.language as tl

    AVAILABLE = True
    INTERPRETED = triton.knobs.runtime.interpret  # TRITON_INTERPRET=1: kernels run on a CPU, slowly, for tests
except ImportError:
    AVAILABLE = INTERPRETED = False

    class _Absent:
        """Has every name, and can be called; decorates functions with nothing."""

        def __getattr__(self, name: str) -> Any:
            return self

        def __call__(self, *args: Any, **options: Any) -> Any:
            return args[0] if args and callable(args[0]) else self

    triton = tl = _Absent()

__all__ = ["AVAILABLE", "INTERPRETED", "missing", "tl", "triton"]


def missing() -> str:
    """What stands in the way of running a kernel on this machine, with the cure; empty: nothing."""
    if not AVAILABLE:
        return "Triton is not installed (pip install triton)"
    if not INTERPRETED and not torch.cuda.is_available():
        return "there is no CUDA device that this torch can use"
    return ""
