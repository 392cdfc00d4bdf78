"""Configuration of what is computed: the network, its losses, its optimizer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from sra_fast.config.checks import Section


@dataclass(frozen=True)
class ModelConfig(Section):
    """The transformer shared by SiT and DiT. Input size, channels and classes of 0 are taken from the data."""

    section: ClassVar[str] = "model"
    limits: ClassVar[dict[str, float]] = {
        "depth": 1_000,
        "hidden": 65_536,
        "heads": 65_536,
        "patch": 1_024,
        "mlp_ratio": 64,
        "input_size": 65_536,
        "channels": 65_536,
        "classes": 1 << 20,
        "checkpoint_every": 1_000,
    }

    family: Literal["sit", "dit"] = "sit"
    """sit predicts a velocity in continuous time; dit predicts noise and its variance in 1,000 steps."""
    depth: int = 12
    """Number of blocks."""
    hidden: int = 768
    """Width D of a token."""
    heads: int = 12
    """Attention heads."""
    patch: int = 2
    """Side of a patch in pixels (latent pixels for latents)."""
    mlp_ratio: int = 4
    """Width of the MLP's hidden layer as a multiple of D."""
    input_size: int = 0
    """Side of the input in pixels; 0 = from the data."""
    channels: int = 0
    """Input channels; 0 = from the data."""
    classes: int = 0
    """Number of classes, without the null class; 0 = from the data."""
    qk_norm: bool = False
    """Normalise queries and keys per head (LayerNorm with affine)."""
    attention: Literal["auto", "sdpa", "cudnn", "flash", "flash-attn-2", "flash-attn-3", "flash-attn-4", "math"] = (
        "auto"
    )
    """Attention kernel: sdpa lets PyTorch choose, cudnn and flash are PyTorch's kernels of that name, flash-attn-* are
    the packages, math is plain products and softmax. auto = cudnn on Hopper and Blackwell, flash on other GPUs, else
    sdpa."""
    checkpoint_every: int = 0
    """Recompute every K-th block in the backward pass instead of storing its activations; 0 = none."""

    def check(self) -> None:
        self.need_positive("depth", "hidden", "heads", "patch", "mlp_ratio")
        self.need_not_negative("input_size", "channels", "classes", "checkpoint_every")
        self.need(self.hidden % self.heads == 0, "hidden", f"must be a multiple of model.heads = {self.heads}")
        self.need(self.hidden % 4 == 0, "hidden", "must be a multiple of 4 (the 2-D position table)")
        self.need(self.input_size % self.patch == 0, "input_size", f"must be a multiple of model.patch = {self.patch}")

    @property
    def tokens(self) -> int:
        """Tokens per image, T = (input_size / patch)^2."""
        return (self.input_size // self.patch) ** 2

    @property
    def output_channels(self) -> int:
        """Channels predicted per pixel: the velocity, or noise and variance."""
        return self.channels * (2 if self.family == "dit" else 1)


@dataclass(frozen=True)
class ObjectiveConfig(Section):
    """The generative loss."""

    section: ClassVar[str] = "objective"

    path: Literal["linear", "cosine"] = "linear"
    """Interpolant of sit: x_t = (1-t) x + t noise, or cos(pi t/2) x + sin(pi t/2) noise. dit always uses
    1,000 linear betas."""
    times: Literal["uniform", "lognormal"] = "uniform"
    """Distribution of sit's training times."""
    label_dropout: float = 0.1
    """Share of labels replaced by the null class, for classifier-free guidance."""

    def check(self) -> None:
        self.need(0 <= self.label_dropout < 1, "label_dropout", "must be in [0, 1)")


@dataclass(frozen=True)
class AlignConfig(Section):
    """Self-representation alignment (arXiv 2505.02831): the aligned blocks, the distance, and its weight over time."""

    section: ClassVar[str] = "align"
    limits: ClassVar[dict[str, float]] = {"weight": 1e6, "student_tap": 1_000, "teacher_tap": 1_000}

    method: Literal["sra", "none"] = "sra"
    """sra aligns with the EMA teacher; none trains without alignment."""
    distance: Literal["cosine", "cosine_channel", "smooth_l1", "l1", "l2"] = "cosine"
    """cosine is per token; cosine_channel normalises over tokens, as the public code does; smooth_l1 (beta 0.05) is
    the published loss."""
    weight: float = 0.5
    """Weight of the alignment loss."""
    weight_hold_epochs: int = 0
    """Last epoch (0-based) with the full weight, before it decays."""
    weight_decade_epochs: int = 0
    """Epochs over which the weight then decays tenfold; 0 = no decay."""
    student_tap: int = 0
    """Student block (1-based) whose output is aligned; 0 = the published one for this size, else max(1, depth // 4)."""
    teacher_tap: int = 0
    """Teacher block (1-based) to align with; 0 = the published one for this size, else 3 depth // 4."""
    t_max: float = 0.2
    """Largest difference between the student's time and the teacher's lower one, as a share of the whole time range."""
    shared_label_dropout: bool = True
    """Drop the same labels for teacher and student (published); otherwise the teacher's are dropped independently."""

    def check(self) -> None:
        self.need_not_negative("weight", "weight_hold_epochs", "weight_decade_epochs", "student_tap", "teacher_tap")
        self.need(0 < self.t_max <= 1, "t_max", "must be in (0, 1]")


@dataclass(frozen=True)
class OptimConfig(Section):
    """AdamW with decoupled weight decay, gradient clipping, and the EMA of the weights, which is also the teacher."""

    section: ClassVar[str] = "optim"
    limits: ClassVar[dict[str, float]] = {"lr": 100.0, "eps": 1.0, "weight_decay": 1e3, "clip": 1e9}

    lr: float = 1e-4
    """Peak learning rate."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.999
    """Decay of the second moment."""
    eps: float = 1e-8
    """Added to the square root of the second moment."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    clip: float = 1.0
    """Maximum global gradient norm; 0 = no clipping."""
    schedule: Literal["constant", "cosine"] = "constant"
    """Learning rate after warm-up: constant, or a half cosine down to zero at --train.images."""
    warmup_images: int = 0
    """Images over which the learning rate rises linearly from zero."""
    ema_decay: float = 0.9999
    """Decay of the EMA per optimizer step."""
    ema_warmup: bool = True
    """Use min(decay, (1 + k) / (10 + k)) at optimizer step k."""
    shard: Literal["auto", "none", "world"] = "auto"
    """Whether each process keeps and updates only its share of weights, EMA and moments: none = all have everything,
    world = shares over all processes; auto = world for several processes."""

    def check(self) -> None:
        self.need_positive("lr", "eps")
        self.need_not_negative("weight_decay", "clip", "warmup_images")
        for name in ("beta1", "beta2", "ema_decay"):
            self.need(0 <= getattr(self, name) < 1, name, "must be in [0, 1)")
