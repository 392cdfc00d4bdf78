"""Encode source images to the rows of a packed set: with a VAE, as pixels, or by converting the public layout.

Rows depend on the images only. On a GPU they also depend on the batches, which therefore start at a shard's first
image, whichever process makes it. On a CPU each image is encoded alone, by one thread: with several threads per image
the order of sums, and so the last bits, would depend on their number.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sra_fast.config import DataConfig, PrepareCommand
from sra_fast.data.decoders import open_decoder
from sra_fast.data.folder import ImageFolder
from sra_fast.data.manifest import Skipped
from sra_fast.data.public import CHANNELS, DOWNSAMPLING, PublicSet
from sra_fast.data.stream import ReadAhead
from sra_fast.errors import Damaged, Refused
from sra_fast.files import is_of_one_file
from sra_fast.hardware import Hardware
from sra_fast.packing.archives import ImageArchives
from sra_fast.packing.shards import Part
from sra_fast.vae import Vae, absolute_name, open_vae

PUBLIC_BATCH = 64  # files between two updates of the progress bar


class Encoder(ABC):
    """Encodes source images to rows.

    Attributes:
        source: the images: classes, files, labels, root, `len`.
        rows_per_shard: source images per shard.
        shape, dtype: of a row.
        flips: whether mirrored images are encoded too.
        settings: everything that the rows' bytes depend on, as JSON values by the names of the options.
        facts: fields of the manifest.
    """

    source: ImageFolder | ImageArchives | PublicSet
    rows_per_shard: int
    shape: tuple[int, int, int]
    dtype: np.dtype
    flips: bool
    settings: dict[str, Any]
    facts: dict[str, Any]

    @property
    def shards(self) -> int:
        """Number of shards."""
        return -(-len(self.source) // self.rows_per_shard)

    def images(self, shard: int) -> range:
        """Positions of a shard's source images."""
        return range(shard * self.rows_per_shard, min(len(self.source), (shard + 1) * self.rows_per_shard))

    @abstractmethod
    def describe(self) -> str:
        """One line on what is encoded and how."""

    @abstractmethod
    def parts(self, shard: int) -> Generator[Part, None, None]:
        """Encode a shard's images, in order.

        Raises:
            Refused: if the source as a whole has become unreadable, or the VAE returns numbers that are not finite.
        """

    def _skip(self, row: int, error: OSError) -> Skipped:
        """Skip a file that cannot be read. Raises Damaged if the error concerns more than this file."""
        reason, path = error.strerror or str(error), self.source.root / self.source.files[row]
        if isinstance(self.source, ImageArchives) or not is_of_one_file(error, path):
            raise Damaged(path, f"cannot be read ({reason})") from error
        return Skipped(self.source.files[row], reason)


