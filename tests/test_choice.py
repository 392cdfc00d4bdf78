"""`auto` by measurement: the fastest that is right is taken, once, and kept."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.harness.options import sit
from sra_fast.config import Config, KernelsConfig
from sra_fast.hardware import Hardware
from sra_fast.kernels import language, library, registry
from sra_fast.kernels.adaln import adaln_ref
from sra_fast.kernels.adamw_ema import adamw_ema_ref
from sra_fast.kernels.perturb import Stored
from sra_fast.model import backends
from sra_fast.model.backends import undecided
from sra_fast.tuning import choice
from sra_fast.tuning.cases import OPS, UPDATES, make_case
from sra_fast.tuning.choice import decide, measure_ops, time_implementations

CPU = Hardware(torch.device("cpu"), torch.float32)
GPU = Hardware(torch.device("cuda"), torch.bfloat16)


def small(batch: int = 2, **kernels: object) -> Config:
    config = sit("s", 16, batch, 3)
    return replace(
        config, model=replace(config.model, hidden=96, heads=2, classes=10), kernels=KernelsConfig(**kernels)
    )


def slow(*arguments, **options):
    time.sleep(0.02)
    return adaln_ref(*arguments, **options)


def fast(*arguments, **options):
    return adaln_ref(*arguments, **options)


def wrong(x, modulation, eps=1e-6):
    return adaln_ref(x, modulation, eps=1e-3)


def wrong_gradient(x, modulation, eps=1e-6):
    return adaln_ref(x, modulation.detach() + 2 * (modulation - modulation.detach()), eps)


def raises(*arguments, **options):
    raise RuntimeError("no kernel image is available\nmore")


@pytest.mark.parametrize(
    ("reference", "fused", "expected", "line"),
    [
        (slow, fast, "fused", "fused"),
        (adaln_ref, slow, "reference", "reference"),
        (slow, wrong, "reference", "without fused (adaln fused, forward+backward, result 0: error"),
        (slow, wrong_gradient, "reference", "without fused (adaln fused, forward+backward, result 2: error"),
        (slow, raises, "reference", "without fused (RuntimeError: no kernel image is available)"),
        (raises, fast, "reference", "without reference (RuntimeError: no kernel image"),
    ],
    ids=["fast", "slow", "wrong", "wrong gradient", "raises", "broken reference"],
)
def test_the_fastest_that_agrees_is_taken(reference, fused, expected, line, monkeypatch) -> None:
    monkeypatch.setitem(registry.OPS, "adaln", registry.Op(reference, fused))
    lines: list[str] = []
    assert measure_ops({"adaln": ("reference", "fused")}, small(), CPU, lines.append) == {"adaln": expected}
    assert len(lines) == 1
    assert line in lines[0]


def test_the_update_is_compared_and_timed(monkeypatch) -> None:
    """Of the compiled library, and of one that forgets weight decay."""
    if reason := library.why_unavailable():
        pytest.skip(reason)
    names = {"reference": "eager", "fused": "fused"}
    config = small()
    config = replace(config, optim=replace(config.optim, weight_decay=0.5))
    for op in UPDATES:
        for dtype in (torch.float32, torch.bfloat16):
            taken = time_implementations(make_case(op, config, CPU.device, dtype), names, CPU.device, graph=False)
            assert [samples.error for samples in taken.values()] == [None, None], op

    def forgets(lists, scalars, *, weight_decay, **options):
        adamw_ema_ref(lists, scalars, weight_decay=(0.0, 0.0), **options)

    monkeypatch.setitem(registry.OPS, "adamw_ema", registry.OPS["adamw_ema"]._replace(fused=forgets))
    case = make_case("adamw_ema", config, CPU.device, torch.bfloat16)
    taken = time_implementations(case, names, CPU.device, graph=False)
    assert taken["reference"].ms
    assert "adamw_ema fused, forward, result" in (taken["fused"].error or "")


@pytest.mark.parametrize("op", OPS)
def test_shapes_are_those_of_a_micro_batch(op) -> None:
    config = small(12)
    config = replace(config, train=replace(config.train, accumulate=3))
    stored = Stored(True, torch.zeros(4), torch.ones(4))
    first = make_case(op, config, CPU.device, torch.bfloat16, stored).inputs[0]
    expected = {"perturb": (4, 8, 8, 8), "attention": (4, 16, 3, 2, 48)}.get(op, (4, 16, 96))
    assert tuple(first.shape) == expected


# What is kept


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """A machine with an H200, on which measuring takes what `.choices` says and counts itself in `.measured`."""
    monkeypatch.setattr(language, "why_unavailable", lambda: "")
    monkeypatch.setattr(language, "INTERPRETED", False)
    monkeypatch.setattr(library, "why_unavailable", lambda on_gpu=False: "")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA H200")
    monkeypatch.setattr(backends, "candidates", lambda *_: ("cudnn", "flash"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    class Measuring:
        def __init__(self) -> None:
            self.measured: list[tuple[str, ...]] = []
            self.choice = {"adaln": "reference", "attention": "flash"}

        def __call__(self, ops, *_):
            self.measured.append(tuple(ops))
            return {op: self.choice.get(op, names[-1]) for op, names in ops.items()}

    measuring = Measuring()
    monkeypatch.setattr(choice, "measure_ops", measuring)
    return measuring


def ops_of(config: Config) -> dict[str, str | None]:
    return {op: getattr(config.kernels, op) for op in registry.OPS} | {"attention": config.model.attention}


def test_what_is_left_to_auto_is_measured_once_for_these_shapes(gpu) -> None:
    lines: list[str] = []
    decided = decide(small(), GPU, lines.append)
    assert len(gpu.measured) == 1
    assert set(gpu.measured[0]) == {op for op in registry.OPS if op != "gated_residual"} | {"attention"}
    assert ops_of(decided)["adaln"] == "reference"
    assert ops_of(decided)["attention"] == "flash"
    assert ops_of(decided)["gated_residual"] is None  # has one implementation
    assert undecided(decided, GPU) == {}
    gpu.choice = {}
    assert decide(small(), GPU, lines.append) == decided  # from the cache
    assert len(gpu.measured) == 1
    assert decide(small(batch=4), GPU, lines.append) != decided
    assert decide(replace(small(), deterministic=True), GPU, lines.append).kernels != decided.kernels
    assert len(gpu.measured) == 3
    assert decide(small(), CPU, lines.append) == small()


def test_what_a_user_names_is_left_alone(gpu) -> None:
    config = small(adaln="fused", gradient_norm="reference", default="reference", alignment="auto")
    config = replace(config, model=replace(config.model, attention="math"))
    decided = decide(config, GPU, lambda line: None)
    assert gpu.measured == [("alignment",)]
    assert ops_of(decided) == {**ops_of(config), "alignment": "fused"}


def test_a_resumed_run_keeps_its_choices_unless_it_measures_again(gpu) -> None:
    first = decide(small(), GPU, lambda line: None)
    gpu.choice = {"adaln": "fused", "attention": "cudnn"}
    choice.cache_file().unlink()
    assert decide(small(), GPU, lambda line: None, before=first) == first
    assert len(gpu.measured) == 1
    again = decide(small(retune=True), GPU, lambda line: None, before=first)
    assert len(gpu.measured) == 2
    assert (again.kernels.adaln, again.model.attention) == ("fused", "cudnn")
    # The new choice is in the cache now; a checkpoint precedes it.
    assert decide(small(), GPU, lambda line: None, before=first) == first
    assert decide(small(), GPU, lambda line: None).kernels.adaln == "fused"


def test_the_cache_holds_what_was_measured_here_and_only_that(gpu) -> None:
    """Not what a checkpoint brought along from another machine; and no measurement removes another."""
    first = decide(small(), GPU, lambda line: None)
    choice.cache_file().unlink()
    gpu.choice = {}
    decide(replace(small(), model=replace(small().model, attention="math")), GPU, lambda line: None)
    without_adaln = replace(first, kernels=replace(first.kernels, adaln=None))
    decide(small(), GPU, lambda line: None, before=without_adaln)
    (entry,) = json.loads(choice.cache_file().read_text()).values()
    assert set(entry) == set(gpu.measured[1])
    assert decide(small(), GPU, lambda line: None).kernels.adaln == "fused"
    assert gpu.measured[2:] == [("attention",)]
    (entry,) = json.loads(choice.cache_file().read_text()).values()
    assert set(entry) == {*gpu.measured[1], "attention"}


def test_a_choice_that_this_machine_lacks_is_measured_anew(gpu, monkeypatch) -> None:
    first = decide(small(), GPU, lambda line: None)
    monkeypatch.setattr(backends, "candidates", lambda *_: ("cudnn", "flash-attn-3"))
    decided = decide(small(), GPU, lambda line: None, before=first)
    assert gpu.measured[1] == ("attention",)
    assert decided.kernels == first.kernels


@pytest.mark.parametrize("content", ["", "[]", '{"a": 1}', "no JSON"])
def test_a_damaged_cache_is_written_anew(gpu, content) -> None:
    path = choice.cache_file()
    path.parent.mkdir(parents=True)
    path.write_text(content)
    first = decide(small(), GPU, lambda line: None)
    assert decide(small(), GPU, lambda line: None) == first
    assert len(gpu.measured) == 1
    assert len(json.loads(path.read_text())) == 1


def test_a_cache_that_cannot_be_written_is_a_warning(gpu, capsys) -> None:
    path = choice.cache_file().parent.parent
    path.write_text("a file")
    decide(small(), GPU, lambda line: None)
    assert "the choices are not kept" in capsys.readouterr().err


def test_other_kernels_are_measured_anew(gpu, monkeypatch, tmp_path: Path) -> None:
    decide(small(), GPU, lambda line: None)
    source = tmp_path / "kernels"
    source.mkdir()
    (source / "adaln.py").write_text("# changed")
    monkeypatch.setattr(library, "__file__", str(source / "library.py"))
    decide(small(), GPU, lambda line: None)
    assert len(gpu.measured) == 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_a_gpu_measures_every_op_of_its_own_shapes(monkeypatch, tmp_path: Path) -> None:
    """No implementation is left out, and the second start measures nothing."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    config, hardware, lines = sit("s", 256, 8, 3), Hardware.choose(), []
    decided = decide(config, hardware, lines.append)
    assert undecided(decided, hardware) == {}
    assert len(lines) == 2 + len(undecided(config, hardware))
    assert [line for line in lines if "without" in line] == []
    assert decide(config, hardware, lines.append) == decided
    assert len(lines) == 2 + len(undecided(config, hardware))
