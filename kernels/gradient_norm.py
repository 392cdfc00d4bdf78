"""Global 2-norm of a list of gradients:

    norm = sqrt(sum over all tensors of the sum of g^2)

The compiled operator (csrc/) adds in float64, where the square of a float32 is exact, in chunks of 65,536 gradients and
in an order that csrc/arithmetic.h fixes: the same bits in every run, for any number of threads, on CPUs and GPUs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import library


def gradient_norm_ref(gradients: Sequence[Tensor]) -> Tensor:
    """Reference norm: a float32 scalar, the sums of each tensor in float32.

    Args:
        gradients: of any shapes and floating dtypes.
    """
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(list(gradients), dtype=torch.float32)))


def gradient_norm(gradients: Sequence[Tensor]) -> Tensor:
    """The norm in one pass over the gradients: a float32 scalar.

    Args:
        gradients: at least one; contiguous, of one device, all float32, all bfloat16 or all float16; any shapes.

    Raises:
        RuntimeError: naming the gradient that is otherwise.
    """
    return torch.ops.sra_fast.gradient_norm(gradients)


if not library.load():

    @torch.library.register_fake("sra_fast::gradient_norm")
    def _(gradients):
        return gradients[0].new_empty((), dtype=torch.float32)
