"""The rival: a training step as the public SRA code takes it, and honest rungs above it, one switch each.

The public recipe (SiT-SRA of vvvvvjdy/SRA), written anew from its description:

    network    as public_network.py has it
    student    under autocast with a gradient scaler (fp16; on a CPU, which has no fast fp16, fp32 without either)
    teacher    outside autocast: fp32 weights, TF32 products on a GPU; all blocks and the final layer are run
    draws      times on the CPU, noise and label dropout from the device's global generator
    update     unscale, clip, torch's default AdamW, then the EMA parameter by parameter in a Python loop
    logging    two `.item()` a step

A rung is a configuration of the same step, not a copy of it. It computes the same losses as the project's own step
from the same draws: `PublicStep.losses` takes them, and the benchmark's gate compares.
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
from sra_fast.kernels.perturb import interpolate
from sra_fast.model.initial import initial_weights
from sra_fast.step.graph import Captured


@dataclass(frozen=True)
class Rung:
    """Which of the public recipe's habits a step still has."""

    name: str
    bf16_teacher: bool = False  # else TF32 or fp32, outside autocast
    teacher_stops_at_tap: bool = False  # else every block and the final layer
    compiled: bool = False
    fused_update: bool = False  # fused AdamW and foreach EMA; else the defaults and a Python loop
    draws_on_device: bool = False  # times drawn where they are used
    asks_every_step: bool = True  # two `.item()` a step
    cudnn: bool = False  # attention by cuDNN, on GPUs; else PyTorch's own choice
    graph: bool = False  # one CUDA graph of it all


RUNGS = (
    Rung("public"),
    Rung("bf16 teacher to its tap", bf16_teacher=True, teacher_stops_at_tap=True),
    Rung("+ torch.compile", bf16_teacher=True, teacher_stops_at_tap=True, compiled=True),
    Rung("+ fused AdamW, foreach EMA", True, True, True, fused_update=True),
    Rung("+ no host reads", True, True, True, True, draws_on_device=True, asks_every_step=False),
    Rung("+ cuDNN attention", True, True, True, True, True, asks_every_step=False, cudnn=True),
    Rung("+ CUDA graph", True, True, True, True, True, asks_every_step=False, cudnn=True, graph=True),
)


class PublicStep:
    """One rung's training step with its networks and optimizer.

    Args:
        config: of a SiT, with the model's sizes filled in; the seed gives the weights of the project's own step.
        rung: its habits.
        device: where it computes.
    """

    def __init__(self, config: Config, rung: Rung, device: torch.device) -> None:
        self.config, self.rung, self.device = config, rung, device
        with torch.device("meta"):
            self.model = PublicNetwork(config.model)
        self.model.load_state_dict(initial_weights(config.model, config.run.seed, device), assign=True)
        self.model.pos_embed.requires_grad_(False)
        self.ema = copy.deepcopy(self.model).eval().requires_grad_(False)
        optim = config.optim
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(
            trained,
            lr=optim.lr,
            betas=(optim.beta1, optim.beta2),
            eps=optim.eps,
            weight_decay=optim.weight_decay,
            fused=True if rung.fused_update else None,
            capturable=rung.graph,
        )
        # A rung with a bf16 teacher computes the student in bf16 too, which needs no scaler.
        gpu = device.type == "cuda"
        self.dtype = torch.bfloat16 if rung.bf16_teacher else (torch.float16 if gpu else None)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype == torch.float16)
        if rung.compiled:
            self.model.compile()
            self.ema.compile()
        self._captured: Captured | None = None
        if rung.graph:
            stream, pool = torch.cuda.Stream(device), torch.cuda.graph_pool_handle()
            self._captured = Captured(lambda: self._step(*self._batch), stream, pool)

    def _autocast(self, wanted: bool) -> AbstractContextManager:
        return torch.autocast(self.device.type, self.dtype) if wanted and self.dtype is not None else nullcontext()

    def _attention(self) -> AbstractContextManager:
        return sdpa_kernel(SDPBackend.CUDNN_ATTENTION) if self.rung.cudnn else nullcontext()

    def draw(self, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(noise, t, t_teacher, labels after dropout) of a batch, from PyTorch's global generators."""
        where = self.device if self.rung.draws_on_device else torch.device("cpu")
        t = torch.rand(len(x), device=where)
        t_teacher = (t - self.config.align.t_max * torch.rand(len(x), device=where)).clamp(0, 1)
        dropped = torch.rand(len(x), device=self.device) < self.config.objective.label_dropout
        labels = torch.where(dropped, self.config.model.classes, labels)
        return torch.randn_like(x), t.to(self.device), t_teacher.to(self.device), labels

    def losses(self, x: Tensor, noise: Tensor, t: Tensor, t_teacher: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """(velocity loss, alignment loss) of a batch with its draws, with a graph to the student's parameters."""
        student_tap, teacher_tap = self.config.taps
        path = self.config.objective.path
        x_t, target = interpolate(path, x, noise, t)
        x_teacher, _ = interpolate(path, x, noise, t_teacher)
        with self._autocast(True), self._attention():
            prediction, features = self.model(x_t, t, labels, student_tap)
        with torch.no_grad(), self._autocast(self.rung.bf16_teacher), self._attention():
            stop = self.rung.teacher_stops_at_tap
            _, goal = self.ema(x_teacher, t_teacher, labels, teacher_tap, project=False, stop=stop)
        velocity = (prediction.float() - target).square().mean()
        return velocity, alignment_ref(features, goal, self.config.align.distance)

    def __call__(self, x: Tensor, labels: Tensor) -> None:
        """One optimizer step on a batch: x (B, C, H, W) float32, labels (B,) int64; the same tensors every time where
        the rung is a graph."""
        if self._captured is None:
            self._step(x, labels)
        else:
            self._batch = x, labels
            self._captured()

    @property
    def failure(self) -> str | None:
        """Why there is no CUDA graph although the rung has one."""
        return self._captured.failure if self._captured else None

    def _step(self, x: Tensor, labels: Tensor) -> None:
        velocity, alignment = self.losses(x, *self.draw(x, labels))
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(velocity + self.config.align.weight * alignment).backward()
        self.scaler.unscale_(self.optimizer)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.optim.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self._average()
        if self.rung.asks_every_step:
            self.logged = velocity.item(), alignment.item()

    @torch.no_grad()
    def _average(self) -> None:
        decay = self.config.optim.ema_decay
        if self.rung.fused_update:
            torch._foreach_lerp_(list(self.ema.parameters()), list(self.model.parameters()), 1 - decay)
            return
        for average, parameter in zip(self.ema.parameters(), self.model.parameters(), strict=True):
            average.mul_(decay).add_(parameter, alpha=1 - decay)
