"""The rival of our latent loaders: the public SRA code's data set, written anew."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset


class PublicFiles(Dataset):
    """File names from a walk, labels from dataset.json, one np.load per sample: (moments, label)."""

    def __init__(self, root: Path) -> None:
        self.root = str(root / "vae-sd")
        paths = [os.path.join(folder, name) for folder, _, names in os.walk(self.root) for name in names]
        self.names = sorted(os.path.relpath(path, self.root) for path in paths if path.endswith(".npy"))
        with open(os.path.join(self.root, "dataset.json"), "rb") as file:
            labels = dict(json.load(file)["labels"])
        self.labels = np.array([labels[name.replace("\\", "/")] for name in self.names], dtype=np.int64)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
        with open(os.path.join(self.root, self.names[row]), "rb") as file:
            moments = np.load(file)
        return torch.from_numpy(moments), torch.tensor(self.labels[row])
