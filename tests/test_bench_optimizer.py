"""Ways to update: all compute AdamW, EMA and copies, and one that does not gets no number."""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from benchmarks import bench_optimizer
from benchmarks.bench_optimizer import (
    ROOF,
    SETTINGS,
    WAYS,
    SharedState,
    gate,
    make_gradients,
    make_start,
    measure_rows,
    our_way,
)
from benchmarks.harness.options import sit
from benchmarks.harness.rows import read
from benchmarks.rivals.optimizers import apex_way, rival_way
from sra_fast.errors import Refused
from sra_fast.kernels.adamw_ema import adamw_ema_ref, parameter_ref
from sra_fast.kernels.gradient_norm import gradient_norm_ref
from sra_fast.kernels.registry import why_unavailable
from sra_fast.tuning.timing import GateFailed

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def eager(monkeypatch):
    """Compiling takes longer than everything else here; the small report in test_gpu_report.py compiles."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)


@pytest.fixture
def config():
    """Three blocks of width 32."""
    base = sit("s", depth=3)
    return replace(base, model=replace(base.model, hidden=32, heads=2, classes=10), optim=SETTINGS)


@pytest.fixture
def start(config):
    return make_start(config, CPU)


def test_every_way_is_timed_with_its_bytes(config):
    """44 bytes a parameter, 40 with bf16 gradients."""
    ours = [] if why_unavailable("adamw_ema", "cpu") else ["ours", "ours, bf16 gradients"]
    names = [*ours, "torch, fused and foreach", "torch, defaults", "reference, compiled, bf16 gradients"]
    roof, *rows = measure_rows(config, "s", names, CPU, repeats=3, warmup=1)
    assert [row["params"]["way"] for row in rows] == names
    assert roof["params"]["way"] == ROOF
    assert roof["bytes"] == 44 * roof["params"]["parameters"]
    for row in rows:
        assert "error" not in row
        assert len(row["samples_ms"]) == 3
        assert row["bytes"] == row["params"]["parameters"] * (40 if "bf16" in row["params"]["way"] else 44)
        assert row["roof_share"] > 0


FAULTS = {
    "no clipping": "weight",
    "no bias correction": "weight",
    "betas swapped": "weight",
    "no decay": "weight",
    "EMA one update behind": "EMA",
    "teacher kept": "teacher",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_an_update_that_computes_something_else_is_named(start, fault):
    def broken(weight, adam, ema, student, teacher, rates, weight_decay, eps):
        stale = weight.clone()
        if fault == "no clipping":
            rates = rates._replace(scale=torch.ones_like(rates.scale))
        elif fault == "no bias correction":
            rates = rates._replace(bias2=torch.ones_like(rates.bias2))
        elif fault == "betas swapped":
            rates = rates._replace(blend1=rates.blend2, blend2=rates.blend1)
        decay = 0.0 if fault == "no decay" else weight_decay
        parameter_ref(weight, adam, ema, student, None if fault == "teacher kept" else teacher, rates, decay, eps)
        if fault == "EMA one update behind":
            ema.lerp_(weight, -rates.blend_ema / (1 - rates.blend_ema)).lerp_(stale, rates.blend_ema)

    update = partial(adamw_ema_ref, parameter=broken)
    way = our_way(SharedState(start), make_gradients(start)[torch.float32], gradient_norm_ref, update)
    with pytest.raises(GateFailed, match=f"ours: {FAULTS[fault]} of "):
        gate("ours", way, start)


class StandIn:
    """apex's FusedAdam by torch's AdamW."""

    def __init__(self, params, adam_w_mode, **options):
        assert adam_w_mode
        self.step = torch.optim.AdamW(params, **options).step


def test_apex_is_called_as_its_functions_are_declared(start, monkeypatch):
    modules = {"amp_C": {}, "apex.optimizers": {"FusedAdam": StandIn}}
    modules["apex.contrib.clip_grad"] = {"clip_grad_norm_": torch.nn.utils.clip_grad_norm_}
    for name, functions in modules.items():
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(**functions))
    gate("torch's arithmetic", apex_way(start, make_gradients(start)[torch.float32], SETTINGS), start)
    monkeypatch.setitem(sys.modules, "apex.optimizers", None)
    with pytest.raises(Refused, match="needs NVIDIA apex"):
        apex_way(start, make_gradients(start)[torch.float32], SETTINGS)


def test_what_fails_or_does_not_fit_is_a_row_and_the_exit_code(config, monkeypatch, tmp_path, capsys):
    def too_large(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    def forgets(state, gradients):
        return rival_way(state.start, gradients[torch.float32], SETTINGS)._replace(call=lambda: None)

    monkeypatch.setenv("SRA_FAST_RESULTS", str(tmp_path))
    monkeypatch.setattr(bench_optimizer.options, "sit", lambda *_, **__: config)
    monkeypatch.setitem(WAYS, "large", too_large)
    monkeypatch.setitem(WAYS, "forgets", forgets)
    words = ["--size", "s", "--depth", "3", "--repeats", "2", "--warmup", "1", "--device", "cpu", "--ways"]
    assert bench_optimizer.main([*words, "large", "forgets", "apex", "reference, eager"]) == 1
    assert "no number: disagrees with fp64" in capsys.readouterr().out
    rows = {row["params"]["way"]: row for row in read(tmp_path / "optimizer-s-depth3.json")["rows"]}
    assert rows["large"]["error"].startswith("out of memory")
    assert rows["apex"]["error"] == "needs a GPU"
    assert rows["forgets"]["error"].startswith("disagrees with fp64: forgets: weight of")
    assert len(rows["reference, eager"]["samples_ms"]) == 2
