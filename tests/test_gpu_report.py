"""The report survives its parts: what fails or takes too long is named, what was measured before is kept."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import compare, gpu_report
from benchmarks.bench_step import NAMES
from benchmarks.harness.parts import FAILED, NOT_HERE, NOT_RUN, OK, Part, run_parts
from benchmarks.harness.report import LARGEST, MOST_FILES, gather
from benchmarks.harness.rows import read, write
from benchmarks.harness.stamp import stamp
from benchmarks.harness.timing import Samples, row

HERE = stamp("cpu")


def results(path, name, rows):
    made = [row(title, params, Samples(ms=(ms,) * 8), stamp=HERE, bytes=10**6) for title, params, ms in rows]
    for entry in made:
        if entry["name"] == "step":
            entry["images_per_s"] = 1e3 / entry["median_ms"]
        if "loader" in entry["params"]:
            entry |= {"ours": True, "images_per_s": 6.0, "images_per_cpu_s": 3.0}
    return write(path, name, made, HERE)


def step(rung="ours", batch=32):
    return {"size": "xl", "tokens": 256, "batch": batch, "rung": rung}


@pytest.fixture
def planted(tmp_path, monkeypatch):
    """A function that makes a module of that body, which parts can run."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "modules"))
    (tmp_path / "modules").mkdir()

    def make(name, body, **options):
        (tmp_path / "modules" / f"{name}.py").write_text(body)
        return Part(name, name, **options)

    return make


def leaves(path):
    """Code that leaves a file of results."""
    return f"import os, shutil, sys, time\nshutil.copy({str(path)!r}, os.environ['SRA_FAST_RESULTS'])\n"


def run(parts, tmp_path, budget_s=60.0):
    """(outcomes by name, report.json, report.md, names of all files)."""
    out, staging = tmp_path / "out", tmp_path / "staging"
    found = run_parts(parts, budget_s, staging, lambda so_far: gather(staging, out, so_far, HERE))
    report = json.loads((out / "report.json").read_text())
    assert [part["name"] for part in report["parts"]] == [part.name for part in parts]
    by_name = {outcome.name: outcome for outcome in found}
    return by_name, report, (out / "report.md").read_text(), sorted(path.name for path in out.iterdir())


def test_failing_parts_are_named_and_the_others_go_on(planted, tmp_path):
    first = results(tmp_path, "first", [("step", step(), 40.0)])
    second = results(
        tmp_path, "second", [("step", step(batch=256), 300.0), ("adaln", {"implementation": "fused"}, 1.0)]
    )
    parts = [
        planted("raises", leaves(first) + "raise ValueError('no such luck')"),
        planted("crashes", "import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)"),
        Part("missing", "no_such_module"),
        planted("nothing", "raise SystemExit(5)", nothing_to_do=(5,)),
        planted("good", leaves(second)),
    ]
    outcomes, report, text, files = run(parts, tmp_path)
    assert [outcome.outcome for outcome in outcomes.values()] == [FAILED, FAILED, FAILED, OK, OK]
    assert outcomes["raises"].reason == "exit code 1"
    assert "SIGSEGV" in outcomes["crashes"].reason
    assert "No module named no_such_module" in outcomes["missing"].stderr[-1]
    assert "ValueError: no such luck" in report["parts"][0]["stderr"][-1]
    assert "ValueError: no such luck" in text
    assert "raises failed: exit code 1" in text
    assert "## Ops" in text
    assert "## Data" not in text  # there is none
    # what the failed part had already written counts
    assert [entry["params"]["batch"] for entry in read(tmp_path / "out" / "step.json")["rows"]] == [32, 256]
    assert {"kernels.json", "report.json", "report.md", "step.json"} <= set(files)


def test_a_part_gets_its_share_of_the_time_and_is_killed_whole(planted, tmp_path):
    """With the processes it has started; rows it wrote before count; what comes later has the rest of the time."""
    first = results(tmp_path, "first", [("step", step(), 40.0)])
    child = tmp_path / "child"
    hangs = leaves(first) + (
        "import subprocess\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        f"open({str(child)!r}, 'w').write(str(child.pid))\n"
        "time.sleep(60)"
    )
    parts = [planted("hangs", hangs, share=0.4), planted("good", "", share=0.9), planted("late", "", share=0.01)]
    began = time.monotonic()
    outcomes, _, text, _ = run(parts, tmp_path, budget_s=9.0)
    assert time.monotonic() - began < 9
    assert [outcome.outcome for outcome in outcomes.values()] == [NOT_RUN, OK, NOT_RUN]
    assert "killed after 4 s" in outcomes["hangs"].reason
    assert "s were left" in outcomes["late"].reason
    assert text.count("not run (time)") == 2
    assert len(read(tmp_path / "out" / "step.json")["rows"]) == 1
    status = Path(f"/proc/{child.read_text()}/status")
    assert not status.exists() or "Z (zombie)" in status.read_text()


