"""Regressions: planted slow-downs are found, noise is not one, and what cannot be compared is refused.

The noise is recorded: tests/timing_noise.json holds raw samples in the order they were taken. Blocks of 25 of them are
drawn, longer than neighbours there stay alike, so that the draws are as correlated as the recording.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from benchmarks.compare import Change, change, main, student_quantile
from benchmarks.harness.rows import row, stamp, write
from sra_fast.tuning.timing import Samples

NOISE = {k: v for k, v in json.loads(Path(__file__).with_name("timing_noise.json").read_text()).items() if k != "about"}
KERNEL, STEP = 0.03, 0.015
BLOCK = 25


def draw(kind, count, rng):
    series = np.array(NOISE[kind])
    starts = rng.integers(0, len(series) - BLOCK + 1, (-(-count // BLOCK), 1))
    return series[(starts + np.arange(BLOCK)).ravel()[:count]]


def changes(kind, count, slowdown, comparisons):
    rng = np.random.default_rng(0)
    pairs = ((draw(kind, count, rng), (1 + slowdown) * draw(kind, count, rng)) for _ in range(comparisons))
    return [change([old], [new]) for old, new in pairs]


def verdicts(kind, count, threshold, slowdown, comparisons):
    return Counter(one.verdict(threshold) for one in changes(kind, count, slowdown, comparisons))


@pytest.mark.parametrize(("kind", "count"), [("kernel", 20), ("kernel", 200), ("step", 200), ("busy", 200)])
def test_a_against_a_fails_at_most_once_in_a_hundred(kind, count):
    """The recorded step drifts over some 20 samples: only a run several times as long can know that."""
    found = changes(kind, count, 0.0, 200)
    for threshold in (KERNEL, STEP):
        assert sum(one.verdict(threshold) == "slower" for one in found) <= 2


@pytest.mark.parametrize(("threshold", "slowdown", "count"), [(KERNEL, 0.05, 50), (STEP, 0.03, 100)])
def test_a_planted_slow_down_is_caught(threshold, slowdown, count):
    """5 % of a kernel and 3 % of a step, in noise whose 20th and 80th percentile are 2 % apart."""
    assert verdicts("kernel", count, threshold, slowdown, 100)["slower"] >= 95


def test_noise_that_hides_a_slow_down_is_called_noise():
    """Passing in silence would say that the step did not get slower."""
    found = verdicts("busy", 100, STEP, 0.03, 50)
    assert found["too noisy"] >= 45


@pytest.mark.parametrize(
    ("ratio", "half_width", "verdict"),
    [
        (1.02, 0.001, "same"),  # real, but below the threshold
        (1.04, 0.05, "same"),  # above it, but not real
        (1.04, 0.01, "slower"),
        (0.96, 0.01, "faster"),
        (1.20, 0.15, "too noisy"),
        (1.40, 0.15, "slower"),  # so much slower that the noise does not matter
    ],
)
def test_the_rule(ratio, half_width, verdict):
    found = Change(1.0, ratio, ratio, ratio * np.exp(-half_width), ratio * np.exp(half_width))
    assert found.verdict(KERNEL) == verdict


def test_the_quantile_of_students_t():
    """Against tables: t of 0.995 at 4, 10 and 30 degrees of freedom."""
    for freedom, tabled in ((4, 4.604), (10, 3.169), (30, 2.750)):
        assert student_quantile(0.995, freedom) == pytest.approx(tabled, rel=0.015)


def test_several_runs_of_a_row_are_pooled():
    rng = np.random.default_rng(0)
    first, second = draw("kernel", 40, rng), 3 * draw("kernel", 40, rng)
    assert change([first, second], [first]).old_ms == np.median(np.concatenate([first, second]))


@pytest.fixture(scope="module")
def here():
    return stamp("cpu")


@pytest.fixture
def results(tmp_path, here):
    """Writes a results file: name -> (params, samples in ms, or an error)."""

    def make(name, rows, **changed):
        mark = here | changed
        made = [
            row(title, params, Samples(error=what) if isinstance(what, str) else Samples(ms=tuple(what)), stamp=mark)
            for title, params, what in rows
        ]
        return write(tmp_path, name, made, mark)

    return make


def samples(scale=1.0, seed=0):
    return scale * draw("kernel", 60, np.random.default_rng(seed))


@pytest.mark.parametrize(
    ("name", "scale", "code"), [("adaln", 1.05, 1), ("adaln", 1.02, 0), ("step", 1.03, 1), ("stepwise", 1.02, 0)]
)
def test_the_threshold_goes_by_the_name(results, capsys, name, scale, code):
    """Another commit, date or clock does not matter, nor does a new row."""
    old = results("old", [(name, {}, samples())])
    new = [(name, {}, samples(scale)), ("new", {}, samples())]
    circumstances = {"commit": "0" * 40, "date": "2030-01-01", "clocks": {"sm_mhz": 1.0}}
    assert main([str(old), str(results("new", new, **circumstances))]) == code
    printed = capsys.readouterr().out
    assert ("slower: " + name in printed) == bool(code)


def test_rows_are_matched_by_name_and_params_in_any_order(results, capsys):
    a, b = {"rows": 8, "width": 32}, {"rows": 9, "width": 32}
    old = results("old", [("adaln", a, samples()), ("adaln", b, samples(10))])
    new = results("new", [("adaln", b, samples(10)), ("adaln", dict(reversed(a.items())), samples(1.2))])
    assert main([str(old), str(new)]) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "slower: adaln (rows=8, width=32)"


@pytest.mark.parametrize(
    ("before", "after", "code", "said"),
    [
        (None, "out of memory (2 GiB)", 1, "| slower"),
        ("out of memory (2 GiB)", None, 0, "| faster"),
        ("out of memory (2 GiB)", "out of memory (2 GiB)", 0, "| not compared"),
        (None, "not run (time)", 0, "| not compared"),
    ],
)
def test_rows_without_numbers(results, capsys, before, after, code, said):
    old = results("old", [("step", {}, before or samples())])
    assert main([str(old), str(results("new", [("step", {}, after or samples())]))]) == code
    assert said in capsys.readouterr().out


def refused(capsys, *arguments):
    assert main([str(argument) for argument in arguments]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("cannot be compared: ")
    assert err.count("\n") == 1
    return err


def test_missing_rows_are_refused(results, capsys):
    old = results("old", [("adaln", {}, samples()), ("gated", {"rows": 8}, samples())])
    assert "gated (rows=8)" in refused(capsys, old, results("new", [("adaln", {}, samples())]))


def test_files_that_are_not_results_are_refused(results, capsys, tmp_path):
    old = results("old", [("adaln", {}, samples())])
    (tmp_path / "empty").mkdir()
    assert "nowhere" in refused(capsys, old, tmp_path / "nowhere.json")
    assert "no rows" in refused(capsys, old, tmp_path / "empty")
    assert "must occur once" in refused(capsys, old, results("twice", 2 * [("adaln", {}, samples())]))
    assert "positive" in refused(capsys, old, old, "--kernel-threshold=0")
    assert "7 given; must be at least 8" in refused(capsys, old, results("few", [("adaln", {}, (1.0,) * 7)]))


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"device": "NVIDIA H200"}, "device: "),
        ({"driver": "580.1"}, "driver: None before, 580.1 now"),
        ({"versions": {"torch": "1.0", "triton": "0"}}, "versions.torch: "),
    ],
)
def test_stamps_that_do_not_match_are_refused_by_field(results, capsys, changed, named):
    old = results("old", [("adaln", {}, samples())])
    new = results("new", [("adaln", {}, samples())], **changed)
    assert named in refused(capsys, old, new)
    assert main([str(old), str(new), "--allow-different-stamp"]) == 0
    assert f"different stamps, compared all the same: {named}" in capsys.readouterr().out
