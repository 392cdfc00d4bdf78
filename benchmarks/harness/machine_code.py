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
from pathlib import Path
from typing import Any, NamedTuple
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


class Launch(NamedTuple):
    """A kernel as its launcher calls it."""

    kernel: Any  # a function under triton.jit
    constants: dict[str, Any]  # parameters that are compiled in
    source: ASTSource  # with everything else that decides what is compiled
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
        values = dict(zip(kernel.arg_names, arguments, strict=False)) | named
        # Triton compiles a 1 and a missing pointer in, besides what is declared constexpr.
        declared = {parameter.name for parameter in kernel.params if parameter.is_constexpr}
        constants = {
            name: value
            for name, value in values.items()
            if name in declared or value is None or (type(value) is int and value == 1)
        }
        signature = {name: "constexpr" if name in constants else _type(values[name]) for name in kernel.arg_names}
        aligned = [name for name in signature if name not in constants and _is_aligned(values[name])]
        attributes = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned}
        launches.append(Launch(kernel, constants, ASTSource(kernel, signature, constants, attributes), num_warps))

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
    """To 16: only loads through such pointers, at multiples of such integers, can be wide."""
    return isinstance(value, Tensor) or (isinstance(value, int) and value % 16 == 0)


def compiled(launch: Launch, capability: int) -> Any:
    """The kernel compiled for an architecture, 80, 90 or 100."""
    options = {"num_warps": launch.num_warps}
    return triton.compile(launch.source, target=GPUTarget("cuda", capability, 32), options=options)


def resources(kernel: Any) -> dict[str, int]:
    """What a kernel from `compiled` needs.

    Returns:
        registers: per thread
        stack: bytes per thread
        shared: bytes per program, static and dynamic
        spills: instructions that store to or load from local memory
        load_bits, store_bits: of the widest load from and store to global memory
        narrow_loads: loads from global memory of less than the widest
    """
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(kernel.asm["cubin"])
        usage, code = (
            subprocess.run([CUOBJDUMP, option, cubin], capture_output=True, text=True, check=True).stdout
            for option in ("-res-usage", "-sass")
        )
    numbers = {name: int(number) for name, number in re.findall(r"\b(REG|STACK|SHARED):(\d+)", usage)}
    instructions = count_instructions(code)
    return {
        "registers": numbers["REG"],
        "spills": instructions.pop("spills"),
        "stack": numbers["STACK"],
        "shared": max(numbers["SHARED"], kernel.metadata.shared),
        **instructions,
    }


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
