"""Files in, pixels out: JPEG and PNG decoding with the ADM center crop (crop.py), by DALI or by Pillow.

On a CPU either decodes and PyTorch resizes: in a quarter of the time of either's own filter. Their pixels are the same;
where they turn colours to grey they differ by up to 0.6 grey levels (of 255) in an image's mean. On a GPU DALI resizes
too, with its antialiased cubic filter, which differs by 0.2 levels.

DALI leaves to Pillow the images to be halved, being too large to hold a batch of them, and on a GPU for lack of a box
filter (plain cubic differs by up to 28 levels there); and PNGs of other than 8 bits, for their conversion.

Both agree on which files are cut short. Damage within the compressed data is noticed by Pillow more often than by DALI.
"""

from __future__ import annotations

import io
import os
import sys
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from sra_fast.config import DataConfig
from sra_fast.data.crop import adm_crop
from sra_fast.errors import Refused

DALI_PACKAGE = f"nvidia-dali-cuda{'120' if (torch.version.cuda or '').startswith('12') else '130'}"


class Undecodable(Exception):
    """Raised for all undecodable files of a batch together: `reasons` maps their index in it to one line each."""

    def __init__(self, reasons: dict[int, str]) -> None:
        self.reasons = {index: " ".join(reason.split()) for index, reason in sorted(reasons.items())}
        super().__init__("; ".join(f"file {index} of the batch: {reason}" for index, reason in self.reasons.items()))


class Header(NamedTuple):
    """What a file's first bytes say, before decoding."""

    width: int
    height: int
    bits: int
    """Per channel."""


def read_header(file: bytes) -> Header:
    """Size of a JPEG or PNG, if the file reaches to the end of its image.

    Raises:
        ValueError: with the reason, if the file is empty, is of another kind, or is cut short.
    """
    if not file:
        raise ValueError("empty file")
    if file.startswith(b"\x89PNG\r\n\x1a\n"):
        if file[12:16] != b"IHDR" or file.rfind(b"IEND\xaeB`\x82") < 0:  # The last chunk: its name and its checksum.
            raise ValueError("PNG cut short")
        return Header(int.from_bytes(file[16:20], "big"), int.from_bytes(file[20:24], "big"), file[24])
    if file.startswith(b"\xff\xd8\xff"):
        return _read_jpeg_header(file)
    raise ValueError("neither JPEG nor PNG")


def _read_jpeg_header(file: bytes) -> Header:
    """Walk the segments (0xFF, kind, length, content) to the compressed data, after which 0xFF 0xD9 must come.

    Decoders fill a missing rest with grey, some without a word, hence this check. A search of the whole file would be
    fooled: embedded thumbnails have an end marker of their own.
    """
    header, at = None, 2
    while 0 <= at < len(file) - 9:
        kind = file[at + 1]
        if kind == 0xDA:  # start of scan
            if header is None or file.rfind(b"\xff\xd9", at) < 0:
                break
            return header
        if 0xC0 <= kind <= 0xCF and kind not in (0xC4, 0xC8, 0xCC):  # start of frame: length, bits, height, width
            header = Header(int.from_bytes(file[at + 7 : at + 9]), int.from_bytes(file[at + 5 : at + 7]), file[at + 4])
        # 0xFF may be repeated before a marker, and restart markers have no content.
        bare = kind == 0xFF or kind == 0x01 or 0xD0 <= kind <= 0xD8
        step = (1 if kind == 0xFF else 2) if bare else 2 + int.from_bytes(file[at + 2 : at + 4])
        at = file.find(b"\xff", at + step)
    raise ValueError("JPEG cut short")


