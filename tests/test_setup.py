"""Building: with CMake and without, what wheels and the source distribution hold."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PLATFORM = f"py3-none-{re.sub('[-.]', '_', sysconfig.get_platform())}"
LIBRARY = "sra_fast/_ops.so"
NOT_BUILT = "sra_fast: the compiled operators are not built: "
RETRY, SEE_MESSAGES = "trying again without GPU code", "see the compiler's messages with pip install -v"
# Logs its arguments and writes a library, unless NO_NVCC or NO_COMPILER makes it fail.
FAKE_CMAKE = """#!/bin/sh
echo "$*" >> "$CMAKE_LOG"
case "$*" in --build*) [ -z "$NO_COMPILER" ]; exit ;; *SRA_CUDA=ON*) [ -z "$NO_NVCC" ] || exit 1 ;; esac
for word in "$@"; do case "$word" in -DSRA_OUTPUT=*) out="${word#*=}" ;; esac; done
[ -n "$NO_COMPILER" ] || { mkdir -p "$out" && echo new > "$out/_ops.so"; }
"""
# Runs setup.py as an interpreter in another folder would, so that no real cmake lies beside it.
SETUP = "import runpy, sys; sys.executable, *sys.argv = sys.argv[1:]; runpy.run_path('setup.py', run_name='__main__')"


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """The files that a build reads, with a stale library in place."""
    ignore = shutil.ignore_patterns("__pycache__", "*.so")
    for name in ("sra_fast", "kernels", "csrc"):
        shutil.copytree(ROOT / name, tmp_path / name, symlinks=True, ignore=ignore)
    for name in ("setup.py", "pyproject.toml", "CMakeLists.txt", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / LIBRARY).write_text("stale")
    return tmp_path


def build(tree: Path, *command: str, cmake: str = "", broken: str = "") -> tuple[list[str], list[str]]:
    """(warnings, arguments of each call of cmake). cmake: on the "path", "beside" the interpreter, or "" for none."""
    programs, log = tree / "bin", tree / "cmake.log"
    programs.mkdir()
    (programs / "cmake").write_text(FAKE_CMAKE)
    (programs / "cmake").chmod(0o755)
    interpreter = (programs if cmake == "beside" else tree) / "python"
    # /usr/bin may hold a real cmake, so it is on the PATH only where the fake one is found first.
    path = {"": "", "path": f"{programs}:/usr/bin:/bin", "beside": "/usr/bin:/bin"}[cmake]
    environment = {"PATH": path, "HOME": str(tree), "CMAKE_LOG": str(log), broken or "UNUSED": "1"}
    call = [sys.executable, "-c", SETUP, interpreter, "setup.py", "-q", *command]
    done = subprocess.run(call, cwd=tree, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    warnings = [line.removeprefix(NOT_BUILT) for line in done.stderr.splitlines() if line.startswith(NOT_BUILT)]
    return warnings, log.read_text().splitlines() if log.exists() else []


def modules(root: Path = ROOT) -> set[str]:
    """Every Python file of the package; `rglob` does not follow the link to kernels/."""
    package, kernels = (root / "sra_fast").rglob("*.py"), (root / "kernels").glob("*.py")
    return {str(path.relative_to(root)) for path in package} | {f"sra_fast/kernels/{path.name}" for path in kernels}


def wheel(tree: Path) -> tuple[str, bytes | None]:
    """(tag, library) of the only wheel, which must hold every module and nothing else."""
    (path,) = (tree / "dist").glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        assert names - {LIBRARY} == modules(tree)
        return path.stem.split("-", 2)[2], archive.read(LIBRARY) if LIBRARY in names else None


@pytest.mark.parametrize(
    ("cmake", "broken", "warnings", "cuda", "result"),
    [
        ("", "", ["cmake is not installed"], [], ("py3-none-any", None)),
        ("path", "", [], ["ON", ""], (PLATFORM, b"new\n")),
        ("beside", "", [], ["ON", ""], (PLATFORM, b"new\n")),
        ("path", "NO_NVCC", [RETRY], ["ON", "OFF", ""], (PLATFORM, b"new\n")),
        ("path", "NO_COMPILER", [RETRY, SEE_MESSAGES], ["ON", "", "OFF", ""], ("py3-none-any", None)),
    ],
)
def test_a_wheel_has_what_can_be_built(tree, cmake, broken, warnings, cuda, result) -> None:
    reported, calls = build(tree, "bdist_wheel", cmake=cmake, broken=broken)
    assert reported == warnings
    assert ["".join(re.findall(r"SRA_CUDA=(\w+)", call)) for call in calls] == cuda
    assert wheel(tree) == result


@pytest.mark.parametrize(("cmake", "library"), [("", []), ("path", ["new\n"])])
def test_in_place_a_stale_library_is_replaced_or_removed(tree: Path, cmake: str, library: list[str]) -> None:
    build(tree, "build_ext", "--inplace", cmake=cmake)
    assert [path.read_text() for path in tree.glob(LIBRARY)] == library


def test_the_source_distribution_holds_all_sources(tree: Path) -> None:
    build(tree, "sdist")
    with tarfile.open(*(tree / "dist").glob("*.tar.gz")) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    csrc = {f"csrc/{path.name}" for path in (ROOT / "csrc").iterdir()}
    assert modules() | csrc | {"CMakeLists.txt", "setup.py"} <= names
    assert LIBRARY not in names


def test_pre_commit_and_make_lint_use_the_same_versions() -> None:
    dev = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["dev"]
    pins = re.findall(r"[\w-]+==[\d.]+", (ROOT / ".pre-commit-config.yaml").read_text())
    assert {"ruff", "clang-format"} == {pin.split("==")[0] for pin in pins if pin in dev}


@pytest.mark.slow
@pytest.mark.skipif(not all(map(shutil.which, ("cmake", "g++"))), reason="needs cmake and g++")
def test_the_wheel_that_cmake_builds_computes(tree: Path) -> None:
    subprocess.run([sys.executable, "setup.py", "-q", "bdist_wheel"], cwd=tree, check=True)
    assert wheel(tree)[0] == PLATFORM
    zipfile.ZipFile(*(tree / "dist").glob("*.whl")).extractall(tree / "site")
    compute = (
        "import torch; from sra_fast.kernels import gradient_norm, registry;"
        "assert not registry.why_unavailable('gradient_norm', 'cpu');"
        "print(registry.__file__, float(gradient_norm.gradient_norm([torch.tensor([3.0, 4.0])])))"
    )
    environment = os.environ | {"PYTHONPATH": str(tree / "site")}
    output = subprocess.check_output([sys.executable, "-P", "-c", compute], env=environment, text=True)
    assert output.split() == [str(tree / "site/sra_fast/kernels/registry.py"), "5.0"]
