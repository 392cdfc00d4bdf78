"""The README's figures are those of the newest results, and it says so when it has none."""

from __future__ import annotations

import subprocess

import pytest

from benchmarks import readme
from benchmarks.harness.rows import write
from benchmarks.harness.stamp import stamp
from benchmarks.harness.timing import Samples, row

HERE = stamp("cpu") | {"dirty": False}
H200 = {"kind": "cuda", "device": "NVIDIA H200", "power_limit_w": 700.0, "driver": "580.1"}


@pytest.fixture
def results(tmp_path):
    """A function that writes a file of results below <root>/benchmarks/results; and the folder."""

    def make(folder, name, rows, date="2026-01-01", **changed):
        mark = HERE | changed | {"date": f"{date}T10:00:00+00:00"}
        made = []
        for title, params, ms in rows:
            made.append(row(title, params, Samples(ms=(ms,) * 8), stamp=mark, bytes=10**6, flops=10**9))
            if title == "step":
                made[-1]["images_per_s"] = 1e3 * params["batch"] / ms
            if loader := params.get("loader"):
                speed = 1e3 * params["batch"] / ms
                made[-1] |= {"ours": "ours" in loader, "images_per_s": speed, "images_per_cpu_s": speed / 2}
        return write(place / folder, name, made, mark)

    place = tmp_path / "benchmarks" / "results"
    make.place, make.readme = place, tmp_path / "README.md"
    make.readme.write_text(f"# Before\n\n{readme.BEGIN}\n{readme.END}\n\nAfter\n")
    return make


def step(rung="ours", size="xl", batch=32, tokens=256):
    return {"size": size, "tokens": tokens, "batch": batch, "rung": rung}


def section(results, *words):
    assert readme.main(list(words), results.readme, results.place) == 0
    text = results.readme.read_text()
    assert text.startswith("# Before\n\n")
    assert text.endswith("\n\nAfter\n")
    return text


def test_this_readme_is_what_the_committed_results_say():
    assert readme.main(["--check"]) == 0


def test_without_a_gpu_it_says_not_yet_measured_and_with_one_it_does_not(results):
    results("cpu-a", "step", [("step", step(size="s"), 100.0)])
    assert "**NVIDIA GPU**: not yet measured" in section(results)
    results("h200-a", "step", [("step", step(), 40.0)], **H200)
    text = section(results)
    assert "not yet measured" not in text
    assert text.index("**NVIDIA H200**") < text.index("**CPU**")
    assert "| 800 " in text  # images/s
    assert "NVIDIA H200, 700 W, driver 580.1" in text


def test_the_newest_file_of_each_family_counts(results):
    """Whatever its folder is called; and one family's news leaves the others alone."""
    results("cpu-b", "old", [("step", step(), 100.0), ("step", step(batch=256), 500.0)], "2026-02-01")
    results("cpu-a", "new", [("step", step(), 50.0)], "2026-02-03", commit="feedbeef" * 5, command="/x/python -m b")
    results("cpu-c", "older", [("step", step(), 10.0)], "2026-01-01")
    text = section(results)
    assert "| ours | 640 " in text
    assert "cpu-c" not in text
    assert "commit feedbee, 2026-02-03; `python -m b`; raw samples in `benchmarks/results/cpu-a/new.json`" in text
    assert "raw samples in `benchmarks/results/cpu-b/old.json`" in text
    assert text.index("SiT-XL/2, 256 tokens, batch 32") < text.index("Other sizes")


def test_ratios_are_to_the_public_recipe_and_the_best_rival(results):
    rungs = {"public": 100.0, "+ torch.compile": 60.0, "ours": 50.0, "ours, plain SiT": 30.0}
    results("cpu-a", "xl", [("step", step(rung), ms) for rung, ms in rungs.items()])
    results("cpu-a", "s", [("step", step(rung, size="s"), ms) for rung, ms in rungs.items()])
    lines = section(results).splitlines()
    ours = next(line for line in lines if line.startswith("| ours  "))
    assert [cell.strip() for cell in ours.split("|")][2:5] == ["640", "2.00", "50"]
    small = next(line for line in lines if line.startswith("| SiT-S/2"))
    assert [cell.strip() for cell in small.split("|")][4:9] == ["320", "533.3", "640", "2.00", "1.20"]


