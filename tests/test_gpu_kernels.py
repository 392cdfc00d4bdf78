"""The Triton kernels on a GPU at real sizes: accuracy, bits, CUDA graphs, torch.compile, and offsets beyond 32 bits.

Tests marked `kernel` also run in Triton's interpreter, on a few tokens: the checks themselves are tested without a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import pytest
import torch
from interpreter import DEVICE, assert_as_exact, assert_same, kernel, poisoned, run_interpreted  # noqa: F401
from torch import Tensor

from sra_fast.kernels.adaln import adaln, adaln_ref, gated_adaln, gated_adaln_ref
from sra_fast.kernels.alignment import DISTANCES, alignment, alignment_ref
from sra_fast.kernels.language import INTERPRETED

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
GIB = 2**30
Shape = tuple[int, int, int]  # B, T, D


def on_gpu(test):
    """Mark a test that the interpreter cannot run."""
    return pytest.mark.gpu(pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")(test))


class Op(NamedTuple):
    """An op, its reference, and its numbers of (B, T, D) inputs, modulation vectors, and differentiable inputs."""

    call: Callable
    reference: Callable
    rows: int
    vectors: int
    differentiable: int


OPS = {
    "adaln": Op(adaln, adaln_ref, 1, 2, 2),
    "gated_adaln": Op(gated_adaln, gated_adaln_ref, 2, 3, 4),
    **{
        f"alignment {name}": Op(partial(alignment, distance=name), partial(alignment_ref, distance=name), 2, 0, 1)
        for name in DISTANCES
    },
}
CHANNELS = "alignment cosine_channel"


def real(batch: int, width: int) -> Shape:
    """256 tokens; a few in the interpreter."""
    return (2, 5, width) if INTERPRETED else (batch, 256, width)


def draw(op: Op, shape: Shape, dtype: torch.dtype, modulation: torch.dtype, seed: int = 0) -> list[Tensor]:
    """Rows, the second near the first as a teacher's features are; a bias for a gated op; and vectors as a view into
    those of a block, (B, 6, D)."""
    generator = torch.Generator(DEVICE).manual_seed(seed)
    normal = partial(torch.randn, generator=generator, device=DEVICE)
    rows = [normal(shape, dtype=dtype)]
    if op.rows == 2:
        rows.append(normal(shape, dtype=dtype).mul_(0.2).add_(rows[0]))
    batch, _, width = shape
    if op.vectors == 3:
        rows.append(normal(width, dtype=dtype))
    return [*rows, normal((batch, 6, width), dtype=modulation)[:, 6 - op.vectors :]] if op.vectors else rows


def output_grads(op: Op, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Random rows; for a mean, a multiple with which the student's gradient is near 1."""
    first = inputs[0]
    if not op.vectors:
        return [torch.full((), 2.5 * first.numel(), device=DEVICE)]
    generator = torch.Generator(DEVICE).manual_seed(1)
    return [torch.randn(first.shape, generator=generator, device=DEVICE, dtype=first.dtype) for _ in range(op.rows)]


def results(op: Op, function: Callable, inputs: Sequence[Tensor], grads: Sequence[Tensor]) -> list[Tensor]:
    """All outputs and all gradients."""
    leaves = [x.detach().requires_grad_(i < op.differentiable) for i, x in enumerate(inputs)]
    outputs = function(*leaves)
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    return [*(out.detach() for out in outputs), *torch.autograd.grad(outputs, leaves[: op.differentiable], grads)]


def doubled(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [tensor.double() for tensor in tensors]


# B, D, dtypes of rows and modulation. Each width has its own tiles, each dtype its own loads, and each batch its own
# number of programs per sample.
GRID = (
    *((32, width, BF16, BF16) for width in (384, 768, 1024, 1152)),
    *((32, width, *dtypes) for width in (384, 1152) for dtypes in ((FP32, FP32), (FP16, FP16), (BF16, FP32))),
    (256, 384, BF16, BF16),
    (256, 1152, BF16, FP32),
)
CASES = [(name, *case) for name, op in OPS.items() for case in GRID if op.vectors or case[3] == case[2]]


@kernel
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("name", "batch", "width", "dtype", "modulation"), CASES[:: 5 if INTERPRETED else 1], ids=str)
def test_kernel_is_as_exact_as_pytorch_and_repeats_its_bits(
    name: str, batch: int, width: int, dtype, modulation
) -> None:
    op, shape = OPS[name], real(batch, width)
    inputs = draw(op, shape, dtype, modulation)
    grads = output_grads(op, inputs)
    got, again, usual = (results(op, function, inputs, grads) for function in (op.call, op.call, op.reference))
    assert_same(got, again)
    truth = results(op, op.reference, doubled(inputs), doubled(grads))
    assert_as_exact(got, usual, truth, terms=max(shape[0] * shape[1], shape[2]))


@on_gpu
@pytest.mark.parametrize("name", OPS)
def test_a_replayed_graph_gives_the_bits_of_the_call(name: str) -> None:
    """On inputs other than those of the capture."""
    op = OPS[name]
    inputs, others = (draw(op, real(32, 1152), BF16, BF16, seed) for seed in (0, 1))
    grads, expected = output_grads(op, inputs), results(op, op.call, others, output_grads(op, inputs))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compiles before the capture
        results(op, op.call, inputs, grads)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = results(op, op.call, inputs, grads)
    for tensor, other in zip(inputs, others, strict=True):
        tensor.copy_(other)
    graph.replay()
    assert_same(got, expected)


