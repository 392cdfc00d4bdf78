"""The compiled operators of csrc/: one library in the package's folder, loaded if it was built; otherwise the reason is
reported."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from pathlib import Path

import torch

NAME = "_ops.so"
FIX = "install cmake and a C++20 compiler, then run pip install --no-build-isolation -e ."


@cache
def _load() -> str:
    """Load the library. Returns why that is impossible and how to fix it, or ''."""
    package = find_spec("sra_fast")
    folders = (package and package.submodule_search_locations) or ()
    paths = [path for folder in folders if (path := Path(folder) / NAME).exists()]
    if not paths:
        return f"the compiled operators are not built ({FIX})"
    try:
        torch.ops.load_library(paths[0])
    except OSError as error:
        return f"the compiled operators cannot be loaded ({str(error).splitlines()[0]}; {FIX})"
    return ""


def has_gpu_code() -> bool:
    """Whether the library was built with nvcc."""
    return not _load() and torch._C._dispatch_has_kernel_for_dispatch_key("sra_fast::gradient_norm", "CUDA")


def why_unavailable(on_gpu: bool = False) -> str:
    """Why the compiled operators cannot run and how to fix it, or ''.

    Args:
        on_gpu: on an NVIDIA GPU rather than on the CPU.
    """
    if (reason := _load()) or not on_gpu:
        return reason
    if not has_gpu_code():
        return (
            "the compiled operators have no GPU code: nvcc was not found or failed (see pip install -v);"
            f" {FIX} with nvcc 12.8 or later on the PATH"
        )
    return "" if torch.ops.sra_fast.cuda_is_ready() else "libtorch_cuda.so is not loaded: install a CUDA build of torch"
