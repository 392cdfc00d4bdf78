"""The inputs of a step in fixed buffers, and a prefetcher that copies the next step's inputs there."""

from __future__ import annotations

import torch
from torch import Tensor

from sra_fast.data.stream import Batch

ALIGNMENT = 256  # bytes, of x, as the allocator aligns tensors: compiled code copies what is aligned less


class Inputs:
    """One step's inputs in one contiguous buffer, so that one copy moves all of them.

    Args:
        shape: (B, C, H, W) of a batch's x.
        device: of the buffer.
        pinned: in page-locked host memory, from which a GPU copies asynchronously.
        dtype: of x.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        device: torch.device,
        pinned: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        batch, values = shape[0], torch.Size(shape).numel()
        header = [8 * batch, 8 * batch, 4, 4]
        padding = -sum(header) % ALIGNMENT
        sizes = [*header, padding, values * dtype.itemsize]
        self.bytes = torch.zeros(sum(sizes), dtype=torch.uint8, device=device, pin_memory=pinned)
        labels, number, lr, weight, _, x = self.bytes.split(sizes)
        self.labels, self.number = labels.view(torch.int64), number.view(torch.int64)  # (B,)
        self.lr, self.weight = lr.view(torch.float32)[0], weight.view(torch.float32)[0]  # ()
        self.x = x.view(dtype).view(shape)
        self.header = self.bytes[: sum(header)]  # everything but x

    @property
    def batch(self) -> Batch:
        """x, labels and image numbers, as views of the buffer."""
        return Batch(self.x, self.labels, self.number)

    def fill(self, batch: Batch, lr: float, weight: float) -> None:
        """Copy in a batch from any device, the learning rate and the alignment weight."""
        self.x.copy_(batch.x, non_blocking=True)
        self.fill_header(batch, lr, weight)

    def fill_header(self, batch: Batch, lr: float, weight: float) -> None:
        """`fill` without x."""
        self.labels.copy_(batch.labels, non_blocking=True)
        self.number.copy_(batch.number, non_blocking=True)
        self.lr.fill_(lr)
        self.weight.fill_(weight)


class Prefetch:
    """Copies inputs to fixed buffers on a CUDA device; the transfer overlaps the previous step.

        batch -> pinned memory -> staging buffer on the device, on a stream of its own
              -> fixed buffer, on the current stream, when the previous step has read it

    Two lanes alternate. The host waits only if it is more than two steps ahead of the device.

    Args:
        shape, dtype: of a batch's x, (B, C, H, W).
        device: a CUDA device.
    """

    def __init__(self, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype = torch.float32) -> None:
        self.fixed = Inputs(shape, device, dtype=dtype)
        self._lanes = [_Lane(shape, device, dtype) for _ in range(2)]
        self._stream = torch.cuda.Stream(device)
        # The buffers' zeros are written on the current stream, and must not overwrite what this one copies there.
        self._stream.wait_stream(torch.cuda.current_stream(device))

    def __call__(self, batch: Batch, lr: float, weight: float) -> None:
        """Copy a batch to the fixed buffer, ordered on the current stream."""
        lane = self._lanes.pop(0)
        self._lanes.append(lane)
        lane.free.synchronize()
        with torch.cuda.stream(self._stream):
            if batch.x.is_cuda:
                lane.staging.fill(batch, lr, weight)
            elif batch.x.is_pinned():  # x needs no copy on the host
                lane.pinned.fill_header(batch, lr, weight)
                lane.staging.header.copy_(lane.pinned.header, non_blocking=True)
                lane.staging.x.copy_(batch.x, non_blocking=True)
            else:
                lane.pinned.fill(batch, lr, weight)
                lane.staging.bytes.copy_(lane.pinned.bytes, non_blocking=True)
        lane.source = batch  # must live until it has been copied
        current = torch.cuda.current_stream(self._stream.device)
        current.wait_stream(self._stream)
        self.fixed.bytes.copy_(lane.staging.bytes)
        lane.free.record(current)


class _Lane:
    def __init__(self, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> None:
        self.pinned = Inputs(shape, torch.device("cpu"), pinned=True, dtype=dtype)
        self.staging = Inputs(shape, device, dtype=dtype)
        self.free = torch.cuda.Event()
        self.source: Batch | None = None


def scalar(value: float, device: torch.device) -> Tensor:
    """() float32 on the device."""
    return torch.full((), value, dtype=torch.float32, device=device)
