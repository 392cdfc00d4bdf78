"""The loop: which images it sees, what it writes when, steps that are not finite, and the evaluation at the end."""

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
)

from sra_fast import cli
from sra_fast.data.folder import scan
from sra_fast.errors import Refused
from sra_fast.step import step as step_module
from sra_fast.step.state import learning_rate
from sra_fast.step.step import TrainingStep
from sra_fast.training import validation

LINE = "step images_seen loss velocity_loss alignment_loss grad_norm lr ema_decay images_per_s skipped_steps"
FIGURES = "class_accuracy class_accuracy_guided real_accuracy frechet_distance frechet_distance_real "
FIGURES += "nearest_train_ratio"
SUMMARY = "images_seen train_s images_per_s velocity_loss alignment_loss validation_velocity_loss device resolved"


def spy_on_steps(monkeypatch, see):
    """Call see(state, batch) after every step."""
    original = TrainingStep.__call__

    def call(self, state, batch, *scalars):
        result = original(self, state, batch, *scalars)
        see(state, batch)
        return result

    monkeypatch.setattr(TrainingStep, "__call__", call)


# What is written


def test_fields_of_metrics_summary_and_configuration(root):
    assert run(small(root, train__validate_every_images=32))[0] == 0
    rows, written = metrics(root / "runs/a"), summary(root / "runs/a")
    with_validation = [row["step"] for row in rows if "validation_velocity_loss" in row]
    assert with_validation == [4, 8, 10]  # every 32 images, and at the end
    for row in rows:
        assert set(row) - {"validation_velocity_loss"} == set(LINE.split())
        assert all(math.isfinite(value) for value in row.values())
    assert {*SUMMARY.split(), *FIGURES.split()} <= set(written)
    assert written["images_seen"] == 80
    assert (written["resolved"]["attention"], written["resolved"]["step"]) == ("sdpa", "eager")
    assert written["resolved"]["perturb"] == "reference"
    assert all(written[name] is None for name in FIGURES.split())  # no evaluation was asked for
    for name in ("velocity_loss", "alignment_loss", "validation_velocity_loss"):
        assert written[name] == rows[-1][name]
    assert written["images_per_s"] == pytest.approx(80 / written["train_s"])
    saved = strict_json((root / "runs/a/config.json").read_text())
    assert (saved["model"]["classes"], saved["train"]["images"], saved["optim"]["lr"]) == (4, 80, 1e-3)


def test_what_computes_each_op_is_printed_and_why_it_falls_back(root):
    lines = []
    run(small(root, train__images=8, model__family="dit", sample__sampler="auto"), report=lines.append)
    ops = next(line for line in lines if line.startswith("ops "))
    for op, name in summary(root / "runs/a")["resolved"].items():
        assert f"{op}: {name}" in ops or op == "step"
    assert any("perturb: DiT reads its noise levels from tables" in line for line in lines)
    assert any(line.startswith("step ") and "eager" in line for line in lines)


@pytest.mark.parametrize(
    ("precision", "validation_precision", "dtype"),
    [("bf16", "auto", torch.bfloat16), ("bf16", "fp32", torch.float32), ("fp32", "auto", torch.float32)],
)
def test_validation_and_previews_compute_as_training_or_in_fp32(
    root, monkeypatch, precision, validation_precision, dtype
):
    seen = []
    for cls, name in ((validation.Validation, "loss"), (validation.Previews, "write")):
        method = getattr(cls, name)

        def noted(self, network, *rest, method=method):
            seen.append(network.pos_embed.dtype)
            return method(self, network, *rest)

        monkeypatch.setattr(cls, name, noted)
    options = {"train__precision": precision, "train__validation_precision": validation_precision}
    assert run(small(root, train__images=16, **options))[0] == 0
    assert len(seen) >= 2
    assert set(seen) == {dtype}


def test_previews_and_checkpoints_are_written_when_a_step_passes_their_number(root, monkeypatch):
    written, save_grid = [], validation.save_grid
    monkeypatch.setattr(
        validation, "save_grid", lambda path, *rest: (written.append(path.name), save_grid(path, *rest))
    )
    config = small(root, train__preview_every_images=20, train__save_every_images=32, train__keep_checkpoints=9)
    assert run(config)[0] == 0
    # Steps of 8: 20, 40, 60 and 80 are passed at 24, 40, 64 and 80.
    names = sorted(path.name for path in (root / "runs/a/samples").iterdir())
    assert names == written == [f"{number:012d}.png" for number in (24, 40, 64, 80)]
    assert [int(name) for name in checkpoints(root / "runs/a")] == [32, 64, 80]
    with Image.open(root / "runs/a/samples" / names[0]) as grid:
        assert grid.size == (4 * 33 - 1, 32)  # four samples, a column per class


def test_minutes_make_checkpoints_too_and_the_last_batch_is_complete(root):
    assert run(small(root, train__save_every_minutes=1e-9, train__images=17))[0] == 0
    assert [int(name) for name in checkpoints(root / "runs/a")] == [8, 16, 24]
    assert summary(root / "runs/a")["images_seen"] == 24


def test_validation_previews_checkpoints_and_logs_do_not_change_training(root):
    run(small(root, run__name="plain", train__log_every_steps=10))
    often = {f"train__{what}_every_images": 8 for what in ("validate", "preview", "save")}
    run(small(root, run__name="often", sample__steps=3, **often))
    ends = [content(root / "runs" / name / "checkpoints" / f"{80:012d}") for name in ("plain", "often")]
    assert ends[0] == ends[1]


