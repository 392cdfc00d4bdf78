"""One benchmark of two trees in turns, A B B A A B ..., on one machine:

    python -m benchmarks.ab BASE_TREE CHANGE_TREE --rounds 4 --out RESULTS -- benchmarks.bench_step --size xl
    python -m benchmarks.compare RESULTS/base RESULTS/change

Each run is a process of its own with that tree's code and nothing of the other's (in_tree.py). A machine that warms up
or gets company in the meantime does so for both. compare.py takes the files of one folder as several runs of the same
rows; several benchmarks may share one --out.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.harness.parts import LAUNCHER

SIDES = ("base", "change")


class RunFailed(RuntimeError):
    """A benchmark that did not end well, or left nothing to compare."""


def order(number: int) -> tuple[str, str]:
    """Who goes first in a round: base in even ones, change in odd ones."""
    return SIDES if number % 2 == 0 else SIDES[::-1]


def run(tree: Path, words: Sequence[str], place: Path, prefix: str) -> list[Path]:
    """One run of a tree's benchmark. Returns the files it left, moved to `place` as <prefix>-<name>.json.

    Raises:
        RunFailed: if its exit code is not 0, or it left no file.
    """
    with tempfile.TemporaryDirectory(prefix="sra-fast-ab-") as temporary:
        environment = {**os.environ, "SRA_FAST_RESULTS": temporary}
        code = subprocess.run([sys.executable, str(LAUNCHER), str(tree), *words], env=environment).returncode
        if code:
            raise RunFailed(f"{' '.join(words)} in {tree}: exit code {code}")
        made = sorted(Path(temporary).glob("*.json"))
        if not made:
            raise RunFailed(
                f"{' '.join(words)} in {tree}: no results; is it older than $SRA_FAST_RESULTS, which says where to?"
            )
        place.mkdir(parents=True, exist_ok=True)
        kept = [place / f"{prefix}-{path.name}" for path in made]
        for path, target in zip(made, kept, strict=True):
            target.write_bytes(path.read_bytes())
    return kept


def main(arguments: Sequence[str] | None = None) -> int:
    """The program. Returns its exit code: 1 if a run fails."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ab", description=__doc__.splitlines()[0])
    parser.add_argument("base", type=Path, metavar="BASE_TREE")
    parser.add_argument("change", type=Path, metavar="CHANGE_TREE")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each tree; default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path("ab"), help="folder for base/ and change/; default: ./ab")
    parser.add_argument("words", nargs="+", metavar="-- MODULE ARGUMENT", help="the benchmark")
    options = parser.parse_args(arguments)
    if options.rounds < 1:
        parser.error(f"--rounds: {options.rounds} given; must be at least 1")
    trees = {"base": options.base.resolve(), "change": options.change.resolve()}
    out = options.out.resolve()
    for number in range(options.rounds):
        for side in order(number):
            print(f"\n== round {number + 1} of {options.rounds}, {side}", flush=True)
            try:
                run(trees[side], options.words, out / side, f"round{number + 1}")
            except RunFailed as failure:
                print(failure, file=sys.stderr)
                return 1
    print(f"\nto compare: python -m benchmarks.compare {out / 'base'} {out / 'change'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