def decode_with_pillow(file: bytes, data: DataConfig) -> np.ndarray:
    """Pixels (C, R, R) uint8 of a file in any colours: grey, palette, CMYK, 16 bits. Transparency is dropped.

    Raises:
        Exception: of nearly any kind, if the file is damaged.
    """
    image = Image.open(io.BytesIO(file), formats=("JPEG", "PNG"))
    if data.exif:
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16-bit grey, which `convert` would clip to white; 257 = 65535 / 255
        image = Image.fromarray(((np.asarray(image).astype(np.uint32) + 128) // 257).astype(np.uint8))
    colours = "L" if data.channels == 1 else "RGB"
    if image.mode not in ("L", "RGB"):
        image = image.convert("RGB")
    if image.mode != colours:
        image = image.convert(colours)
    return adm_crop(np.array(image).reshape(image.height, image.width, data.channels), data.resolution)


class Decoder(ABC):
    """Decodes batches of any size; threads that share one wait for each other."""

    name: str
    """"dali cpu", "dali gpu" or "pillow"."""
    note: str = ""
    """What else there is to say of it, in parentheses."""

    def __init__(self, data: DataConfig, device: torch.device) -> None:
        self.data, self.device = data, device
        self.threads = data.threads or min(8, os.cpu_count() or 1)
        self._on_host = device.type == "cpu"
        self._pool = ThreadPoolExecutor(self.threads, thread_name_prefix="decode")
        self._lock = threading.Lock()
        # On the device, because CUDA turns division by a host number into a multiplication, which rounds differently.
        self._scale = torch.tensor(127.5, device=device)

    def decode(self, files: list[bytes]) -> Tensor:
        """Pixels of the files, in their order.

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
                headers[index] = read_header(file)
            except ValueError as error:
                reasons[index] = str(error)
        with self._lock:
            reasons |= self._fill(pixels, files, headers)
        if reasons:
            raise Undecodable(reasons)
        return pixels if self._on_host else pixels.to(torch.float32).div_(self._scale).sub_(1.0)

    @abstractmethod
    def _fill(self, pixels: Tensor, files: list[bytes], headers: dict[int, Header]) -> dict[int, str]:
        """Decode the files whose index is in `headers` into pixels (B, C, R, R), float32 in [-1, 1] on the host, else
        uint8; return what failed, by index."""

    def _fill_rows(self, pixels: Tensor, indices: list[int], decode: Callable[[int], np.ndarray]) -> dict[int, str]:
        """pixels[indices[k]] = decode(k), which is (C, R, R) uint8; returns what failed, by index. By all threads: each
        takes every so-many-th, as handing over single ones takes longer than to decode small images."""
        host = pixels.numpy() if self._on_host else np.empty((len(indices), *pixels.shape[1:]), np.uint8)
        reasons: dict[int, str] = {}

        def share(first: int) -> None:
            for place in range(first, len(indices), self.threads):
                try:
                    decoded = decode(place)
                except Exception as error:  # Damaged files make Pillow raise nearly anything; the reason is reported.
                    reasons[indices[place]] = _explained(error)
                    continue
                if self._on_host:
                    row = host[indices[place]]
                    np.divide(decoded, 127.5, out=row, dtype=np.float32)
                    row -= 1
                else:
                    host[place] = decoded

        list(self._pool.map(share, range(min(self.threads, len(indices)))))
        if not self._on_host:
            _place(pixels, indices, torch.from_numpy(host))
        return reasons


class PillowDecoder(Decoder):
    """Decodes with Pillow on a pool of threads (it drops Python's lock while it works)."""

    name = "pillow"

    def __init__(self, data: DataConfig, device: torch.device) -> None:
        super().__init__(data, device)
        Image.preinit()  # Here once, rather than in every thread at the same time.

    def _fill(self, pixels: Tensor, files: list[bytes], headers: dict[int, Header]) -> dict[int, str]:
        indices = list(headers)
        return self._fill_rows(pixels, indices, lambda place: decode_with_pillow(files[indices[place]], self.data))


def _place(pixels: Tensor, indices: list[int], decoded: Tensor) -> None:
    """pixels[indices] = decoded, which itself starts a parallel loop and takes 60 times as long for small images."""
    pixels.index_copy_(0, torch.tensor(indices, dtype=torch.int64, device=pixels.device), decoded.to(pixels.device))


def _explained(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):  # Its own text is the address of a buffer.
        return "damaged header"
    return str(error) or type(error).__name__


def _refuse_trouble_of_the_device(error: RuntimeError) -> None:
    """Pass on what is not the file's fault."""
    if isinstance(error, torch.OutOfMemoryError):
        raise error
    # What is before that quotes the pipeline, with paths of this machine.
    text = (str(error).partition("encountered:")[2] or str(error)).lower()
    if "out of memory" in text or "bad_alloc" in text:
        raise Refused("data.reader: DALI needs more memory than there is; choose pillow, or smaller batches") from error
    if "cuda" in text and "nvjpeg" not in text and "nvimgcodec" not in text:
        raise error


class DaliDecoder(Decoder):
    """Decodes with DALI: on the CPU, or on the GPU if that is where the pixels go."""

    def __init__(self, data: DataConfig, device: torch.device) -> None:
        super().__init__(data, device)
        self.name = "dali gpu" if device.type == "cuda" else "dali cpu"
        self.note = f" (pillow where a side of {2 * data.resolution} or more is halved first)"
        self._pillow = PillowDecoder(data, device)
        self._pipelines: dict[bool, Any] = {}  # whether for one file: what runs it
        self._capacity = 0

    def _fill(self, pixels: Tensor, files: list[bytes], headers: dict[int, Header]) -> dict[int, str]:
        unlike = {i: h for i, h in headers.items() if h.bits != 8 or min(h.width, h.height) >= 2 * self.data.resolution}
        reasons = self._pillow._fill(pixels, files, unlike) if unlike else {}
        return reasons | self._fill_with_dali(pixels, files, [index for index in headers if index not in unlike])

    def _fill_with_dali(self, pixels: Tensor, files: list[bytes], indices: list[int]) -> dict[int, str]:
        if not indices:
            return {}
        if len(indices) > self._capacity:
            self._capacity = len(indices)
            self._pipelines.pop(False, None)
        try:
            decoded = self._run([files[index] for index in indices])
        except RuntimeError as error:
            _refuse_trouble_of_the_device(error)
        else:
            return self._take(decoded, pixels, indices)
        # One bad file fails a whole batch without being named, so each is decoded alone. (Asking Pillow instead would
        # make a verdict depend on a file's neighbours: the two differ on some damaged files.)
        reasons = {}
        for index in indices:
            try:
                decoded = self._run([files[index]], alone=True)
            except RuntimeError as error:
                _refuse_trouble_of_the_device(error)
                reasons[index] = self._explained(files[index], error)
            else:
                reasons |= self._take(decoded, pixels, [index])
        return reasons

    def _run(self, files: list[bytes], alone: bool = False):
        """What the pipeline makes of some files, or of one. After a failure DALI declares a pipeline dead."""
        if alone not in self._pipelines:
            self._pipelines[alone] = self._start(1 if alone else self._capacity)
        pipeline = self._pipelines.pop(alone)
        pipeline.feed_input("files", [np.frombuffer(file, np.uint8) for file in files])
        (decoded,) = pipeline.run()
        self._pipelines[alone] = pipeline
        return decoded

    def _explained(self, file: bytes, error: RuntimeError) -> str:
        """Pillow's reason for a file that DALI refuses, being the clearer one, if it has one."""
        try:
            decode_with_pillow(file, self.data)
        except Exception as pillow_error:
            return _explained(pillow_error)
        lines = (str(error).partition("encountered:")[2] or str(error)).splitlines()
        return "DALI: " + next((line.strip() for line in lines if line.strip()), type(error).__name__)

    def _take(self, decoded, pixels: Tensor, indices: list[int]) -> dict[int, str]:
        """pixels[indices] from what the pipeline returned: whole images on a CPU, resized and cut ones on a GPU. What
        failed, by index."""
        side = self.data.resolution
        if self._on_host:
            return self._fill_rows(pixels, indices, lambda place: adm_crop(np.asarray(decoded[place]), side))
        from nvidia.dali.plugin.pytorch import feed_ndarray

        cut = torch.empty((len(indices), *pixels.shape[1:]), dtype=torch.uint8, device=self.device)
        stream = torch.cuda.current_stream(self.device)
        feed_ndarray(decoded.as_tensor(), cut, cuda_stream=stream)
        stream.synchronize()  # the pipeline's next run writes where `decoded` is
        _place(pixels, indices, cut)
        return {}

    def _start(self, capacity: int):
        try:
            return self._build(capacity)
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise Refused(f"data.reader: DALI cannot start ({reason}); choose pillow") from error

    def _build(self, capacity: int):
        from nvidia.dali import Pipeline, fn, types

        on_gpu, side = self.device.type == "cuda", self.data.resolution
        gpu = (torch.cuda.current_device() if self.device.index is None else self.device.index) if on_gpu else None
        # Depth 1: reading ahead is the stream's work, and a failed run then concerns exactly the batch just fed.
        pipeline = Pipeline(capacity, num_threads=self.threads, device_id=gpu, prefetch_queue_depth=1)
        with pipeline:
            image = fn.decoders.image(
                fn.external_source(name="files", dtype=types.UINT8, ndim=1),
                device="mixed" if on_gpu else "cpu",
                output_type=types.GRAY if self.data.channels == 1 else types.RGB,
                adjust_orientation=self.data.exif,
                # On a GPU: chroma interpolated, as Pillow does it (repeated, it is off by 2 levels), and no file for
                # the JPEG engine, to which DALI gives a share of each batch: pixels would depend on the place in it.
                jpeg_fancy_upsampling=True,
                hw_decoder_load=0.0,
            )
            if on_gpu:
                # Whole-pixel sizes and a crop that rounds down, as in the ADM crop: with DALI's defaults the mean
                # difference is 5.5 levels.
                image = fn.resize(
                    image, resize_shorter=side, interp_type=types.INTERP_CUBIC, antialias=True, subpixel_scale=False
                )
                image = fn.transpose(fn.crop(image, crop=(side, side), rounding="truncate"), perm=[2, 0, 1])
            pipeline.set_outputs(image)
        pipeline.build()
        return pipeline


def open_decoder(data: DataConfig, device: torch.device) -> Decoder:
    """The decoder that `data.reader` asks for, with output on `device`.

    auto takes DALI, or says in one line on stderr that it is not installed and takes Pillow.

    Raises:
        Refused: if data.reader is dali and DALI is not installed.
    """
    if data.reader == "pillow":
        return PillowDecoder(data, device)
    try:
        import nvidia.dali  # noqa: F401
    except ImportError as error:
        if data.reader == "dali":
            raise Refused(f"data.reader: 'dali' given; needs `pip install {DALI_PACKAGE}`, or choose pillow") from error
        cure = f"for faster decoding: pip install {DALI_PACKAGE}"
        print(f"data.reader: DALI is not installed, images are decoded with Pillow; {cure}", file=sys.stderr)
        return PillowDecoder(data, device)
    return DaliDecoder(data, device)
