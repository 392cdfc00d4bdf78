"""Batches made ahead of the trainer by one background thread."""

from __future__ import annotations

import queue
import threading
from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor

DEPTH = 2
"""Batches made ahead: one to hand over at once and one to even out slow files."""


class Batch(NamedTuple):
    """Consecutive images of a run."""

    x: Tensor
    """(B, C, R, R) float32 in [-1, 1], or rows of a packed set as they are stored."""
    labels: Tensor
    """(B,) int64."""
    number: Tensor
    """(B,) int64, image numbers."""


class Stream(ABC):
    """Endless iterator over the batches that begin at image first_image, first_image + batch, ...

    Close it, or use it as a context manager: a thread reads on in the background until then.

    Args:
        batch: images per batch.
        first_image: image number of the first image.
        device: where the batches are made.

    Raises:
        Exception: by `next`, whatever the thread met with.
    """

    bad: dict[str, str]
    """Undecodable files met so far, by the thread that reads ahead, and why."""

    def __init__(self, batch: int, first_image: int, device: torch.device) -> None:
        self.replaced = 0
        """Images in the batches handed out so far that stand in for undecodable ones."""
        self._batch, self._first, self._device = batch, first_image, device
        self._ready: queue.Queue[tuple[Batch, int] | BaseException] = queue.Queue(DEPTH)
        self._closed = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._read_ahead, name="image stream", daemon=True)

    @abstractmethod
    def make(self, first: int) -> tuple[Batch, int]:
        """The batch that begins at image number `first`, and how many of its images are replacements."""

    def begin(self) -> None:
        """Start the thread: when everything that `make` needs is there."""
        self._thread.start()

    def __iter__(self) -> Stream:
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

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read_ahead(self) -> None:
        first, stream = self._first, None
        try:
            if self._device.type == "cuda":  # or every batch would wait in line behind the step
                stream = torch.cuda.Stream(self._device)
            while not self._closed.is_set():
                with torch.cuda.stream(stream):
                    ready = self.make(first)
                if stream:  # what is handed over is there, for any stream to read
                    stream.synchronize()
                self._ready.put(ready)
                first += self._batch
        except BaseException as error:  # of any kind: `next` raises it where somebody listens
            self._ready.put(error)
