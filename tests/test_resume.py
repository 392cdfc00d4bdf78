"""Stop, kill and resume: a run in pieces equals an unbroken one in every bit, and what may not change is refused."""

from __future__ import annotations

import itertools
import json
import shutil
import signal
from dataclasses import replace

import pytest
import torch
from small_run import (
    arguments,
    checkpoints,
    complaint,
    content,
    metrics,
    process,
    run,
    small,
    summary,
    without_speed,
    write_images,
)

from sra_fast import cli
from sra_fast.data.folder import scan, split
from sra_fast.step.step import TrainingStep
from sra_fast.training import trainer
from sra_fast.training.metrics import StepLog
from sra_fast.training.validation import Previews, Validation

END = "000000000080"  # checkpoint after ten steps of eight
FIRST = "000000000040"  # where the fixture `stopped` stops


# A run in pieces


def equal_to_unbroken(root, stops, **changes):
    """Run at once, and in pieces that end after `stops` steps: the same weights, moments, counters, losses, lines.
    Returns the two folders."""
    code, unbroken = run(small(root, run__name="unbroken", **changes))
    assert code == 0
    pieces = []
    for stop in (*stops, 0):
        code, rows = run(small(root, run__name="pieces", **changes), stop_after=stop)
        assert code == (143 if stop else 0)
        pieces += rows
    assert pieces == unbroken
    folders = root / "runs/unbroken", root / "runs/pieces"
    end = f"{8 * len(unbroken):012d}"
    contents = [content(folder / "checkpoints" / end) for folder in folders]
    assert contents[0] == contents[1]
    assert contents[0]["counters"]["adam_step"] == len(unbroken) >= 10
    rows = [without_speed(metrics(folder)) for folder in folders]
    assert rows[0] == rows[1]
    assert [row["step"] for row in rows[0]] == list(range(1, len(unbroken) + 1))
    return folders


@pytest.mark.parametrize(
    ("stops", "changes"),
    [
        pytest.param(
            [5],
            {
                "train__accumulate": 2,
                "train__validate_every_images": 16,
                "optim__weight_decay": 0.1,
                "objective__times": "lognormal",
            },
            id="sit",
        ),
        pytest.param([5], {"model__family": "dit", "sample__sampler": "auto"}, id="dit"),
        pytest.param([2, 1, 3], {"optim__warmup_images": 56}, id="three stops"),
        pytest.param([9], {"align__method": "none"}, id="no alignment"),
        pytest.param([5], {"train__precision": "bf16"}, id="bf16"),
        pytest.param([5], {"train__execution": "compiled"}, id="compiled", marks=pytest.mark.slow),
    ],
)
def test_ten_steps_equal_five_and_five_in_every_bit(root, stops, changes):
    equal_to_unbroken(root, stops, **changes)


def test_with_dali(root):
    pytest.importorskip("nvidia.dali")
    equal_to_unbroken(root, [5], data__reader="dali")


def test_replaced_images_are_counted_across_a_resume(root):
    name = split(scan(root / "data"), 0.2)[0].files[30]
    (root / "data" / name).write_bytes(b"no image")
    # The damaged file comes up in each of three epochs, but not after the stop. The weight changes with the epoch.
    changes = {"train__images": 160, "align__weight_decade_epochs": 1}
    folders = equal_to_unbroken(root, [18], data__max_bad_share=0.1, **changes)
    unbroken, pieces = map(summary, folders)
    assert list(unbroken["undecodable_files"]) == list(pieces["undecodable_files"]) == [name]
    assert unbroken["replaced_images"] == pieces["replaced_images"] == 3


@pytest.mark.parametrize("is_finished", [False, True])
def test_a_stop_in_the_last_step_leaves_the_end_to_the_next_start(root, is_finished):
    if is_finished:
        assert run(small(root, train__images=40))[0] == 0
    assert run(small(root), stop_after=5 if is_finished else 10)[0] == 143
    assert not (root / "runs/a/summary.json").exists()
    assert run(small(root))[0] == 0
    assert summary(root / "runs/a")["images_seen"] == 80


@pytest.mark.parametrize(("part", "call"), [(Previews.write, 1), (Validation.loss, 1), (StepLog.write, 5)])
def test_a_signal_outside_the_step_saves_too(root, monkeypatch, part, call):
    calls = []

    def interrupted(*arguments, **options):
        calls.append(1)
        if len(calls) == call:
            signal.raise_signal(signal.SIGTERM)
        return part(*arguments, **options)

    monkeypatch.setattr(f"{part.__module__}.{part.__qualname__}", interrupted)
    code, _ = run(small(root, train__preview_every_images=40, train__validate_every_images=40))
    assert code == 143
    assert checkpoints(root / "runs/a") == [FIRST]


def test_a_second_signal_stops_at_once_and_leaves_the_last_checkpoint(root, monkeypatch):
    original = TrainingStep.__call__

    def interrupted(self, state, *batch):
        row = original(self, state, *batch)
        if int(state.adam_step) == 6:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
        return row

    monkeypatch.setattr(TrainingStep, "__call__", interrupted)
    assert cli.main(arguments(root, train__save_every_images=32)) == 130
    assert checkpoints(root / "runs/a") == ["000000000032"]


