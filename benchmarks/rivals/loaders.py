"""The rivals of our data loaders, written anew: Pillow under a DataLoader, and the public SRA code's latents."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset


class JpegFiles(Dataset):
    """Files decoded and cropped by Pillow alone, `passes` times over: (3, R, R) uint8."""

    def __init__(self, files: Sequence[Path], resolution: int, passes: int) -> None:
        self.files, self.resolution, self.passes = list(files), resolution, passes

    def __len__(self) -> int:
        return len(self.files) * self.passes

    def __getitem__(self, index: int) -> Tensor:
        image = Image.open(self.files[index % len(self.files)]).convert("RGB")
        return torch.from_numpy(np.array(pillow_crop(image, self.resolution))).permute(2, 0, 1).contiguous()


def pillow_crop(image: Image.Image, resolution: int) -> Image.Image:
    """The ADM center crop by Pillow alone: the reference of `sra_fast.data.crop`."""
    while min(image.size) >= 2 * resolution:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = resolution / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - resolution) // 2, (image.height - resolution) // 2
    return image.crop((left, top, left + resolution, top + resolution))


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
