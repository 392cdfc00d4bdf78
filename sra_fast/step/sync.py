"""What processes do with the gradients of one step, so that all of them make the same update.

Every process computes some micro-batches. Their gradients go into flat buffers, one for each bucket of the plan
(plan.py), whose sums over all processes are then

    fast        computed by the collectives of NCCL or gloo. The order of additions depends on the number of processes.
    ordered     computed in fp32 in the fixed tree of tree.py, by the process that owns the slice: the bits depend on
                the micro-batches alone, not on which process has computed them.

Afterwards a process has the sums of its own slices if the state is sharded (shard.py), otherwise all of them. The norm
is the sum of squares over grains, each computed by the process that owns it, added in one order everywhere.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from sra_fast.distributed import World
from sra_fast.kernels import library
from sra_fast.kernels.gradient_norm import square_sums, square_sums_ref
from sra_fast.step import tree
from sra_fast.step.plan import Piece, Plan
from sra_fast.step.tree import Node, Sums

MicroBatch = tuple[Sequence[Tensor], Tensor]  # gradients, losses


class Reduced(NamedTuple):
    """Sums over all micro-batches of a step."""

    gradients: list[Tensor]  # of the pieces that this process updates, in their order
    losses: Tensor  # (3,) float32
    norm: Tensor  # () float32, of the whole gradient


class Synchronisation:
    """Sums the gradients of all processes.

    Args:
        plan: of the parameters.
        world: the processes.
        names: of the parameters, in the order of the gradients.
        pieces: what this process updates.
        shapes: of their weights.
        dtype: of the gradients that are communicated, if the reduction is fast; otherwise of the networks.
        ordered: whether sums are in one fixed tree.
        micro_batches: that every process computes.
        is_sharded: whether the pieces are those of this process's slices, rather than whole parameters.
        device: of the gradients.
    """

    def __init__(
        self,
        plan: Plan,
        world: World,
        names: Sequence[str],
        pieces: Sequence[Piece],
        shapes: Sequence[torch.Size],
        dtype: torch.dtype,
        ordered: bool,
        micro_batches: int,
        is_sharded: bool,
        device: torch.device,
    ) -> None:
        self._plan, self._world, self._device = plan, world, device
        self._ordered, self._count = ordered, micro_batches
        self._dtype = torch.float32 if ordered else dtype
        # A single micro-batch is sent as it is, which loses nothing.
        self._sent = dtype if micro_batches == 1 else torch.float32
        self._pieces, self._is_sharded = list(zip(pieces, shapes, strict=True)), is_sharded
        whole = {piece.name: piece for piece in plan.whole()}
        self._places = [whole[name] for name in names]
        self._square_sums = square_sums_ref if library.why_unavailable(device.type == "cuda") else square_sums
        self._grains = _order_of_grains(plan).to(device)
        self._buffers = self._new_buffers()
        # Of the backward pass in progress: the number of its micro-batch, and how many gradients each bucket lacks.
        self._micro_batch: int | None = None
        self._missing: list[int] = []
        self._works: list[object] = []

    def watch(self, parameters: Sequence[Tensor]) -> None:
        """Take the gradients of these parameters, in the order of `names`, out of the backward pass: the sum of a
        bucket, if it is fast, then begins when its last gradient is complete, while others are still being computed."""
        for parameter, place in zip(parameters, self._places, strict=True):
            parameter.register_hook(partial(self._take, place))

    def reduce(self, micro_batches: Iterable[MicroBatch]) -> Reduced:
        """Sum the micro-batches of all processes. A collective.

        Args:
            micro_batches: of this process, in their order. The shares of the whole step: they add up.
        """
        buffers, losses = (self._sum_in_order if self._ordered else self._sum_fast)(micro_batches)
        norm = self._norm(buffers)
        if self._ordered and not self._is_sharded:  # so far, only the own slices are sums
            _wait(self._world.all_gather(buffer) for buffer in buffers)
        return Reduced([piece.of(buffers).view(shape) for piece, shape in self._pieces], losses, norm)

    def _sum_fast(self, micro_batches: Iterable[MicroBatch]) -> tuple[list[Tensor], Tensor]:
        losses, parts = torch.zeros(3, device=self._device), iter(micro_batches)
        for number in range(self._count):
            self._micro_batch = number
            self._missing = [len(bucket.parameters) for bucket in self._plan.buckets]
            _, more_losses = next(parts)  # `_take` has the gradients
            losses = losses + more_losses
        self._micro_batch = None
        works, self._works = self._works, []
        _wait([*works, self._world.all_reduce(losses)])
        return self._buffers, losses

    def _take(self, place: Piece, gradient: Tensor) -> None:
        """Add a gradient to its bucket, and begin the sum over all processes if it was the last one."""
        if self._micro_batch is None:
            return
        view = place.of(self._buffers).view(gradient.shape)
        if self._micro_batch:
            view.add_(gradient)
        else:
            view.copy_(gradient)
        self._missing[place.bucket] -= 1
        if not self._missing[place.bucket] and self._micro_batch == self._count - 1:
            collective = self._world.reduce_scatter if self._is_sharded else self._world.all_reduce
            self._works.append(collective(self._buffers[place.bucket]))

    def _sum_in_order(self, micro_batches: Iterable[MicroBatch]) -> tuple[list[Tensor], Tensor]:
        """Buffers in which the own slices are sums over all processes."""
        sums: Sums[list[Tensor]] = Sums()
        first = self._world.rank * self._count
        for number, (gradients, losses) in enumerate(micro_batches, start=first):
            buffers = self._buffers if number == first else self._new_buffers()
            self._fill(buffers, gradients)
            sums.push(Node(0, number), [*buffers, losses.clone()], _add)
        if self._world.size == 1:
            *buffers, losses = sums.total(_add)
            return buffers, losses
        nodes = [tree.nodes(rank * self._count, self._count) for rank in range(self._world.size)]
        losses = self._exchange_losses(nodes, torch.stack([value[-1] for _, value in sums]))
        result = sums[0][1][:-1]
        for number, bucket in enumerate(self._plan.buckets):
            own = [value[number].view(self._world.size, -1) for _, value in sums]  # by the process that adds them
            received = self._exchange(nodes, torch.stack(own, dim=1).flatten(), bucket.slice_size)
            total = tree.total(zip((node for part in nodes for node in part), received, strict=True), torch.add)
            self._world.slice_of(result[number]).copy_(total)
        return result, losses

    def _exchange(self, nodes: Sequence[Sequence[Node]], own: Tensor, size: int) -> list[Tensor]:
        """The own slice of the nodes of all processes, by rank.

        Args:
            own: (slices, nodes, size) flat: this process's nodes.
        """
        counts = [len(part) * size for part in nodes]
        own = own.to(self._sent)
        output = own.new_empty(sum(counts))
        _wait([self._world.all_to_all(output, own, counts, [counts[self._world.rank]] * self._world.size)])
        return list(output.float().view(-1, size))

    def _exchange_losses(self, nodes: Sequence[Sequence[Node]], own: Tensor) -> Tensor:
        """The sum (3,) of all losses, from this process's nodes (N, 3)."""
        gathered = torch.zeros(self._world.size, max(map(len, nodes)), 3, device=own.device)
        gathered[self._world.rank, : len(own)] = own
        _wait([self._world.all_gather(gathered.view(-1))])
        parts = [(node, gathered[rank, i]) for rank, part in enumerate(nodes) for i, node in enumerate(part)]
        return tree.total(parts, torch.add)

    def _norm(self, buffers: Sequence[Tensor]) -> Tensor:
        """The norm of the whole gradient, of which this process has its own slices."""
        sums = self._square_sums([self._world.slice_of(buffer) for buffer in buffers], self._plan.grain)
        gathered = sums.new_empty(self._world.size * len(sums))
        self._world.slice_of(gathered).copy_(sums)
        _wait([self._world.all_gather(gathered)])
        return gathered[self._grains].sum().sqrt().float()

    def _fill(self, buffers: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
        """Copy the gradients into flat buffers."""
        pairs = zip(self._places, gradients, strict=True)
        views = [place.of(buffers).view(gradient.shape) for place, gradient in pairs]
        torch._foreach_copy_(views, list(gradients))

    def _new_buffers(self) -> list[Tensor]:
        """Zeros, because what lies between the parameters must not count for the norm."""
        return [torch.zeros(bucket.size, dtype=self._dtype, device=self._device) for bucket in self._plan.buckets]


def _order_of_grains(plan: Plan) -> Tensor:
    """Positions of the sums over grains among those of all processes, (ranks, grains of all own slices) flat, in the
    order of the buckets and without the grains that are padding: (N,) int64, N the same for any number of processes."""
    per_slice = [bucket.slice_size // plan.grain for bucket in plan.buckets]
    positions = torch.arange(plan.ranks * sum(per_slice)).view(plan.ranks, -1).split(per_slice, dim=1)
    return torch.cat([part.flatten()[:count] for part, count in zip(positions, plan.grains(), strict=True)])


def _add(first: list[Tensor], second: list[Tensor]) -> list[Tensor]:
    torch._foreach_add_(first, second)
    return first


def _wait(works: Iterable[object]) -> None:
    for work in list(works):
        if work is not None:
            work.wait()  # pyright: ignore[reportAttributeAccessIssue]: a handle of torch.distributed
