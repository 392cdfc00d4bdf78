"""The inputs of a step in fixed buffers, and the next step's inputs on their way to them."""

from __future__ import annotations

import torch
from torch import Tensor

from sra_fast.data.stream import Batch

ALIGNMENT = 256  # bytes, of x as of a tensor of its own: compiled code reads vectors, and copies what is not aligned


class Inputs:
    """One step's inputs side by side in one run of bytes, so that one copy moves them all.

    Args:
        shape: (B, C, H, W) of a batch's x.
        device: where the bytes are.
        pinned: host memory that a device can copy from by itself.
        dtype: of x.
    """

    def __init__(
        self,
        shape: tuple[int, int, int, int],
        device: torch.device,
        pinned: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        batch, values = shape[0], torch.Size(shape).numel()
        head = [8 * batch, 8 * batch, 4, 4]
        room = -sum(head) % ALIGNMENT
        sizes = [*head, room, values * dtype.itemsize]
        self.bytes = torch.zeros(sum(sizes), dtype=torch.uint8, device=device, pin_memory=pinned)
        labels, number, lr, weight, _, x = self.bytes.split(sizes)
        self.labels, self.number = labels.view(torch.int64), number.view(torch.int64)  # (B,)
        self.lr, self.weight = lr.view(torch.float32)[0], weight.view(torch.float32)[0]  # ()
        self.x = x.view(dtype).view(shape)
        self.head = self.bytes[: sum(head)]  # all but x

    def fill(self, batch: Batch, lr: float, weight: float) -> None:
        """Take over a batch from any device, the learning rate and the alignment weight."""
        self.x.copy_(batch.x, non_blocking=True)
        self.fill_head(batch, lr, weight)

    def fill_head(self, batch: Batch, lr: float, weight: float) -> None:
        """The same of all but x."""
        self.labels.copy_(batch.labels, non_blocking=True)
        self.number.copy_(batch.number, non_blocking=True)
        self.lr.fill_(lr)
        self.weight.fill_(weight)


class Prefetch:
    """Moves inputs to one fixed place on a CUDA device; the long way there is travelled while the step before runs.

        batch -> pinned memory -> device, on a stream of its own -> the fixed place, when the step before has read it

    Two lanes take turns. The host waits only if it is more than two steps ahead of the device.

    Args:
        shape, dtype: of a batch's x, (B, C, H, W).
        device: a CUDA device.
    """

    def __init__(
        self, shape: tuple[int, int, int, int], device: torch.device, dtype: torch.dtype = torch.float32
    ) -> None:
        self.fixed = Inputs(shape, device, dtype=dtype)
        self._lanes = [_Lane(shape, device, dtype) for _ in range(2)]
        self._stream = torch.cuda.Stream(device)

    def __call__(self, batch: Batch, lr: float, weight: float) -> None:
        """Put a batch into the fixed place, in order with the current stream."""
        lane = self._lanes.pop(0)
        self._lanes.append(lane)
        lane.free.synchronize()
        with torch.cuda.stream(self._stream):
            if batch.x.is_cuda:
                lane.there.fill(batch, lr, weight)
            elif batch.x.is_pinned():  # no detour for x
                lane.here.fill_head(batch, lr, weight)
                lane.there.head.copy_(lane.here.head, non_blocking=True)
                lane.there.x.copy_(batch.x, non_blocking=True)
            else:
                lane.here.fill(batch, lr, weight)
                lane.there.bytes.copy_(lane.here.bytes, non_blocking=True)
        lane.source = batch  # kept until its copy is done
        current = torch.cuda.current_stream(self._stream.device)
        current.wait_stream(self._stream)
        self.fixed.bytes.copy_(lane.there.bytes)
        lane.free.record(current)


class _Lane:
    def __init__(self, shape: tuple[int, int, int, int], device: torch.device, dtype: torch.dtype) -> None:
        self.here = Inputs(shape, torch.device("cpu"), pinned=True, dtype=dtype)
        self.there = Inputs(shape, device, dtype=dtype)
        self.free = torch.cuda.Event()
        self.source: Batch | None = None


def scalar(value: float, device: torch.device) -> Tensor:
    """() float32 on the device."""
    return torch.full((), value, dtype=torch.float32, device=device)
