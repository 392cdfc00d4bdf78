"""The diffusion transformer of DiT and SiT, with SRA's projection head.

    x (B, C, H, W) -> patches + positions -> L blocks modulated by time and class -> prediction (B, C_out, H, W)

B batch, T tokens = (H / p) (W / p), D width, p patch, L blocks. Modules and parameters have the public checkpoints'
names, except that the modulations of all blocks are one matrix here (layout.py). Nothing here knows about dtype copies,
compilation or devices: these are applied from outside.

Sources: Peebles and Xie, "Scalable Diffusion Models with Transformers" (DiT), 2023, section 3.2; Ma et al., "SiT",
2024; Jiang et al., "SRA", arXiv 2505.02831, section 3 (the head and the taps).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sra_fast.config import ModelConfig
from sra_fast.errors import Refused
from sra_fast.model.backends import REFERENCE, Backends
from sra_fast.model.layout import PER_BLOCK, PER_FINAL_LAYER

FREQUENCIES = 256  # width of the sinusoidal time embedding
PER_NORM, PER_SEAM = 2, 3  # modulation vectors of a normalisation, and with the gate of the residual before it


class PatchEmbed(nn.Module):
    """Non-overlapping p x p patches, each projected to D.

    Its parameters are a convolution's, as in the public checkpoints, but it is computed as a matrix product.
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
    def frequencies(device: torch.device) -> Tensor:
        """(128,) float32, from 1 down to 1/10,000."""
        half = FREQUENCIES // 2
        exponent = torch.arange(half, dtype=torch.float32, device=device) / half
        return (-math.log(10_000) * exponent).exp()

    @staticmethod
    def sinusoids(t: Tensor) -> Tensor:
        """cos and sin of t at all frequencies: (B,) float32 -> (B, 256) float32."""
        angle = t.float()[:, None] * TimestepEmbedder.frequencies(t.device)
        return torch.cat([angle.cos(), angle.sin()], dim=-1)

    def forward(self, t: Tensor) -> Tensor:
        return self.mlp(self.sinusoids(t).to(next(self.mlp.parameters()).dtype))  # (B, D)


class LabelEmbedder(nn.Module):
    """A table of class vectors; the last row stands for "no label"."""

    def __init__(self, classes: int, hidden: int) -> None:
        super().__init__()
        # Given a weight, nn.Embedding draws none, for which it would import torch._dynamo: a second of every start.
        self.embedding_table = nn.Embedding(classes + 1, hidden, _weight=torch.empty(classes + 1, hidden))

    def forward(self, labels: Tensor) -> Tensor:
        return self.embedding_table(labels)  # (B, D)


class Attention(nn.Module):
    """Multi-head self-attention with optional normalisation of queries and keys. The bias of the output projection is
    left to the residual addition."""

    def __init__(self, config: ModelConfig, backends: Backends) -> None:
        super().__init__()
        self.heads, self.attend, self.qk_norm = config.heads, backends.attention, config.qk_norm
        self.qkv = nn.Linear(config.hidden, 3 * config.hidden)
        if self.qk_norm:
            head = config.hidden // config.heads
            # PyTorch's own eps, 1e-5: the public networks build this part with timm's defaults, their blocks with 1e-6.
            self.q_norm, self.k_norm = nn.LayerNorm(head), nn.LayerNorm(head)
        self.proj = nn.Linear(config.hidden, config.hidden)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))  # (B, T, 3, H, d)
        if self.qk_norm:
            q, k, v = qkv.unbind(2)
            qkv = torch.stack([self.q_norm(q), self.k_norm(k), v], dim=2)
        return F.linear(self.attend(qkv), self.proj.weight)  # (B, T, D)


class Mlp(nn.Module):
    """Linear, tanh-GELU, Linear, whose bias is left to the residual addition."""

    def __init__(self, hidden: int, ratio: int, backends: Backends) -> None:
        super().__init__()
        self.backends = backends
        self.fc1 = nn.Linear(hidden, ratio * hidden)
        self.fc2 = nn.Linear(ratio * hidden, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.backends.for_mlp()(x, self.fc1.weight, self.fc1.bias), self.fc2.weight)


