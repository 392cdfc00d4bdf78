"""Opens the data set of a run, an image folder or a row set, and splits it into training and held-out images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import torch
from torch import Tensor

from sra_fast.config import DIGITS_FOLDER, Config, DataConfig
from sra_fast.data import folder, image_stream, latent_stream, rows
from sra_fast.data.decoders import Decoder, open_decoder
from sra_fast.data.digits import write_digits
from sra_fast.data.folder import ImageFolder
from sra_fast.data.packed import open_row_set
from sra_fast.data.rows import Rows, RowSet
from sra_fast.data.stream import Stream
from sra_fast.distributed import ALONE, World
from sra_fast.errors import Damaged, Refused, printable
from sra_fast.kernels.perturb import Stored, clean_ref
from sra_fast.progress import warn


class Source(Protocol):
    """Training and held-out images of one data set."""

    train: ImageFolder | Rows
    held_out: ImageFolder | Rows
    fingerprint: str
    """Equal for equal data, wherever it is stored."""
    stored: Stored | None
    """Turns the rows of a batch into x; None: the batch is x."""

    @property
    def holds_pixels(self) -> bool:
        """Whether the network is trained on pixels rather than latents."""
        ...

    @property
    def reader(self) -> str:
        """One line on how the data is read."""
        ...

    def stream(self, config: Config, first_image: int, bad: Mapping[str, str], world: World = ALONE) -> Stream:
        """This process's part of the training batches, the first of which starts at an image number. bad: files already
        known to be undecodable."""
        ...

    def load(self, images: Any) -> tuple[Tensor, Tensor]:
        """Load `train`, `held_out` or a part of either onto the device: (x as in a batch, labels (N,) int64)."""
        ...

    def pixels(self, images: Any) -> tuple[Tensor, Tensor]:
        """The same as images: ((N, C, H, W) float32 in [-1, 1], labels (N,) int64). Refuses latents."""
        ...


@dataclass(frozen=True)
class ImageSource:
    """A folder of class folders, decoded during training; see `Source`."""

    train: ImageFolder
    held_out: ImageFolder
    fingerprint: str
    decoder: Decoder
    stored: Stored | None = None
    holds_pixels: bool = True

    @property
    def reader(self) -> str:
        return f"decoded by {self.decoder.name}{self.decoder.note}"

    def stream(self, config: Config, first_image: int, bad: Mapping[str, str], world: World = ALONE) -> Stream:
        batch = config.train.batch // world.size
        return image_stream.ImageStream(
            self.train,
            self.decoder,
            seed=config.run.seed,
            batch=batch,
            first_image=first_image + world.rank * batch,
            every=config.train.batch,
            strict=config.data.strict,
            max_bad_share=config.data.max_bad_share,
            bad=bad,
        )

    def load(self, images: ImageFolder) -> tuple[Tensor, Tensor]:
        return image_stream.load(images, self.decoder)

    pixels = load


@dataclass(frozen=True)
class LatentSource:
    """A packed set or the public layout; see `Source`."""

    train: Rows
    held_out: Rows
    fingerprint: str
    stored: Stored
    device: torch.device

    @property
    def row_set(self) -> RowSet:
        """The data set that both parts belong to."""
        return self.train.row_set

    @property
    def holds_pixels(self) -> bool:
        return self.row_set.dtype == np.uint8

    @property
    def reader(self) -> str:
        channels, height, width = self.row_set.shape
        kind = "moments" if self.row_set.posterior else "rows"
        return f"{kind} of {channels} x {height} x {width} {self.row_set.dtype} from {self.row_set.root}"

    def stream(self, config: Config, first_image: int, bad: Mapping[str, str], world: World = ALONE) -> Stream:
        batch = config.train.batch // world.size
        return latent_stream.LatentStream(
            self.train,
            seed=config.run.seed,
            batch=batch,
            first_image=first_image + world.rank * batch,
            every=config.train.batch,
            pinned=self.device.type == "cuda",
        )

    def load(self, images: Rows) -> tuple[Tensor, Tensor]:
        return latent_stream.load(images, self.device)

    def pixels(self, images: Rows) -> tuple[Tensor, Tensor]:
        if not self.holds_pixels:
            raise Refused("data.latents", str(self.row_set.root), "must be images to be judged")
        x, labels = self.load(images)
        return clean_ref(x, labels, 0, self.stored), labels


def open_source(config: Config, device: torch.device) -> tuple[Source, Config]:
    """Open `data.images` or `data.latents`, split it, and fill in the model's input size, channels and classes.

    Raises:
        Refused: if the data cannot be used, or the model does not fit it.
    """
    data = config.data
    if not data.images and not data.latents:
        rule = "must be a folder of class folders, or data.latents a set that `sra-fast prepare` made"
        raise Refused("data.images", data.images, rule)
    if data.images and data.latents:
        raise Refused("data.latents", data.latents, f"excludes data.images, which is {data.images!r}")
    try:
        source, size, channels = _open_latents(data, device) if data.latents else _open_images(data, device)
    except Damaged as error:
        raise Refused(f"data.{'latents' if data.latents else 'images'}: {error}") from error
    if line := without_images(source.train, source.held_out):
        warn(f"data.held-out: {line}")
    facts = {"input_size": size, "channels": channels, "classes": len(source.train.classes)}
    for name, fact in facts.items():
        value = getattr(config.model, name)
        if value not in (0, fact):
            raise Refused(f"model.{name.replace('_', '-')}", value, f"must be {fact}, as in the data, or 0")
    return cast(Source, source), replace(config, model=replace(config.model, **facts))


def without_images(train: ImageFolder | Rows, held_out: ImageFolder | Rows) -> str:
    """One line about the classes of which every image is held out, and which training therefore never sees; empty if
    there are none."""
    classes = train.classes
    trained, all_images = (np.bincount(part, minlength=len(classes)) for part in (train.labels, held_out.labels))
    missing = np.flatnonzero((trained == 0) & (all_images > 0))
    if not len(missing):
        return ""
    names = printable(", ".join(f"{label} ({classes[label]})" for label in missing[:5]))
    names += ", ..." if missing[5:].size else ""
    return (
        f"all images of {len(missing)} of {len(classes)} classes are held out, so that these are not learned: {names}; "
        "a smaller share holds out fewer"
    )


def _open_images(data: DataConfig, device: torch.device) -> tuple[ImageSource, int, int]:
    """(source, side, channels) of `data.images`."""
    root = Path(data.images)
    if root == Path(DIGITS_FOLDER):
        write_digits(root)
    images = folder.scan(root)
    if ignored := images.ignored():
        warn(f"data.images: {ignored}")
    train, held_out = folder.split(images, data.held_out)
    try:
        decoder = open_decoder(data, device)
    except Refused as error:
        raise Refused(f"data.{error}") from error
    return ImageSource(train, held_out, images.fingerprint(), decoder), data.resolution, data.channels


def _open_latents(data: DataConfig, device: torch.device) -> tuple[LatentSource, int, int]:
    """(source, side, channels) of `data.latents`."""
    row_set = open_row_set(Path(data.latents))
    train, held_out = rows.split(row_set, data.held_out)
    source = LatentSource(train, held_out, row_set.fingerprint, row_set.stored(device), device)
    return source, row_set.shape[1], row_set.channels
