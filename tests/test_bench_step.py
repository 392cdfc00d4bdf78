"""The rival steps compute what ours computes, and no number comes from one that does not."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks import bench_step
from benchmarks.baseline import RUNGS, PublicStep
from benchmarks.timing import GateFailed
from sra_fast.config import Config

CPU = torch.device("cpu")


@pytest.fixture
def config() -> Config:
    """A SiT-S/2 of four blocks on 16 tokens."""
    base = bench_step.make_config("s", 16, batch=3)
    return replace(base, model=replace(base.model, depth=4))


def gate_of(config: Config) -> bench_step.Gate:
    return bench_step.Gate(config, bench_step.make_batch(config), CPU)


def test_every_eager_rung_passes_the_gate(config):
    steps = {name: bench_step.build(name, config, CPU) for name in ("public", "bf16 teacher to its tap", "ours eager")}
    gate_of(config)(steps)


@pytest.mark.parametrize("fault", ["times swapped", "other weights", "other distance"])
def test_a_step_that_computes_something_else_gets_no_number(config, fault, monkeypatch):
    step = PublicStep(config, RUNGS[0], CPU)
    if fault == "times swapped":
        losses = step.losses
        monkeypatch.setattr(
            step, "losses", lambda x, noise, t, t_teacher, labels: losses(x, noise, t_teacher, t, labels)
        )
    elif fault == "other weights":
        step.model.ap_head.linear1.bias.data.add_(1.0)
    else:
        step.config = replace(config, align=replace(config.align, distance="l1"))
    with pytest.raises(GateFailed, match="public: loss"):
        gate_of(config)({"public": step})


def test_a_step_of_the_public_recipe_trains(config):
    step = PublicStep(config, RUNGS[0], CPU)
    x, labels, _ = bench_step.make_batch(config)
    before = {name: parameter.clone() for name, parameter in step.model.named_parameters()}
    for _ in range(2):
        step(x, labels)
    changed = [name for name, parameter in step.model.named_parameters() if not torch.equal(parameter, before[name])]
    assert "final_layer.linear.weight" in changed
    assert "pos_embed" not in changed
    weight, average = step.model.final_layer.linear.weight, step.ema.final_layer.linear.weight
    assert 0 < float(average.detach().abs().sum()) < float(weight.detach().abs().sum())


def test_rows_say_images_per_second_and_share_of_the_roof(config):
    made = bench_step.rows(
        config, "s", ["public", "ours eager", "+ CUDA graph"], CPU, repeats=2, warmup=1, interleave="all"
    )
    assert made.pop()["error"] == "needs a GPU"
    for row in made:
        assert len(row["samples_ms"]) == 2
        assert row["images_per_s"] == pytest.approx(3e3 / row["median_ms"])
        assert 0 < row["roof_share"] < 1
    assert [row["params"]["rung"] for row in made] == ["public", "ours eager"]
