"""The fixed buffers of a step's inputs."""

from __future__ import annotations

import pytest
import torch

from sra_fast.data.stream import Batch
from sra_fast.step.inputs import Inputs

CPU = torch.device("cpu")


def batch(first: int, size: int = 3) -> Batch:
    x = torch.randn(size, 2, 5, 5, generator=torch.Generator().manual_seed(first))
    return Batch(x, torch.arange(size) + 100, torch.arange(size) + (1 << 40) + first)


def test_what_is_filled_in_is_what_is_read() -> None:
    inputs, given = Inputs((3, 2, 5, 5), CPU), batch(7)
    inputs.fill(given, lr=1e-4, weight=0.25)
    for held, wanted in ((inputs.x, given.x), (inputs.labels, given.labels), (inputs.number, given.number)):
        assert held.dtype == wanted.dtype
        assert torch.equal(held, wanted)
    assert torch.equal(inputs.lr, torch.tensor(1e-4))
    assert torch.equal(inputs.weight, torch.tensor(0.25))


def test_one_copy_of_the_bytes_moves_everything() -> None:
    here, there = Inputs((3, 2, 5, 5), CPU), Inputs((3, 2, 5, 5), CPU)
    here.fill(batch(1), 0.5, 2.0)
    there.bytes.copy_(here.bytes)
    for name in ("x", "labels", "number", "lr", "weight"):
        assert torch.equal(getattr(there, name), getattr(here, name)), name
    addresses = [getattr(there, name).data_ptr() for name in ("x", "labels", "number", "lr", "weight")]
    start = there.bytes.data_ptr()
    assert all(start <= address < start + len(there.bytes) for address in addresses)


def test_all_but_x_travels_apart() -> None:
    here, there = Inputs((3, 2, 5, 5), CPU), Inputs((3, 2, 5, 5), CPU)
    here.fill(batch(1), 0.5, 2.0)
    there.fill(batch(2), 1.5, 3.0)
    here.fill_head(batch(3), 0.75, 4.0)
    there.head.copy_(here.head)
    assert torch.equal(there.x, batch(2).x)
    assert torch.equal(here.x, batch(1).x)
    assert torch.equal(there.labels, batch(3).labels)
    assert torch.equal(there.number, batch(3).number)
    assert (float(there.lr), float(there.weight)) == (0.75, 4.0)


@pytest.mark.parametrize("size", [1, 3, 16, 255])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.uint8])
def test_x_is_aligned_as_a_tensor_of_its_own(size: int, dtype: torch.dtype) -> None:
    inputs = Inputs((size, 3, 5, 5), CPU, dtype=dtype)
    assert (inputs.x.data_ptr() - inputs.bytes.data_ptr()) % 256 == 0
    assert (inputs.x.shape, inputs.x.dtype) == ((size, 3, 5, 5), dtype)


def test_buffers_stay_where_they_are() -> None:
    inputs = Inputs((3, 2, 5, 5), CPU)
    before = inputs.x.data_ptr()
    for k in range(3):
        inputs.fill(batch(k), 0.1 * k, 0.5)
        assert torch.equal(inputs.x, batch(k).x)
    assert inputs.x.data_ptr() == before
