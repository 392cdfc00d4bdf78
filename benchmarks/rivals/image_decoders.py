"""Decoders of images: ours against Pillow under a torch DataLoader; and the rate of a VAE's encoder.

No decoder gets a number whose pixels are off from Pillow's by more than 0.5 grey levels in the mean, or 1.0 for an
image.
"""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from benchmarks.harness.rows import Row
from benchmarks.harness.throughput import Candidate, rows
from benchmarks.harness.timing import GateFailed
from sra_fast.config import DataConfig
from sra_fast.data.decoders import open_decoder
from sra_fast.errors import Refused
from sra_fast.vae import open_vae

THREADS = sorted({1, min(8, os.cpu_count() or 1)})
WORKERS = sorted({0, *THREADS, 2})
MOST_OFF = {"set": 0.5, "image": 1.0}  # grey levels of 255, in the mean
SIDES = ((500, 375), (375, 500), (500, 333), (500, 375), (640, 480), (333, 500), (400, 300), (1200, 900))
READERS = {"pillow": "Pillow", "dali": "DALI"}  # the one that may not be installed comes last


class JpegFiles(Dataset):
    """Files decoded and cut by Pillow alone, as the public data sets are; `passes` times over."""

    def __init__(self, files: Sequence[Path], resolution: int, passes: int) -> None:
        self.files, self.resolution, self.passes = list(files), resolution, passes

    def __len__(self) -> int:
        return len(self.files) * self.passes

    def __getitem__(self, index: int) -> Tensor:
        image = Image.open(self.files[index % len(self.files)]).convert("RGB")
        return torch.from_numpy(np.array(pillow_crop(image, self.resolution))).permute(2, 0, 1).contiguous()


def _whole(images: JpegFiles, index: int) -> Tensor:
    try:
        return images[index]
    except Exception as error:  # a damaged file makes Pillow raise nearly anything
        raise Refused(f"--jpegs: {images.files[index]}: cannot be decoded ({error})") from error


def pillow_crop(image: Image.Image, resolution: int) -> Image.Image:
    """The ADM center crop by Pillow alone: the reference of `sra_fast.data.crop`."""
    while min(image.size) >= 2 * resolution:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = resolution / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - resolution) // 2, (image.height - resolution) // 2
    return image.crop((left, top, left + resolution, top + resolution))