class Block(nn.Module):
    """Attention and MLP, each normalised, modulated and gated by the condition (adaLN-Zero).

    A block starts after its first normalisation and ends with the first normalisation of the next block, or of the
    final layer. Each of its two residual additions is then one op with the normalisation that follows: add the branch's
    bias, gate, add, normalise, modulate.
    """

    def __init__(self, config: ModelConfig, backends: Backends) -> None:
        super().__init__()
        self.backends = backends
        self.attn = Attention(config, backends)
        self.mlp = Mlp(config.hidden, config.mlp_ratio, backends)

    def forward(self, x: Tensor, h: Tensor, middle: Tensor, end: Tensor) -> tuple[Tensor, Tensor | None]:
        """The next (x, h).

        Args:
            x: (B, T, D), the residual stream.
            h: (B, T, D), x normalised and modulated for this block's attention.
            middle: (B, 3, D): gate of attention, shift and scale of the MLP.
            end: (B, 3, D): gate of the MLP, shift and scale of the normalisation that follows; or the gate alone,
                (B, 1, D), if the next h is not needed, and None is returned for it.
        """
        x, h = self.backends.gated_adaln(x, self.attn(h), self.attn.proj.bias, middle)  # 2 x (B, T, D)
        branch, bias = self.mlp(h), self.mlp.fc2.bias  # (B, T, D), (D,)
        if end.shape[1] == 1:
            return self.backends.gated_residual(x, branch, bias, end), None
        return self.backends.gated_adaln(x, branch, bias, end)


class ProjectionHead(nn.Module):
    """SRA's head on the student's features: Linear D -> 2D, SiLU, Linear 2D -> D."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.linear1 = nn.Linear(hidden, 2 * hidden)
        self.linear2 = nn.Linear(2 * hidden, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear2(F.silu(self.linear1(x)))


class FinalLayer(nn.Module):
    """The projection from a token, normalised and modulated, to its patch: (B, T, D) -> (B, T, p p C_out)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.linear = nn.Linear(config.hidden, config.patch**2 * config.output_channels)

    def forward(self, h: Tensor) -> Tensor:
        return self.linear(h)


