"""Every option of a training run: name, type, default, meaning, check. Nothing else knows a default."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

from sra_fast.config.checks import Refused, Section, refuse_unless

Choice = Literal["auto", "fused", "reference"]

SAMPLERS = {"sit": ("euler", "heun", "sde"), "dit": ("ddpm", "ddim")}

# Published pairs of (student, teacher) blocks: SRA, arXiv 2505.02831, by family and (depth, hidden).
PUBLISHED_TAPS = {
    ("sit", 12, 768): (3, 8),
    ("sit", 24, 1024): (6, 16),
    ("sit", 28, 1152): (8, 20),
    ("dit", 12, 768): (3, 7),
    ("dit", 24, 1024): (6, 14),
    ("dit", 28, 1152): (8, 16),
}


@dataclass(frozen=True)
class RunConfig(Section):
    """Where the run lives and what makes it reproducible."""

    section: ClassVar[str] = "run"

    name: str = "run"
    """Folder of the run below --run.dir."""
    dir: str = "runs"
    """Folder that holds all runs."""
    seed: int = 0
    """64-bit key of every random number: initial weights, order, noise, times, label dropout, previews."""
    dry_run: bool = False
    """Print the resolved configuration and stop."""

    def check(self) -> None:
        self.need(self.name not in ("", ".", "..") and "/" not in self.name, "name", "must be one folder name")
        self.need(0 <= self.seed < 2**64, "seed", "must be in [0, 2^64)")


@dataclass(frozen=True)
class ModelConfig(Section):
    """The transformer shared by SiT and DiT. A zero for input size, channels or classes is read from the data."""

    section: ClassVar[str] = "model"

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
    """Width of the MLP's hidden layer over D."""
    input_size: int = 0
    """Side of the input in pixels; 0 = from the data."""
    channels: int = 0
    """Input channels; 0 = from the data."""
    classes: int = 0
    """Number of classes, without the null class; 0 = from the data."""
    qk_norm: bool = False
    """Normalise queries and keys per head (LayerNorm with affine)."""
    attention: Literal["sdpa", "math"] = "sdpa"
    """Attention backend: PyTorch's scaled_dot_product_attention, or plain matrix products and softmax."""
    checkpoint_every: int = 0
    """Recompute every K-th block in the backward pass instead of keeping its activations; 0 = none."""

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
    """Interpolant of sit: x_t = (1-t) x + t noise, or cos(pi t/2) x + sin(pi t/2) noise. dit has its own 1,000 linear
    betas."""
    times: Literal["uniform", "lognormal"] = "uniform"
    """Distribution of sit's training times."""
    label_dropout: float = 0.1
    """Share of labels replaced by the null class, for classifier-free guidance."""

    def check(self) -> None:
        self.need(0 <= self.label_dropout < 1, "label_dropout", "must be in [0, 1)")


@dataclass(frozen=True)
class AlignConfig(Section):
    """Self-representation alignment (arXiv 2505.02831): which block learns from which, at what distance, how
    strongly, and when."""

    section: ClassVar[str] = "align"

    method: Literal["sra", "none"] = "sra"
    """sra aligns with the EMA teacher; none trains the plain model."""
    distance: Literal["cosine", "cosine_channel", "smooth_l1", "l1", "l2"] = "cosine"
    """cosine is per token; cosine_channel normalises over tokens, as the public code does; smooth_l1 (beta 0.05) is
    the published loss."""
    weight: float = 0.5
    """Weight of the alignment loss."""
    weight_hold_epochs: int = 0
    """Epochs (0-based) up to and including which the weight is constant before it decays."""
    weight_decade_epochs: int = 0
    """Epochs in which the weight then falls tenfold; 0 = it never falls."""
    student_tap: int = 0
    """Block (1-based) whose output the student aligns; 0 = the published one for this size, else max(1, depth // 4)."""
    teacher_tap: int = 0
    """Block (1-based) of the teacher it is aligned with; 0 = the published one for this size, else 3 depth // 4."""
    t_max: float = 0.2
    """Largest distance between the student's time and the teacher's lower one, as a share of all time."""
    shared_label_dropout: bool = True
    """The teacher sees the student's dropped labels (published). Off: the teacher's labels are dropped
    independently."""

    def check(self) -> None:
        self.need_not_negative("weight", "weight_hold_epochs", "weight_decade_epochs", "student_tap", "teacher_tap")
        self.need(0 < self.t_max <= 1, "t_max", "must be in (0, 1]")


@dataclass(frozen=True)
class OptimConfig(Section):
    """AdamW with decoupled decay, gradient clipping and the EMA of the weights, which is also the teacher."""

    section: ClassVar[str] = "optim"

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
    """Largest global gradient norm; 0 = no clipping."""
    schedule: Literal["constant", "cosine"] = "constant"
    """Learning rate after warm-up: constant, or a half cosine down to zero at --train.images."""
    warmup_images: int = 0
    """Images over which the learning rate rises linearly from zero."""
    ema_decay: float = 0.9999
    """Decay of the EMA per optimizer step."""
    ema_warmup: bool = True
    """Use min(decay, (1 + k) / (10 + k)) at optimizer step k."""

    def check(self) -> None:
        self.need_positive("lr", "eps")
        self.need_not_negative("weight_decay", "clip", "warmup_images")
        for name in ("beta1", "beta2", "ema_decay"):
            self.need(0 <= getattr(self, name) < 1, name, "must be in [0, 1)")


