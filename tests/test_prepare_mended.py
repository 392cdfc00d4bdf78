"""prepare.py: a complete set with damaged shards is made whole again by the same command; nothing else is touched."""

from __future__ import annotations

import os
import random
import re
import time

import pytest
from small_set import Killed, config, content, jpeg, kill, refusal, rows, write_set
from test_shards import start

from sra_fast.packing import prepare as prepare_module
from sra_fast.packing.prepare import prepare

SHARD = "moments-00001.npy"


@pytest.fixture
def images(tmp_path):
    return write_set(tmp_path / "images")


def flipped(path):
    made = bytearray(path.read_bytes())
    made[-3] ^= 4
    path.write_bytes(made)


def cut(path):
    os.truncate(path, path.stat().st_size - 1)


def of_another_shape(path):
    path.write_bytes(path.read_bytes().replace(b"(16, 3, 16, 16)", b"(16, 3, 32, 8), "))


DAMAGES = {
    "missing": lambda root: (root / SHARD).unlink(),
    "cut": lambda root: cut(root / SHARD),
    "empty": lambda root: (root / SHARD).write_bytes(b""),
    "of another shape": lambda root: of_another_shape(root / SHARD),
    "labels missing": lambda root: (root / "labels-00001.npy").unlink(),
    "labels cut": lambda root: cut(root / "labels-00001.npy"),
    "mirrored missing": lambda root: (root / "moments_flip-00001.npy").unlink(),
    "two of three": lambda root: [(root / f"moments-{number:05d}.npy").unlink() for number in (0, 2)],
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_missing_or_cut_is_made_again(images, tmp_path, capsys, damage):
    given = config(images, tmp_path / "set", flips=True)
    prepare(given)
    before = content(tmp_path / "set")
    DAMAGES[damage](tmp_path / "set")
    assert content(tmp_path / "set") != before
    capsys.readouterr()
    prepare(given)
    assert content(tmp_path / "set") == before
    said = capsys.readouterr()
    assert f"{tmp_path / 'set'}/" in said.err
    assert "; made again" in said.err
    assert "images/s here" in said.out


def test_a_flipped_byte_is_found_if_asked_for(images, tmp_path, capsys):
    given = {"images": images, "out": tmp_path / "set"}
    prepare(config(**given))
    before = content(tmp_path / "set")
    untouched = (tmp_path / "set" / "moments-00000.npy").stat().st_mtime_ns
    flipped(tmp_path / "set" / SHARD)
    prepare(config(**given))
    assert "complete before" in capsys.readouterr().out.splitlines()[-1]
    assert content(tmp_path / "set") != before
    prepare(config(**given, verify=True))
    assert re.search(rf"{SHARD}: SHA-256 \w{{64}}; the manifest has \w{{64}}; made again", capsys.readouterr().err)
    assert content(tmp_path / "set") == before
    assert (tmp_path / "set" / "moments-00000.npy").stat().st_mtime_ns == untouched
    prepare(config(**given, verify=True))
    assert "complete before" in capsys.readouterr().out.splitlines()[-1]


def test_a_shard_that_would_become_another_takes_no_place(images, tmp_path):
    prepare(config(images, tmp_path / "set"))
    (images / "c1" / "019.jpg").write_bytes(jpeg(7))
    (tmp_path / "set" / "labels-00001.npy").unlink()  # its moments are as they were
    before = content(tmp_path / "set")
    for _ in range(2):
        line = refusal(config(images, tmp_path / "set"))
        assert f"{SHARD}: made again, but not what manifest.json says" in line
        assert content(tmp_path / "set") == before


def test_only_damaged_files_are_replaced(images, tmp_path):
    prepare(config(images, tmp_path / "set"))
    moments = (tmp_path / "set" / SHARD).stat()
    (tmp_path / "set" / "labels-00001.npy").unlink()
    prepare(config(images, tmp_path / "set"))
    assert (tmp_path / "set" / SHARD).stat() == moments


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("moments-00001.npy", "moments-00009.npy"),
        ("moments-00001.npy", "foo.npy"),
        ('"dtype": "uint8"', '"dtype": "float16"'),
        ('"dtype"', '"type"'),
        ("{", ""),
    ],
)
def test_a_damaged_manifest_is_refused_and_nothing_is_touched(images, tmp_path, old, new):
    prepare(config(images, tmp_path / "set"))
    path = tmp_path / "set" / "manifest.json"
    path.write_text(path.read_text().replace(old, new))
    (tmp_path / "set" / "moments-00002.npy").unlink()
    before = content(tmp_path / "set")
    assert f"{path}" in refusal(config(images, tmp_path / "set"))
    assert content(tmp_path / "set") == before


