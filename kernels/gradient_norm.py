"""Global 2-norm of a list of gradients:

    norm = sqrt(sum of g^2 over all elements of all tensors)

The compiled operator (csrc/) adds in float64, in which the square of a float32 is exact, in chunks of 65,536 elements
and in the order defined in csrc/arithmetic.h: the same bits in every run, with any number of threads, on CPUs and GPUs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from . import library

CHUNK = 1 << 16


def gradient_norm_ref(gradients: Sequence[Tensor]) -> Tensor:
    """Reference norm: a float32 scalar. Sums are in float32, of at most 65,536 elements each.

    On a CPU, PyTorch's norm of a whole tensor uses a few long sums, with an error of half a percent at 59 million
    elements. On a GPU, its foreach functions work in chunks.

    Args:
        gradients: of any shapes and floating dtypes.
    """
    if not gradients:
        raise RuntimeError("gradient_norm: gradients is empty")
    if gradients[0].is_cuda:
        parts = torch._foreach_norm(list(gradients), dtype=torch.float32)
    else:
        parts = [norm for gradient in gradients for norm in _partial_norms(gradient.reshape(-1))]
    return torch.linalg.vector_norm(torch.stack(parts))


def _partial_norms(gradient: Tensor) -> Iterator[Tensor]:
    """Norms of all complete chunks together and of the rest, float32 scalars."""
    end = len(gradient) // CHUNK * CHUNK
    chunks = torch.linalg.vector_norm(gradient[:end].view(-1, CHUNK), dim=1, dtype=torch.float32)
    yield torch.linalg.vector_norm(chunks)
    yield torch.linalg.vector_norm(gradient[end:], dtype=torch.float32)


def gradient_norm(gradients: Sequence[Tensor]) -> Tensor:
    """The norm in one pass over the gradients: a float32 scalar.

    Args:
        gradients: at least one; contiguous, on one device, all float32, all bfloat16 or all float16; any shapes.

    Raises:
        RuntimeError: naming the gradient that is not so.
    """
    return torch.ops.sra_fast.gradient_norm(gradients)


def square_sums_ref(gradients: Sequence[Tensor], chunk: int) -> Tensor:
    """Reference of `square_sums`, by adding halves, in an order that does not depend on the number of chunks; arguments
    as there, but chunk must be a power of two."""
    return torch.cat([_square_sums(gradient.reshape(-1), chunk) for gradient in gradients])


def _square_sums(gradient: Tensor, chunk: int) -> Tensor:
    squares = torch.nn.functional.pad(gradient, (0, -len(gradient) % chunk)).view(-1, chunk).double().square()
    while squares.shape[1] > 1:
        first, second = squares.chunk(2, dim=1)
        squares = first + second
    return squares[:, 0]


def square_sums(gradients: Sequence[Tensor], chunk: int) -> Tensor:
    """Sums of squares over each `chunk` elements of each tensor, in this order: (N,) float64.

    They do not depend on where else the tensors' elements are, so that processes which each have some chunks of a
    gradient find the same norm, whatever their number.

    Args:
        gradients: as `gradient_norm` takes them.
    """
    return torch.ops.sra_fast.square_sums(gradients, chunk)


if not library.why_unavailable():

    @torch.library.register_fake("sra_fast::gradient_norm")
    def _(gradients):
        return gradients[0].new_empty((), dtype=torch.float32)

    @torch.library.register_fake("sra_fast::square_sums")
    def _(gradients, chunk):
        chunks = sum(-(-gradient.numel() // chunk) for gradient in gradients)
        return gradients[0].new_empty(chunks, dtype=torch.float64)
