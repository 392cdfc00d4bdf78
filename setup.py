"""Packages of the distribution and the compiled operators, which CMakeLists.txt builds.

`sra_fast/kernels` is a symbolic link to `kernels/`, so that imports, editors and type checkers know the folder by one
name, `sra_fast.kernels`, whether or not the project is installed.

The library uses LibTorch's stable ABI and no Python API: one wheel, py3-none-<platform>, works with torch 2.11 and
later. If it cannot be built, the package installs without it and reports at run time what is missing.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


class BuildOps(build_ext):
    """Builds the library with CMake."""

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + ".so"

    def run(self) -> None:
        if self.inplace:  # setuptools builds in a temporary folder and copies the result, if there is one
            for extension in self.extensions:
                (ROOT / self.get_ext_filename(extension.name)).unlink(missing_ok=True)
        super().run()

    def build_extension(self, ext: Extension) -> None:
        library = Path(self.get_ext_fullpath(ext.name)).resolve()
        library.unlink(missing_ok=True)  # a stale library must not be taken for the result of a failed build
        search_path = os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", "")])
        cmake = shutil.which("cmake", path=search_path)
        if not cmake:
            return warn("cmake is not installed")
        for cuda in ("ON", "OFF"):
            build = Path(self.build_temp).resolve() / f"cuda-{cuda.lower()}"
            options = {
                "Python3_EXECUTABLE": sys.executable,  # compiles against the torch of this interpreter
                "SRA_OUTPUT": library.parent,
                "SRA_CUDA": cuda,
                "SRA_TESTS": "OFF",
            }
            configure = [cmake, "-S", ROOT, "-B", build, *(f"-D{name}={value}" for name, value in options.items())]
            compile = [cmake, "--build", build, "--parallel", str(os.cpu_count())]
            if succeeds(configure) and succeeds(compile):
                return None
            if cuda == "ON":
                warn("trying again without GPU code")
        return warn("see the compiler's messages with pip install -v")


class PlatformWheel(bdist_wheel):
    """Tags the wheel for any Python 3, and for any platform if it has no library."""

    def get_tag(self) -> tuple[str, str, str]:
        has_library = bool(self.bdist_dir) and any(Path(self.bdist_dir).rglob("_ops.so"))
        return "py3", "none", super().get_tag()[2] if has_library else "any"


def succeeds(command: list[str | Path]) -> bool:
    return subprocess.run(command).returncode == 0


def warn(reason: str) -> None:
    print(f"sra_fast: the compiled operators are not built: {reason}", file=sys.stderr)


setup(
    packages=find_packages(include=["sra_fast", "sra_fast.*"]),
    ext_modules=[Extension("sra_fast._ops", sources=[], optional=True)],
    cmdclass={"build_ext": BuildOps, "bdist_wheel": PlatformWheel},
)
