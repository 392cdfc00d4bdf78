"""prepare.py: a complete set with damaged shards is made whole again by the same command; nothing else is touched."""

from __future__ import annotations

import os

import pytest
from small_set import Killed, config, content, jpeg, kill, refusal, rows, write_set

from sra_fast.data import prepare as prepare_module
from sra_fast.data.prepare import prepare

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
    assert f"{SHARD}: its SHA-256 is not what manifest.json says; made again" in capsys.readouterr().err
    assert content(tmp_path / "set") == before
    assert (tmp_path / "set" / "moments-00000.npy").stat().st_mtime_ns == untouched
    prepare(config(**given, verify=True))
    assert "complete before" in capsys.readouterr().out.splitlines()[-1]


def test_a_shard_that_has_become_another_is_said_to_be(images, tmp_path):
    prepare(config(images, tmp_path / "set"))
    (images / "c1" / "019.jpg").write_bytes(jpeg(7))
    (tmp_path / "set" / SHARD).unlink()
    line = refusal(config(images, tmp_path / "set"))
    assert f"{SHARD}: made again, but not what manifest.json says" in line
    assert not list((tmp_path / "set").glob("shard-*"))


def test_mending_survives_being_killed(images, tmp_path, monkeypatch):
    prepare(config(images, tmp_path / "set"))
    before = content(tmp_path / "set")
    for number in (0, 2):
        (tmp_path / "set" / f"moments-{number:05d}.npy").unlink()

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("sra_fast.data.prepare.remove_record", killed)
        with pytest.raises(KeyboardInterrupt):
            prepare(config(images, tmp_path / "set"))
    prepare(config(images, tmp_path / "set"))
    assert content(tmp_path / "set") == before


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
