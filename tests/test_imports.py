"""Imports run one way, and everything imports on a machine without the optional packages."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OPTIONAL = ("triton", "nvidia", "tensorboard", "sklearn", "scipy", "diffusers")

# A package may import those before its own bar, and its own files. kernels/ imports nothing of sra_fast, and all may
# import it.
ORDER = """
errors | config | files | distributed flops hardware progress | memory | vae | data | packing | model | objective |
step | tuning | sampling | evaluation | training | tools | cli | start
"""
RANK = {name: rank for rank, names in enumerate(ORDER.split("|")) for name in names.split()}


def files() -> list[tuple[str, Path]]:
    """(dotted module name, file) of everything in sra_fast and kernels."""
    found = []
    for folder, package in ((ROOT / "sra_fast", "sra_fast"), (ROOT / "kernels", "sra_fast.kernels")):
        for path in sorted(folder.rglob("*.py")):
            if (ROOT / "sra_fast" / "kernels") not in path.parents:
                parts = [part for part in path.relative_to(folder).with_suffix("").parts if part != "__init__"]
                found.append((".".join([package, *parts]), path))
    return found


def imported(module: str, is_package: bool, source: str) -> Iterator[str]:
    """Every module that the source imports, wherever in it, with relative imports made absolute."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = module.split(".")
            base = parts[: len(parts) - node.level + is_package] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            # `from sra_fast import x` imports the module x.
            yield from ([f"{origin}.{name.name}" for name in node.names] if origin == "sra_fast" else [origin])


def package_of(module: str) -> str:
    """ "data" of sra_fast.data.decoders; empty for sra_fast itself."""
    return ".".join(module.split(".")[1:2])


def violations(module: str, is_package: bool, source: str) -> list[str]:
    own, wrong = package_of(module), []
    for name in imported(module, is_package, source):
        other = package_of(name)
        if name.split(".")[0] != "sra_fast" or other == own:
            continue
        if own == "kernels" or (other != "kernels" and RANK.get(other, len(RANK)) >= RANK.get(own, 0)):
            wrong.append(f"{module} imports {name}")
    return wrong


def test_imports_run_one_way() -> None:
    modules = files()
    assert len(modules) > 30
    assert {package_of(module) for module, _ in modules} == {*RANK, "kernels", ""}, (
        "a new package needs a place in ORDER"
    )
    for module, path in modules:
        assert violations(module, path.name == "__init__.py", path.read_text()) == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("sra_fast.config", "def f():\n    from sra_fast.model.transformer import Transformer"),
        ("sra_fast.model.attention", "import sra_fast.objective.flow"),
        ("sra_fast.hardware", "from sra_fast import vae"),
        ("sra_fast.data.decoders", "from ..trainer import Trainer"),
        ("sra_fast.kernels.adaln", "from sra_fast.config import Config"),
        ("sra_fast.kernels.adaln", "from ..config import Config"),
        ("sra_fast.step", "from sra_fast import sampling"),
        ("sra_fast.step.state", "from sra_fast.helpers import clip"),
    ],
)
def test_a_planted_import_against_the_order_is_caught(module: str, source: str) -> None:
    assert len(violations(module, False, source)) == 1


BLOCKED = """
import importlib
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {optional}:
            raise ImportError(name + " is blocked")

sys.meta_path.insert(0, Blocked())
for module in {modules}:
    importlib.import_module(module)
assert not {optional} & {{name.split(".")[0] for name in sys.modules if sys.modules[name] is not None}}
"""


@pytest.mark.parametrize(
    "code",
    [
        BLOCKED.format(optional=set(OPTIONAL), modules=[module for module, _ in files()]),
        "import sys, sra_fast.config; assert not {'torch', 'numpy', 'triton'} & set(sys.modules)",
        "import sys, sra_fast.kernels.registry\n"
        "assert {name.split('.')[1] for name in sys.modules if name.startswith('sra_fast.')} == {'kernels'}",
    ],
    ids=["all without optional packages", "configuration without torch", "kernels alone"],
)
def test_imports(code: str) -> None:
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-2000:]
