"""The main rival: a training step as the public SRA code takes it, and variants of it, one switch each.

The public recipe (SiT-SRA of vvvvvjdy/SRA), written anew from its description:

    network    every block projects its own modulation, each operation is a line of PyTorch; timm's attention; with the
               project's own embedders, MLP and head, which leave no choice, and the public weights' names
    student    under autocast with a gradient scaler (fp16; on a CPU, which has no fast fp16, fp32 without either)
    teacher    outside autocast: fp32 weights, TF32 products on a GPU; all blocks and the final layer are run
    draws      times on the CPU, noise and label dropout from the device's global generator
    update     unscale, clip, torch's default AdamW, then the EMA parameter by parameter in a Python loop
    logging    two `.item()` a step

Source of the network: Peebles and Xie, "Scalable Diffusion Models with Transformers", 2023, section 3.2.

All variants share this code. `PublicStep.losses` takes a batch that is already noised, so that the benchmark's gate can
compare its losses with those of the project's own step.
"""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from sra_fast.config import Config, ModelConfig
from sra_fast.data.stream import Batch
from sra_fast.kernels.alignment import alignment_ref
from sra_fast.kernels.perturb import NoisedBatch, interpolate
from sra_fast.model.initial import initial_weights
from sra_fast.model.transformer import LabelEmbedder, ProjectionHead, TimestepEmbedder
from sra_fast.step.graph import Captured


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


class Mlp(nn.Module):
    """As timm's, with the GELU of the public networks."""

    def __init__(self, hidden: int, ratio: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(hidden, ratio * hidden)
        self.fc2 = nn.Linear(ratio * hidden, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


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


@dataclass(frozen=True)
class Rung:
    """A variant of the public recipe."""

    name: str
    bf16_teacher: bool = False  # else TF32 or fp32, outside autocast
    teacher_stops_at_tap: bool = False  # else every block and the final layer
    compiled: bool = False
    fused_update: bool = False  # fused AdamW and foreach EMA; else the defaults and a Python loop
    draws_on_device: bool = False  # else times are drawn on the CPU
    reads_losses: bool = True  # two `.item()` a step
    cudnn: bool = False  # attention by cuDNN, on GPUs; else PyTorch's own choice
    graph: bool = False  # the whole step as one CUDA graph


RUNGS = (
    Rung("public"),
    Rung("bf16 teacher to its tap", bf16_teacher=True, teacher_stops_at_tap=True),
    Rung("+ torch.compile", bf16_teacher=True, teacher_stops_at_tap=True, compiled=True),
    Rung("+ fused AdamW, foreach EMA", True, True, True, fused_update=True),
    Rung("+ no host reads", True, True, True, True, draws_on_device=True, reads_losses=False),
    Rung("+ cuDNN attention", True, True, True, True, True, reads_losses=False, cudnn=True),
    Rung("+ CUDA graph", True, True, True, True, True, reads_losses=False, cudnn=True, graph=True),
)


class PublicStep:
    """A variant's training step with its networks and optimizer. The config's seed gives our step's weights."""

    def __init__(self, config: Config, rung: Rung, device: torch.device) -> None:
        self.config, self.rung, self.device = config, rung, device
        with torch.device("meta"):
            self.model = PublicNetwork(config.model)
        self.model.load_state_dict(initial_weights(config.model, config.run.seed, device), assign=True)
        self.model.pos_embed.requires_grad_(False)
        self.ema = copy.deepcopy(self.model).eval().requires_grad_(False)
        optim = config.optim
        self.optimizer = torch.optim.AdamW(
            [parameter for parameter in self.model.parameters() if parameter.requires_grad],
            lr=optim.lr,
            betas=(optim.beta1, optim.beta2),
            eps=optim.eps,
            weight_decay=optim.weight_decay,
            fused=True if rung.fused_update else None,
            capturable=rung.graph,
        )
        # A variant with a bf16 teacher computes the student in bf16 too, which needs no scaler.
        half = torch.float16 if device.type == "cuda" else None
        self.dtype = torch.bfloat16 if rung.bf16_teacher else half
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype == torch.float16)
        if rung.compiled:
            self.model.compile()
            self.ema.compile()
        self._captured: Captured | None = None
        if rung.graph:
            stream, pool = torch.cuda.Stream(device), torch.cuda.MemPool()
            self._captured = Captured(self._step, stream, pool)

    @property
    def failure(self) -> str | None:
        """Why the step is not a CUDA graph although it should be."""
        return self._captured.failure if self._captured else None

    def __call__(self, batch: Batch) -> None:
        """One optimizer step on a batch that is on the device, the same tensors in every call."""
        self._batch = batch
        if self._captured is None:
            self._step()
        else:
            self._captured()

    def draw(self, x: Tensor, labels: Tensor) -> NoisedBatch:
        """What student and teacher see of a batch, drawn from PyTorch's global generators."""
        device = self.device if self.rung.draws_on_device else torch.device("cpu")
        t = torch.rand(len(x), device=device)
        t_teacher = (t - self.config.align.t_max * torch.rand(len(x), device=device)).clamp(0, 1).to(self.device)
        t = t.to(self.device)
        dropped = torch.rand(len(x), device=self.device) < self.config.objective.label_dropout
        labels = torch.where(dropped, self.config.model.classes, labels)
        noise, path = torch.randn_like(x), self.config.objective.path
        x_t, target = interpolate(path, x, noise, t)
        x_teacher, _ = interpolate(path, x, noise, t_teacher)
        return NoisedBatch(t, t_teacher, x_t, x_teacher, target, labels, labels)

    def losses(self, batch: NoisedBatch) -> tuple[Tensor, Tensor]:
        """(velocity loss, alignment loss), differentiable by the student's parameters."""
        student_tap, teacher_tap = self.config.taps
        with self._attention(), self._autocast():
            prediction, features = self.model(batch.x_t, batch.t, batch.labels, student_tap)
        teacher_precision = self._autocast() if self.rung.bf16_teacher else nullcontext()
        with self._attention(), torch.no_grad(), teacher_precision:
            stop = self.rung.teacher_stops_at_tap
            _, goal = self.ema(
                batch.x_teacher, batch.t_teacher, batch.teacher_labels, teacher_tap, project=False, stop=stop
            )
        velocity = (prediction.float() - batch.target).square().mean()
        return velocity, alignment_ref(features, goal, self.config.align.distance)

    def _attention(self) -> AbstractContextManager:
        return sdpa_kernel(SDPBackend.CUDNN_ATTENTION) if self.rung.cudnn else nullcontext()

    def _autocast(self) -> AbstractContextManager:
        return nullcontext() if self.dtype is None else torch.autocast(self.device.type, self.dtype)

    def _step(self) -> None:
        velocity, alignment = self.losses(self.draw(self._batch.x, self._batch.labels))
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(velocity + self.config.align.weight * alignment).backward()
        self.scaler.unscale_(self.optimizer)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.optim.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self._update_ema()
        if self.rung.reads_losses:
            self.logged = velocity.item(), alignment.item()

    @torch.no_grad()
    def _update_ema(self) -> None:
        decay = self.config.optim.ema_decay
        if self.rung.fused_update:
            torch._foreach_lerp_(list(self.ema.parameters()), list(self.model.parameters()), 1 - decay)
            return
        for average, parameter in zip(self.ema.parameters(), self.model.parameters(), strict=True):
            average.mul_(decay).add_(parameter, alpha=1 - decay)
