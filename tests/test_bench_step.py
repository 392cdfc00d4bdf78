"""The rival steps compute what ours computes, and no number comes from a step that does not."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from benchmarks import bench_step
from benchmarks.bench_step import Gate, Ours, OurStep, build, make_batch, measure_steps
from benchmarks.harness.options import sit
from benchmarks.harness.rows import read
from benchmarks.rivals.recipe import RUNGS, PublicStep
from sra_fast.config import Config
from sra_fast.errors import Refused
from sra_fast.model.layout import to_public
from sra_fast.tuning.timing import GateFailed

CPU = torch.device("cpu")


@pytest.fixture
def config() -> Config:
    """Four blocks of width 96 on 16 tokens."""
    return small("s", 16, 3, 4)


def small(*wanted: object) -> Config:
    config = sit(*wanted)
    return replace(config, model=replace(config.model, hidden=96, heads=2, classes=10))


def gate_of(config: Config) -> Gate:
    return Gate(config, make_batch(config), CPU)


@pytest.mark.parametrize("fault", ["student and teacher swapped", "other weights", "other distance"])
def test_a_step_that_computes_something_else_gets_no_number(config, fault, monkeypatch):
    step = build("public", config, CPU)
    if fault == "student and teacher swapped":
        losses = step.losses
        swap = {"t": "t_teacher", "t_teacher": "t", "x_t": "x_teacher", "x_teacher": "x_t"}
        monkeypatch.setattr(
            step, "losses", lambda b: losses(b._replace(**{to: getattr(b, origin) for to, origin in swap.items()}))
        )
    elif fault == "other weights":
        step.model.ap_head.linear1.bias.data.add_(1.0)
    else:
        step.config = replace(config, align=replace(config.align, distance="l1"))
    with pytest.raises(GateFailed, match="public: loss"):
        gate_of(config)("public", step)


def test_gradients_of_the_rival_are_ours(config):
    """The gate compares losses; this shows that a rival's backward pass does the same work."""
    gate, batch = gate_of(config), make_batch(config)
    ours = OurStep(config, Ours("ours", execution="eager", dtype=torch.float32), CPU)
    public = PublicStep(config, RUNGS[0], CPU)
    for step in (ours, public):
        bench_step.add_noise(step)
    velocity, alignment = public.losses(gate.noised)
    named = {name: parameter for name, parameter in public.model.named_parameters() if parameter.requires_grad}
    total = velocity + config.align.weight * alignment
    theirs = dict(zip(named, torch.autograd.grad(total, named.values()), strict=True))
    gradients, _ = ours.step.gradients(ours.state, batch, torch.tensor(config.align.weight))
    mine = to_public(dict(zip(ours.state.adam_m, gradients, strict=True)))
    assert set(mine) == set(theirs)
    for name, gradient in mine.items():
        torch.testing.assert_close(gradient, theirs[name], rtol=1e-3, atol=1e-4 * float(theirs[name].abs().max()))


def test_a_step_of_the_public_recipe_trains(config):
    step = PublicStep(config, RUNGS[0], CPU)
    batch = make_batch(config)
    before = {name: parameter.clone() for name, parameter in step.model.named_parameters()}
    for _ in range(2):
        step(batch)
    changed = [name for name, parameter in step.model.named_parameters() if not torch.equal(parameter, before[name])]
    assert "final_layer.linear.weight" in changed
    assert "pos_embed" not in changed
    weight, average = step.model.final_layer.linear.weight, step.ema.final_layer.linear.weight
    assert 0 < float(average.detach().abs().sum()) < float(weight.detach().abs().sum())


def test_rows_hold_images_per_second_and_the_share_of_the_roof(config):
    names = ["public", "ours eager", "+ CUDA graph"]
    *_, taken = measure_steps(config, names, CPU, repeats=2, warmup=1, interleave="all")
    *rows, graph = bench_step.make_rows(config, "s", taken, CPU)
    assert graph["error"] == "needs a GPU"
    assert [row["params"]["rung"] for row in rows] == ["public", "ours eager"]
    for row in rows:
        assert len(row["samples_ms"]) == 2
        assert row["params"] | {"tokens": 16, "batch": 3, "depth": 4} == row["params"]
        assert row["images_per_s"] == pytest.approx(3e3 / row["median_ms"])
        assert 0 < row["roof_share"] < 1


def test_pairs_pool_the_samples_of_ours(config):
    names = ["public", "ours eager", "bf16 teacher to its tap"]
    counts = [
        {name: len(samples.ms) for name, samples in taken.items()}
        for taken in measure_steps(config, names, CPU, repeats=2, warmup=1, interleave="pairs")
    ]
    assert counts == [{"public": 2, "ours eager": 2}, {"public": 2, "ours eager": 4, "bf16 teacher to its tap": 2}]


