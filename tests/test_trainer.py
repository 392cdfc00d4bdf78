"""The loop: which images it sees, what it writes when, what it measures, and steps that are not finite."""

from __future__ import annotations

import hashlib
import itertools
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_run import (
    TENSORS,
    arguments,
    checkpoints,
    complaint,
    content,
    metrics,
    run,
    small,
    strict_json,
    summary,
    write_images,
)

from sra_fast import cli
from sra_fast.config import ObjectiveConfig
from sra_fast.data.folder import scan, split
from sra_fast.errors import Refused
from sra_fast.step import step as step_module
from sra_fast.step.step import TrainingStep
from sra_fast.training import checkpoint, validation

LINE = "step images_seen loss velocity_loss alignment_loss grad_norm lr ema_decay images_per_s skipped_steps"
FIGURES = (
    "class_accuracy class_accuracy_guided real_accuracy frechet_distance frechet_distance_real nearest_train_ratio"
)
SUMMARY = (
    f"images_seen train_s images_per_s velocity_loss alignment_loss validation_velocity_loss {FIGURES} device resolved"
)


def spy_on_steps(monkeypatch, see):
    """Calls see(state, batch, metrics) after every step."""
    original = TrainingStep.__call__

    def call(self, state, batch, *scalars):
        result = original(self, state, batch, *scalars)
        see(state, batch, result)
        return result

    monkeypatch.setattr(TrainingStep, "__call__", call)


# What is written


def test_fields_of_metrics_and_summary(root):
    assert run(small(root, train__validate_every_images=32))[0] == 0
    rows, written = metrics(root / "runs/a"), summary(root / "runs/a")
    with_validation = [row["step"] for row in rows if "validation_velocity_loss" in row]
    assert with_validation == [4, 8, 10]  # every 32 images, and at the end
    for row in rows:
        assert set(row) - {"validation_velocity_loss"} == set(LINE.split())
        assert all(math.isfinite(value) for value in row.values())
    assert set(SUMMARY.split()) <= set(written)
    assert written["images_seen"] == 80
    assert (written["device"], set(written["resolved"].values()) - {"fused"}) == ("cpu", {"reference", "sdpa", "eager"})
    assert (written["resolved"]["attention"], written["resolved"]["step"]) == ("sdpa", "eager")
    assert all(written[name] is None for name in FIGURES.split())  # no evaluation was asked for
    last = rows[-1]
    for name in ("velocity_loss", "alignment_loss", "validation_velocity_loss"):
        assert written[name] == last[name]
    assert written["images_per_s"] == pytest.approx(80 / written["train_s"])


def test_a_line_is_the_mean_of_its_steps(root):
    _, steps = run(small(root, train__log_every_steps=4, optim__warmup_images=40))
    rows = metrics(root / "runs/a")
    assert [row["step"] for row in rows] == [4, 8, 10]
    for row, part in zip(rows, (steps[:4], steps[4:8], steps[8:]), strict=True):
        for name in ("loss", "velocity_loss", "alignment_loss", "grad_norm"):
            assert row[name] == pytest.approx(sum(s[name] for s in part) / len(part), rel=1e-6)
        assert row["loss"] == pytest.approx(row["velocity_loss"] + 0.5 * row["alignment_loss"], rel=1e-5)
    for k, step in enumerate(steps):
        progress = max(0, 8 * k - 40) / 40
        lr = 1e-3 * min(1, (k + 1) / 5) * 0.5 * (1 + math.cos(math.pi * progress))
        assert step["lr"] == pytest.approx(lr, rel=1e-6)
        assert step["ema_decay"] == pytest.approx((1 + k) / (10 + k), rel=1e-6)


def test_previews_and_checkpoints_come_when_their_number_is_passed(root, monkeypatch):
    made, save_grid = [], validation.save_grid
    monkeypatch.setattr(validation, "save_grid", lambda path, *rest: (made.append(path.name), save_grid(path, *rest)))
    config = small(root, train__preview_every_images=20, train__save_every_images=32, train__keep_checkpoints=9)
    assert run(config)[0] == 0
    # Steps of 8: 20, 40, 60 and 80 are passed at 24, 40, 64 and 80.
    names = sorted(path.name for path in (root / "runs/a/samples").iterdir())
    assert names == made == [f"{number:012d}.png" for number in (24, 40, 64, 80)]
    assert [int(name) for name in checkpoints(root / "runs/a")] == [32, 64, 80]
    with Image.open(root / "runs/a/samples" / names[0]) as grid:
        assert grid.size == (4 * 33 - 1, 32)  # four samples, a column per class


