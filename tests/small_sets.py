"""Packed sets and sets in the public layout, of a few small rows."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

SHARDS = (7, 30, 1, 42)  # rows
ROW = (8, 4, 4)  # four means, four deviations


class Stored(NamedTuple):
    """What was written, row by row."""

    root: Path
    rows: np.ndarray
    flips: np.ndarray
    labels: np.ndarray


def pack(
    root: Path,
    shards: Sequence[int] = SHARDS,
    shape: tuple[int, int, int] = ROW,
    dtype: str = "float16",
    classes: int = 4,
    flips: bool = False,
    seed: int = 0,
    **facts: object,
) -> Stored:
    """A packed set: means around 0, deviations around 0.5, or pixels whose brightness is their class. Row n has label
    n % classes; `facts` change the manifest."""
    generator, count = np.random.default_rng(seed), sum(shards)
    labels = np.arange(count) % classes
    posterior = dtype != "uint8" and bool(facts.get("posterior", True))
    both = []
    for _ in range(2):
        rows = generator.standard_normal((count, *shape))
        if posterior:
            rows[:, shape[0] // 2 :] = 0.5 + 0.1 * np.abs(rows[:, shape[0] // 2 :])
        if dtype == "uint8":
            rows = 60 * labels[:, None, None, None] + generator.integers(0, 30, rows.shape)
        both.append(rows.astype(dtype))
    root.mkdir(parents=True, exist_ok=True)
    listed, first = [], 0
    for number, size in enumerate(shards):
        part = slice(first, first + size)
        kinds = {"moments": both[0], "labels": labels} | ({"moments_flip": both[1]} if flips else {})
        names = {kind: f"{kind}-{number:05d}.npy" for kind in kinds}
        hashes = {kind: _saved(root / names[kind], values[part]) for kind, values in kinds.items()}
        shard = {"file": names["moments"], "rows": size, "sha256": hashes["moments"]}
        shard |= {"labels": names["labels"], "labels_sha256": hashes["labels"]}
        if flips:
            shard |= {"flip": names["moments_flip"], "flip_sha256": hashes["moments_flip"]}
        listed.append(shard)
        first += size
    given = {
        "format_version": 1,
        "count": count,
        "classes": [f"c{label}" for label in range(classes)],
        "shape": list(shape),
        "dtype": dtype,
        "posterior": posterior,
        "scale": 1 / 127.5 if dtype == "uint8" else 0.9,
        "shift": 127.5 if dtype == "uint8" else 0.0,
        "vae": "",
        "crop": "adm",
        "resolution": 8 * shape[1],
        "shards": listed,
        "skipped": [],
    }
    (root / "manifest.json").write_text(json.dumps(given | facts))
    return Stored(root, *both, labels)


def _saved(path: Path, values: np.ndarray) -> str:
    np.save(path, values)
    return hashlib.sha256(path.read_bytes()).hexdigest()


def change(root: Path, edit: Callable[[dict], object]) -> Path:
    """Edit a set's manifest. Returns its path."""
    path = root / "manifest.json"
    given = json.loads(path.read_text())
    edit(given)
    path.write_text(json.dumps(given))
    return path


def publish(root: Path, count: int = 24, shape: tuple[int, int, int] = ROW, leading: bool = False) -> Stored:
    """root/vae-sd in the public layout, float32, ten files a folder; `leading`: of shape (1, *shape)."""
    rows = np.random.default_rng(3).standard_normal((count, *shape)).astype(np.float32)
    rows[:, shape[0] // 2 :] = np.abs(rows[:, shape[0] // 2 :])
    labels, pairs = np.arange(count) % 3, []
    for row in range(count):
        name = f"{row // 10:05d}/img-mean-std-{row:08d}.npy"
        path = root / "vae-sd" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, rows[row][None] if leading else rows[row])
        pairs.append([name, int(labels[row])])
    (root / "vae-sd" / "dataset.json").write_text(json.dumps({"labels": pairs}))
    return Stored(root, rows, rows, labels)


class StandInVae:
    """Makes grey images of twice the side of z's first channel; keeps what it was given."""

    scale, shift = 0.5, 0.25

    def __init__(self, channels: int) -> None:
        self.channels, self.given = channels, []

    def decode(self, z: Tensor) -> Tensor:
        """(B, 3, 2h, 2w) of (B, C, h, w)."""
        self.given.append(z.clone())
        return torch.tanh(z[:, :1]).repeat(1, 3, 2, 2)


def stand_in(monkeypatch: object, channels: int = 4) -> tuple[StandInVae, list[str]]:
    """Let every VAE be a stand-in: (it, the names it was opened by)."""
    vae, names = StandInVae(channels), []
    monkeypatch.setattr("sra_fast.sampling.decoding.open_vae", lambda name, device, dtype: (names.append(name), vae)[1])
    return vae, names
