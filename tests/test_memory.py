"""What cannot fit is refused with the arithmetic, and nothing that fits is."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from small_run import arguments, run, small
from small_step import changed

from sra_fast import memory
from sra_fast.config import PRESETS, preset
from sra_fast.model.transformer import Transformer

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", ["digits", "sit-s-2", "dit-xl-8"])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_parameters_are_those_of_the_network(name, qk_norm):
    model = replace(preset(name).model, input_size=32, channels=4, classes=1000, qk_norm=qk_norm)
    with torch.device("meta"):
        network = Transformer(model)
    assert memory.parameters(model) == sum(parameter.numel() for parameter in network.parameters())


def test_the_bound_is_below_what_a_step_needs():
    """Two tenths of it, by what is measured: SiT-XL/2 in bf16 takes 21.7 GiB at batch 32 and 49.2 at 128 (H200)."""
    config = changed(preset("sit-xl-2"), model={"input_size": 32, "channels": 4, "classes": 1000})
    for batch, measured in ((32, 21.75 * 2**30), (128, 49.25 * 2**30)):
        bound = sum(memory.training_bytes(changed(config, train={"batch": batch}), torch.bfloat16).values())
        assert 0.4 * measured < bound < measured


def test_no_preset_is_refused_on_the_gpu_it_is_for(monkeypatch):
    monkeypatch.setattr(memory, "available", lambda device: 80 * 10**9)
    for config in PRESETS.values():
        sizes = {"input_size": 32, "channels": 4, "classes": 1000}
        fitting = changed(config, model=sizes, train={"batch": 32})
        memory.refuse_beyond(memory.training_bytes(fitting, torch.bfloat16), CPU, "")


@pytest.mark.parametrize(
    "changes", [{"model__depth": 1000, "model__hidden": 65_536, "model__heads": 16}, {"train__batch": 1 << 20}]
)
@pytest.mark.parametrize("dry_run", [False, True])
def test_a_run_that_cannot_fit_is_refused_with_the_arithmetic(root, refused, changes, dry_run, monkeypatch):
    monkeypatch.setattr(memory, "available", lambda device: 10**9)
    line = refused(arguments(root, **changes, run__dry_run=dry_run))
    assert "memory: at least " in line
    assert "but this machine has 1.0 GB: lower --train.batch" in line
    assert not (root / "runs").exists()


def test_the_limit_of_a_container_counts(tmp_path, monkeypatch):
    (tmp_path / "memory.max").write_text("max\n")
    monkeypatch.setattr(memory, "CGROUP_LIMITS", (str(tmp_path / "memory.max"), str(tmp_path / "missing")))
    machine = memory.available(CPU)
    (tmp_path / "memory.max").write_text("1000000\n")
    assert memory.available(CPU) == 1_000_000 < machine


def test_a_batch_of_samples_that_cannot_fit_is_refused(root, refused, monkeypatch):
    monkeypatch.setattr(memory, "available", lambda device: 16 * 10**9)
    assert run(small(root, train__images=8))[0] == 0
    words = ["sample", "--weights", root / "runs/a", "--no-npz", "--no-images", "--grid", 0]
    assert "lower --sample.batch" in refused([*words, "--sample.count", 10**8, "--sample.batch", 1 << 20])
