"""A run that was stopped, killed or finished: what going on gives, and what is refused."""

from __future__ import annotations

import json
import shutil
import signal
import time

import pytest
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
    write_images,
)

from sra_fast import cli
from sra_fast.data.folder import scan, split
from sra_fast.data.image_stream import ImageStream
from sra_fast.errors import Refused
from sra_fast.step.step import TrainingStep
from sra_fast.training.metrics import StepLog
from sra_fast.training.validation import Previews, Validation

END = "000000000080"  # checkpoint after ten steps of eight


@pytest.fixture
def main(capfd):
    """The command line, as (exit code, its complaint or an empty string)."""

    def call(words):
        capfd.readouterr()
        code = cli.main(words)
        return code, complaint(capfd.readouterr()) if code == 1 else ""

    return call


def equal_to_unbroken(root, stops, **changes):
    """Ten steps at once, and in pieces that end after `stops` steps: the same weights, moments, counters, losses."""
    code, whole = run(small(root, run__name="whole", **changes))
    assert (code, len(whole)) == (0, 10)
    pieces = []
    for stop in (*stops, 0):
        code, rows = run(small(root, run__name="pieces", **changes), stop_after=stop)
        assert code == (143 if stop else 0)
        pieces += rows
    assert pieces == whole
    runs = root / "runs"
    last = content(runs / "whole/checkpoints" / END)
    assert last == content(runs / "pieces/checkpoints" / END)
    assert last["counters"]["adam_step"] == 10
    return runs / "whole", runs / "pieces"


@pytest.mark.parametrize("family", ["sit", "dit"])
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("count", [80, 40])
def test_ten_steps_equal_five_and_five_in_every_bit(tmp_path, family, accumulate, count):
    folder = write_images(tmp_path / "data", count)
    # 80 files: the stop is within the first epoch, which ends later; 40: it is within the second.
    assert (len(split(scan(folder), 0.2)[0]) > 40) == (count == 80)
    equal_to_unbroken(
        tmp_path,
        [5],
        model__family=family,
        sample__sampler="auto",
        train__accumulate=accumulate,
        train__log_every_steps=3,
        align__weight_decade_epochs=1,  # the weight changes with the epoch
        optim__weight_decay=0.1,
        objective__times="lognormal" if family == "sit" else "uniform",
    )


@pytest.mark.parametrize("stops", [[1], [9], [10], [2, 1, 3]], ids=str)
def test_the_moment_of_the_stop_does_not_matter(root, stops):
    equal_to_unbroken(root, stops, optim__warmup_images=56)  # a warm-up of seven steps, then the cosine


def test_without_alignment(root):
    equal_to_unbroken(root, [5], align__method="none")


def test_compiled(root):
    equal_to_unbroken(root, [5], train__execution="compiled")


def test_in_bf16(root):
    equal_to_unbroken(root, [5], train__precision="bf16")


def test_with_dali(root):
    pytest.importorskip("nvidia.dali")
    equal_to_unbroken(root, [5], data__reader="dali")


def damage_training_file(root):
    name = split(scan(root / "data"), 0.2)[0].files[7]
    (root / "data" / name).write_bytes(b"no image")
    return name


def test_with_an_undecodable_file(root):
    damage_training_file(root)
    equal_to_unbroken(root, [5], data__max_bad_share=0.1)


def test_replaced_images_are_counted_across_a_resume(root):
    name = damage_training_file(root)
    # Twenty steps: the damaged file comes up in each of almost three epochs.
    changes = {"data__max_bad_share": 0.1, "train__images": 160}
    run(small(root, run__name="whole", **changes))
    run(small(root, run__name="pieces", **changes), stop_after=18)
    run(small(root, run__name="pieces", **changes))
    whole, pieces = summary(root / "runs/whole"), summary(root / "runs/pieces")
    assert list(whole["undecodable_files"]) == list(pieces["undecodable_files"]) == [name]
    assert whole["replaced_images"] == pieces["replaced_images"] >= 2


def without_speed(rows):
    return [{name: value for name, value in row.items() if name != "images_per_s"} for row in rows]


def test_metrics_are_those_of_an_unbroken_run(root):
    whole, pieces = equal_to_unbroken(root, [5], train__validate_every_images=16)
    assert without_speed(metrics(whole)) == without_speed(metrics(pieces))
    assert [row["step"] for row in metrics(pieces)] == list(range(1, 11))