def test_without_previews_there_is_one_at_the_end(root):
    assert run(small(root, train__images=16))[0] == 0
    assert [path.name for path in (root / "runs/a/samples").iterdir()] == [f"{16:012d}.png"]


def test_minutes_make_checkpoints_too(root):
    assert run(small(root, train__save_every_minutes=1e-9, train__images=24))[0] == 0
    assert [int(name) for name in checkpoints(root / "runs/a")] == [8, 16, 24]


def test_the_last_batch_is_a_whole_one(root):
    assert run(small(root, train__images=17))[0] == 0
    assert summary(root / "runs/a")["images_seen"] == 24


def test_looking_does_not_change_training(root):
    """Validation, previews, checkpoints and logs at any rhythm: the same weights."""
    run(small(root, run__name="plain", train__log_every_steps=10))
    often = {f"train__{what}_every_images": 8 for what in ("validate", "preview", "save")}
    run(small(root, run__name="often", sample__steps=3, **often))
    ends = [content(root / "runs" / name / "checkpoints" / f"{80:012d}") for name in ("plain", "often")]
    assert ends[0] == ends[1]


def test_a_run_without_tensorboard_and_dali_says_so(root, capfd, monkeypatch):
    for module in ("torch.utils.tensorboard", "nvidia.dali"):
        monkeypatch.setitem(sys.modules, module, None)
    assert cli.main(arguments(root, data__reader="auto", train__images=16)) == 0
    error = capfd.readouterr().err
    assert error.count("TensorBoard is not installed") == 1
    assert error.count("DALI is not installed") == 1
    assert "decoded with Pillow" in error
    assert len(metrics(root / "runs/a")) == 2
    assert not list((root / "runs/a").glob("events*"))


def test_deterministic_runs_on_the_cpu(root):
    try:
        assert run(small(root, deterministic=True, train__images=16))[0] == 0
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


# Which images


def is_held_out(name):
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big") < 0.2 * 2**64


def pixels(root, name):
    with Image.open(root / "data" / name) as image:
        return np.asarray(image).tobytes()


def test_held_out_images_are_never_trained_on_and_all_others_are(root, monkeypatch):
    seen = []

    def see(state, batch, result):
        levels = ((batch.x + 1) * 127.5).round().to(torch.uint8).squeeze(1).numpy()
        seen.extend((image.tobytes(), int(label)) for image, label in zip(levels, batch.labels, strict=True))

    spy_on_steps(monkeypatch, see)
    names = scan(root / "data").files
    train = [name for name in names if not is_held_out(name)]
    assert 0 < len(train) < len(names)
    run(small(root, train__images=3 * len(train), train__validate_every_images=16, train__preview_every_images=32))
    known = {pixels(root, name): name for name in names}
    assert len(known) == len(names)  # all images differ
    drawn = [known[image] for image, _ in seen]
    assert not [name for name in drawn if is_held_out(name)]
    assert all(name.startswith(f"c{label}/") for name, (_, label) in zip(drawn, seen, strict=True))
    for epoch in range(3):  # each exactly once in each epoch
        assert sorted(drawn[epoch * len(train) : (epoch + 1) * len(train)]) == train


def test_image_numbers_count_up_and_never_repeat(root, monkeypatch):
    numbers = []
    spy_on_steps(monkeypatch, lambda state, batch, result: numbers.extend(batch.number.tolist()))
    run(small(root), stop_after=4)
    run(small(root))
    assert numbers == list(range(80))


# Validation


@pytest.fixture
def start(root, tiny, awake):
    """A file of weights under which the network does something, and the model's settings."""
    model = tiny(depth=3).model
    checkpoint.export(awake(model), root / "start.safetensors", model, ObjectiveConfig())
    return str(root / "start.safetensors")


def validation_losses(folder):
    return [row["validation_velocity_loss"] for row in metrics(folder) if "validation_velocity_loss" in row]


