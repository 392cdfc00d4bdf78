"""What a run computes on and with."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from sra_fast.config import refuse_unless


def set_deterministic(wanted: bool) -> None:
    """Ask every backend for bitwise reproducible kernels, or no longer. The first time before anything is computed on a
    GPU: cuBLAS reads its part of it when it starts."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(wanted)
    # Filling new memory is there to find reads of what was never written; it costs a pass over every tensor.
    torch.utils.deterministic.fill_uninitialized_memory = False


@dataclass(frozen=True)
class Hardware:
    """A device and the compute type of the networks on it."""

    device: torch.device
    dtype: torch.dtype

    @classmethod
    def choose(cls, device: str = "auto", precision: str = "auto") -> Hardware:
        """The best this machine has within the wishes of `train.device` and `train.precision`.

        Raises:
            Refused: if a GPU is asked for and none is usable.
        """
        cuda = torch.cuda.is_available()
        refuse_unless(device != "cuda" or cuda, "device", device, "no NVIDIA GPU is usable here; must be auto or cpu")
        chosen = torch.device("cuda" if cuda and device != "cpu" else "cpu")
        bf16 = precision == "bf16"
        if precision == "auto":
            bf16 = chosen.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return cls(chosen, torch.bfloat16 if bf16 else torch.float32)

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
