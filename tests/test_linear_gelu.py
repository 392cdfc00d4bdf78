"""A linear layer with GELU as its epilogue: the reference against its formula, the operator on a GPU, and where a
network uses it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from interpreter import assert_as_exact
from test_transformer import inputs, network  # noqa: F401
from torch import Tensor

from sra_fast.kernels.linear_gelu import linear_gelu, linear_gelu_ref
from sra_fast.model.backends import REFERENCE


def draw(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def test_the_reference_is_its_formula() -> None:
    x, weight, bias = draw((2, 3, 5), (7, 5), (7,))
    u = x.numpy() @ weight.numpy().T + bias.numpy()
    expected = 0.5 * u * (1 + np.tanh(np.sqrt(2 / np.pi) * (u + 0.044715 * u**3)))
    np.testing.assert_allclose(linear_gelu_ref(x, weight, bias).numpy(), expected, rtol=1e-13, atol=1e-13)


def test_a_cpu_is_refused_because_its_operator_is_another_gelu() -> None:
    with pytest.raises(ValueError, match=r"^x: device cpu given; must be a CUDA device$"):
        linear_gelu(*draw((2, 3, 5), (7, 5), (7,)))


@pytest.mark.parametrize("needs_gradient", [True, False])
def test_a_network_uses_it_where_no_gradient_is_needed(network, needs_gradient: bool) -> None:  # noqa: F811
    calls = []

    def counted(*arguments: Tensor) -> Tensor:
        calls.append(arguments)
        return linear_gelu_ref(*arguments)

    model = network(replace(REFERENCE, linear_gelu=counted))
    with torch.set_grad_enabled(needs_gradient):
        model.features(*inputs(model.config), tap=3)
    assert len(calls) == (0 if needs_gradient else 3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("width", [384, 1152])
def test_the_epilogue_is_as_exact_as_pytorch_and_is_not_decomposed(width: int, dtype: torch.dtype) -> None:
    x, weight, bias = (tensor.cuda() for tensor in draw((4, 256, width), (4 * width, width), (4 * width,), dtype=dtype))
    weight /= width**0.5
    truth = linear_gelu_ref(x.double(), weight.double(), bias.double())
    result = linear_gelu(x, weight, bias)
    assert_as_exact([result], [linear_gelu_ref(x, weight, bias)], [truth], terms=width)
    compiled = torch.compile(linear_gelu, fullgraph=True, dynamic=False)
    assert torch.equal(compiled(x, weight, bias), result)
    torch.library.opcheck(torch.ops.sra_fast.linear_gelu, (x, weight, bias))
