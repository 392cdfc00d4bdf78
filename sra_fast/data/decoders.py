"""Decode JPEG and PNG files and crop them (crop.py), with DALI or Pillow.

On a CPU either library decodes and PyTorch resizes, in a quarter of the time of either's own filter. Pixels are the
same, except that converting colours to grey differs by up to 0.6 grey levels (of 255) in an image's mean. On a GPU DALI
also resizes, with its antialiased cubic filter, which differs by 0.2 levels.

DALI leaves two kinds of files to Pillow: images that must be halved or are very large, because a batch of them is too
large for memory and on a GPU there is no box filter (plain cubic differs by up to 28 levels); and PNGs of other than 8
bits, which it converts differently.

Both agree on which files are truncated. Pillow detects damage within the compressed data more often than DALI.
"""

from __future__ import annotations

import io
import os
import threading
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from sra_fast.config import DataConfig
from sra_fast.data.crop import adm_crop
from sra_fast.data.image_file import Header, read_header, without_text
from sra_fast.errors import Refused, is_out_of_memory
from sra_fast.progress import warn

# The bound on an image's pixels is data.max-pixels, for both readers. What Pillow thinks of a file that it can decode
# is of no interest to a user.
Image.MAX_IMAGE_PIXELS = None
warnings.filterwarnings("ignore", module=r"PIL\.")

MAX_DALI_PIXELS = 1 << 24  # DALI holds whole batches; larger images, which must be long and thin, are left to Pillow
DALI_PACKAGE = f"nvidia-dali-cuda{'120' if (torch.version.cuda or '').startswith('12') else '130'}"


class Undecodable(Exception):
    """Some files of a batch cannot be decoded. `reasons`: {index in the batch: one line}."""

    def __init__(self, reasons: dict[int, str]) -> None:
        self.reasons = {index: " ".join(reason.split()) for index, reason in sorted(reasons.items())}
        super().__init__("; ".join(f"file {index} of the batch: {reason}" for index, reason in self.reasons.items()))


