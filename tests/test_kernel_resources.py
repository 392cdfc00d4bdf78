"""What Triton's kernels become in machine code: nothing spills, nothing grew, loads are wide; and that this is seen."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

import triton
import triton.language as tl

from benchmarks import kernel_resources
from benchmarks.kernel_resources import compiled, count_instructions, recorded, resources
from sra_fast.files import read_json


@triton.jit
def scaled(x, out, stride, WIDTH: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    value = tl.load(x + row * stride + column).to(tl.float32)
    tl.store(out + row * WIDTH + column, (value / tl.sum(value, axis=0)).to(out.dtype.element_ty))


def launch(stride: int = 1024, width: int = 1024, warps: int = 4, dtype: torch.dtype = torch.bfloat16):
    x = torch.empty(2, width, dtype=dtype)
    with recorded() as made:
        scaled[(2,)](x, torch.empty_like(x), stride, WIDTH=width, num_warps=warps)
    return made[0]


def test_a_tidy_kernel_is_seen_as_one() -> None:
    found = resources(compiled(launch(), 90))
    assert 8 <= found.pop("registers") < 40
    assert found.pop("shared") >= 16  # for the sum over warps
    assert found == {"spills": 0, "stack": 0, "load_bits": 128, "narrow_loads": 0, "store_bits": 128}


def test_rows_that_are_not_aligned_are_loaded_in_small_pieces() -> None:
    assert resources(compiled(launch(stride=1023), 90))["load_bits"] == 16


def test_spills_are_seen() -> None:
    """16,384 fp32 values in one warp: 512 a thread, of 255 registers."""
    found = resources(compiled(launch(stride=16384, width=16384, warps=1, dtype=torch.float32), 90))
    assert found["spills"] > 100
    assert found["stack"] > 0


def test_loads_are_told_from_their_barriers() -> None:
    code = "LDG.E.128 R4 ; LDGSTS.E.BYPASS.128 [R1] ; LDGDEPBAR ; LDG.E.U16 R2 ; LDG R3 ; STG.E.64 R5 ; STL [R1] ;"
    assert count_instructions(code) == {
        "spills": 1,
        "load_bits": 128,
        "narrow_loads": 2,
        "store_bits": 64,
    }


RECORD = {
    "triton": triton.__version__,
    "kernels": {
        "k, sm_90": {"registers": 40, "spills": 0, "stack": 0, "shared": 1024, "load_bits": 128, "narrow_loads": 2}
    },
}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, None),
        ({"registers": 39}, None),
        ({"registers": 41}, "41 registers, 40 on record"),
        ({"narrow_loads": 3}, "3 narrow_loads, 2 on record"),
        ({"spills": 3}, "3 instructions spill registers"),
        ({"load_bits": 64}, "loads 64 bits at a time; must be 128"),
    ],
)
def test_what_is_worse_is_complained_about(change: dict[str, int], said: str | None) -> None:
    found = {"k, sm_90": RECORD["kernels"]["k, sm_90"] | change}
    lines = kernel_resources.complaints(found, RECORD)
    assert [line.removeprefix("k, sm_90: ") for line in lines] == ([said] if said else [])


def test_a_kernel_without_a_record_and_another_compiler() -> None:
    """Another compiler is held to spills and loads alone."""
    usage = {"other, sm_90": RECORD["kernels"]["k, sm_90"]}
    assert kernel_resources.complaints(usage, RECORD) == ["other, sm_90: not on record (--write)"]
    usage = {"k, sm_90": RECORD["kernels"]["k, sm_90"] | {"registers": 99, "spills": 1}}
    assert len(kernel_resources.complaints(usage, RECORD | {"triton": "2.0"})) == 1


def of_xl(every):
    """One kernel of each family as SiT-XL runs it in bf16; the launches of a norm differ from dtype to dtype."""
    wanted = ("adaln._adaln_forward gated", "adaln._adaln_backward gated", "alignment._alignment_tokens_forward cosine")
    wanted = [f"{kernel}, D = 1152, bf16" for kernel in wanted]
    return [(name, launch) for name, launch in every if name in wanted or name.startswith("perturb")][:4]


@pytest.mark.parametrize("which", ["some", pytest.param("all", marks=pytest.mark.slow)])
def test_kernels_are_as_on_record(which) -> None:
    every = list(kernel_resources.launches())
    assert len({description for description, _ in every}) == len(every) >= 160
    record = read_json(kernel_resources.RECORD)
    names = {f"{description}, sm_{capability}" for description, _ in every for capability in (80, 90, 100)}
    assert names == set(record["kernels"])
    usage = kernel_resources.measure(every) if which == "all" else kernel_resources.measure(of_xl(every), (90,))
    assert len(usage) == (len(names) if which == "all" else 4)
    assert kernel_resources.complaints(usage, record) == []
