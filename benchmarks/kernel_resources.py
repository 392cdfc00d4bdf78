"""Registers, spills, shared memory and load width of every Triton kernel, on three architectures, without a GPU.

    python -m benchmarks.kernel_resources            prints them, and what is worse than in kernel_resources.json
    python -m benchmarks.kernel_resources --write    updates kernel_resources.json

Kernels are compiled as their launchers call them at the widths of SiT-S, B, L and XL, in every dtype. Registers, stack
and static shared memory come from `cuobjdump -res-usage`, spills and the width of loads from `cuobjdump -sass`, both of
Triton's wheel; dynamic shared memory from the compiler's metadata.

Exit code 1 if a kernel spills, needs more registers, stack, shared memory or narrow loads than recorded, or does not
load 128 bits at a time where a row allows it. Narrow loads on record are scalars, and the short tail of a row in two
tiles: 128 of 1,152 elements, for which one tile would waste 44 % of its work. The record is of one version of Triton;
under another, only spills and load width are checked.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain, product
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from benchmarks.harness import options
from benchmarks.harness.rows import markdown
from sra_fast.config import SIZES
from sra_fast.files import read_json, write_json
from sra_fast.kernels import adaln, alignment, perturb

RECORD = Path(__file__).with_name("kernel_resources.json")
WIDTHS = sorted({hidden for _, hidden, _ in SIZES.values()})
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
DTYPES = {"bf16": BF16, "fp32": FP32, "fp16": FP16}
DISTANCES = ("cosine", "cosine_channel", "smooth_l1")  # l1 and l2 differ from the last by an instruction or two
ARCHITECTURES = (80, 90, 100)
POINTERS = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
BATCH, TOKENS = 32, 256
MUST_NOT_GROW = ("registers", "stack", "shared", "narrow_loads")
WIDEST = 128  # bits

Usage = dict[str, dict[str, int]]  # "adaln._adaln_forward, D = 1152, bf16, sm_90" -> resources


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


Launchers = Iterator[tuple[str, list[Launch]]]  # (shape, launches at this shape)


def _norms() -> Launchers:
    """As the model calls them: modulations are views into one tensor."""
    dtypes = [(name, dtype, dtype) for name, dtype in DTYPES.items()] + [("bf16 and fp32", BF16, FP32)]
    for width, (name, dtype, modulation) in product(WIDTHS, dtypes):
        x, per_token = torch.empty(BATCH, TOKENS, width, dtype=dtype), torch.empty(BATCH, TOKENS)
        bias, vectors = torch.empty(width, dtype=dtype), torch.empty(BATCH, 6, width, dtype=modulation)
        two, three = vectors[:, :2], vectors[:, :3]
        with recorded() as launches:
            adaln._forward(x, None, None, two, 1e-6)
            adaln._backward(None, x, x, None, None, two, per_token, per_token)
            adaln._forward(x, x, bias, three, 1e-6)
            adaln._backward(x, x, x, x, bias, three, per_token, per_token)
        yield f"D = {width}, {name}", launches


def _distances() -> Launchers:
    for width, (name, dtype) in product(WIDTHS, DTYPES.items()):
        x = torch.empty(BATCH, TOKENS, width, dtype=dtype)
        with recorded() as launches, patch.object(alignment, "_check"):  # tensors are on the CPU; nothing reads them
            for distance in DISTANCES:
                _, coefficients = alignment._alignment._init_fn(x, x, distance)
                alignment._alignment_backward._init_fn(torch.empty(()), x, x, coefficients, distance)
        yield f"D = {width}, {name}", launches


def _draws() -> Launchers:
    """For pixels, and for the stored moments of 4-channel latents."""
    labels, vector = torch.empty(BATCH, dtype=torch.int64), torch.empty(4)
    inputs: dict[str, tuple[Any, ...]] = {
        "pixels": (torch.empty(BATCH, 3, 64, 64), labels, labels, None, None, False),
        "fp16 moments": (torch.empty(BATCH, 8, 32, 32, dtype=FP16), labels, labels, vector, vector, True),
    }
    for (path, times), name in product((("linear", "uniform"), ("cosine", "lognormal")), inputs):
        settings: tuple[Any, ...] = (3, path, times, 0.2, 1000, 0.1, True)
        with recorded() as launches:
            perturb._launch(*inputs[name], *settings)
        yield f"{name}, {path}, {times}", launches


def _variant(launch: Launch) -> str:
    """What a kernel is specialised for apart from shape and dtypes."""
    constants = launch.constants
    if launch.name == "rows._adaln_total":
        return "" if "bias" in constants else " gated"
    if launch.name.startswith("adaln."):
        return "" if "branch" in constants else " gated"
    return f" {constants['DISTANCE']}" if "DISTANCE" in constants else ""


def launches() -> Iterator[tuple[str, Launch]]:
    """(description without the architecture, launch) of every kernel. A kernel that several shapes share is described
    by the first of them; of launches that differ in the number of partial sums only, the first is kept."""
    known: set[tuple[str, int] | str] = set()
    for shape, recording in chain(_norms(), _distances(), _draws()):
        for launch in recording:
            description = f"{launch.name}{_variant(launch)}, {shape}"
            content = launch.source.hash(), launch.num_warps
            if content not in known and description not in known:
                known |= {content, description}
                yield description, launch


def measure(every: Sequence[tuple[str, Launch]], architectures: Sequence[int] = ARCHITECTURES) -> Usage:
    """Resources of all launches on the architectures. Compilation holds the interpreter's lock: threads gain little."""
    return {
        f"{name}, sm_{capability}": resources(compiled(launch, capability))
        for name, launch in every
        for capability in architectures
    }


def complaints(usage: Usage, record: dict[str, Any]) -> list[str]:
    """What is wrong or worse than recorded, a line each."""
    lines = []
    is_comparable = record["triton"] == triton.__version__
    for name, now in usage.items():
        before = record["kernels"].get(name)
        if now["spills"]:
            lines.append(f"{name}: {now['spills']} instructions spill registers")
        if 0 < now["load_bits"] < WIDEST and not name.startswith(("rows.", "alignment._alignment_mean")):
            lines.append(f"{name}: loads {now['load_bits']} bits at a time; must be {WIDEST}")
        if before is None:
            lines.append(f"{name}: not on record (--write)")
        elif is_comparable:
            lines += [
                f"{name}: {now[field]} {field}, {before[field]} on record"
                for field in MUST_NOT_GROW
                if now[field] > before.get(field, 0)
            ]
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    """The program. Returns its exit code: 1 if there are complaints."""
    parser = options.parser("kernel_resources", __doc__)
    parser.add_argument("--write", action="store_true", help="update kernel_resources.json")
    args = parser.parse_args(arguments)
    usage = measure(list(launches()))
    fields = list(next(iter(usage.values())))
    print(markdown(["kernel", *fields], [[name, *map(str, now.values())] for name, now in usage.items()]))
    if args.write:
        write_json(RECORD, {"triton": triton.__version__, "kernels": usage})
    lines = complaints(usage, read_json(RECORD))
    for line in lines:
        print(line)
    return 1 if lines else 0


if __name__ == "__main__":
    raise SystemExit(main())
