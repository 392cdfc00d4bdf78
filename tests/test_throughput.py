"""Images a second of either clock: CPU time is that of workers too, and goals are against the best rival."""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.harness import rows as record
from benchmarks.harness import throughput
from benchmarks.harness.throughput import Candidate, Taken, cpu_s, fastest_step, measure, report, rows, without_places

CPU = torch.device("cpu")


def test_cpu_time_is_that_of_the_process_and_of_children_that_have_ended():
    before = cpu_s()
    sum(range(3_000_000))
    own = cpu_s() - before
    assert own > 0.005
    subprocess.run([sys.executable, "-S", "-c", "sum(range(10_000_000))"], check=True)
    assert cpu_s() - before > 2 * own


def test_candidates_take_turns_and_are_warmed_up_first():
    calls = []
    found = {name: Candidate(lambda name=name: calls.append(name) or 5, True, {}) for name in "abc"}
    taken = measure(found, 3, CPU)
    assert "".join(calls) == "abc" + "abc" + "bca" + "cab"
    assert {name: [one.images for one in samples] for name, samples in taken.items()} == dict.fromkeys("abc", [5] * 3)


def test_a_row_has_times_of_a_batch_and_the_rates_of_both_clocks(monkeypatch, tmp_path):
    taken = [Taken(10, 1.0, 4.0), Taken(20, 4.0, 4.0), Taken(10, 3.0, 8.0)]  # images, and seconds by either clock
    monkeypatch.setattr(throughput, "measure", lambda *_: {"a": taken})
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "x", "--jpegs", str(tmp_path), "--vae", "org/name"])
    chosen = argparse.Namespace(repeats=3, jpegs=tmp_path, vae="org/name")
    (made,) = rows("decode", {"a": Candidate(int, False, {"batch": 5}, 0.25)}, chosen, CPU, 7)
    assert made["samples_ms"] == [500, 1000, 1500]
    assert made["cpu_samples_ms"] == [2000, 1000, 4000]
    assert (made["images_per_s"], made["images_per_cpu_s"]) == (5, 2.5)
    assert (made["name"], made["params"], made["ours"]) == ("decode", {"loader": "a", "batch": 5}, False)
    assert made["bytes"] == 35
    assert made["levels_off"] == 0.25
    assert made["command"] == "python -m x --jpegs DIR --vae org/name"


