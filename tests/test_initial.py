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
from sra_fast.model.layout import joined
from sra_fast.model.public_weights import shapes
from sra_fast.model.transformer import REFERENCE, Transformer
from sra_fast.step.state import TrainState

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    """Wide enough for statistics."""
    config = ModelConfig(depth=2, hidden=128, heads=2, patch=2, input_size=8, channels=4, classes=100, qk_norm=True)
    return initial_weights(config, 0, CPU)


def test_every_parameter_has_a_value_of_its_shape_in_fp32(tiny) -> None:
    model = Transformer(tiny().model)
    values = initial_weights(model.config, 0, CPU)
    assert {name: v.shape for name, v in values.items()} == shapes(model.config)
    assert {v.dtype for v in values.values()} == {torch.float32}


def kind(name: str) -> str:
    """What the public DiT code (and SRA's, for the head) does with a parameter."""
    if name == "pos_embed":
        return "table"
    if "_norm." in name:
        return "one" if name.endswith("weight") else "zero"
    if name.endswith("bias") or "adaLN_modulation" in name or name == "final_layer.linear.weight":
        return "zero"
    return "normal" if name.startswith(("y_embedder", "t_embedder")) else "xavier"


def test_zeros_and_ones_where_published(weights: dict[str, Tensor]) -> None:
    for name, value in weights.items():
        if kind(name) in ("zero", "one"):
            assert bool((value == float(kind(name) == "one")).all()), name
        else:
            assert float(value.std()) > 0, name


def test_linear_layers_are_xavier_uniform(weights: dict[str, Tensor]) -> None:
    names = [name for name in weights if kind(name) == "xavier"]
    ends = {name.split(".", 2)[-1] if name.startswith("blocks") else name for name in names}
    assert ends == {
        "x_embedder.proj.weight",
        "attn.qkv.weight",
        "attn.proj.weight",
        "mlp.fc1.weight",
        "mlp.fc2.weight",
        "ap_head.linear1.weight",
        "ap_head.linear2.weight",
    }
    for name in names:
        matrix = weights[name].flatten(1)  # the patch projection as the linear layer it is
        bound, n = math.sqrt(6 / sum(matrix.shape)), matrix.numel()
        assert bound * (1 - 10 / n) < float(matrix.abs().max()) <= bound, name
        # The variance of U(-a, a) is a^2 / 3; that of its square 4 a^4 / 45.
        assert float(matrix.square().mean()) == pytest.approx(bound**2 / 3, abs=4 * bound**2 * math.sqrt(4 / 45 / n))
        assert float(matrix.mean()) == pytest.approx(0, abs=4 * bound / math.sqrt(3 * n)), name


def test_label_table_and_time_mlp_are_normal_with_deviation_002(weights: dict[str, Tensor]) -> None:
    names = [name for name in weights if kind(name) == "normal"]
    assert names == ["t_embedder.mlp.0.weight", "t_embedder.mlp.2.weight", "y_embedder.embedding_table.weight"]
    for name in names:
        value, n = weights[name] / 0.02, weights[name].numel()
        assert float(value.square().mean()) == pytest.approx(1, abs=4 * math.sqrt(2 / n)), name
        assert float(value.pow(4).mean()) == pytest.approx(3, abs=4 * math.sqrt(96 / n)), name
        assert float(value.mean()) == pytest.approx(0, abs=4 / math.sqrt(n)), name


def test_no_two_parameters_share_their_numbers(weights: dict[str, Tensor]) -> None:
    drawn = [v.flatten()[:64] / v.abs().max() for name, v in weights.items() if kind(name) in ("xavier", "normal")]
    correlation = torch.corrcoef(torch.stack(drawn)) - torch.eye(len(drawn))
    assert float(correlation.abs().max()) < 0.6  # 64 numbers: 4.8 standard errors


def test_the_seed_decides_every_random_value(tiny) -> None:
    model = Transformer(tiny().model)
    one, again, other = (initial_weights(model.config, seed, CPU) for seed in (0, 0, 2**32))
    for name in one:
        assert torch.equal(one[name], again[name]), name
        if kind(name) in ("xavier", "normal"):
            assert not (one[name] == other[name]).any(), name


def test_values_are_the_parameters_own_philox_stream(tiny) -> None:
    model = Transformer(tiny().model)
    values = initial_weights(model.config, 5, CPU)
    position = list(shapes(model.config)).index("blocks.1.attn.qkv.weight")
    u = uniforms(5, torch.tensor([position]), Draw.WEIGHT, 96 * 32)[0]
    assert torch.equal(values["blocks.1.attn.qkv.weight"], (math.sqrt(6 / 128) * (2 * u - 1)).view(96, 32))


def test_the_compute_type_does_not_matter(tiny) -> None:
    config = tiny()
    expected = joined(initial_weights(config.model, 0, CPU))
    for values in (
        TrainState.create(config, REFERENCE, CPU, torch.float32).weights,
        TrainState.create(config, REFERENCE, CPU, torch.bfloat16).weights,
    ):
        for name, value in expected.items():
            assert value.device == CPU
            assert value.dtype == values[name].dtype == torch.float32
            assert torch.equal(value, values[name]), name


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
def test_position_table_is_dits_with_w_first(d: int, side: int) -> None:
    table = position_table(d, side)
    assert table.shape == (1, side * side, d)
    np.testing.assert_allclose(table[0].numpy(), dit_table(d, side), atol=1e-7)


def test_w_first_can_be_told_from_h_first() -> None:
    table = position_table(32, 4)[0].view(4, 4, 32)
    assert torch.equal(table[0, :, :16], table[3, :, :16])  # the first half knows nothing of the row
    assert not torch.equal(table[0, 1, :16], table[0, 2, :16])