def test_each_line_averages_the_steps_since_the_line_before_it_also_across_a_resume(root):
    config = small(root, train__log_every_steps=4)
    losses = [row["loss"] for part in (run(config, stop_after=6)[1], run(config)[1]) for row in part]
    lines, before = metrics(root / "runs/a"), 0
    assert lines[-1]["step"] == 10
    for line in lines:
        steps = losses[before : line["step"]]
        assert line["loss"] == pytest.approx(sum(steps) / len(steps), rel=1e-6), f"line of step {line['step']}"
        before = line["step"]


def test_lines_after_the_last_checkpoint_are_written_anew(root, monkeypatch):
    run(small(root, run__name="whole"))
    crashing = small(root, train__save_every_images=32)
    original, calls = TrainingStep.__call__, []

    def crash(*batch):
        calls.append(1)
        if len(calls) == 7:
            raise MemoryError
        return original(*batch)

    monkeypatch.setattr(TrainingStep, "__call__", crash)
    with pytest.raises(MemoryError):
        run(crashing)
    monkeypatch.undo()
    assert checkpoints(root / "runs/a") == ["000000000032"]
    assert [row["step"] for row in metrics(root / "runs/a")] == [1, 2, 3, 4, 5, 6]
    with (root / "runs/a/metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "images_se')  # what a kill leaves of a line
    code, rows = run(crashing)
    assert (code, len(rows)) == (0, 6)
    assert without_speed(metrics(root / "runs/a")) == without_speed(metrics(root / "runs/whole"))
    assert content(root / "runs/a/checkpoints" / END) == content(root / "runs/whole/checkpoints" / END)


# Real processes


def wait_for_lines(folder, count, child):
    deadline = time.monotonic() + 120
    path = folder / "metrics.jsonl"
    while not path.exists() or path.read_text().count("\n") < count:
        assert child.poll() is None, child.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_the_same_command_goes_on(root, main, number, code):
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
    assert main(arguments(root, train__images=int(saved) + 16)) == (0, "")
    rows = metrics(folder)
    assert [row["images_seen"] for row in rows] == [8 * (i + 1) for i in range(len(rows))]
    assert summary(folder)["images_seen"] == int(saved) + 16


def test_kill_9_loses_no_more_than_the_time_since_the_last_checkpoint(root, main):
    folder = root / "runs/a"
    child = process(arguments(root, train__images=800_000, train__save_every_images=16))
    try:
        wait_for_lines(folder, 5, child)
    finally:
        child.kill()
    child.communicate(timeout=60)
    complete = [name for name in checkpoints(folder) if not name.endswith(".tmp")]
    assert len(complete) >= 2
    half = folder / "checkpoints" / f"{int(complete[-1]) + 16:012d}.tmp"
    shutil.copytree(folder / "checkpoints" / complete[-1], half, dirs_exist_ok=True)
    (half / "adam_v.safetensors").write_bytes(b"half")
    assert main(arguments(root, train__images=int(complete[-1]) + 32, train__save_every_images=16)) == (0, "")
    assert not any(name.endswith(".tmp") for name in checkpoints(folder))
    rows = metrics(folder)
    assert [row["step"] for row in rows] == list(range(1, int(complete[-1]) // 8 + 5))


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


# What is refused, and what may change


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"optim__lr": 0.5}, "optim.lr: 0.5"),
        ({"train__batch": 16}, "train.batch: 16"),
        ({"train__accumulate": 2}, "train.accumulate: 2"),
        ({"train__precision": "bf16"}, "train.precision: 'bf16'"),
        ({"run__seed": 7}, "run.seed: 7"),
        ({"model__hidden": 64}, "model.hidden: 64"),
        ({"model__depth": 4}, "model.depth: 4"),
        ({"align__method": "none"}, "align.method: 'none'"),
        ({"align__t_max": 0.3}, "align.t-max: 0.3"),
        ({"data__held_out": 0.3}, "data.held-out: 0.3"),
        ({"data__exif": True}, "data.exif: True"),
    ],
)
def test_what_decides_a_step_may_not_change(stopped, main, changes, field):
    before = content(stopped / "runs/a/checkpoints/000000000040")
    code, line = main(arguments(stopped, **changes))
    assert code == 1
    assert f"{field} given" in line
    assert checkpoints(stopped / "runs/a") == ["000000000040"]
    assert content(stopped / "runs/a/checkpoints/000000000040") == before
    assert json.loads((stopped / "runs/a/config.json").read_text())["optim"]["lr"] == 1e-3


def test_other_images_are_refused(stopped, main):
    (stopped / "data/c0/000.png").rename(stopped / "data/c0/000a.png")
    code, line = main(arguments(stopped))
    assert code == 1
    assert "data.images" in line
    assert "other files" in line