def test_a_part_that_must_end_fails_when_it_hangs(planted, tmp_path):
    hangs = planted("hangs", "import time\ntime.sleep(60)", share=0.5, must_end=True)
    assert run([hangs], tmp_path, budget_s=6.5)[0]["hangs"].outcome == FAILED


def test_a_part_that_lacks_something_says_what(planted, tmp_path, capsys):
    lacks = planted("lacks", "import sys\nprint('no such tool', file=sys.stderr)\nsys.exit(69)", not_here=(69,))
    other = planted("other", "raise SystemExit(69)")
    outcomes, _, text, _ = run([lacks, other], tmp_path)
    assert [outcome.outcome for outcome in outcomes.values()] == [NOT_HERE, FAILED]
    assert outcomes["lacks"].reason == "no such tool"
    assert "| lacks | not run | " in " ".join(text.split())
    assert "All parts ran." not in text
    assert gpu_report.report([lacks], 60.0, "cpu", tmp_path / "again") == 0
    assert "lacks  not run, " in capsys.readouterr().out


def test_a_part_gets_no_more_than_its_most(planted, tmp_path):
    hangs = planted("hangs", "import time\ntime.sleep(60)", share=0.9, most_s=4.0)
    assert "killed after 4 s" in run([hangs], tmp_path)[0]["hangs"].reason


def test_at_most_eight_files_none_too_large(tmp_path):
    profile = tmp_path / "staging" / "03-cli"
    profile.mkdir(parents=True)
    (profile / "profile.json").write_text('{"traces": []}')
    for number in range(4):
        (profile / f"sit-{number}.pt.trace.json.gz").write_bytes(gzip.compress(b"{}"))
    (profile / "sit-large.pt.trace.json.gz").write_bytes(bytes(LARGEST + 1))
    results(tmp_path / "staging" / "01-bench_step", "step-xl-256-32", [("step", step(), 40.0), ("other", {}, 1.0)])
    results(tmp_path / "staging" / "02-bench_step", "step-xl-256-32-depth3", [("step", step(), 10.0)])
    gather(tmp_path / "staging", tmp_path / "out", [], HERE)
    files = sorted((tmp_path / "out").iterdir())
    assert len(files) == MOST_FILES
    assert all(path.stat().st_size <= LARGEST for path in files)
    assert sum(path.name.endswith(".gz") for path in files) == 2
    remarks = json.loads((tmp_path / "out" / "report.json").read_text())["remarks"]
    assert sum("left out: sit-" in remark for remark in remarks) == 3
    assert "left out: sit-large.pt.trace.json.gz, 16.0 MiB" in (tmp_path / "out" / "report.md").read_text()
    # the model cut short is another model
    rows = read(tmp_path / "out" / "step.json")["rows"]
    assert [entry["params"].get("depth") for entry in rows] == [None, 3]
    if "steps.png" in {path.name for path in files}:
        assert (tmp_path / "out" / "steps.png").read_bytes().startswith(b"\x89PNG")
    compare.load(tmp_path / "out")  # as one folder of results


def test_of_a_row_measured_twice_the_first_with_numbers_counts(tmp_path):
    for number, ms in enumerate((40.0, 30.0)):
        results(tmp_path / "staging" / f"{number:02d}-bench_step", "step-xl-256-32", [("step", step(), ms)])
    broken = results(tmp_path / "staging" / "00-a", "step-xl-256-32", [("step", step(), 1.0)])
    content = json.loads(broken.read_text())
    content["rows"][0] |= {"samples_ms": [], "median_ms": None, "error": "out of memory"}
    content["rows"][0].pop("images_per_s")
    broken.write_text(json.dumps(content))
    gather(tmp_path / "staging", tmp_path / "out", [], HERE)
    (found,) = read(tmp_path / "out" / "step.json")["rows"]
    assert found["median_ms"] == 40.0
    assert "error" not in found


def test_every_kind_of_rows_has_its_table(tmp_path):
    ops = {"size": "xl", "batch": 32, "dtype": "bf16", "pass": "forward", "implementation": "fused"}
    made = [
        ("adaln", ops, 1.0),
        ("optimizer", {"size": "xl", "parameters": 9, "way": "ours"}, 1.0),
        ("latents", {"loader": "ours, packed", "batch": 8}, 4.0),
        ("roof", {"what": "copy"}, 1.0),
    ]
    results(tmp_path / "staging" / "01-mixed", "mixed", made)
    gather(tmp_path / "staging", tmp_path / "out", [], HERE)
    text = (tmp_path / "out" / "report.md").read_text()
    _, *parts = text.split("\n## ")
    assert [part.partition("\n")[0] for part in parts] == ["Parts", "Ops", "Update", "Data", "Roofs"]
    data = parts[3].splitlines()
    assert "| images/s | x rival | images/CPU-s | x rival |" in data[2]
    assert [cell.strip() for cell in data[4].split("|")[1:8]] == ["latents", "ours, packed", "6", "", "3", "", "4"]
    assert len([line for line in data if line.startswith("|")]) == 3


