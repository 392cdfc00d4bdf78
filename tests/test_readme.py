"""The READMEs' figures are those of the newest results, and they say so if there are none."""

from __future__ import annotations

import subprocess

import pytest

from benchmarks import readme
from benchmarks.harness.rows import row, stamp, write
from sra_fast.tuning.timing import Samples

HERE = stamp("cpu") | {"dirty": False}
H200 = {"kind": "cuda", "device": "NVIDIA H200", "power_limit_w": 700.0, "driver": "580.1"}


@pytest.fixture
def results(tmp_path):
    """Writes a file of results below <root>/benchmarks/results; has the root with both READMEs."""

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
        return write(tmp_path / "benchmarks" / "results" / folder, name, made, mark)

    make.root = tmp_path
    (tmp_path / "benchmarks").mkdir()
    for name in ("README.md", "benchmarks/README.md"):
        (tmp_path / name).write_text(f"# Before\n\n{readme.BEGIN}\n{readme.END}\n\nAfter\n")
    return make


def step(rung="ours", size="xl", batch=32, tokens=256):
    return {"size": size, "tokens": tokens, "batch": batch, "rung": rung}


def written(results):
    """(README.md, benchmarks/README.md)."""
    assert readme.main([], results.root) == 0
    texts = [(results.root / name).read_text() for name in ("README.md", "benchmarks/README.md")]
    for text in texts:
        assert text.startswith("# Before\n\n")
        assert text.endswith("\n\nAfter\n")
    return texts


def cells(text, start):
    line = next(line for line in text.splitlines() if line.startswith(start))
    return [cell.strip() for cell in line.split("|")[1:-1]]


def test_the_readmes_are_what_the_committed_results_say():
    assert readme.main(["--check"]) == 0


def test_without_a_gpu_it_says_not_yet_measured_and_with_one_it_does_not(results):
    results("cpu-a", "step", [("step", step(size="s"), 100.0)])
    for text in written(results):
        assert "not yet measured" in text
    results("h200-a", "step", [("step", step("public"), 80.0), ("step", step(), 40.0)], **H200)
    short, long = written(results)
    assert "not yet measured" not in short + long
    assert cells(short, "| NVIDIA H200") == [
        "NVIDIA H200",
        "SiT-XL/2, 256 tokens, batch 32",
        "400",
        "800",
        "2.00",
        "",
        "",
    ]
    cpu = f"CPU: {HERE['device']}, {HERE['threads']} threads"
    assert cells(short, "| CPU") == [cpu, "SiT-S/2, 256 tokens, batch 32", "", "320", "", "", ""]
    assert long.index("**NVIDIA H200**") < long.index("**CPU: ")
    assert "NVIDIA H200, 700 W, driver 580.1" in long


def test_the_newest_file_of_each_family_counts(results):
    """Whatever its folder is called; and one family's news leaves the others alone."""
    results("cpu-b", "old", [("step", step(), 100.0), ("step", step(batch=256), 500.0)], "2026-02-01")
    results("cpu-a", "new", [("step", step(), 50.0)], "2026-02-03", commit="feedbeef" * 5, command="/x/python -m b")
    results("cpu-c", "older", [("step", step(), 10.0)], "2026-01-01")
    _, text = written(results)
    assert "| ours | 640 " in text
    assert "cpu-c" not in text
    assert "commit feedbee, 2026-02-03; `python -m b`; raw samples in `benchmarks/results/cpu-a/new.json`" in text
    assert "raw samples in `benchmarks/results/cpu-b/old.json`" in text
    assert text.index("SiT-XL/2, 256 tokens, batch 32") < text.index("SiT-XL/2, 256 tokens, batch 256")


def test_every_kind_of_rows_has_its_table(results):
    shape = {"size": "xl", "batch": 32, "dtype": "bf16", "pass": "forward"}
    ops = [("adaln", shape | {"implementation": name}, ms) for name, ms in (("eager", 0.02), ("fused", 0.01))]
    ways = [("optimizer", {"size": "xl", "parameters": 9, "way": way}, ms) for way, ms in (("torch, defaults", 5.0),)]
    data = [(kind, {"loader": name, "batch": 8, "files": 5, "made_up": True}, ms) for kind, name, ms in (
        ("decode", "ours, DALI", 20.0), ("decode", "rival, a", 40.0), ("decode", "rival, b", 30.0),
        ("encode", "ours, VAE", 10.0),
    )]  # fmt: skip
    steps = [("step", step(name), ms) for name, ms in (("public", 100.0), ("ours", 50.0), ("ours, plain SiT", 40.0))]
    results("h200-a", "all", ops + ways + data + steps, **H200)
    _, text = written(results)
    assert cells(text, "| adaln")[5:8] == ["eager 20, fused 10", "fused", "100"]  # microseconds, GB/s
    assert cells(text, "| torch, defaults")[:3] == ["torch, defaults (0 M parameters)", "xl", "5"]
    ours = ["decode, 5 made-up JPEGs", "ours, DALI", "400", "1.50", "200", "1.50", "20"]  # against the better rival
    assert cells(text, "| decode, 5 made-up JPEGs | ours")[:7] == ours
    assert cells(text, "| encode, 5 made-up JPEGs")[3] == ""
    assert cells(text, "| ours  ")[1:4] == ["640", "2.00", "50"]
    assert "A step with SRA takes 1.25 x the time of plain SiT." in text
    assert text.count("<sub>") == 4


def test_models_cut_short_for_a_quick_look_are_left_out(results):
    results("cpu-a", "step-s-256-8-depth3", [("step", step(), 1.0)])
    results("cpu-a", "merged", [("step", step() | {"depth": 3}, 1.0)])
    assert "SiT" not in "".join(written(results))


@pytest.mark.parametrize("stale", ["README.md", "benchmarks/README.md"])
def test_a_stale_readme_is_found_and_print_writes_nothing(results, capsys, stale):
    results("cpu-a", "step", [("step", step(), 100.0)])
    written(results)
    path = results.root / stale
    path.write_text(path.read_text().replace("| 320 ", "| 321 "))
    assert readme.main(["--check"], results.root) == 1
    assert capsys.readouterr().err.startswith(f"{stale} is stale")
    assert readme.main(["--print"], results.root) == 0
    assert "| 320 " in capsys.readouterr().out
    assert "| 321 " in path.read_text()


def test_the_check_knows_only_results_under_version_control(results):
    """So that measuring one's own machine does not fail one's tests."""

    def git(*words):
        subprocess.run(["git", *words], cwd=results.root, check=True, capture_output=True)

    path = results("cpu-a", "step", [("step", step(), 100.0)])
    written(results)
    git("init")
    git("add", str(path))
    results("cpu-b", "mine", [("step", step(), 1.0)], "2026-05-05")
    assert readme.main(["--check"], results.root) == 0
    git("add", ".")
    assert readme.main(["--check"], results.root) == 1
