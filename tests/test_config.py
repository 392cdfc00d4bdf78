"""Configuration: what is refused and how, the presets' published values, and the way to JSON and back."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from sra_fast import kernels
from sra_fast.config import (
    PRESETS,
    PUBLISHED_TAPS,
    AlignConfig,
    Config,
    DataConfig,
    EvaluateConfig,
    KernelsConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimConfig,
    RunConfig,
    SampleConfig,
    TrainConfig,
    from_dict,
    preset,
    to_dict,
)
from sra_fast.errors import Refused


def refusal(make: Callable[[], Any]) -> str:
    """The message of what must be refused: one line."""
    with pytest.raises(Refused) as caught:
        make()
    message = str(caught.value)
    assert "\n" not in message
    return message


SIT_B = preset("sit-b-2")  # 12 blocks

REFUSED: list[tuple[str, Callable[[], Any]]] = [
    ("align.teacher-tap: 13 given", lambda: replace(SIT_B, align=AlignConfig(teacher_tap=13))),
    ("align.student-tap: 14 given", lambda: replace(SIT_B, align=AlignConfig(student_tap=14))),
    ("align.student-tap: 8 given", lambda: replace(SIT_B, align=AlignConfig(student_tap=8))),
    ("align.student-tap: 9 given", lambda: replace(SIT_B, align=AlignConfig(student_tap=9))),
    ("align.student-tap: 5 given", lambda: replace(SIT_B, align=AlignConfig(student_tap=5, teacher_tap=5))),
    ("align.student-tap: -1 given", lambda: AlignConfig(student_tap=-1)),
    ("align.teacher-tap: -1 given", lambda: AlignConfig(teacher_tap=-1)),
    ("align.t-max: 0.0 given", lambda: AlignConfig(t_max=0)),
    ("align.t-max: -0.1 given", lambda: AlignConfig(t_max=-0.1)),
    ("align.t-max: 1.01 given", lambda: AlignConfig(t_max=1.01)),
    ("align.t-max: nan given", lambda: AlignConfig(t_max=float("nan"))),
    ("align.weight: -0.1 given", lambda: AlignConfig(weight=-0.1)),
    ("align.weight-hold-epochs: -1 given", lambda: AlignConfig(weight_hold_epochs=-1)),
    ("align.weight-decade-epochs: -1 given", lambda: AlignConfig(weight_decade_epochs=-1)),
    ("data.resolution: 33 given", lambda: replace(SIT_B, data=DataConfig(resolution=33))),
    ("data.resolution: 12 given", lambda: replace(preset("dit-s-8"), data=DataConfig(resolution=12))),
    ("data.resolution: 0 given", lambda: DataConfig(resolution=0)),
    ("data.held-out: 0.0 given", lambda: DataConfig(held_out=0)),
    ("data.held-out: 1.0 given", lambda: DataConfig(held_out=1)),
    ("data.max-bad-share: 1.5 given", lambda: DataConfig(max_bad_share=1.5)),
    ("data.threads: -1 given", lambda: DataConfig(threads=-1)),
    ("model.input-size: 9 given", lambda: ModelConfig(input_size=9)),
    ("model.hidden: 770 given", lambda: ModelConfig(hidden=770)),
    ("model.hidden: 6 given", lambda: ModelConfig(hidden=6, heads=2)),
    ("model.depth: 0 given", lambda: ModelConfig(depth=0)),
    ("model.patch: 0 given", lambda: ModelConfig(patch=0)),
    ("model.mlp-ratio: -4 given", lambda: ModelConfig(mlp_ratio=-4)),
    ("model.checkpoint-every: -1 given", lambda: ModelConfig(checkpoint_every=-1)),
    ("train.batch: 256 given", lambda: TrainConfig(accumulate=3)),
    ("train.accumulate: 0 given", lambda: TrainConfig(accumulate=0)),
    ("train.images: 0 given", lambda: TrainConfig(images=0)),
    ("train.keep-checkpoints: 0 given", lambda: TrainConfig(keep_checkpoints=0)),
    ("train.save-every-minutes: 0.0 given", lambda: TrainConfig(save_every_minutes=0)),
    ("train.preview-every-images: -1 given", lambda: TrainConfig(preview_every_images=-1)),
    ("objective.label-dropout: 1.0 given", lambda: ObjectiveConfig(label_dropout=1)),
    ("objective.label-dropout: -0.1 given", lambda: ObjectiveConfig(label_dropout=-0.1)),
    ("optim.lr: 0.0 given", lambda: OptimConfig(lr=0)),
    ("optim.lr: nan given", lambda: OptimConfig(lr=float("nan"))),
    ("optim.beta2: 1.0 given", lambda: OptimConfig(beta2=1)),
    ("optim.ema-decay: 1.0 given", lambda: OptimConfig(ema_decay=1)),
    ("optim.eps: 0.0 given", lambda: OptimConfig(eps=0)),
    ("optim.clip: -1.0 given", lambda: OptimConfig(clip=-1)),
    ("run.name: '' given", lambda: RunConfig(name="")),
    ("run.name: '../x' given", lambda: RunConfig(name="../x")),
    ("run.name: '..' given", lambda: RunConfig(name="..")),
    ("run.seed: -1 given", lambda: RunConfig(seed=-1)),
    ("run.seed: 18446744073709551616 given", lambda: RunConfig(seed=2**64)),
    ("sample.steps: 0 given", lambda: SampleConfig(steps=0)),
    ("sample.guidance-high", lambda: SampleConfig(guidance_low=0.8, guidance_high=0.7)),
    ("sample.sampler: 'ddpm' given", lambda: replace(SIT_B, sample=SampleConfig(sampler="ddpm"))),
    ("sample.sampler: 'sde' given", lambda: replace(preset("dit-b-2"), sample=SampleConfig(sampler="sde"))),
    ("evaluate.samples: 0 given", lambda: EvaluateConfig(samples=0)),
    ("preset: 'sit-b-3' given", lambda: preset("sit-b-3")),
    ("preset: '' given", lambda: preset("")),
]


@pytest.mark.parametrize(("beginning", "make"), REFUSED, ids=[beginning for beginning, _ in REFUSED])
def test_a_bad_value_is_refused_in_one_line_that_names_it_and_what_is_allowed(beginning: str, make: Callable) -> None:
    message = refusal(make)
    assert message.startswith(beginning)
    assert "must" in message


def test_bad_taps_do_not_matter_without_alignment() -> None:
    assert replace(SIT_B, align=AlignConfig(method="none", student_tap=13)).align.method == "none"


@pytest.mark.parametrize("t_max", [1e-6, 0.2, 1.0])
def test_t_max_may_be_anything_up_to_one(t_max: float) -> None:
    assert AlignConfig(t_max=t_max).t_max == t_max


# Presets


def test_presets_are_digits_and_two_families_of_twelve_with_paper_variants() -> None:
    sizes = [f"{family}-{size}-{p}" for family in ("sit", "dit") for size in ("s", "b", "l", "xl") for p in (2, 4, 8)]
    assert set(PRESETS) == {"digits", *sizes, *(f"{name}-paper" for name in sizes)}
    for name, config in PRESETS.items():
        assert config.run.name == name


@pytest.mark.parametrize(
    ("size", "shape"), {"s": (12, 384, 6), "b": (12, 768, 12), "l": (24, 1024, 16), "xl": (28, 1152, 16)}.items()
)
def test_sizes_are_the_published_ones(size: str, shape: tuple[int, int, int]) -> None:
    for name, config in PRESETS.items():
        if re.match(f"(sit|dit)-{size}-", name):
            model = config.model
            assert (model.depth, model.hidden, model.heads, model.mlp_ratio) == (*shape, 4)
            assert (model.family, model.patch) == (name[:3], int(name.split("-")[2]))


@pytest.mark.parametrize(
    ("name", "taps"),
    [
        ("sit-b-2", (3, 8)),
        ("sit-l-2", (6, 16)),
        ("sit-xl-2", (8, 20)),
        ("dit-b-2", (3, 7)),
        ("dit-l-2", (6, 14)),
        ("dit-xl-2-paper", (8, 16)),
        ("sit-s-2", (3, 9)),  # not published: a quarter and three quarters of 12
        ("digits", (1, 4)),
    ],
)
def test_default_taps_are_the_published_pairs_or_the_rule(name: str, taps: tuple[int, int]) -> None:
    assert preset(name).taps == taps


def test_taps_that_are_given_win_one_by_one() -> None:
    assert replace(SIT_B, align=AlignConfig(student_tap=2)).taps == (2, 8)
    assert replace(SIT_B, align=AlignConfig(teacher_tap=12)).taps == (3, 12)
    assert len(PUBLISHED_TAPS) == 6


@pytest.mark.parametrize("family", ["sit", "dit"])
def test_paper_presets_carry_the_published_recipe(family: str) -> None:
    config = preset(f"{family}-xl-2-paper")
    align, optim = config.align, config.optim
    assert (align.method, align.distance, align.t_max) == ("sra", "smooth_l1", 0.2)
    assert align.weight == {"sit": 0.2, "dit": 0.04}[family]
    assert (align.weight_hold_epochs, align.weight_decade_epochs) == (149, 1000)
    assert align.shared_label_dropout
    assert (optim.lr, optim.beta1, optim.beta2, optim.eps, optim.weight_decay) == (1e-4, 0.9, 0.999, 1e-8, 0)
    assert (optim.schedule, optim.warmup_images, optim.clip) == ("constant", 0, 1.0)
    assert (optim.ema_decay, optim.ema_warmup) == (0.9999, False)
    assert (config.train.batch, config.objective.label_dropout) == (256, 0.1)
    assert (config.objective.path, config.objective.times) == ("linear", "uniform")
    assert config.sample.guidance_channels == {"sit": 0, "dit": 3}[family]


def test_our_default_is_the_per_token_cosine_at_one_half_with_ema_warm_up() -> None:
    align = preset("sit-xl-2").align
    assert (align.distance, align.weight, align.weight_decade_epochs) == ("cosine", 0.5, 0)
    assert preset("sit-xl-2").optim.ema_warmup


# To JSON and back


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_survives_json(name: str) -> None:
    assert from_dict(Config, json.loads(json.dumps(to_dict(PRESETS[name]))), "file") == PRESETS[name]


def test_a_config_with_every_field_changed_survives_json() -> None:
    config = replace(
        SIT_B,
        run=RunConfig(name="x", seed=2**64 - 1, dry_run=True),
        kernels=KernelsConfig(default="reference", adaln="auto"),
        resume="never",
        deterministic=True,
    )
    assert from_dict(Config, json.loads(json.dumps(to_dict(config))), "file") == config


def changed(path: str, value: object) -> dict[str, Any]:
    """SIT_B as a dictionary with one entry set."""
    values = to_dict(SIT_B)
    *groups, name = path.split(".")
    inner = values
    for group in groups:
        inner = inner[group]
    inner[name] = value
    return values


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("model.dept", 3, "file: model: 'dept' given; must be among"),
        ("modle", {}, "file: config: 'modle' given; must be among"),
        ("model.depth", "12", "file: model.depth: '12' given; must be of type int"),
        ("model.depth", 12.0, "file: model.depth: 12.0 given; must be of type int"),
        ("model.depth", True, "file: model.depth: True given; must be of type int"),
        ("model.qk_norm", 1, "file: model.qk-norm: 1 given; must be of type bool"),
        ("model.family", "vit", "file: model.family: 'vit' given; must be one of sit, dit"),
        ("model.family", ["sit"], "file: model.family: ['sit'] given; must be one of sit, dit"),
        ("optim.lr", "1e-4", "file: optim.lr: '1e-4' given; must be a finite number"),
        ("optim.lr", None, "file: optim.lr: None given; must be a finite number"),
        ("align.distance", "cos", "file: align.distance: 'cos' given; must be one of cosine, cosine_channel"),
        ("kernels.adaln", "fast", "file: kernels.adaln: 'fast' given; must be one of auto, fused, reference"),
        ("data.channels", 2, "file: data.channels: 2 given; must be one of 1, 3"),
        ("model", 3, "file: model: 3 given; must be an object"),
        ("align.t_max", 0.0, "file: align.t-max: 0.0 given; must be in (0, 1]"),
    ],
)
def test_unknown_keys_and_wrong_types_are_refused_by_name(path: str, value: object, said: str) -> None:
    assert refusal(lambda: from_dict(Config, changed(path, value), "file")).startswith(said)


def test_a_whole_number_stands_for_a_float() -> None:
    config = from_dict(Config, changed("optim.lr", 1), "file")
    assert config.optim.lr == 1.0
    assert type(config.optim.lr) is float


def test_missing_entries_take_their_defaults() -> None:
    assert from_dict(Config, {}, "file") == Config()


@pytest.mark.parametrize("group", [field.name for field in dataclasses.fields(Config)])
def test_everything_is_frozen(group: str) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(SIT_B, group, None)
    value = getattr(SIT_B, group)
    if dataclasses.is_dataclass(value):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(value, dataclasses.fields(value)[0].name, None)


def test_ops_resolve_one_by_one_with_the_default_for_the_rest() -> None:
    resolved = KernelsConfig(default="reference", adaln="auto").resolve()
    assert set(resolved) == set(kernels.IMPLEMENTATIONS)
    assert set(resolved.values()) <= {"fused", "reference"}
    assert resolved["perturb"] == "reference"


def test_a_fused_op_that_does_not_exist_is_refused_not_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(kernels.IMPLEMENTATIONS, "adaln", {"reference": kernels.adaln.adaln_ref})
    assert refusal(KernelsConfig(adaln="fused").resolve).startswith("kernels.adaln: 'fused' given")
    assert KernelsConfig(adaln="auto").resolve()["adaln"] == "reference"


@pytest.mark.parametrize(
    ("changes", "beginning"),
    [
        ({"sample": SampleConfig(steps=1)}, "sample.steps: 1 given"),
        ({"sample": SampleConfig(steps=1001)}, "sample.steps: 1001 given"),
        ({"sample": SampleConfig(guidance_channels=5)}, "sample.guidance-channels: 5 given"),
    ],
)
def test_sampling_that_must_fail_is_refused_before_training(changes: dict, beginning: str) -> None:
    dit = dataclasses.replace(preset("dit-s-2"), model=dataclasses.replace(preset("dit-s-2").model, channels=4))
    assert refusal(lambda: dataclasses.replace(dit, **changes)).startswith(beginning)
