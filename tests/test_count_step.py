"""count_step.py: what a GPU step launches does not grow, and each way in which it could is seen."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.static import why_unavailable

pytestmark = pytest.mark.skipif(bool(why_unavailable()), reason=why_unavailable())
ROOT = Path(__file__).resolve().parents[1]

PLANTED = """
from benchmarks.static import guard
import dataclasses
import sys
from unittest.mock import patch

import torch
from benchmarks import count_step
from benchmarks.static import device, step
from sra_fast.model.transformer import Attention, Block

mode, names = device.pretend(), sys.argv[1:]
block, attention = Block.forward, Attention.forward


def cast(self, x, *others):
    return block(self, x.float().to(x.dtype), *others)


def contiguous(self, x):
    return attention(self, x.transpose(0, 1).contiguous().transpose(0, 1))


def piece(self, x, *others):
    return block(self, torch.cat([x[:, :1], x[:, 1:]], 1), *others)


def host_read(self, x, *others):
    return block(self, x * float(x.mean()), *others)


def transfer(self, x, *others):
    return block(self, x + torch.zeros((), device="cpu"), *others)


def graph_break(self, x, *others):
    torch._dynamo.graph_break()
    return block(self, x, *others)


config = step.configuration("s", 8, 3, "sit", "best")
record = count_step.read_json(count_step.RECORD)["counts"]
for name in names:
    execution = "compiled" if name == "graph_break" else "eager"
    owner = Attention if name == "contiguous" else Block
    try:
        with patch.object(owner, "forward", globals()[name]):
            launches, wrong = step.launches_of(config, execution, mode)
        total = dataclasses.asdict(step.count(launches, wrong, 1.0, 1.0))
        before = record[count_step.title("s", 8, 3, "sit", "best", execution)]
        print(name, *count_step.complaints("step", total, before), sep="; ")
    except Exception as error:
        print(name, type(error).__name__, str(error).splitlines()[0], sep="; ")
"""


def python(*words: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, *words], env=environment, cwd=ROOT, capture_output=True, text=True)


def test_no_step_launches_or_moves_more_than_on_record():
    result = python("-m", "benchmarks.count_step", "--check")
    assert result.returncode == 0, result.stdout + result.stderr
    last = result.stdout.splitlines()[-1]
    if "nothing is compared" in last:
        pytest.skip(last)
    assert last == "no step is worse than on record"


@pytest.mark.slow
def test_no_step_of_xl_does():
    result = python("-m", "benchmarks.count_step", "--check", "--xl")
    assert result.returncode == 0, result.stdout + result.stderr


def test_each_planted_fault_is_seen():
    seen = {
        "cast": "student, operator",
        "contiguous": "student, operator",
        "piece": "student, operator",
        "host_read": "DataDependentOutputException",
        "transfer": "CPU and GPU in one operation",
        "graph_break": "graph_break",
    }
    result = python("-c", PLANTED, *seen)
    lines = result.stdout.splitlines()
    assert [line.partition("; ")[0] for line in lines] == list(seen), result.stdout + result.stderr
    for line, what in zip(lines, seen.values(), strict=True):
        assert what in line.partition("; ")[2], line
