"""What the rows of a packed set are made by: a VAE of images, nothing of images, or the public layout.

Rows depend on the images alone, and on a GPU on the batches they come in: a shard's batches begin at its first image,
whoever makes it. On a CPU every image is encoded alone and by one thread, several at a time: with more threads to an
image, the order of sums, and the last bits, would follow their number.
"""

from __future__ import annotations

import errno
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from sra_fast.config import DataConfig, PrepareCommand, refuse_unless
from sra_fast.data.decoders import Undecodable, open_decoder
from sra_fast.data.folder import ImageFolder
from sra_fast.data.manifest import Skipped
from sra_fast.data.public import CHANNELS, DOWNSAMPLING, PublicSet
from sra_fast.errors import Refused
from sra_fast.hardware import Hardware
from sra_fast.packing.archives import ImageArchives
from sra_fast.packing.shards import Part
from sra_fast.vae import Vae, from_anywhere, open_vae

T, U = TypeVar("T"), TypeVar("U")
READ_AHEAD = 2  # batches: one to hand over at once and one to even out slow files
# Trouble of one file; any other, and any of an archive, would look like a thousand bad files.
OF_ONE_FILE = (errno.ENOENT, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ELOOP, errno.EIO)


class Maker(ABC):
    """Makes rows of source images.

    Attributes:
        source: where they come from: classes, files, labels, root, `len`.
        shape, dtype: of a row.
        settings: everything that its bytes depend on, as JSON values by the names of the options.
        facts: fields of the manifest.
    """

    source: ImageFolder | ImageArchives | PublicSet
    shape: tuple[int, int, int]
    dtype: np.dtype
    flips: bool
    settings: dict[str, Any]
    facts: dict[str, Any]

    @abstractmethod
    def describe(self) -> str:
        """In a line."""

    @abstractmethod
    def parts(self, first: int, last: int) -> Iterator[Part]:
        """Source images [first, last), in order, in batches that begin at `first`.

        Raises:
            Refused: if the source as a whole cannot be read any more, or the VAE gives no numbers.
        """

    def _left_out(self, row: int, error: OSError) -> Skipped:
        """A file that cannot be read, if that is the file's own trouble."""
        reason = error.strerror or str(error)
        of_many = isinstance(self.source, ImageArchives) or error.errno not in OF_ONE_FILE
        if of_many or not self.source.root.is_dir():
            raise Refused(f"{self.source.root / self.source.files[row]}: cannot be read ({reason})") from error
        return Skipped(self.source.files[row], reason)


class FromImages(Maker):
    """Of class folders or archives, through a VAE or as they are."""

    def __init__(self, config: PrepareCommand, source: ImageFolder | ImageArchives) -> None:
        side, hardware = config.resolution, Hardware.choose(config.device, config.precision)
        self.source, self.flips, self._batch, self._device = source, config.flips, config.batch, hardware.device
        if self._device.type == "cuda":  # by its number: a new thread's current device is the first
            self._device = torch.device("cuda", torch.cuda.current_device())
        self._vae: Vae | None = None
        if not config.no_vae:
            self._vae = open_vae(config.vae, self._device, hardware.dtype)
            down = self._vae.downsampling
            refuse_unless(side % down == 0, "resolution", side, f"must be a multiple of {down}, as the VAE divides it")
        data = DataConfig(resolution=side, channels=3, reader=config.reader, exif=config.exif)
        self._decoder = open_decoder(data, self._device)
        self._stream = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None
        self._threads = torch.get_num_threads()
        if vae := self._vae:
            rows = (2 if vae.posterior else 1) * vae.channels
            self.shape = (rows, side // vae.downsampling, side // vae.downsampling)
            self.dtype = np.dtype(np.float16)
            self._what = f"{vae.kind} {vae.name}: {vae.channels} channels, {hardware.precision} on {hardware.name}"
        else:
            self.shape, self.dtype = (3, side, side), np.dtype(np.uint8)
            self._what = "pixels as they are"
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
            "vae": from_anywhere(config.vae),
            "crop": "adm center" + (", turned as EXIF says" if config.exif else ""),
            "resolution": config.resolution,
            **numbers,
        }

    def describe(self) -> str:
        images = f"{len(self.source):,} images, {len(self.source.classes):,} classes"
        return f"{images}; decoded by {self._decoder.name}{self._decoder.note}; {self._what}"

    def parts(self, first: int, last: int) -> Iterator[Part]:
        batches = [range(begin, min(begin + self._batch, last)) for begin in range(first, last, self._batch)]
        threads = torch.get_num_threads()
        try:
            # Each with one thread to compute with; by themselves they would take as many as we have.
            with ThreadPoolExecutor(self._threads, "encode", torch.set_num_threads, (1,)) as pool:
                for kept, x, skipped in _ahead(self._decode, batches):
                    rows = self._encode(x, kept, pool)
                    flips = self._encode(x.flip(-1), kept, pool) if self.flips else None
                    yield Part(rows, flips, self.source.labels[kept], skipped)
        finally:
            torch.set_num_threads(threads)

    def _decode(self, batch: range) -> tuple[list[int], Tensor, tuple[Skipped, ...]]:
        """(rows of the source, their pixels (k, 3, R, R) float32 on the device, what cannot be decoded)."""
        files, skipped = {}, {}
        for row in batch:
            try:
                files[row] = self.source.read(row)
            except OSError as error:
                skipped[row] = self._left_out(row, error)
        side = self.facts["resolution"]
        x = torch.empty((0, 3, side, side), device=self._device)
        with torch.cuda.stream(self._stream):  # or every batch would wait in line behind the VAE
            while files:
                try:
                    x = self._decoder.decode(list(files.values()))
                    break
                except Undecodable as error:
                    rows = list(files)
                    for index, reason in error.reasons.items():
                        skipped[rows[index]] = Skipped(self.source.files[rows[index]], reason)
                        del files[rows[index]]
        if self._stream:  # what is handed over is there, for any stream to read
            self._stream.synchronize()
        return list(files), x, tuple(skipped[row] for row in sorted(skipped))

    def _encode(self, x: Tensor, kept: list[int], pool: ThreadPoolExecutor) -> np.ndarray:
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
                raise Refused(
                    f"batch: {self._batch} given; the VAE needs more memory than this GPU has: try half"
                ) from error
        moments = moments.half().cpu()
        finite = moments.isfinite().flatten(1).all(1).tolist()
        if not all(finite):
            file = self.source.files[kept[finite.index(False)]]
            raise Refused(f"vae: {self._vae.name!r} given; gives numbers that float16 cannot hold for {file}")
        return moments.numpy()


