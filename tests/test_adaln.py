"""adaLN: the reference against its formula in float64, the kernels against the reference."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import pytest
import torch
from interpreter import DEVICE, assert_as_exact, inside, kernel, mutant, poisoned, run_interpreted  # noqa: F401
from torch import Tensor

from sra_fast import kernels
from sra_fast.kernels import adaln as ours
from sra_fast.kernels import rows
from sra_fast.kernels.adaln import adaln, adaln_ref
from sra_fast.kernels.language import AVAILABLE, why_unavailable

EPS = 1e-6
FULL, HALF, BRAIN = torch.float32, torch.float16, torch.bfloat16


def formula(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LayerNorm(x) * (1 + scale) + shift in numpy float64; mean and biased variance over the last axis."""
    x, shift, scale = (value.detach().double().numpy() for value in (x, shift, scale))
    centred = x - x.mean(axis=2, keepdims=True)
    normed = centred / np.sqrt((centred**2).mean(axis=2, keepdims=True) + EPS)
    return torch.from_numpy(normed * (1 + scale[:, None, :]) + shift[:, None, :])


def draw(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


@pytest.mark.parametrize("shape", [(2, 5, 8), (1, 1, 16), (3, 4, 33)])
def test_is_its_formula(shape: tuple[int, int, int]) -> None:
    x, shift, scale = draw(shape, shape[::2], shape[::2])
    torch.testing.assert_close(adaln_ref(x, shift, scale), formula(x, shift, scale), atol=1e-12, rtol=1e-12)


def test_is_layer_norm_without_affine_where_the_modulation_is_zero() -> None:
    (x,) = draw((2, 5, 8))
    zero = torch.zeros(2, 8, dtype=torch.float64)
    norm = torch.nn.LayerNorm(8, elementwise_affine=False, eps=EPS, dtype=torch.float64)
    torch.testing.assert_close(adaln_ref(x, zero, zero), norm(x), atol=1e-12, rtol=1e-12)


def test_eps_is_added_to_the_variance() -> None:
    x = torch.full((1, 1, 4), 3.0, dtype=torch.float64)
    x[0, 0, 0] += 1e-3  # a variance of the size of eps
    zero = torch.zeros(1, 4, dtype=torch.float64)
    torch.testing.assert_close(adaln_ref(x, zero, zero), formula(x, zero, zero), rtol=1e-9, atol=0)


def test_gradients() -> None:
    inputs = [value.requires_grad_() for value in draw((2, 3, 6), (2, 6), (2, 6))]
    assert torch.autograd.gradcheck(adaln_ref, inputs)


def within_bf16(h: Tensor, truth: Tensor) -> bool:
    """Half a bf16 ulp (relative 2^-8) for the one rounding at the end, and a floor for fp32 statistics: x up to 20 at
    a spread of about 1, 2^-24 relative, a few roundings."""
    return bool(((h.double() - truth).abs() <= 2**-8 * truth.abs() * 1.001 + 8 * 20 * 2**-24 * (1 + truth.abs())).all())


def test_bf16_input_is_normalised_with_fp32_statistics() -> None:
    x, shift, scale = draw((4, 16, 64), (4, 64), (4, 64))
    x = (x + 16).bfloat16()  # far from zero, where statistics in bf16 would be worthless
    shift, scale = shift.float(), scale.float()
    h = adaln_ref(x, shift, scale)
    assert h.dtype == torch.bfloat16
    assert within_bf16(h, formula(x, shift, scale))
    centred = x - x.mean(-1, keepdim=True)
    in_bf16 = centred / (centred.square().mean(-1, keepdim=True) + EPS).sqrt()
    in_bf16 = in_bf16 * (1 + scale.bfloat16()[:, None]) + shift.bfloat16()[:, None]
    assert not within_bf16(in_bf16, formula(x, shift, scale)), "the bound would not catch bf16 statistics"


def test_strided_views_of_one_modulation_tensor() -> None:
    x, modulation = draw((2, 5, 8), (2, 48))
    shift, scale = modulation.chunk(6, dim=-1)[:2]
    assert not shift.is_contiguous()
    assert torch.equal(adaln_ref(x, shift, scale), adaln_ref(x, shift.contiguous(), scale.contiguous()))


# (B, T, D), dtype of x, dtype of the modulation: one of everything, primes, D a power of two and one more, both tiles
# full (72 = 64 + 8, 384, 1152), one sample, one token, more tokens than one program has.
CASES = [
    ((1, 1, 1), FULL, FULL),
    ((3, 5, 1), FULL, FULL),
    ((3, 7, 13), FULL, FULL),
    ((2, 19, 11), BRAIN, BRAIN),
    ((2, 3, 64), HALF, HALF),
    ((2, 3, 65), HALF, FULL),
    ((4, 1, 72), BRAIN, FULL),
    ((1, 5, 384), HALF, HALF),
    ((2, 2, 1152), BRAIN, FULL),
    ((2, 2, 1153), FULL, BRAIN),
]


def drawn(shape: tuple[int, int, int], dtype: torch.dtype, modulation: torch.dtype) -> tuple[list[Tensor], Tensor]:
    """(x, shift, scale) and the gradient of h, none contiguous."""
    generator = torch.Generator().manual_seed(0)
    x, above = (inside(shape, dtype, generator) for _ in range(2))
    return [x, *(inside(shape[::2], modulation, generator) for _ in range(2))], above


def results(function: Callable[..., Tensor], inputs: list[Tensor], above: Tensor, eps: float = EPS) -> list[Tensor]:
    """h and the gradients of x, shift, scale."""
    leaves = [value.detach().requires_grad_() for value in inputs]
    h = function(*leaves, eps)
    return [h.detach(), *torch.autograd.grad(h, leaves, above)]


def compare(function: Callable[..., Tensor], shape: tuple[int, int, int], dtype: torch.dtype, modulation: torch.dtype):
    inputs, above = drawn(shape, dtype, modulation)
    truth = results(adaln_ref, [value.double() for value in inputs], above.double())
    assert_as_exact(
        results(function, inputs, above), results(adaln_ref, inputs, above), truth, terms=max(shape[1], shape[2])
    )


def test_kernels_in_the_interpreter() -> None:
    run_interpreted(__file__)


@kernel
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("shape", "dtype", "modulation"), CASES, ids=str)
def test_kernel_is_as_exact_as_pytorch(shape: tuple, dtype: torch.dtype, modulation: torch.dtype) -> None:
    compare(adaln, shape, dtype, modulation)


