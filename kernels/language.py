"""Triton, or placeholders with which the files of kernels can be imported where Triton is not installed."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch

# Any: type checkers do not know that kernels are launched with options, and with numbers for constexpr.
triton: Any
tl: Any
try:
    triton, tl = import_module("triton"), import_module("triton.language")
    AVAILABLE = True
    INTERPRETED = triton.knobs.runtime.interpret  # TRITON_INTERPRET=1: kernels run on a CPU, slowly, for tests
except ImportError:
    AVAILABLE = INTERPRETED = False

    class _Placeholder:
        """Any attribute of it is itself; as a decorator it returns the function unchanged."""

        def __getattr__(self, name: str) -> Any:
            return self

        def __call__(self, *args: Any, **options: Any) -> Any:
            return args[0] if args and callable(args[0]) else self

    triton = tl = _Placeholder()

__all__ = ["AVAILABLE", "INTERPRETED", "tl", "triton", "why_unavailable"]


def why_unavailable() -> str:
    """Why Triton kernels cannot run on this machine and how to fix it, or ''."""
    if not AVAILABLE:
        return "Triton is not installed (pip install triton)"
    if not INTERPRETED and not torch.cuda.is_available():
        return "there is no CUDA device that this torch can use"
    return ""
