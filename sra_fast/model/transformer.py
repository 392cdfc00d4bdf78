"""The diffusion transformer of DiT and SiT, with SRA's projection head.

    x (B, C, H, W) -> patches + positions -> L blocks modulated by time and class -> prediction (B, C_out, H, W)

B batch, T tokens = (H / p) (W / p), D width, p patch. Modules and parameters carry the public checkpoints' names, and
nothing here knows about dtype copies, compilation or devices: that is applied from outside.

Sources: Peebles and Xie, "Scalable Diffusion Models with Transformers" (DiT), 2023, section 3.2; Ma et al., "SiT",
2024; Jiang et al., "SRA", arXiv 2505.02831, section 3 (the head and the taps).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sra_fast.config import ModelConfig, refuse_unless
from sra_fast.kernels import implementation
from sra_fast.model.attention import attention

FREQUENCIES = 256  # width of the sinusoidal time embedding


class Ops(NamedTuple):
    """The implementations of the ops a block is made of (see sra_fast.kernels)."""

    adaln: Callable[..., Tensor]
    gated_adaln: Callable[..., tuple[Tensor, Tensor]]
    gated_residual: Callable[..., Tensor]

    @classmethod
    def select(cls, resolved: Mapping[str, str]) -> Ops:
        """The ops under a result of `kernels.resolve`."""
        return cls(*(implementation(op, resolved) for op in cls._fields))


REFERENCE = Ops.select(dict.fromkeys(Ops._fields, "reference"))


class PatchEmbed(nn.Module):
    """Non-overlapping p x p patches, each projected to D.

    A convolution by its parameters, as in the public checkpoints, but computed as the matrix product it is.
    """

    def __init__(self, patch: int, channels: int, hidden: int) -> None:
        super().__init__()
        self.patch = patch
        self.proj = nn.Conv2d(channels, hidden, kernel_size=patch, stride=patch)

    def forward(self, x: Tensor) -> Tensor:
        p = self.patch
        patches = x.unflatten(3, (-1, p)).unflatten(2, (-1, p))  # (B, C, h, p, w, q)
        patches = patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)  # (B, T, C p q)
        return F.linear(patches, self.proj.weight.flatten(1), self.proj.bias)  # (B, T, D)


class TimestepEmbedder(nn.Module):
    """Sinusoids of t, then an MLP."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(FREQUENCIES, hidden), nn.SiLU(), nn.Linear(hidden, hidden))

    @staticmethod
    def sinusoids(t: Tensor) -> Tensor:
        """cos and sin of t at 128 frequencies from 1 down to 1/10,000: (B,) float32 -> (B, 256) float32."""
        half = FREQUENCIES // 2
        exponent = torch.arange(half, dtype=torch.float32, device=t.device) / half
        angle = t.float()[:, None] * (-math.log(10_000) * exponent).exp()
        return torch.cat([angle.cos(), angle.sin()], dim=-1)

    def forward(self, t: Tensor) -> Tensor:
        return self.mlp(self.sinusoids(t).to(self.mlp[0].weight.dtype))  # (B, D)


