"""The rival steps compute what ours computes, and no number comes from one that does not."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from benchmarks import bench_step
from benchmarks.bench_step import Ours
from benchmarks.harness.timing import GateFailed, read
from benchmarks.rivals.recipe import RUNGS, PublicStep
from sra_fast.config import Config
from sra_fast.model.layout import apart

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
    *_, made = bench_step.rows(
        config, "s", ["public", "ours eager", "+ CUDA graph"], CPU, repeats=2, warmup=1, interleave="all"
    )
    assert made.pop()["error"] == "needs a GPU"
    for row in made:
        assert len(row["samples_ms"]) == 2
        assert row["images_per_s"] == pytest.approx(3e3 / row["median_ms"])
        assert 0 < row["roof_share"] < 1
    assert [row["params"]["rung"] for row in made] == ["public", "ours eager"]


def test_pairs_pool_the_samples_of_ours(config):
    names = ["public", "ours eager", "bf16 teacher to its tap"]
    so_far = [
        {name: len(samples.ms) for name, samples in taken.items()}
        for taken in bench_step.measure(config, names, CPU, repeats=2, warmup=1, interleave="pairs")
    ]
    assert so_far == [
        {"public": 2, "ours eager": 2},
        {"public": 2, "ours eager": 4, "bf16 teacher to its tap": 2},
    ]


def test_who_takes_turns_with_whom():
    names = ["public", "ours eager", "ours"]
    assert bench_step.groups(names, "all") == [names]
    assert bench_step.groups(names, "none") == [["public"], ["ours eager"], ["ours"]]
    assert bench_step.groups(names, "pairs") == [["ours", "public"], ["ours", "ours eager"]]
    assert bench_step.groups(["public"], "pairs") == [["public"]]


@pytest.mark.parametrize(
    ("device", "size", "batch", "given", "wanted"),
    [
        ("cpu", "xl", 256, "auto", "all"),
        ("cuda", "xl", 32, "auto", "pairs"),
        ("cuda", "xl", 256, "auto", "none"),
        ("cuda", "s", 256, "auto", "pairs"),
        ("cuda", "xl", 256, "all", "all"),
    ],
)
def test_large_steps_do_not_live_together(device, size, batch, given, wanted):
    chosen = SimpleNamespace(device=torch.device(device), size=size, tokens=256, batch=batch, interleave=given)
    assert bench_step.interleave(chosen, batch) == wanted


def test_fused_ops_are_asked_for_and_perturb_is_left_as_it_is(config, monkeypatch):
    asked = []

    def resolve(config, hardware):
        asked.append(config.kernels)
        return {**replace(config.kernels, default="auto").resolve(), "attention": "math"}

    monkeypatch.setattr(bench_step, "resolve", resolve)
    for kernels in (config.kernels, replace(config.kernels, perturb="reference")):
        for name in ("ours eager", "ours, fused ops"):
            bench_step.build(name, replace(config, kernels=kernels), CPU)
    assert [(kernels.default, kernels.perturb) for kernels in asked] == [
        ("auto", None),
        ("fused", "auto"),
        ("auto", "reference"),
        ("fused", "reference"),
    ]


def test_fused_ops_need_a_gpu_and_take_turns_with_ours(config):
    assert not bench_step.possible("ours, fused ops", CPU)
    assert bench_step.possible("ours, fused ops", torch.device("cuda"))
    assert bench_step.groups(["public", "ours", "ours, fused ops"], "pairs")[1] == ["ours", "ours, fused ops"]


def test_a_step_that_was_to_be_a_graph_and_is_not_has_no_number(config, monkeypatch):
    monkeypatch.setattr(bench_step.OurStep, "failure", "operation not permitted")
    *_, made = bench_step.rows(config, "s", ["ours eager"], CPU, repeats=2, warmup=1, interleave="all")
    assert made[0]["error"] == "no CUDA graph: operation not permitted"
    assert made[0]["samples_ms"] == []


def test_auto_check_tries_batches_until_one_does_not_fit(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("SRA_FAST_RESULTS", str(tmp_path))
    monkeypatch.setattr(bench_step, "CHECKED_BATCHES", (1, 2, 3))
    call = bench_step.OurStep.__call__

    def small_memory(step, batch):
        if len(batch.x) > 1:
            raise torch.OutOfMemoryError("out of memory: tried to allocate 1 GiB")
        call(step, batch)

    monkeypatch.setattr(bench_step.OurStep, "__call__", small_memory)
    few = ["--repeats", "1", "--warmup", "1", "--device", "cpu", "--depth", "3", "--size", "s"]
    assert bench_step.main(["--batch", "auto-check", "--rungs", "ours eager", *few]) == 0
    rows = read(tmp_path / "step-s-256-auto-check-depth3.json")["rows"]
    assert [row["params"]["batch"] for row in rows] == [1, 2]  # 3 is not tried
    assert rows[0]["median_ms"] > 0
    assert rows[0]["params"]["depth"] == 3
    assert rows[1]["error"].startswith("out of memory")
    assert "auto-check" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--batch", "many"], "'many' given; must be a whole number of at least 1"),
        (["--batch", "0"], "'0' given; must be a whole number of at least 1"),
        (["--depth", "1"], "'1' given; must be 0 or at least 3"),
        (["--depth", "-1"], "'-1' given; must be a whole number"),
        (["--repeats", "0"], "'0' given; must be a whole number"),
        (["--device", "foo"], "'foo' given; must be cpu or cuda"),
        (["--device", "meta"], "'meta' given; must be cpu or cuda"),
        (["--rungs", "fastest"], "invalid choice: 'fastest'"),
    ],
)
def test_wrong_options_are_refused_in_one_line(capsys, words, said):
    with pytest.raises(SystemExit):
        bench_step.main(words)
    assert said in capsys.readouterr().err.splitlines()[-1]


def test_a_rung_that_fails_does_not_take_the_others_along(config, monkeypatch):
    call = bench_step.OurStep.__call__

    def fail_where_deterministic(step, batch):
        if step.way.deterministic:
            raise RuntimeError("no deterministic kernel\nmore")
        call(step, batch)

    monkeypatch.setattr(bench_step.OurStep, "__call__", fail_where_deterministic)
    monkeypatch.setattr(
        bench_step,
        "OURS",
        (Ours("ours eager", execution="eager"), Ours("ours deterministic", execution="eager", deterministic=True)),
    )
    names = ["ours eager", "ours deterministic", "public"]
    *_, taken = bench_step.measure(config, names, CPU, repeats=1, warmup=1, interleave="none")
    assert taken["ours deterministic"].error == "failed (no deterministic kernel)"
    assert taken["ours eager"].ms
    assert taken["public"].ms


def test_gradients_of_the_rival_are_ours(config):
    """The gate holds losses; that a rival's backward pass is the same work is shown here."""
    batch = bench_step.make_batch(config)
    gate = gate_of(config)
    ours = bench_step.build("ours eager", config, CPU)
    ours = bench_step.OurStep(config, replace(ours.way, dtype=torch.float32), CPU)
    public = PublicStep(config, RUNGS[0], CPU)
    with bench_step.awake(ours), bench_step.awake(public):
        n = gate.drawn
        velocity, alignment = public.losses(n.x, n.noise, n.t, n.t_teacher, n.labels)
        named = {name: p for name, p in public.model.named_parameters() if p.requires_grad}
        theirs = dict(
            zip(named, torch.autograd.grad(velocity + config.align.weight * alignment, named.values()), strict=True)
        )
        weight = torch.tensor(config.align.weight)
        gradients, _ = ours.step.gradients(ours.state, *batch, weight)
        mine = apart(dict(zip(ours.state.adam_m, gradients, strict=True)))
        assert set(mine) == set(theirs)
        for name, gradient in mine.items():
            torch.testing.assert_close(gradient, theirs[name], rtol=1e-3, atol=1e-4 * float(theirs[name].abs().max()))


@pytest.mark.parametrize("tokens", [256, 1024])
def test_tokens_are_those_asked_for(tokens):
    model = bench_step.make_config("xl", tokens, 32).model
    assert (model.tokens, model.depth, model.hidden) == (tokens, 28, 1152)
