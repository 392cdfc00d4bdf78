"""Batches of training images, decoded ahead of the trainer by one background thread.

Image number n is data row `order.rows(seed, n)`. If that file cannot be decoded, image n is the first decodable row
among

    below(word k of (seed, n, REPLACEMENT), N),  k = 0, 1, 2, ...

with its own label: a pure function of (seed, n), so a resumed run, or one with another batch size, sees the very same
images.
"""

from __future__ import annotations

import queue
import sys
import threading
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from sra_fast.config import Refused
from sra_fast.data.folder import ImageFolder
from sra_fast.data.images import Decoder, Undecodable
from sra_fast.data.order import rows
from sra_fast.kernels.philox import Draw, below, words

DEPTH = 2
"""Batches decoded ahead: one to hand over at once and one to even out slow files."""


class Batch(NamedTuple):
    """Consecutive images, on the decoder's device."""

    x: Tensor
    """(B, C, R, R) float32 in [-1, 1]."""
    labels: Tensor
    """(B,) int64."""
    number: Tensor
    """(B,) int64, image numbers."""


class ImageStream:
    """Endless iterator over the batches that begin at image first_image, first_image + batch, ...

    Close it, or use it as a context manager: a thread reads on in the background until then.

    Args:
        folder: the data set.
        decoder: where batches come from, and the device they come to.
        seed: the run's 64-bit seed.
        batch: images per batch.
        first_image: image number of the first image.
        strict: stop at the first undecodable file.
        max_bad_share: stop when more than this share of the files has turned out undecodable.
        bad: files already known to be undecodable, and why.

    Raises:
        Refused: by `next`, in the two cases above, naming the file. Any other exception of the thread is raised there
        too.
    """

    def __init__(
        self,
        folder: ImageFolder,
        decoder: Decoder,
        *,
        seed: int,
        batch: int,
        first_image: int,
        strict: bool = False,
        max_bad_share: float = 0.01,
        bad: Mapping[str, str] | None = None,
    ) -> None:
        self.bad = dict(bad or {})
        """Undecodable files met so far, by the thread that reads ahead, and why."""
        self.replaced = 0
        """Images in the batches handed out so far that stand in for undecodable ones."""
        self._folder, self._decoder = folder, decoder
        self._seed, self._batch, self._first = seed, batch, first_image
        self._strict, self._max_bad_share = strict, max_bad_share
        self._ready: queue.Queue[tuple[Batch, int] | BaseException] = queue.Queue(DEPTH)
        self._closed = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._read_ahead, name="image stream", daemon=True)
        self._thread.start()

    def __iter__(self) -> ImageStream:
        return self

    def __next__(self) -> Batch:
        if self._closed.is_set():
            raise RuntimeError("the image stream is closed")
        item = self._error or self._ready.get()
        if isinstance(item, BaseException):
            self._error = item  # The thread has ended: raise the same again rather than wait for ever.
            raise item
        batch, replaced = item
        self.replaced += replaced
        return batch

    def close(self) -> None:
        """Stop the thread, once it has finished the batch in hand."""
        self._closed.set()
        # Makes room for a thread that waits to hand over; it then sees that it is to end.
        while not self._ready.empty():
            self._ready.get()
        self._thread.join()

    def __enter__(self) -> ImageStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read_ahead(self) -> None:
        first, stream = self._first, None
        try:
            if self._decoder.device.type == "cuda":  # or every batch would wait in line behind the step
                stream = torch.cuda.Stream(self._decoder.device)
            while not self._closed.is_set():
                with torch.cuda.stream(stream):
                    ready = self._decode(first)
                if stream:  # what is handed over is there, for any stream to read
                    stream.synchronize()
                self._ready.put(ready)
                first += self._batch
        except BaseException as error:
            self._ready.put(error)

    def _decode(self, first: int) -> tuple[Batch, int]:
        """The batch that begins at image number `first`, and how many of its images are replacements."""
        numbers = range(first, first + self._batch)
        chosen = rows(self._seed, first, self._batch, len(self._folder)).tolist()
        attempts = [0] * self._batch
        while True:
            for index, number in enumerate(numbers):
                while self._folder.files[chosen[index]] in self.bad:
                    chosen[index] = self._replacement(number, attempts[index])
                    attempts[index] += 1
            try:
                x = _decode_rows(self._folder, self._decoder, chosen)
                break
            except Undecodable as error:
                for index, reason in error.reasons.items():
                    self._note(self._folder.files[chosen[index]], reason, numbers[index])
        labels = torch.from_numpy(self._folder.labels[chosen]).to(x.device)
        number = torch.arange(first, first + self._batch, device=x.device)
        return Batch(x, labels, number), sum(attempt > 0 for attempt in attempts)

    def _replacement(self, number: int, attempt: int) -> int:
        word = words(self._seed, torch.tensor([number]), Draw.REPLACEMENT, attempt + 1)[0, attempt]
        return int(below(word, len(self._folder)))

    def _note(self, file: str, reason: str, number: int) -> None:
        """Remember and announce an undecodable file; refuse to go on if it is one too many."""
        if file in self.bad:
            return
        self.bad[file] = reason
        if self._strict:
            raise Refused(f"data.images: {file}: undecodable ({reason}); data.strict allows none")
        _announce(f"{file}: undecodable ({reason}); image {number} is replaced")
        size = len(self._folder)
        if len(self.bad) > self._max_bad_share * size or len(self.bad) == size:
            raise Refused(
                f"data.images: {len(self.bad)} of {size} files are undecodable, the first {next(iter(self.bad))}; "
                f"at most data.max-bad-share = {self._max_bad_share:g} of them is allowed"
            )


def load(folder: ImageFolder, decoder: Decoder, batch: int = 256) -> tuple[Tensor, Tensor]:
    """A whole folder in the order of its files, without those that cannot be decoded, which are announced on stderr.

    Returns:
        x (N, C, R, R) float32 in [-1, 1] and labels (N,) int64, on the decoder's device.

    Raises:
        Refused: if no file can be decoded.
    """
    parts, kept = [], []
    for first in range(0, len(folder), batch):
        chosen = list(range(first, min(first + batch, len(folder))))
        while chosen:
            try:
                parts.append(_decode_rows(folder, decoder, chosen))
                break
            except Undecodable as error:
                for index, reason in error.reasons.items():
                    _announce(f"{folder.files[chosen[index]]}: undecodable ({reason}); left out")
                chosen = [row for index, row in enumerate(chosen) if index not in error.reasons]
        kept += chosen
    if not kept:
        raise Refused(f"data.images: {str(folder.root)!r} given; none of {len(folder)} files can be decoded")
    x = torch.cat(parts)
    return x, torch.from_numpy(folder.labels[kept]).to(x.device)


def _decode_rows(folder: ImageFolder, decoder: Decoder, chosen: list[int]) -> Tensor:
    """(B, C, R, R) of those rows; a file that has vanished or cannot be read counts as undecodable."""
    files, reasons = [], {}
    for index, row in enumerate(chosen):
        try:
            files.append(folder.read(row))
        except OSError as error:
            reasons[index] = error.strerror or str(error)
    if reasons:
        raise Undecodable(reasons)
    return decoder.decode(files)


def _announce(line: str) -> None:
    # One write, so that lines of other threads do not mix with it.
    sys.stderr.write(f"data.images: {line}\n")