@dataclass(frozen=True)
class DataConfig(Section):
    """Training images: one folder per class, JPEG or PNG."""

    section: ClassVar[str] = "data"

    images: str = ""
    """Folder of class folders. The digits preset writes scikit-learn's digits there if it does not exist."""
    resolution: int = 32
    """Side in pixels after the ADM center crop."""
    channels: Literal[1, 3] = 3
    """1 = grey, 3 = RGB."""
    reader: Literal["auto", "dali", "pillow"] = "auto"
    """Who decodes: auto takes DALI where it is installed and Pillow elsewhere."""
    held_out: float = 0.02
    """Share of the files, chosen by a hash of their names, that is never trained on but used for validation and
    evaluation."""
    strict: bool = False
    """Stop at the first undecodable image instead of replacing it."""
    max_bad_share: float = 0.01
    """Stop when more than this share of the data set's files has turned out undecodable."""
    exif: bool = False
    """Turn images as their EXIF orientation says (ADM does not)."""
    threads: int = 0
    """Decoding threads; 0 = one per core, at most 8."""

    def check(self) -> None:
        self.need_positive("resolution")
        self.need_not_negative("threads")
        self.need(0 < self.held_out < 1, "held_out", "must be in (0, 1)")
        self.need(0 <= self.max_bad_share <= 1, "max_bad_share", "must be in [0, 1]")


@dataclass(frozen=True)
class TrainConfig(Section):
    """Length, batch and rhythm of training. Everything is counted in images."""

    section: ClassVar[str] = "train"

    images: int = 102_400_000
    """Length of the run in images (400,000 steps of 256)."""
    batch: int = 256
    """Images per optimizer step, over all micro-batches."""
    accumulate: int = 1
    """Micro-batches per optimizer step; their gradients are added in fp32."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Compute type of the networks; auto = bf16 on GPUs that have it, fp32 elsewhere. Weights, moments and losses are
    always fp32."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto = the GPU where there is one."""
    log_every_steps: int = 50
    """Steps between two lines of metrics.jsonl, and between two looks at the device's counters."""
    validate_every_images: int = 2_560_000
    """Images between two computations of the validation loss; 0 = only at the end."""
    validation_images: int = 512
    """Held-out images of the validation loss."""
    preview_every_images: int = 2_560_000
    """Images between two preview grids; 0 = only at the end."""
    save_every_images: int = 2_560_000
    """Images between two checkpoints."""
    save_every_minutes: float = 15.0
    """Minutes between two checkpoints, if that comes first."""
    keep_checkpoints: int = 3
    """Newest checkpoints to keep; older ones are removed after a new one is complete."""
    keep_every_images: int = 0
    """Checkpoints at multiples of this are never removed; 0 = no such rule."""

    def check(self) -> None:
        self.need_positive("images", "batch", "accumulate", "log_every_steps", "validation_images")
        self.need_positive("save_every_images", "save_every_minutes", "keep_checkpoints")
        self.need_not_negative("validate_every_images", "preview_every_images", "keep_every_images")
        self.need(
            self.batch % self.accumulate == 0, "batch", f"must be a multiple of train.accumulate = {self.accumulate}"
        )


@dataclass(frozen=True)
class KernelsConfig(Section):
    """Which implementation computes each op: a fused kernel, its reference in plain PyTorch, or auto: whichever was
    measured faster."""

    section: ClassVar[str] = "kernels"

    default: Choice = "auto"
    """For every op not named below."""
    adaln: Choice | None = None
    """LayerNorm and modulation."""
    gated_adaln: Choice | None = None
    """Gated residual, LayerNorm and modulation: the seam between two half blocks."""
    gated_residual: Choice | None = None
    """Gated residual where no normalisation follows."""
    alignment: Choice | None = None
    """Distance between student and teacher features."""
    perturb: Choice | None = None
    """All random draws of a batch."""

    def resolve(self) -> dict[str, str]:
        """{op: "fused" or "reference"}, decided once for a run. Refuses what cannot be had."""
        from sra_fast import kernels  # here, because it brings in torch, which --help can do without

        ops = [op.name for op in dataclasses.fields(self) if op.name != "default"]
        try:
            return kernels.resolve({op: getattr(self, op) or self.default for op in ops})
        except ValueError as error:
            raise Refused(str(error)) from error