# Signals to a process

SAVING = {"train__save_every_images": 16, "train__keep_checkpoints": 1}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """The folder of a run that saves every second step and is never stopped."""
    root = tmp_path_factory.mktemp("unbroken")
    write_images(root / "data")
    assert run(small(root, **SAVING))[0] == 0
    return root / "runs/a"


def goes_on_like(unbroken, root):
    """The run below `root`, continued, ends like an unbroken one."""
    folder = root / "runs/a"
    saved = max(int(name) for name in checkpoints(folder) if not name.endswith(".tmp"))
    assert saved >= metrics(folder)[-1]["images_seen"] - 16
    code, rows = run(small(root, train__keep_checkpoints=1))
    assert (code, len(rows)) == (0, 10 - saved // 8)
    assert checkpoints(folder) == [END]
    assert content(folder / "checkpoints" / END) == content(unbroken / "checkpoints" / END)
    assert without_speed(metrics(folder)) == without_speed(metrics(unbroken))


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_finishes_the_step_and_saves(root, unbroken, number):
    child = process(root, number, "sra_fast.step.step.TrainingStep.__call__", 7, **SAVING)
    assert (child.returncode, "Traceback" in child.stderr) == (128 + number, False)
    assert "stopped and saved at 56 images" in child.stdout
    assert checkpoints(root / "runs/a") == ["000000000056"]
    assert not (root / "runs/a/summary.json").exists()
    goes_on_like(unbroken, root)


@pytest.mark.parametrize(
    ("function", "call"),
    [
        ("sra_fast.step.step.TrainingStep.__call__", 6),  # with a line after the last checkpoint
        ("sra_fast.model.public_weights.write_safetensors", 10),  # in the middle of a checkpoint
        ("pathlib.Path.rename", 3),  # just before a checkpoint gets its name
        *(
            pytest.param(f"sra_fast.training.{function}", call, marks=pytest.mark.slow)
            for function, call in [
                ("checkpoint.write_json", 2),
                ("checkpoint.sync", 8),
                ("checkpoint.sync", 14),  # the new name is not yet on the disk
                ("checkpoint.shutil.rmtree", 3),  # before an old checkpoint is removed
                ("checkpoint.shutil.os.rmdir", 1),  # when it is almost removed
                ("metrics.MetricsFile.write", 8),
                ("metrics.MetricsFile.close", 1),
            ]
        ),
    ],
)
def test_a_killed_run_loses_only_the_steps_since_its_last_checkpoint(root, unbroken, function, call):
    assert process(root, signal.SIGKILL, function, call, **SAVING).returncode == -signal.SIGKILL
    goes_on_like(unbroken, root)


# What is refused, and what may change


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"optim__lr": 0.5}, "optim.lr: 0.5"),
        ({"train__batch": 16}, "train.batch: 16"),
        ({"train__precision": "bf16"}, "train.precision: 'bf16'"),
        ({"run__seed": 7}, "run.seed: 7"),
        ({"model__hidden": 64}, "model.hidden: 64"),
        ({"model__family": "dit", "sample__sampler": "auto"}, "model.family: 'dit'"),
        ({"align__t_max": 0.3}, "align.t-max: 0.3"),
        ({"data__held_out": 0.3}, "data.held-out: 0.3"),
        ({"data__exif": True}, "data.exif: True"),
    ],
)
def test_what_decides_a_step_may_not_change(stopped, refused, changes, field):
    before = content(stopped / "runs/a/checkpoints" / FIRST)
    assert f"{field} given" in refused(arguments(stopped, **changes))
    assert checkpoints(stopped / "runs/a") == [FIRST]
    assert content(stopped / "runs/a/checkpoints" / FIRST) == before
    assert json.loads((stopped / "runs/a/config.json").read_text())["optim"]["lr"] == 1e-3


def test_other_images_are_refused(stopped, refused):
    (stopped / "data/c0/000.png").rename(stopped / "data/c0/000a.png")
    assert "data.images: " in refused(arguments(stopped))


def test_frequencies_length_and_place_may_change(stopped, main):
    shutil.move(stopped / "data", stopped / "moved")
    changes = {
        "data__images": str(stopped / "moved"),
        "data__threads": 2,
        "train__images": 96,
        "train__log_every_steps": 2,
        "train__save_every_images": 16,
        "train__keep_checkpoints": 1,
        "model__attention": "math",
        "model__checkpoint_every": 1,
        "sample__steps": 3,
    }
    assert main(arguments(stopped, "--kernels.default", "reference", **changes))[0] == 0
    assert checkpoints(stopped / "runs/a") == ["000000000096"]


