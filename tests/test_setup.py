"""Building: what comes of it with CMake and without, what the wheel is called, and the tests in plain C++."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PLATFORM = sysconfig.get_platform().replace("-", "_").replace(".", "_")
LIBRARY = "sra_fast/_ops.so"
NOT_BUILT = "sra_fast: the compiled operators are not built: "
# Does what CMake is asked to and says how it was asked; the first configuration fails where CUDA is to be broken.
CMAKE = """#!/bin/sh
echo "cmake $*" >> "$ASKED"
case "$*" in --build*) [ -z "$NO_COMPILER" ]; exit;; *SRA_CUDA=ON*) [ -z "$NO_NVCC" ] || exit 1;; esac
[ -z "$NO_COMPILER" ] || exit 0
for word in "$@"; do case "$word" in -DSRA_OUTPUT=*) out="${word#*=}";; esac; done
mkdir -p "$out" && echo new > "$out/_ops.so"
"""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """What of ours a build reads, with an old library in place."""
    folder = tmp_path / "tree"
    for name in ("sra_fast", "kernels", "csrc"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for name in ("setup.py", "pyproject.toml", "CMakeLists.txt", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    (folder / LIBRARY).write_text("old")
    return folder


@pytest.fixture
def asked(tmp_path: Path) -> Path:
    """A CMake of ours in a folder of its own; the file gets a line for each call."""
    program = tmp_path / "bin" / "cmake"
    program.parent.mkdir()
    program.write_text(CMAKE)
    program.chmod(0o755)
    return tmp_path / "asked"


# As `python setup.py`, by an interpreter in a folder of which we know what lies in it.
SETUP = "import runpy, sys; sys.executable, *sys.argv = sys.argv[1:]; runpy.run_path('setup.py', run_name='__main__')"


def build(tree: Path, *words: str, beside: Path | None = None, **environment: str) -> tuple[list[str], list[str]]:
    """What it says of the operators, and how it asked CMake. Without `ASKED` there is no CMake.

    Args:
        beside: folder of the interpreter; CMake's own is on the PATH where this is not given.
    """
    asked = Path(environment.get("ASKED", tree / "nothing"))
    path = "/usr/bin:/bin" if "ASKED" in environment else str(tree / "nothing")
    if not beside:
        path = f"{asked.parent / 'bin'}:{path}"
    interpreter = (beside or tree / "nothing") / "python"
    done = subprocess.run(
        [sys.executable, "-c", SETUP, interpreter, "setup.py", "-q", *words],
        cwd=tree,
        env={"PATH": path, "HOME": str(tree), **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    said = [line for line in (done.stdout + done.stderr).splitlines() if "operators" in line or "Error" in line]
    return said, asked.read_text().splitlines() if asked.exists() else []


def wheel(tree: Path) -> tuple[str, bytes | None]:
    """Tag of the one wheel, and the library inside."""
    (path,) = (tree / "dist").glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        assert {"sra_fast/kernels/adamw_ema.py", "sra_fast/training/trainer.py"} <= set(names)
        libraries = [name for name in names if name.endswith(".so")]
        assert libraries in ([], [LIBRARY])
        return path.stem.split("-", 2)[2], archive.read(LIBRARY) if libraries else None


def test_without_cmake_the_build_succeeds_and_says_so_in_one_line(tree: Path) -> None:
    said, _ = build(tree, "build_ext", "--inplace")
    assert said == [f"{NOT_BUILT}cmake is not installed"]
    assert not (tree / LIBRARY).exists()  # an old one must not pass for the new


def test_a_wheel_without_the_library_is_for_every_platform(tree: Path) -> None:
    said, _ = build(tree, "bdist_wheel")
    assert said == [f"{NOT_BUILT}cmake is not installed"]
    assert wheel(tree) == ("py3-none-any", None)


def test_a_wheel_with_the_library_is_for_one_platform_and_every_python(tree: Path, asked: Path) -> None:
    said, calls = build(tree, "bdist_wheel", ASKED=str(asked))
    assert said == []
    assert wheel(tree) == (f"py3-none-{PLATFORM}", b"new\n")
    configure, compile = calls
    assert f"-S {tree} " in configure
    assert f"-DPython3_EXECUTABLE={tree / 'nothing' / 'python'}" in configure  # its torch is the one to build against
    assert "-DSRA_CUDA=ON" in configure
    assert compile.startswith("cmake --build")
    assert (tree / LIBRARY).read_text() == "old"  # that is the tree's


def test_in_place_the_library_is_beside_the_package(tree: Path, asked: Path) -> None:
    assert build(tree, "build_ext", "--inplace", ASKED=str(asked))[0] == []
    assert (tree / LIBRARY).read_text() == "new\n"


def test_a_cmake_beside_the_interpreter_goes_before_that_of_the_path(tree: Path, asked: Path) -> None:
    said, calls = build(tree, "build_ext", "--inplace", beside=asked.parent / "bin", ASKED=str(asked))
    assert (said, len(calls)) == ([], 2)
    assert (tree / LIBRARY).read_text() == "new\n"


def test_where_the_gpu_code_does_not_compile_the_rest_is_built(tree: Path, asked: Path) -> None:
    said, calls = build(tree, "bdist_wheel", ASKED=str(asked), NO_NVCC="1")
    assert said == [f"{NOT_BUILT}trying again without GPU code"]
    assert [("-DSRA_CUDA=ON" in call, "-DSRA_CUDA=OFF" in call) for call in calls] == [(1, 0), (0, 1), (0, 0)]
    assert wheel(tree) == (f"py3-none-{PLATFORM}", b"new\n")


def test_without_a_compiler_the_build_succeeds_and_says_so(tree: Path, asked: Path) -> None:
    said, _ = build(tree, "bdist_wheel", ASKED=str(asked), NO_COMPILER="1")
    assert said[-1].startswith(f"{NOT_BUILT}see the compiler's messages")
    assert wheel(tree) == ("py3-none-any", None)


def test_the_source_distribution_has_all_that_is_compiled(tree: Path) -> None:
    build(tree, "sdist")
    (path,) = (tree / "dist").glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    assert {"CMakeLists.txt", "setup.py", *(f"csrc/{source.name}" for source in (ROOT / "csrc").iterdir())} <= names
    assert LIBRARY not in names


# With CMake and a compiler


def programs(*names: str) -> None:
    if absent := [name for name in names if not shutil.which(name)]:
        pytest.skip(f"needs {', '.join(absent)}")


def run(*command: object, **environment: str) -> str:
    done = subprocess.run([str(word) for word in command], env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_tests_in_plain_cpp_pass_under_sanitizers(tmp_path: Path) -> None:
    """AddressSanitizer and UndefinedBehaviorSanitizer, warnings as errors, no torch."""
    programs("cmake", "ctest", "g++", "nm")
    run("cmake", "-S", ROOT, "-B", tmp_path, "-DSRA_TORCH=OFF", "-DSRA_SANITIZE=ON", "-DCMAKE_CXX_COMPILER=g++")
    run("cmake", "--build", tmp_path, "--parallel", 2)
    said = run("ctest", "--test-dir", tmp_path, "--verbose", UBSAN_OPTIONS="print_stacktrace=1")
    assert "instruction sets, 0 failures" in said
    assert "__asan_init" in run("nm", tmp_path / "test_arithmetic")
    for sources in tmp_path.glob("CMakeFiles/sra_*.dir/csrc/cpu.cpp.o"):
        # A linker keeps one of several weak functions, and another processor may not have its instructions.
        weak = [line.split()[-1] for line in run("nm", sources).splitlines() if f" {line.split()[-2]} " in " W V u "]
        assert [name for name in weak if "asan" not in name and "odr" not in name] == []


@pytest.mark.slow
def test_the_wheel_that_cmake_builds_computes(tree: Path, tmp_path: Path) -> None:
    programs("cmake", "g++")
    environment = {"PATH": os.environ["PATH"], "HOME": str(tree)}
    subprocess.run([sys.executable, "setup.py", "-q", "bdist_wheel"], cwd=tree, env=environment, check=True)
    assert wheel(tree)[0] == f"py3-none-{PLATFORM}"
    (path,) = (tree / "dist").glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        archive.extractall(tmp_path / "site")
    compute = (
        "import torch; from sra_fast.kernels import library, gradient_norm; assert not library.why_unavailable(), library.why_unavailable();"
        "print(library.__file__, float(gradient_norm.gradient_norm([torch.tensor([3.0, 4.0])])))"
    )
    said = run(sys.executable, "-P", "-c", compute, PYTHONPATH=str(tmp_path / "site"))
    assert said.split() == [str(tmp_path / "site" / "sra_fast" / "kernels" / "library.py"), "5.0"]
