"""The kernels at the sizes they are for, on a GPU: as exact as PyTorch, the same in every bit each time, in a CUDA
graph and under torch.compile, and with offsets beyond 32 bits.

What is marked `kernel` also runs in Triton's interpreter, on a few tokens: so that these checks can be trusted before
there is a GPU to make them on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import pytest
import torch
from interpreter import DEVICE, assert_as_exact, kernel, poisoned, run_interpreted  # noqa: F401
from torch import Tensor

from sra_fast.kernels.adaln import adaln, adaln_ref, gated_adaln, gated_adaln_ref
from sra_fast.kernels.alignment import DISTANCES, alignment, alignment_ref
from sra_fast.kernels.language import INTERPRETED

FULL, HALF, BRAIN = torch.float32, torch.float16, torch.bfloat16
Shape = tuple[int, int, int]  # B, T, D


def on_gpu(test):
    """Marks what the interpreter cannot show."""
    return pytest.mark.gpu(pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")(test))


class Op(NamedTuple):
    """An op, its reference, and how many (B, T, D) and (B, D) inputs it has; the first `learns` have gradients."""

    call: Callable
    reference: Callable
    rows: int
    vectors: int
    learns: int


OPS = {
    "adaln": Op(adaln, adaln_ref, 1, 2, 3),
    "gated_adaln": Op(gated_adaln, gated_adaln_ref, 2, 3, 5),
    **{
        f"alignment {name}": Op(partial(alignment, distance=name), partial(alignment_ref, distance=name), 2, 0, 1)
        for name in DISTANCES
    },
}


def real(batch: int, width: int) -> Shape:
    """256 tokens, of which the interpreter sees a few."""
    return (2, 5, width) if INTERPRETED else (batch, 256, width)


def drawn(op: Op, shape: Shape, dtype: torch.dtype, modulation: torch.dtype, seed: int = 0) -> list[Tensor]:
    """Rows, the second near the first as a teacher's features are; vectors as views into one (B, 6 D) tensor."""
    generator = torch.Generator(DEVICE).manual_seed(seed)

    def normal(*size: int, dtype: torch.dtype) -> Tensor:
        return torch.randn(size, generator=generator, device=DEVICE, dtype=dtype)

    rows = [normal(*shape, dtype=dtype)]
    if op.rows == 2:
        rows.append(normal(*shape, dtype=dtype).mul_(0.2).add_(rows[0]))
    batch, _, width = shape
    return [*rows, *normal(batch, 6 * width, dtype=modulation).chunk(6, dim=-1)[6 - op.vectors :]]


def upstream(op: Op, inputs: Sequence[Tensor], seed: int = 1) -> list[Tensor]:
    """Gradients of the outputs: random rows, and such a multiple of a mean that the student's is near 1."""
    first = inputs[0]
    if not op.vectors:
        return [torch.full((), 2.5 * first.numel(), device=DEVICE)]
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return [torch.randn(first.shape, generator=generator, device=DEVICE, dtype=first.dtype) for _ in range(op.rows)]


def results(op: Op, function: Callable, inputs: Sequence[Tensor], above: Sequence[Tensor]) -> list[Tensor]:
    """All outputs and all gradients."""
    leaves = [x.detach().requires_grad_(place < op.learns) for place, x in enumerate(inputs)]
    made = function(*leaves)
    outputs = [made] if isinstance(made, Tensor) else list(made)
    return [*(out.detach() for out in outputs), *torch.autograd.grad(outputs, leaves[: op.learns], above)]