def test_deterministic_runs_on_the_cpu_where_the_command_runs(root, monkeypatch):
    monkeypatch.chdir(root)
    try:
        assert run(small(Path(), deterministic=True, train__images=8))[0] == 0
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    assert (root / "runs/a/summary.json").is_file()


def test_a_run_without_dali_says_so(root, capfd, monkeypatch):
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    assert cli.main(arguments(root, data__reader="auto", train__images=8)) == 0
    assert capfd.readouterr().err.count("DALI is not installed") == 1


# Which images


def is_held_out(name):
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big") < 0.2 * 2**64


def test_held_out_images_are_never_trained_on_and_all_others_once_an_epoch(root, monkeypatch):
    seen = []

    def see(state, batch):
        levels = ((batch.x + 1) * 127.5).round().to(torch.uint8).squeeze(1).numpy()
        seen.extend((int(label), image.tobytes()) for image, label in zip(levels, batch.labels, strict=True))

    spy_on_steps(monkeypatch, see)
    names = [name for name in scan(root / "data").files if not is_held_out(name)]
    assert 0 < len(names) < 80
    expected = sorted((int(name[1]), np.asarray(Image.open(root / "data" / name)).tobytes()) for name in names)
    assert len(set(expected)) == len(names)  # all images differ
    run(small(root, train__images=3 * len(names), train__validate_every_images=16, train__preview_every_images=32))
    for epoch in range(3):
        assert sorted(seen[epoch * len(names) : (epoch + 1) * len(names)]) == expected


# Steps that are not finite


def spoil(monkeypatch, calls, factor=math.nan):
    """Multiply the loss of the calls with these numbers (1 = the first micro-batch) by `factor`."""
    real, count = step_module.training_losses, itertools.count(1)

    def losses(*args, **options):
        result = real(*args, **options)
        return result._replace(total=result.total * factor) if next(count) in calls else result

    monkeypatch.setattr(step_module, "training_losses", losses)


def bits(state):
    """Bytes of everything that a skipped step must leave alone."""
    tensors = {name: {key: value.numpy().tobytes() for key, value in getattr(state, name).items()} for name in TENSORS}
    networks = [[p.detach().numpy().tobytes() for p in n.parameters()] for n in (state.student, state.teacher)]
    return tensors, networks, int(state.adam_step)


@pytest.mark.parametrize(("accumulate", "factor"), [(1, math.nan), (2, math.inf)])
def test_a_step_that_is_not_finite_changes_nothing_but_consumes_its_images(root, monkeypatch, accumulate, factor):
    after, numbers = [], []
    spoil(monkeypatch, {4 * accumulate}, factor)  # the fourth step, in its last micro-batch
    spy_on_steps(monkeypatch, lambda state, batch: (after.append(bits(state)), numbers.extend(batch.number.tolist())))
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


def test_each_line_averages_the_finite_steps_since_the_line_before_also_across_a_resume(root, monkeypatch):
    spoil(monkeypatch, {2})
    config = small(root, train__log_every_steps=4, optim__warmup_images=40)
    steps = run(config, stop_after=6)[1] + run(config)[1]
    lines, before = metrics(root / "runs/a"), 0
    assert [line["step"] for line in lines] == [4, 6, 8, 10]
    for line in lines:
        rows = [row for row in steps[before : line["step"]] if math.isfinite(row["grad_norm"])]
        before = line["step"]
        for name in ("loss", "velocity_loss", "alignment_loss", "grad_norm"):
            assert line[name] == pytest.approx(sum(row[name] for row in rows) / len(rows), rel=1e-6)
        assert line["loss"] == pytest.approx(line["velocity_loss"] + 0.5 * line["alignment_loss"], rel=1e-5)
    assert [step["lr"] for step in steps] == pytest.approx([learning_rate(config, 8 * k) for k in range(10)])


def test_sixty_four_in_a_row_end_the_run_also_across_a_resume(root, monkeypatch, capfd):
    spoil(monkeypatch, itertools.count(1))
    assert run(small(root, train__images=800), stop_after=40)[0] == 143
    assert cli.main(arguments(root, train__images=800)) == 1
    assert "64 steps in a row" in complaint(capfd.readouterr())
    last = metrics(root / "runs/a")[-1]
    assert (last["step"], last["skipped_steps"]) == (64, 64)
    assert not (root / "runs/a/summary.json").exists()


# Evaluation at the end


def judged(root, **changes):
    evaluation = {"evaluate__samples": 40, "evaluate__after_training": True, "evaluate__min_class_accuracy": 0.95}
    return small(root, train__images=16, **evaluation, **changes)


def test_evaluation_fills_the_summary_and_fails_below_the_thresholds_now_and_later(root, capfd):
    pytest.importorskip("sklearn")
    assert run(judged(root))[0] == 1
    written = summary(root / "runs/a")
    assert all(math.isfinite(written[name]) for name in FIGURES.split())
    assert written["real_accuracy"] == 1.0
    failures = [line for line in capfd.readouterr().err.splitlines() if line.startswith("threshold missed: ")]
    assert any("class_accuracy" in line for line in failures)
    assert cli.main(["evaluate", "--weights", str(root / "runs/a")]) == 1
    output, error = capfd.readouterr()
    for name in FIGURES.split():
        assert f'"{name}": {written[name]!r}' in output
    assert [line for line in error.splitlines() if line.startswith("threshold missed: ")] == failures


def test_an_evaluation_that_is_not_possible_is_refused_before_training(root):
    with pytest.raises(Refused, match="values per image: 4096 given"):
        run(judged(root, data__resolution=64, model__patch=16))
    assert not (root / "runs").exists()
