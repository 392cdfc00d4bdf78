"""The compiled operators of csrc/, one library beside the package: loaded where it is, told of where it is not."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from pathlib import Path

import torch

NAME = "_ops.so"
CURE = "install cmake and a C++20 compiler and run pip install --no-build-isolation -e . again"


@cache
def load() -> str:
    """Load the library, once. Returns what stands in its way, with the cure; empty: nothing."""
    folders = find_spec("sra_fast").submodule_search_locations
    found = [path for folder in folders if (path := Path(folder) / NAME).exists()]
    if not found:
        return f"the compiled operators are not built ({CURE})"
    try:
        torch.ops.load_library(found[0])
    except OSError as error:
        return f"the compiled operators cannot be loaded ({str(error).splitlines()[0]}; {CURE})"
    return ""


def missing() -> str:
    """What stands in the way of a compiled operator on this machine; empty: nothing."""
    return load()


def has_gpu_code() -> bool:
    """Whether the library was built with nvcc."""
    return not load() and torch._C._dispatch_has_kernel_for_dispatch_key("sra_fast::gradient_norm", "CUDA")


def missing_on_a_gpu() -> str:
    """What stands in the way of a compiled operator on a GPU, with the cure; empty: nothing."""
    if obstacle := load():
        return obstacle
    if not has_gpu_code():
        why = "no nvcc was found, or its compilation failed, of which pip install -v tells"
        return f"the compiled operators have no GPU code: {why}; {CURE}, with nvcc 12.8 or later on the PATH"
    return "" if torch.ops.sra_fast.cuda_is_ready() else "libtorch_cuda.so is not loaded: install a CUDA build of torch"