def test_strict_refuses_a_complete_set_that_lacks_images(tmp_path):
    root = write_set(tmp_path / "images", 40, extra={"0bad.jpg": b""})
    prepare(config(root, tmp_path / "set"))
    assert "c1/0bad.jpg: undecodable (empty file) and left out before" in refusal(
        config(root, tmp_path / "set", strict=True)
    )


def damaged(images, out):
    """(a set without two of its files, as it was)."""
    prepare(config(images, out))
    before = content(out)
    for name in ("moments-00000.npy", "moments-00002.npy"):
        (out / name).unlink()
    return config(images, out), before


@pytest.mark.parametrize("place", ["sra_fast.packing.prepare.shutil.rmtree", "sra_fast.packing.shards._sync"])
def test_mending_survives_being_killed(images, tmp_path, monkeypatch, place):
    given, before = damaged(images, tmp_path / "set")
    with monkeypatch.context() as patch:
        patch.setattr(place, kill)
        with pytest.raises(Killed):
            prepare(given)
    prepare(given)
    assert content(tmp_path / "set") == before
    assert not (tmp_path / "set" / ".mending").exists()


def test_mending_survives_kill_9(images, tmp_path):
    given, before = damaged(images, tmp_path / "set")
    mended, moments = 0, random.Random(0)
    for _ in range(4):
        process = start(given)
        while process.poll() is None and not (tmp_path / "set" / ".mending").exists():
            time.sleep(0.001)
        time.sleep(moments.uniform(0, 0.02))
        process.kill()
        process.wait()
        there = {path.name: path.read_bytes() for path in (tmp_path / "set").glob("*.npy")}
        mended += there.items() <= before.items()
    assert mended == 4  # nothing but what was there before
    prepare(given)
    assert content(tmp_path / "set") == before


def test_two_processes_mend_one_after_the_other(images, tmp_path):
    given, before = damaged(images, tmp_path / "set")
    both = [start(given) for _ in range(2)]
    said = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert content(tmp_path / "set") == before
    assert sorted("complete before" in output for output, _ in said) == [False, True]


def test_other_ranks_leave_mending_to_the_first(images, tmp_path, monkeypatch):
    given, _ = damaged(images, tmp_path / "set")
    without = content(tmp_path / "set")
    monkeypatch.setenv("RANK", "1")
    prepare(given)
    assert content(tmp_path / "set") == without


def test_a_class_that_was_lost_costs_only_the_shards_that_lack_it(tmp_path, capsys):
    root = write_set(tmp_path / "images", 60)  # c0, c1 and c2 take turns; shards of 16 files in the order of names
    broken = sorted((root / "c2").iterdir())
    whole = [path.read_bytes() for path in broken]
    (root / "c0" / "000.jpg").write_bytes(b"")
    for path in broken:
        path.write_bytes(b"")
    assert "no image of class 'c2' can be decoded" in refusal(config(root, tmp_path / "set"))
    kept = {path.name for path in (tmp_path / "set").glob("shard-*")}
    assert kept == {"shard-00000.json", "shard-00001.json"}
    for path, file in zip(broken, whole, strict=True):
        path.write_bytes(file)
    capsys.readouterr()
    manifest = prepare(config(root, tmp_path / "set"))
    assert (manifest.count, len(manifest.skipped)) == (59, 1)
    assert sorted(set(rows(tmp_path / "set")[1].tolist())) == [0, 1, 2]


def test_what_was_made_before_does_not_count_for_the_rate(images, tmp_path, monkeypatch):
    given, bars, bar = config(images, tmp_path / "set"), [], prepare_module.tqdm
    with monkeypatch.context() as patch:
        patch.setattr(prepare_module, "assemble", kill)
        with pytest.raises(Killed):
            prepare(given)
    (tmp_path / "set" / "shard-00001.json").unlink()
    monkeypatch.setattr(prepare_module, "tqdm", lambda **fields: bars.append(fields) or bar(**fields))
    prepare(given)
    assert [(one["total"], one["initial"]) for one in bars] == [(40, 24)]