@on_gpu
@pytest.mark.parametrize("name", ["adaln", "gated_adaln", "alignment cosine"])
def test_inductor_gives_the_bits_of_the_call(name: str) -> None:
    """In one graph with other, exact ops before and after."""
    op = OPS[name]

    def scaled(*inputs: Tensor) -> tuple[Tensor, ...]:
        outputs = op.call(*(2 * x for x in inputs))
        return tuple(4 * out for out in ([outputs] if isinstance(outputs, Tensor) else outputs))

    inputs = draw(op, real(32, 384), BF16, BF16)
    grads = output_grads(op, inputs)
    torch._dynamo.reset()
    compiled = torch.compile(scaled, fullgraph=True, dynamic=False)
    assert_same(*(results(op, call, inputs, grads) for call in (compiled, scaled)))


def compare_in_pieces(op: Op, call: Callable, inputs: list[Tensor], piece: int, axis: int = 1) -> None:
    """Compare with float64 where all of it at once does not fit into memory.

    The reference gets `piece` tokens (axis 1) or channels (axis 2) of one sample at a time. Rows are compared piece by
    piece. Sums over tokens and the mean are compared at the end, with their own rounding as PyTorch's error.
    """
    grads = output_grads(op, inputs)
    got = results(op, call, inputs, grads)
    shape = inputs[0].shape
    terms = max(shape[0] * shape[1], shape[2])
    rows = [i for i, x in enumerate(got) if x.shape == shape]
    sums = {i: torch.zeros(x.shape, dtype=torch.float64, device=DEVICE) for i, x in enumerate(got) if x.shape != shape}

    def part(x: Tensor, sample: int, first: int) -> Tensor:
        if x.ndim < 3:  # a bias or a mean
            return x
        one = x[sample : sample + 1]
        return one.narrow(axis, first, min(piece, x.shape[axis] - first)) if x.shape == shape else one

    for sample in range(len(inputs[0])):
        for first in range(0, inputs[0].shape[axis], piece):
            some, some_grads = ([part(x, sample, first) for x in tensors] for tensors in (inputs, grads))
            share = some[0].numel() / inputs[0].numel() if not op.vectors else 1.0  # of this piece in the mean
            usual = results(op, op.reference, some, [share * x for x in some_grads])
            truth = results(op, op.reference, doubled(some), [share * x for x in doubled(some_grads)])
            assert_as_exact(
                [part(got[i], sample, first) for i in rows], [usual[i] for i in rows], [truth[i] for i in rows], terms
            )
            for i, total in sums.items():
                (total[sample : sample + 1] if total.ndim == 3 else total).add_(share * truth[i])
    values, truths = [got[i] for i in sums], list(sums.values())
    if not op.vectors:  # a distance is 1 minus a mean cosine, and its sums are rounded relative to that cosine
        values, truths = [1 - value for value in values], [1 - truth for truth in truths]
    usual = [truth.to(value.dtype) for value, truth in zip(values, truths, strict=True)]
    assert_as_exact(values, usual, truths, terms)


LARGE = ["adaln", "gated_adaln", "alignment cosine", CHANNELS]


@kernel
@pytest.mark.parametrize("name", LARGE)
def test_kernel_compared_in_pieces(name: str) -> None:
    """The comparison itself, with a piece that does not divide the size. It finds a row read from elsewhere."""
    op, axis = OPS[name], 2 if name == CHANNELS else 1
    inputs = draw(op, (2, 13, 24), FP32, FP32)
    compare_in_pieces(op, op.call, inputs, 7, axis)

    def wrapped(x: Tensor, *others: Tensor) -> object:
        return op.call(torch.cat([x[:, :-1], x[:, :1]], dim=1), *others)

    with pytest.raises(AssertionError, match=r"error .* allowed"):
        compare_in_pieces(op, wrapped, inputs, 7, axis)


# More than 2^31 elements: the offset of a token exceeds 32 bits in the first, that of a sample in the second.
@on_gpu
@pytest.mark.parametrize("shape", [(1, 1_900_000, 1152), (32, 65_000, 1152)], ids=str)
@pytest.mark.parametrize("name", LARGE)
def test_offsets_beyond_32_bits(name: str, shape: Shape) -> None:
    op = OPS[name]
    batch, tokens, width = shape
    assert (tokens if batch == 1 else (batch - 1) * tokens) * width > 2**31
    # Inputs, outputs and their gradients in bf16, and a piece in float64.
    tensors = {"adaln": 4, "gated_adaln": 8}.get(name, 3)
    needed = tensors * 2 * batch * tokens * width + 20 * GIB
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0]
    if free < needed:
        pytest.skip(f"{free / GIB:.0f} GiB of memory free; needs {needed / GIB:.0f}")
    inputs = draw(op, shape, BF16, BF16)
    axis, across = (2, tokens) if name == CHANNELS else (1, width)
    compare_in_pieces(op, op.call, inputs, 75_000_000 // across, axis)  # pieces of 600 MB in float64


def test_kernels_in_the_interpreter() -> None:
    run_interpreted(__file__)
