"""The network as the public SiT-SRA code writes it: every block projects its own modulation, each operation is a line
of PyTorch, and nothing is arranged for speed.

Written anew from its description, with the project's own embedders, MLP and head, which leave no choice. It has the
same weights under the public names and computes the same numbers, which the benchmark's gate checks.

Sources: Peebles and Xie, "Scalable Diffusion Models with Transformers", 2023, section 3.2; timm's attention.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sra_fast.config import ModelConfig
from sra_fast.model.transformer import LabelEmbedder, Mlp, ProjectionHead, TimestepEmbedder


def norm_and_modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (B, T, D), shift and scale (B, D)."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class Attention(nn.Module):
    """As timm's: qkv, permuted to (3, B, H, T, d)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.hidden, 3 * config.hidden)
        self.proj = nn.Linear(config.hidden, config.hidden)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, tokens, width))


class Block(nn.Module):
    """Attention and MLP under adaLN-Zero."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attn = Attention(config)
        self.mlp = Mlp(config.hidden, config.mlp_ratio)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(config.hidden, 6 * config.hidden))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate1.unsqueeze(1) * self.attn(norm_and_modulate(x, shift1, scale1))
        return x + gate2.unsqueeze(1) * self.mlp(norm_and_modulate(x, shift2, scale2))


class FinalLayer(nn.Module):
    """adaLN and the projection to patches."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.linear = nn.Linear(config.hidden, config.patch**2 * config.output_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(config.hidden, 2 * config.hidden))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(norm_and_modulate(x, shift, scale))


class PublicNetwork(nn.Module):
    """SiT with SRA's head."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.x_embedder = nn.ModuleDict({"proj": nn.Conv2d(config.channels, config.hidden, config.patch, config.patch)})
        self.t_embedder = TimestepEmbedder(config.hidden)
        self.y_embedder = LabelEmbedder(config.classes, config.hidden)
        self.pos_embed = nn.Parameter(torch.zeros(1, config.tokens, config.hidden), requires_grad=False)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.final_layer = FinalLayer(config)
        self.ap_head = ProjectionHead(config.hidden)

    def forward(
        self, x: Tensor, t: Tensor, labels: Tensor, tap: int, project: bool = True, stop: bool = False
    ) -> tuple[Tensor | None, Tensor]:
        """(prediction (B, C, H, W), output of block `tap` (B, T, D), passed through the head if `project`), tap counted
        from 1. `stop`: run nothing after the tap and return None for the prediction; the public code cannot."""
        x = self.x_embedder["proj"](x).flatten(2).transpose(1, 2) + self.pos_embed  # (B, T, D)
        c = self.t_embedder(t) + self.y_embedder(labels)  # (B, D)
        for number, block in enumerate(self.blocks, start=1):
            x = block(x, c)
            if number == tap:
                features = self.ap_head(x) if project else x
                if stop:
                    return None, features
        side, patch = self.config.input_size // self.config.patch, self.config.patch
        patches = self.final_layer(x, c).reshape(len(x), side, side, patch, patch, -1)
        return torch.einsum("nhwpqc->nchpwq", patches).reshape(len(x), -1, side * patch, side * patch), features
