"""csrc/arithmetic.h on every instruction set of this machine: csrc/test_arithmetic.cpp under sanitizers."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(*command: object) -> str:
    return subprocess.run([str(word) for word in command], check=True, stdout=subprocess.PIPE, text=True).stdout


@pytest.mark.slow  # compiles with sanitizers
@pytest.mark.skipif(not all(map(shutil.which, ("cmake", "g++", "nm"))), reason="needs cmake, g++ and nm")
def test_the_cpp_tests_pass_under_sanitizers(tmp_path: Path) -> None:
    run("cmake", "-S", ROOT, "-B", tmp_path, "-DSRA_TORCH=OFF", "-DSRA_SANITIZE=ON", "-DCMAKE_CXX_COMPILER=g++")
    run("cmake", "--build", tmp_path, "--parallel", 2)
    assert "instruction sets, 0 failures" in run("ctest", "--test-dir", tmp_path, "--verbose")
    assert "__asan_init" in run("nm", tmp_path / "test_arithmetic")
    for objects in tmp_path.glob("CMakeFiles/sra_*.dir/csrc/cpu.cpp.o"):
        # The linker keeps one of several weak functions, perhaps one with instructions that this processor lacks.
        assert re.findall(r" [WVu] (?!.*(?:asan|odr))(.*)", run("nm", objects)) == []
