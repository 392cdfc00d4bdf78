"""What computes each op of a run: decided once, printed, and saved with the results."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from sra_fast.config import Config
from sra_fast.errors import Refused
from sra_fast.hardware import Hardware
from sra_fast.kernels import language
from sra_fast.kernels.perturb import NoisedBatch
from sra_fast.kernels.registry import OPS, why_unavailable
from sra_fast.model.attention import attention_operator, candidates, choose_attention

SDPA = attention_operator("sdpa")

EXECUTIONS = {
    "eager": "eager",
    "compiled": "compiled by torch.compile, during the first steps",
    "graph": "one CUDA graph of the compiled step, captured after the first steps",
}


DDPM_NOTE = "DiT reads its noise levels from tables, for which there is no fused kernel"


@dataclass(frozen=True)
class Backends:
    """The function that computes each op, and how a step is executed. kernels/registry.py has the ops' functions.

    Attributes:
        adaln, ..., adamw_ema: functions with the signatures of the references in kernels/.
        attention: qkv (B, T, 3, H, d) -> (B, T, H d).
        execution: a key of `EXECUTIONS`.
        names: {op: "fused" or "reference", "attention": its backend}.
        notes: lines on choices that a user might not expect.
    """

    adaln: Callable[..., Tensor] = OPS["adaln"].reference
    gated_adaln: Callable[..., tuple[Tensor, Tensor]] = OPS["gated_adaln"].reference
    gated_residual: Callable[..., Tensor] = OPS["gated_residual"].reference
    linear_gelu: Callable[[Tensor, Tensor, Tensor], Tensor] = OPS["linear_gelu"].reference
    alignment: Callable[..., Tensor] = OPS["alignment"].reference
    perturb: Callable[..., NoisedBatch] = OPS["perturb"].reference
    gradient_norm: Callable[..., Tensor] = OPS["gradient_norm"].reference
    adamw_ema: Callable[..., None] = OPS["adamw_ema"].reference
    attention: Callable[[Tensor], Tensor] = SDPA
    execution: str = "eager"
    names: dict[str, str] = field(default_factory=lambda: {**dict.fromkeys(OPS, "reference"), "attention": "sdpa"})
    notes: tuple[str, ...] = ()

    @classmethod
    def resolve(cls, config: Config, hardware: Hardware) -> Backends:
        """What `kernels.*`, `model.attention` and `train.execution` come to on this machine.

        Raises:
            Refused: if an option names an implementation that is not available.
        """
        names = {op: _implementation(op, config, hardware.architecture) for op in OPS}
        functions = {op: getattr(OPS[op], name) for op, name in names.items()}
        head = config.model.hidden // config.model.heads
        names["attention"] = choose_attention(
            config.model.attention, hardware.device, hardware.dtype, head, config.deterministic
        )
        execution = choose_execution(config.train.execution, hardware.device)
        return cls(
            **functions,
            attention=attention_operator(names["attention"]),
            execution=execution,
            names=names,
            notes=tuple(_notes(names, execution, config, hardware)),
        )

    def summary(self) -> dict[str, str]:
        """{op: what computes it, "step": how it is executed}."""
        return {**self.names, "step": self.execution}

    def for_mlp(self) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        """`linear_gelu` where no gradient is needed, which the fused one does not have; otherwise the reference."""
        return OPS["linear_gelu"].reference if torch.is_grad_enabled() else self.linear_gelu

    def for_fp32(self) -> Backends:
        """The same with PyTorch's choice of attention: a backend chosen for bf16 may not take fp32."""
        return replace(self, attention=SDPA, names={**self.names, "attention": "sdpa"})


