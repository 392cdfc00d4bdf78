"""A checkpoint of the first version, committed under tests/first_version, resumes in every later one.

It holds four of the eight steps of a digits run at width 8; the losses of the other four are beside it. It is never
written again: a change that cannot read it must convert it.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from small_run import run, write_images

from sra_fast.training import checkpoint

STORED = Path(__file__).parent / "first_version"
CHECKPOINT = STORED / "000000000032"


def test_it_resumes_and_computes_what_the_first_version_did(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "images")
    shutil.copytree(CHECKPOINT, tmp_path / "runs/digits/checkpoints" / CHECKPOINT.name)
    code, rows = run(checkpoint.describe(CHECKPOINT)[1])
    assert code == 0
    # Other machines and kernels add in other orders; fp32 over these few thousand weights stays well below 1e-4.
    losses = [[row["loss"], row["velocity_loss"], row["alignment_loss"]] for row in rows]
    assert losses == [pytest.approx(row, rel=1e-4) for row in json.loads((STORED / "losses.json").read_text())]


@pytest.mark.parametrize("key", ["ema", "model"])
def test_its_weights_can_be_read_without_its_run(key):
    weights = checkpoint.read_weights(CHECKPOINT, key)
    assert weights.config == checkpoint.describe(CHECKPOINT)[1].model
    assert all(tensor.isfinite().all() for tensor in weights.tensors.values())