FAULTS = {
    "wrong reduction axis": ("adaln", "dshift_a + dh_a,", "dshift_a + tl.sum(dh_a, axis=0),"),
    "dropped tail mask": (
        "rows",
        "b = tl.load(pointer + tail, mask=tail < WIDTH, other=0.0)",
        "b = tl.load(pointer + tail)",
    ),
    "batch row off by one": ("adaln", "shift + sample * shift_batch", "shift + (sample + 1) * shift_batch"),
}


@kernel
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_in_a_kernel_is_found(fault: str, tmp_path) -> None:
    with pytest.raises(AssertionError, match=r"error .* allowed"):
        compare(mutant(tmp_path, "adaln", *FAULTS[fault]).adaln, (3, 7, 13), FULL, FULL)


@kernel
def test_a_copy_of_the_kernel_without_a_fault_passes(tmp_path) -> None:
    compare(mutant(tmp_path, "adaln", "adaln", "dshift_a + dh_a,", "dshift_a + dh_a,").adaln, (3, 7, 13), FULL, FULL)


@kernel
@pytest.mark.usefixtures("poisoned")
def test_two_runs_of_a_kernel_are_equal_in_every_bit() -> None:
    inputs, above = drawn((2, 19, 11), FULL, FULL)
    for first, second in zip(results(adaln, inputs, above), results(adaln, inputs, above), strict=True):
        assert torch.equal(first, second)


@kernel
def test_kernel_takes_expanded_gradients_and_another_eps() -> None:
    inputs, _ = drawn((2, 3, 8), FULL, FULL)
    above = torch.ones((), device=DEVICE).expand(2, 3, 8)  # of a sum: all strides are 0
    truth = results(adaln_ref, [value.double() for value in inputs], above.double(), 0.5)
    assert_as_exact(results(adaln, inputs, above, 0.5), results(adaln_ref, inputs, above, 0.5), truth, terms=8)


@kernel
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("shape", [(0, 3, 8), (3, 0, 8)])
def test_kernel_of_nothing_is_nothing(shape: tuple[int, int, int]) -> None:
    inputs = [torch.ones(size, device=DEVICE) for size in (shape, shape[::2], shape[::2])]
    h, dx, dshift, dscale = results(adaln, inputs, torch.ones(shape, device=DEVICE))
    assert h.shape == dx.shape == shape
    assert torch.equal(dshift, torch.zeros(shape[::2], device=DEVICE))
    assert torch.equal(dscale, torch.zeros(shape[::2], device=DEVICE))


@kernel
@pytest.mark.usefixtures("poisoned")
def test_kernel_adds_up_more_chunks_than_it_takes_at_a_time() -> None:
    partials = torch.randn(3, 2, 2 * rows.TOTAL_ROWS + 3, rows.TOTAL_COLUMNS + 5, device=DEVICE)
    dtypes = (FULL, BRAIN, HALF)
    for value, sums, dtype in zip(rows.total(partials, *dtypes), partials.double().sum(2), dtypes, strict=True):
        assert value.dtype == dtype
        torch.testing.assert_close(value.double(), sums, rtol=torch.finfo(dtype).eps / 2, atol=1e-5)


