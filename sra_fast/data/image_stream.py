"""Batches of training images, decoded ahead of the trainer.

Image number n is data row `order.rows(seed, n)`. If that file cannot be decoded, image n is the first decodable row
among

    below(word k of (seed, n, REPLACEMENT), N),  k = 0, 1, 2, ...

with that row's label. This is a pure function of (seed, n): a resumed run, or one with another batch size, sees the
same images.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from sra_fast.data.decoders import Decoder, Undecodable
from sra_fast.data.folder import ImageFolder
from sra_fast.data.order import rows
from sra_fast.data.stream import Batch, Stream
from sra_fast.errors import Damaged
from sra_fast.files import is_of_one_file
from sra_fast.kernels.philox import Draw, below, words
from sra_fast.progress import warn


class ImageStream(Stream):
    """Batches of decoded images, on the decoder's device; see `Stream`.

    Args:
        folder: the data set.
        decoder: decodes the batches, onto its device.
        seed: the run's 64-bit seed.
        batch: images per batch.
        first_image: image number of the first image.
        every: see `Stream`.
        strict: stop at the first undecodable file.
        max_bad_share: stop when more than this share of the files has turned out undecodable.
        bad: files already known to be undecodable, and why.

    Raises:
        Damaged: from `next`, with `strict` or above `max_bad_share`, naming the file.
    """

    def __init__(
        self,
        folder: ImageFolder,
        decoder: Decoder,
        *,
        seed: int,
        batch: int,
        first_image: int,
        every: int = 0,
        strict: bool = False,
        max_bad_share: float = 0.01,
        bad: Mapping[str, str] | None = None,
    ) -> None:
        self.bad = dict(bad or {})
        self._folder, self._decoder, self._seed, self._batch = folder, decoder, seed, batch
        self._strict, self._max_bad_share = strict, max_bad_share
        super().__init__(batch, first_image, decoder.device, every)

    def read_batch(self, first: int) -> tuple[Batch, int]:
        numbers = range(first, first + self._batch)
        chosen = rows(self._seed, first, self._batch, len(self._folder)).tolist()
        attempts = [0] * self._batch
        while True:
            for index, number in enumerate(numbers):
                while self._folder.files[chosen[index]] in self.bad:
                    chosen[index] = self._replacement(number, attempts[index])
                    attempts[index] += 1
            try:
                x = self._decode(chosen)
                break
            except Undecodable as error:
                for index, reason in error.reasons.items():
                    self._add_bad(self._folder.files[chosen[index]], reason, numbers[index])
        labels = torch.from_numpy(self._folder.labels[chosen]).to(x.device)
        number = torch.arange(first, first + self._batch, device=x.device)
        return Batch(x, labels, number), sum(attempt > 0 for attempt in attempts)

    def _replacement(self, number: int, attempt: int) -> int:
        word = words(self._seed, torch.tensor([number]), Draw.REPLACEMENT, attempt + 1)[0, attempt]
        return int(below(word, len(self._folder)))

    def _decode(self, chosen: list[int]) -> Tensor:
        """(B, C, R, R) of these rows. A file that has vanished or cannot be read counts as undecodable."""
        files, unreadable = _read(self._folder, chosen)
        if unreadable:
            raise Undecodable({index: unreadable[row] for index, row in enumerate(chosen) if row in unreadable})
        return self._decoder.decode([files[row] for row in chosen])

    def _add_bad(self, file: str, reason: str, number: int) -> None:
        """Remember an undecodable file and report it. Raises Damaged if `strict` forbids it or there are too many."""
        if file in self.bad:
            return
        self.bad[file] = reason
        if self._strict:
            raise Damaged(self._folder.root / file, f"undecodable ({reason}); data.strict allows none")
        _announce(f"{file}: undecodable ({reason}); image {number} is replaced")
        size = len(self._folder)
        if len(self.bad) > self._max_bad_share * size or len(self.bad) == size:
            raise Damaged(
                self._folder.root,
                f"{len(self.bad)} of {size} files are undecodable, the first {next(iter(self.bad))}; "
                f"data.max-bad-share = {self._max_bad_share:g} allows no more",
            )


def load(folder: ImageFolder, decoder: Decoder, batch: int = 256) -> tuple[Tensor, Tensor]:
    """Load a whole folder in the order of its files. Undecodable files are left out and announced on stderr.

    Returns:
        x (N, C, R, R) float32 in [-1, 1] and labels (N,) int64, on the decoder's device.

    Raises:
        Damaged: if no file can be decoded.
    """
    parts, kept = [], []
    for first in range(0, len(folder), batch):
        files, unreadable = _read(folder, range(first, min(first + batch, len(folder))))
        decoded, x, undecodable = decoder.decode_readable(files)
        for row, reason in (unreadable | undecodable).items():
            _announce(f"{folder.files[row]}: undecodable ({reason}); left out")
        parts.append(x)
        kept += decoded
    if not kept:
        raise Damaged(folder.root, f"none of {len(folder)} files can be decoded")
    x = torch.cat(parts)
    return x, torch.from_numpy(folder.labels[kept]).to(x.device)


def _read(folder: ImageFolder, chosen: list[int] | range) -> tuple[dict[int, bytes], dict[int, str]]:
    """({row: undecoded file}, {row: why it cannot be read}). Raises Damaged if not even others could be read."""
    files, unreadable = {}, {}
    for row in chosen:
        try:
            files[row] = folder.read(row)
        except OSError as error:
            reason, path = error.strerror or str(error), folder.path(row)
            if not is_of_one_file(error, path):
                raise Damaged(path, f"cannot be read ({reason})") from error
            unreadable[row] = reason
    return files, unreadable


def _announce(line: str) -> None:
    warn(f"data.images: {line}")