def doubled(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [tensor.double() for tensor in tensors]


def compare(op: Op, call: Callable, shape: Shape, dtype: torch.dtype, modulation: torch.dtype) -> None:
    """Raise AssertionError if a result is off by more than `assert_as_exact` allows."""
    inputs = drawn(op, shape, dtype, modulation)
    above = upstream(op, inputs)
    got, usual = (results(op, function, inputs, above) for function in (call, op.reference))
    truth = results(op, op.reference, doubled(inputs), doubled(above))
    assert_as_exact(got, usual, truth, terms=max(shape[1:]))


# B, D, dtypes of rows and modulation. Each width has tiles of its own, each dtype loads of its own; another batch has
# another number of programs for a sample, and whether that depends on width or dtype is seen at both ends.
GRID = (
    *((32, width, BRAIN, BRAIN) for width in (384, 768, 1024, 1152)),
    *((32, width, *dtypes) for width in (384, 1152) for dtypes in ((FULL, FULL), (HALF, HALF), (BRAIN, FULL))),
    (256, 384, BRAIN, BRAIN),
    (256, 1152, BRAIN, BRAIN),
    (256, 1152, BRAIN, FULL),
)
# alignment has no modulation, and two distances are the third but for an instruction.
NARROW = ((32, 1152, BRAIN, BRAIN), (256, 1152, BRAIN, BRAIN))
CASES = [
    (name, *case)
    for name, op in OPS.items()
    for case in (NARROW if name.endswith(("l1", "l2")) and "smooth" not in name else GRID)
    if op.vectors or case[3] == case[2]
][:: 3 if INTERPRETED else 1]


@kernel
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("name", "batch", "width", "dtype", "modulation"), CASES, ids=str)
def test_kernel_is_as_exact_as_pytorch(name: str, batch: int, width: int, dtype, modulation) -> None:
    compare(OPS[name], OPS[name].call, real(batch, width), dtype, modulation)


WRONG = {
    "adaln": lambda x, shift, scale: adaln(x, shift.roll(1, 0), scale),
    # the scale's gradient twice
    "gated_adaln": lambda *inputs: gated_adaln(*inputs[:4], 2 * inputs[4] - inputs[4].detach()),
    "alignment cosine": lambda student, teacher: alignment(student, teacher.roll(1, 1), "cosine"),
}


@kernel
@pytest.mark.parametrize("name", WRONG)
def test_kernel_check_finds_what_is_wrong(name: str) -> None:
    with pytest.raises(AssertionError, match=r"error .* allowed"):
        compare(OPS[name], WRONG[name], real(32, 384), FULL, FULL)


@kernel
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("name", OPS)
def test_kernel_twice_is_the_same_in_every_bit(name: str) -> None:
    op = OPS[name]
    inputs = drawn(op, real(256, 1152), BRAIN, BRAIN)
    above = upstream(op, inputs)
    for first, second in zip(*(results(op, op.call, inputs, above) for _ in range(2)), strict=True):
        assert torch.equal(first, second)


@on_gpu
@pytest.mark.parametrize("name", OPS)
def test_a_replayed_graph_is_the_ordinary_call(name: str) -> None:
    """In every bit, on inputs that the capture has not seen."""
    op = OPS[name]
    inputs, others = (drawn(op, real(32, 1152), BRAIN, BRAIN, seed) for seed in (0, 1))
    above, wanted = upstream(op, inputs), results(op, op.call, others, upstream(op, inputs))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compiles before the capture
        results(op, op.call, inputs, above)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = results(op, op.call, inputs, above)
    for tensor, other in zip(inputs, others, strict=True):
        tensor.copy_(other)
    graph.replay()
    for value, right in zip(got, wanted, strict=True):
        assert torch.equal(value, right)


@on_gpu
@pytest.mark.parametrize("name", ["adaln", "gated_adaln", "alignment cosine"])
def test_compiled_whole_is_the_ordinary_call(name: str) -> None:
    """By Inductor, in one graph with other ops before and behind, which are exact: in every bit."""
    op = OPS[name]

    def around(*inputs: Tensor) -> tuple[Tensor, ...]:
        made = op.call(*(2 * x for x in inputs))
        return tuple(4 * out for out in ([made] if isinstance(made, Tensor) else made))

    inputs = drawn(op, real(32, 384), BRAIN, BRAIN)
    above = upstream(op, inputs)
    torch._dynamo.reset()
    compiled = torch.compile(around, fullgraph=True, dynamic=False)
    for got, wanted in zip(*(results(op, call, inputs, above) for call in (compiled, around)), strict=True):
        assert torch.equal(got, wanted)


