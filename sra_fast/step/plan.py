"""Where each parameter, and each process's share of it, lies in the flat buffers of a run on several processes.

Parameters are in the order in which the backward pass completes their gradients, in buckets that are communicated as
one. Every process owns one slice of every bucket:

    bucket    | parameter | parameter | parameter | padding |
    slices    |   rank 0   |   rank 1   |   rank 2   | rank 3 |

A slice is a whole number of grains, and a bucket is padded with zeros to equal slices. The grains of a bucket, from its
beginning, do not depend on the number of processes, and neither do sums over them.

Pure Python: nothing here holds a tensor, so that the plan for any model and any number of processes can be looked at.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

LARGEST_GRAIN, SMALLEST_GRAIN = 1 << 12, 1 << 7
GRAINS = 256  # at least that many in a model, if they are not the smallest
ALIGNMENT = 128  # elements, of parameters: 256 bytes of bf16. Compiled code copies what is aligned less.
BUCKET = 1 << 25  # elements: 64 MB of bf16, two blocks of SiT-XL; smaller ones are bound by latency


class Parameter(NamedTuple):
    """A trained parameter."""

    name: str
    size: int  # elements
    in_teacher: bool = False


class Piece(NamedTuple):
    """The part of a parameter that lies in a slice. `start` and `stop` are elements of the parameter, `offset` is that
    of `start` in its bucket."""

    name: str
    bucket: int
    offset: int
    start: int
    stop: int

    @property
    def size(self) -> int:
        """Elements."""
        return self.stop - self.start

    def of(self, buffers: Sequence[Any]) -> Any:
        """The piece's elements of flat buffers, one for each bucket; of tensors, a view."""
        return buffers[self.bucket][self.offset : self.offset + self.size]


@dataclass(frozen=True)
class Bucket:
    """Parameters one after the other, each aligned; all of them have a copy in the teacher, or none."""

    parameters: tuple[Parameter, ...]
    slice_size: int  # elements of each process's slice
    ranks: int

    @property
    def in_teacher(self) -> bool:
        return self.parameters[0].in_teacher

    @property
    def filled(self) -> int:
        """Elements without the padding at the end."""
        return _end(self.parameters)

    @property
    def size(self) -> int:
        """Elements with the padding."""
        return self.slice_size * self.ranks

    def offsets(self) -> Iterator[tuple[Parameter, int]]:
        """(parameter, its first element in the bucket)."""
        offset = 0
        for parameter in self.parameters:
            yield parameter, offset
            offset += _aligned(parameter.size)


@dataclass(frozen=True)
class Plan:
    """Buckets of all trained parameters."""

    buckets: tuple[Bucket, ...]
    grain: int
    ranks: int

    @classmethod
    def create(cls, parameters: Sequence[Parameter], ranks: int, bucket: int = BUCKET) -> Plan:
        """The plan of these parameters.

        Args:
            parameters: in the order in which their gradients are complete.
            ranks: number of processes.
            bucket: a bucket is complete when it has this many elements, or when the next parameter has a copy in the
                teacher and this one has none, or the other way round.
        """
        grain = LARGEST_GRAIN
        total = sum(parameter.size for parameter in parameters)
        while grain > SMALLEST_GRAIN and grain * GRAINS > total:
            grain //= 2
        groups: list[list[Parameter]] = []
        for parameter in parameters:
            full = groups and sum(other.size for other in groups[-1]) >= bucket
            if not groups or full or groups[-1][0].in_teacher != parameter.in_teacher:
                groups.append([])
            groups[-1].append(parameter)
        buckets = []
        for group in groups:
            grains = -(-_end(group) // grain)
            buckets.append(Bucket(tuple(group), -(-grains // ranks) * grain, ranks))
        return cls(tuple(buckets), grain, ranks)

    def pieces(self, rank: int) -> list[Piece]:
        """What lies in the slices of one process."""
        pieces = []
        for number, bucket in enumerate(self.buckets):
            first, last = rank * bucket.slice_size, (rank + 1) * bucket.slice_size
            for parameter, offset in bucket.offsets():
                start, stop = max(first, offset), min(last, offset + parameter.size)
                if start < stop:
                    pieces.append(Piece(parameter.name, number, start, start - offset, stop - offset))
        return pieces

    def whole(self) -> list[Piece]:
        """All parameters, each as one piece."""
        return [
            Piece(parameter.name, number, offset, 0, parameter.size)
            for number, bucket in enumerate(self.buckets)
            for parameter, offset in bucket.offsets()
        ]

    def grains(self) -> list[int]:
        """Number of grains of each bucket that hold parameters."""
        return [-(-bucket.filled // self.grain) for bucket in self.buckets]


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _end(parameters: Sequence[Parameter]) -> int:
    """Where the last of these parameters ends in a bucket that begins with the first."""
    return sum(_aligned(parameter.size) for parameter in parameters[:-1]) + parameters[-1].size


def backward_order(names: Sequence[str], student_tap: int) -> list[str]:
    """The parameters' names in the order in which the backward pass completes their gradients.

    Args:
        names: in memory (model/layout.py).
        student_tap: block whose output goes through the projection head.
    """

    def key(name: str) -> float:
        if match := re.match(r"blocks\.(\d+)\.", name):
            return -int(match[1])
        if name.startswith("ap_head."):
            return -(student_tap - 0.5)  # after the block that follows the tap, which has the number student_tap
        return -float("inf") if name.startswith("final_layer.") else 1.0

    return sorted(names, key=key)
