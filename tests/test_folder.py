"""folder.py: which images a folder has, their labels, and the side of the split they are on."""

from __future__ import annotations

import hashlib
import os
import subprocess
from pathlib import Path

import numpy as np
from small_data import refusal

from sra_fast.data.folder import ImageFolder, scan, split


def touch(root, *names):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())


def synthetic(count):
    files = tuple(f"c/{i:06d}.png" for i in range(count))
    return ImageFolder(None, ("c",), files, np.zeros(count, np.int64))


def test_finds_images_and_only_images(tmp_path):
    touch(tmp_path, "b/1.jpg", "b/deep/er/2.JPEG", "a/3.PNG", "a/4.Jpg", "b-c/5.jpeg")
    touch(tmp_path, "a/.hidden.png", "a/notes.txt", "a/.git/6.png", ".hidden/7.png", "loose.png", "a/png")
    folder = scan(tmp_path)
    assert folder.classes == ("a", "b", "b-c")
    # '-' sorts before '/', so the files' order is not the classes' order: labels must follow the files.
    assert folder.files == ("a/3.PNG", "a/4.Jpg", "b-c/5.jpeg", "b/1.jpg", "b/deep/er/2.JPEG")
    assert folder.labels.dtype == np.int64
    assert folder.labels.tolist() == [0, 0, 2, 1, 1]
    assert len(folder) == 5
    assert [folder.read(row) for row in range(5)] == [name.encode() for name in folder.files]
    assert scan(str(tmp_path)).files == folder.files


def test_a_linked_class_is_followed_and_a_link_within_is_not(tmp_path):
    touch(tmp_path, "elsewhere/1.png", "data/a/2.png")
    (tmp_path / "data" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "a" / "loop").symlink_to(tmp_path / "data")
    folder = scan(tmp_path / "data")
    assert folder.files == ("a/2.png", "linked/1.png")
    assert folder.others == (("linked folders", 1, "a/loop"),)


def test_what_is_left_out_is_counted_by_kind(tmp_path):
    touch(tmp_path, "a/1.png")
    assert (scan(tmp_path).others, scan(tmp_path).ignored()) == ((), "")
    touch(tmp_path, "a/2.webp", "a/b/3.WEBP", "a/4.gif", "a/readme", "loose.jpg", ".hidden.gif", "a/.5.gif", ".c/6.gif")
    folder = scan(tmp_path)
    assert folder.others == (
        ("hidden", 3, ".c"),
        (".webp", 2, "a/2.webp"),
        (".gif", 1, "a/4.gif"),
        (".jpg", 1, "loose.jpg"),
        ("without extension", 1, "a/readme"),
    )
    line = folder.ignored()
    assert line.startswith(f"{tmp_path}: ignored, because not JPEG or PNG files in a class folder: 3 hidden (.c), 2 ")
    touch(tmp_path, *(f"a/x.{kind}" for kind in ("bmp", "tif", "txt")))
    assert scan(tmp_path).ignored().endswith(", ...")
    assert folder.take(np.array([0])).others == folder.others


def test_what_a_storage_system_adds_is_not_trained_on(tmp_path):
    touch(tmp_path, "a/1.jpg", "a/@eaDir/1.jpg/SYNOPHOTO_THUMB_B.jpg", "@eaDir/2.jpg", "__MACOSX/a/3.jpg")
    folder = scan(tmp_path)
    assert (folder.classes, folder.files) == (("a",), ("a/1.jpg",))
    assert folder.others == (("folders of the storage system", 3, "@eaDir"),)


def test_refuses_what_is_no_data_set(tmp_path):
    missing = tmp_path / "missing"
    assert refusal(scan, missing) == f"{missing}: must be a folder of class folders"
    touch(tmp_path, "file.png")
    assert "must be a folder" in refusal(scan, tmp_path / "file.png")
    assert "one folder per class" in refusal(scan, tmp_path)
    touch(tmp_path, "train-0.tar.gz")
    assert "1 .gz (train-0.tar.gz)" in refusal(scan, tmp_path)
    touch(tmp_path, "good/1.png", "hollow/readme.txt")
    assert refusal(scan, tmp_path).startswith(f"{tmp_path / 'hollow'}: every class folder must hold at least one")


def test_fingerprint_follows_names_and_labels_not_place(tmp_path):
    for place in ("one", "two"):
        touch(tmp_path / place, "a/1.png", "b/2.png")
    one, two = scan(tmp_path / "one"), scan(tmp_path / "two")
    assert one.fingerprint() == two.fingerprint() == hashlib.sha256(b"a/1.png\x000\x00b/2.png\x001\x00").hexdigest()
    touch(tmp_path / "two", "b/3.png")
    assert scan(tmp_path / "two").fingerprint() != one.fingerprint()
    relabelled = ImageFolder(one.root, one.classes, one.files, one.labels[::-1].copy())
    assert relabelled.fingerprint() != one.fingerprint()


def test_split_is_a_partition_of_the_asked_share():
    folder = synthetic(20_000)
    before = set()
    for share in (0.02, 0.2, 0.9):
        train, held_out = split(folder, share)
        assert before < set(held_out.files)
        before = set(held_out.files)
        assert sorted(train.files + held_out.files) == list(folder.files)
        assert (len(train.labels), len(held_out.labels)) == (len(train), len(held_out))
        # Five standard deviations of a binomial count.
        assert abs(len(held_out) - share * 20_000) < 5 * (20_000 * share * (1 - share)) ** 0.5
        assert train.classes == held_out.classes == folder.classes
    few = {file for file in before if file < "c/003000.png"}
    assert set(split(synthetic(3000), 0.9)[1].files) == few  # other files do not matter


def test_split_is_frozen():
    # With another hash, images that old runs trained on would be held out.
    assert split(synthetic(40), 0.1)[1].files == (
        "c/000004.png",
        "c/000008.png",
        "c/000018.png",
        "c/000019.png",
        "c/000030.png",
        "c/000031.png",
        "c/000034.png",
    )


def test_split_refuses_an_empty_side():
    for share, count in ((0.001, 0), (0.999, 3)):
        line = refusal(split, synthetic(3), share)
        assert line.startswith(f"data.held-out: {share} given; ")
        assert line.endswith(f"holds out {count} of 3")


def test_folders_may_be_nested_deeper_than_calls(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.makedirs("root/c0")
    os.chdir("root/c0")
    for _ in range(1100):
        os.mkdir("a")
        os.chdir("a")
    Path("x.png").touch()
    os.chdir(tmp_path)
    assert len(scan(tmp_path / "root")) == 1
    subprocess.run(["rm", "-r", "root"], check=True)  # deeper than pytest can remove
