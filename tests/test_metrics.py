"""metrics.jsonl and TensorBoard: one history, in strict JSON, whatever happened before."""

from __future__ import annotations

import math
import sys

import pytest
from small_run import metrics, run, small, strict_json, write_images

from sra_fast.errors import Refused
from sra_fast.files import read_json, write_json
from sra_fast.training.metrics import MetricsFile


@pytest.fixture
def plain(monkeypatch):
    """No TensorBoard, which takes a second to import."""
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)


def written(folder, images_seen, rows):
    log = MetricsFile(folder, images_seen)
    for row in rows:
        log.write(row)
    log.close()
    return metrics(folder)


ROWS = [{"step": step, "images_seen": 8 * step, "loss": 1 / step} for step in range(1, 6)]


def test_lines_beyond_the_checkpoint_are_dropped(tmp_path, plain):
    assert written(tmp_path, 0, ROWS) == ROWS
    again = [{**row, "loss": 7.0} for row in ROWS[3:]]
    assert written(tmp_path, 24, again) == [*ROWS[:3], *again]
    assert written(tmp_path, 0, ROWS[:1]) == ROWS[:1]


@pytest.mark.parametrize("tail", ['{"step": 6, "imag', '{"step": 6', "\x00\x00\x00", "\n\n"])
def test_a_line_that_a_crash_cut_is_dropped(tmp_path, plain, tail):
    written(tmp_path, 0, ROWS)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(tail)
    assert written(tmp_path, 40, []) == ROWS


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_becomes_null(tmp_path, plain, value):
    assert written(tmp_path, 0, [{"images_seen": 8, "loss": value}]) == [{"images_seen": 8, "loss": None}]
    write_json(tmp_path / "a.json", {"a": [1.5, {"b": value}], "c": (value,)})
    assert strict_json((tmp_path / "a.json").read_text()) == {"a": [1.5, {"b": None}], "c": [None]}


def test_a_line_is_on_the_disk_as_soon_as_it_is_written(tmp_path, plain):
    log = MetricsFile(tmp_path, 0)
    log.write(ROWS[0])
    assert metrics(tmp_path) == ROWS[:1]
    log.close()


def test_a_json_file_is_whole_or_the_old_one(tmp_path):
    write_json(tmp_path / "a.json", {"a": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"a": object()})
    assert read_json(tmp_path / "a.json") == {"a": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", None])
def test_an_unreadable_json_file_is_refused_by_name(tmp_path, content):
    path = tmp_path / "a.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(Refused, match=r"a\.json: not a readable JSON file") as refusal:
        read_json(path)
    assert "\n" not in str(refusal.value)


def test_tensorboard_shows_what_metrics_jsonl_says_also_after_a_resume(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    write_images(tmp_path / "data")
    config = small(tmp_path, train__validate_every_images=32)
    run(config, stop_after=5)
    run(config)
    events = accumulator.EventAccumulator(str(tmp_path / "runs/a")).Reload()
    rows = metrics(tmp_path / "runs/a")
    for name in ("loss", "velocity_loss", "alignment_loss", "grad_norm", "lr", "validation_velocity_loss"):
        expected = [(row["images_seen"], row[name]) for row in rows if name in row]
        shown = [(event.step, event.value) for event in events.Scalars(name)]
        assert [step for step, _ in shown] == [step for step, _ in expected], name
        assert [value for _, value in shown] == pytest.approx([value for _, value in expected]), name


def test_without_tensorboard_one_line_says_so(tmp_path, plain, capsys):
    written(tmp_path, 0, ROWS)
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "pip install tensorboard" in error


def test_tensorboard_forgets_what_a_crash_made_void(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    written(tmp_path, 0, ROWS)
    written(tmp_path, 24, [{**row, "loss": 7.0} for row in ROWS[3:]])
    events = accumulator.EventAccumulator(str(tmp_path)).Reload()
    shown = [(event.step, event.value) for event in events.Scalars("loss")]
    assert [step for step, _ in shown] == [8, 16, 24, 32, 40]
    assert [value for _, value in shown] == pytest.approx([1.0, 0.5, 1 / 3, 7.0, 7.0])
