"""Presets: a small model for scikit-learn's digits, and the models of the papers."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from sra_fast.config.recipe import AlignConfig, ModelConfig, ObjectiveConfig, OptimConfig
from sra_fast.config.run import Config, DataConfig, EvaluateConfig, RunConfig, SampleConfig, TrainConfig
from sra_fast.errors import Refused

SIZES = {  # depth, hidden, heads: DiT, table 1
    "s": (12, 384, 6),
    "b": (12, 768, 12),
    "l": (24, 1024, 16),
    "xl": (28, 1152, 16),
}

DIGITS_FOLDER = "data/digits"


def _digits() -> Config:
    return Config(
        run=RunConfig(name="digits"),
        model=ModelConfig(family="sit", depth=6, hidden=96, heads=3, patch=2),
        objective=ObjectiveConfig(times="lognormal"),
        # For a run of only 900 steps: short averages, and a high learning rate that decays to zero.
        optim=OptimConfig(lr=3e-3, beta2=0.99, schedule="cosine", warmup_images=3_200, ema_decay=0.99),
        data=DataConfig(images=DIGITS_FOLDER, resolution=8, channels=1, held_out=0.2),
        train=TrainConfig(
            images=57_600,
            batch=64,
            log_every_steps=10,
            validate_every_images=14_400,
            validation_images=256,
            preview_every_images=14_400,
            save_every_images=14_400,
        ),
        sample=SampleConfig(sampler="euler", steps=20, count=100, batch=250),
        evaluate=EvaluateConfig(
            after_training=True,
            samples=2000,
            min_class_accuracy=0.95,
            min_class_accuracy_guided=0.98,
            max_frechet_ratio=2.2,
            min_nearest_ratio=0.8,
        ),
    )


def _public(family: Literal["sit", "dit"], size: str, patch: int, paper: bool) -> Config:
    """A model of the papers. The `paper` variants use the published alignment loss, its weight and decay, and an EMA
    without warm-up."""
    depth, hidden, heads = SIZES[size]
    name = f"{family}-{size}-{patch}"
    config = Config(
        run=RunConfig(name=name),
        model=ModelConfig(family=family, depth=depth, hidden=hidden, heads=heads, patch=patch),
        sample=SampleConfig(guidance_channels=3 if family == "dit" and paper else 0),
    )
    if not paper:
        return config
    # SRA's code at 256 px: smooth-L1 with weight 0.2 (DiT 0.04) up to epoch 149, then tenfold less every 1,000 epochs.
    return replace(
        config,
        run=RunConfig(name=f"{name}-paper"),
        align=AlignConfig(
            distance="smooth_l1",
            weight=0.2 if family == "sit" else 0.04,
            weight_hold_epochs=149,
            weight_decade_epochs=1000,
        ),
        optim=OptimConfig(ema_warmup=False),
    )


PRESETS: dict[str, Config] = {"digits": _digits()} | {
    f"{family}-{size}-{patch}" + ("-paper" if paper else ""): _public(family, size, patch, paper)
    for family in ("sit", "dit")
    for size in SIZES
    for patch in (2, 4, 8)
    for paper in (False, True)
}


def preset(name: str) -> Config:
    """Look up a preset by name."""
    if name not in PRESETS:
        rule = "must be digits or {sit,dit}-{s,b,l,xl}-{2,4,8}, the latter also with -paper appended"
        raise Refused("preset", name, rule)
    return PRESETS[name]
