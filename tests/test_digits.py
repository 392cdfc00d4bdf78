"""digits.py: the embedded data set is written completely or not at all."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from PIL import Image
from small_data import refusal

from sra_fast.data import digits
from sra_fast.data.digits import COUNT, write_digits
from sra_fast.data.folder import scan


def test_writes_every_digit_under_its_class(tmp_path):
    source = pytest.importorskip("sklearn.datasets").load_digits()
    write_digits(tmp_path / "data" / "digits")
    folder = scan(tmp_path / "data" / "digits")
    assert folder.classes == tuple("0123456789")
    assert len(folder) == COUNT == len(source.target)
    for name, label in zip(folder.files, folder.labels, strict=True):
        index = int(name[2:6])
        assert label == source.target[index]
        with Image.open(folder.root / name) as image:
            assert (image.mode, image.size, image.format) == ("L", (8, 8), "PNG")
            values = [round(v * 255 / 16) for v in source.images[index].ravel().tolist()]
            assert np.asarray(image).ravel().tolist() == values
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["digits"]
    write_digits(tmp_path / "data" / "digits")
    assert len(scan(tmp_path / "data" / "digits")) == COUNT


def test_leaves_the_users_folder_alone(tmp_path):
    (tmp_path / "digits").mkdir()
    (tmp_path / "digits" / "mine.txt").write_text("mine")
    write_digits(tmp_path / "digits")
    assert [path.name for path in (tmp_path / "digits").iterdir()] == ["mine.txt"]


def test_an_interrupted_write_leaves_nothing(tmp_path, monkeypatch):
    pytest.importorskip("sklearn")
    saved, save = [], Image.Image.save

    def interrupted(image, path, *arguments):
        saved.append(path)
        if len(saved) > 100:
            raise KeyboardInterrupt
        save(image, path, *arguments)

    monkeypatch.setattr(Image.Image, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_digits(tmp_path / "digits")
    assert list(tmp_path.iterdir()) == []


def test_two_writers_do_not_collide(tmp_path, monkeypatch):
    pytest.importorskip("sklearn")
    rename = digits.os.rename

    def beaten(unfinished, root):
        monkeypatch.setattr(digits.os, "rename", rename)
        write_digits(root)  # another process, just before our rename
        rename(unfinished, root)

    monkeypatch.setattr(digits.os, "rename", beaten)
    write_digits(tmp_path / "digits")
    assert len(scan(tmp_path / "digits")) == COUNT
    assert [path.name for path in tmp_path.iterdir()] == ["digits"]


def test_without_scikit_learn_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert "pip install scikit-learn" in refusal(write_digits, tmp_path / "digits")
    assert list(tmp_path.iterdir()) == []
