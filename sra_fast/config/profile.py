"""How a step is profiled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from sra_fast.config.checks import Section


@dataclass(frozen=True)
class ProfileConfig(Section):
    """Which steps are traced, what is recorded of them, and where it goes."""

    section: ClassVar[str] = "profile"

    steps: int = 5
    """Steps that the figures are of. Two more are traced, one before and one after them."""
    warmup: int = 3
    """Steps before anything is traced: compilation, autotuning and the allocator's growth belong there."""
    out: str = "profile"
    """Folder for profile.json and the traces; `tensorboard --logdir FOLDER` shows them."""
    top: int = 20
    """Kernels to list."""
    nvtx: bool = False
    """Write nothing, but run the steps with NVTX ranges between cudaProfilerStart and cudaProfilerStop, for
    `nsys profile --capture-range=cudaProfilerApi --cuda-graph-trace=node sra-fast profile ... --profile.nvtx`."""
    shapes: bool = False
    """Record the shapes of every op's inputs."""
    stack: bool = False
    """Record the Python stack of every op. Large and slow."""
    memory: bool = False
    """Record every allocation, for the plugin's memory view."""

    def check(self) -> None:
        self.need_positive("steps", "warmup", "top")
        self.need(self.out != "", "out", "must be a folder")
