"""Makes PyTorch's CPU build believe that there is an H200, for the rest of the process.

Import this before torch, which looks for its devices only once, as Inductor does for the functions that describe them.
"""

from __future__ import annotations

import ctypes
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from benchmarks.static import why_unavailable

CAPABILITY = (9, 0)
H200 = SimpleNamespace(
    name="NVIDIA H200",
    major=CAPABILITY[0],
    minor=CAPABILITY[1],
    multi_processor_count=132,
    total_memory=150_121_545_728,
    warp_size=32,
    regs_per_multiprocessor=65_536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    shared_memory_per_block=49_152,
    shared_memory_per_block_optin=232_448,
    shared_memory_per_multiprocessor=233_472,
    L2_cache_size=62_914_560,
    gcnArchName="",
    is_integrated=0,
)


def _load() -> None:
    torch = find_spec("torch")
    assert torch
    assert torch.origin
    root, source = Path(torch.origin).parent, Path(__file__).with_name("guard.cpp")
    linked = [f"-L{root / 'lib'}", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{root / 'lib'}"]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "guard.so"
        options = ["-std=c++20", "-shared", "-fPIC", f"-I{root / 'include'}", source, *linked, "-o", path]
        subprocess.run(["g++", *options], check=True)
        ctypes.CDLL(str(path))


def _answer_for_cuda() -> None:
    """What torch.cuda is asked about the device."""
    import torch

    answers: dict[str, Callable[..., Any]] = {
        "is_available": lambda: True,
        "_is_compiled": lambda: True,
        "_lazy_init": lambda: None,
        "is_initialized": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda *_: None,
        "synchronize": lambda *_: None,
        "_exchange_device": lambda _: 0,
        "_maybe_exchange_device": lambda _: 0,
        "get_device_properties": lambda *_: H200,
        "get_device_capability": lambda *_: CAPABILITY,
        "get_device_name": lambda *_: H200.name,
        "is_bf16_supported": lambda *_, **__: True,
        "is_tf32_supported": lambda: True,
        "get_rng_state": lambda *_: torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": lambda *_: None,
        "get_rng_state_all": list,
        "memory_allocated": lambda *_: 0,
        "max_memory_allocated": lambda *_: 0,
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, answer)
    for name in ("_cuda_getCurrentRawStream", "_cuda_exchangeDevice", "_cuda_maybeExchangeDevice"):
        setattr(torch._C, name, lambda _: 0)
    torch.version.cuda = "13.0"
    torch.backends.cudnn.is_available = lambda: True
    torch.backends.cuda.is_flash_attention_available = lambda: True


if not why_unavailable():
    if "torch" in sys.modules:
        raise ImportError("benchmarks.static.guard must be imported before torch")
    _load()
    _answer_for_cuda()
