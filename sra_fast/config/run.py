"""How a run goes: where, on which data, how long, with which kernels, and what its samples must be worth."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

from sra_fast.config.checks import Section, refuse_unless
from sra_fast.config.recipe import AlignConfig, ModelConfig, ObjectiveConfig, OptimConfig
from sra_fast.errors import Refused

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

Choice = Literal["auto", "fused", "reference"]


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
class DataConfig(Section):
    """Training data: images, one folder per class, JPEG or PNG; or latents that `sra-fast prepare` made of them."""

    section: ClassVar[str] = "data"

    images: str = ""
    """Folder of class folders. The digits preset writes scikit-learn's digits there if it does not exist."""
    latents: str = ""
    """Folder of a packed set, or of the public SRA code's moments (with vae-sd/dataset.json). The options on decoding
    below are then without effect."""
    vae: str = ""
    """VAE for previews of latents: a folder, or an id on the Hugging Face hub; empty = the one the set names."""
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
    execution: Literal["auto", "eager", "compiled", "graph"] = "auto"
    """How a step is executed: as it stands, by torch.compile, or as one CUDA graph of the compiled step; auto = graph
    on a GPU, eager on a CPU, where compiling takes a minute or two first."""
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
    """For every op not named below; fused where there is a fused kernel."""
    adaln: Choice | None = None
    """LayerNorm and modulation."""
    gated_adaln: Choice | None = None
    """Gated residual, LayerNorm and modulation: the seam between two half blocks."""
    gated_residual: Choice | None = None
    """Gated residual where no normalisation follows."""
    alignment: Choice | None = None
    """Distance between student and teacher features."""
    perturb: Choice | None = None
    """All random draws of a batch, and what they make of it."""

    gradient_norm: Choice | None = None
    """Global norm of the gradients."""
    adamw_ema: Choice | None = None
    """AdamW, the EMA and the networks' copies of both."""

    def resolve(self, architecture: str = "cpu") -> dict[str, str]:
        """{op: "fused" or "reference"}, decided once for a run. Refuses what cannot be had on an architecture, "cpu" or
        a GPU's, such as "sm_90"."""
        from sra_fast import kernels  # here, because it brings in torch, which --help can do without

        choices = {}
        for op, implementations in kernels.IMPLEMENTATIONS.items():
            unnamed = "reference" if self.default not in ("auto", *implementations) else self.default
            choices[op] = getattr(self, op) or unnamed
        try:
            return kernels.resolve(choices, architecture)
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
            self.data.latents != "" or resolution % patch == 0,
            "data.resolution",
            resolution,
            f"must be a multiple of model.patch = {patch}",
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