def test_which_steps_take_turns():
    names = ["public", "ours eager", "ours"]
    assert bench_step.groups(names, "all") == [names]
    assert bench_step.groups(names, "none") == [["public"], ["ours eager"], ["ours"]]
    assert bench_step.groups(names, "pairs") == [["ours", "public"], ["ours", "ours eager"]]
    for size, batch, wanted in (("xl", 32, "pairs"), ("xl", 256, "none"), ("s", 256, "pairs")):
        args = SimpleNamespace(device=torch.device("cuda"), size=size, tokens=256, batch=batch, interleave="auto")
        assert bench_step.choose_interleave(args, batch) == wanted


def test_fused_ops_are_asked_for_and_perturb_is_left_as_it_is(config, monkeypatch):
    asked = []
    resolve = bench_step.Backends.resolve

    def noted(config, hardware):
        asked.append(config.kernels)
        return resolve(replace(config, kernels=replace(config.kernels, default="auto")), hardware)

    monkeypatch.setattr(bench_step.Backends, "resolve", noted)
    for variant in (Ours("a", execution="eager"), Ours("b", execution="eager", fused=True)):
        OurStep(config, variant, CPU)
    assert [(kernels.default, kernels.perturb) for kernels in asked] == [("auto", None), ("fused", "auto")]
    assert "ours, fused ops" in bench_step.GPU_ONLY


def test_auto_check_tries_batches_until_one_does_not_fit(monkeypatch, tmp_path):
    monkeypatch.setenv("SRA_FAST_RESULTS", str(tmp_path))
    monkeypatch.setattr(bench_step, "CHECKED_BATCHES", (1, 2, 3))
    monkeypatch.setattr(bench_step, "roofs", lambda device, dtype: {"copy_gb_per_s": 10.0, "matmul_tflop_per_s": 1.0})
    monkeypatch.setattr(bench_step.options, "sit", lambda size, tokens, batch, depth: small(size, 16, batch, depth))

    call = OurStep.__call__

    def small_memory(step, batch):
        if len(batch.x) > 1:
            raise torch.OutOfMemoryError("out of memory: tried to allocate 1 GiB")
        call(step, batch)

    monkeypatch.setattr(OurStep, "__call__", small_memory)
    few = ["--repeats", "1", "--warmup", "1", "--device", "cpu", "--depth", "3", "--size", "s"]
    assert bench_step.main(["--batch", "auto-check", "--rungs", "ours eager", *few]) == 0
    rows = read(tmp_path / "step-s-256-auto-check-depth3.json")["rows"]
    assert [row["params"]["batch"] for row in rows] == [1, 2]  # 3 is not tried
    assert rows[0]["median_ms"] > 0
    assert rows[1]["error"].startswith("out of memory")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--batch", "0"], "'0' given; must be a whole number of at least 1"),
        (["--depth", "1"], "'1' given; must be 0 or at least 3"),
        (["--device", "meta"], "'meta' given; must be cpu or cuda"),
        (["--rungs", "fastest"], "invalid choice: 'fastest'"),
    ],
)
def test_wrong_options_are_refused_in_one_line(capsys, words, message):
    with pytest.raises(SystemExit):
        bench_step.main(words)
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_a_step_that_fails_costs_only_itself(config, monkeypatch):
    call, create = OurStep.__call__, OurStep.__init__

    def fail_if_deterministic(step, batch):
        if step.variant.deterministic:
            raise RuntimeError("no deterministic kernel\nmore")
        call(step, batch)

    def refuse_fp32(step, config, variant, device):
        if variant.name == "ours fp32":
            raise Refused("no such kernel")
        create(step, config, variant, device)

    eager = [replace(variant, execution="eager") for variant in bench_step.OURS]
    losses = OurStep.losses

    def lose_a_tenth(step, batch):
        factor = 0.9 if step.variant.name == "ours compiled" else 1.0
        return [factor * loss for loss in losses(step, batch)]

    monkeypatch.setattr(OurStep, "losses", lose_a_tenth)
    monkeypatch.setattr(OurStep, "__call__", fail_if_deterministic)
    monkeypatch.setattr(OurStep, "__init__", refuse_fp32)
    monkeypatch.setattr(
        OurStep, "failure", property(lambda step: "not permitted" if "eager" in step.variant.name else "")
    )
    monkeypatch.setattr(bench_step, "OURS", eager)
    names = ["ours", "ours deterministic", "ours fp32", "ours eager", "ours compiled"]
    *_, taken = measure_steps(config, names, CPU, repeats=1, warmup=1, interleave="none")
    errors = [None, "failed (no deterministic kernel)", "no such kernel", "no CUDA graph: not permitted"]
    assert [taken[name].error for name in names[:4]] == errors
    assert taken["ours compiled"].error.startswith("disagrees with the reference: ours compiled: loss")
    assert [len(taken[name].ms) for name in names] == [1, 0, 0, 0, 0]
    *_, both = measure_steps(config, ["ours", "ours compiled"], CPU, repeats=1, warmup=1, interleave="all")
    assert [len(both[name].ms) for name in ("ours", "ours compiled")] == [1, 0]
