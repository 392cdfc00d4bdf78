"""archives.py: every image of a webdataset is read with its label, and an incomplete archive is refused."""

from __future__ import annotations

import io
import json
import os
import tarfile

import numpy as np
import pytest
import small_data

from sra_fast.packing.archives import ImageArchives, open_images


def write_tar(path, members, mode="w", **options):
    """A .tar of {name: bytes}, or of (name, bytes) pairs where a name comes twice."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode, **options) as archive:
        for name, content in members.items() if isinstance(members, dict) else members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def samples(labels, first=0):
    """{00000.jpg: b"image 0", 00000.cls: label, ...}."""
    members = {}
    for number, label in enumerate(labels, first):
        members |= {f"{number:05d}.jpg": b"image %d" % number, f"{number:05d}.cls": b"%d" % label}
    return members


def refusal(images):
    return small_data.refusal(open_images, str(images))


def content(data):
    return {name: (int(data.labels[row]), data.read(row)) for row, name in enumerate(data.files)}


@pytest.mark.parametrize("pattern", ["", "[ab].tar", "../set/*.tar"])
def test_archives_are_read_in_order_whatever_names_them(tmp_path, pattern):
    write_tar(tmp_path / "set" / "b.tar", samples([0, 2], first=7))
    write_tar(tmp_path / "set" / "a.tar", samples([1, 0, 1]))
    data = open_images(str(tmp_path / "set" / pattern))
    assert isinstance(data, ImageArchives)
    assert data.files == ("a.tar/00000.jpg", "a.tar/00001.jpg", "a.tar/00002.jpg", "b.tar/00007.jpg", "b.tar/00008.jpg")
    assert (data.labels.dtype, data.labels.tolist()) == (np.int64, [1, 0, 1, 0, 2])
    assert data.classes == ("0", "1", "2")
    assert (len(data), data.root.resolve()) == (5, tmp_path.resolve() / "set")
    order = [4, 0, 3, 2, 1, 4]  # from one archive to the other and back
    assert [data.read(row) for row in order] == [b"image %d" % n for n in (8, 0, 7, 2, 1, 8)]
    data.close()
    assert data.read(1) == b"image 1"


@pytest.mark.parametrize("pattern", ["t-{08..11}.tar", "{t,s}-*.tar", "t-{08..09}.tar"])
def test_numbers_in_braces_stand_for_archives(tmp_path, pattern):
    for number in range(8, 12):
        write_tar(tmp_path / f"t-{number:02d}.tar", samples([number % 2], first=number))
    if pattern.startswith("{"):  # only numbers do
        assert "no file matches it as a pattern" in refusal(tmp_path / pattern)
        return
    data = open_images(str(tmp_path / pattern))
    assert data.files[:2] == ("t-08.tar/00008.jpg", "t-09.tar/00009.jpg")
    assert len(data) == (4 if "11" in pattern else 2)
    assert "the numbers in braces must increase" in refusal(tmp_path / "t-{11..08}.tar")
    (tmp_path / "t-09.tar").unlink()
    assert f"'{tmp_path}/t-09.tar' given; there is no such folder" in refusal(tmp_path / pattern)


def test_archives_of_one_name_in_two_folders_stay_apart(tmp_path):
    for folder, label in (("x", 1), ("y", 0)):
        write_tar(tmp_path / folder / "a.tar", samples([label]))
    data = open_images(str(tmp_path / "*" / "a.tar"))
    assert dict(zip(data.files, data.labels.tolist(), strict=True)) == {"x/a.tar/00000.jpg": 1, "y/a.tar/00000.jpg": 0}


@pytest.mark.parametrize("kind", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_members_of_all_sorts(tmp_path, kind):
    long = "train/" + "n" * 90 + "/" + ("p" * 60 if kind == tarfile.USTAR_FORMAT else "p" * 200)
    members = {
        f"{long}.JPEG": b"long",
        f"{long}.cls": b"2\n",
        "a/1.cls": b" 1 ",  # before its image
        "a/1.png": b"png",
        "b/1.Jpg": b"another 1",
        "b/1.json": json.dumps({"label": 0, "cls": 9}).encode(),
        "b/1.txt": b"a caption",
        "2.jpeg": b"from json",
        "2.json": b'{"cls": "3"}',
        "3.jpg": b"both",
        "3.json": b'{"label": 7}',
        "3.cls": b"1",
        "a/._1.jpg": b"of a Mac",
        "dataset.json": b"{}",
    }
    data = open_images(str(write_tar(tmp_path / "t.tar", members, format=kind)))
    expected = {
        f"t.tar/{long}.JPEG": (2, b"long"),
        "t.tar/a/1.png": (1, b"png"),
        "t.tar/b/1.Jpg": (0, b"another 1"),
        "t.tar/2.jpeg": (3, b"from json"),
        "t.tar/3.jpg": (1, b"both"),
    }
    assert content(data) == expected


@pytest.mark.parametrize(
    ("members", "line"),
    [
        ({"1.jpg": b"", "1.cls": b"0", "2.jpg": b""}, "sample '2' has no .cls and no .json with a label"),
        ({"1.jpg": b"", "1.cls": b"0", "2.cls": b"1"}, "sample '2' has a label, but no .jpg"),
        ({"1.webp": b"", "1.cls": b"0"}, "sample '1' has a label, but no .jpg, .jpeg or .png"),
        ({"1.jpg": b"", "1.cls": b"cat"}, "1.cls: has the label b'cat'; must be a number"),
        ({"1.jpg": b"", "1.cls": b""}, "has the label b''"),
        ({"1.jpg": b"", "1.cls": b"-1"}, "has the label b'-1'"),
        ({"1.jpg": b"", "1.cls": b"4000000000"}, "has the label b'4000000000'; must be a number from 0 to 1,048,575"),
        ({"1.jpg": b"", "1.json": b'{"caption": 1}'}, "the .json of 1.jpg: has the label b''"),
        ({"1.jpg": b"", "1.json": b"[" * 100_000}, "the .json of 1.jpg: has the label b''"),
        ({"1.jpg": b"", "1.cls": b"1" * (1 << 21)}, "1.cls: has the label b'1111"),
        ({"1.jpg": b"", "1.json": b'{"label": true}'}, "has the label b'True'"),
        ({"1.jpg": b"", "1.png": b"", "1.cls": b"0"}, "1.png: a second image of the same sample"),
        ([("1.jpg", b""), ("1.cls", b"0"), ("1.jpg", b"")], "1.jpg: a second image of the same sample"),
        ({"1.jpg": b"", "1.cls": b"0", "2.jpg": b"", "2.cls": b"2"}, "class 1 of 3 has no image"),
        ({"notes.txt": b""}, "must hold images"),
    ],
)
def test_samples_that_cannot_be_trained_on_are_refused(tmp_path, members, line):
    assert line in refusal(write_tar(tmp_path / "a.tar", members))


def test_places_without_archives_are_refused(tmp_path):
    assert "there is no such folder, and no file matches it" in refusal(tmp_path / "nowhere")
    assert "there is no such folder, and no file matches it" in refusal(tmp_path / "*.tar")
    assert "one folder per class" in refusal(tmp_path)
    write_tar(tmp_path / "a.tar", samples([0]))
    (tmp_path / "cat").mkdir()
    assert "holds .tar files and folders (cat)" in refusal(tmp_path)
    packed = write_tar(tmp_path / "a.tar.gz", samples([0]), "w:gz")
    assert "must be an uncompressed .tar" in refusal(packed)
    packed.rename(tmp_path / "b.tar")
    assert "b.tar: cannot be read as an uncompressed tar" in refusal(tmp_path / "b.tar")


def test_an_archive_that_is_not_whole_is_refused_wherever_it_ends(tmp_path):
    path = write_tar(tmp_path / "a.tar", samples([0, 0, 0]))
    whole = path.read_bytes()
    used = 6 * 1024  # of six members, a header and a block each; then zeros
    assert not whole[used:].strip(b"\0")
    for size in [0, 1, 511, 512, 700, *range(1024, used, 512), used - 1, used]:
        path.write_bytes(whole[:size])
        assert "a.tar" in refusal(path)
    path.write_bytes(whole[: used + 512])
    assert len(open_images(str(path))) == 3


def test_a_damaged_header_or_a_second_archive_is_not_taken_for_the_end(tmp_path):
    path = write_tar(tmp_path / "a.tar", samples([0, 0, 0]))
    whole = path.read_bytes()
    for member in range(6):
        path.write_bytes(whole)
        small_data.flip_bit(path, 1024 * member + 100)
        assert "a.tar" in refusal(path)
    path.write_bytes(whole + whole)
    assert "damaged at byte 6,144" in refusal(path)


def test_an_archive_cut_short_after_it_was_indexed_is_an_error_not_a_short_file(tmp_path):
    path = write_tar(tmp_path / "a.tar", {"1.jpg": b"x" * 5000, "1.cls": b"0"})
    data = open_images(str(path))
    with path.open("r+b") as file:
        file.truncate(2000)
    with pytest.raises(OSError, match="cut short"):
        data.read(0)


def test_fingerprint_follows_names_labels_and_sizes_not_the_place(tmp_path):
    one = open_images(str(write_tar(tmp_path / "x" / "a.tar", samples([0, 1])))).fingerprint()
    assert open_images(str(write_tar(tmp_path / "y" / "a.tar", samples([0, 1])))).fingerprint() == one
    changed = [samples([1, 0]), samples([0, 1, 1]), {**samples([0, 1]), "00001.jpg": b"longer image"}]
    prints = {open_images(str(write_tar(tmp_path / f"{n}" / "a.tar", m))).fingerprint() for n, m in enumerate(changed)}
    assert len(prints | {one}) == 4


@pytest.mark.parametrize("text", [b"1", b'{"label": 1}', b'{"cls": "1"}', b'{"class": 1, "x": 2}', b'{"class_id": 1}'])
def test_labels_in_json_as_writers_have_them(tmp_path, text):
    members = {"a.jpg": b"a", "a.json": text, "b.jpg": b"b", "b.cls": b"0"}
    assert open_images(str(write_tar(tmp_path / "t.tar", members))).labels.tolist() == [1, 0]


def test_members_that_are_passed_over_are_counted_with_an_example(tmp_path):
    members = samples((0, 1)) | {f"22.0{i}_i.{kind}": b"0" for i in range(3) for kind in ("jpg", "cls")}
    data = open_images(str(write_tar(tmp_path / "t.tar", members | {"00000.txt": b"a caption"})))
    assert len(data) == 2
    assert data.ignored().startswith(f"{tmp_path}: ignored")
    assert "1 .00_i.jpg (t.tar/22.00_i.jpg)" in data.ignored()


@pytest.mark.parametrize("spoil", ["size", "sparse", "fifo"])
def test_an_archive_that_promises_more_than_it_has_is_refused_at_once(tmp_path, spoil):
    path = tmp_path / "t.tar"
    if spoil == "fifo":
        os.mkfifo(path)
    elif spoil == "size":
        write_tar(path, {"1.jpg": b"x" * 600, "1.cls": b"0"}, format=tarfile.PAX_FORMAT)
        info = tarfile.TarInfo("1.jpg")
        info.size, info.pax_headers = 600, {"size": str(1 << 50)}
        path.write_bytes(info.tobuf(tarfile.PAX_FORMAT) + path.read_bytes()[512:])
    else:
        os.truncate(write_tar(path, samples((0,))), 1 << 29)
        assert len(open_images(str(path))) == 1  # zeros at the end are an archive's end
        return
    assert "cannot be read" in refusal(path) or "cut short" in refusal(path)


def test_patterns_that_overlap_name_an_archive_once(tmp_path):
    for number in (1, 2, 12):
        write_tar(tmp_path / f"{number}.tar", samples([0, 1]))
    assert len(open_images(str(tmp_path / "*{1..2}*.tar"))) == 6


def test_a_label_is_digits(tmp_path):
    write_tar(tmp_path / "a.tar", {"0.jpg": b"image", "0.cls": b"1_0"})
    assert "has the label b'1_0'" in refusal(tmp_path / "a.tar")