def test_a_finished_run_is_refused_until_it_is_made_longer(root, main, refused):
    assert main(arguments(root))[0] == 0
    assert "run.name: 'a' given; is finished (80 images)" in refused(arguments(root))
    assert main(arguments(root, train__images=96))[0] == 0
    assert summary(root / "runs/a")["images_seen"] == 96
    assert [row["step"] for row in metrics(root / "runs/a")] == list(range(1, 13))


def test_resume_never_starts_a_new_run_or_none(root, main, refused):
    assert run(small(root, resume="never"), stop_after=2)[0] == 143
    assert "resume: 'never' given" in refused(arguments(root, resume="never"))
    assert checkpoints(root / "runs/a") == ["000000000016"]
    assert main(arguments(root))[0] == 0


def test_another_runs_checkpoint_begins_a_new_run_and_does_not_enter_one(stopped, refused):
    path = stopped / "runs/a/checkpoints" / FIRST
    before, lines = content(path), []
    assert run(small(stopped, run__name="b", resume=str(path)), stop_after=2, report=lines.append)[0] == 143
    assert "the same command with --run.name b" in lines[-1]
    for name in "ab":
        assert run(small(stopped, run__name=name))[0] == 0
    assert content(path) == before
    ends = [content(stopped / "runs" / name / "checkpoints" / END) for name in "ab"]
    assert ends[0] == ends[1]
    assert [row["step"] for row in metrics(stopped / "runs/b")] == [6, 7, 8, 9, 10]
    assert "resume: " in refused(arguments(stopped, run__name="b", resume=str(path)))


def test_what_computes_each_op_is_saved_and_handed_on_when_the_run_resumes(root, monkeypatch):
    """On a GPU `decide` measures; here a stand-in decides."""
    before = []

    def decide(config, hardware, report, stored, resumed):
        before.append(resumed)
        return replace(config, kernels=replace(config.kernels, adamw_ema="reference"))

    monkeypatch.setattr(trainer, "decide", decide)
    assert run(small(root), stop_after=2)[0] == 143
    saved = json.loads((root / "runs/a/config.json").read_text())
    assert saved["kernels"]["adamw_ema"] == "reference"
    assert run(small(root))[0] == 0
    assert before[0] is None
    assert before[1].kernels.adamw_ema == "reference"
    assert summary(root / "runs/a")["resolved"]["adamw_ema"] == "reference"


def test_a_path_that_is_no_checkpoint_is_refused(root, refused):
    assert str(root / "data") in refused(arguments(root, resume=str(root / "data")))
    assert not (root / "runs/a").exists()


# A lack of memory


LACKS = {
    "CPU": RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes."),
    "GPU": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "Python": MemoryError(),
    "a thread": RuntimeError("can't start new thread"),
}


@pytest.mark.parametrize("lack", LACKS)
def test_a_lack_of_memory_saves_and_says_what_to_lower(root, main, monkeypatch, lack):
    steps, original = itertools.count(1), TrainingStep.gradients

    def gradients(*arguments):
        if next(steps) == 4:
            raise LACKS[lack]
        return original(*arguments)

    monkeypatch.setattr(TrainingStep, "gradients", gradients)
    code, *output = main(arguments(root))
    assert (code, "train.batch" in complaint(output)) == (1, True)
    assert checkpoints(root / "runs/a") == [f"{24:012d}"]
    monkeypatch.undo()
    code, rows = run(small(root))
    assert (code, len(rows)) == (0, 7)


def test_a_state_that_a_step_has_begun_to_change_is_not_saved(root, main, monkeypatch):
    def apply(self, state, *_):
        state.adam_step += 1
        raise MemoryError

    monkeypatch.setattr(TrainingStep, "apply", apply)
    assert "out of memory" in complaint(main(arguments(root))[1:])
    assert checkpoints(root / "runs/a") == []


def test_held_out_images_that_cannot_be_read_cost_no_training(root, main):
    for name in split(scan(root / "data"), 0.2)[1].files:
        (root / "data" / name).write_bytes(b"no image")
    line = complaint(main(arguments(root))[1:])
    assert line.startswith("sra-fast: held-out images: ")
    assert checkpoints(root / "runs/a") == [END]


def test_a_run_that_learned_nothing_is_no_success(root, main, monkeypatch):
    gradients = TrainingStep.gradients

    def infinite(*arguments):
        values, losses = gradients(*arguments)
        return [value * float("inf") for value in values], losses

    monkeypatch.setattr(TrainingStep, "gradients", infinite)
    code, *output = main(arguments(root))
    assert (code, "no step had a finite gradient norm" in complaint(output)) == (1, True)
    assert summary(root / "runs/a")["skipped_steps"] == 10


def test_a_second_sigterm_has_its_own_exit_code(root, monkeypatch):
    original = TrainingStep.__call__

    def interrupted(self, *arguments):
        signal.raise_signal(signal.SIGHUP)
        signal.raise_signal(signal.SIGTERM)
        return original(self, *arguments)

    monkeypatch.setattr(TrainingStep, "__call__", interrupted)
    assert cli.main(arguments(root)) == 128 + signal.SIGTERM
