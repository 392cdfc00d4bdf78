"""One program of one tree, wherever it is and whatever is installed:

    python benchmarks/in_tree.py TREE MODULE [ARG ...]

runs `python -m MODULE ARG ...` in TREE with its own sra_fast, kernels and benchmarks.

`kernels/` is imported as sra_fast.kernels, which only an installed package maps. Without an installation it would not
be found, and with another tree installed that tree's kernels would be, beside this one's sra_fast: a comparison of two
trees would then compare the same kernels, and no number would say so.

Runs as a file, not with `-m`: it is there before anything can be imported.
"""

from __future__ import annotations

import importlib.util
import os
import runpy
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path

OURS = ("sra_fast", "benchmarks")


class Kernels:
    """Finds sra_fast.kernels in the tree."""

    def __init__(self, tree: Path) -> None:
        self.folder = tree / "kernels"

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        """The package's place; None for every other module, and where the tree has no kernels."""
        init = self.folder / "__init__.py"
        if name != "sra_fast.kernels" or not init.exists():
            return None
        return importlib.util.spec_from_file_location(name, init, submodule_search_locations=[str(self.folder)])


def strangers(tree: Path) -> list[str]:
    """Loaded modules of ours that come from elsewhere, with their files."""
    found = [(name, getattr(module, "__file__", None)) for name, module in sys.modules.items()]
    ours = [(name, file) for name, file in found if name.partition(".")[0] in OURS and file]
    return [f"{name} from {file}" for name, file in ours if not Path(file).resolve().is_relative_to(tree)]


def main() -> None:
    """Run it. Ends with its exit code, or with 3 where it ran with another tree's modules."""
    tree, module, *arguments = sys.argv[1:]
    root = Path(tree).resolve()
    os.chdir(root)
    sys.path[0] = str(root)
    sys.meta_path.insert(0, Kernels(root))
    sys.argv = [module, *arguments]
    sys.orig_argv = [sys.executable, "-m", module, *arguments]  # what a stamp names as the command
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    finally:
        if foreign := strangers(root):
            print(f"not of {root}: {', '.join(sorted(foreign))}", file=sys.stderr)
            raise SystemExit(3)


if __name__ == "__main__":
    main()
