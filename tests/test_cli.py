"""The command line: one line and exit code 1 for every wrong input, help for every field."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import subprocess
import sys
import typing

import pytest
import torch
from small_run import arguments, complaint, strict_json, summary, write_images

from sra_fast import cli, config
from sra_fast.config import PRESETS, Config, from_dict
from sra_fast.data.folder import scan, split


def files(root):
    return sorted(str(path.relative_to(root)) for path in root.rglob("*"))


# Wrong values

# Fields that the refusals below speak of; and where a refusal fails to come, nothing is trained.
SIZES = ["--run.dry-run", "--model.depth", "6", "--model.hidden", "128", "--model.heads", "4", "--model.patch", "2"]
WRONG = [
    (["train", "sit-s-3"], "preset: 'sit-s-3' given"),
    (["train", "--train.images", "9"], "preset: '--train.images' given"),
    (["tran", "digits"], "command: 'tran' given; must be one of train, sample"),
    (["train", "digits", *SIZES, "--optim.schedule", "step"], "optim.schedule: 'step' given; must be one of"),
    (["train", "digits", *SIZES, "--model.family", "sd"], "model.family: 'sd' given; must be one of"),
    (["train", "digits", *SIZES, "--align.distance", "cos"], "align.distance: 'cos' given; must be one of"),
    (["train", "digits", *SIZES, "--data.channels", "2"], "data.channels: '2' given; must be one of"),
    (["train", "digits", *SIZES, "--train.batches", "8"], "--train.batches"),
    (["train", "digits", *SIZES, "more"], "more"),
    (["train", "digits", *SIZES, "--train.batch"], "train.batch"),
    (
        ["train", "digits", *SIZES, "--train.images", "many"],
        "train.images: invalid literal for int() with base 10: 'many'",
    ),
    (["train", "digits", *SIZES, "--optim.lr", "fast"], "optim.lr"),
    (["train", "digits", *SIZES, "--optim.lr", "nan"], "optim.lr: nan given"),
    (["train", "digits", *SIZES, "--optim.lr", "inf"], "optim.lr: inf given"),
    (["train", "digits", *SIZES, "--align.weight", "inf"], "align.weight: inf given"),
    (["train", "digits", *SIZES, "--optim.lr", "-1"], "optim.lr: -1.0 given; must be positive"),
    (["train", "digits", *SIZES, "--optim.beta2", "1"], "optim.beta2: 1.0 given; must be in [0, 1)"),
    (
        ["train", "digits", *SIZES, "--train.batch", "10", "--train.accumulate", "3"],
        "train.batch: 10 given; must be a multiple",
    ),
    (["train", "digits", *SIZES, "--train.images", "0"], "train.images: 0 given; must be positive"),
    (
        ["train", "digits", *SIZES, "--align.student-tap", "5"],
        "align.student-tap: 5 given; must be below align.teacher-tap = 4",
    ),
    (
        ["train", "digits", *SIZES, "--align.teacher-tap", "7"],
        "align.teacher-tap: 7 given; must be in [1, model.depth = 6]",
    ),
    (["train", "digits", *SIZES, "--align.student-tap", "-1"], "align.student-tap: -1 given"),
    (["train", "digits", *SIZES, "--align.t-max", "0"], "align.t-max: 0.0 given; must be in (0, 1]"),
    (["train", "digits", *SIZES, "--align.t-max", "1.5"], "align.t-max: 1.5 given; must be in (0, 1]"),
    (
        ["train", "digits", *SIZES, "--data.resolution", "9"],
        "data.resolution: 9 given; must be a multiple of model.patch = 2",
    ),
    (
        ["train", "digits", *SIZES, "--model.heads", "3"],
        "model.hidden: 128 given; must be a multiple of model.heads = 3",
    ),
    (["train", "digits", *SIZES, "--run.name", "a/b"], "run.name: 'a/b' given"),
    (["train", "digits", *SIZES, "--run.seed", "-1"], "run.seed: -1 given"),
    (["train", "digits", *SIZES, "--sample.sampler", "ddim"], "sample.sampler: 'ddim' given"),
    (["sample"], "weights"),
    (["sample", "--weights", "nowhere"], "weights: 'nowhere' given"),
    (["sample", "--weights", "nowhere", "--weights-key", "raw"], "weights-key: 'raw' given; must be one of"),
    (["sample", "--weights", "nowhere", "--sample.count", "0"], "sample.count: 0 given; must be positive"),
    (["evaluate", "--weights", "nowhere"], "weights: 'nowhere' given; must be a run"),
    (["export", "--weights", "nowhere"], "out"),
    (["export", "--weights", "nowhere", "--out", "a.bin"], "out: 'a.bin' given; must end in .safetensors or .pt"),
    (["export", "--weights", "nowhere", "--out", "b/a.pt"], "out: 'b/a.pt' given; the folder b does not exist"),
    (["export", "--weights", "nowhere", "--out", "a.pt"], "weights: 'nowhere' given"),
    (["export", "--weights", "nowhere", "--out", "a.safetensors"], "weights: 'nowhere' given"),
    (["doctor", "me"], "doctor: 'me' given; takes no arguments"),
]


@pytest.mark.parametrize(
    ("words", "expected"), WRONG, ids=[" ".join(word for word in words if word not in SIZES) for words, _ in WRONG]
)
def test_a_wrong_word_is_one_line_that_names_the_field(words, expected, refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert expected in refused(words)
    assert files(tmp_path) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("words", [["--train.device", "cuda"], ["--train.device", "cuda", "--run.dry-run"]])
def test_a_gpu_that_is_not_there_is_refused(words, refused, tmp_path):
    write_images(tmp_path / "data")
    assert "device: 'cuda' given" in refused(arguments(tmp_path, *words))
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "words", [["--kernels.gated-residual", "fused"], ["--kernels.gated-residual", "fused", "--run.dry-run"]]
)
def test_a_kernel_that_is_not_there_is_refused(words, refused, tmp_path):
    write_images(tmp_path / "data")
    assert "kernels.gated_residual: 'fused' given" in refused(arguments(tmp_path, *words))
    assert not (tmp_path / "runs").exists()


def test_several_processes_are_refused(refused, tmp_path, monkeypatch):
    write_images(tmp_path / "data")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "WORLD_SIZE: '2' given; must be 1" in refused(arguments(tmp_path))
    assert not (tmp_path / "runs").exists()


def test_the_program_itself_exits_with_1(tmp_path):
    ended = subprocess.run(
        [sys.executable, "-m", "sra_fast.cli", "train", "digits", "--optim.lr", "x"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=60,
        check=False,
    )
    assert ended.returncode == 1
    assert ended.stderr.startswith("sra-fast: optim.lr: ")
    assert ended.stderr.count("\n") == 1


# Wrong data


def damaged(root, count):
    """The first so many training files become text. Returns their names."""
    names = split(scan(root / "data"), 0.2)[0].files[:count]
    for name in names:
        (root / "data" / name).write_bytes(b"no image")
    return names


@pytest.mark.parametrize("kind", ["missing", "empty", "empty class", "file", "no folder given"])
def test_a_folder_that_cannot_serve_is_refused(root, refused, kind):
    folder = root / "other"
    if kind == "file":
        folder.write_text("")
    elif kind != "missing":
        folder.mkdir()
    if kind == "empty class":
        write_images(folder)
        (folder / "c9").mkdir()
    line = refused(arguments(root, data__images="" if kind == "no folder given" else str(folder)))
    assert "data.images: " in line
    assert (str(folder) in line) == (kind != "no folder given")
    assert not (root / "runs").exists()


def test_strict_stops_at_the_first_undecodable_image_and_names_it(root, main):
    (name,) = damaged(root, 1)
    code, *captured = main(arguments(root, data__strict=True))
    assert code == 1
    assert name in complaint(captured)


def test_too_many_undecodable_images_stop_the_run(root, main):
    names = damaged(root, 4)
    code, *captured = main(arguments(root, data__max_bad_share=0.05))
    assert code == 1
    line = complaint(captured)
    assert "at most data.max-bad-share = 0.05" in line
    assert any(name in line for name in names)


def test_an_undecodable_image_is_named_and_counted(root, main):
    (name,) = damaged(root, 1)
    code, _, error = main(arguments(root, data__max_bad_share=0.05, train__images=160))
    assert code == 0
    assert error.count(f"data.images: {name}: undecodable") == 1
    written = summary(root / "runs/a")
    assert list(written["undecodable_files"]) == [name]
    assert written["replaced_images"] >= 2  # once in each of the first two epochs


def test_images_and_a_model_that_do_not_fit_are_refused(root, refused):
    assert "model.classes: 7 given; must be 4" in refused(arguments(root, model__classes=7))


# Dry run and help


@pytest.mark.parametrize("name", ["digits", "sit-xl-2", "dit-b-4-paper"])
def test_a_dry_run_prints_what_would_run_and_writes_nothing(main, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    code, output, error = main(["train", name, "--run.dry-run", "--train.batch", "64"])
    assert (code, error) == (0, "")
    printed = strict_json(output)
    resolved = printed.pop("resolved")
    saved = from_dict(Config, printed, "dry run")
    assert saved == dataclasses.replace(
        PRESETS[name],
        run=dataclasses.replace(PRESETS[name].run, dry_run=True),
        train=dataclasses.replace(PRESETS[name].train, batch=64),
    )
    taps = {"digits": (1, 4), "sit-xl-2": (8, 20), "dit-b-4-paper": (3, 7)}[name]
    assert (resolved["student_tap"], resolved["teacher_tap"]) == taps
    assert set(resolved["ops"]) == {field.name for field in dataclasses.fields(config.KernelsConfig)} - {"default"} | {
        "attention"
    }
    assert (resolved["ops"].pop("attention"), resolved["execution"]) == ("sdpa", "eager")
    assert set(resolved["ops"].values()) <= {"fused", "reference", "reference (ddpm)"}
    assert files(tmp_path) == []


def sections(cls, prefix=""):
    """(option, class, field) of every leaf field below a dataclass."""
    hints = typing.get_type_hints(cls)
    for name in (field.name for field in dataclasses.fields(cls)):
        if dataclasses.is_dataclass(hints[name]):
            yield from sections(hints[name], f"{prefix}{name}.")
        else:
            yield f"--{prefix}{name}".replace("_", "-"), cls, name


def documentation(cls):
    """{field: the string below it} of a dataclass."""
    body = ast.parse(inspect.getsource(cls)).body[0].body
    fields = [(a, b) for a, b in itertools.pairwise(body) if isinstance(a, ast.AnnAssign)]
    return {a.target.id: ast.literal_eval(b.value) for a, b in fields if isinstance(b, ast.Expr)}


def help_of(words, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as stop:
        cli.main([*words, "--help"])
    assert not stop.value.code
    return " ".join(word for word in capsys.readouterr().out.split() if set(word) - set("│╭╮╰╯─"))


@pytest.mark.parametrize(
    ("words", "cls"),
    [
        (["train", "digits"], Config),
        (["train"], Config),
        (["sample"], cli.SampleCommand),
        (["evaluate"], cli.EvaluateCommand),
        (["export"], cli.ExportCommand),
    ],
    ids=["train preset", "train", "sample", "evaluate", "export"],
)
def test_help_documents_every_field(words, cls, capsys, monkeypatch):
    text = help_of(words, capsys, monkeypatch)
    leaves = list(sections(cls))
    assert len(leaves) > 2
    for option, owner, name in leaves:
        *section, last = option.removeprefix("--").split(".")
        assert option in text or f"--{'.'.join([*section, 'no-' + last])}" in text, option
        said = " ".join(documentation(owner)[name].split())
        assert said.rstrip(".") in text, option


def test_help_lists_the_commands(main):
    code, output, _ = main([])
    assert code == 0
    assert all(f"sra-fast {name}" in output for name in cli.COMMANDS)
