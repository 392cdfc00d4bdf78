"""Batches of training images, read ahead of the trainer by a background thread."""

from __future__ import annotations

import itertools
from abc import abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
U = TypeVar("U")
DEPTH = 3
"""Items that are read ahead: one to hand over at once, one to even out slow files, and the one in progress."""


class Batch(NamedTuple):
    """Consecutive images of a run."""

    x: Tensor
    """(B, C, R, R) float32 in [-1, 1], or rows of a packed set as they are stored."""
    labels: Tensor
    """(B,) int64."""
    number: Tensor
    """(B,) int64, image numbers."""

    def split(self, parts: int) -> list[Batch]:
        """Equal micro-batches of consecutive images; B must be a multiple of `parts`."""
        size = len(self.x) // parts
        return [Batch(*tensors) for tensors in zip(*(tensor.split(size) for tensor in self), strict=True)]


class ReadAhead(Iterator[U], AbstractContextManager, Generic[T, U]):
    """Yields function(item) for each item, in order, computed by one background thread up to `DEPTH` items ahead.

    Args:
        stream: the CUDA stream that the function runs on, None on a CPU. On the default stream, reading would wait for
            the training step. Results are complete when they are yielded and can be used on any stream.

    Raises:
        BaseException: from `next`, whatever the function raised; the same again from every later call.
    """

    def __init__(self, function: Callable[[T], U], items: Iterable[T], stream: torch.cuda.Stream | None = None) -> None:
        self._function, self._items, self._stream = function, iter(items), stream
        self._pending: deque[Future[U]] = deque()
        self._error: BaseException | None = None
        self._pool = ThreadPoolExecutor(1, "read ahead")
        for _ in range(DEPTH):
            self._submit_next()

    def _submit_next(self) -> None:
        for item in itertools.islice(self._items, 1):
            self._pending.append(self._pool.submit(self._compute, item))

    def _compute(self, item: T) -> U:
        if self._error:  # of an earlier item, which ended the sequence
            raise self._error
        try:
            with torch.cuda.stream(self._stream):
                result = self._function(item)
            if self._stream:
                self._stream.synchronize()
        except BaseException as error:
            self._error = error
            raise
        return result

    def __next__(self) -> U:
        if not self._pending:
            raise StopIteration
        try:
            return self._pending.popleft().result()
        finally:
            self._submit_next()

    def close(self) -> None:
        """Stop the thread after the item in progress. A closed iterator is exhausted."""
        self._pool.shutdown(cancel_futures=True)
        self._pending.clear()

    def __exit__(self, *_: object) -> None:
        self.close()


class Stream(Iterator[Batch], AbstractContextManager):
    """Endless iterator over the batches that start at image number first_image, first_image + every, ...

    A subclass calls `__init__` last, because reading starts at once. Close the stream, or use it as a context manager.

    Args:
        batch: images per batch.
        first_image: image number of the first image.
        device: where the batches are created.
        every: images between the first ones of two batches, if other processes read what lies between; 0 = `batch`.

    Raises:
        BaseException: from `next`, whatever `read_batch` raised in the background.
    """

    bad: dict[str, str]
    """Undecodable files met so far by the background thread, and the reasons."""
    replaced: int
    """Images in the batches handed out so far that replace undecodable ones."""

    def __init__(self, batch: int, first_image: int, device: torch.device, every: int = 0) -> None:
        self.replaced = 0
        stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._batches = ReadAhead(self.read_batch, itertools.count(first_image, every or batch), stream)

    @abstractmethod
    def read_batch(self, first: int) -> tuple[Batch, int]:
        """The batch that starts at image number `first`, and how many of its images are replacements."""

    def __next__(self) -> Batch:
        batch, replaced = next(self._batches)
        self.replaced += replaced
        return batch

    def close(self) -> None:
        """Stop reading, after the batch in progress."""
        self._batches.close()

    def __exit__(self, *_: object) -> None:
        self.close()
