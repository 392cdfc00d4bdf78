"""What a Triton kernel compiles to on an architecture, read from its machine code. Needs no GPU.

Registers, stack and static shared memory come from `cuobjdump -res-usage`, spills and the width of loads and stores
from `cuobjdump -sass`, both of Triton's own wheel; dynamic shared memory from the compiler's metadata.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

ARCHITECTURES = (80, 90, 100)
POINTERS = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


@dataclass(frozen=True)
class Resources:
    """Of one kernel on one architecture."""

    registers: int  # per thread
    spills: int  # instructions that store to or load from local memory
    stack: int  # bytes per thread
    shared: int  # bytes per program, static and dynamic
    load_bits: int  # of the widest load from global memory
    narrow_loads: int  # loads from global memory of less than the widest
    store_bits: int  # of the widest store to global memory


@dataclass(frozen=True)
class Launch:
    """A kernel as its launcher calls it: everything that decides what is compiled."""

    kernel: Any  # a function under triton.jit
    signature: tuple[tuple[str, str], ...]  # (parameter, "*bf16", "i64", "fp32" ..., or "constexpr")
    constants: tuple[tuple[str, Any], ...]  # (parameter, value) of the "constexpr" ones
    aligned: tuple[str, ...]  # pointers and integers that are multiples of 16: only loads through these can be wide
    num_warps: int

    @property
    def name(self) -> str:
        """file.kernel, as in adaln._adaln_forward."""
        return f"{self.kernel.fn.__module__.rpartition('.')[2]}.{self.kernel.fn.__name__}"


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Records launches, in order, instead of running them."""
    launches: list[Launch] = []

    def record(kernel: Any, *arguments: Any, grid: Any, warmup: bool, num_warps: int = 4, **named: Any) -> None:
        names = [parameter.name for parameter in kernel.params]
        values = dict(zip(names, arguments, strict=False)) | named
        # Triton compiles a 1 and a missing pointer in, besides what is declared constexpr.
        constants = {parameter.name for parameter in kernel.params if parameter.is_constexpr}
        constants |= {name for name, value in values.items() if value is None or (type(value) is int and value == 1)}
        launches.append(
            Launch(
                kernel,
                tuple((name, "constexpr" if name in constants else _type(values[name])) for name in names),
                tuple((name, values[name]) for name in names if name in constants),
                tuple(name for name in names if name not in constants and _is_aligned(values[name])),
                num_warps,
            )
        )

    with patch.object(JITFunction, "run", record):
        yield launches


def _type(value: Any) -> str:
    if isinstance(value, Tensor):
        return POINTERS[value.dtype]
    if isinstance(value, bool):
        return "i1"
    if isinstance(value, int):
        return "i32" if -(2**31) <= value < 2**31 else "i64"
    return "fp32"


def _is_aligned(value: Any) -> bool:
    return isinstance(value, Tensor) or (isinstance(value, int) and value % 16 == 0)


def compiled(launch: Launch, capability: int) -> Any:
    """The kernel compiled for an architecture, 80, 90 or 100."""
    names = [name for name, _ in launch.signature]
    constants = {(names.index(name),): value for name, value in launch.constants}
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in launch.aligned}
    source = ASTSource(launch.kernel, dict(launch.signature), constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": launch.num_warps})


def resources(kernel: Any) -> Resources:
    """Read the machine code of a kernel from `compiled`."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(kernel.asm["cubin"])
        usage, code = (
            subprocess.run([CUOBJDUMP, option, cubin], capture_output=True, text=True, check=True).stdout
            for option in ("-res-usage", "-sass")
        )
    numbers = dict(re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", usage))
    shared = max(int(numbers["SHARED"]), kernel.metadata.shared)
    return Resources(int(numbers["REG"]), stack=int(numbers["STACK"]), shared=shared, **count_instructions(code))


def count_instructions(code: str) -> dict[str, int]:
    """Spills and the widths of global loads and stores. LDG.E.128 loads 128 bits, LDGSTS loads into shared memory;
    without a number it is 32 bits, and .U8, .S8, .U16, .S16 are what they say."""
    loads = [_bits(suffixes) for suffixes in re.findall(r"\bLDG(?:STS)?((?:\.\w+)*)(?!\w)", code)]  # not LDGDEPBAR
    stores = [_bits(suffixes) for suffixes in re.findall(r"\bSTG((?:\.\w+)*)", code)]
    widest = max(loads, default=0)
    return {
        "spills": len(re.findall(r"\b(?:STL|LDL)\b", code)),
        "load_bits": widest,
        "narrow_loads": sum(bits < widest for bits in loads),
        "store_bits": max(stores, default=0),
    }


def _bits(suffixes: str) -> int:
    match = re.search(r"\.[US]?(8|16|64|128|256)(?=\.|$)", suffixes)
    return int(match[1]) if match else 32
