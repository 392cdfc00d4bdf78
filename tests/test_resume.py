"""Stop, kill and resume: a run in pieces equals an unbroken one in every bit, and what may not change is refused."""

from __future__ import annotations

import json
import shutil
import signal
import time

import pytest
from small_run import (
    arguments,
    checkpoints,
    content,
    killed,
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
                "align__weight_decade_epochs": 1,  # the weight changes with the epoch
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


def test_a_stop_in_the_second_epoch(tmp_path):
    folder = write_images(tmp_path / "data", 40)
    assert len(split(scan(folder), 0.2)[0]) < 40
    equal_to_unbroken(tmp_path, [5], align__weight_decade_epochs=1)


def test_with_dali(root):
    pytest.importorskip("nvidia.dali")
    equal_to_unbroken(root, [5], data__reader="dali")


def test_replaced_images_are_counted_across_a_resume(root):
    name = split(scan(root / "data"), 0.2)[0].files[7]
    (root / "data" / name).write_bytes(b"no image")
    # Twenty steps: the damaged file comes up in each of almost three epochs.
    folders = equal_to_unbroken(root, [18], data__max_bad_share=0.1, train__images=160)
    unbroken, pieces = map(summary, folders)
    assert list(unbroken["undecodable_files"]) == list(pieces["undecodable_files"]) == [name]
    assert unbroken["replaced_images"] == pieces["replaced_images"] >= 2


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


# Processes


def wait_for_lines(folder, count, child):
    deadline = time.monotonic() + 120
    path = folder / "metrics.jsonl"
    while not path.exists() or path.read_text().count("\n") < count:
        assert child.poll() is None, child.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)]
)
def test_a_signal_saves_and_the_same_command_resumes(root, main, number, code):
    folder = root / "runs/a"
    child = process(arguments(root, train__images=800_000))
    try:
        wait_for_lines(folder, 3, child)
        child.send_signal(number)
        output, error = child.communicate(timeout=60)
    finally:
        child.kill()
    assert child.returncode == code, error
    assert "Traceback" not in error
    assert "stopped and saved" in output
    (saved,) = checkpoints(folder)
    assert metrics(folder)[-1]["images_seen"] == int(saved)  # the step was finished
    assert not (folder / "summary.json").exists()
    assert main(arguments(root, train__images=int(saved) + 16))[0] == 0
    rows = metrics(folder)
    assert [row["images_seen"] for row in rows] == [8 * (i + 1) for i in range(len(rows))]
    assert summary(folder)["images_seen"] == int(saved) + 16


SAVING = {"train__save_every_images": 16, "train__keep_checkpoints": 1}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """The folder of a run that saves every second step and is never stopped."""
    root = tmp_path_factory.mktemp("unbroken")
    write_images(root / "data")
    assert run(small(root, **SAVING))[0] == 0
    return root / "runs/a"


SLOW_KILLS = [
    ("pathlib.Path.mkdir", 12),
    ("sra_fast.training.checkpoint.write_json", 2),
    ("sra_fast.training.checkpoint.sync", 8),
    ("sra_fast.training.checkpoint.sync", 13),
    ("sra_fast.training.checkpoint.sync", 14),  # the new name is not yet on the disk
    ("shutil.rmtree", 4),
    ("os.unlink", 5),
    ("os.rmdir", 1),
    ("sra_fast.training.metrics.MetricsFile.write", 8),
    ("sra_fast.training.metrics.MetricsFile.close", 1),
]


@pytest.mark.parametrize(
    ("function", "call"),
    [
        ("sra_fast.step.runner.StepRunner.__call__", 6),  # with lines after the last checkpoint
        ("sra_fast.training.checkpoint.save_file", 10),  # in the middle of a checkpoint
        ("pathlib.Path.rename", 3),  # just before it gets its name
        *(pytest.param(*kill, marks=pytest.mark.slow) for kill in SLOW_KILLS),
    ],
)
def test_a_run_that_is_killed_loses_only_the_steps_since_its_last_checkpoint(root, unbroken, function, call):
    folder = root / "runs/a"
    killed(root, function, call, **SAVING)
    saved = max(int(name) for name in checkpoints(folder) if not name.endswith(".tmp"))
    assert saved >= metrics(folder)[-1]["images_seen"] - 16
    code, rows = run(small(root, **SAVING))
    assert (code, len(rows)) == (0, 10 - saved // 8)
    assert checkpoints(folder) == [END]
    assert content(folder / "checkpoints" / END) == content(unbroken / "checkpoints" / END)
    assert without_speed(metrics(folder)) == without_speed(metrics(unbroken))


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


def test_another_runs_checkpoint_begins_a_new_run(stopped):
    path = stopped / "runs/a/checkpoints" / FIRST
    before, lines = content(path), []
    assert run(small(stopped, run__name="b", resume=str(path)), stop_after=2, report=lines.append)[0] == 143
    assert "--run.name b resumes from here" in lines[-1]
    for name in "ab":
        assert run(small(stopped, run__name=name))[0] == 0
    assert content(path) == before
    ends = [content(stopped / "runs" / name / "checkpoints" / END) for name in "ab"]
    assert ends[0] == ends[1]
    assert [row["step"] for row in metrics(stopped / "runs/b")] == [6, 7, 8, 9, 10]


def test_a_checkpoint_into_a_run_with_others_is_refused(stopped, refused):
    assert run(small(stopped, run__name="b"), stop_after=6)[0] == 143
    path = str(stopped / "runs/a/checkpoints" / FIRST)
    assert "resume: " in refused(arguments(stopped, run__name="b", resume=path))
    assert checkpoints(stopped / "runs/b") == ["000000000048"]


@pytest.mark.parametrize("resume", ["nowhere", "data"])
def test_a_path_that_is_no_checkpoint_is_refused(root, refused, resume):
    assert str(root / resume) in refused(arguments(root, resume=str(root / resume)))
    assert not (root / "runs").exists() or list((root / "runs").iterdir()) == []
