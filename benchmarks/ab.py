"""One benchmark of two trees in turns, A B B A A B ..., on one machine:

    python -m benchmarks.ab BASE_TREE CHANGE_TREE --rounds 4 --out RESULTS -- benchmarks.bench_step --size xl
    python -m benchmarks.compare RESULTS/base RESULTS/change

Each run is a process of its own with only that tree's code (in_tree.py). Taking turns, both trees meet the same drifts
of the machine. compare.py treats the files of one folder as several runs of the same rows; several benchmarks may share
one --out.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.harness import options
from benchmarks.harness.parts import LAUNCHER
from sra_fast.errors import Refused

SIDES = ("base", "change")


def run(tree: Path, command: Sequence[str], out: Path, prefix: str) -> None:
    """Run a tree's benchmark once and copy its files of results to `out` as <prefix>-<name>.json. Raises Refused if its
    exit code is not 0, or it wrote no file."""
    with tempfile.TemporaryDirectory(prefix="sra-fast-ab-") as results:
        environment = {**os.environ, "SRA_FAST_RESULTS": results}
        code = subprocess.run([sys.executable, str(LAUNCHER), str(tree), *command], env=environment).returncode
        if code:
            raise Refused(f"{' '.join(command)} in {tree}: exit code {code}")
        files = sorted(Path(results).glob("*.json"))
        if not files:
            raise Refused(f"{' '.join(command)} in {tree}: no results; is it older than $SRA_FAST_RESULTS?")
        out.mkdir(parents=True, exist_ok=True)
        for file in files:
            (out / f"{prefix}-{file.name}").write_bytes(file.read_bytes())


def main(arguments: Sequence[str] | None = None) -> int:
    """The program. Returns its exit code: 1 if a run fails."""
    parser = options.parser("ab", __doc__)
    parser.add_argument("base", type=Path, metavar="BASE_TREE")
    parser.add_argument("change", type=Path, metavar="CHANGE_TREE")
    parser.add_argument("--rounds", type=options.positive, default=3, help="runs of each tree; default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path("ab"), help="folder for base/ and change/; default: ./ab")
    parser.add_argument("command", nargs="+", metavar="-- MODULE ARGUMENT", help="the benchmark")
    args = parser.parse_args(arguments)
    trees = dict(zip(SIDES, (args.base.resolve(), args.change.resolve()), strict=True))
    out = args.out.resolve()
    for number in range(args.rounds):
        for side in SIDES if number % 2 == 0 else SIDES[::-1]:
            print(f"\n== round {number + 1} of {args.rounds}, {side}", flush=True)
            try:
                run(trees[side], args.command, out / side, f"round{number + 1}")
            except Refused as error:
                print(error, file=sys.stderr)
                return 1
    print(f"\nto compare: python -m benchmarks.compare {out / 'base'} {out / 'change'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
