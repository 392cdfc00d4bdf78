"""`sra-fast profile`: what it writes, that TensorBoard's plugin opens it, and what it refuses."""

from __future__ import annotations

import gzip
import json
import os
import pickle
import queue
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from small_run import strict_json
from test_breakdown import FLASH, NVJET, gpu_trace

from sra_fast import cli
from sra_fast.config import Config, ProfileConfig, preset
from sra_fast.errors import Refused
from sra_fast.hardware import Hardware
from sra_fast.model.backends import Backends
from sra_fast.tools import profile as module
from sra_fast.tools.breakdown import CATEGORIES, breakdown
from sra_fast.tools.profile import LARGEST_TRACE, profile, with_sizes

SMALL = ["--model.depth=4", "--model.hidden=32", "--model.heads=2", "--train.batch=4", "--train.device=cpu"]
FEW = ["--profile.steps=2", "--profile.warmup=1", "--train.execution=eager"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What `sra-fast profile digits` writes, of a small network."""
    out = tmp_path_factory.mktemp("profiles") / "a" / "profile"
    assert cli.main(["profile", "digits", *SMALL, *FEW, "--profile.out", str(out)]) == 0
    return out


@pytest.fixture
def written(folder):
    return strict_json((folder / "profile.json").read_text())


def events_of(folder):
    (path,) = folder.glob("*.gz")
    return json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]


def test_it_writes_one_trace_and_the_figures(folder, written):
    (entry,) = written["traces"]
    assert sorted(path.name for path in folder.iterdir()) == sorted([entry["file"], "profile.json"])
    assert entry["file"].startswith("digits-eager.")
    assert entry["file"].endswith(".pt.trace.json.gz")
    assert (folder / entry["file"]).stat().st_size < LARGEST_TRACE / 16
    assert (written["format_version"], written["device"]) == (1, "cpu")
    assert (written["params"]["tokens"], written["params"]["batch"], written["params"]["method"]) == (16, 4, "sra")
    assert written["config"]["model"]["classes"] == 10
    assert written["versions"]["torch"] == torch.__version__


def test_the_figures_are_those_of_the_trace(folder, written):
    (entry,) = written["traces"]
    found = breakdown(events_of(folder))
    assert (entry["steps"], entry["ms_per_step"]) == (2, pytest.approx(found.step_ms))
    assert list(entry["breakdown"]) == list(CATEGORIES)
    assert sum(part["share"] for part in entry["breakdown"].values()) == pytest.approx(1, abs=1e-9)
    assert sum(part["ms"] for part in entry["breakdown"].values()) == pytest.approx(entry["ms_per_step"])
    for name in ("gemm", "attention", "norm_elementwise", "optimizer", "idle"):
        assert entry["breakdown"][name]["share"] > 0, name
    assert entry["breakdown"]["communication"]["ms"] == 0
    assert {"perturb", "student", "teacher", "loss", "backward", "update"} <= set(entry["stages_ms"])
    assert entry["stages_ms"]["update"] == pytest.approx(entry["breakdown"]["optimizer"]["busy_ms"])
    assert len(entry["top_kernels"]) == 20
    assert [k["ms"] for k in entry["top_kernels"]] == sorted((k["ms"] for k in entry["top_kernels"]), reverse=True)
    # The first linear layer of MLP and attention, and the modulation, in student and teacher.
    assert next(k for k in entry["top_kernels"] if k["name"] == "aten::addmm")["calls"] >= 2 * 3 * 3
    assert entry["untraced_ms_per_step"] > 0


@pytest.fixture
def loader():
    """The plugin's reader. A machine on which nothing can be installed may lack it."""
    return pytest.importorskip("torch_tb_profiler.profiler.loader")


class AtOnce:
    """A process of the plugin's, in this one."""

    def __init__(self, target, args):
        self.start = lambda: target(*args)


class NoCache:
    cache_dir = None

    def get_remote_cache(self, path):
        return path


@pytest.fixture
def opened(monkeypatch, loader):
    """What TensorBoard's plugin finds in a folder: the profile of its only worker."""

    def load(folder):
        monkeypatch.setattr(loader, "Process", AtOnce)
        monkeypatch.setattr(loader, "Queue", queue.Queue)
        run = loader.RunLoader("run", str(folder), NoCache()).load()
        (worker,) = run.workers
        (span,) = run.get_spans(worker)
        return worker, run.get_profile(worker, span)

    return load


def test_tensorboards_plugin_opens_the_trace(folder, opened):
    worker, run = opened(folder)
    assert worker == "digits-eager"
    assert {view.display_name for view in run.views} >= {"Overview", "Operator", "Trace"}
    rows = run.operation_table_by_name["data"]
    calls = {row["name"]: row["calls"] for row in rows}
    found = breakdown(events_of(folder), skip=0)
    assert calls["aten::addmm"] == 4 * next(k.calls for k in found.kernels if k.name == "aten::addmm")
    assert {"aten::mm", "aten::_scaled_dot_product_flash_attention_for_cpu"} <= set(calls)
    steps_shown = [row[0] for row in run.overview["steps"]["rows"]]
    assert len(steps_shown) == 4


def test_the_plugin_reads_gpu_traces_as_we_do(opened, tmp_path):
    """The hand-made trace of test_breakdown.py is one that another reader of Kineto's traces understands."""
    trace = {
        "schemaVersion": 1,
        "deviceProperties": [{"id": 0, "name": "H100", "numSms": 132}],
        "traceEvents": gpu_trace(),
    }
    (tmp_path / "w.1.pt.trace.json").write_text(json.dumps(trace))
    _, run = opened(tmp_path)
    kernels = {row[0]: row for row in run.kernel_table["data"]["rows"]}
    assert kernels[NVJET][2:4] == [4, 1200]  # calls, us
    assert kernels[FLASH][2:4] == [4, 400]


def test_several_executions_are_traced_each_in_its_own_process(monkeypatch, tmp_path):
    """As for a CUDA graph, which is traced after the step without it."""
    graph, eager = Backends(execution="graph"), Backends(execution="eager")
    assert [module._executions(backends) for backends in (graph, eager)] == [("compiled", "graph"), ("eager",)]
    monkeypatch.setattr(module, "_executions", lambda backends: ("eager", "eager"))
    calls = []

    def run_in_process(function, *arguments):
        calls.append(function)
        return function(*pickle.loads(pickle.dumps(arguments)))

    monkeypatch.setattr(module, "_run_in_process", run_in_process)
    out, lines = tmp_path / "out", []
    base = preset("digits")
    config = replace(
        base,
        model=replace(base.model, depth=3, hidden=16, heads=2),
        train=replace(base.train, batch=2, device="cpu"),
    )
    assert profile(config, ProfileConfig(steps=1, warmup=1, out=str(out)), lines.append) == 0
    entries = strict_json((out / "profile.json").read_text())["traces"]
    assert {entry["file"] for entry in entries} == {path.name for path in out.glob("*.gz")}
    assert len(entries) == len(calls) == sum(line.startswith("tracing") for line in lines) == 2
    assert str(out) in lines[-1]


def _dies():
    os._exit(1)


def test_a_process_that_dies_is_reported_in_one_line():
    with pytest.raises(Refused, match="the process that traced the steps died"):
        module._run_in_process(_dies)


def test_steps_for_nsight_systems_run_between_start_and_stop(monkeypatch):
    calls = []

    @contextmanager
    def range_of(name):
        calls.append(f"begin {name}")
        yield
        calls.append(f"end {name}")

    monkeypatch.setattr(torch.cuda, "synchronize", lambda: calls.append("synchronize"))
    monkeypatch.setattr(torch.cuda.profiler, "profile", lambda: range_of("profiler"))
    monkeypatch.setattr(torch.autograd.profiler, "emit_nvtx", lambda record_shapes: range_of("nvtx"))
    monkeypatch.setattr(torch.cuda.nvtx, "range", range_of)
    module._with_nvtx(lambda: calls.append("work"), ProfileConfig(steps=2))
    each = [word for number in range(2) for word in (f"begin step {number}", "work", f"end step {number}")]
    expected = ["synchronize", "begin profiler", "begin nvtx", *each, "synchronize", "end nvtx", "end profiler"]
    assert calls == expected


@pytest.mark.parametrize(
    ("name", "model", "data", "expected"),
    [
        ("digits", {}, {}, (8, 1, 10)),
        ("sit-xl-2", {}, {}, (32, 4, 1000)),
        ("sit-xl-2", {"input_size": 64, "classes": 7}, {}, (64, 4, 7)),
        ("sit-s-4", {}, {"images": "photos", "resolution": 64}, (64, 3, 1000)),
    ],
)
def test_sizes_that_training_reads_from_its_data_have_defaults(name, model, data, expected):
    base = preset(name)
    filled = with_sizes(replace(base, model=replace(base.model, **model), data=replace(base.data, **data))).model
    assert (filled.input_size, filled.channels, filled.classes) == expected


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["digits", "--profile.out", ""], "profile.out: '' given; must be a folder"),
        (["digits", "--profile.out", "file"], "profile.out: 'file' given; must be a folder, but file is a file"),
        (["digits", "--profile.out", "file/below"], "profile.out: 'file/below' given; must be a folder"),
        (["digits", "--profile.nvtx", "--train.device", "cpu"], "profile.nvtx: True given; needs an NVIDIA GPU"),
        (["digits", "--train.device", "cpu", "--train.execution", "graph"], "train.execution: 'graph' given"),
        (["digits", "--kernels.adaln", "fused"], "kernels.adaln: 'fused' given"),
    ],
)
def test_wrong_input_is_refused_and_nothing_is_written(words, expected, tmp_path, monkeypatch, refused):
    if "fused" in words and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    assert expected in refused(["profile", *words])
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "mine"


def test_a_gpu_trace_without_kernels_is_refused(monkeypatch, tmp_path):
    """As CUPTI leaves it when it cannot record: to take it for a CPU's would be a false report."""
    monkeypatch.setattr(module, "_trace", lambda *_: [e for e in gpu_trace() if e.get("cat") != "kernel"])
    monkeypatch.setattr(module, "_ms_per_step", lambda *_: 1.0)
    monkeypatch.setattr(module, "_step", lambda *_: contextmanager(lambda: iter([lambda: None]))())
    hardware = Hardware(torch.device("cuda"), torch.bfloat16)
    with pytest.raises(Refused, match="no GPU kernel was recorded"):
        module._trace_execution(Config(), hardware, ProfileConfig(), "graph", tmp_path / "t", None)
