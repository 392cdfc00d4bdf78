"""Initial weights, and the fixed position table.

Random numbers come from Philox with the parameter's position in the public order as n, so that a seed gives the same
weights on every device and for any number of processes (up to the last bits of log, cos and sin in the normals).

Source: the public DiT code: Xavier-uniform linear layers with zero bias, N(0, 0.02) for the label table and the time
MLP, zeros for every modulation and for the final layer; SRA's head as the other linear layers.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sra_fast.config import ModelConfig
from sra_fast.kernels.philox import Draw, normals, uniforms
from sra_fast.model.public_weights import shapes

ZERO = ("adaLN_modulation.1.weight", "final_layer.linear.weight")
_NORMAL = ("y_embedder.embedding_table.weight", "t_embedder.mlp.0.weight", "t_embedder.mlp.2.weight")
_NORMAL_STD = 0.02


@torch.no_grad()
def initial_weights(config: ModelConfig, seed: int, device: torch.device) -> dict[str, Tensor]:
    """A value for every parameter, by public name, float32 on `device`."""
    return {
        name: _initial(name, shape, config, seed, position, device).to(device)
        for position, (name, shape) in enumerate(shapes(config).items())
    }


def _initial(
    name: str, shape: torch.Size, config: ModelConfig, seed: int, position: int, device: torch.device
) -> Tensor:
    if name == "pos_embed":
        return position_table(config.hidden, config.input_size // config.patch)
    if name.endswith(("q_norm.weight", "k_norm.weight")):
        return torch.ones(shape)
    if name.endswith(("bias", *ZERO)):
        return torch.zeros(shape)
    number = torch.tensor([position], device=device)
    if name.endswith(_NORMAL):
        value = _NORMAL_STD * normals(seed, number, Draw.WEIGHT, shape.numel())
    else:
        # The patch projection is a linear layer: fan in = C p^2.
        bound = math.sqrt(6 / (shape[0] + shape[1:].numel()))
        value = bound * (2 * uniforms(seed, number, Draw.WEIGHT, shape.numel()) - 1)
    return value.view(shape)


def position_table(hidden: int, side: int) -> Tensor:
    """Sines and cosines of the 2-D patch position: (1, side^2, hidden) float32.

    The first half of the channels encodes the column, the second half the row; in each, the sines of hidden / 4
    frequencies from 1 down to 1/10,000 come before the cosines.
    """
    quarter = hidden // 4
    frequency = 10_000 ** -(torch.arange(quarter, dtype=torch.float64) / quarter)
    angle = torch.arange(side, dtype=torch.float64)[:, None] * frequency  # (side, quarter)
    encoded = torch.cat([angle.sin(), angle.cos()], dim=1)  # (side, hidden / 2)
    column = encoded[None].expand(side, side, -1)
    row = encoded[:, None].expand(side, side, -1)
    return torch.cat([column, row], dim=-1).view(1, side * side, hidden).float()
