"""Run a program of one tree with that tree's own code, whatever is installed:

    python benchmarks/in_tree.py TREE MODULE [ARG ...]

runs `python -m MODULE ARG ...` in TREE. If a module of sra_fast or benchmarks comes from elsewhere, such as another
tree's kernels, the exit code is 3: a comparison of two trees would otherwise compare the same code without saying so.

Run by path, not with `-m`: nothing of the tree is importable yet.
"""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path

PACKAGES = ("sra_fast", "benchmarks")


def foreign_modules(tree: Path) -> list[str]:
    """Loaded modules of our packages that come from outside the tree, with their files."""
    files = [(name, getattr(module, "__file__", None)) for name, module in sys.modules.items()]
    ours = [(name, file) for name, file in files if name.partition(".")[0] in PACKAGES and file]
    return [f"{name} from {file}" for name, file in ours if not Path(file).resolve().is_relative_to(tree)]


def main() -> None:
    """Run the program and exit with its code, or with 3 if it used another tree's modules."""
    tree, module, *arguments = sys.argv[1:]
    root = Path(tree).resolve()
    os.chdir(root)
    sys.path[0] = str(root)
    sys.argv = [module, *arguments]
    sys.orig_argv = [sys.executable, "-m", module, *arguments]  # the command that a stamp records
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    finally:
        if foreign := foreign_modules(root):
            print(f"not of {root}: {', '.join(sorted(foreign))}", file=sys.stderr)
            raise SystemExit(3)


if __name__ == "__main__":
    main()
