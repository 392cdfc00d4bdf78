"""The C++ tests: csrc/arithmetic.h on every instruction set of this machine, and csrc/cuda.cu on its CPU."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(*command: object) -> str:
    return subprocess.run([str(word) for word in command], check=True, stdout=subprocess.PIPE, text=True).stdout


needs_tools = pytest.mark.skipif(
    sys.platform != "linux" or not all(map(shutil.which, ("cmake", "g++", "nm"))), reason="needs cmake, g++ and nm"
)


def build(source: Path, folder: Path, target: str = "all", sanitize: bool = False) -> None:
    options = (f"-DSRA_SANITIZE={'ON' if sanitize else 'OFF'}", "-DSRA_TORCH=OFF", "-DCMAKE_CXX_COMPILER=g++")
    run("cmake", "-S", source, "-B", folder, *options)
    run("cmake", "--build", folder, "--target", target, "--parallel", 2)


@needs_tools
def test_the_kernels_of_the_gpu_on_the_cpu(tmp_path: Path) -> None:
    build(ROOT, tmp_path, "test_cuda")
    assert "cuda.cu on the CPU: 0 failures" in run(tmp_path / "test_cuda")


FAULTS = {
    "first block of a part": ("launch.first[middle] <= block", "launch.first[middle] < block"),
    "no barrier": ("    __syncthreads();\n    if", "    if"),
    "a barrier for some": ("    __syncthreads();\n    if", "    if (threadIdx.x < half) __syncthreads();\n    if"),
    "an element too few": ("at = scalar + threadIdx.x", "at = scalar + 1 + threadIdx.x"),
    "vectors that are not aligned": ("if (part.aligned) {", "if (true) {"),
    "all groups are the last": ("const bool last = batch.first + batch.count == count", "const bool last = true"),
    "sums of another launch": ("sums + before", "sums + before / 2"),
}


@pytest.mark.slow  # compiles with sanitizers
@needs_tools
def test_planted_faults_of_kernels_are_seen(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    shutil.copy(ROOT / "CMakeLists.txt", tmp_path)
    source = tmp_path / "csrc" / "cuda.cu"
    right = source.read_text()
    for name, (old, new) in FAULTS.items():
        assert right.count(old) == 1, name
        source.write_text(right.replace(old, new))
        build(tmp_path, tmp_path / "build", "test_cuda", sanitize=True)
        ended = subprocess.run([tmp_path / "build" / "test_cuda"], capture_output=True)
        assert ended.returncode != 0, name


@pytest.mark.slow  # compiles with sanitizers
@needs_tools
def test_the_cpp_tests_pass_under_sanitizers(tmp_path: Path) -> None:
    build(ROOT, tmp_path, sanitize=True)
    output = run("ctest", "--test-dir", tmp_path, "--verbose")
    assert "instruction sets, 0 failures" in output
    assert "cuda.cu on the CPU: 0 failures" in output
    assert "__asan_init" in run("nm", tmp_path / "test_arithmetic")
    for objects in tmp_path.glob("CMakeFiles/sra_*.dir/csrc/cpu.cpp.o"):
        # The linker keeps one of several weak functions, perhaps one with instructions that this processor lacks.
        assert re.findall(r" [WVu] (?!.*(?:asan|odr))(.*)", run("nm", objects)) == []
