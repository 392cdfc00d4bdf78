"""Two trees in turns: each runs its own code, and a slow-down planted in one of them is found."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import ab, compare

LAUNCHER = Path(__file__).parents[1] / "benchmarks" / "in_tree.py"

# Samples of a quiet machine: 1 % of noise around the tree's own speed.
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
OLD_INIT = "from pathlib import Path\n__path__.append(str(Path(__file__).parents[1]))"  # before kernels was a link


@pytest.fixture
def trees(tmp_path):
    """base/, as trees were before sra_fast/kernels was a link, and change/; each with a benchmark as slow as its own
    kernels say."""

    def make(slower: float) -> list[Path]:
        paths = []
        for name, slowness in (("base", 1.0), ("change", slower)):
            tree = tmp_path / "trees" / name
            for folder in ("sra_fast", "kernels", "benchmarks"):
                (tree / folder).mkdir(parents=True)
                (tree / folder / "__init__.py").touch()
            if name == "base":
                (tree / "sra_fast" / "__init__.py").write_text(OLD_INIT)
            else:
                (tree / "sra_fast" / "kernels").symlink_to("../kernels")
            (tree / "kernels" / "__init__.py").write_text(f"SLOWNESS = {slowness}")
            (tree / "benchmarks" / "fake.py").write_text(FAKE)
            paths.append(tree)
        return paths

    return make


def run(trees, tmp_path, *command, rounds=3):
    options = ["--rounds", str(rounds), "--out", str(tmp_path / "out")]
    return ab.main([*map(str, trees), *options, "--", *map(str, command)])


@pytest.mark.parametrize(("slower", "code"), [(1.03, 1), (1.0, 0)])
def test_a_planted_slow_down_is_found_and_equals_are_equal(trees, tmp_path, capsys, slower, code):
    """Though neither tree is the one that is installed, whose kernels have no SLOWNESS."""
    assert run(trees(slower), tmp_path, "benchmarks.fake", tmp_path / "log") == 0
    assert (tmp_path / "log").read_text() == "bc" + "cb" + "bc"
    for side in ("base", "change"):
        files = sorted((tmp_path / "out" / side).iterdir())
        assert [path.name for path in files] == [f"round{number}-fake.json" for number in (1, 2, 3)]
        command = json.loads(files[0].read_text())["stamp"]["command"]
        assert command.endswith(f"-m benchmarks.fake {tmp_path / 'log'}")
    _, rows = compare.load(tmp_path / "out" / "base")
    assert [len(runs) for runs in rows.values()] == [3]
    assert compare.main([str(tmp_path / "out" / side) for side in ("base", "change")]) == code
    assert ("slower: step" in capsys.readouterr().out) == bool(code)


def test_a_module_of_another_tree_is_refused(trees):
    tree, other = trees(1.0)
    (tree / "benchmarks" / "astray.py").write_text(
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('sra_fast.fast', {str(other / 'kernels' / '__init__.py')!r})\n"
        "sys.modules['sra_fast.fast'] = importlib.util.module_from_spec(spec)\n"
    )
    command = [sys.executable, "-S", str(LAUNCHER), str(tree), "benchmarks.astray"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 3
    assert f"not of {tree}: sra_fast.fast from {other}" in result.stderr


@pytest.mark.parametrize(("body", "message"), [("raise SystemExit(4)", "exit code 4"), ("", "no results")])
def test_a_run_that_fails_or_writes_nothing_stops_the_comparison(trees, tmp_path, capfd, body, message):
    paths = trees(1.0)
    (paths[1] / "benchmarks" / "fake.py").write_text(body)
    assert run(paths, tmp_path, "benchmarks.fake", tmp_path / "log") == 1
    assert message in capfd.readouterr().err