@kernel
def test_kernel_is_an_op_that_torch_can_check_and_compile() -> None:
    inputs, above = drawn((2, 3, 8), FULL, BRAIN)
    leaves = [value.detach().requires_grad_() for value in inputs]
    torch.library.opcheck(torch.ops.sra_fast.adaln, (*leaves, EPS))
    _, mean, rstd = torch.ops.sra_fast.adaln(*inputs, EPS)
    torch.library.opcheck(torch.ops.sra_fast.adaln_backward, (above, inputs[0], inputs[2], mean, rstd, inputs[1].dtype))
    compiled = torch.compile(adaln, fullgraph=True, backend="aot_eager")
    for got, wanted in zip(results(compiled, inputs, above), results(adaln, inputs, above), strict=True):
        assert torch.equal(got, wanted)


WRONG = {
    "x: shape (2, 3) given; must be (B, T, D)": lambda x, shift, scale: (x[:, :, 0], shift, scale),
    "with D from 1 to 8,192": lambda x, shift, scale: (x.new_ones(1, 1, 8193), shift, scale),
    "shift: shape (1, 8) given; must be (2, 8)": lambda x, shift, scale: (x, shift[:1], scale),
    "scale: shape (2, 1, 8) given; must be (2, 8)": lambda x, shift, scale: (x, shift, scale[:, None]),
    "x: dtype torch.float64 given": lambda x, shift, scale: (x.double(), shift, scale),
    "scale: dtype torch.int64 given; must be one of torch.float32": lambda x, shift, scale: (x, shift, scale.long()),
    "scale: device meta given": lambda x, shift, scale: (x, shift, scale.to("meta")),
    "x: strides (24, 1, 3) given; the last must be 1": lambda x, shift, scale: (
        x.transpose(1, 2).contiguous().transpose(1, 2),
        shift,
        scale,
    ),
    "shift: strides (1, 2) given; the last must be 1": lambda x, shift, scale: (x, shift.t().contiguous().t(), scale),
}


@kernel
@pytest.mark.parametrize("message", WRONG)
def test_kernel_refuses_what_it_cannot_take(message: str) -> None:
    inputs = [torch.ones(size, device=DEVICE) for size in ((2, 3, 8), (2, 8), (2, 8))]
    with pytest.raises(ValueError, match=re.escape(message)):
        adaln(*WRONG[message](*inputs))


@pytest.mark.skipif(not why_unavailable(), reason="kernels run here")
def test_without_a_gpu_the_fused_op_is_refused_in_one_line() -> None:
    with pytest.raises(ValueError, match=r"^kernels.adaln: 'fused' given, but (there is no CUDA|Triton is not)[^\n]*$"):
        kernels.resolve({"adaln": "fused"})
    with pytest.raises(ValueError, match=r"^a fused kernel cannot run: [^\n]*$"):
        adaln(torch.ones(1, 1, 8), torch.ones(1, 8), torch.ones(1, 8))


def test_auto_is_the_reference_until_a_benchmark_shows_more() -> None:
    assert kernels.resolve({"adaln": "auto", "gated_adaln": "auto"}) == {
        "adaln": "reference",
        "gated_adaln": "reference",
    }


@pytest.mark.parametrize("width", [*range(1, 130), 384, 768, 1024, 1152, 1153, 2047, 2048, 4097, 8191, 8192])
def test_two_tiles_hold_a_row(width: int) -> None:
    main, tail, warps, _ = rows.tiles(width)
    for number in (main, tail, warps):
        assert number & (number - 1) == 0
    assert main <= width <= main + tail
    assert warps <= 16
    if width in (384, 768, 1024, 1152):
        assert main + tail == width


@pytest.mark.skipif(not AVAILABLE, reason="Triton is not installed")
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_both_passes_compile_for_every_architecture(capability: int) -> None:
    from benchmarks.harness.machine_code import compiled, recorded

    x, vector, statistic = torch.empty(2, 64, 384, dtype=BRAIN), torch.empty(2, 384), torch.empty(2, 64)
    with recorded() as launches:
        ours._launch_forward(x, vector, vector, EPS)
        ours._launch_backward(x, x, vector, statistic, statistic, FULL)
    assert [launch.name for launch in launches] == [
        "adaln._adaln_forward",
        "adaln._adaln_backward",
        "rows._adaln_total",
    ]
    for launch in launches:
        assert compiled(launch, capability).asm["cubin"]
