"""Batches of training images, decoded ahead of the trainer.

Image number n is data row `order.rows(seed, n)`. If that file cannot be decoded, image n is the first decodable row
among

    below(word k of (seed, n, REPLACEMENT), N),  k = 0, 1, 2, ...

with its own label: a pure function of (seed, n), so a resumed run, or one with another batch size, sees the very same
images.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping

import torch
from torch import Tensor

from sra_fast.data.decoders import Decoder, Undecodable
from sra_fast.data.folder import ImageFolder
from sra_fast.data.order import rows
from sra_fast.data.stream import Batch, Stream
from sra_fast.errors import Refused
from sra_fast.kernels.philox import Draw, below, words


class ImageStream(Stream):
    """Batches of decoded images, on the decoder's device; see `Stream`.

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
        super().__init__(batch, first_image, decoder.device)
        self.bad = dict(bad or {})
        self._folder, self._decoder, self._seed = folder, decoder, seed
        self._strict, self._max_bad_share = strict, max_bad_share
        self.begin()

    def make(self, first: int) -> tuple[Batch, int]:
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
