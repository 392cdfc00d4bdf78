"""Packages of the distribution, and the compiled operators, which CMakeLists.txt builds.

`sra_fast/kernels` is a symbolic link to `kernels/` at the top of the tree, so that imports, editors and type checkers
agree on one name, `sra_fast.kernels`, whether or not the tree is installed.

The library is on LibTorch's stable ABI and touches no Python: one wheel, py3-none-<platform>, serves every torch from
2.10 on. Where it cannot be built the package is complete without it, and says at run time what is missing.
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


class BuildOperators(build_ext):
    """CMake instead of setuptools' own compiler."""

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + ".so"

    def run(self) -> None:
        if self.inplace:  # setuptools builds elsewhere and copies what there is
            for extension in self.extensions:
                (ROOT / self.get_ext_filename(extension.name)).unlink(missing_ok=True)
        super().run()

    def build_extension(self, extension: Extension) -> None:
        library = Path(self.get_ext_fullpath(extension.name)).resolve()
        library.unlink(missing_ok=True)  # an old one must not pass for the new
        cmake = shutil.which(
            "cmake", path=os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", "")])
        )
        if not cmake:
            return self.say("cmake is not installed")
        output = f"-DSRA_OUTPUT={library.parent}"
        for gpu in ("ON", "OFF"):
            build = Path(self.build_temp).resolve() / f"cuda-{gpu}".lower()
            configure = [cmake, "-S", ROOT, "-B", build, output, f"-DSRA_CUDA={gpu}", "-DSRA_TESTS=OFF"]
            compile = [cmake, "--build", build, "--parallel", str(os.cpu_count())]
            if all(self.ran([*configure, f"-DPython3_EXECUTABLE={sys.executable}"], compile)):
                return None
            if gpu == "ON":
                self.say("trying again without GPU code")
        return self.say("see the compiler's messages with pip install -v")

    def ran(self, *commands: list[object]):
        for command in commands:
            yield subprocess.run([str(word) for word in command]).returncode == 0

    def say(self, why: str) -> None:
        print(f"sra_fast: the compiled operators are not built: {why}", file=sys.stderr)


class AnyPython(bdist_wheel):
    """A wheel for every Python 3 of a platform; for every platform, if there is no library in it."""

    def get_tag(self) -> tuple[str, str, str]:
        built = any(Path(self.bdist_dir).rglob("_ops.so")) if self.bdist_dir else False
        return "py3", "none", super().get_tag()[2] if built else "any"


setup(
    packages=find_packages(include=["sra_fast", "sra_fast.*"]),
    ext_modules=[Extension("sra_fast._ops", sources=[], optional=True)],
    cmdclass={"build_ext": BuildOperators, "bdist_wheel": AnyPython},
)
