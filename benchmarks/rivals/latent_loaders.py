"""Loaders of latents: ours against the public code's, written anew.

The rival reads one .npy file a sample under a torch DataLoader, and starts its workers anew in every epoch, as the
public code does; a real epoch does not notice their start: compare with 0 workers. No loader gets a number unless it
delivers the reference's rows.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from benchmarks.harness.rows import Row
from benchmarks.harness.throughput import Candidate, rows
from benchmarks.harness.timing import GateFailed
from sra_fast.data import order
from sra_fast.data.latent_stream import LatentStream
from sra_fast.data.manifest import NAME, Manifest, Shard
from sra_fast.data.packed import open_moments
from sra_fast.data.rows import Rows

WORKERS = (0, 1, 2)
SHAPE = (8, 32, 32)  # of SD's moments at 256 pixels
SHARD = 4096  # rows, as `sra-fast prepare` makes them


class PublicFiles(Dataset):
    """The public SRA code's data set, written anew: names from a walk, labels from dataset.json, np.load of a file a
    sample."""

    def __init__(self, root: Path) -> None:
        self.root = str(root / "vae-sd")
        found = [os.path.join(folder, name) for folder, _, names in os.walk(self.root) for name in names]
        self.names = sorted(os.path.relpath(path, self.root) for path in found if path.endswith(".npy"))
        with open(os.path.join(self.root, "dataset.json"), "rb") as file:
            labels = dict(json.load(file)["labels"])
        self.labels = np.array([labels[name.replace("\\", "/")] for name in self.names], dtype=np.int64)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
        with open(os.path.join(self.root, self.names[row]), "rb") as file:
            moments = np.load(file)
        return torch.from_numpy(moments), torch.tensor(self.labels[row])


def write_sets(root: Path, count: int) -> None:
    """The same moments in root/packed and root/public: float16 values, which float32 holds too."""
    generator, classes, shards, pairs = np.random.default_rng(0), 1000, [], []
    (root / "packed").mkdir(parents=True)
    for number, first in enumerate(range(0, count, SHARD)):
        size = min(SHARD, count - first)
        moments = generator.standard_normal((size, *SHAPE), dtype=np.float32).astype(np.float16)
        labels = np.arange(first, first + size) % min(classes, count)
        files = [f"{kind}-{number:05d}.npy" for kind in ("moments", "labels")]
        for name, values in zip(files, (moments, labels), strict=True):
            np.save(root / "packed" / name, values)
        shards.append(Shard(files[0], size, "", files[1], ""))
        for row, (one, label) in enumerate(zip(moments.astype(np.float32), labels.tolist(), strict=True), start=first):
            pairs.append([f"{row // 1000:05d}/img-mean-std-{row:08d}.npy", label])
            path = root / "public" / "vae-sd" / pairs[-1][0]
            path.parent.mkdir(parents=True, exist_ok=True)
            np.save(path, one)
    (root / "public" / "vae-sd" / "dataset.json").write_text(json.dumps({"labels": pairs}))
    names = tuple(f"{label}" for label in range(min(classes, count)))
    facts = {"posterior": True, "scale": 0.18215, "shift": 0.0, "vae": "", "crop": "adm", "resolution": 256}
    manifest = Manifest(count, names, SHAPE, "float16", **facts, shards=tuple(shards))
    (root / "packed" / NAME).write_text(json.dumps(asdict(manifest)))


def same_rows(name: str, delivered: Iterator, reference: Iterator, count: int) -> None:
    """Raise `GateFailed` unless two loaders deliver equal rows and labels, batch by batch."""
    for batch in range(count):
        (x, labels), (right, right_labels) = next(delivered)[:2], next(reference)[:2]
        if not (torch.equal(x.float(), right.float()) and torch.equal(labels, right_labels)):
            raise GateFailed(f"{name}: batch {batch} has other rows than the reference")


def bench_latents(chosen: Any, folder: Path) -> list[Row]:
    """Rows of all loaders of latents."""
    write_sets(folder, chosen.rows)
    batch, steps = chosen.batch, chosen.rows // chosen.batch
    public = PublicFiles(folder / "public")
    known = np.arange(chosen.rows)
    with ExitStack() as stack:

        def stream(kind: str) -> LatentStream:
            moments = open_moments(folder / kind)
            return stack.enter_context(LatentStream(Rows(moments, known), seed=0, batch=batch, first_image=0))

        def loader(workers: int, **sampling: Any) -> DataLoader:
            return DataLoader(public, batch, num_workers=workers, drop_last=True, **sampling)

        def epochs(batches: Any, count: int) -> int:
            return sum(len(labels) for _, (_, labels, *_) in zip(range(count), batches, strict=False))

        in_order = order.rows(0, 0, steps * batch, chosen.rows).tolist()
        for kind in ("packed", "public"):
            same_rows(f"ours, {kind}", stream(kind), iter(loader(0, sampler=in_order)), steps)
        for workers in WORKERS[1:]:
            same_rows(f"public, {workers} workers", iter(loader(workers, sampler=in_order)), stream("packed"), steps)
        ours, files = stream("packed"), stream("public")
        found = {
            "ours, packed": Candidate(lambda: epochs(ours, 8 * steps), True, {"batch": batch}),
            "ours, public files": Candidate(lambda: epochs(files, steps), True, {"batch": batch}),
        }
        for workers in WORKERS:
            shuffled = loader(workers, shuffle=True)
            found[f"public, {workers} workers"] = Candidate(
                lambda shuffled=shuffled: epochs(shuffled, steps), False, {"batch": batch}
            )
        found = {name: one._replace(params={**one.params, "rows": chosen.rows}) for name, one in found.items()}
        return rows("latents", found, chosen, torch.device("cpu"), int(np.prod(SHAPE)) * 2)
