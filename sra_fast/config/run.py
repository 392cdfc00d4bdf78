"""Configuration of a run: where it is saved, data, training, kernels, sampling and evaluation."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar, Literal

from sra_fast.config.checks import Section
from sra_fast.config.recipe import AlignConfig, ModelConfig, ObjectiveConfig, OptimConfig
from sra_fast.errors import Refused, printable

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

LONGEST_NAME = 200  # bytes of a run's name; file systems allow 255, of which others begin with it

Choice = Literal["auto", "fused", "reference"]


@dataclass(frozen=True)
class RunConfig(Section):
    """Where the run is saved, and its seed."""

    section: ClassVar[str] = "run"
    limits: ClassVar[dict[str, float]] = {"seed": 2**64 - 1}

    name: str = "run"
    """Name of the run: its folder below --run.dir."""
    dir: str = "runs"
    """Folder that holds all runs."""
    seed: int = 0
    """64-bit key of all random numbers: initial weights, order, noise, times, label dropout, previews."""
    dry_run: bool = False
    """Print the resolved configuration and stop."""

    def check(self) -> None:
        self.need(self.name not in ("", ".", "..") and "/" not in self.name, "name", "must be one folder name")
        self.need(printable(self.name) == self.name, "name", "must be printable")
        self.need(len(os.fsencode(self.name)) <= LONGEST_NAME, "name", f"must have at most {LONGEST_NAME} bytes")
        self.need(self.dir != "", "dir", "must be a folder; . is the current one")
        self.need(self.seed >= 0, "seed", "must be in [0, 2^64)")


@dataclass(frozen=True)
class DataConfig(Section):
    """Training data: JPEG or PNG images, one folder per class, or the latents that `sra-fast prepare` encodes."""

    section: ClassVar[str] = "data"
    limits: ClassVar[dict[str, float]] = {"resolution": 65_536, "threads": 4_096, "max_pixels": 1 << 40}

    images: str = ""
    """Folder of class folders. The digits preset writes scikit-learn's digits there if the folder does not exist."""
    latents: str = ""
    """Folder of a packed set, or of the public SRA code's moments (with vae-sd/dataset.json). The decoding options
    below then have no effect."""
    vae: str = ""
    """VAE for previews of latents: a folder or a Hugging Face hub id; empty = the one named by the data set."""
    resolution: int = 32
    """Side length in pixels after the ADM center crop."""
    channels: Literal[1, 3] = 3
    """1 = grey, 3 = RGB."""
    reader: Literal["auto", "dali", "pillow"] = "auto"
    """Image decoder; auto = DALI if installed, else Pillow."""
    held_out: float = 0.02
    """Share of the files kept for validation and evaluation, never trained on; chosen by a hash of the file name."""
    strict: bool = False
    """Stop at the first undecodable image instead of replacing it."""
    max_bad_share: float = 0.01
    """Stop when more than this share of the data set's files cannot be decoded."""
    exif: bool = False
    """Rotate images by their EXIF orientation (ADM does not)."""
    threads: int = 0
    """Decoding threads; 0 = one per core, at most 8."""
    max_pixels: int = 256_000_000
    """Larger images count as undecodable, and all threads together hold no more pixels than this (or one image). An
    image takes up to 14 bytes a pixel while it is decoded."""

    def check(self) -> None:
        self.need_positive("resolution", "max_pixels")
        self.need_not_negative("threads")
        self.need(0 < self.held_out < 1, "held_out", "must be in (0, 1)")
        self.need(0 <= self.max_bad_share <= 1, "max_bad_share", "must be in [0, 1]")


