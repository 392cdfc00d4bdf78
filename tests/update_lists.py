"""Lists of parameters for the tests of the optimizer, and their bits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from sra_fast.kernels import library
from sra_fast.kernels.adamw_ema import Lists, Scalars, adamw_ema, adamw_ema_ref

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
compiled = pytest.mark.skipif(bool(library.why_unavailable()), reason=library.why_unavailable() or "built")
either = pytest.mark.parametrize(
    "call", [pytest.param(adamw_ema, marks=compiled, id="fused"), pytest.param(adamw_ema_ref, id="reference")]
)

# Odd, empty, one element, no dimension, and more than one chunk. Matrices are the second group.
SHAPES = [(17, 9), (257,), (), (1,), (0,), (3, 0), (5, 7, 3), (16385,), (3, 12345)]
GROUP = [int(len(shape) > 1) for shape in SHAPES]
RATES, DECAYS = torch.tensor([3e-3, 1e-2]), (0.0, 0.1)
ONE = torch.tensor(1e-2)  # one learning rate for all groups
BETAS, EPS, EMA = (0.9, 0.999), 1e-8, 0.99
OPTIONS = {"betas": BETAS, "eps": EPS, "weight_decay": DECAYS, "group": GROUP}


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def draw(seed: int, scale: float = 1.0, shapes: Sequence[tuple[int, ...]] = SHAPES) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [scale * torch.randn(shape, generator=generator) for shape in shapes]


def used(seed: int = 0, gradients: torch.dtype = FP32, copies: torch.dtype | None = BF16, shapes=SHAPES) -> Lists:
    """In the middle of training: moments and copies have arbitrary values."""
    parts = [draw(7 * seed + part, shapes=shapes) for part in range(7)]
    parts[0] = [g.to(gradients) for g in parts[0]]
    parts[3] = [v.square() for v in parts[3]]
    parts[5:] = [[c.to(copies) for c in part] for part in parts[5:]] if copies else [[], []]
    return Lists(*parts)


def scalars(norm: float | Tensor = 1.0, *, step: int = 0, lr: Tensor = RATES, clip=0.0, loss_scale=1.0) -> Scalars:
    norm = norm if isinstance(norm, Tensor) else torch.tensor(norm)
    rest = torch.tensor(EMA), torch.tensor(clip), torch.tensor(loss_scale)
    return Scalars(norm, torch.tensor(step), torch.tensor(0), lr.clone(), *rest)


def copied(lists: Lists) -> Lists:
    return Lists(*([tensor.clone() for tensor in part] for part in lists))


def words(tensors: Sequence[Tensor]) -> list[bytes]:
    """Every bit, so that NaN equals itself and -0 does not equal 0."""
    return [tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() for tensor in tensors]


def all_words(lists: Lists, state: Scalars) -> list[list[bytes]]:
    return [*map(words, lists), words(state)]