# Paths of this machine ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "given", "kept"),
    [
        ("python -m benchmarks.bench_data --jpegs data", ["data"], "python -m benchmarks.bench_data --jpegs DIR"),
        ("python -m x --jpegs=data --vae=my/vae", ["data", "my/vae"], "python -m x --jpegs=DIR --vae=DIR"),
        ("python -m x --jpegs data --vae my/vae", ["data", "my/vae"], "python -m x --jpegs DIR --vae DIR"),
        ("x --jpegs 'own photos' --name 'a b'", ["own photos"], "x --jpegs DIR --name 'a b'"),
        ("x '--jpegs=own photos' --rows=8", ["own photos"], "x --jpegs=DIR --rows=8"),
        ("x --vae org/name", ["org/name"], "x --vae org/name"),
        ("x --vae=org/name --jpegs data", ["data", "org/name"], "x --vae=org/name --jpegs DIR"),
        ("x --rows 8", [None, None], "x --rows 8"),
    ],
)
def test_only_whole_arguments_that_are_paths_are_left_out(tmp_path, monkeypatch, words, given, kept):
    for name in ("data", "own photos", "my/vae"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert without_places(words, given) == kept


def test_a_whole_path_is_left_out(tmp_path):
    for name in ("photos", "own photos", "it's = mine"):
        path = tmp_path / name
        path.mkdir()
        for words in (["x", "--jpegs", str(path)], ["x", f"--jpegs={path}"]):
            for given in (path, str(path)):
                command = without_places(shlex.join(words), (given, None))
                assert command in ("x --jpegs DIR", "x --jpegs=DIR")


@pytest.mark.parametrize("given", ["photos/", "./photos", "/somewhere/gone"])
def test_a_path_is_left_out_however_it_is_written(tmp_path, monkeypatch, given):
    (tmp_path / "photos").mkdir()
    monkeypatch.chdir(tmp_path)
    assert without_places(f"x --jpegs {given}", [Path(given)]) == "x --jpegs DIR"


# The fastest step ---------------------------------------------------------------------------------------------------


def step(speed, name="step", size="xl", batch=256, **more):
    params = {"size": size, "tokens": 256, "batch": batch, "rung": "ours", **more}
    return {"name": name, "params": params, "device": "NVIDIA H200", "images_per_s": speed}


@pytest.fixture
def kept(tmp_path):
    """A function that writes a file of results."""
    return lambda name, *rows: record.write(tmp_path, name, rows, {})


def test_the_fastest_step_is_that_of_all_files(kept):
    files = [
        kept("a", step(3.0), step(40.0), step(5.0)),
        kept("b", step(30.0), step(900.0, "matmul"), step(900.0, "step/backward")),
    ]
    assert fastest_step(files) == fastest_step(reversed(files)) == step(40.0)


def test_a_step_without_a_rate_is_none(kept):
    out_of_memory = step(1.0)
    del out_of_memory["images_per_s"]
    without = kept("a", out_of_memory, step(None))
    assert fastest_step([without]) is None
    assert fastest_step([without, kept("b", step(2.0))]) == step(2.0)


def test_files_with_other_content_are_passed_over(kept, tmp_path):
    whole = json.loads(kept("whole", step(9.0)).read_text())
    other = [json.dumps(content) for content in ([step(9.0)], {"rows": [step(9.0)]}, "step")]
    other += [json.dumps({key: value for key, value in whole.items() if key != field}) for field in whole]
    other += [json.dumps(whole | {"format_version": 99}), json.dumps(whole)[:-9], ""]
    files = []
    for number, text in enumerate(other):
        files.append(tmp_path / f"{number}.json")
        files[-1].write_text(text)
    (tmp_path / "bytes.json").write_bytes(bytes(range(256)))
    files += [tmp_path / "bytes.json", tmp_path / "gone.json"]
    for file in files:
        assert fastest_step([file]) is None
    assert fastest_step([]) is None
    assert fastest_step([*files, kept("d", step(2.0))]) == step(2.0)


def test_models_cut_short_are_no_steps(kept):
    """By the file's name, as of bench_step, or by a row's own word, as in a report."""
    short = [kept("step-xl-256-32-depth3", step(900.0)), kept("step", step(800.0, depth=3), step(2.0))]
    assert fastest_step(short[:1]) is None
    assert fastest_step(short) == step(2.0)


# The report ---------------------------------------------------------------------------------------------------------


def row(loader, speed, cpu_speed, name="latents"):
    figures = {"images_per_s": speed, "images_per_cpu_s": cpu_speed, "median_ms": 1.0, "p20_ms": 1.0, "p80_ms": 1.0}
    return {"name": name, "params": {"loader": loader, "batch": 1}, "ours": loader.startswith("ours"), **figures}


@pytest.mark.parametrize(
    ("name", "clock", "goal"),
    [("latents", "images_per_cpu_s", 20), ("decode", "images_per_cpu_s", 1), ("decode on a GPU", "images_per_s", 1.5)],
)
def test_the_goal_is_of_our_best_over_the_best_rival(name, clock, goal):
    """Each of its clock: others are the best by the other clock, which has no goal."""
    other = {"images_per_s": "images_per_cpu_s", "images_per_cpu_s": "images_per_s"}[clock]

    def made(best):
        speeds = {"ours, a": (best, 1), "ours, b": (best / 2, 60), "rival, a": (100, 1), "rival, b": (99, 40)}
        return [row(loader, 0, 0, name) | {clock: x, other: y} for loader, (x, y) in speeds.items()]

    lines = report(made(100 * goal)).splitlines()
    assert f"{clock}: ours, a {goal:.2f} x the best rival; goal {goal}: reached" in lines
    assert f"{other}: ours, b 1.50 x the best rival" in lines
    lines = report(made(96 * goal)).splitlines()
    assert f"{clock}: ours, a {0.96 * goal:.2f} x the best rival; goal {goal}: missed" in lines


@pytest.mark.parametrize(
    ("name", "clock", "goal"), [("decode", "images_per_cpu_s", 1), ("decode on a GPU", "images_per_s", 1.5)]
)
def test_dali_s_goal_is_dali_s_to_reach(name, clock, goal):
    speeds = {"ours, Pillow, 1 threads": 900, "ours, DALI, 1 threads": 90, "Pillow, DataLoader": 100}
    made = [row(loader, speed, speed, name) for loader, speed in speeds.items()]
    line = f"{clock}: ours, DALI, 1 threads 0.90 x the best rival; goal {goal}: missed"
    assert line in report(made).splitlines()


def test_what_has_no_rival_has_no_ratio():
    text = report([row("ours", 3, 4, "encode")])
    assert text.startswith("encode\n\n| data ")
    assert "| 3 " in text
    assert not any(word in text for word in ("goal", "best rival;", "images_per_s:", "images_per_cpu_s:"))


@pytest.mark.parametrize(("speed", "ratio", "reached"), [(800, "2", "reached"), (798, "1.995", "missed")])
def test_the_loader_is_held_to_twice_the_fastest_step(speed, ratio, reached):
    """By the wall clock, with or without a rival."""
    made = [row("ours, packed", speed, 1), row("ours, public files", 20, 9000), row("public", 9000, 3)]
    what = "SiT-XL/2, 256 tokens, batch 256 on NVIDIA H200: 400 images/s"
    line = f"images_per_s: ours, packed {ratio} x the fastest measured step ({what}); goal 2: {reached}"
    for some in (made, made[:2]):
        assert line in report(some, step(400.0)).splitlines()
        assert "step" not in report(some)
