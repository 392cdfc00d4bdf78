"""A whole run: all sections, and the checks that need more than one of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from sra_fast.config.checks import Section, refuse_unless
from sra_fast.config.recipe import AlignConfig, ModelConfig, ObjectiveConfig, OptimConfig
from sra_fast.config.running import DataConfig, EvaluateConfig, KernelsConfig, RunConfig, SampleConfig, TrainConfig

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
