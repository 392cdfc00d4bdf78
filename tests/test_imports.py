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

# A package may import those on lines above its own, and its own files. kernels/ imports nothing of sra_fast and is open
# to all.
ORDER = [
    {"errors"},
    {"config"},
    {"files"},
    {"distributed", "flops", "hardware", "progress"},
    {"vae"},
    {"data"},
    {"packing"},
    {"model"},
    {"objective"},
    {"step"},
    {"sampling"},
    {"evaluation"},
    {"training"},
    {"tools"},
    {"cli"},
]
RANK = {noun: rank for rank, nouns in enumerate(ORDER) for noun in nouns}


def files() -> list[tuple[str, Path]]:
    """(dotted module name, file) of everything in sra_fast and kernels."""
    found = []
    for folder, package in ((ROOT / "sra_fast", "sra_fast"), (ROOT / "kernels", "sra_fast.kernels")):
        for path in sorted(folder.rglob("*.py")):
            if (ROOT / "sra_fast" / "kernels") in path.parents:
                continue
            parts = [p for p in path.relative_to(folder).with_suffix("").parts if p != "__init__"]
            found.append((".".join([package, *parts]), path))
    return found


def imported(module: str, is_package: bool, source: str) -> Iterator[str]:
    """Every module of sra_fast that the source imports, wherever in it, with relative imports made absolute."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = module.split(".")
            base = parts[: len(parts) - node.level + is_package] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            # `from sra_fast import x` imports the module x.
            yield from ([f"{origin}.{name.name}" for name in node.names] if origin == "sra_fast" else [origin])


def noun(module: str) -> str:
    """ "data" of sra_fast.data.decoders; empty for sra_fast itself."""
    return ".".join(module.split(".")[1:2])


def violations(module: str, is_package: bool, source: str) -> list[str]:
    own, wrong = noun(module), []
    for name in imported(module, is_package, source):
        if name.split(".")[0] != "sra_fast" or noun(name) == own:
            continue
        other = noun(name)
        allowed = own != "kernels" and (
            other == "kernels" or (other in RANK and own in RANK and RANK[other] < RANK[own])
        )
        if not allowed:
            wrong.append(f"{module} imports {name}")
    return wrong


@pytest.mark.parametrize(("module", "path"), files(), ids=[module for module, _ in files()])
def test_imports_run_one_way(module: str, path: Path) -> None:
    assert noun(module) in {*RANK, "kernels", ""}, "a new noun needs its place in ORDER"
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


def test_the_order_covers_every_file() -> None:
    assert len(files()) > 30
    assert {noun(module) for module, _ in files()} >= {"kernels", "data", "model", "objective", "sampling"}


BLOCKED = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {optional}:
            raise ImportError(name + " is blocked")

sys.meta_path.insert(0, Blocked())
import importlib
for module in {modules}:
    importlib.import_module(module)
assert not {optional} & {{name.split(".")[0] for name in sys.modules if sys.modules[name] is not None}}
"""


def python(code: str) -> None:
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-2000:]


def test_every_module_imports_without_the_optional_packages() -> None:
    python(BLOCKED.format(optional=set(OPTIONAL), modules=[module for module, _ in files()]))


def test_the_configuration_does_not_bring_in_torch() -> None:
    python("import sys, sra_fast, sra_fast.config\nassert not {'torch', 'numpy', 'triton'} & set(sys.modules)")


def test_kernels_are_importable_alone() -> None:
    python(
        "import sys, sra_fast.kernels\nassert not {n for n in sys.modules if n.startswith('sra_fast.')"
        " and not n.startswith('sra_fast.kernels')}"
    )
