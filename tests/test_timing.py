"""Timing: who is called when, what stops a number from being made, and what is written down."""

from __future__ import annotations

import json
import shlex
import sys
import time

import pytest
import torch

from benchmarks.harness import roofs as roofs_module
from benchmarks.harness.roofs import roofs
from benchmarks.harness.rows import parse_query, read, row, stamp
from benchmarks.harness.tables import show
from sra_fast.errors import Refused
from sra_fast.tuning.timing import Samples, measure

ROW = "name params samples_ms median_ms p20_ms p80_ms bytes flops roof_share peak_memory_gib device versions clocks"
ROW_FIELDS = {*ROW.split(), "commit", "command", "host_ms"}  # the contract's, and the host's time
ROOFS = {"copy_gb_per_s": 100.0, "matmul_tflop_per_s": 2.0}


@pytest.fixture(scope="module")
def here():
    return stamp("cpu")


def recorders(*names):
    calls = []
    return calls, {name: lambda name=name: calls.append(name) for name in names}


def test_repeats_are_interleaved_and_each_round_starts_with_the_next():
    calls, candidates = recorders("a", "b", "c")
    taken = measure(candidates, device="cpu", repeats=4, warmup=2)
    sampled = "".join(calls)[-12:]
    assert sampled == "abc" + "bca" + "cab" + "abc"
    assert {name: len(samples.ms) for name, samples in taken.items()} == {"a": 4, "b": 4, "c": 4}


def test_a_sample_is_the_time_of_one_call(monkeypatch):
    """A clock that only the candidate moves: 3 ms a call."""
    now = [0]
    monkeypatch.setattr("sra_fast.tuning.timing.time.perf_counter_ns", lambda: now[0])

    def work():
        now[0] += 3_000_000

    taken = measure({"a": work}, device="cpu", repeats=5, warmup=1)["a"]
    assert taken.ms == pytest.approx([3.0] * 5)
    assert taken.host_samples_ms == pytest.approx([3.0] * 5)


def python_runs_out():
    raise MemoryError


@pytest.mark.parametrize(("fail", "after"), [(lambda: torch.empty(2**50), 0), (python_runs_out, 5)])
def test_out_of_memory_is_a_row_and_the_others_go_on(here, fail, after):
    """While warming up, and in the middle of the samples."""
    calls = []

    def grows():
        calls.append("grows")
        if len(calls) > after:
            fail()

    taken = measure({"grows": grows, "fits": lambda: None}, device="cpu", repeats=6, warmup=2)
    assert len(taken["fits"].ms) == 6
    params = {"rung": "grows", "size": "s", "tokens": 256, "batch": 1}
    made = row("step", params, taken["grows"], stamp=here, flops=10, roofs=ROOFS)
    assert (made["samples_ms"], made["median_ms"], made["roof_share"]) == ([], None, None)
    assert made["error"].startswith("out of memory")
    assert "out of memory" in show([made])
    assert len(calls) == after + 1


def test_a_row_has_the_contracts_fields(here):
    made = row("a", {"rows": 8}, Samples(tuple(range(11)), host_samples_ms=(1.0, 2.0, 9.0)), stamp=here, bytes=10**8)
    assert set(made) == ROW_FIELDS
    assert [made[name] for name in ("p20_ms", "median_ms", "p80_ms", "host_ms")] == [2, 5, 8, 2]
    assert made["roof_share"] is None
    for field in ("device", "versions", "clocks", "commit", "command"):
        assert made[field] == here[field]


@pytest.mark.parametrize(
    ("bytes", "flops", "share"),
    [
        (10**8, None, 0.5),  # 1 ms of 2 at 100 GB/s
        (None, 10**9, 0.25),  # 0.5 ms of 2 at 2 TFLOP/s
        (10**8, 10**9, 0.5),  # the tighter of both
        (None, None, None),
    ],
)
def test_the_share_of_the_roof(here, bytes, flops, share):
    made = row("a", {}, Samples(ms=(2.0,)), stamp=here, bytes=bytes, flops=flops, roofs=ROOFS)
    assert made["roof_share"] == (share and pytest.approx(share))


def test_roofs_are_measured_and_count_what_they_say(monkeypatch):
    monkeypatch.setitem(roofs_module.COPY_BYTES, "cpu", 2**22)
    monkeypatch.setitem(roofs_module.MATMUL_SIZE, "cpu", 64)
    found = roofs(torch.device("cpu"))
    assert 0.01 < found["copy_gb_per_s"] < 1e5
    assert 1e-6 < found["matmul_tflop_per_s"] < 1e4


def test_a_sustained_rate_is_that_of_many_calls(monkeypatch):
    monkeypatch.setattr(roofs_module, "SUSTAINED_MS", 20.0)
    calls = []
    operation = roofs_module.Operation(lambda: (calls.append(1), time.sleep(0.001)))
    samples = roofs_module.sustained(operation, torch.device("cpu"), burst_ms=1.0)
    assert len(calls) >= 3 * 20
    assert samples.median_ms == pytest.approx(1.1, abs=0.4)


def test_the_stamp_of_a_cpu_is_whole(here):
    unknown = {"clocks", "power_limit_w", "throttle_reasons", "driver"}
    known = {"kind", "device", "cores", "threads", "versions", "commit", "dirty", "command", "date"}
    assert set(here) == known | unknown
    assert all(here[field] is None for field in unknown)
    assert shlex.split(here["command"])[1:] == sys.orig_argv[1:]
    json.dumps(here)


def test_the_commit_is_that_of_the_environment(monkeypatch):
    monkeypatch.setenv("SRA_FAST_COMMIT", "abc123-dirty")
    made = stamp("cpu")
    assert (made["commit"], made["dirty"]) == ("abc123", True)


def test_an_answer_of_nvidia_smi_is_read():
    gpu = parse_query("1755, 1980, 3201, 41, 512.33, 700.00, 0x0000000000000024, 580.159.04")
    assert (gpu["sm_mhz"], gpu["power_limit_w"], gpu["driver"]) == (1755, 700, "580.159.04")
    assert gpu["throttle_reasons"] == ["sw_power_cap", "sw_thermal_slowdown"]
    gpu = parse_query("[N/A], 1980, 3201, 41, [Not Supported], 700.00, 0x0, 580.159.04")
    assert (gpu["sm_mhz"], gpu["power_w"], gpu["throttle_reasons"]) == (None, None, [])
    for nothing in (None, "", "No devices were found"):
        assert set(parse_query(nothing).values()) == {None}


@pytest.mark.parametrize("content", ["[]", "{}", '{"format_version": 99, "name": "", "stamp": {}, "rows": []}', "{"])
def test_other_files_are_refused_by_name(tmp_path, content):
    path = tmp_path / "other.json"
    path.write_text(content)
    with pytest.raises(Refused, match=r"other\.json"):
        read(path)
