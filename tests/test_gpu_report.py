"""The report survives its parts: what fails or takes too long is named, what was measured before is kept."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from benchmarks import compare, gpu_report, report_plan
from benchmarks.bench_step import NAMES
from benchmarks.gpu_report import gather
from benchmarks.harness import parts as parts_module
from benchmarks.harness.parts import FAILED, NOT_HERE, NOT_RUN, OK, Outcome, Part, limit_s, run_parts, simulated
from benchmarks.harness.rows import read, row, stamp, write
from sra_fast.tuning.timing import Samples

HERE = stamp("cpu")


def results(path, name, rows):
    made = [row(title, params, Samples(ms=(ms,) * 8), stamp=HERE, bytes=10**6) for title, params, ms in rows]
    for entry in made:
        if entry["name"] == "step":
            entry["images_per_s"] = 1e3 / entry["median_ms"]
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
    """(outcomes by name, report.json, report.md)."""
    out, staging = tmp_path / "out", tmp_path / "staging"
    outcomes = run_parts(parts, budget_s, staging, lambda so_far: gather(staging, out, so_far, HERE))
    report = json.loads((out / "report.json").read_text())
    assert [part["name"] for part in report["parts"]] == [part.name for part in parts]
    return {outcome.name: outcome for outcome in outcomes}, report, (out / "report.md").read_text()


def test_failing_parts_are_named_and_the_others_go_on(planted, tmp_path):
    first = results(tmp_path, "first", [("step", step(), 40.0)])
    op = {"size": "xl", "batch": 32, "dtype": "bf16", "pass": "forward", "implementation": "fused"}
    second = results(tmp_path, "second", [("step", step(batch=256), 300.0), ("adaln", op, 1.0)])
    parts = [
        planted("raises", leaves(first) + "raise ValueError('no such luck')"),
        planted("crashes", "import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)"),
        planted("lacks", "import sys\nprint('no such tool', file=sys.stderr)\nsys.exit(69)"),
        planted("good", leaves(second)),
    ]
    outcomes, report, text = run(parts, tmp_path)
    assert [outcome.outcome for outcome in outcomes.values()] == [FAILED, FAILED, NOT_HERE, OK]
    assert "SIGSEGV" in outcomes["crashes"].reason
    assert outcomes["lacks"].reason == "no such tool"
    assert "ValueError: no such luck" in report["parts"][0]["stderr"][-1]
    assert "raises failed: exit code 1" in text
    assert "ValueError: no such luck" in text
    # what the failed part had already written counts
    assert [entry["params"]["batch"] for entry in read(tmp_path / "out" / "step.json")["rows"]] == [32, 256]
    assert "## Ops" in text


def test_a_part_gets_its_share_of_the_time_and_is_killed_with_its_children(planted, tmp_path):
    """Rows it wrote before count; later parts have the rest of the time."""
    first = results(tmp_path, "first", [("step", step(), 40.0)])
    child = tmp_path / "child"
    hangs = leaves(first) + (
        "import subprocess\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        f"open({str(child)!r}, 'w').write(str(child.pid))\n"
        "time.sleep(60)"
    )
    parts = [
        planted("hangs", hangs, share=0.9, max_seconds=3.5),
        planted("good", "", share=0.9),
        planted("must", "import time\ntime.sleep(60)", max_seconds=3.1, must_end=True),
        planted("late", "", share=0.01),
    ]
    began = time.monotonic()
    outcomes, _, text = run(parts, tmp_path, budget_s=20.0)
    assert time.monotonic() - began < 20
    assert [outcome.outcome for outcome in outcomes.values()] == [NOT_RUN, OK, FAILED, NOT_RUN]
    assert "killed after 4 s" in outcomes["hangs"].reason
    assert "s were left" in outcomes["late"].reason
    assert text.count("not run (time)") == 2
    assert len(read(tmp_path / "out" / "step.json")["rows"]) == 1
    status = Path(f"/proc/{child.read_text()}/status")
    assert not status.exists() or "Z (zombie)" in status.read_text()


def test_few_files_and_none_too_large(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_report, "MAX_BYTES", 4096)
    profile = tmp_path / "staging" / "03-cli"
    profile.mkdir(parents=True)
    (profile / "profile.json").write_text('{"traces": []}')
    for number, size in enumerate((50, 5000)):
        (profile / f"sit-{number}.pt.trace.json.gz").write_bytes(bytes(size))
    results(tmp_path / "staging" / "01-bench_step", "step-xl-256-32", [("step", step(), 40.0)])
    results(tmp_path / "staging" / "02-bench_step", "step-xl-256-32-depth3", [("step", step(), 10.0)])
    gather(tmp_path / "staging", tmp_path / "out", [], HERE)
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files == {"report.json", "report.md", "step.json", "profile.json", "sit-0.pt.trace.json.gz"}
    assert "left out: sit-1.pt.trace.json.gz" in (tmp_path / "out" / "report.md").read_text()
    # the model cut short is another model
    assert [entry["params"].get("depth") for entry in read(tmp_path / "out" / "step.json")["rows"]] == [None, 3]
    compare.load(tmp_path / "out")  # as one folder of results


def test_of_a_row_measured_twice_the_first_with_numbers_counts(tmp_path):
    staging = tmp_path / "staging"
    for number, ms in enumerate((20.0, 40.0, 30.0)):
        path = results(staging / f"{number:02d}-bench_step", "step-xl-256-32", [("step", step(), ms)])
        if number == 0:
            content = json.loads(path.read_text())
            content["rows"][0]["samples_ms"] = []
            path.write_text(json.dumps(content))
    gather(staging, tmp_path / "out", [], HERE)
    (found,) = read(tmp_path / "out" / "step.json")["rows"]
    assert found["median_ms"] == 40.0


def test_the_exit_code_is_of_failures_not_of_lack_of_time(planted, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(gpu_report, "stamp_of", lambda device: HERE)
    good, bad, late = planted("good", ""), planted("bad", "raise SystemExit(2)"), planted("late", "", share=0.0)
    assert gpu_report.report([good, late], 60.0, "cpu", tmp_path / "a") == 0
    assert "1 of 2 parts not run (time)" in capsys.readouterr().out
    assert gpu_report.report([bad, good], 60.0, "cpu", tmp_path / "b") == 1
    assert capsys.readouterr().out.endswith("failed: bad\n")


def test_the_plan_has_the_most_important_first_and_every_variant_of_xl():
    names = [part.name for part in report_plan.parts_for_gpu()]
    xl = [f"SiT-XL/2, 256 tokens, batch {batch}" for batch in ("32", "32: strongest rival", "128", "256")]
    assert names[:11] == ["smoke", *xl, "correctness", "kernels", "ops", "update", "profile", "data"]
    assert len(set(names)) == len(names)
    rungs = {*report_plan.ENDS, *report_plan.STRONGEST, *report_plan.BETWEEN, *report_plan.VARIANTS}
    assert rungs == set(NAMES)


REACHED = {
    120: ["smoke", "SiT-XL/2, 256 tokens, batch 32"],
    240: ["smoke", "SiT-XL/2, 256 tokens, batch 32", "SiT-XL/2, 256 tokens, batch 32: strongest rival", "update"],
    480: [
        "smoke",
        "SiT-XL/2, 256 tokens, batch 32",
        "SiT-XL/2, 256 tokens, batch 32: strongest rival",
        "SiT-XL/2, 256 tokens, batch 128",
        "SiT-XL/2, 256 tokens, batch 256",
        "correctness",
    ],
}


@pytest.mark.parametrize("budget", REACHED)
def test_what_a_budget_reaches_by_the_estimates(budget):
    """The headline first; and what fits into the time that is left."""
    ran = [
        (outcome.name, end) for outcome, end in simulated(report_plan.parts_for_gpu(), budget) if outcome.outcome == OK
    ]
    assert [name for name, _ in ran] == REACHED[budget]
    assert ran[-1][1] <= budget


def test_parts_run_as_the_dry_run_says(planted, tmp_path, monkeypatch):
    """Sleeping parts, fifty times as fast."""
    monkeypatch.setattr(parts_module, "MIN_SECONDS", 3 / 50)
    parts = [replace(part, expected_s=part.expected_s / 50) for part in report_plan.parts_for_gpu()[:12]]
    expected = [outcome.outcome for outcome, _ in simulated(parts, 240 / 50)]
    assert expected.count(OK) == 4
    stubs = [planted(f"stub{i}", f"import time\ntime.sleep({part.expected_s / 4})") for i, part in enumerate(parts)]
    stubs = [
        replace(part, module=stub.module, arguments=(), must_end=False) for part, stub in zip(parts, stubs, strict=True)
    ]
    outcomes, _, _ = run(stubs, tmp_path, 240 / 50)
    ran = [name for name, outcome in outcomes.items() if outcome.outcome == OK]
    assert ran[:3] == REACHED[240][:3]


def test_expected_seconds_are_those_of_the_last_report_on_this_device(tmp_path):
    parts = [Part("a", "a", expected_s=10), Part("b", "b", expected_s=10), Part("c", "c", expected_s=10)]

    def leave(name, device, date, **seconds):
        outcomes = [asdict(Outcome(part, "", s, OK if s > 0 else FAILED)) for part, s in seconds.items()]
        stamped = HERE | {"kind": "cuda", "device": device, "date": date}
        (tmp_path / name).mkdir()
        (tmp_path / name / "report.json").write_text(json.dumps({"stamp": stamped, "parts": outcomes}))

    assert report_plan.learned(parts, [tmp_path], "H200") == parts
    leave("old", "H200", "2026-01-01", a=20.0, b=30.0, c=-1.0)
    leave("new", "H200", "2026-02-01", a=25.0)
    leave("other", "H100", "2026-03-01", a=99.0, c=40.0)
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "report.json").write_text("{")
    assert [part.expected_s for part in report_plan.learned(parts, [tmp_path], "H200")] == [25.0, 30.0, 40.0]


def test_a_part_is_given_what_it_is_expected_to_take():
    assert limit_s(Part("a", "a", expected_s=60, share=0.1), 100) == 90
    assert limit_s(Part("a", "a", expected_s=60, share=0.1), 70) == 70
    assert limit_s(Part("a", "a", expected_s=60, share=0.1), 59) == 0
    assert limit_s(Part("a", "a", expected_s=60, share=0.1, max_seconds=65), 100) == 65
    assert limit_s(Part("a", "a", share=0.5), 100) == 50


def test_calls_add_to_one_report(planted, tmp_path, monkeypatch, capsys):
    """A part that ran keeps its outcome and rows until it runs again; another device is refused."""
    monkeypatch.setattr(gpu_report, "stamp_of", lambda device: HERE)
    first = results(tmp_path, "first", [("step", step(), 40.0), ("step", step(batch=256), 300.0)])
    second = results(tmp_path, "second", [("step", step(), 20.0)])
    parts = [planted("a", leaves(first)), planted("b", "raise ValueError")]
    assert gpu_report.report(parts, 60.0, "cpu", tmp_path / "out") == 1
    (out,) = (tmp_path / "out").iterdir()
    parts = [planted("b", leaves(second)), replace(planted("a", ""), expected_s=1e6), planted("c", "")]
    assert gpu_report.report(parts, 60.0, "cpu", tmp_path / "out", out) == 0
    report = json.loads((out / "report.json").read_text())
    assert [(part["name"], part["outcome"]) for part in report["parts"]] == [("a", OK), ("b", OK), ("c", OK)]
    medians = {row["params"]["batch"]: row["median_ms"] for row in read(out / "step.json")["rows"]}
    assert medians == {32: 20.0, 256: 300.0}
    assert len(report["calls"]) == 2
    monkeypatch.setattr(gpu_report, "stamp_of", lambda device: HERE | {"device": "another"})
    monkeypatch.setattr(gpu_report, "parts_for_cpu", lambda: parts)
    capsys.readouterr()
    assert gpu_report.main(["--device", "cpu", "--into", str(out)]) == 2
    assert "device: 'another' given" in capsys.readouterr().err


@pytest.mark.slow
def test_every_file_with_tests_for_a_gpu_is_run_once():
    """As pytest itself finds them."""
    parts = [report_plan.correctness(0.5, kernels) for kernels in (False, True)]
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-m", "gpu", "-p", "no:cacheprovider", "tests"]
    collected = subprocess.run(command, capture_output=True, text=True, cwd=gpu_report.ROOT).stdout
    files = [word for part in parts for word in part.arguments if word.endswith(".py")]
    assert sorted(files) == sorted({line.partition("::")[0] for line in collected.splitlines() if "::" in line})
    assert {"tests/test_gpu_kernels.py", "tests/test_adaln.py"} < set(parts[1].arguments)


def test_a_missing_gpu_is_reported_in_one_line():
    """CUDA_VISIBLE_DEVICES hides those that there may be."""
    command = [sys.executable, "-m", "benchmarks.gpu_report", "--parts", "roofs"]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(command, capture_output=True, text=True, cwd=gpu_report.ROOT, env=environment)
    assert result.returncode == 1
    assert "no cuda device is usable here" in result.stderr.splitlines()[-1]


@pytest.mark.parametrize("parts", [["roofs"], pytest.param([], marks=pytest.mark.slow)], ids=["some", "all"])
def test_the_report_small_on_a_cpu(tmp_path, monkeypatch, parts):
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
    assert {"report.json", "report.md", "kernels.json"} <= files
    assert ({"profile.json", "step.json"} <= files) == (not parts)
    text = (folder / "report.md").read_text()
    assert "| matmul bf16 " in text
    assert ("SiT-S/2 of 3 blocks, 256 tokens, batch 1" in text) == (not parts)