def compare_in_pieces(op: Op, call: Callable, inputs: list[Tensor], piece: int, axis: int = 1) -> None:
    """`compare` where float64 of everything at once does not fit: the reference sees `piece` tokens (axis 1) or
    channels (axis 2) of one sample at a time. Rows are compared piece by piece; sums over tokens and the mean at the
    end, with what their rounding costs as PyTorch's own error."""
    above = upstream(op, inputs)
    got = results(op, call, inputs, above)
    batch, terms = len(inputs[0]), max(inputs[0].shape[1:])
    whole = {place: torch.zeros(x.shape, dtype=torch.float64, device=DEVICE)
             for place, x in enumerate(got) if x.ndim != 3}  # fmt: skip

    def part(x: Tensor, sample: int, first: int) -> Tensor:
        x = x[sample : sample + 1] if x.ndim else x
        return x.narrow(axis, first, min(piece, x.shape[axis] - first)) if x.ndim == 3 else x

    for sample in range(batch):
        for first in range(0, inputs[0].shape[axis], piece):
            some, over = ([part(x, sample, first) for x in tensors] for tensors in (inputs, above))
            share = some[0].numel() / inputs[0].numel() if not op.vectors else 1.0  # of this piece in the mean
            usual = results(op, op.reference, some, [share * x for x in over])
            truth = results(op, op.reference, doubled(some), [share * x for x in doubled(over)])
            rows = [place for place, x in enumerate(got) if x.ndim == 3]
            assert_as_exact(
                [part(got[place], sample, first) for place in rows],
                [usual[place] for place in rows],
                [truth[place] for place in rows],
                terms,
            )
            for place, total in whole.items():
                (total[sample : sample + 1] if total.ndim else total).add_(share * truth[place])
    places = list(whole)
    assert_as_exact(
        [got[place] for place in places],
        [whole[place].to(got[place].dtype) for place in places],
        [whole[place] for place in places],
        terms,
    )


CHANNELS = "alignment cosine_channel"
LARGE = ["adaln", "gated_adaln", "alignment cosine", CHANNELS]


@kernel
@pytest.mark.parametrize("name", LARGE)
def test_kernel_compared_in_pieces(name: str) -> None:
    """The check itself, where a piece is not a divisor of the whole; and that it finds a row read from elsewhere."""
    op, axis = OPS[name], 2 if name == CHANNELS else 1
    inputs = drawn(op, (3, 13, 24), FULL, FULL)
    compare_in_pieces(op, op.call, inputs, 5, axis)

    def wrapped(x: Tensor, *others: Tensor) -> object:
        return op.call(torch.cat([x[:, :-1], x[:, :1]], dim=1), *others)

    with pytest.raises(AssertionError, match=r"error .* allowed"):
        compare_in_pieces(op, wrapped, inputs, 5, axis)


# More than 2^31 elements: the offset of a token alone is beyond 32 bits in the first, that of a sample in the second.
BEYOND = [(1, 1_900_000, 1152), (32, 65_000, 1152)]
PIECE = 75_000_000  # elements, 600 MB in float64
GIB = 2**30


@on_gpu
@pytest.mark.parametrize("shape", BEYOND, ids=str)
@pytest.mark.parametrize("name", LARGE)
def test_offsets_beyond_32_bits(name: str, shape: Shape) -> None:
    op = OPS[name]
    batch, tokens, width = shape
    assert (tokens if batch == 1 else (batch - 1) * tokens) * width > 2**31
    # Inputs, outputs and gradients of both, in bf16, and the float64 of a piece.
    tensors = {"adaln": 4, "gated_adaln": 8}.get(name, 3)
    needed = tensors * 2 * batch * tokens * width + 20 * GIB
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0]
    if free < needed:
        pytest.skip(f"{free / GIB:.0f} GiB of memory free; needs {needed / GIB:.0f}")
    inputs = drawn(op, shape, BRAIN, BRAIN)
    axis, across = (2, tokens) if name == CHANNELS else (1, width)
    compare_in_pieces(op, op.call, inputs, PIECE // across, axis)


def test_kernels_in_the_interpreter() -> None:
    run_interpreted(__file__)
