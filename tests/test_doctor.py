"""`sra-fast doctor`: what is installed, what is missing, and how to install it."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
import subprocess
import sys

import pytest
import torch

from sra_fast import cli
from sra_fast.config import preset
from sra_fast.hardware import Hardware
from sra_fast.model.backends import Backends
from sra_fast.tools import doctor

INSTALL = {
    "triton": "pip install triton",
    "nvidia-dali": "pip install nvidia-dali-cuda130",
    "tensorboard": "pip install tensorboard",
    "scikit-learn": "pip install scikit-learn",
    "torch-tb-profiler": "pip install torch-tb-profiler",
    "diffusers": "pip install diffusers",
    "flash-attn-4": "pip install --pre 'flash-attn-4[cu13]'",
    "c++": "compiled ops",
    "nvcc": "CUDA ops",
}


def line_of(lines, name):
    (line,) = [line for line in lines if line.split()[:1] == [name]]
    return line


def test_it_reports_versions_and_choices(capsys):
    assert cli.main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert platform.python_version() in line_of(lines, "python")
    assert torch.__version__ in line_of(lines, "torch")
    assert importlib.metadata.version("scikit-learn") in line_of(lines, "scikit-learn")
    backends = Backends.resolve(preset("sit-xl-2"), Hardware.choose())
    for op, name in backends.names.items():
        assert line_of(lines, op).split()[1] == name
    if not torch.cuda.is_available():
        assert line_of(lines, "device").endswith("cpu, computing in fp32")
        assert line_of(lines, "attention").endswith("sdpa (of sdpa, flash, math)")
        assert line_of(lines, "step").endswith("eager")


@pytest.mark.parametrize("name", INSTALL)
def test_what_is_missing_is_named_with_its_purpose_and_how_to_install_it(name, monkeypatch):
    version, which = importlib.metadata.version, shutil.which

    def find_version(package):
        if package.startswith(name):
            raise importlib.metadata.PackageNotFoundError(package)
        return version(package)

    monkeypatch.setattr(importlib.metadata, "version", find_version)
    monkeypatch.setattr(shutil, "which", lambda program, **options: None if program == name else which(program))
    line = line_of(list(doctor.lines()), name)
    assert "missing (" in line
    assert INSTALL[name] in line


def test_a_program_that_hangs_does_not_stop_the_report(monkeypatch):
    def hang(command, **options):
        raise subprocess.TimeoutExpired(command, 5)

    monkeypatch.setattr(subprocess, "run", hang)
    monkeypatch.setattr(shutil, "which", lambda program, **options: f"/bin/{program}")
    assert "does not respond" in line_of(list(doctor.lines()), "c++")


BLOCKED = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("triton", "nvidia", "tensorboard", "sklearn", "diffusers"):
            raise ImportError(name)
sys.meta_path.insert(0, Block())
from sra_fast.cli import main
sys.exit(main(["doctor"]))
"""


def test_it_runs_where_the_optional_packages_cannot_be_imported():
    result = subprocess.run([sys.executable, "-c", BLOCKED], capture_output=True, text=True, timeout=120, check=False)
    assert (result.returncode, result.stderr) == (0, "")
    assert line_of(result.stdout.splitlines(), "adaln")