class FromPublic(Maker):
    """Of the public layout: the same numbers, rounded to float16."""

    def __init__(self, config: PrepareCommand, source: PublicSet) -> None:
        self.source, self.flips = source, False
        self.shape, self.dtype = source.shape, np.dtype(np.float16)
        self.settings = {"from-public": source.fingerprint, "rows-per-shard": config.rows_per_shard}
        scale, shift, downsampling = source.scale, source.shift, DOWNSAMPLING
        if config.vae:
            vae = open_vae(config.vae, torch.device("cpu"), torch.float32)
            scale, shift, downsampling = vae.scale, vae.shift, vae.downsampling
            self.settings["vae-weights"] = vae.fingerprint
            fits = vae.posterior and vae.channels == source.channels
            refuse_unless(fits, "vae", config.vae, f"must be an AutoencoderKL of {source.channels} channels")
        else:
            needs = f"have {source.channels} channels and Stable Diffusion's VAE {CHANNELS}: --vae must name theirs"
            refuse_unless(source.channels == CHANNELS, "from-public", config.from_public, needs)
        self.facts = {
            "classes": source.classes,
            "shape": self.shape,
            "dtype": self.dtype.name,
            "posterior": True,
            "scale": scale,
            "shift": shift,
            "vae": from_anywhere(config.vae),
            "crop": "adm center",
            "resolution": downsampling * self.shape[1],
        }

    def describe(self) -> str:
        return f"{len(self.source):,} files of the public layout, {len(self.source.classes):,} classes"

    def parts(self, first: int, last: int) -> Iterator[Part]:
        for begin in range(first, last, 64):  # for the progress bar
            moments, kept, skipped = [], [], []
            for row in range(begin, min(begin + 64, last)):
                try:
                    moments.append(_storable(self.source.moments(row)))
                    kept.append(row)
                except OSError as error:
                    skipped.append(self._left_out(row, error))
                except ValueError as error:
                    skipped.append(Skipped(self.source.files[row], " ".join(str(error).split())))
            rows = np.stack(moments) if moments else np.empty((0, *self.shape))
            yield Part(rows.astype(self.dtype), None, self.source.labels[kept], tuple(skipped))


def _storable(moments: np.ndarray) -> np.ndarray:
    """The same (2C, h, h). Raises ValueError with what no moments can be, or float16 cannot hold."""
    if not (np.abs(moments) <= np.finfo(np.float16).max).all():  # NaN too
        raise ValueError("not finite, or beyond float16")
    if moments[len(moments) // 2 :].min() < 0:
        raise ValueError("a standard deviation below 0")
    return moments


def _ahead(function: Callable[[T], U], items: Iterable[T]) -> Iterator[U]:
    """function(item) of each item, in order, computed by one other thread some items ahead."""
    waiting: deque = deque()
    with ThreadPoolExecutor(1, "decode ahead") as pool:
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) > READ_AHEAD:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
