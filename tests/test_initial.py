"""Initial weights: the published distributions, and the position table of DiT's meshgrid."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from sra_fast.config import ModelConfig
from sra_fast.kernels.philox import Draw, uniforms
from sra_fast.model.initial import initial_weights, position_table
from sra_fast.model.public_weights import shapes

CPU = torch.device("cpu")
XAVIER = {
    "x_embedder.proj.weight",
    *(f"blocks.{i}.{name}.weight" for i in (0, 1) for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")),
    "ap_head.linear1.weight",
    "ap_head.linear2.weight",
}
NORMAL = {"t_embedder.mlp.0.weight", "t_embedder.mlp.2.weight", "y_embedder.embedding_table.weight"}
ONES = {f"blocks.{i}.attn.{q}_norm.weight" for i in (0, 1) for q in "qk"}


@pytest.fixture(scope="module")
def config() -> ModelConfig:
    """Wide enough for statistics."""
    return ModelConfig(depth=2, hidden=128, heads=2, patch=2, input_size=8, channels=4, classes=100, qk_norm=True)


@pytest.fixture(scope="module")
def weights(config: ModelConfig) -> dict[str, Tensor]:
    return initial_weights(config, 0, CPU)


def test_every_parameter_has_a_value_and_all_others_are_zero(config: ModelConfig, weights: dict[str, Tensor]) -> None:
    assert {name: value.shape for name, value in weights.items()} == shapes(config)
    for name, value in weights.items():
        assert value.dtype == torch.float32
        if name in ONES:
            assert bool((value == 1).all()), name
        elif name not in XAVIER | NORMAL | {"pos_embed"}:
            assert not value.any(), name


@pytest.mark.parametrize("name", sorted(XAVIER))
def test_linear_layers_are_xavier_uniform(weights: dict[str, Tensor], name: str) -> None:
    matrix = weights[name].flatten(1)  # the patch projection as the linear layer it is
    bound, n = math.sqrt(6 / sum(matrix.shape)), matrix.numel()
    assert bound * (1 - 10 / n) < float(matrix.abs().max()) <= bound
    # The variance of U(-a, a) is a^2 / 3; that of its square 4 a^4 / 45.
    assert float(matrix.square().mean()) == pytest.approx(bound**2 / 3, abs=4 * bound**2 * math.sqrt(4 / 45 / n))
    assert float(matrix.mean()) == pytest.approx(0, abs=4 * bound / math.sqrt(3 * n))


@pytest.mark.parametrize("name", sorted(NORMAL))
def test_label_table_and_time_mlp_are_normal_with_deviation_002(weights: dict[str, Tensor], name: str) -> None:
    value, n = weights[name] / 0.02, weights[name].numel()
    assert float(value.square().mean()) == pytest.approx(1, abs=4 * math.sqrt(2 / n))
    assert float(value.pow(4).mean()) == pytest.approx(3, abs=4 * math.sqrt(96 / n))
    assert float(value.mean()) == pytest.approx(0, abs=4 / math.sqrt(n))


def test_values_are_the_parameters_own_philox_stream(config: ModelConfig) -> None:
    position = list(shapes(config)).index("blocks.1.attn.qkv.weight")
    u = uniforms(5, torch.tensor([position]), Draw.WEIGHT, 384 * 128)[0]
    expected = (math.sqrt(6 / 512) * (2 * u - 1)).view(384, 128)
    assert torch.equal(initial_weights(config, 5, CPU)["blocks.1.attn.qkv.weight"], expected)


def dit_table(d: int, side: int) -> np.ndarray:
    """DiT's get_2d_sincos_pos_embed: meshgrid with w first, so the first half of the channels follows the column."""
    grid = np.meshgrid(np.arange(side, dtype=np.float32), np.arange(side, dtype=np.float32))
    halves = []
    for coordinate in grid:
        omega = 1.0 / 10000 ** (np.arange(d // 4, dtype=np.float64) / (d / 4.0))
        angle = np.einsum("m,d->md", coordinate.reshape(-1).astype(np.float64), omega)
        halves.append(np.concatenate([np.sin(angle), np.cos(angle)], axis=1))
    return np.concatenate(halves, axis=1)


@pytest.mark.parametrize(("d", "side"), [(32, 4), (384, 16), (8, 1)])
def test_position_table_is_dits(d: int, side: int) -> None:
    table = position_table(d, side)
    assert table.shape == (1, side * side, d)
    np.testing.assert_allclose(table[0].numpy(), dit_table(d, side), atol=1e-7)