def test_without_matplotlib_it_says_so(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    results(tmp_path / "staging" / "01-bench_step", "step-xl-256-32", [("step", step(), 40.0)])
    gather(tmp_path / "staging", tmp_path / "out", [], HERE)
    assert "matplotlib is not installed" in (tmp_path / "out" / "report.md").read_text()


def test_files_that_are_no_results_are_named(tmp_path):
    (tmp_path / "staging" / "01-bench_step").mkdir(parents=True)
    (tmp_path / "staging" / "01-bench_step" / "step.json").write_text("{")
    gather(tmp_path / "staging", tmp_path / "out", [], HERE)
    assert "not a readable JSON file" in (tmp_path / "out" / "report.md").read_text()


def test_the_exit_code_is_of_failures_not_of_lack_of_time(planted, tmp_path, capsys):
    good, bad = planted("good", ""), planted("bad", "raise SystemExit(2)")
    late = planted("late", "", share=0.0)
    assert gpu_report.report([good, late], 60.0, "cpu", tmp_path / "a") == 0
    assert "1 of 2 parts not run (time)" in capsys.readouterr().out
    assert gpu_report.report([bad, good], 60.0, "cpu", tmp_path / "b") == 1
    assert capsys.readouterr().out.endswith("failed: bad\n")


def test_the_plan_is_in_the_order_of_its_weight():
    names = [part.name for part in gpu_report.parts_for_gpu()]
    xl = [f"SiT-XL/2, 256 tokens, batch {batch}" for batch in (32, 256)]
    between = [f"{name}: between" for name in xl]
    checks = ["correctness", "kernels", "memcheck", "racecheck", "initcheck"]
    assert names[:14] == [*checks, "roofs", "ops", "update", *xl, *between, "profile", "data"]
    assert len(set(names)) == len(names)
    assert {f"SiT-{size}/2, 256 tokens, batch {n}" for size in "SBL" for n in (32, 256)} < set(names)
    assert {"SiT-XL/2, 1024 tokens, batch 32", "SiT-XL/2, 256 tokens, batch auto-check"} < set(names)


def test_the_plan_has_every_rung_of_xl_by_its_name():
    named = {*gpu_report.ENDS, *gpu_report.BETWEEN, *gpu_report.VARIANTS}
    assert named == set(NAMES)


def test_every_file_with_tests_for_a_gpu_is_run_once():
    """As pytest itself finds them."""
    parts = [gpu_report.correctness(0.5, kernels) for kernels in (False, True)]
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-m", "gpu", "-p", "no:cacheprovider", "tests"]
    collected = subprocess.run(command, capture_output=True, text=True, cwd=gpu_report.ROOT).stdout
    files = [word for part in parts for word in part.arguments if word.endswith(".py")]
    assert sorted(files) == sorted({line.partition("::")[0] for line in collected.splitlines() if "::" in line})
    assert "tests/test_gpu_step.py" in parts[0].arguments
    assert {"tests/test_gpu_kernels.py", "tests/test_adaln.py"} < set(parts[1].arguments)


def test_no_gpu_is_said_in_one_line():
    """CUDA_VISIBLE_DEVICES hides those that there may be."""
    command = [sys.executable, "-m", "benchmarks.gpu_report", "--parts", "roofs"]
    ran = subprocess.run(
        command, capture_output=True, text=True, cwd=gpu_report.ROOT, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    )
    assert ran.returncode == 1
    assert "no cuda device is usable here" in ran.stderr.splitlines()[-1]


STEPS = "SiT-S/2, 256 tokens, batch 1"


@pytest.mark.parametrize(
    "parts", [["correctness", "ops", STEPS], pytest.param([], marks=pytest.mark.slow)], ids=["some", "all"]
)
def test_the_report_small_on_a_cpu(tmp_path, monkeypatch, capfd, parts):
    """The programs of the real one, cut down."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("OUT", str(tmp_path))
    code = gpu_report.main(["--device", "cpu", "--budget-s", "300", *(["--parts", *parts] if parts else [])])
    (folder,) = tmp_path.iterdir()
    report = json.loads((folder / "report.json").read_text())
    assert [part for part in report["parts"] if part["outcome"] != OK and part["name"] != "memcheck"] == []
    assert len(report["parts"]) == (len(parts) or len(gpu_report.parts_for_cpu()))
    assert code == 0
    files = {path.name for path in folder.iterdir()}
    assert {"report.json", "report.md", "step.json", "kernels.json"} <= files
    assert ("profile.json" in files) == (not parts)
    assert len(files) <= MOST_FILES
    assert report["stamp"]["kind"] == "cpu"
    text = (folder / "report.md").read_text()
    assert "SiT-S/2 of 3 blocks, 256 tokens, batch 1" in text
    assert "| gated_adaln " in text
    assert ("\n## Data\n" in text) == (not parts)
    assert "report in" in capfd.readouterr().out
