"""The configuration: refused values, the presets' published values, and conversion to JSON and back."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from sra_fast.config import PRESETS, SIZES, AlignConfig, Config, from_dict, preset, to_dict
from sra_fast.errors import Refused

SIT_B = preset("sit-b-2")  # 12 blocks


def changed(changes: dict[str, object]) -> dict[str, Any]:
    """SIT_B as a dictionary with some entries set."""
    values = to_dict(SIT_B)
    for path, value in changes.items():
        *sections, name = path.split(".")
        (values[sections[0]] if sections else values)[name] = value
    return values


NAN = float("nan")
REFUSED = [
    ({"align.teacher_tap": 13}, "align.teacher-tap: 13 given; must be in [1, model.depth = 12]"),
    ({"align.student_tap": 14}, "align.student-tap: 14 given; must be in [1, model.depth = 12]"),
    ({"align.student_tap": 8}, "align.student-tap: 8 given; must be below align.teacher-tap = 8"),
    ({"align.student_tap": -1}, "align.student-tap: -1 given; must not be negative"),
    ({"align.teacher_tap": -1}, "align.teacher-tap: -1 given"),
    ({"align.t_max": 0.0}, "align.t-max: 0.0 given; must be in (0, 1]"),
    ({"align.t_max": 1.01}, "align.t-max: 1.01 given"),
    ({"align.t_max": NAN}, "align.t-max: nan given; must be a finite number"),
    ({"align.weight": -0.1}, "align.weight: -0.1 given"),
    ({"align.weight_hold_epochs": -1}, "align.weight-hold-epochs: -1 given"),
    ({"align.weight_decade_epochs": -1}, "align.weight-decade-epochs: -1 given"),
    ({"align.distance": "cos"}, "align.distance: 'cos' given; must be one of cosine, cosine_channel"),
    ({"data.resolution": 33}, "data.resolution: 33 given; must be a multiple of model.patch = 2"),
    ({"data.resolution": 0}, "data.resolution: 0 given; must be positive"),
    ({"data.held_out": 0.0}, "data.held-out: 0.0 given; must be in (0, 1)"),
    ({"data.held_out": 1.0}, "data.held-out: 1.0 given"),
    ({"data.max_bad_share": 1.5}, "data.max-bad-share: 1.5 given; must be in [0, 1]"),
    ({"data.threads": -1}, "data.threads: -1 given"),
    ({"data.channels": 2}, "data.channels: 2 given; must be one of 1, 3"),
    ({"model.input_size": 9}, "model.input-size: 9 given; must be a multiple of model.patch = 2"),
    ({"model.hidden": 770}, "model.hidden: 770 given; must be a multiple of model.heads = 12"),
    ({"model.hidden": 6, "model.heads": 2}, "model.hidden: 6 given; must be a multiple of 4"),
    ({"model.depth": 0}, "model.depth: 0 given; must be positive"),
    ({"model.depth": "12"}, "model.depth: '12' given; must be of type int"),
    ({"model.depth": 12.0}, "model.depth: 12.0 given; must be of type int"),
    ({"model.depth": True}, "model.depth: True given; must be of type int"),
    ({"model.qk_norm": 1}, "model.qk-norm: 1 given; must be of type bool"),
    ({"model.family": ["sit"]}, "model.family: ['sit'] given; must be one of sit, dit"),
    ({"model.checkpoint_every": -1}, "model.checkpoint-every: -1 given"),
    ({"model.dept": 3}, "model: 'dept' given; must be among"),
    ({"modle": {}}, "config: 'modle' given; must be among"),
    ({"model": 3}, "model: 3 given; must be an object"),
    ({"kernels.adaln": "fast"}, "kernels.adaln: 'fast' given; must be one of auto, fused, reference"),
    ({"train.accumulate": 3}, "train.batch: 256 given; must be a multiple of train.accumulate = 3"),
    ({"train.accumulate": 0}, "train.accumulate: 0 given"),
    ({"train.images": 0}, "train.images: 0 given"),
    ({"train.keep_checkpoints": 0}, "train.keep-checkpoints: 0 given"),
    ({"train.save_every_minutes": 0}, "train.save-every-minutes: 0.0 given"),
    ({"train.preview_every_images": -1}, "train.preview-every-images: -1 given"),
    ({"objective.label_dropout": 1.0}, "objective.label-dropout: 1.0 given; must be in [0, 1)"),
    ({"objective.label_dropout": -0.1}, "objective.label-dropout: -0.1 given"),
    ({"optim.lr": 0}, "optim.lr: 0.0 given"),
    ({"optim.lr": "1e-4"}, "optim.lr: '1e-4' given; must be a finite number"),
    ({"optim.lr": None}, "optim.lr: None given; must be a finite number"),
    ({"optim.beta1": 1.0}, "optim.beta1: 1.0 given; must be in [0, 1)"),
    ({"optim.ema_decay": 1.0}, "optim.ema-decay: 1.0 given"),
    ({"optim.eps": 0.0}, "optim.eps: 0.0 given"),
    ({"optim.clip": -1.0}, "optim.clip: -1.0 given"),
    ({"run.name": ""}, "run.name: '' given; must be one folder name"),
    ({"run.name": "../x"}, "run.name: '../x' given"),
    ({"run.name": ".."}, "run.name: '..' given"),
    ({"run.seed": -1}, "run.seed: -1 given; must be in [0, 2^64)"),
    ({"run.seed": 2**64}, "run.seed: 18446744073709551616 given"),
    ({"sample.steps": 0}, "sample.steps: 0 given"),
    ({"sample.guidance_low": 0.8, "sample.guidance_high": 0.7}, "sample.guidance-high: 0.7 given; must be in [sample."),
    ({"sample.guidance_channels": 5, "model.channels": 4}, "sample.guidance-channels: 5 given; must be at most 4"),
    ({"sample.sampler": "ddpm"}, "sample.sampler: 'ddpm' given; must be one of auto, euler, heun, sde for"),
    ({"sample.sampler": "sde", "model.family": "dit"}, "sample.sampler: 'sde' given; must be one of auto, ddpm, ddim"),
    ({"sample.steps": 1, "model.family": "dit"}, "sample.steps: 1 given; must be in [2, 1000]"),
    ({"sample.steps": 1001, "model.family": "dit"}, "sample.steps: 1001 given"),
    ({"evaluate.samples": 0}, "evaluate.samples: 0 given"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_a_bad_value_is_refused_in_one_line(changes: dict[str, object], message: str) -> None:
    with pytest.raises(Refused) as caught:
        from_dict(Config, changed(changes), "file")
    assert str(caught.value).startswith(f"file: {message}")
    assert "must" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["sit-b-3", ""])
def test_an_unknown_preset_is_refused(name: str) -> None:
    with pytest.raises(Refused, match=f"preset: '{name}' given; must be"):
        preset(name)


def test_values_at_the_limits_are_accepted() -> None:
    assert AlignConfig(t_max=1).t_max == 1
    without_alignment = from_dict(Config, changed({"align.method": "none", "align.student_tap": 13}), "file")
    assert without_alignment.align.student_tap == 13
    lr = from_dict(Config, changed({"optim.lr": 1}), "file").optim.lr
    assert (lr, type(lr)) == (1.0, float)


def test_presets_are_digits_and_the_published_sizes() -> None:
    shapes = {"s": (12, 384, 6), "b": (12, 768, 12), "l": (24, 1024, 16), "xl": (28, 1152, 16)}
    assert shapes == SIZES
    names = [(family, size, patch) for family in ("sit", "dit") for size in shapes for patch in (2, 4, 8)]
    for family, size, patch in names:
        for name in (f"{family}-{size}-{patch}", f"{family}-{size}-{patch}-paper"):
            model = preset(name).model
            assert (model.depth, model.hidden, model.heads, model.mlp_ratio) == (*shapes[size], 4)
            assert (model.family, model.patch, preset(name).run.name) == (family, patch, name)
    assert len(PRESETS) == 2 * len(names) + 1


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
    config = preset(name)
    assert config.taps == taps
    assert dataclasses.replace(config, align=AlignConfig(student_tap=2)).taps == (2, taps[1])
    assert dataclasses.replace(config, align=AlignConfig(teacher_tap=taps[1] + 1)).taps == (taps[0], taps[1] + 1)


@pytest.mark.parametrize("family", ["sit", "dit"])
def test_paper_presets_have_the_published_recipe(family: str) -> None:
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


def test_our_default_is_the_per_token_cosine_at_one_half_with_ema_warmup() -> None:
    align = preset("sit-xl-2").align
    assert (align.distance, align.weight, align.weight_decade_epochs) == ("cosine", 0.5, 0)
    assert preset("sit-xl-2").optim.ema_warmup


def test_configurations_survive_json() -> None:
    other = from_dict(Config, changed({"run.seed": 2**64 - 1, "kernels.adaln": "auto", "resume": "never"}), "file")
    for config in (*PRESETS.values(), other):
        assert from_dict(Config, json.loads(json.dumps(to_dict(config))), "file") == config
    assert from_dict(Config, {}, "file") == Config()


def test_configurations_are_frozen() -> None:
    for section in (SIT_B, *(value for value in vars(SIT_B).values() if dataclasses.is_dataclass(value))):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(section, dataclasses.fields(section)[0].name, None)