@dataclass(frozen=True)
class TrainConfig(Section):
    """Length of training, batch size, and how often to log, validate and save. Lengths are in images."""

    section: ClassVar[str] = "train"
    limits: ClassVar[dict[str, float]] = {
        "batch": 1 << 20,
        "accumulate": 1 << 20,
        "micro_batch": 1 << 20,
        "log_every_steps": 1_000_000,
        "validation_images": 1 << 20,
        "save_every_minutes": 1e9,
        "keep_checkpoints": 1_000_000,
    }

    images: int = 102_400_000
    """Length of the run in images (400,000 steps of 256)."""
    batch: int = 256
    """Images per optimizer step, over all processes and micro-batches."""
    accumulate: int = 1
    """Micro-batches per optimizer step of each process; their gradients are summed in fp32."""
    micro_batch: int = 0
    """Images per micro-batch, instead of accumulate; 0 = batch / (accumulate x processes)."""
    reduction: Literal["fast", "ordered"] = "fast"
    """How gradients are summed over micro-batches: fast, or in one fixed order that gives the same bits on any number
    of processes (it needs micro-batch)."""
    reduce_dtype: Literal["auto", "bf16", "fp32"] = "auto"
    """Type of the gradients that processes exchange, if the reduction is fast; auto = that of the networks for a single
    micro-batch per process, fp32 for more."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Compute type of the networks; auto = bf16 on GPUs that have it, fp32 elsewhere. Weights, moments and losses are
    always fp32."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto = the GPU if there is one."""
    execution: Literal["auto", "eager", "compiled", "graph"] = "auto"
    """How a step is executed: eagerly, by torch.compile, or as one CUDA graph of the compiled step; auto = graph on a
    GPU, eager on a CPU, where compilation takes a minute or two."""
    log_every_steps: int = 50
    """Steps between two lines of metrics.jsonl, and between two reads of the device's counters."""
    validate_every_images: int = 2_560_000
    """Images between two evaluations of the validation loss; 0 = only at the end."""
    validation_images: int = 512
    """Held-out images used for the validation loss."""
    validation_precision: Literal["auto", "fp32"] = "auto"
    """Compute type of validation, previews and evaluation; auto = that of training."""
    preview_every_images: int = 2_560_000
    """Images between two preview grids; 0 = only at the end."""
    save_every_images: int = 2_560_000
    """Images between two checkpoints."""
    save_every_minutes: float = 15.0
    """Minutes between two checkpoints, if these pass first."""
    keep_checkpoints: int = 3
    """How many of the newest checkpoints to keep; older ones are removed after a new one is complete."""
    keep_every_images: int = 0
    """Never remove checkpoints at multiples of this many images; 0 = remove them too."""

    def check(self) -> None:
        self.need_positive("images", "batch", "accumulate", "log_every_steps", "validation_images")
        self.need_positive("save_every_images", "save_every_minutes", "keep_checkpoints")
        self.need_not_negative("validate_every_images", "preview_every_images", "keep_every_images", "micro_batch")
        rule = f"must be a multiple of train.accumulate = {self.accumulate}"
        self.need(self.batch % self.accumulate == 0, "batch", rule)
        if self.micro_batch:
            self.need(self.accumulate == 1, "accumulate", "must be 1 if train.micro-batch is set")
            rule = f"must be a multiple of train.micro-batch = {self.micro_batch}"
            self.need(self.batch % self.micro_batch == 0, "batch", rule)
        elif self.reduction == "ordered":
            self.need(False, "micro_batch", "must be set for train.reduction = ordered, whose bits depend on it")

    @property
    def micro_batches(self) -> int:
        """Micro-batches per optimizer step, of all processes, once the micro-batch is known."""
        return self.batch // self.micro_batch if self.micro_batch else self.accumulate

    def on(self, processes: int) -> TrainConfig:
        """The same with the micro-batch filled in for a number of processes.

        Raises:
            Refused: if the batch cannot be split.
        """
        parts = self.accumulate * processes
        if not self.micro_batch:
            rule = f"must be a multiple of {parts} = {processes} processes x train.accumulate"
            self.need(self.batch % parts == 0, "batch", rule)
            return replace(self, accumulate=1, micro_batch=self.batch // parts)
        rule = f"its {self.micro_batches} micro-batches must be a multiple of the {processes} processes"
        self.need(self.micro_batches % processes == 0, "batch", rule)
        return self


@dataclass(frozen=True)
class KernelsConfig(Section):
    """Implementation of each op: a fused kernel, its reference in plain PyTorch, or auto: on a GPU whichever is
    measured to be faster when a run starts, on a CPU the compiled library's where it is built."""

    section: ClassVar[str] = "kernels"

    default: Choice = "auto"
    """For all ops not set below; fused applies to ops that have a fused kernel."""
    adaln: Choice | None = None
    """LayerNorm and modulation."""
    gated_adaln: Choice | None = None
    """Gated residual, LayerNorm and modulation, between two half blocks."""
    gated_residual: Choice | None = None
    """Gated residual that no normalisation follows."""
    linear_gelu: Choice | None = None
    """First layer of the MLP and GELU, where no gradient is needed: in the teacher, and when sampling."""
    alignment: Choice | None = None
    """Distance between student and teacher features."""
    perturb: Choice | None = None
    """Random draws of a batch, and the noised inputs and targets."""
    gradient_norm: Choice | None = None
    """Global norm of the gradients."""
    adamw_ema: Choice | None = None
    """AdamW, the EMA, and the low-precision copies of both."""
    retune: bool = False
    """Measure again what is auto, rather than take what the checkpoint or an earlier run of these shapes has chosen."""


@dataclass(frozen=True)
class SampleConfig(Section):
    """Sampler, guidance and noise of generated images."""

    section: ClassVar[str] = "sample"
    limits: ClassVar[dict[str, float]] = {
        "steps": 1_000_000,
        "guidance": 1e6,
        "guidance_channels": 65_536,
        "count": 1_000_000_000,
        "batch": 1 << 20,
        "seed": 2**64 - 1,
    }

    sampler: Literal["auto", "euler", "heun", "sde", "ddpm", "ddim"] = "auto"
    """sit: euler and heun (ODE), sde (Euler-Maruyama); dit: ddpm, ddim. auto = sde for sit, ddpm for dit."""
    steps: int = 250
    """Sampling steps. Heun calls the network twice per step except the last."""
    guidance: float = 1.0
    """Classifier-free guidance scale; 1 = none."""
    guidance_low: float = 0.0
    """Lowest noise level with guidance (0 = data, 1 = noise)."""
    guidance_high: float = 1.0
    """Highest noise level with guidance."""
    guidance_channels: int = 0
    """Apply guidance only to the first N channels of the prediction; 0 = all. The public DiT uses 3 of 4."""
    count: int = 64
    """Images to generate."""
    batch: int = 64
    """Images per network call."""
    seed: int = 0
    """Sample i depends on this seed and i alone."""
    batch_invariant: bool = False
    """Call the network for one image at a time, so that samples are bitwise independent of --sample.batch. Slow."""

    def check(self) -> None:
        self.need_positive("steps", "count", "batch")
        self.need_not_negative("guidance", "guidance_channels")
        self.need(0 <= self.guidance_low <= 1, "guidance_low", "must be in [0, 1]")
        rule = f"must be in [sample.guidance-low = {self.guidance_low:g}, 1]"
        self.need(self.guidance_low <= self.guidance_high <= 1, "guidance_high", rule)
        self.need(self.seed >= 0, "seed", "must be in [0, 2^64)")


@dataclass(frozen=True)
class EvaluateConfig(Section):
    """Thresholds that a trained model must meet. A threshold of zero is not checked."""

    section: ClassVar[str] = "evaluate"
    limits: ClassVar[dict[str, float]] = {
        "samples": 100_000_000,
        "guidance": 1e6,
        "min_class_accuracy": 1.0,
        "min_class_accuracy_guided": 1.0,
    }

    after_training: bool = False
    """Evaluate at the end of training, and exit with 1 if a threshold is missed."""
    samples: int = 2000
    """Number of samples without guidance, and as many with."""
    guidance: float = 2.0
    """Guidance scale of the guided samples."""
    min_class_accuracy: float = 0.0
    """Share of unguided samples that the classifier must assign to their class."""
    min_class_accuracy_guided: float = 0.0
    """The same with guidance."""
    max_frechet_ratio: float = 0.0
    """Largest allowed Frechet distance of samples to held-out images, divided by that of training images to held-out
    images."""
    min_nearest_ratio: float = 0.0
    """Smallest allowed ratio of distances to the nearest training image, samples over held-out images. Memorisation
    drives it to zero."""

    def check(self) -> None:
        self.need(self.samples >= 2, "samples", "must be at least 2: the distance needs a covariance")
        self.need_not_negative("guidance", "min_class_accuracy", "min_class_accuracy_guided")
        self.need_not_negative("max_frechet_ratio", "min_nearest_ratio")


@dataclass(frozen=True)
class Config(Section):
    """Everything that defines a training run."""

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
    """Also used for previews and evaluation."""
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    resume: str = "auto"
    """auto = continue from the newest checkpoint of this run if there is one; never = start from scratch; or the path
    of a checkpoint."""
    init_from: str = ""
    """Start from these weights (safetensors or a public .pt), with a fresh optimizer."""
    weights_family: Literal["auto", "sit", "sit-original", "dit"] = "auto"
    """What the public file of init-from holds, if it does not say: sit (SiT-SRA, REPA: t = 1 is noise), sit-original
    (the first SiT: t = 1 is data; it is converted), or dit."""
    deterministic: bool = False
    """Use bitwise reproducible kernels only. CPU runs are reproducible without."""

    def check(self) -> None:
        model, sample, resolution = self.model, self.sample, self.data.resolution
        student, teacher = self.taps
        if self.align.method != "none":
            if model.depth < 2:
                raise Refused("model.depth", model.depth, "must be at least 2, or --align.method none")
            rule = f"must be in [1, model.depth = {model.depth}]"
            if not 1 <= teacher <= model.depth:
                raise Refused("align.teacher-tap", teacher, rule)
            if not 1 <= student <= model.depth:
                raise Refused("align.student-tap", student, rule)
            if student >= teacher:
                raise Refused("align.student-tap", student, f"must be below align.teacher-tap = {teacher}")
        if not self.data.latents and resolution % model.patch:
            raise Refused("data.resolution", resolution, f"must be a multiple of model.patch = {model.patch}")
        if model.family == "dit" and not 2 <= sample.steps <= 1000:
            raise Refused("sample.steps", sample.steps, "must be in [2, 1000] for model.family = dit")
        if model.channels and sample.guidance_channels > model.channels:
            raise Refused("sample.guidance-channels", sample.guidance_channels, f"must be at most {model.channels}")
        samplers = ("auto", *SAMPLERS[model.family])
        if sample.sampler not in samplers:
            rule = f"must be one of {', '.join(samplers)} for model.family = {model.family}"
            raise Refused("sample.sampler", sample.sampler, rule)

    @property
    def taps(self) -> tuple[int, int]:
        """(student, teacher) block numbers, 1-based, with the defaults filled in."""
        depth = self.model.depth
        rule = (max(1, depth // 4), max(2, 3 * depth // 4))
        published = PUBLISHED_TAPS.get((self.model.family, depth, self.model.hidden), rule)
        return self.align.student_tap or published[0], self.align.teacher_tap or published[1]

    @property
    def path(self) -> Path:
        """The run directory."""
        return Path(self.run.dir) / self.run.name
