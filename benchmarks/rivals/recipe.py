"""The main rival: a training step as the public SRA code takes it, and variants of it, one switch each.

The public recipe (SiT-SRA of vvvvvjdy/SRA), written anew from its description:

    network    network.py
    student    under autocast with a gradient scaler (fp16; on a CPU, which has no fast fp16, fp32 without either)
    teacher    outside autocast: fp32 weights, TF32 products on a GPU; all blocks and the final layer are run
    draws      times on the CPU, noise and label dropout from the device's global generator
    update     unscale, clip, torch's default AdamW, then the EMA parameter by parameter in a Python loop
    logging    two `.item()` a step

All variants share this code. `PublicStep.losses` takes a batch that is already noised, so that the benchmark's gate can
compare its losses with those of the project's own step.
"""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.rivals.network import PublicNetwork
from sra_fast.config import Config
from sra_fast.kernels.alignment import alignment_ref
from sra_fast.kernels.perturb import NoisedBatch, interpolate
from sra_fast.model.initial import initial_weights
from sra_fast.step.graph import Captured


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
            stream, pool = torch.cuda.Stream(device), torch.cuda.graph_pool_handle()
            self._captured = Captured(lambda: self._step(*self._batch), stream, pool)

    @property
    def failure(self) -> str | None:
        """Why the step is not a CUDA graph although it should be."""
        return self._captured.failure if self._captured else None

    def __call__(self, x: Tensor, labels: Tensor) -> None:
        """One optimizer step: x (B, C, H, W) float32, labels (B,) int64, the same tensors in every call."""
        if self._captured is None:
            self._step(x, labels)
        else:
            self._batch = x, labels
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

    def _step(self, x: Tensor, labels: Tensor) -> None:
        velocity, alignment = self.losses(self.draw(x, labels))
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
