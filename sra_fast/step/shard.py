"""A process's share of the state of training, and the complete networks that all processes compute with.

Weights, EMA and moments are cut into the slices of a plan (plan.py): an update changes the pieces of parameters in the
slices of this process, and writes their copies into its slices of flat buffers. `gather` fetches the other slices, and
the parameters of student and teacher are views of these buffers.

Source: Rajbhandari et al., "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models", 2020, stage 2.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sra_fast.distributed import World
from sra_fast.model.transformer import Transformer
from sra_fast.step.plan import Piece, Plan

if TYPE_CHECKING:
    from torch.distributed import Work


class Shard:
    """The slices of one process.

    Args:
        plan: of all processes.
        world: the processes.
        shapes: of the trained parameters, by name.
        names: of all parameters, in their order.
        dtype, device: of the networks' copies.
    """

    def __init__(
        self,
        plan: Plan,
        world: World,
        shapes: Mapping[str, torch.Size],
        names: Iterable[str],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.plan, self.world, self.shapes, self._names = plan, world, shapes, list(names)
        self._works: dict[int, Work] = {}  # of `gather`, by the address of what they fill
        self.pieces: dict[str, Piece] = {piece.name: piece for piece in plan.pieces(world.rank)}
        """Of this process, by the parameters' names; a parameter has one piece at most in a slice."""
        self.student = [torch.zeros(bucket.size, dtype=dtype, device=device) for bucket in plan.buckets]
        self.teacher = [
            torch.zeros(bucket.size if bucket.in_teacher else 0, dtype=dtype, device=device) for bucket in plan.buckets
        ]

    def cut(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """This process's pieces of complete tensors, flat and copied; tensors that are not trained are whole."""
        pieces = {
            name: tensors[name].flatten()[piece.start : piece.stop].clone()
            for name, piece in self.pieces.items()
            if name in tensors
        }
        return pieces | {name: tensors[name] for name in tensors if name not in self.shapes}

    def attach(self, network: Transformer, copies: list[Tensor]) -> None:
        """Make the network's trained parameters views of the copies, without changing their values; before it uses
        them, it waits for what `gather` has begun to fetch."""
        parameters = dict(network.named_parameters())
        for piece in self.plan.whole():
            if (parameter := parameters.get(piece.name)) is not None:
                view = piece.of(copies).view(self.shapes[piece.name])
                view.copy_(parameter.detach())
                parameter.data = view
        buckets: dict[str, set[int]] = {}
        for piece in self.plan.whole():
            buckets.setdefault(_module(piece.name), set()).add(piece.bucket)

        def wait(module: str) -> None:
            for bucket in buckets.get(module, ()):
                self._wait(copies[bucket])

        network.before = wait

    def publish(self, weights: Mapping[str, Tensor], ema: Mapping[str, Tensor]) -> None:
        """Copy this process's pieces of weights and EMA to student and teacher on all processes. A collective."""
        for copies, pieces in ((self.student, weights), (self.teacher, ema)):
            for name, piece in self.pieces.items():
                if (copy := piece.of(copies)).numel():
                    copy.copy_(pieces[name])
        self.gather()
        self.wait()

    @torch.no_grad()
    def gather(self) -> None:
        """Begin to fetch the slices of the other processes, of both networks, in the order of their forward passes."""
        for copy in (*reversed(self.student), *reversed(self.teacher)):
            if copy.numel() and (work := self.world.all_gather(copy)) is not None:
                self._works[copy.data_ptr()] = work

    def wait(self) -> None:
        """Wait until both networks are complete."""
        for copy in (*self.student, *self.teacher):
            self._wait(copy)

    def _wait(self, copy: Tensor) -> None:
        if work := self._works.pop(copy.data_ptr(), None):
            work.wait()

    def whole(self, pieces: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The complete tensors of which every process has its pieces, and what is not trained, on every process. A
        collective."""
        result: dict[str, Tensor] = {name: tensor for name, tensor in pieces.items() if name not in self.shapes}
        like = self.student[0]
        for number, bucket in enumerate(self.plan.buckets):
            flat = torch.zeros(bucket.size, device=like.device)
            for piece in self.pieces.values():
                if piece.bucket == number:
                    flat[piece.offset : piece.offset + piece.size] = pieces[piece.name]
            if (work := self.world.all_gather(flat)) is not None:
                work.wait()
            for parameter, offset in bucket.offsets():
                shape = self.shapes[parameter.name]
                result[parameter.name] = flat[offset : offset + parameter.size].view(shape)
        return {name: result[name] for name in self._names if name in result}


def _module(name: str) -> str:
    """The prefix by which `Transformer.before` names the module of a parameter."""
    parts = name.split(".")
    return ".".join(parts[: 2 if parts[0] == "blocks" else 1]) + "."
