"""The device of a run and its compute dtype."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from sra_fast.errors import Refused


def set_deterministic(enabled: bool) -> None:
    """Turn bitwise reproducible kernels on or off. Call it before the first use of a GPU: cuBLAS reads its setting at
    start-up."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(enabled)
    from torch._inductor import config  # late, because it takes half a second

    config.deterministic = enabled  # PyTorch 2.13 does this itself, 2.11 does not
    # Filling new memory, which helps to find reads of uninitialised values, costs a pass over every tensor.
    torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue]


@dataclass(frozen=True)
class Hardware:
    """A device and the dtype that the networks compute in."""

    device: torch.device
    dtype: torch.dtype

    @classmethod
    def choose(cls, device: str = "auto", precision: str = "auto", option: str = "device") -> Hardware:
        """The best of this machine that the options of device and precision allow.

        Args:
            option: that names the device, for messages.

        Raises:
            Refused: if a GPU is asked for and none is usable.
        """
        cuda = torch.cuda.is_available()
        if device == "cuda" and not cuda:
            raise Refused(option, device, "no NVIDIA GPU is usable here; must be auto or cpu")
        use_gpu = cuda and device != "cpu"
        bf16 = precision == "bf16"
        if precision == "auto":
            bf16 = use_gpu and torch.cuda.is_bf16_supported(including_emulation=False)
        return cls(torch.device("cuda" if use_gpu else "cpu"), torch.bfloat16 if bf16 else torch.float32)

    @property
    def name(self) -> str:
        """The GPU's name, or cpu."""
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"

    @property
    def architecture(self) -> str:
        """cpu, or the GPU's: sm_90."""
        return "sm_{}{}".format(*torch.cuda.get_device_capability(self.device)) if self.device.type == "cuda" else "cpu"

    @property
    def precision(self) -> str:
        """fp32 or bf16."""
        return "bf16" if self.dtype == torch.bfloat16 else "fp32"
