"""metrics.jsonl and TensorBoard: one history, in strict JSON, whatever happened before."""

from __future__ import annotations

import errno
import itertools
import os
import sys
import time
from unittest import mock

import pytest
from small_run import full_disk, metrics, run, small

from sra_fast.training.metrics import MetricsFile


@pytest.fixture
def plain(monkeypatch):
    """No TensorBoard, which takes a second to import."""
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)


def written(folder, images_seen, rows):
    file = MetricsFile(folder, images_seen)
    for count, row in enumerate(rows, len(metrics(folder)) + 1):
        file.write(row)
        assert len(metrics(folder)) == count  # at once
    file.close()
    return metrics(folder)


ROWS = [{"step": step, "images_seen": 8 * step, "loss": 1 / step} for step in range(1, 6)]


def test_lines_beyond_the_checkpoint_are_dropped(tmp_path, plain):
    assert written(tmp_path, 0, ROWS) == ROWS
    rewritten = [{**row, "loss": 7.0} for row in ROWS[3:]]
    assert written(tmp_path, 24, rewritten) == [*ROWS[:3], *rewritten]
    assert written(tmp_path, 0, ROWS[:1]) == ROWS[:1]


@pytest.mark.parametrize("tail", ['{"step": 6, "imag', '{"step": 6', "\x00\x00\x00", "\n\n"])
def test_a_line_that_a_crash_cut_is_dropped(tmp_path, plain, tail):
    written(tmp_path, 0, ROWS)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(tail)
    assert written(tmp_path, 40, []) == ROWS


def test_damaged_lines_are_left_out_and_the_others_kept(tmp_path, plain, capsys):
    written(tmp_path, 0, ROWS)
    path = tmp_path / "metrics.jsonl"
    lines = path.read_bytes().splitlines()
    damaged = [b"{}", b"[1]", b"5", b"\xff\xfe", b"[" * 100_000, lines[3][:9]]
    damaged.append(b'{"images_seen": ' + b"1" * 5_000 + b"}")  # more digits than Python converts
    path.write_bytes(b"\n".join([*lines[:3], *damaged, *lines[3:]]))
    assert written(tmp_path, 40, []) == ROWS
    assert f"{len(damaged)} damaged lines left out" in capsys.readouterr().err


def test_a_full_disk_is_reported_once_and_training_goes_on(tmp_path, plain, capsys):
    file = MetricsFile(tmp_path, 0)
    with full_disk(10):
        for row in ROWS[:3]:
            file.write(row)
    file.write(ROWS[3])
    file.close()
    assert capsys.readouterr().err.count("metrics.jsonl: a line could not be written") == 1
    assert written(tmp_path, 40, ROWS[4:]) == ROWS[3:]


@pytest.mark.parametrize("when", ["open", "write"])
def test_tensorboard_never_ends_a_run(root, capfd, monkeypatch, when):
    writer = pytest.importorskip("tensorboard.summary.writer.event_file_writer")
    error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    target = (writer.EventFileWriter, "__init__") if when == "open" else (writer.RecordWriter, "write")
    monkeypatch.setattr(*target, mock.Mock(side_effect=error))
    code, rows = run(small(root))
    assert (code, len(rows)) == (0, 10)
    output = capfd.readouterr().err
    assert output.count("No space left on device") == 1
    assert "Traceback" not in output


def test_without_tensorboard_one_line_says_so(tmp_path, plain, capsys):
    written(tmp_path, 0, ROWS)
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "pip install tensorboard" in error


@pytest.fixture
def seconds(monkeypatch):
    """Each look at the clock is a second later than the one before: TensorBoard orders files by the second."""
    monkeypatch.setattr(time, "time", itertools.count(time.time()).__next__)


def scalars(folder, name):
    """[(step, value)] that TensorBoard shows."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(folder)).Reload()
    return [(event.step, pytest.approx(event.value)) for event in events.Scalars(name)]


def test_tensorboard_shows_what_metrics_jsonl_says_also_after_a_resume(root, seconds):
    config = small(root, train__validate_every_images=32)
    run(config, stop_after=5)
    run(config)
    for name in ("loss", "velocity_loss", "alignment_loss", "grad_norm", "lr", "validation_velocity_loss"):
        expected = [(row["images_seen"], row[name]) for row in metrics(root / "runs/a") if name in row]
        assert scalars(root / "runs/a", name) == expected


def test_tensorboard_forgets_what_a_crash_made_void(tmp_path, seconds):
    written(tmp_path, 0, ROWS)
    written(tmp_path, 24, [{**row, "loss": 7.0} for row in ROWS[3:]])
    assert scalars(tmp_path, "loss") == [(8, 1.0), (16, 0.5), (24, 1 / 3), (32, 7.0), (40, 7.0)]


def test_a_line_without_end_takes_no_memory_and_is_one_damaged_line(tmp_path, plain, capsys):
    with (tmp_path / "metrics.jsonl").open("wb") as file:
        file.write(b'{"images_seen": 8}\n')
        file.truncate(50_000_000)
        file.seek(0, os.SEEK_END)
        file.write(b'\n{"images_seen": 16}\n')
    MetricsFile(tmp_path, 24).close()
    assert "1 damaged line left out" in capsys.readouterr().err
    assert [row["images_seen"] for row in metrics(tmp_path)] == [8, 16]