def test_validation_is_one_number_at_equal_weights_whatever_the_batch(root, start, monkeypatch):
    spoil(monkeypatch, itertools.count(1))  # no step changes a weight
    values = []
    for name, batch in (("a", 8), ("b", 20), ("c", 40)):
        changes = {"init_from": start, "train__validate_every_images": batch, "train__validation_images": 22}
        run(small(root, run__name=name, train__batch=batch, **changes))
        values += validation_losses(root / "runs" / name)
    assert len(values) == 10 + 4 + 2
    assert len(set(values)) == 1
    assert 0 < values[0] < 1e3


def test_validation_follows_the_ema_and_not_the_weights(root, start, monkeypatch):
    def disturb(state, batch, result):
        for value in state.weights.values():
            value.add_(1)

    before = {"init_from": start, "train__images": 8, "optim__lr": 1e-30}
    run(small(root, run__name="plain", **before))
    spy_on_steps(monkeypatch, disturb)
    run(small(root, run__name="disturbed", **before))
    assert validation_losses(root / "runs/plain") == validation_losses(root / "runs/disturbed")


# Steps that are not finite


def spoil(monkeypatch, calls, factor=math.nan):
    """Multiply the loss of the calls with these numbers (1 = the first micro-batch) by `factor`."""
    real, count = step_module.training_losses, itertools.count(1)

    def losses(*args, **options):
        found = real(*args, **options)
        return found._replace(total=found.total * factor) if next(count) in calls else found

    monkeypatch.setattr(step_module, "training_losses", losses)


def bits(state):
    """Bytes of everything that a skipped step must leave alone."""
    held = {name: {key: value.numpy().tobytes() for key, value in getattr(state, name).items()} for name in TENSORS}
    networks = [[p.detach().numpy().tobytes() for p in n.parameters()] for n in (state.student, state.teacher)]
    return held, networks, int(state.adam_step)


@pytest.mark.parametrize("factor", [math.nan, math.inf])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_step_that_is_not_finite_changes_nothing_but_consumes_its_images(root, monkeypatch, accumulate, factor):
    after, numbers = [], []
    spoil(monkeypatch, {4 * accumulate}, factor)  # the fourth step, in its last micro-batch
    spy_on_steps(
        monkeypatch, lambda state, batch, _: (after.append(bits(state)), numbers.extend(batch.number.tolist()))
    )
    assert run(small(root, train__accumulate=accumulate))[0] == 0
    assert after[3] == after[2]
    assert all(a != b for i, (a, b) in enumerate(itertools.pairwise(after)) if i != 2)
    assert numbers == list(range(80))
    assert [row["skipped_steps"] for row in metrics(root / "runs/a")] == [0] * 3 + [1] * 7
    assert metrics(root / "runs/a")[3]["grad_norm"] is None
    counters = content(root / "runs/a/checkpoints" / f"{80:012d}")["counters"]
    assert (counters["adam_step"], counters["step"], counters["skipped_steps"]) == (9, 10, 1)
    assert counters["skipped_in_a_row"] == 0
    assert summary(root / "runs/a")["skipped_steps"] == 1


def test_a_line_leaves_steps_that_are_not_finite_out_of_its_means(root, monkeypatch):
    spoil(monkeypatch, {2})
    _, steps = run(small(root, train__images=32, train__log_every_steps=4))
    (row,) = metrics(root / "runs/a")
    finite = [steps[i]["loss"] for i in (0, 2, 3)]
    assert row["loss"] == pytest.approx(sum(finite) / 3, rel=1e-6)


def test_sixty_four_in_a_row_end_the_run(root, monkeypatch, capfd):
    steps = []
    spoil(monkeypatch, itertools.count(1))
    spy_on_steps(monkeypatch, lambda *_: steps.append(1))
    changes = {"train__images": 800, "train__log_every_steps": 32, "train__save_every_images": 64}
    assert cli.main(arguments(root, **changes)) == 1
    assert "64 steps in a row" in complaint(capfd.readouterr())
    assert len(steps) == 64
    assert metrics(root / "runs/a")[-1]["skipped_steps"] == 64
    assert not (root / "runs/a/summary.json").exists()


