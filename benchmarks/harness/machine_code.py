"""What a Triton kernel becomes on an architecture, read from its machine code. Needs no GPU.

Registers, stack and static shared memory come from `cuobjdump -res-usage`, spills and the width of loads and stores
from `cuobjdump -sass`, both of Triton's own wheel; dynamic shared memory from the compiler's metadata.
"""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.cache import get_cache_manager
from triton.runtime.jit import JITFunction

ARCHITECTURES = (80, 90, 100)
POINTERS = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.int32: "i32",
    torch.int64: "i64",
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

    def json(self) -> dict[str, int]:
        """As it is written down."""
        return asdict(self)


@dataclass(frozen=True)
class Launch:
    """A kernel as its launcher calls it: everything that decides what is compiled."""

    kernel: Any  # a function under triton.jit
    signature: tuple[tuple[str, str], ...]  # parameter and "*bf16", "i64", "fp32" ..., or "constexpr"
    constants: tuple[tuple[str, Any], ...]  # of the "constexpr" ones
    aligned: tuple[str, ...]  # pointers and whole numbers that are multiples of 16: only these loads can be wide
    num_warps: int

    @property
    def name(self) -> str:
        """file.kernel, as in adaln._adaln_forward."""
        return f"{self.kernel.fn.__module__.rpartition('.')[2]}.{self.kernel.fn.__name__}"


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Launches in here are noted down, in order, and not made."""
    launches: list[Launch] = []

    def note(kernel: Any, *arguments: Any, grid: Any, warmup: bool, num_warps: int = 4, **named: Any) -> None:
        given = dict(zip((parameter.name for parameter in kernel.params), arguments, strict=False)) | named
        constant = {parameter.name for parameter in kernel.params if parameter.is_constexpr}
        # As Triton has it: a 1 is compiled in, so is a missing pointer.
        constant |= {name for name, value in given.items() if value is None or (type(value) is int and value == 1)}
        types = {name: "constexpr" if name in constant else _type(value) for name, value in given.items()}
        order = [parameter.name for parameter in kernel.params]
        launches.append(
            Launch(
                kernel,
                tuple((name, types[name]) for name in order),
                tuple((name, given[name]) for name in order if name in constant),
                tuple(name for name in order if name not in constant and _aligned(given[name])),
                num_warps,
            )
        )

    with patch.object(JITFunction, "run", note):
        yield launches


def _type(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"*{POINTERS[value.dtype]}"
    if isinstance(value, bool):
        return "i1"
    if isinstance(value, int):
        return "i32" if -(2**31) <= value < 2**31 else "i64"
    return "fp32"


def _aligned(value: Any) -> bool:
    return isinstance(value, Tensor) or (isinstance(value, int) and value % 16 == 0)


def compiled(launch: Launch, capability: int) -> Any:
    """The kernel for an architecture, 80, 90 or 100; Triton's cache answers for sources that have not changed."""
    names = [name for name, _ in launch.signature]
    values = {(names.index(name),): value for name, value in launch.constants}
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in launch.aligned}
    source = ASTSource(launch.kernel, dict(launch.signature), constexprs=values, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": launch.num_warps})


def resources(kernel: Any) -> Resources:
    """Read the machine code of `compiled`'s answer, or what Triton's cache holds of an earlier reading: cuobjdump takes
    longer to start than most kernels to compile."""
    read_by = hashlib.sha256(Path(__file__).read_bytes())
    read_by.update(kernel.asm["cubin"])
    cache, name = get_cache_manager(read_by.hexdigest()), f"{kernel.metadata.shared}.json"
    if found := cache.get_file(name):
        return Resources(**json.loads(Path(found).read_text()))
    result = _disassembled(kernel)
    cache.put(json.dumps(result.json()), name, binary=False)
    return result


def _disassembled(kernel: Any) -> Resources:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(kernel.asm["cubin"])
        usage, code = (_cuobjdump(option, file) for option in ("-res-usage", "-sass"))
    return Resources(**_usage(usage, kernel.metadata.shared), **_instructions(code))


def _cuobjdump(option: str, file: Path) -> str:
    return subprocess.run([CUOBJDUMP, option, file], capture_output=True, text=True, check=True).stdout


def _usage(text: str, dynamic: int) -> dict[str, int]:
    found = dict(re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", text))
    return {"registers": int(found["REG"]), "stack": int(found["STACK"]), "shared": max(int(found["SHARED"]), dynamic)}


def _instructions(text: str) -> dict[str, int]:
    """LDG.E.128 is a load of 128 bits, LDGSTS one into shared memory; without a number it is 32, and .U8, .S8, .U16,
    .S16 are what they say."""
    loads = [_bits(suffixes) for suffixes in re.findall(r"\bLDG(?:STS)?((?:\.\w+)*)(?!\w)", text)]  # not LDGDEPBAR
    stores = [_bits(suffixes) for suffixes in re.findall(r"\bSTG((?:\.\w+)*)", text)]
    widest = max(loads, default=0)
    return {
        "spills": len(re.findall(r"\b(?:STL|LDL)\b", text)),
        "load_bits": widest,
        "narrow_loads": sum(bits < widest for bits in loads),
        "store_bits": max(stores, default=0),
    }


def _bits(suffixes: str) -> int:
    found = re.search(r"\.[US]?(8|16|64|128|256)(?=\.|$)", suffixes)
    return int(found[1]) if found else 32