class Transformer(nn.Module):
    """SiT or DiT with SRA's head.

    Args:
        config: with input size, channels and classes filled in.
        backends: what computes the blocks' ops.
    """

    def __init__(self, config: ModelConfig, backends: Backends = REFERENCE) -> None:
        super().__init__()
        for name in ("input_size", "channels", "classes"):
            if getattr(config, name) <= 0:
                raise Refused(f"model.{name.replace('_', '-')}", getattr(config, name), "must be positive")
        self.config, self.backends = config, backends
        self.before: Callable[[str], None] = _nothing
        """Called with the prefix of a module's parameters, such as "blocks.3.", before they are used."""
        self.x_embedder = PatchEmbed(config.patch, config.channels, config.hidden)
        self.t_embedder = TimestepEmbedder(config.hidden)
        self.y_embedder = LabelEmbedder(config.classes, config.hidden)
        self.pos_embed = nn.Parameter(torch.zeros(1, config.tokens, config.hidden), requires_grad=False)
        self.blocks = nn.ModuleList(Block(config, backends) for _ in range(config.depth))
        self.modulation = nn.Linear(config.hidden, (PER_BLOCK * config.depth + PER_FINAL_LAYER) * config.hidden)
        self.final_layer = FinalLayer(config)
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
        depth = self.config.depth
        self._before_begin()
        x, h, vectors = self.begin(x, t, self.y_embedder(labels), PER_BLOCK * depth + PER_FINAL_LAYER)
        features = None
        for number, (block, modulation) in enumerate(zip(self.blocks, seams(vectors), strict=True), start=1):
            x, h = self._run(block, number, x, h, *modulation)  # 2 x (B, T, D)
            if number == tap:
                self.before("ap_head.")
                features = self.ap_head(x)  # (B, T, D)
        self.before("final_layer.")
        return self._unpatchify(self.final_layer(h)), features

    def features(self, x: Tensor, t: Tensor, labels: Tensor, tap: int) -> Tensor:
        """Output of block `tap` (1-based), (B, T, D). Later blocks, head and final layer are not run. Arguments as
        `forward`."""
        self._before_begin()
        x, h, vectors = self.begin(x, t, self.y_embedder(labels), PER_BLOCK * tap)
        for number, (block, modulation) in enumerate(zip(self.blocks[:tap], seams(vectors), strict=True), start=1):
            x, h = self._run(block, number, x, h, *modulation)
        return x

    def truncate_after(self, tap: int) -> Transformer:
        """Drop the modules that `features` up to this tap does not use. Returns the network."""
        del self.final_layer, self.ap_head
        self.blocks = self.blocks[:tap]
        return self

    @classmethod
    def from_tensors(
        cls, config: ModelConfig, tensors: Mapping[str, Tensor], backends: Backends = REFERENCE
    ) -> Transformer:
        """A network that shares `tensors` as its parameters (names as in memory, see layout.py), in eval mode and
        without gradients."""
        with torch.device("meta"):
            model = cls(config, backends)
        model.load_state_dict(tensors, assign=True)
        return model.eval().requires_grad_(False)

    def begin(self, x: Tensor, t: Tensor, label_vectors: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """What precedes the first block's attention. The label table is looked up outside: its gradient, if compiled,
        adds in varying order.

        Args:
            x, t: as `forward`.
            label_vectors: (B, D).
            count: number of modulation vectors to compute, in the order of layout.py.

        Returns:
            (tokens (B, T, D), the same normalised and modulated for block 1, the vectors (B, count, D)).
        """
        tokens = self.x_embedder(x.to(self.pos_embed.dtype)) + self.pos_embed  # (B, T, D)
        condition = F.silu(self.t_embedder(t) + label_vectors)  # (B, D)
        weight, bias, rows = self.modulation.weight, self.modulation.bias, count * self.config.hidden
        if rows < len(weight):  # a slice of all rows would cost the backward pass a copy of the gradient
            weight, bias = weight[:rows], bias[:rows]
        vectors = F.linear(condition, weight, bias).unflatten(-1, (count, -1))
        return tokens, self.backends.adaln(tokens, vectors[:, :PER_NORM]), vectors

    def _before_begin(self) -> None:
        for module in ("x_embedder.", "t_embedder.", "y_embedder.", "modulation."):
            self.before(module)

    def _run(
        self, block: nn.Module, number: int, x: Tensor, h: Tensor, middle: Tensor, end: Tensor
    ) -> tuple[Tensor, Tensor]:
        self.before(f"blocks.{number - 1}.")
        every = self.config.checkpoint_every
        if every and number % every == 0 and torch.is_grad_enabled():
            # Nothing in a block is random, and CUDA graph capture does not allow reading a generator's state.
            return checkpoint(block, x, h, middle, end, use_reentrant=False, preserve_rng_state=False)
        return block(x, h, middle, end)

    def _unpatchify(self, patches: Tensor) -> Tensor:
        """(B, T, p p C_out) -> (B, C_out, H, W)."""
        side, patch = self.config.input_size // self.config.patch, self.config.patch
        patches = patches.unflatten(1, (side, side)).unflatten(3, (patch, patch, -1))  # (B, h, w, p, q, C_out)
        return patches.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


def _nothing(_: str) -> None:
    """No parameter has to be waited for."""


def seams(vectors: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Modulation of the blocks, as `Block` takes it, views: in the order of layout.py, what belongs to one op is
    adjacent.

    Not compiled, so that the backward pass concatenates the gradients of all blocks at once.

    Args:
        vectors: (B, K, D), of which the first two are the first normalisation's.
    """
    full, rest = divmod(vectors.shape[1] - PER_NORM, PER_SEAM)
    _, *groups = vectors.split([PER_NORM, *[PER_SEAM] * full, *[1] * rest], dim=1)
    return zip(groups[::2], groups[1::2], strict=True)
