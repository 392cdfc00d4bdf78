"""doctor: what is there, what is missing, and what to do about it."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import platform
import shutil
import subprocess
import sys

import pytest
import torch

from sra_fast import cli
from sra_fast.config import KernelsConfig
from sra_fast.tools import doctor

OPS = [field.name for field in dataclasses.fields(KernelsConfig) if field.name != "default"]
CURES = {
    "triton": "pip install triton",
    "nvidia-dali": "pip install nvidia-dali-cuda130",
    "tensorboard": "pip install tensorboard",
    "scikit-learn": "pip install scikit-learn",
    "torch-tb-profiler": "pip install torch-tb-profiler",
}


@pytest.fixture
def without(monkeypatch):
    """Make packages and programs look as if they were not installed."""
    version, which = importlib.metadata.version, shutil.which

    def hide(*names):
        def find_version(package):
            if any(package.startswith(name) for name in names):
                raise importlib.metadata.PackageNotFoundError(package)
            return version(package)

        monkeypatch.setattr(importlib.metadata, "version", find_version)
        monkeypatch.setattr(shutil, "which", lambda program, **o: None if program in names else which(program, **o))

    return hide


def line_of(lines, name):
    (line,) = [line for line in lines if line.split()[:1] == [name]]
    return line


def test_it_says_what_is_here(capsys):
    assert cli.main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert platform.python_version() in line_of(lines, "python")
    assert torch.__version__ in line_of(lines, "torch")
    if not torch.cuda.is_available():
        assert "cpu" in line_of(lines, "device")
        assert "fp32" in line_of(lines, "device")
    assert importlib.metadata.version("scikit-learn") in line_of(lines, "scikit-learn")


def test_attention_and_step_have_a_line_too(monkeypatch):
    lines = list(doctor.lines())
    if not torch.cuda.is_available():
        assert line_of(lines, "attention").endswith("sdpa (of sdpa, flash, math)")
        assert line_of(lines, "step").endswith("eager")


def test_every_op_has_a_line_with_what_will_be_used():
    lines = list(doctor.lines())
    resolved = KernelsConfig().resolve()
    assert OPS
    for op in OPS:
        assert resolved[op] in line_of(lines, op)


@pytest.mark.parametrize("name", CURES)
def test_a_missing_package_is_named_with_its_cure(without, name):
    without(name)
    lines = list(doctor.lines())
    assert "missing" in line_of(lines, name)
    assert CURES[name] in line_of(lines, name)
    others = [other for other in CURES if other != name and f"pip install {other}" in "\n".join(lines)]
    assert all("missing" in line_of(lines, other) for other in others)


@pytest.mark.parametrize("name", ["c++", "nvcc"])
def test_a_missing_compiler_is_named(without, name):
    without(name)
    assert "missing" in line_of(list(doctor.lines()), name)


def test_a_program_that_fails_or_hangs_does_not_take_doctor_along(monkeypatch):
    def hang(command, **options):
        raise subprocess.TimeoutExpired(command, 20)

    monkeypatch.setattr(subprocess, "run", hang)
    monkeypatch.setattr(shutil, "which", lambda program, **options: f"/bin/{program}")
    assert line_of(list(doctor.lines()), "c++")


BLOCKED = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("triton", "nvidia", "tensorboard", "sklearn"):
            raise ImportError(name)
sys.meta_path.insert(0, Block())
from sra_fast.cli import main
sys.exit(main(["doctor"]))
"""


def test_it_runs_where_the_optional_packages_cannot_be_imported():
    ended = subprocess.run([sys.executable, "-c", BLOCKED], capture_output=True, text=True, timeout=120, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert all(line_of(ended.stdout.splitlines(), op) for op in OPS)