class LabelEmbedder(nn.Module):
    """A table of class vectors; the last row stands for "no label"."""

    def __init__(self, classes: int, hidden: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(classes + 1, hidden)

    def forward(self, labels: Tensor) -> Tensor:
        return self.embedding_table(labels)  # (B, D)


class Attention(nn.Module):
    """Multi-head self-attention with optional normalisation of queries and keys."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads, self.backend = config.heads, config.attention
        self.qkv = nn.Linear(config.hidden, 3 * config.hidden)
        head = config.hidden // config.heads
        # PyTorch's own eps, 1e-5: the public networks build this part with timm's defaults, their blocks with 1e-6.
        self.q_norm = nn.LayerNorm(head) if config.qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(head) if config.qk_norm else nn.Identity()
        self.proj = nn.Linear(config.hidden, config.hidden)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # 3 x (B, H, T, d)
        out = attention(self.q_norm(q), self.k_norm(k), v, self.backend)  # (B, H, T, d)
        return self.proj(out.transpose(1, 2).flatten(2))  # (B, T, D)


class Mlp(nn.Module):
    """Linear, tanh-GELU, Linear."""

    def __init__(self, hidden: int, ratio: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(hidden, ratio * hidden)
        self.fc2 = nn.Linear(ratio * hidden, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


def modulation(hidden: int, vectors: int) -> nn.Sequential:
    """SiLU and a linear layer from the condition to so many D-vectors."""
    return nn.Sequential(nn.SiLU(), nn.Linear(hidden, vectors * hidden))


class Block(nn.Module):
    """Attention and MLP, each normalised, modulated and gated by the condition (adaLN-Zero)."""

    def __init__(self, config: ModelConfig, ops: Ops) -> None:
        super().__init__()
        self.ops = ops
        self.attn = Attention(config)
        self.mlp = Mlp(config.hidden, config.mlp_ratio)
        self.adaLN_modulation = modulation(config.hidden, 6)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=-1)  # 6 x (B, D), views
        h = self.ops.adaln(x, shift1, scale1)  # (B, T, D)
        x, h = self.ops.gated_adaln(x, self.attn(h), gate1, shift2, scale2)  # 2 x (B, T, D)
        return self.ops.gated_residual(x, self.mlp(h), gate2)  # (B, T, D)


class ProjectionHead(nn.Module):
    """SRA's head on the student's features: Linear D -> 2D, SiLU, Linear 2D -> D."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.linear1 = nn.Linear(hidden, 2 * hidden)
        self.linear2 = nn.Linear(2 * hidden, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear2(F.silu(self.linear1(x)))


class FinalLayer(nn.Module):
    """adaLN and the projection from a token to its patch."""

    def __init__(self, config: ModelConfig, ops: Ops) -> None:
        super().__init__()
        self.ops = ops
        self.linear = nn.Linear(config.hidden, config.patch**2 * config.output_channels)
        self.adaLN_modulation = modulation(config.hidden, 2)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=-1)  # 2 x (B, D)
        return self.linear(self.ops.adaln(x, shift, scale))  # (B, T, p p C_out)


class Transformer(nn.Module):
    """SiT or DiT with SRA's head.

    Args:
        config: with input size, channels and classes filled in.
        ops: implementations of the blocks' ops.
    """

    def __init__(self, config: ModelConfig, ops: Ops = REFERENCE) -> None:
        super().__init__()
        for name in ("input_size", "channels", "classes"):
            refuse_unless(
                getattr(config, name) > 0, f"model.{name.replace('_', '-')}", getattr(config, name), "must be positive"
            )
        self.config = config
        self.x_embedder = PatchEmbed(config.patch, config.channels, config.hidden)
        self.t_embedder = TimestepEmbedder(config.hidden)
        self.y_embedder = LabelEmbedder(config.classes, config.hidden)
        self.pos_embed = nn.Parameter(torch.zeros(1, config.tokens, config.hidden), requires_grad=False)
        self.blocks = nn.ModuleList(Block(config, ops) for _ in range(config.depth))
        self.final_layer = FinalLayer(config, ops)
        self.ap_head = ProjectionHead(config.hidden)

    def forward(self, x: Tensor, t: Tensor, labels: Tensor, tap: int = 0) -> tuple[Tensor, Tensor | None]:
        """Prediction, and the projected features of one block.

        Args:
            x: (B, C, H, W).
            t: (B,) float32: time in [0, 1] for SiT, integer-valued step for DiT.
            labels: (B,) int64; config.classes stands for "no label".
            tap: 1-based block whose output goes through the head; 0 = none.

        Returns:
            (prediction (B, C_out, H, W), features (B, T, D) or None), in the weights' dtype.
        """
        h, c = self._embed(x, t, labels)  # (B, T, D), (B, D)
        features = None
        for number, block in enumerate(self.blocks, start=1):
            h = self._run(block, number, h, c)  # (B, T, D)
            if number == tap:
                features = self.ap_head(h)  # (B, T, D)
        return self._unpatchify(self.final_layer(h, c)), features

    def features(self, x: Tensor, t: Tensor, labels: Tensor, tap: int) -> Tensor:
        """Output of block `tap` (1-based), (B, T, D). Later blocks, head and final layer are not run. Arguments as
        `forward`."""
        h, c = self._embed(x, t, labels)
        for number, block in enumerate(self.blocks[:tap], start=1):
            h = self._run(block, number, h, c)
        return h

    def _embed(self, x: Tensor, t: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        tokens = self.x_embedder(x.to(self.pos_embed.dtype)) + self.pos_embed  # (B, T, D)
        return tokens, self.t_embedder(t) + self.y_embedder(labels)  # (B, T, D), (B, D)

    def _run(self, block: Block, number: int, h: Tensor, c: Tensor) -> Tensor:
        every = self.config.checkpoint_every
        if every and number % every == 0 and torch.is_grad_enabled():
            # Nothing in a block is random, and reading a generator's state is refused while a CUDA graph is captured.
            return checkpoint(block, h, c, use_reentrant=False, preserve_rng_state=False)
        return block(h, c)

    def _unpatchify(self, patches: Tensor) -> Tensor:
        """(B, T, p p C_out) -> (B, C_out, H, W)."""
        side, patch = self.config.input_size // self.config.patch, self.config.patch
        patches = patches.unflatten(1, (side, side)).unflatten(3, (patch, patch, -1))  # (B, h, w, p, q, C_out)
        return patches.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


def around(config: ModelConfig, tensors: dict[str, Tensor], ops: Ops = REFERENCE) -> Transformer:
    """A transformer whose parameters are the given tensors themselves, not copies; in eval mode and without
    gradients."""
    with torch.device("meta"):
        model = Transformer(config, ops)
    model.load_state_dict(tensors, assign=True)
    return model.eval().requires_grad_(False)
