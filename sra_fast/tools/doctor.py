"""What this machine has, what will be used for each op, and what to install for more."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
import subprocess
from collections.abc import Iterator

import torch

from sra_fast import kernels
from sra_fast.config import KernelsConfig
from sra_fast.hardware import Hardware
from sra_fast.model.attention import available, choose
from sra_fast.step.runner import EXECUTIONS, choose_execution

USUAL_HEAD = 72  # width of a head of SiT-XL


def lines() -> Iterator[str]:
    """The report, a line at a time."""
    hardware = Hardware.choose()
    yield f"python       {platform.python_version()}, {platform.system()} {platform.machine()}"
    yield f"torch        {torch.__version__}, {'CUDA ' + torch.version.cuda if torch.version.cuda else 'CPU build'}"
    yield f"device       {hardware.name}, computing in {hardware.precision}"
    if hardware.device.type == "cuda":
        properties = torch.cuda.get_device_properties(hardware.device)
        yield f"             sm_{properties.major}{properties.minor}, {properties.total_memory / 2**30:.1f} GiB"
    elif _version("nvidia-smi"):
        yield "             there is an NVIDIA driver, but this torch cannot use it: install a CUDA build of torch"
    for package, cure, use in (
        ("triton", "pip install triton", "fused kernels on GPUs"),
        ("nvidia-dali-cuda130", "pip install nvidia-dali-cuda130", "image decoding; Pillow serves without it"),
        ("tensorboard", "pip install tensorboard", "TensorBoard events; metrics.jsonl is always written"),
        ("torch-tb-profiler", "pip install torch-tb-profiler", "traces of `sra-fast profile` in TensorBoard"),
        ("scikit-learn", "pip install scikit-learn", "the digits data and `sra-fast evaluate`"),
    ):
        found = _installed(package) or (package.startswith("nvidia-dali") and _installed("nvidia-dali-cuda120"))
        yield f"{package.removesuffix('-cuda130'):<12} {found or f'missing ({use}): {cure}'}"
    for program, use in (("cmake", "compiled ops"), ("c++", "compiled ops"), ("nvcc", "CUDA ops")):
        yield f"{program:<12} {_version(program) or f'missing ({use})'}"
    compiled = kernels.library.why_unavailable() or (
        "CPU and GPU code" if kernels.library.has_gpu_code() else "CPU code"
    )
    yield f"{'compiled ops':<12} {compiled}"
    yield ""
    for op, choice in KernelsConfig().resolve(hardware.architecture).items():
        fused = "fused" in kernels.IMPLEMENTATIONS[op]
        yield f"{op:<16} {choice}{'' if fused else ' (no fused kernel)'}"
    rule = ", ".join(available(hardware.device, hardware.dtype, USUAL_HEAD))
    yield f"{'attention':<16} {choose('auto', hardware.device, hardware.dtype, USUAL_HEAD, False)} (of {rule})"
    yield f"{'step':<16} {EXECUTIONS[choose_execution('auto', hardware.device)]}"


def _installed(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _version(program: str) -> str:
    """The last line of `program --version`, or an empty string if it is not there."""
    path = shutil.which(program)
    if path is None:
        return ""
    try:
        answer = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return f"{path}, which does not answer"
    said = [line for line in answer.stdout.splitlines() if line.strip()]
    return (said[0] if program != "nvcc" else said[-1]) if said else path