def write_jpegs(root: Path, count: int, shrunk: int = 1) -> list[Path]:
    """Pictures with smooth parts, edges and noise, in ImageNet's usual sizes; `shrunk`: sides divided by it."""
    root.mkdir(parents=True, exist_ok=True)
    paths, generator = [], np.random.default_rng(0)
    for number in range(count):
        width, height = (side // shrunk for side in SIDES[number % len(SIDES)])
        y, x = np.mgrid[0:height, 0:width] / max(width, height)
        a, b, c, d = generator.uniform(2, 12, (4, 3, 1, 1))
        planes = 128 + 60 * np.sin(a * x + b * y) + 40 * np.sign(np.sin(c * x - d * y))
        planes += generator.normal(0, 6, planes.shape)
        buffer = io.BytesIO()
        Image.fromarray(planes.clip(0, 255).astype(np.uint8).transpose(1, 2, 0)).save(buffer, "JPEG", quality=90)
        paths.append(root / f"{number:05d}.jpg")
        paths[-1].write_bytes(buffer.getvalue())
    return paths


def same_pixels(name: str, x: Tensor, reference: Tensor) -> float:
    """The mean difference, (N, C, H, W) in [-1, 1], in grey levels. Raises `GateFailed` where it is too large."""
    off = (x - reference).abs().mean((1, 2, 3)) * 127.5
    worst, mean = float(off.max()), float(off.mean())
    if not (worst <= MOST_OFF["image"] and mean <= MOST_OFF["set"]):
        raise GateFailed(f"{name}: pixels are off by {mean:.2f} levels in the mean and {worst:.2f} for an image")
    return mean


def bench_decoding(chosen: Any, files: Sequence[Path], device: torch.device) -> list[Row]:
    """Rows of all decoders that are installed, with output on the device."""
    data = DataConfig(resolution=chosen.resolution, channels=3)
    batch, parts = chosen.decode_batch, [*range(0, len(files), chosen.decode_batch)]
    decoders = {}
    try:
        for reader, title in READERS.items():
            for threads in THREADS:
                decoder = open_decoder(replace(data, reader=reader, threads=threads), device)
                decoders[f"ours, {title}, {threads} threads"] = decoder
    except Refused as error:
        print(f"DALI not run: {error}")

    def read(first: int) -> list[bytes]:
        return [path.read_bytes() for path in files[first : first + batch]]

    def decode(decoder: Any) -> int:
        for _ in range(chosen.passes):
            for first in parts:
                decoder.decode(read(first))
        return chosen.passes * len(files)

    def iterate(loader: DataLoader) -> int:
        return sum(len(x.to(device).float().div_(127.5).sub_(1)) for x in loader)

    rival = JpegFiles(files, data.resolution, chosen.passes)
    right = torch.stack([_whole(rival, index) for index in range(len(files))]).float().div_(127.5).sub_(1)
    params = {"files": len(files), "made_up": not chosen.jpegs, "resolution": data.resolution, "batch": batch}
    found = {}
    for name, decoder in decoders.items():
        off = same_pixels(name, torch.cat([decoder.decode(read(first)).cpu() for first in parts]), right)
        found[name] = Candidate(lambda decoder=decoder: decode(decoder), True, params, round(off, 3))
    for workers in WORKERS:
        loader = DataLoader(rival, batch, num_workers=workers, pin_memory=device.type == "cuda")
        found[f"Pillow, DataLoader, {workers} workers"] = Candidate(
            lambda loader=loader: iterate(loader), False, params
        )
    size = sum(path.stat().st_size for path in files) // len(files)
    before = torch.get_num_threads()
    # Or the rival's last step, to floats, would leave torch's threads waiting for more at full speed, at its expense.
    torch.set_num_threads(1)
    try:
        return rows("decode on a GPU" if device.type == "cuda" else "decode", found, chosen, device, size)
    finally:
        torch.set_num_threads(before)


def bench_encoding(chosen: Any, device: torch.device, folder: Path) -> list[Row]:
    """The row of a VAE's encoder: without one named, of Stable Diffusion's with random weights, made in `folder`, if
    diffusers is installed."""
    gpu = device.type == "cuda"
    if not chosen.vae:
        if find_spec("diffusers") is None:
            print("encoder not run: needs `pip install diffusers`")
            return []
        write_vae(folder)
    vae = open_vae(chosen.vae or str(folder), device, torch.bfloat16 if gpu else torch.float32)
    side = chosen.resolution
    x = torch.rand(chosen.decode_batch if gpu else 4, 3, side, side, device=device) * 2 - 1

    def encode() -> int:
        vae.encode(x)
        return len(x)

    of = "random weights" if not chosen.vae else "a folder" if Path(chosen.vae).exists() else chosen.vae
    params = {"resolution": side, "batch": len(x), "dtype": "bf16" if gpu else "fp32"}
    return rows("encode", {f"{vae.kind} ({of})": Candidate(encode, True, params)}, chosen, device, x[0].numel() * 4)


def write_vae(folder: Path, channels: Sequence[int] = (128, 256, 512, 512)) -> None:
    """An AutoencoderKL of Stable Diffusion's shape, 83.7 M parameters, with random weights. Needs diffusers."""
    from diffusers import AutoencoderKL

    blocks = len(channels)
    AutoencoderKL(
        block_out_channels=tuple(channels),
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        layers_per_block=2,
        latent_channels=4,
    ).save_pretrained(folder)
