"""Ways to update: all compute AdamW, EMA and copies, and one that does not gets no number."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch

from benchmarks import bench_optimizer
from benchmarks.bench_optimizer import (
    ROOF,
    WAYS,
    Held,
    gate,
    make_config,
    make_gradients,
    make_start,
    obstacle,
    our_way,
    rows,
    torch_way,
)
from benchmarks.harness.rows import RESULTS, read
from benchmarks.harness.timing import GateFailed
from sra_fast import kernels
from sra_fast.kernels import library
from sra_fast.kernels.adamw_ema import adamw_ema, adamw_ema_ref, parameter_ref
from sra_fast.kernels.gradient_norm import gradient_norm, gradient_norm_ref

CPU = torch.device("cpu")
EAGER = [name for name in WAYS if "compiled" not in name and not obstacle(name, CPU)]


@pytest.fixture
def config():
    """Three blocks of width 32."""
    base = make_config("s", depth=3)
    return replace(base, model=replace(base.model, hidden=32, heads=2, classes=10))


@pytest.fixture
def start(config):
    return make_start(config, CPU)


def test_every_way_is_timed_with_its_bytes(config):
    """44 bytes a parameter, 40 with bf16 gradients."""
    names = [*EAGER, "reference, compiled, bf16 gradients"]
    roof, *made = rows(config, "s", names, CPU, repeats=3, warmup=1)
    assert [row["params"]["way"] for row in made] == names
    assert roof["params"]["way"] == ROOF
    assert roof["bytes"] == 44 * roof["params"]["parameters"]
    for row in made:
        assert "error" not in row
        assert len(row["samples_ms"]) == 3
        assert row["bytes"] == row["params"]["parameters"] * (40 if "bf16" in row["params"]["way"] else 44)
        assert row["roof_share"] > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_our_update_passes_with_either_gradients(start, dtype):
    gate("ours", our_way(Held(start), make_gradients(start)[dtype], gradient_norm_ref, adamw_ema_ref), start)


@pytest.mark.skipif(bool(library.why_unavailable()), reason="the compiled operators are not built")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_our_compiled_operator_passes_with_either_gradients(start, dtype):
    gate("ours", our_way(Held(start), make_gradients(start)[dtype], gradient_norm, adamw_ema), start)


def planted(fault):
    def broken(weight, adam, ema, student, teacher, rates, weight_decay, eps):
        if fault == "no clipping":
            rates = rates._replace(scale=torch.ones_like(rates.scale))
        elif fault == "no bias correction":
            rates = rates._replace(bias2=torch.ones_like(rates.bias2))
        elif fault == "betas swapped":
            rates = rates._replace(blend1=rates.blend2, blend2=rates.blend1)
        elif fault == "EMA one update behind":
            stale = weight.clone()
        elif fault == "no decay":
            weight_decay = 0.0
        kept = fault == "teacher kept"
        parameter_ref(weight, adam, ema, student, None if kept else teacher, rates, weight_decay, eps)
        if fault == "EMA one update behind":
            ema.lerp_(weight, -rates.blend_ema / (1 - rates.blend_ema)).lerp_(stale, rates.blend_ema)

    return partial(adamw_ema_ref, parameter=broken)


@pytest.mark.parametrize(
    ("fault", "named"),
    [
        ("no clipping", "weight"),
        ("no bias correction", "weight"),
        ("betas swapped", "weight"),
        ("no decay", "weight"),
        ("EMA one update behind", "EMA"),
        ("teacher kept", "teacher"),
    ],
)
def test_an_update_that_computes_something_else_is_named(start, fault, named):
    way = our_way(Held(start), make_gradients(start)[torch.float32], gradient_norm_ref, planted(fault))
    with pytest.raises(GateFailed, match=f"ours: {named} of "):
        gate("ours", way, start)


def test_the_gate_leaves_the_gradients_as_they_were(start):
    given = make_gradients(start)[torch.float32]
    before = [gradient.clone() for gradient in given]
    gate("ours", our_way(Held(start), given, gradient_norm_ref, adamw_ema_ref), start)
    assert all(map(torch.equal, given, before))


def test_what_fails_or_does_not_fit_is_a_row_and_the_others_go_on(config, monkeypatch):
    def too_large(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    def forgets(held, given):
        way = torch_way(held.start, given[torch.float32], fused=True)
        return replace(way, call=lambda: None)

    monkeypatch.setitem(WAYS, "large", too_large)
    monkeypatch.setitem(WAYS, "forgets", forgets)
    names = ["large", "forgets", "apex", "reference, eager"]
    made = {row["params"]["way"]: row for row in rows(config, "s", names, CPU, 2, 1)}
    assert made["apex"]["error"] == "apex is not installed"
    assert made["large"]["error"].startswith("out of memory")
    assert made["forgets"]["error"].startswith("disagrees with fp64: forgets: weight of")
    assert len(made["reference, eager"]["samples_ms"]) == 2


def test_a_failing_gate_is_the_exit_code(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("SRA_FAST_RESULTS", str(tmp_path))
    monkeypatch.setitem(
        WAYS,
        "reference, eager",
        lambda held, given: our_way(held, given[torch.float32], gradient_norm_ref, planted("no decay")),
    )
    words = ["--size", "s", "--depth", "3", "--repeats", "1", "--warmup", "1", "--device", "cpu", "--ways"]
    assert bench_optimizer.main([*words, "reference, eager"]) == 1
    assert "no number: disagrees with fp64" in capsys.readouterr().out
    assert (tmp_path / "optimizer-s-depth3.json").exists()


def test_auto_takes_the_compiled_operators_only_where_a_committed_result_shows_them_winning():
    wins = {where for op in kernels.COMPILED for where in kernels.WINS.get(op, ())}
    assert wins <= {"cpu"}, "results of GPUs are in folders of their device's name: look there too"
    for architecture in wins:
        found = [path for path in RESULTS.glob(f"{architecture}-*/optimizer-*.json") if "ours" in path.read_text()]
        medians = [{row["params"]["way"]: row["median_ms"] for row in read(path)["rows"]} for path in found]
        told = [by_way for by_way in medians if by_way.get("ours")]
        assert told, f"no result for {architecture}"
        for by_way in told:
            rivals = [ms for way, ms in by_way.items() if ms and "ours" not in way and way != ROOF]
            assert by_way["ours"] < min(rivals)
