"""A checkpoint of the first version, committed under tests/first_version, resumes in every later one.

It was written by `python tests/test_first_version.py`: four of the eight steps of the run below; the losses of the
rest stand beside it. It is never written again: a change that cannot read it must convert it.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from pathlib import Path

import pytest
import torch
from small_run import run, write_images

from sra_fast.config import Config, from_dict, preset, to_dict
from sra_fast.training import checkpoint

STORED = Path(__file__).parent / "first_version"
CHECKPOINT = STORED / "000000000032"


def first_run() -> Config:
    """The run, in relative paths."""
    values = to_dict(preset("digits"))
    values["model"] |= {"depth": 2, "hidden": 8, "heads": 2, "mlp_ratio": 2}
    values["align"] |= {"student_tap": 1, "teacher_tap": 2}
    values["data"] |= {"images": "images", "reader": "pillow"}
    values["train"] |= {"images": 64, "batch": 8, "accumulate": 2, "log_every_steps": 1, "save_every_images": 32}
    values["train"] |= {"validate_every_images": 0, "preview_every_images": 0}
    values["sample"] |= {"steps": 2, "count": 4}
    values["evaluate"] |= {"after_training": False}
    return from_dict(Config, values, "first run")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "images")
    shutil.copytree(CHECKPOINT, tmp_path / "runs/digits/checkpoints" / CHECKPOINT.name)
    return tmp_path


def test_it_resumes_and_computes_what_the_first_version_did(folder):
    _, saved = checkpoint.describe(CHECKPOINT)
    code, rows = run(saved)
    assert code == 0
    expected = json.loads((STORED / "losses.json").read_text())
    assert len(rows) == len(expected) == 4
    for row, (loss, velocity_loss, alignment_loss) in zip(rows, expected, strict=True):
        # Other machines and kernels add in other orders; fp32 over these few thousand weights stays well below 1e-4.
        assert math.isclose(row["loss"], loss, rel_tol=1e-4)
        assert math.isclose(row["velocity_loss"], velocity_loss, rel_tol=1e-4)
        assert math.isclose(row["alignment_loss"], alignment_loss, rel_tol=1e-4)


def test_its_tensors_are_read_as_they_were_written(folder):
    weights = checkpoint.read_weights(CHECKPOINT, "ema")
    assert weights.config == checkpoint.describe(CHECKPOINT)[1].model
    assert sum(tensor.numel() for tensor in weights.tensors.values()) == sum(
        tensor.numel() for tensor in checkpoint.read_weights(CHECKPOINT, "model").tensors.values()
    )
    assert all(torch.isfinite(tensor).all() for tensor in weights.tensors.values())


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as temporary:
        os.chdir(temporary)
        write_images(Path("images"))
        _, metrics = run(first_run())
        STORED.mkdir()
        shutil.copytree("runs/digits/checkpoints/000000000032", CHECKPOINT)
        losses = [[row["loss"], row["velocity_loss"], row["alignment_loss"]] for row in metrics[4:]]
        (STORED / "losses.json").write_text(json.dumps(losses) + "\n")
