"""The inputs of a step in fixed buffers, and the next step's inputs on their way to them."""

from __future__ import annotations

import torch
from torch import Tensor

from sra_fast.data.ahead import Batch


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
        room = -(-values * dtype.itemsize // 4) * 4  # what follows is float32
        sizes = [8 * batch, 8 * batch, room, 4, 4]
        self.bytes = torch.zeros(sum(sizes), dtype=torch.uint8, device=device, pin_memory=pinned)
        labels, number, x, lr, weight = self.bytes.split(sizes)
        self.labels, self.number = labels.view(torch.int64), number.view(torch.int64)  # (B,)
        self.x = x.view(dtype)[:values].view(shape)
        self.lr, self.weight = lr.view(torch.float32)[0], weight.view(torch.float32)[0]  # ()

    def fill(self, batch: Batch, lr: float, weight: float) -> None:
        """Take over a batch from any device, the learning rate and the alignment weight."""
        for held, given in ((self.x, batch.x), (self.labels, batch.labels), (self.number, batch.number)):
            held.copy_(given, non_blocking=True)
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
            if batch.x.is_cuda or batch.x.is_pinned():  # no detour
                lane.there.fill(batch, lr, weight)
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