class ImageEncoder(Encoder):
    """Encodes class folders or archives, with a VAE or as pixels."""

    source: ImageFolder | ImageArchives

    def __init__(self, config: PrepareCommand, source: ImageFolder | ImageArchives) -> None:
        side, hardware = config.resolution, Hardware.choose(config.device, config.precision)
        self.source, self.flips, self.rows_per_shard = source, config.flips, config.rows_per_shard
        self._batch, self._device = config.batch, hardware.device
        if self._device.type == "cuda":  # with its index: the current device of a new thread is the first one
            self._device = torch.device("cuda", torch.cuda.current_device())
        self._vae: Vae | None = None
        if not config.no_vae:
            self._vae = open_vae(config.vae, self._device, hardware.dtype)
            if side % self._vae.downsampling:
                raise Refused("resolution", side, f"must be a multiple of the VAE's {self._vae.downsampling}")
        data = DataConfig(
            resolution=side, channels=3, reader=config.reader, exif=config.exif, max_pixels=config.max_pixels
        )
        self._decoder = open_decoder(data, self._device)
        self._stream = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None
        if vae := self._vae:
            channels = (2 if vae.posterior else 1) * vae.channels
            self.shape = (channels, side // vae.downsampling, side // vae.downsampling)
            self.dtype = np.dtype(np.float16)
            self._method = f"{vae.kind} {vae.name}: {vae.channels} channels, {hardware.precision} on {hardware.name}"
        else:
            self.shape, self.dtype = (3, side, side), np.dtype(np.uint8)
            self._method = "pixels as they are"
        self.settings = self._settings(config, hardware)
        self.facts = self._facts(config)

    def _settings(self, config: PrepareCommand, hardware: Hardware) -> dict[str, Any]:
        settings = {
            "images": self.source.fingerprint(),
            "image-count": len(self.source),
            "resolution": config.resolution,
            "exif": config.exif,
            "reader": self._decoder.name,
            "flips": config.flips,
            "rows-per-shard": config.rows_per_shard,
            "no-vae": config.no_vae,
        }
        if config.max_pixels != PrepareCommand.max_pixels:  # sets begun before the option existed have no such setting
            settings["max-pixels"] = config.max_pixels
        if self._vae:
            settings |= {"device": self._device.type, "precision": hardware.precision}
            settings |= {"vae-weights": self._vae.fingerprint}
        if self._vae and self._stream:
            settings["batch"] = config.batch
        return settings

    def _facts(self, config: PrepareCommand) -> dict[str, Any]:
        numbers = {"posterior": False, "scale": 1 / 127.5, "shift": 127.5}
        if vae := self._vae:
            numbers = {"posterior": vae.posterior, "scale": vae.scale, "shift": vae.shift}
        return {
            "classes": self.source.classes,
            "shape": self.shape,
            "dtype": self.dtype.name,
            "vae": absolute_name(config.vae),
            "crop": "adm center" + (", turned as EXIF says" if config.exif else ""),
            "resolution": config.resolution,
            **numbers,
        }

    def describe(self) -> str:
        images = f"{len(self.source):,} images, {len(self.source.classes):,} classes"
        return f"{images}; decoded by {self._decoder.name}{self._decoder.note}; {self._method}"

    def parts(self, shard: int) -> Generator[Part, None, None]:
        images, threads = self.images(shard), torch.get_num_threads()
        batches = [images[begin : begin + self._batch] for begin in range(0, len(images), self._batch)]
        try:
            with (
                ReadAhead(self._decode, batches, self._stream) as decoded,
                # Each worker computes with one thread; by default each would use as many as this process has.
                ThreadPoolExecutor(threads, "encode", torch.set_num_threads, (1,)) as pool,
            ):
                for rows, x, skipped in decoded:
                    encoded = self._encode(x, rows, pool)
                    flips = self._encode(x.flip(-1), rows, pool) if self.flips else None
                    yield Part(encoded, flips, self.source.labels[rows], skipped)
        finally:
            torch.set_num_threads(threads)

    def _decode(self, batch: range) -> tuple[list[int], Tensor, tuple[Skipped, ...]]:
        """(rows of the source, their pixels (k, 3, R, R) float32 on the device, the files that were skipped)."""
        files, skipped = {}, {}
        for row in batch:
            try:
                files[row] = self.source.read(row)
            except OSError as error:
                skipped[row] = self._skip(row, error)
        rows, x, reasons = self._decoder.decode_readable(files)
        skipped |= {row: Skipped(self.source.files[row], reason) for row, reason in reasons.items()}
        return rows, x, tuple(skipped[row] for row in sorted(skipped))

    def _encode(self, x: Tensor, rows: list[int], pool: ThreadPoolExecutor) -> np.ndarray:
        """(k, *shape) of pixels (k, 3, R, R) float32."""
        if not len(x):
            return np.empty((0, *self.shape), self.dtype)
        if self._vae is None:
            return x.add(1).mul_(127.5).round_().to(torch.uint8).cpu().numpy()
        if self._stream is None:
            moments = torch.cat(list(pool.map(self._vae.encode, x.split(1))))
        else:
            try:
                moments = self._vae.encode(x)
            except torch.OutOfMemoryError as error:
                raise Refused("batch", self._batch, "needs more memory than this GPU has: try half") from error
        moments = moments.half().cpu()
        finite = moments.isfinite().flatten(1).all(1).tolist()
        if not all(finite):
            file = self.source.files[rows[finite.index(False)]]
            raise Refused("vae", self._vae.name, f"returns numbers that float16 cannot hold for {file}")
        return moments.numpy()


class PublicConverter(Encoder):
    """Converts the public layout: the same numbers, rounded to float16."""

    source: PublicSet

    def __init__(self, config: PrepareCommand, source: PublicSet) -> None:
        self.source, self.flips, self.rows_per_shard = source, False, config.rows_per_shard
        self.shape, self.dtype = source.shape, np.dtype(np.float16)
        self.settings = {"from-public": source.fingerprint, "rows-per-shard": config.rows_per_shard}
        scale, shift, downsampling = source.scale, source.shift, DOWNSAMPLING
        if config.vae:
            vae = open_vae(config.vae, torch.device("cpu"), torch.float32)
            if not vae.posterior or vae.channels != source.channels:
                raise Refused("vae", config.vae, f"must be an AutoencoderKL of {source.channels} channels")
            scale, shift, downsampling = vae.scale, vae.shift, vae.downsampling
            self.settings["vae-weights"] = vae.fingerprint
        elif source.channels != CHANNELS:
            rule = f"has {source.channels} channels and Stable Diffusion's VAE {CHANNELS}: name its VAE with --vae"
            raise Refused("from-public", config.from_public, rule)
        self.facts = {
            "classes": source.classes,
            "shape": self.shape,
            "dtype": self.dtype.name,
            "posterior": True,
            "scale": scale,
            "shift": shift,
            "vae": absolute_name(config.vae),
            "crop": "adm center",
            "resolution": downsampling * self.shape[1],
        }

    def describe(self) -> str:
        return f"{len(self.source):,} files of the public layout, {len(self.source.classes):,} classes"

    def parts(self, shard: int) -> Generator[Part, None, None]:
        images = self.images(shard)
        for begin in range(0, len(images), PUBLIC_BATCH):
            rows, encoded, skipped = [], [], []
            for row in images[begin : begin + PUBLIC_BATCH]:
                try:
                    moments = self.source.read_row(row)
                    _check_moments(self.source, row, moments)
                except Damaged as error:
                    if isinstance(error.__cause__, OSError):
                        skipped.append(self._skip(row, error.__cause__))
                    else:
                        skipped.append(Skipped(self.source.files[row], " ".join(error.reason.split())))
                    continue
                rows.append(row)
                encoded.append(moments.astype(self.dtype))
            stacked = np.stack(encoded) if encoded else np.empty((0, *self.shape), self.dtype)
            yield Part(stacked, None, self.source.labels[rows], tuple(skipped))


def _check_moments(source: PublicSet, row: int, moments: np.ndarray) -> None:
    """Raise Damaged unless (2C, h, h) can be means and standard deviations that float16 can hold."""
    if not (np.abs(moments) <= np.finfo(np.float16).max).all():  # a NaN fails the comparison
        raise Damaged(source.file(row), "not finite, or beyond float16")
    if moments[len(moments) // 2 :].min() < 0:
        raise Damaged(source.file(row), "a standard deviation below 0")
