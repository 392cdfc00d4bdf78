"""Classes by number and by name, wherever the names are kept."""

from __future__ import annotations

import json

import pytest
from small_data import refusal
from small_run import arguments, run, small, write_images

from sra_fast.data import class_names
from sra_fast.data.class_names import labels_of, numbered
from sra_fast.errors import Damaged

FOLDERS = tuple(sorted(str(number) for number in range(12)))  # "0", "1", "10", "11", "2", ...


def test_numbers_and_names():
    assert labels_of(["dog", "0", "dog"], ["cat", "dog"], 2) == [1, 0, 1]
    assert labels_of(["2"], FOLDERS, 12) == [2]  # a number is a number: this one is folder 10
    assert numbered(FOLDERS) == "0 0, 1 1, 2 10, 3 11, 4 2, 5 3, ..."
    assert numbered(("a\x1b[31m", "b"), [1, 0]) == "1 b, 0 a\\x1b[31m"


@pytest.mark.parametrize(
    ("word", "names", "line"),
    [
        ("2", ("cat", "dog"), "classes: '2' given; must be in [0, 2)"),
        ("-1", ("cat", "dog"), "must be in [0, 2)"),
        ("9" * 5000, ("cat", "dog"), "must be in [0, 2)"),
        ("dgo", ("cat", "dog"), "no class has this name; there are dog"),
        ("horse", ("cat", "dog"), "there are cat, ..."),
        ("cat", ("cat", "cat"), "is the name of several classes"),
        ("cat", (), "must be a number in [0, 2): these weights have no names of classes"),
    ],
)
def test_what_is_no_class_is_refused(word, names, line):
    assert line in refusal(labels_of, [word], names, 2)


@pytest.mark.parametrize("content", ["{", "[]", '{"classes": 3}', '{"classes": [1]}'])
def test_a_damaged_file_is_named(tmp_path, content):
    (tmp_path / "classes.json").write_text(content)
    with pytest.raises(Damaged, match=r"classes\.json"):
        class_names.read(tmp_path)


def test_a_run_tells_its_names_and_so_do_its_exported_weights(root, main):
    code, output, _ = main(arguments(root, train__images=8))
    assert code == 0
    assert "classes  0 c0, 1 c1, 2 c2, 3 c3\n" in output
    path = root / "w.safetensors"
    main(["export", "--weights", root / "runs/a", "--out", path])
    for weights in (root / "runs/a", path):
        words = ["--out", root / "out", "--classes", "c2", "1", "--sample.sampler", "euler", "--sample.count", "2"]
        code, output, error = main(["sample", "--weights", weights, "--sample.steps", "2", *words])
        assert (code, output.splitlines()[0]) == (0, "classes  2 c2, 1 c1"), error
    assert json.loads((root / "out/samples.json").read_text())["classes"] == [2, 1]


def test_a_run_of_before_has_no_names_and_is_sampled_by_number(root, main, refused):
    write_images(root / "data")
    run(small(root, train__images=8))
    (root / "runs/a/classes.json").unlink()
    words = ["sample", "--weights", root / "runs/a", "--out", root / "out", "--sample.count", "1", "--classes"]
    assert main([*words, "2"])[0] == 0
    assert "must be a number in [0, 4)" in refused([*words, "c2"])


def test_names_of_another_number_of_classes_are_refused(root, refused, tmp_path):
    assert run(small(root, train__images=8))[0] == 0
    (root / "runs/a/classes.json").write_text('{"classes": ["a"]}')
    for command in (["sample", "--out", tmp_path / "o"], ["export", "--out", tmp_path / "w.safetensors"]):
        assert "has the names of 1 classes, but weights of 4" in refused([*command, "--weights", root / "runs/a"])
