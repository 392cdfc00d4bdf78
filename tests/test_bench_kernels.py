"""Ops in the benchmark: what counts as right, what counts as a byte, and that a wrong kernel gets no number."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import bench_kernels
from benchmarks.bench_kernels import case_of
from benchmarks.compare import load
from benchmarks.harness import options
from benchmarks.harness.rows import read
from sra_fast.flops import forward_flops
from sra_fast.kernels import registry
from sra_fast.kernels.adaln import adaln_ref
from sra_fast.tuning.cases import OPS, check, prepared, truth
from sra_fast.tuning.timing import GateFailed

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_eager_implementation_passes_the_gate(op, dtype):
    case = case_of(op, "s", 1, CPU, dtype)
    for which in case.passes:
        right = truth(case, which)
        for name in set(case.implementations) - {"compiled"}:
            check(case, name, which, right)


@pytest.mark.parametrize("op", [op for op in OPS if op != "perturb"])
def test_a_forward_pass_moves_its_inputs_and_outputs_once(op):
    case = case_of(op, "s", 3, CPU, torch.bfloat16)
    moved = [*case.inputs, *prepared(case, case.reference, "forward")()]
    assert case.bytes("forward") == sum(x.numel() * x.element_size() for x in moved)


@pytest.mark.parametrize(
    ("op", "rows", "vectors", "biases"),
    [("adaln", 5, 5, 0), ("gated_adaln", 10, 8, 3), ("gated_residual", 6, 3, 3), ("linear_gelu", 5, 0, 0)],
)
def test_bytes_of_both_passes(op, rows, vectors, biases):
    """In tensors of (B, T, D), of (B, D) and of (D,), bf16; for linear_gelu, besides weight and bias."""
    case = case_of(op, "xl", 2, CPU, torch.bfloat16)
    layer = 4 * (1152 + 1) if op == "linear_gelu" else 0
    assert case.bytes("forward+backward") == 1152 * 2 * (2 * (256 * rows + vectors) + biases + layer)


def test_bytes_of_perturb():
    """Moments in fp16 read, three images in fp32 written; labels, numbers and times."""
    assert case_of("perturb", "s", 2, CPU, torch.float32).bytes("forward") == 2 * (4096 * (2 * 2 + 3 * 4) + 32)


def test_flops_of_attention_are_those_of_the_models_formula():
    """The part of a block that grows with the square of the tokens."""
    config = options.sit("xl").model
    case = case_of("attention", "xl", 3, CPU, torch.float32)
    assert case.inputs[0].shape == (3, 256, 3, 16, 72)
    blocks = [forward_flops(config, blocks) for blocks in (0, 1)]
    linear = 2 * (256 * 1152 * 1152 * (3 + 1 + 8) + 1152 * 6 * 1152)
    assert case.flops("forward") == 3 * (blocks[1] - blocks[0] - linear)
    assert case.flops("forward+backward") == 3 * case.flops("forward")


FAULTS = {
    "another epsilon": lambda x, modulation: adaln_ref(x, modulation, eps=1e-4),
    "NaN in one column": lambda x, modulation: adaln_ref(x, modulation).index_fill(2, torch.tensor([5]), float("nan")),
    "statistics in bf16": lambda x, modulation: adaln_ref(x.bfloat16(), modulation).to(x.dtype),
    "another dtype": lambda x, modulation: adaln_ref(x, modulation).double(),
    "no gradient of the modulation": lambda x, modulation: adaln_ref(x, modulation.detach() + 0 * modulation),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_kernel_gets_no_number_and_the_others_do(monkeypatch, tmp_path, capsys, fault):
    monkeypatch.setitem(registry.OPS, "adaln", registry.Op(adaln_ref, FAULTS[fault]))
    monkeypatch.setattr(
        bench_kernels, "roofs", lambda device, dtype: {"copy_gb_per_s": 10.0, "matmul_tflop_per_s": 1.0}
    )
    monkeypatch.setenv("SRA_FAST_RESULTS", str(tmp_path))
    words = "--ops adaln --sizes s --batch 1 --repeats 3 --warmup 1 --device cpu --implementations eager fused"
    assert bench_kernels.main(words.split()) == 1
    rows = read(tmp_path / "kernels.json")["rows"]
    last = {row["params"]["implementation"]: row for row in rows if row["params"]["pass"] == "forward+backward"}
    assert len(last["eager"]["samples_ms"]) == 3
    assert last["eager"]["roof_share"] > 0
    assert last["fused"]["samples_ms"] == []
    assert "disagrees with the reference: adaln fused" in last["fused"]["error"]
    assert "no number: disagrees" in capsys.readouterr().out


def test_perturb_that_draws_other_labels_is_found():
    case = case_of("perturb", "s", 64, CPU, torch.float32)
    reference = case.implementations["eager"]

    def other(*inputs):
        *drawn, teacher_labels = reference(*inputs)
        return (*drawn, torch.where(teacher_labels == teacher_labels[0], 7, teacher_labels))

    case.implementations["fused"] = other
    with pytest.raises(GateFailed, match="result 6"):
        check(case, "fused", "forward", truth(case, "forward"))


def test_pytest_benchmark_records_the_same_samples(tmp_path):
    """With our stamp; compare.py reads them."""
    pytest.importorskip("pytest_benchmark")
    path = tmp_path / "saved.json"
    words = ["-q", "--benchmark-only", "--benchmark-save-data", f"--benchmark-json={path}", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", "benchmarks/bench_kernels.py", *words, "-k", "gated_residual and eager"]
    # A worker of pytest-xdist turns pytest-benchmark off by its environment.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-1000:]
    saved = json.loads(path.read_text())
    assert {entry["params"]["which"] for entry in saved["benchmarks"]} == {"forward", "forward+backward"}
    for entry in saved["benchmarks"]:
        row = entry["extra_info"]["row"]
        assert row["name"] == "gated_residual"
        assert len(row["samples_ms"]) >= 30
        assert [1e3 * seconds for seconds in entry["stats"]["data"]] == pytest.approx(row["samples_ms"])
    stamp, rows = load(path)
    assert stamp["kind"] in ("cpu", "cuda")
    recorded = [entry["extra_info"]["row"]["samples_ms"] for entry in saved["benchmarks"]]
    assert [runs[0]["samples_ms"] for runs in rows.values()] == [pytest.approx(samples) for samples in recorded]
