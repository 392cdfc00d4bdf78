"""`sra-fast doctor`: what this machine has, what a run will use, and what to install for more."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
import subprocess
from collections.abc import Iterator

import torch

from sra_fast.config import preset
from sra_fast.hardware import Hardware
from sra_fast.kernels import library
from sra_fast.kernels.registry import OPS
from sra_fast.model.attention import available
from sra_fast.model.backends import EXECUTIONS, Backends
from sra_fast.tuning.precision import advice

EXAMPLE = "sit-xl-2"  # preset whose choices are shown

# (names of the package, what it is for, how to install it)
PACKAGES = (
    (("triton",), "fused kernels on GPUs", "pip install triton"),
    (
        ("nvidia-dali-cuda130", "nvidia-dali-cuda120"),
        "fast image decoding; Pillow is used without",
        "pip install nvidia-dali-cuda130",
    ),
    (("tensorboard",), "TensorBoard events; metrics.jsonl is always written", "pip install tensorboard"),
    (("torch-tb-profiler",), "traces of `sra-fast profile` in TensorBoard", "pip install torch-tb-profiler"),
    (("scikit-learn",), "the digits data and `sra-fast evaluate`", "pip install scikit-learn"),
    (("diffusers",), "VAEs, to encode and decode latents", "pip install diffusers"),
    (("flash-attn-4",), "FlashAttention-4 on Hopper and Blackwell", "pip install --pre 'flash-attn-4[cu13]'"),
)
PROGRAMS = (("cmake", "compiled ops"), ("c++", "compiled ops"), ("nvcc", "CUDA ops"))


def lines() -> Iterator[str]:
    """The report, line by line."""
    hardware = Hardware.choose()
    yield f"python       {platform.python_version()}, {platform.system()} {platform.machine()}"
    yield f"torch        {torch.__version__}, {'CUDA ' + torch.version.cuda if torch.version.cuda else 'CPU build'}"
    yield f"device       {hardware.name}, computing in {hardware.precision}"
    if hardware.device.type == "cuda":
        properties = torch.cuda.get_device_properties(hardware.device)
        yield f"             sm_{properties.major}{properties.minor}, {properties.total_memory / 2**30:.1f} GiB"
    elif hint := advice(hardware.precision):
        yield f"             {hint}"
    if hardware.device.type == "cpu" and shutil.which("nvidia-smi"):
        yield "             there is an NVIDIA driver, but this torch cannot use it: install a CUDA build of torch"
    for names, purpose, install in PACKAGES:
        installed = next(filter(None, map(_package_version, names)), "")
        yield f"{names[0].removesuffix('-cuda130'):<12} {installed or f'missing ({purpose}): {install}'}"
    for program, purpose in PROGRAMS:
        yield f"{program:<12} {_program_version(program) or f'missing ({purpose})'}"
    compiled = library.why_unavailable() or ("CPU and GPU code" if library.has_gpu_code() else "CPU code")
    yield f"{'compiled ops':<12} {compiled}"
    yield ""
    config = preset(EXAMPLE)
    backends = Backends.resolve(config, hardware)
    for name, op in OPS.items():
        yield f"{name:<16} {backends.names[name]}{'' if op.fused else ' (no fused kernel)'}"
    attentions = available(hardware.device, hardware.dtype, config.model.hidden // config.model.heads)
    yield f"{'attention':<16} {backends.names['attention']} (of {', '.join(attentions)})"
    yield f"{'step':<16} {EXECUTIONS[backends.execution]}"


def _package_version(name: str) -> str:
    """The installed version, or an empty string."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _program_version(name: str) -> str:
    """A line of `name --version`, or an empty string if the program is not installed."""
    path = shutil.which(name)
    if path is None:
        return ""
    try:
        result = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return f"{path}, which does not respond"
    output = [line for line in result.stdout.splitlines() if line.strip()]
    if not output:
        return path
    return output[-1] if name == "nvcc" else output[0]