def test_rhythm_length_and_place_may_change(stopped, main):
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
    assert main(arguments(stopped, "--kernels.default", "reference", **changes)) == (0, "")
    assert checkpoints(stopped / "runs/a") == ["000000000096"]


def test_a_finished_run_is_refused_until_it_is_made_longer(root, main):
    assert main(arguments(root)) == (0, "")
    code, line = main(arguments(root))
    assert code == 1
    assert "run.name: 'a' given; is finished" in line
    assert "80" in line
    assert main(arguments(root, train__images=96)) == (0, "")
    assert summary(root / "runs/a")["images_seen"] == 96
    assert [row["step"] for row in metrics(root / "runs/a")] == list(range(1, 13))


@pytest.mark.parametrize("finished_before", [False, True])
def test_a_stop_in_the_last_step_leaves_the_end_to_the_next_start(root, finished_before):
    if finished_before:
        assert run(small(root, train__images=40))[0] == 0
    assert run(small(root), stop_after=5 if finished_before else 10)[0] == 143
    assert run(small(root))[0] == 0
    assert summary(root / "runs/a")["images_seen"] == 80


def test_resume_never_does_not_overwrite_checkpoints(stopped, main):
    code, line = main(arguments(stopped, resume="never"))
    assert code == 1
    assert "resume: 'never' given" in line
    assert checkpoints(stopped / "runs/a") == ["000000000040"]


def test_resume_never_starts_a_new_run(root, main):
    assert main(arguments(root, resume="never")) == (0, "")


def test_another_runs_checkpoint_begins_a_new_run(stopped, main):
    path = stopped / "runs/a/checkpoints/000000000040"
    before = content(path)
    assert main(arguments(stopped, run__name="b", resume=str(path))) == (0, "")
    assert run(small(stopped))[0] == 0
    assert content(path) == before
    ends = [content(stopped / "runs" / name / "checkpoints" / END) for name in "ab"]
    assert ends[0] == ends[1]
    assert [row["step"] for row in metrics(stopped / "runs/b")] == [6, 7, 8, 9, 10]


def test_a_checkpoint_into_a_run_with_others_is_refused(stopped, main):
    assert run(small(stopped, run__name="b"), stop_after=6)[0] == 143
    path = str(stopped / "runs/a/checkpoints/000000000040")
    code, line = main(arguments(stopped, run__name="b", resume=path))
    assert code == 1
    assert "resume: " in line
    assert checkpoints(stopped / "runs/b") == ["000000000048"]


@pytest.mark.parametrize("resume", ["nowhere", "data"])
def test_a_path_that_is_no_checkpoint_is_refused(root, main, resume):
    code, line = main(arguments(root, resume=str(root / resume)))
    assert code == 1
    assert str(root / resume) in line
    assert not (root / "runs/a/config.json").exists()


@pytest.mark.parametrize("resume", ["never", "path"])
def test_a_stopped_run_goes_on_as_promised(stopped, main, resume):
    path = "never" if resume == "never" else str(stopped / "runs/a/checkpoints/000000000040")
    said = []
    code, _ = run(small(stopped, run__name="b", resume=path), stop_after=2, report=said.append)
    assert code == 143
    assert "--run.name b resumes from here" in said[-1]
    code, line = main(arguments(stopped, run__name="b", resume="auto"))
    assert code == 0, line


@pytest.mark.parametrize(("part", "method"), [(Previews, "write"), (Validation, "loss"), (StepLog, "write")])
def test_a_signal_outside_the_step_saves_too(tmp_path, monkeypatch, part, method):
    write_images(tmp_path / "data")
    original, calls = getattr(part, method), []

    def interrupted(self, *arguments, **options):
        calls.append(1)
        if len(calls) == (5 if part is StepLog else 1):
            signal.raise_signal(signal.SIGTERM)
        return original(self, *arguments, **options)

    monkeypatch.setattr(part, method, interrupted)
    often = {"train__preview_every_images": 40, "train__validate_every_images": 40}
    code, _ = run(small(tmp_path, **often))
    assert code == 143
    assert checkpoints(tmp_path / "runs/a") == ["000000000040"]


def test_what_was_learned_before_the_data_gave_out_is_kept(tmp_path, monkeypatch):
    write_images(tmp_path / "data")
    original = ImageStream.__next__

    def failing(self):
        batch = original(self)
        if int(batch.number[0]) == 24:
            raise Refused("data.images: gone")
        return batch

    monkeypatch.setattr(ImageStream, "__next__", failing)
    with pytest.raises(Refused, match="gone"):
        run(small(tmp_path))
    assert checkpoints(tmp_path / "runs/a") == ["000000000024"]
