"""The global norm: correctly rounded from float64, and the same bits for any split of the work."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor
from update_lists import BF16, FP16, FP32, compiled, threads, words

from sra_fast.kernels import library
from sra_fast.kernels.gradient_norm import gradient_norm, gradient_norm_ref, square_sums, square_sums_ref

either = pytest.mark.parametrize(
    "norm_of",
    [pytest.param(gradient_norm, marks=compiled, id="fused"), pytest.param(gradient_norm_ref, id="reference")],
)
DTYPES = pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
CHUNK, LANES = 65536, 1024
# Odd, empty, one element, no dimension, and on both sides of a chunk's end.
SHAPES = [(17, 9), (), (0,), (1,), (1023,), (1025,), (5, 7, 3), (CHUNK,), (CHUNK + 1,), (3, 99_991)]


def draw(dtype: torch.dtype = FP32, shapes: Sequence[tuple[int, ...]] = SHAPES, scale: float = 1.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(len(shapes))
    return [(scale * torch.randn(shape, generator=generator)).to(dtype) for shape in shapes]


def truth(gradients: Sequence[Tensor]) -> float:
    return math.sqrt(math.fsum(g.double().square().sum() for g in gradients))


def last_bits(norm: Tensor, exact: float) -> float:
    """Error in units of float32's last bit."""
    return abs(float(norm) - exact) / 2.0 ** (max(math.frexp(exact)[1], -125) - 24)


@compiled
@DTYPES
def test_the_norm_is_correctly_rounded(dtype: torch.dtype) -> None:
    gradients = draw(dtype)
    norm, reference = gradient_norm(gradients), gradient_norm_ref(gradients)
    assert (norm.shape, norm.dtype) == (reference.shape, reference.dtype) == ((), FP32)
    for some in (gradients, *([gradient] for gradient in gradients)):
        assert (
            last_bits(gradient_norm(some), truth(some)) < 0.501
        )  # half for the rounding; float64's errors are far below
    # The reference adds in float32: roundings of both signs, one per term.
    assert last_bits(reference, truth(gradients)) < math.sqrt(max(g.numel() for g in gradients))


def in_order(gradients: Sequence[Tensor]) -> Tensor:
    """The documented order of additions, naively."""

    def tree(sums: list[float]) -> float:
        while len(sums) > 1:
            half = len(sums) // 2
            sums = [a + b for a, b in zip(sums[:half], sums[half:], strict=True)]
        return sums[0]

    sums = [0.0] * 256
    chunks = itertools.chain.from_iterable(g.reshape(-1).double().split(CHUNK) for g in gradients if g.numel())
    for number, chunk in enumerate(chunks):
        lanes = torch.zeros(LANES, dtype=torch.float64)
        for row in chunk.square().split(LANES):
            lanes[: len(row)] += row
        four = lanes.view(-1, 4).unbind(1)
        sums[number % 256] += tree(((four[0] + four[1]) + (four[2] + four[3])).tolist())
    return torch.tensor(math.sqrt(tree(sums))).float()


def on_a_tie(small: Sequence[int], size: int = 2 * CHUNK) -> Tensor:
    """Gradients whose squares in lane 0 add up to (1 + 2^-24)^2, so that the norm is half way between two float32; and
    2^-27 at `small`, of which the square is lost when it is added to 1 alone, but not with others of its kind."""
    gradient = torch.zeros(size)
    for place, value in enumerate((1.0, 2.0**-12, 2.0**-12, 2.0**-24)):
        gradient[place * LANES] = value
    gradient[list(small)] = 2.0**-27
    return gradient


UP = 1 + 2.0**-23
PLACES: dict[str, tuple[list[int], float]] = {
    "none": ([], 1.0),
    "after it in its sum": ([LANES * k for k in range(4, 20)], 1.0),
    "beside it, in one sum": ([1 + LANES * k for k in range(16)], UP),
    "its neighbours, one by one": ([1, 2, 3], 1.0),
    "its neighbours, two and two": ([c + LANES * k for c, n in ((2, 2), (3, 2), (4, 4)) for k in range(n)], UP),
    "where the tree meets it one at a time": ([4 * 128, 4 * 64, 4 * 32, 4 * 16, 4 * 8, 4 * 4, 4 * 2, 4], 1.0),
    "where the tree meets them first": ([4 * 129, 4 * 65, 4 * 33, 4 * 17, 4 * 9, 4 * 5, 4 * 3], UP),
    "in the next chunk": ([CHUNK + LANES * k for k in range(16)], UP),
}


@compiled
@pytest.mark.parametrize("place", PLACES)
def test_the_order_of_additions_is_the_documented_one(place: str) -> None:
    small, expected = PLACES[place]
    gradient = on_a_tie(small)
    assert float(in_order([gradient])) == expected
    assert float(gradient_norm([gradient])) == expected


@compiled
def test_chunks_are_added_in_256_sums_and_these_by_the_tree() -> None:
    one_by_one = [128, 64, 32, 16, 8, 4, 2, 1]
    for places, expected in ((range(256, 4096, 256), 1.0), (range(1, 4096, 256), UP), (one_by_one, 1.0)):
        gradients = [on_a_tie([], CHUNK), *[torch.zeros(1)] * 4095]
        for place in places:
            gradients[place] = torch.tensor([2.0**-27])
        assert float(in_order(gradients)) == expected
        assert float(gradient_norm(gradients)) == expected