def test_ops_and_updates_have_their_tables(results):
    base = {"size": "xl", "batch": 32, "dtype": "bf16", "pass": "forward"}
    ops = [("adaln", base | {"implementation": name}, ms) for name, ms in (("eager", 0.02), ("fused", 0.01))]
    ways = [("optimizer", {"size": "xl", "parameters": 9, "way": way}, 5.0) for way in ("torch, defaults", "ours")]
    results("h200-a", "kernels", ops + ways, **H200)
    lines = section(results).splitlines()
    adaln = next(line for line in lines if line.startswith("| adaln"))
    assert "eager 20, fused 10" in adaln
    assert "| fused   | 100 " in adaln  # GB/s
    assert any(line.startswith("| ours ") for line in lines)
    assert sum(line.startswith("<sub>") for line in lines) == 2


def test_what_delivers_data_has_its_table(results):
    """Of each kind the newest file's, and where both are from."""
    kinds = {"latents": "packed", "decode": "DALI"}
    both = [(kind, {"loader": f"ours, {name}", "batch": 8}, 20.0) for kind, name in kinds.items()]
    results("cpu-a", "data", [("step", step(), 100.0), *both, ("decode", {"loader": "rival", "batch": 8}, 40.0)])
    assert "Updates:" not in section(results)
    results("cpu-b", "data-jpegs", [("latents", {"loader": "ours, packed", "batch": 8}, 2.0)], "2026-02-01")
    before, _, data = section(results).partition("\nData:\n")
    assert "SiT-XL/2" in before
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in data.splitlines() if line.startswith("|")]
    assert lines[0][:6] == ["data", "by", "images/s", "x rival", "images/CPU-s", "x rival"]
    assert [line[:6] for line in lines[2:]] == [
        ["latents", "ours, packed", "4000", "", "2000", ""],
        ["decode", "ours, DALI", "400", "2.00", "200", "2.00"],
        ["decode", "rival", "200", "1.00", "100", "1.00"],
    ]
    for name in ("cpu-a/data", "cpu-b/data-jpegs"):
        assert data.count(f"raw samples in `benchmarks/results/{name}.json`") == 1


def test_models_cut_short_for_a_quick_look_are_left_out(results):
    results("cpu-a", "step-s-256-8-depth3", [("step", step(), 1.0)])
    results("cpu-a", "merged", [("step", step() | {"depth": 3}, 1.0)])
    assert "SiT" not in section(results)


def test_a_stale_readme_is_found_and_print_writes_nothing(results, capsys):
    results("cpu-a", "step", [("step", step(), 100.0)])
    before = results.readme.read_text()
    assert readme.main(["--check"], results.readme, results.place) == 1
    assert "stale" in capsys.readouterr().err
    assert readme.main(["--print"], results.readme, results.place) == 0
    assert "| 320 " in capsys.readouterr().out
    assert results.readme.read_text() == before
    section(results)
    assert readme.main(["--check"], results.readme, results.place) == 0


def test_the_check_knows_only_results_under_version_control(results):
    """So that measuring one's own machine does not fail one's tests."""

    def git(*words):
        subprocess.run(["git", *words], cwd=results.place.parents[1], check=True, capture_output=True)

    path = results("cpu-a", "step", [("step", step(), 100.0)])
    git("init")
    assert readme.main(["--check"], results.readme, results.place) == 1  # the section has never been written
    results("cpu-b", "mine", [("step", step(), 1.0)], "2026-05-05")
    git("add", str(path))
    results.readme.write_text(
        readme.replaced(results.readme.read_text(), readme.section(readme.newest([path], results.place.parents[1])))
    )
    assert readme.main(["--check"], results.readme, results.place) == 0
    git("add", ".")
    assert readme.main(["--check"], results.readme, results.place) == 1


def test_a_readme_without_markers_is_refused(results):
    results.readme.write_text("# Bare\n")
    with pytest.raises(ValueError, match="once each"):
        readme.main([], results.readme, results.place)
