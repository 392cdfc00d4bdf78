"""Where a run's images come from: a folder of images, or a packed set of latents. Either is split into what is trained
on and what is held out, and says what the model must fit."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from sra_fast.config import DIGITS_FOLDER, Config, DataConfig, refuse_unless
from sra_fast.data import folder, image_stream, latent_stream
from sra_fast.data.decoders import Decoder, open_decoder
from sra_fast.data.digits import write_digits
from sra_fast.data.folder import ImageFolder
from sra_fast.data.packed import open_moments
from sra_fast.data.rows import Moments, Rows, split
from sra_fast.data.stream import Stream
from sra_fast.kernels.perturb import Stored, clean_ref


class Source(Protocol):
    """Training and held-out images of one data set."""

    train: ImageFolder | Rows
    held_out: ImageFolder | Rows
    fingerprint: str
    """Equal for equal data, wherever they lie."""
    stored: Stored | None
    """What makes images of a batch's rows; None: they are."""

    @property
    def holds_pixels(self) -> bool:
        """Whether x of training are images rather than latents."""

    @property
    def reader(self) -> str:
        """Who reads, in words for the run's first lines."""

    def stream(self, config: Config, first_image: int, bad: Mapping[str, str]) -> Stream:
        """Training batches from an image number on. bad: files already known to be undecodable."""

    def load(self, images: ImageFolder | Rows) -> tuple[Tensor, Tensor]:
        """All of some images at once, on the device: (x as in a batch, labels (N,) int64)."""

    def pixels(self, images: ImageFolder | Rows) -> tuple[Tensor, Tensor]:
        """All of some images at once: ((N, C, H, W) float32 in [-1, 1], labels (N,) int64). Refuses latents."""


@dataclass(frozen=True)
class ImageSource:
    """A folder of class folders, decoded on the way; see `Source`."""

    train: ImageFolder
    held_out: ImageFolder
    fingerprint: str
    decoder: Decoder
    stored: Stored | None = None
    holds_pixels: bool = True

    @property
    def reader(self) -> str:
        return f"decoded by {self.decoder.name}{self.decoder.note}"

    def stream(self, config: Config, first_image: int, bad: Mapping[str, str]) -> Stream:
        return image_stream.ImageStream(
            self.train,
            self.decoder,
            seed=config.run.seed,
            batch=config.train.batch,
            first_image=first_image,
            strict=config.data.strict,
            max_bad_share=config.data.max_bad_share,
            bad=bad,
        )

    def load(self, images: ImageFolder) -> tuple[Tensor, Tensor]:
        return image_stream.load(images, self.decoder)

    pixels = load


@dataclass(frozen=True)
class LatentSource:
    """A packed set, or the public layout; see `Source`."""

    train: Rows
    held_out: Rows
    fingerprint: str
    stored: Stored
    device: torch.device

    @property
    def moments(self) -> Moments:
        """The whole set."""
        return self.train.moments

    @property
    def reader(self) -> str:
        channels, height, width = self.moments.shape
        kind = "moments" if self.moments.posterior else "rows"
        return f"{kind} of {channels} x {height} x {width} {self.moments.dtype} from {self.moments.root}"

    def stream(self, config: Config, first_image: int, bad: Mapping[str, str]) -> Stream:
        return latent_stream.LatentStream(
            self.train,
            seed=config.run.seed,
            batch=config.train.batch,
            first_image=first_image,
            pinned=self.device.type == "cuda",
        )

    def load(self, images: Rows) -> tuple[Tensor, Tensor]:
        return latent_stream.load(images, self.device)

    def pixels(self, images: Rows) -> tuple[Tensor, Tensor]:
        refuse_unless(self.holds_pixels, "data.latents", str(self.moments.root), "must be images to be judged")
        x, labels = self.load(images)
        return clean_ref(x, labels, 0, self.stored), labels

    @property
    def holds_pixels(self) -> bool:
        """Whether rows are images rather than latents."""
        return self.moments.dtype == np.uint8


def open_source(config: Config, device: torch.device) -> tuple[Source, Config]:
    """Open `data.images` or `data.latents`, split it, and fill in the model's input size, channels and classes.

    Raises:
        Refused: on data that cannot serve, or a model that does not fit them.
    """
    data = config.data
    refuse_unless(
        bool(data.images or data.latents),
        "data.images",
        data.images,
        "must be a folder of class folders of images, or data.latents one that `sra-fast prepare` made",
    )
    refuse_unless(
        not (data.images and data.latents), "data.latents", data.latents, f"but so is data.images = {data.images}"
    )
    source, size, channels = _open_latents(data, device) if data.latents else _open_images(data, device)
    facts = {"input_size": size, "channels": channels, "classes": len(source.train.classes)}
    for name, fact in facts.items():
        given = getattr(config.model, name)
        refuse_unless(
            given in (0, fact), f"model.{name.replace('_', '-')}", given, f"must be {fact}, as the data is, or 0"
        )
    return source, replace(config, model=replace(config.model, **facts))


def _open_images(data: DataConfig, device: torch.device) -> tuple[ImageSource, int, int]:
    """(source, side, channels) of `data.images`."""
    root = Path(data.images)
    if root == Path(DIGITS_FOLDER):
        write_digits(root)
    found = folder.scan(root)
    if ignored := found.ignored():
        print(f"data.images: {ignored}", file=sys.stderr)
    train, held_out = folder.split(found, data.held_out)
    decoder = open_decoder(data, device)
    return ImageSource(train, held_out, found.fingerprint(), decoder), data.resolution, data.channels


def _open_latents(data: DataConfig, device: torch.device) -> tuple[LatentSource, int, int]:
    """(source, side, channels) of `data.latents`."""
    moments = open_moments(Path(data.latents))
    train, held_out = split(moments, data.held_out)
    source = LatentSource(train, held_out, moments.fingerprint, moments.stored(device), device)
    return source, moments.shape[1], moments.channels