@compiled
def test_random_places_are_added_in_the_documented_order() -> None:
    generator = torch.Generator().manual_seed(0)
    norms = []
    for count in range(1, 21):
        gradients = [on_a_tie(torch.randint(4 * LANES, CHUNK, (count % 20,), generator=generator).tolist())]
        gradients.append(torch.full((count // 8,), 2.0**-27))
        with threads(1 + count % 4):
            norms.append(float(gradient_norm(gradients)))
        assert norms[-1] == float(in_order(gradients))
    assert set(norms) == {1.0, UP}


@compiled
@DTYPES
def test_bits_depend_neither_on_threads_nor_on_addresses(dtype: torch.dtype) -> None:
    gradients = draw(dtype)
    norms = []
    for count, offset in ((1, 0), (1, 1), (2, 2), (4, 3), (4, 4)):
        moved = []
        for gradient in gradients:
            buffer = torch.full((gradient.numel() + offset + 3,), math.nan, dtype=dtype)  # NaN where nobody may read
            moved.append(buffer[offset : offset + gradient.numel()].view(gradient.shape).copy_(gradient))
        with threads(count):
            norms += words([gradient_norm(moved), gradient_norm(moved)])
    assert set(norms) == set(words([gradient_norm(gradients)]))


@compiled
def test_shapes_do_not_matter_and_thousands_of_tensors_do_not_either() -> None:
    gradients = draw(shapes=[(37 * i % 61, 1 + i % 3) for i in range(1000)])
    flat = [g.reshape(-1) for g in gradients]
    assert words([gradient_norm(gradients)]) == words([gradient_norm(flat)]) == words([in_order(gradients)])


@either
def test_what_is_not_finite_is_found_wherever_it_is(norm_of) -> None:
    for place, position in itertools.product((0, 5, len(SHAPES) - 1), (0, -1)):
        for bad in (math.inf, -math.inf, math.nan):
            gradients = draw()
            gradients[place].view(-1)[position] = bad
            norm = float(norm_of(gradients))
            assert math.isnan(norm) if math.isnan(bad) else norm == math.inf
    assert float(norm_of([torch.full((2,), 3e38)])) == math.inf  # beyond float32


@compiled
def test_squares_beyond_float32_are_not_the_norms_end() -> None:
    for value in (3e38, 1e30, 1e-30, 1e-45):
        gradient = torch.tensor([value, 0.0])
        assert words([gradient_norm([gradient])]) == words([gradient[0]])
    norm = gradient_norm([torch.full((1000,), 1e30), torch.full((1000,), 1e-30)])
    assert last_bits(norm, float(torch.tensor(1e30)) * math.sqrt(1000)) < 0.501


@either
def test_nothing_has_the_norm_zero(norm_of) -> None:
    for gradients in ([torch.empty(0)], [torch.empty(0, 3), torch.zeros(4)], [torch.zeros(())]):
        assert words([norm_of(gradients)]) == words([torch.zeros(())])


@compiled
@DTYPES
def test_the_op_can_be_checked_and_compiled(dtype: torch.dtype) -> None:
    def half(gradients: list[Tensor]) -> Tensor:
        return gradient_norm([g * 0.5 for g in gradients])

    gradients = draw(dtype, SHAPES[:6])
    torch.library.opcheck(torch.ops.sra_fast.gradient_norm.default, (gradients,))
    assert words([torch.compile(half, fullgraph=True, backend="aot_eager")(gradients)]) == words([half(gradients)])


REFUSED: dict[str, tuple[Callable[[], list[Tensor]], str]] = {
    "float64": (
        lambda: [torch.ones(2).double()],
        r"gradients\[0\]: dtype Double given; must be Float, BFloat16 or Half",
    ),
    "integers": (lambda: [torch.ones(2), torch.ones(2).long()], r"gradients\[1\]: dtype Long given"),
    "mixed": (lambda: [torch.ones(2), torch.ones(2).half()], r"gradients\[1\]: dtype Half .* of gradients\[0\], Float"),
    "strided": (lambda: [torch.ones(1), torch.ones(2), torch.ones(4)[::2]], r"gradients\[2\]: not contiguous"),
}


@compiled
@pytest.mark.parametrize("name", REFUSED)
def test_a_bad_call_is_refused_by_name(name: str) -> None:
    gradients, message = REFUSED[name]
    with pytest.raises(RuntimeError, match=rf"^gradient_norm: {message}"):
        gradient_norm(gradients())


@either
def test_no_gradients_are_refused(norm_of) -> None:
    with pytest.raises(RuntimeError):
        norm_of([])


@compiled
@pytest.mark.slow
def test_sizes_beyond_32_bits() -> None:
    """2^31 + 7 values, 4.3 GB: all count, the last as well."""
    size = 2**31 + 7
    if os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") < 6 * 2**30:
        pytest.skip("needs 6 GiB of free memory")
    gradient = torch.ones(size, dtype=BF16)
    assert last_bits(gradient_norm([gradient]), math.sqrt(size)) < 0.501
    gradient[-1] = 2.0**20
    assert last_bits(gradient_norm([gradient]), math.sqrt(size - 1 + 2.0**40)) < 0.501
    gradient[-7:] = math.nan
    assert gradient_norm([gradient]).isnan()


@pytest.mark.parametrize("chunk", [128, 4096])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_of_squares_of_chunks_do_not_depend_on_where_these_are(chunk: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    gradient = torch.randn(5 * chunk + 7, generator=generator).to(dtype)
    expected = torch.stack([part.double().square().sum() for part in gradient.split(chunk)])
    pieces = [gradient[: 2 * chunk], gradient[2 * chunk : 5 * chunk], gradient[5 * chunk :]]
    for function in (square_sums_ref, square_sums):
        if function is square_sums and library.why_unavailable():
            continue
        sums = function([gradient], chunk)
        torch.testing.assert_close(sums, expected, rtol=1e-13, atol=0)
        assert torch.equal(function(pieces, chunk), sums)