def _implementation(op: str, config: Config, architecture: str) -> str:
    """ "fused" or "reference", the attribute of `Op` that computes it."""
    named = getattr(config.kernels, op)
    choice = named or config.kernels.default
    obstacle = DDPM_NOTE if _uses_ddpm_tables(op, config) else why_unavailable(op, architecture)
    if choice == "reference":
        return "reference"
    if choice == "auto":  # unmeasured, as on a CPU
        return "fused" if OPS[op].of == "library" and not obstacle else "reference"
    has_kernel = OPS[op].fused is not None and not _uses_ddpm_tables(op, config)
    if OPS[op].of == "torch" and obstacle:  # on a CPU, where Triton's interpreter runs the other kernels
        has_kernel = False
    if named is None and not has_kernel:  # kernels.default = fused is for the ops that have a kernel
        return "reference"
    if obstacle:
        raise Refused(f"kernels.{op}: 'fused' given, but {obstacle}; must be auto or reference")
    return "fused"


def undecided(config: Config, hardware: Hardware) -> dict[str, tuple[str, ...]]:
    """{op, or "attention": its implementations}, where `config` says auto and there are several. The first is the one
    that is taken unmeasured."""
    choices: dict[str, tuple[str, ...]] = {}
    for op in OPS:
        is_auto = (getattr(config.kernels, op) or config.kernels.default) == "auto"
        obstacle = _uses_ddpm_tables(op, config) or why_unavailable(op, hardware.architecture)
        if is_auto and not obstacle:
            first = _implementation(op, config, hardware.architecture)
            choices[op] = (first, "fused" if first == "reference" else "reference")
    head = config.model.hidden // config.model.heads
    backends = candidates(hardware.device, hardware.dtype, head, config.deterministic)
    if config.model.attention == "auto" and len(backends) > 1:
        choices["attention"] = backends
    return choices


def _uses_ddpm_tables(op: str, config: Config) -> bool:
    return op == "perturb" and config.model.family == "dit"


def _notes(names: dict[str, str], execution: str, config: Config, hardware: Hardware) -> Iterator[str]:
    if _uses_ddpm_tables("perturb", config):
        yield f"perturb: {DDPM_NOTE}"
    obstacle = why_unavailable("adamw_ema", hardware.architecture)
    if obstacle and names["adamw_ema"] == "reference" and config.kernels.adamw_ema != "reference":
        yield f"adamw_ema: the optimizer runs as PyTorch operators: {obstacle}"
    if hardware.device.type == "cuda" and (ops := undecided(config, hardware)):
        yield f"{', '.join(ops)}: a run measures its implementations when it starts, and takes the fastest"
    if hardware.device.type == "cuda" and execution == "eager" and config.train.execution == "auto":
        yield f"step: not compiled, which is slow: torch.compile needs {_why_not_compiled(hardware.device)}"


def choose_execution(choice: str, device: torch.device) -> str:
    """A key of `EXECUTIONS`. auto is the graph on a GPU, and eager on a CPU, where compiling takes a minute or two,
    longer than short runs save.

    Raises:
        Refused: if `choice` cannot run on this device.
    """
    gpu = device.type == "cuda"
    if choice == "eager" or (choice == "auto" and not gpu):
        return "eager"
    if choice == "graph" and not gpu:
        raise Refused("train.execution", choice, "needs an NVIDIA GPU; must be auto, eager or compiled")
    obstacle = _why_not_compiled(device)
    if choice == "auto":
        return "eager" if obstacle else "graph"
    if obstacle:
        raise Refused("train.execution", choice, f"needs {obstacle}")
    return choice


def _why_not_compiled(device: torch.device) -> str:
    """What torch.compile lacks on this machine; '' if nothing."""
    if device.type == "cuda":
        if not language.AVAILABLE:
            return "Triton (pip install triton)"
        is_supported = torch.cuda.get_device_capability(device) >= (7, 0)
        return "" if is_supported else "a GPU of compute capability 7.0 or later"
    compiler = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")  # Inductor's choice
    return "" if shutil.which(compiler) else f"a C++ compiler ({compiler})"


REFERENCE = Backends()