@dataclass(frozen=True)
class SampleConfig(Section):
    """How images are generated."""

    section: ClassVar[str] = "sample"

    sampler: Literal["auto", "euler", "heun", "sde", "ddpm", "ddim"] = "auto"
    """sit: euler and heun (ODE), sde (Euler-Maruyama); dit: ddpm, ddim. auto = sde for sit, ddpm for dit."""
    steps: int = 250
    """Sampling steps. Heun calls the network twice a step but for the last."""
    guidance: float = 1.0
    """Classifier-free guidance scale; 1 = none."""
    guidance_low: float = 0.0
    """Guide only at noise levels (0 = data, 1 = noise) from here ..."""
    guidance_high: float = 1.0
    """... to here."""
    guidance_channels: int = 0
    """Guide only the first so many channels of the prediction; 0 = all. The public DiT uses 3 of 4."""
    count: int = 64
    """Images to generate."""
    batch: int = 64
    """Images per network call."""
    seed: int = 0
    """Sample i is a function of this seed and i alone."""
    batch_invariant: bool = False
    """Call the network for one image at a time, so that a sample is the same in every bit whatever --sample.batch is.
    Slow."""

    def check(self) -> None:
        self.need_positive("steps", "count", "batch")
        self.need_not_negative("guidance", "guidance_channels")
        self.need(0 <= self.guidance_low <= 1, "guidance_low", "must be in [0, 1]")
        self.need(
            self.guidance_low <= self.guidance_high <= 1,
            "guidance_high",
            f"must be in [sample.guidance-low = {self.guidance_low:g}, 1]",
        )
        self.need(0 <= self.seed < 2**64, "seed", "must be in [0, 2^64)")


@dataclass(frozen=True)
class EvaluateConfig(Section):
    """What a trained model must reach. A bar of zero is not checked."""

    section: ClassVar[str] = "evaluate"

    after_training: bool = False
    """Evaluate at the end of training and fail below the bars."""
    samples: int = 2000
    """Samples generated without guidance, and as many with."""
    guidance: float = 2.0
    """Guidance scale of the guided samples."""
    min_class_accuracy: float = 0.0
    """Share of unguided samples the judge must recognise as their class."""
    min_class_accuracy_guided: float = 0.0
    """The same with guidance."""
    max_frechet_ratio: float = 0.0
    """Largest Frechet distance of samples to held-out images, over that of training images to held-out images."""
    min_nearest_ratio: float = 0.0
    """Smallest ratio of nearest-training-neighbour distances, samples over held-out images: memorising drives it to
    zero."""

    def check(self) -> None:
        self.need_positive("samples")
        self.need_not_negative("guidance", "min_class_accuracy", "min_class_accuracy_guided")
        self.need_not_negative("max_frechet_ratio", "min_nearest_ratio")


@dataclass(frozen=True)
class Config(Section):
    """A whole training run."""

    section: ClassVar[str] = ""

    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    align: AlignConfig = field(default_factory=AlignConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    kernels: KernelsConfig = field(default_factory=KernelsConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    """Previews and evaluation use these settings too."""
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    resume: str = "auto"
    """auto = go on from the newest checkpoint of this run if there is one; never = start anew; or the path of a
    checkpoint."""
    init_from: str = ""
    """Start from these weights (safetensors or a public .pt), with a fresh optimizer."""
    deterministic: bool = False
    """Ask every backend for bitwise reproducible kernels (CPU runs are reproducible without)."""

    def check(self) -> None:
        student, teacher = self.taps
        depth, patch, family = self.model.depth, self.model.patch, self.model.family
        if self.align.method != "none":
            refuse_unless(1 <= teacher <= depth, "align.teacher-tap", teacher, f"must be in [1, model.depth = {depth}]")
            refuse_unless(1 <= student <= depth, "align.student-tap", student, f"must be in [1, model.depth = {depth}]")
            refuse_unless(
                student < teacher, "align.student-tap", student, f"must be below align.teacher-tap = {teacher}"
            )
        resolution, sampler = self.data.resolution, self.sample.sampler
        refuse_unless(
            resolution % patch == 0, "data.resolution", resolution, f"must be a multiple of model.patch = {patch}"
        )
        if family == "dit":
            steps = self.sample.steps
            refuse_unless(2 <= steps <= 1000, "sample.steps", steps, "must be in [2, 1000] for model.family = dit")
        channels, guided = self.model.channels, self.sample.guidance_channels
        refuse_unless(
            not channels or guided <= channels, "sample.guidance-channels", guided, f"must be at most {channels}"
        )
        allowed = ("auto", *SAMPLERS[family])
        refuse_unless(
            sampler in allowed,
            "sample.sampler",
            sampler,
            f"must be one of {', '.join(allowed)} for model.family = {family}",
        )

    @property
    def taps(self) -> tuple[int, int]:
        """(student, teacher) blocks, 1-based, with the defaults filled in."""
        depth = self.model.depth
        rule = (max(1, depth // 4), 3 * depth // 4)
        published = PUBLISHED_TAPS.get((self.model.family, depth, self.model.hidden), rule)
        return self.align.student_tap or published[0], self.align.teacher_tap or published[1]

    @property
    def path(self) -> Path:
        """The run directory."""
        return Path(self.run.dir) / self.run.name
