"""Ways to update: all compute AdamW, EMA and copies, and one that does not gets no number."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks import bench_optimizer
from benchmarks.bench_optimizer import WAYS, gate, make_config, make_gradients, make_start, our_way, rows, torch_way
from benchmarks.timing import GateFailed
from sra_fast.optim import adamw_ema_ref

CPU = torch.device("cpu")
EAGER = [name for name in WAYS if "compiled" not in name]


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
    names = [*EAGER, "ours, compiled, bf16 gradients"]
    made = rows(config, "s", names, CPU, repeats=3, warmup=1)
    assert [row["params"]["way"] for row in made] == names
    for row in made:
        assert "error" not in row
        assert len(row["samples_ms"]) == 3
        assert row["bytes"] == row["params"]["parameters"] * (40 if "bf16" in row["params"]["way"] else 44)
        assert row["roof_share"] > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_our_update_passes_with_either_gradients(config, start, dtype):
    gate("ours", our_way(config, make_gradients(start)[dtype], CPU, adamw_ema_ref), start)


def planted(fault):
    def broken(weight, gradient, m, v, ema, copies, rates, weight_decay, eps):
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
        made = copies[:1] if fault == "teacher kept" else copies
        adamw_ema_ref(weight, gradient, m, v, ema, made, rates, weight_decay, eps)
        if fault == "EMA one update behind":
            ema.lerp_(weight, -rates.blend_ema / (1 - rates.blend_ema)).lerp_(stale, rates.blend_ema)

    return broken


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
def test_an_update_that_computes_something_else_is_named(config, start, fault, named):
    way = our_way(config, make_gradients(start)[torch.float32], CPU, planted(fault))
    with pytest.raises(GateFailed, match=f"ours: {named} of "):
        gate("ours", way, start)


def test_the_gate_leaves_the_gradients_as_they_were(config, start):
    given = make_gradients(start)[torch.float32]
    before = [gradient.clone() for gradient in given]
    gate("ours", our_way(config, given, CPU, adamw_ema_ref), start)
    assert all(map(torch.equal, given, before))


def test_what_fails_or_does_not_fit_is_a_row_and_the_others_go_on(config, monkeypatch):
    def too_large(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    def forgets(config, start, given, device):
        way = torch_way(start, given[torch.float32], fused=True)
        return replace(way, call=lambda: None)

    monkeypatch.setitem(WAYS, "large", too_large)
    monkeypatch.setitem(WAYS, "forgets", forgets)
    made = {row["params"]["way"]: row for row in rows(config, "s", ["large", "forgets", EAGER[1]], CPU, 2, 1)}
    assert made["large"]["error"].startswith("out of memory")
    assert made["forgets"]["error"].startswith("disagrees with fp64: forgets: weight of")
    assert len(made[EAGER[1]]["samples_ms"]) == 2


def test_a_failing_gate_is_the_exit_code(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("SRA_FAST_RESULTS", str(tmp_path))
    monkeypatch.setattr(bench_optimizer, "adamw_ema_ref", planted("no decay"))
    words = ["--size", "s", "--depth", "3", "--repeats", "1", "--warmup", "1", "--device", "cpu", "--ways"]
    assert bench_optimizer.main([*words, "ours, eager"]) == 1
    assert "no number: disagrees with fp64" in capsys.readouterr().out
    assert (tmp_path / "optimizer-s-depth3.json").exists()