def decode_with_pillow(file: bytes, data: DataConfig) -> np.ndarray:
    """Pixels (C, R, R) uint8 of a grey, colour, palette, CMYK or 16-bit file. Transparency is dropped.

    Raises:
        Exception: of nearly any kind, if the file is damaged.
    """
    image = Image.open(io.BytesIO(without_text(file, data.exif)), formats=("JPEG", "PNG"))
    if data.exif:
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16-bit grey, which `convert` would clip to white; 257 = 65535 / 255
        image = Image.fromarray(((np.asarray(image).astype(np.uint32) + 128) // 257).astype(np.uint8))
    mode = "L" if data.channels == 1 else "RGB"
    if image.mode not in ("L", "RGB"):
        image = image.convert("RGB")
    if image.mode != mode:
        image = image.convert(mode)
    return adm_crop(np.array(image).reshape(image.height, image.width, data.channels), data.resolution)


class PixelBudget:
    """Bounds the pixels of the images that several threads hold together. One image that exceeds the bound by itself
    is held alone."""

    def __init__(self, pixels: int) -> None:
        self._pixels, self._held, self._changed = pixels, 0, threading.Condition()

    @contextmanager
    def hold(self, pixels: int) -> Iterator[None]:
        """Wait until there is room for `pixels`, which are held during the block."""
        with self._changed:
            self._changed.wait_for(lambda: not self._held or self._held + pixels <= self._pixels)
            self._held += pixels
        try:
            yield
        finally:
            with self._changed:
                self._held -= pixels
                self._changed.notify_all()


class Decoder(ABC):
    """Decodes batches of any size. Safe to share between threads, which wait for each other."""

    name: str
    """"dali cpu", "dali gpu" or "pillow"."""
    note: str = ""
    """A remark in parentheses."""

    def __init__(self, data: DataConfig, device: torch.device) -> None:
        self.data, self.device = data, device
        self.threads = data.threads or min(8, os.cpu_count() or 1)
        self._on_host = device.type == "cpu"
        self._pool = ThreadPoolExecutor(self.threads, thread_name_prefix="decode")
        self._lock = threading.Lock()
        self._budget = PixelBudget(data.max_pixels)
        # A tensor, because CUDA turns division by a Python number into a multiplication, which rounds differently.
        self._scale = torch.tensor(127.5, device=device)

    def decode(self, files: list[bytes]) -> Tensor:
        """Decode all files, in their order.

        Returns:
            (B, C, R, R) float32 on the device: pixel / 127.5 - 1, in [-1, 1].

        Raises:
            Undecodable: naming every file of the batch that cannot be decoded. The decoder remains usable.
        """
        shape = len(files), self.data.channels, self.data.resolution, self.data.resolution
        pixels = torch.empty(shape, dtype=torch.float32 if self._on_host else torch.uint8, device=self.device)
        headers, reasons = {}, {}
        for index, file in enumerate(files):
            try:
                header = read_header(file)
                if header.pixels > self.data.max_pixels:
                    size = f"{header.width:,} x {header.height:,} pixels"
                    raise ValueError(f"{size}, more than max-pixels = {self.data.max_pixels:,}")
                headers[index] = header
            except ValueError as error:
                reasons[index] = str(error)
        with self._lock:
            reasons |= self._fill(pixels, files, headers)
        if reasons:
            raise Undecodable(reasons)
        return pixels if self._on_host else pixels.to(torch.float32).div_(self._scale).sub_(1.0)

    def decode_readable(self, files: dict[int, bytes]) -> tuple[list[int], Tensor, dict[int, str]]:
        """Decode the files that can be decoded.

        Args:
            files: by any key.

        Returns:
            their keys, their pixels as from `decode`, and {key: why it cannot be decoded} of the others.
        """
        files, reasons = dict(files), {}
        while True:
            keys = list(files)
            try:
                return keys, self.decode(list(files.values())), reasons
            except Undecodable as error:
                for index, reason in error.reasons.items():
                    reasons[keys[index]] = reason
                    del files[keys[index]]

    @abstractmethod
    def _fill(self, pixels: Tensor, files: list[bytes], headers: dict[int, Header]) -> dict[int, str]:
        """Decode the files whose index is in `headers` into pixels (B, C, R, R), float32 in [-1, 1] on the host, uint8
        elsewhere. Returns {index: reason} of the files that failed."""

    def _fill_rows(
        self, pixels: Tensor, indices: list[int], decode: Callable[[int], np.ndarray], headers: dict[int, Header]
    ) -> dict[int, str]:
        """pixels[indices[k]] = decode(k), which is (C, R, R) uint8. Returns {index: reason} of what failed. A lack of
        memory says nothing about an image, and is raised.

        Each thread takes every n-th file, because for small images handing over single files costs more than decoding.
        """
        host = pixels.numpy() if self._on_host else np.empty((len(indices), *pixels.shape[1:]), np.uint8)
        reasons: dict[int, str] = {}

        def decode_share(first: int) -> None:
            for place in range(first, len(indices), self.threads):
                try:
                    with self._budget.hold(headers[indices[place]].pixels):
                        decoded = decode(place)
                except Exception as error:  # Pillow raises nearly anything for damaged files.
                    if is_out_of_memory(error):
                        raise
                    reasons[indices[place]] = _reason(error)
                    continue
                if self._on_host:
                    row = host[indices[place]]
                    np.divide(decoded, 127.5, out=row, dtype=np.float32)
                    row -= 1
                else:
                    host[place] = decoded

        list(self._pool.map(decode_share, range(min(self.threads, len(indices)))))
        if not self._on_host:
            _scatter(pixels, indices, torch.from_numpy(host))
        return reasons


def _scatter(pixels: Tensor, indices: list[int], decoded: Tensor) -> None:
    # Not pixels[indices] = decoded, which takes 60 times as long for small images.
    pixels.index_copy_(0, torch.tensor(indices, dtype=torch.int64, device=pixels.device), decoded.to(pixels.device))


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):  # its message is the address of a buffer
        return "damaged header"
    return str(error) or type(error).__name__


class PillowDecoder(Decoder):
    """Decodes with Pillow, which releases the GIL, in a pool of threads."""

    name = "pillow"

    def __init__(self, data: DataConfig, device: torch.device) -> None:
        super().__init__(data, device)
        Image.preinit()  # once here rather than in all threads at the same time

    def _fill(self, pixels: Tensor, files: list[bytes], headers: dict[int, Header]) -> dict[int, str]:
        indices = list(headers)
        return self._fill_rows(
            pixels, indices, lambda place: decode_with_pillow(files[indices[place]], self.data), headers
        )


class DaliDecoder(Decoder):
    """Decodes with DALI, on the device that the pixels go to."""

    def __init__(self, data: DataConfig, device: torch.device) -> None:
        super().__init__(data, device)
        self.name = "dali gpu" if device.type == "cuda" else "dali cpu"
        self.note = f" (pillow where a side of {2 * data.resolution} or more is halved first)"
        self._pillow = PillowDecoder(data, device)
        self._pipelines: dict[bool, Any] = {}  # by whether they are for single files
        self._capacity = 0

    def _fill(self, pixels: Tensor, files: list[bytes], headers: dict[int, Header]) -> dict[int, str]:
        halved = 2 * self.data.resolution
        for_pillow = {
            index: header
            for index, header in headers.items()
            if header.bits != 8 or min(header.width, header.height) >= halved or header.pixels > MAX_DALI_PIXELS
        }
        reasons = self._pillow._fill(pixels, files, for_pillow) if for_pillow else {}
        return reasons | self._fill_with_dali(pixels, files, {i: h for i, h in headers.items() if i not in for_pillow})

    def _fill_with_dali(self, pixels: Tensor, files: list[bytes], headers: dict[int, Header]) -> dict[int, str]:
        indices = list(headers)
        if not indices:
            return {}
        if len(indices) > self._capacity:
            self._capacity = len(indices)
            self._pipelines.pop(False, None)
        try:
            decoded = self._run([files[index] for index in indices])
        except RuntimeError as error:
            _raise_if_not_the_file(error)
        else:
            return self._store(decoded, pixels, indices, headers)
        # One bad file fails a whole batch without being named, so each is decoded alone. (Asking Pillow instead would
        # make the result depend on a file's neighbours: the two libraries disagree on some damaged files.)
        reasons = {}
        for index in indices:
            try:
                decoded = self._run([files[index]], single=True)
            except RuntimeError as error:
                _raise_if_not_the_file(error)
                reasons[index] = self._failure(files[index], error)
            else:
                reasons |= self._store(decoded, pixels, [index], headers)
        return reasons

    def _run(self, files: list[bytes], single: bool = False) -> Any:
        """The pipeline's output. A pipeline that has failed cannot be used again, and is not kept."""
        if single not in self._pipelines:
            self._pipelines[single] = self._start(1 if single else self._capacity)
        pipeline = self._pipelines.pop(single)
        pipeline.feed_input("files", [np.frombuffer(file, np.uint8) for file in files])
        (decoded,) = pipeline.run()
        self._pipelines[single] = pipeline
        return decoded

    def _failure(self, file: bytes, error: RuntimeError) -> str:
        """Why DALI failed: in Pillow's words, which are clearer, if it fails too."""
        try:
            decode_with_pillow(file, self.data)
        except Exception as pillow_error:
            if is_out_of_memory(pillow_error):
                raise
            return _reason(pillow_error)
        lines = _dali_message(error).splitlines()
        return "DALI: " + next((line.strip() for line in lines if line.strip()), type(error).__name__)

    def _store(self, decoded: Any, pixels: Tensor, indices: list[int], headers: dict[int, Header]) -> dict[int, str]:
        """pixels[indices] = the pipeline's output: whole images on a CPU, cropped ones on a GPU. Returns {index:
        reason} of what failed."""
        if self._on_host:
            return self._fill_rows(
                pixels, indices, lambda place: adm_crop(np.asarray(decoded[place]), self.data.resolution), headers
            )
        from nvidia.dali.plugin.pytorch import feed_ndarray

        cropped = torch.empty((len(indices), *pixels.shape[1:]), dtype=torch.uint8, device=self.device)
        stream = torch.cuda.current_stream(self.device)
        feed_ndarray(decoded.as_tensor(), cropped, cuda_stream=stream)
        stream.synchronize()  # the next run overwrites `decoded`
        _scatter(pixels, indices, cropped)
        return {}

    def _start(self, capacity: int) -> Any:
        try:
            return self._build(capacity)
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise Refused(f"reader: DALI cannot start ({reason}); choose pillow") from error

    def _build(self, capacity: int) -> Any:
        from nvidia.dali import Pipeline

        # DALI defines these names at run time, where type checkers cannot see them.
        fn: Any = import_module("nvidia.dali.fn")
        types: Any = import_module("nvidia.dali.types")

        on_gpu, side = self.device.type == "cuda", self.data.resolution
        gpu = (torch.cuda.current_device() if self.device.index is None else self.device.index) if on_gpu else None
        # Depth 1: the stream reads ahead already, and a failed run then concerns exactly the batch just fed.
        pipeline = Pipeline(capacity, num_threads=self.threads, device_id=gpu, prefetch_queue_depth=1)
        with pipeline:
            image = fn.decoders.image(
                fn.external_source(name="files", dtype=types.UINT8, ndim=1),
                device="mixed" if on_gpu else "cpu",
                output_type=types.GRAY if self.data.channels == 1 else types.RGB,
                adjust_orientation=self.data.exif,
                # On a GPU: interpolate chroma as Pillow does (repeating it is off by 2 levels), and do not use the
                # hardware JPEG engine, which takes a share of each batch: pixels would depend on the place in it.
                jpeg_fancy_upsampling=True,
                hw_decoder_load=0.0,
            )
            if on_gpu:
                # Integer sizes and a crop that rounds down, as in the ADM crop: with DALI's defaults the mean
                # difference is 5.5 levels.
                image = fn.resize(
                    image, resize_shorter=side, interp_type=types.INTERP_CUBIC, antialias=True, subpixel_scale=False
                )
                image = fn.transpose(fn.crop(image, crop=(side, side), rounding="truncate"), perm=[2, 0, 1])
            pipeline.set_outputs(image)
        pipeline.build()
        return pipeline


def _dali_message(error: RuntimeError) -> str:
    """The message without the quoted pipeline that precedes it."""
    return str(error).partition("encountered:")[2] or str(error)


def _raise_if_not_the_file(error: RuntimeError) -> None:
    """Re-raise errors of the device or of memory; return from those that a damaged file can cause."""
    message = _dali_message(error).lower()
    if is_out_of_memory(error):
        raise error
    if "cuda" in message and "nvjpeg" not in message and "nvimgcodec" not in message:
        raise error


def open_decoder(data: DataConfig, device: torch.device) -> Decoder:
    """The decoder that `data.reader` selects, with output on `device`. auto is DALI if it is installed, otherwise
    Pillow and a line on stderr.

    Raises:
        Refused: if data.reader is dali and DALI is not installed.
    """
    if data.reader == "pillow":
        return PillowDecoder(data, device)
    try:
        import nvidia.dali  # noqa: F401
    except ImportError as error:
        if data.reader == "dali":
            raise Refused("reader", "dali", f"needs `pip install {DALI_PACKAGE}`, or choose pillow") from error
        hint = f"for faster decoding: pip install {DALI_PACKAGE}"
        warn(f"reader: DALI is not installed, images are decoded with Pillow; {hint}")
        return PillowDecoder(data, device)
    return DaliDecoder(data, device)
