"""Checkpoints of equal shapes and other meaning are told apart, or refused; the original SiT is converted."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import torch
from small_run import complaint
from torch import Tensor

from sra_fast.errors import Refused
from sra_fast.model.layout import from_public
from sra_fast.model.public_weights import Weights, read
from sra_fast.model.transformer import Transformer


def without_head(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in weights.items() if not name.startswith("ap_head")}


@pytest.fixture
def single(tiny, awake) -> dict[str, Tensor]:
    """A state dict that predicts as many channels as it reads, without a head."""
    return without_head(awake(tiny(qk_norm=True, channels=3).model))


@pytest.fixture
def double(tiny, awake) -> dict[str, Tensor]:
    """One that predicts twice as many."""
    return without_head(awake(tiny(qk_norm=True, channels=3, family="dit").model))


def written(tmp_path: Path, tensors: dict[str, Tensor], model: str = "") -> Path:
    args = argparse.Namespace(model=model, path_type="Linear") if model else None
    torch.save({"ema": tensors, "args": args} if args else tensors, tmp_path / "w.pt")
    return tmp_path / "w.pt"


@pytest.mark.parametrize("doubled", [False, True])
@pytest.mark.parametrize("family", ["sit", "sit-original", "dit"])
def test_a_file_that_does_not_say_is_refused_until_the_user_does(single, double, tmp_path, doubled, family):
    path = written(tmp_path, double if doubled else single)
    with pytest.raises(Refused, match="direction of time; say it with --weights-family"):
        read(path)
    if family == ("sit" if doubled else "dit"):
        with pytest.raises(Refused, match=f"weights-family: '{family}' given; but .* predicts"):
            read(path, family=family)
    else:
        assert read(path, family=family).config.family == ("dit" if family == "dit" else "sit")


def test_what_a_file_was_trained_with_decides(single, double, tmp_path):
    assert read(written(tmp_path, double, "DiT-S/4")).config.family == "dit"
    original = read(written(tmp_path, double, "SiT-S/4"))
    assert (original.config.family, "original SiT" in original.notes[0]) == ("sit", True)
    with pytest.raises(Refused, match=r"but .* is of family sit-original"):
        read(tmp_path / "w.pt", family="dit")
    head = {"projectors.0.weight": torch.zeros(3)}  # REPA's: its time runs as SRA's
    assert read(written(tmp_path, single | head, "SiT-S/4")).config.family == "sit"
    with pytest.raises(Refused, match="weights-family"):
        read(written(tmp_path, single, "SiT-S/4"))


def network(weights: Weights | dict[str, Tensor], config) -> Transformer:
    tensors = weights.tensors if isinstance(weights, Weights) else weights
    return Transformer.from_tensors(config, from_public(tensors))


@pytest.mark.parametrize("doubled", [False, True])
def test_the_converted_network_is_the_original_with_time_and_velocity_reversed(single, double, tmp_path, tiny, doubled):
    tensors = double if doubled else single
    converted = read(written(tmp_path, tensors), family="sit-original")
    head = {name: value for name, value in converted.tensors.items() if name.startswith("ap_head")}
    config = tiny(qk_norm=True, channels=3, family="dit" if doubled else "sit").model
    generator = torch.Generator().manual_seed(0)
    x, t = torch.randn(5, 3, 8, 8, generator=generator), torch.rand(5, generator=generator)
    labels = torch.tensor([0, 1, 2, 3, 4])
    original, _ = network(tensors | head, config)(x, 1 - t, labels)
    ours, _ = network(converted, converted.config)(x, t, labels)
    assert ours.shape == x.shape
    assert torch.allclose(ours, -original[:, :3], atol=2e-5)


def test_a_path_is_not_ignored_for_a_dit(double, tmp_path, main):
    words = ["sample", "--weights", written(tmp_path, double, "DiT-S/4"), "--out", tmp_path / "out", "--path", "linear"]
    assert "path: 'linear' given" in complaint(main(words)[1:])
    assert not (tmp_path / "out").exists()
