"""prepare.py: the same command makes the damaged files of a complete set again and touches nothing else."""

from __future__ import annotations

import os
import random
import re
import time

import pytest
from small_data import Killed, config, content, flip_bit, jpeg, kill, refusal, write_jpegs
from test_shards import finish, start

from sra_fast.packing.prepare import prepare

FILE = "moments-00001.npy"


@pytest.fixture
def images(tmp_path):
    return write_jpegs(tmp_path / "images")


@pytest.fixture
def out(images, tmp_path):
    """A complete set."""
    prepare(config(images, tmp_path / "set", flips=True))
    return tmp_path / "set"


@pytest.fixture
def command(images, out):
    return config(images, out, flips=True)


def cut(path):
    os.truncate(path, path.stat().st_size - 1)


def reshape(path):
    path.write_bytes(path.read_bytes().replace(b"(16, 3, 16, 16)", b"(16, 3, 32, 8), "))


DAMAGES = {
    "missing": lambda root: (root / FILE).unlink(),
    "cut": lambda root: cut(root / FILE),
    "another shape": lambda root: reshape(root / FILE),
    "labels missing": lambda root: (root / "labels-00001.npy").unlink(),
    "labels cut": lambda root: cut(root / "labels-00001.npy"),
    "mirrored missing": lambda root: (root / "moments_flip-00001.npy").unlink(),
    "two of three": lambda root: [(root / f"moments-{number:05d}.npy").unlink() for number in (0, 2)],
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_missing_and_cut_files_are_made_again(command, out, capsys, damage):
    before = content(out)
    untouched = {path: path.stat() for path in out.iterdir()}
    DAMAGES[damage](out)
    for path in [path for path, stat in untouched.items() if not path.exists() or path.stat() != stat]:
        del untouched[path]
    capsys.readouterr()
    prepare(command)
    assert content(out) == before
    assert {path: path.stat() for path in untouched} == untouched
    output, error = capsys.readouterr()
    assert re.search(rf"{out}/\S+: .*; made again", error)
    assert "images/s here" in output


def test_a_flipped_bit_is_found_with_verify(images, command, out, capsys):
    before = content(out)
    flip_bit(out / FILE, -3)
    prepare(command)
    assert "already complete" in capsys.readouterr().out.splitlines()[-1]
    assert content(out) != before
    prepare(config(images, out, flips=True, verify=True))
    assert re.search(rf"{FILE}: SHA-256 \w{{64}}; the manifest has \w{{64}}; made again", capsys.readouterr().err)
    assert content(out) == before


def test_a_shard_that_would_change_is_not_replaced(images, command, out):
    (images / "c1" / "019.jpg").write_bytes(jpeg(7))
    (out / "labels-00001.npy").unlink()
    before = content(out)
    for _ in range(2):
        line = refusal(prepare, command)
        assert f"{out / FILE}: made again, but does not match manifest.json" in line
        assert content(out) == before


@pytest.mark.parametrize(
    ("old", "new"), [(FILE, "foo.npy"), ('"dtype": "uint8"', '"dtype": "float16"'), ('"dtype"', '"type"'), ("{", "")]
)
def test_a_damaged_manifest_is_refused_and_nothing_is_touched(command, out, old, new):
    path = out / "manifest.json"
    path.write_text(path.read_text().replace(old, new))
    (out / "moments-00002.npy").unlink()
    before = content(out)
    assert refusal(prepare, command).startswith(f"{path}: ")
    assert content(out) == before


@pytest.mark.parametrize("function", ["sra_fast.packing.prepare.shutil.rmtree", "sra_fast.packing.shards.sync"])
def test_it_survives_being_killed(command, out, monkeypatch, function):
    before = content(out)
    DAMAGES["two of three"](out)
    with monkeypatch.context() as patch:
        patch.setattr(function, kill)
        with pytest.raises(Killed):
            prepare(command)
    prepare(command)
    assert content(out) == before


@pytest.mark.slow
def test_it_survives_kill_9(command, out):
    before, moments = content(out), random.Random(0)
    DAMAGES["two of three"](out)
    for _ in range(4):
        process = start(command)
        while process.is_alive() and not (out / ".mending").exists():
            time.sleep(0.001)
        time.sleep(moments.uniform(0, 0.02))
        process.kill()
        process.join()
        assert {path.name: path.read_bytes() for path in out.glob("*.npy")}.items() <= before.items()
    prepare(command)
    assert content(out) == before


def test_two_processes_repair_one_after_the_other(command, out):
    before = content(out)
    DAMAGES["two of three"](out)
    results = finish(start(command), start(command))
    assert content(out) == before
    assert sorted("already complete" in output for output in results) == [False, True]


def test_other_ranks_leave_the_repair_to_the_first(command, out, monkeypatch):
    DAMAGES["missing"](out)
    damaged = content(out)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    prepare(command)
    assert content(out) == damaged
