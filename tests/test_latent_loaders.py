"""Loaders of latents: both sides deliver the same rows, or get no number."""

from __future__ import annotations

import argparse

import numpy as np
import pytest
import torch
from torch.utils.data import get_worker_info

from benchmarks.harness import throughput
from benchmarks.harness.timing import GateFailed
from benchmarks.rivals import latent_loaders
from benchmarks.rivals.latent_loaders import WORKERS, PublicFiles, bench_latents, same_rows, write_sets
from sra_fast.data.latent_stream import LatentStream
from sra_fast.data.packed import open_row_set

FEW = argparse.Namespace(rows=40, batch=16, repeats=2, jpegs=None, vae=None)


@pytest.mark.parametrize("shard", [4096, 16])
def test_both_sets_hold_the_same_rows_and_labels(tmp_path, monkeypatch, shard):
    monkeypatch.setattr(latent_loaders, "SHARD", shard)
    write_sets(tmp_path, 40)
    packed, files = open_row_set(tmp_path / "packed"), open_row_set(tmp_path / "public")
    public = PublicFiles(tmp_path / "public")
    x = packed.gather(np.arange(40)).float()
    assert torch.equal(x, files.gather(np.arange(40)))
    assert torch.equal(x, torch.stack([public[row][0] for row in range(40)]))
    assert [int(public[row][1]) for row in range(40)] == packed.labels.tolist() == list(range(40))
    assert public[0][0].dtype == torch.float32
    assert x[0].numel() == 8192
    assert len(list((tmp_path / "packed").glob("moments-*.npy"))) == -(-40 // shard)
    assert len(x.flatten(1).unique(dim=0)) == 40


def test_every_loader_is_measured_over_whole_batches(tmp_path):
    made = bench_latents(FEW, tmp_path)
    names = ["ours, packed", "ours, public files", *(f"public, {n} workers" for n in WORKERS)]
    assert [row["params"] for row in made] == [{"loader": name, "batch": 16, "rows": 40} for name in names]
    assert [row["ours"] for row in made] == [name.startswith("ours") for name in names]
    assert {row["bytes"] for row in made} == {16 * 8 * 32 * 32 * 2}


@pytest.fixture
def delivered(monkeypatch):
    """Images of one call of each loader."""
    counts = {}
    monkeypatch.setattr(
        throughput, "measure", lambda found, *_: counts.update({name: one.run() for name, one in found.items()}) or {}
    )
    return counts


def test_images_are_counted_as_they_come(tmp_path, delivered):
    """Two whole batches of the forty rows; ours, being faster, eight times."""
    bench_latents(FEW, tmp_path)
    assert delivered.pop("ours, packed") == 8 * 32
    assert set(delivered.values()) == {32}


def spoiled_order(monkeypatch):
    order = LatentStream._order
    monkeypatch.setattr(LatentStream, "_order", lambda stream, first: order(stream, first + 1))
    return "ours, packed"


def spoiled_labels(monkeypatch):
    make = LatentStream.read_batch

    def other(stream, first):
        batch, replaced = make(stream, first)
        batch.labels[3] += 1
        return batch, replaced

    monkeypatch.setattr(LatentStream, "read_batch", other)
    return "ours, packed"


def spoil_files(monkeypatch, wrong):
    get = PublicFiles.__getitem__
    monkeypatch.setattr(
        PublicFiles, "__getitem__", lambda files, row: (get(files, row)[0] + wrong(row), get(files, row)[1])
    )


def spoiled_values(monkeypatch):
    spoil_files(monkeypatch, lambda row: row == 9)
    return "ours, packed"  # the rival is the reference, so it is ours that differs


def spoiled_workers(monkeypatch):
    spoil_files(monkeypatch, lambda row: get_worker_info() is not None)
    return "public, 1 workers"


@pytest.mark.parametrize("spoil", [spoiled_order, spoiled_labels, spoiled_values, spoiled_workers])
def test_a_loader_of_other_rows_gets_no_number(tmp_path, monkeypatch, spoil):
    named = spoil(monkeypatch)
    monkeypatch.setattr(throughput, "measure", lambda *_: pytest.fail("measured"))
    whole = argparse.Namespace(**vars(FEW) | {"rows": 32})
    with pytest.raises(GateFailed, match=f"^{named}: batch [01] has other rows"):
        bench_latents(whole, tmp_path)


def test_the_gate_looks_at_every_batch():
    right = [(torch.full((2, 3), float(n)), torch.tensor([n, n])) for n in range(3)]
    same_rows("a", iter((x.half(), labels, "more") for x, labels in right), iter(right), 3)
    for place in (0, 1):
        wrong = [list(batch) for batch in right]
        wrong[2][place] = wrong[2][place] + 1
        same_rows("a", iter(wrong), iter(right), 2)
        with pytest.raises(GateFailed, match="a: batch 2"):
            same_rows("a", iter(wrong), iter(right), 3)
