"""Sums over numbered micro-batches in one fixed tree, the same for any number of processes.

A node is the sum of 2^level consecutive micro-batches that begin at a multiple of 2^level. Two siblings are added to
their parent; what has no sibling in the end, if the number of micro-batches is no power of two, is added from the left
to the right. Whether one process adds all micro-batches, or several add theirs and then each other's, every addition
has the same operands, and the sum the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple, TypeVar

T = TypeVar("T")
Add = Callable[[T, T], T]


class Node(NamedTuple):
    """Micro-batches index * 2^level up to (index + 1) * 2^level - 1."""

    level: int
    index: int


class Sums(list[tuple[Node, T]]):
    """Nodes from left to right, none of which are siblings."""

    def push(self, node: Node, value: T, add: Add[T]) -> None:
        """Append a node, and add siblings up to their common ancestors.

        Args:
            value: the node's sum; it belongs to this object from now on.
            add: the sum of two values; it may change the first one.
        """
        self.append((node, value))
        while len(self) > 1 and self[-2][0].level == self[-1][0].level and self[-2][0].index ^ 1 == self[-1][0].index:
            (left, first), (_, second) = self[-2:]
            self[-2:] = [(Node(left.level + 1, left.index // 2), add(first, second))]

    def total(self, add: Add[T]) -> T:
        """The sum over all nodes, from left to right."""
        (_, value), *others = self
        for _, other in others:
            value = add(value, other)
        return value


def nodes(first: int, count: int) -> list[Node]:
    """The nodes that remain of micro-batches first, ..., first + count - 1."""
    sums: Sums[None] = Sums()
    for number in range(first, first + count):
        sums.push(Node(0, number), None, lambda *_: None)
    return [node for node, _ in sums]


def total(parts: Iterable[tuple[Node, T]], add: Add[T]) -> T:
    """The sum over nodes that are given from left to right."""
    sums: Sums[T] = Sums()
    for node, value in parts:
        sums.push(node, value, add)
    return sums.total(add)
