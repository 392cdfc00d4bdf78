"""Global 2-norm of a list of gradients:

    norm = sqrt(sum over all tensors of the sum of g^2)

The compiled operator (csrc/) adds in float64, where the square of a float32 is exact, in chunks of 65,536 gradients and
in an order that csrc/arithmetic.h fixes: the same bits in every run, for any number of threads, on CPUs and GPUs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from . import library

CHUNK = 1 << 16


def gradient_norm_ref(gradients: Sequence[Tensor]) -> Tensor:
    """Reference norm: a float32 scalar, sums in float32, of at most 65,536 gradients at a time.

    PyTorch's own norms on a CPU add up a whole tensor in a few sums, which is off by half a percent at 59 million
    gradients; on a GPU its foreach functions take chunks.

    Args:
        gradients: of any shapes and floating dtypes.
    """
    if not gradients:
        raise RuntimeError("gradient_norm: gradients is empty")
    if gradients[0].is_cuda:
        parts = torch._foreach_norm(list(gradients), dtype=torch.float32)
    else:
        parts = [norm for gradient in gradients for norm in _norms(gradient.reshape(-1))]
    return torch.linalg.vector_norm(torch.stack(parts))


def _norms(gradient: Tensor) -> Iterator[Tensor]:
    """2-norms, float32 scalars, of which the gradient's own is the norm."""
    whole = len(gradient) // CHUNK * CHUNK
    chunks = torch.linalg.vector_norm(gradient[:whole].view(-1, CHUNK), dim=1, dtype=torch.float32)
    yield torch.linalg.vector_norm(chunks)
    yield torch.linalg.vector_norm(gradient[whole:], dtype=torch.float32)


def gradient_norm(gradients: Sequence[Tensor]) -> Tensor:
    """The norm in one pass over the gradients: a float32 scalar.

    Args:
        gradients: at least one; contiguous, of one device, all float32, all bfloat16 or all float16; any shapes.

    Raises:
        RuntimeError: naming the gradient that is otherwise.
    """
    return torch.ops.sra_fast.gradient_norm(gradients)


if not library.why_unavailable():

    @torch.library.register_fake("sra_fast::gradient_norm")
    def _(gradients):
        return gradients[0].new_empty((), dtype=torch.float32)
