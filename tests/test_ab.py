"""Two trees in turns: each runs its own code, and a slow-down planted in one of them is found."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import ab, compare

ROOT = Path(__file__).parents[1]
LAUNCHER = ROOT / "benchmarks" / "in_tree.py"

# Samples as a quiet machine gives them: 1 % of noise around the tree's own speed.
FAKE = """
import json, os, random, sys
from pathlib import Path
from sra_fast.kernels import SLOWNESS

log = Path(sys.argv[1])
seed = len(log.read_text()) if log.exists() else 0
with log.open("a") as file:
    file.write(Path.cwd().name[0])
draw = random.Random(seed)
samples = [SLOWNESS * draw.gauss(10, 0.1) for _ in range(60)]
stamp = {"device": "some", "versions": {}, "command": " ".join(sys.orig_argv)}
rows = [{"name": "step", "params": {"size": "s"}, "samples_ms": samples}]
content = {"format_version": 1, "name": "fake", "stamp": stamp, "rows": rows}
Path(os.environ["SRA_FAST_RESULTS"], "fake.json").write_text(json.dumps(content))
"""


@pytest.fixture
def trees(tmp_path):
    """base/ and change/, each with a benchmark that is as slow as its own kernels say; and where they log."""

    def make(slower: float) -> list[Path]:
        made = []
        for name, slowness in (("base", 1.0), ("change", slower)):
            tree = tmp_path / "trees" / name
            for folder in ("sra_fast", "kernels", "benchmarks"):
                (tree / folder).mkdir(parents=True)
                (tree / folder / "__init__.py").touch()
            (tree / "kernels" / "__init__.py").write_text(f"SLOWNESS = {slowness}")
            (tree / "benchmarks" / "fake.py").write_text(FAKE)
            made.append(tree)
        return made

    return make


def run(trees, tmp_path, *words, rounds=3):
    return ab.main([*map(str, trees), "--rounds", str(rounds), "--out", str(tmp_path / "out"), "--", *map(str, words)])


@pytest.mark.parametrize(("slower", "code"), [(1.03, 1), (1.0, 0), (0.9, 0)])
def test_a_planted_slow_down_is_found_and_equals_are_equal(trees, tmp_path, capsys, slower, code):
    assert run(trees(slower), tmp_path, "benchmarks.fake", tmp_path / "log") == 0
    assert (tmp_path / "log").read_text() == "bc" + "cb" + "bc"
    for side in ("base", "change"):
        made = sorted(path.name for path in (tmp_path / "out" / side).iterdir())
        assert made == [f"round{number}-fake.json" for number in (1, 2, 3)]
    assert compare.main([str(tmp_path / "out" / side) for side in ("base", "change")]) == code
    assert ("slower: step" in capsys.readouterr().out) == bool(code)


def test_every_run_is_of_its_own_tree_and_says_its_command(trees, tmp_path):
    """Though this tree is the one that is installed: its kernels have no SLOWNESS."""
    run(trees(1.5), tmp_path, "benchmarks.fake", tmp_path / "log", rounds=1)
    stamp = json.loads((tmp_path / "out" / "change" / "round1-fake.json").read_text())["stamp"]
    assert stamp["command"].endswith(f"-m benchmarks.fake {tmp_path / 'log'}")


def test_a_module_of_another_tree_is_refused(trees, tmp_path):
    tree, other = trees(1.0)
    (tree / "benchmarks" / "astray.py").write_text(
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('sra_fast.fast', {str(other / 'kernels' / '__init__.py')!r})\n"
        "sys.modules['sra_fast.fast'] = importlib.util.module_from_spec(spec)\n"
    )
    command = [sys.executable, str(LAUNCHER), str(tree), "benchmarks.astray"]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 3
    assert f"not of {tree}: sra_fast.fast from {other}" in ran.stderr


def test_kernels_are_found_where_nothing_is_installed(trees, tmp_path):
    """-S leaves out site-packages, and with them this project."""
    tree = trees(1.25)[1]
    (tree / "benchmarks" / "shows.py").write_text("from sra_fast.kernels import SLOWNESS\nprint(SLOWNESS)")
    command = [sys.executable, "-S", str(LAUNCHER), str(tree), "benchmarks.shows"]
    assert subprocess.run(command, capture_output=True, text=True).stdout == "1.25\n"


@pytest.mark.parametrize(("body", "said"), [("raise SystemExit(4)", "exit code 4"), ("", "no results")])
def test_a_run_that_fails_or_leaves_nothing_stops_the_comparison(trees, tmp_path, capfd, body, said):
    made = trees(1.0)
    (made[1] / "benchmarks" / "fake.py").write_text(body)
    assert run(made, tmp_path, "benchmarks.fake", tmp_path / "log") == 1
    assert said in capfd.readouterr().err


def test_rounds_must_be_some(trees, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run(trees(1.0), tmp_path, "benchmarks.fake", rounds=0)
    assert "at least 1" in capsys.readouterr().err
