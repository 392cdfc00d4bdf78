"""Checkpoints of every version, committed under tests/, resume in every later one.

Each holds four of the eight steps of a digits run at width 8; the losses of the other four are beside it. They are
never written again: a change that cannot read one must convert it.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from small_run import run, write_images

from sra_fast.training import checkpoint, run_folder

HERE = Path(__file__).parent
VERSIONS = ("first_version", "second_version")  # without sums; with them
NAME = "000000000032"


@pytest.mark.parametrize("version", VERSIONS)
def test_it_resumes_and_computes_what_its_version_did(tmp_path, monkeypatch, version):
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "images")
    shutil.copytree(HERE / version / NAME, tmp_path / "runs/digits/checkpoints" / NAME)
    code, rows = run(checkpoint.describe(HERE / version / NAME)[1])
    assert code == 0
    # Other machines and kernels add in other orders; fp32 over these few thousand weights stays well below 1e-4.
    losses = [[row["loss"], row["velocity_loss"], row["alignment_loss"]] for row in rows]
    assert losses == [pytest.approx(row, rel=1e-4) for row in json.loads((HERE / version / "losses.json").read_text())]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("key", ["ema", "model"])
def test_its_weights_can_be_read_without_its_run(version, key):
    weights = run_folder.read_weights(HERE / version / NAME, key)
    assert weights.config == checkpoint.describe(HERE / version / NAME)[1].model
    assert all(tensor.isfinite().all() for tensor in weights.tensors.values())