def test_sixty_three_in_a_row_do_not(root, monkeypatch):
    spoil(monkeypatch, set(range(3, 66)))
    assert run(small(root, train__images=8 * 70, train__log_every_steps=64))[0] == 0
    assert summary(root / "runs/a")["skipped_steps"] == 63


def test_sixty_four_in_a_row_are_not_forgotten_until_the_next_line(root, monkeypatch):
    spoil(monkeypatch, set(range(1, 65)))
    with pytest.raises(Refused, match="64 steps in a row"):
        run(small(root, train__images=800, train__log_every_steps=80))
    assert metrics(root / "runs/a")[-1]["step"] == 80


def test_the_count_in_a_row_goes_on_after_a_resume(root, monkeypatch):
    spoil(monkeypatch, itertools.count(1))
    changes = {"train__images": 800}
    assert run(small(root, **changes), stop_after=40)[0] == 143
    with pytest.raises(Refused, match="64 steps in a row"):
        run(small(root, **changes))
    assert metrics(root / "runs/a")[-1]["step"] == 64


# Evaluation at the end


def judged(root, **changes):
    bars = {"evaluate__samples": 40, "evaluate__after_training": True, "evaluate__min_class_accuracy": 0.95}
    return small(root, **{"train__images": 16, **bars, **changes})


def test_evaluation_fills_the_summary_and_fails_below_the_bars(root, capfd):
    pytest.importorskip("sklearn")
    assert run(judged(root))[0] == 1
    written = summary(root / "runs/a")
    assert all(math.isfinite(written[name]) for name in FIGURES.split())
    assert written["real_accuracy"] == 1.0
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("below the bar: ")]
    assert lines
    assert any("class_accuracy" in line for line in lines)


def test_bars_of_zero_are_not_checked(root):
    pytest.importorskip("sklearn")
    names = ("min_class_accuracy", "min_class_accuracy_guided", "max_frechet_ratio", "min_nearest_ratio")
    assert run(judged(root, **{f"evaluate__{name}": 0.0 for name in names}))[0] == 0


def test_evaluate_afterwards_gives_the_same_figures(root, capfd):
    pytest.importorskip("sklearn")
    run(judged(root))
    capfd.readouterr()
    assert cli.main(["evaluate", "--weights", str(root / "runs/a")]) == 1
    captured = capfd.readouterr()
    written = summary(root / "runs/a")
    for name in FIGURES.split():
        assert f'"{name}": {written[name]!r}' in captured.out
    assert "below the bar: " in captured.err


@pytest.mark.parametrize("why", ["no scikit-learn", "one class", "large images", "one image held out"])
def test_an_evaluation_that_cannot_be_is_refused_before_training(tmp_path, monkeypatch, why):
    steps, changes = [], {}
    write_images(tmp_path / "data", count=20, classes=1 if why == "one class" else 2)
    if why == "no scikit-learn":
        monkeypatch.setitem(sys.modules, "sklearn.svm", None)
        monkeypatch.setitem(sys.modules, "sklearn", None)
    elif why == "large images":
        changes = {"data__resolution": 64, "model__patch": 16}
    elif why == "one image held out":
        names = scan(tmp_path / "data")
        share = next(s / 1000 for s in range(1, 999) if split_size(names, s / 1000) == 1)
        changes = {"data__held_out": share}
    spy_on_steps(monkeypatch, lambda *_: steps.append(1))
    with pytest.raises(Refused):
        run(judged(tmp_path, **changes))
    assert steps == []


def split_size(folder, share):
    """Images held out at that share; 0 where a side would be empty."""
    try:
        return len(split(folder, share)[1])
    except Refused:
        return 0


def test_paths_are_relative_to_where_the_command_runs(root, monkeypatch):
    monkeypatch.chdir(root)
    assert run(small(Path(), train__images=8))[0] == 0
    assert (root / "runs/a/summary.json").is_file()


def test_the_saved_configuration_is_strict_json_with_every_field(stopped):
    saved = strict_json((stopped / "runs/a/config.json").read_text())
    assert saved["model"]["classes"] == 4
    assert saved["train"]["images"] == 80
    assert torch.tensor(saved["optim"]["lr"]) == 1e-3
