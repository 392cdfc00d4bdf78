"""The fixed buffers of a step's inputs."""

from __future__ import annotations

import pytest
import torch

from sra_fast.data.stream import Batch
from sra_fast.step.inputs import Inputs

CPU = torch.device("cpu")


def batch(seed: int, size: int = 3) -> Batch:
    x = torch.randn(size, 2, 5, 5, generator=torch.Generator().manual_seed(seed))
    return Batch(x, torch.arange(size) + 100 * seed, torch.arange(size) + (1 << 40) + seed)


def test_one_copy_of_the_bytes_moves_everything() -> None:
    source, copy = Inputs((3, 2, 5, 5), CPU), Inputs((3, 2, 5, 5), CPU)
    for k in range(2):  # the buffers keep their place
        source.fill(batch(k), 0.5, 2.0 + k)
        copy.bytes.copy_(source.bytes)
        assert all(torch.equal(*tensors) for tensors in zip(copy.batch, batch(k), strict=True))
        assert (float(copy.lr), float(copy.weight)) == (0.5, 2.0 + k)


def test_the_header_is_everything_but_x() -> None:
    source, copy = Inputs((3, 2, 5, 5), CPU), Inputs((3, 2, 5, 5), CPU)
    source.fill(batch(1), 0.5, 2.0)
    copy.fill(batch(2), 1.5, 3.0)
    source.fill_header(batch(3), 0.75, 4.0)
    copy.header.copy_(source.header)
    assert torch.equal(source.x, batch(1).x)
    assert torch.equal(copy.x, batch(2).x)
    assert torch.equal(copy.labels, batch(3).labels)
    assert torch.equal(copy.number, batch(3).number)
    assert (float(copy.lr), float(copy.weight)) == (0.75, 4.0)


@pytest.mark.parametrize("size", [1, 16, 255])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.uint8])
def test_x_is_aligned_as_a_tensor_of_its_own(size: int, dtype: torch.dtype) -> None:
    inputs = Inputs((size, 3, 5, 5), CPU, dtype=dtype)
    assert (inputs.x.data_ptr() - inputs.bytes.data_ptr()) % 256 == 0
    assert (inputs.x.shape, inputs.x.dtype) == ((size, 3, 5, 5), dtype)
