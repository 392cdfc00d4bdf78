"""The command line: one line and exit code 1 for every wrong input, help for every field, sample, export."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import itertools
import subprocess
import sys
import typing

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from small_run import arguments, checkpoints, complaint, metrics, run, small, strict_json, summary, write_images

from sra_fast import cli, config
from sra_fast.config import PRESETS, Config, from_dict
from sra_fast.data.folder import scan, split
from sra_fast.model.public_weights import write_public


@pytest.fixture
def main(capfd):
    """(exit code, stdout, stderr) of a command line."""

    def call(words):
        capfd.readouterr()
        code = cli.main([str(word) for word in words])
        return code, *capfd.readouterr()

    return call


@pytest.fixture
def refused(main):
    """The single line with which a command refuses; nothing else is printed."""

    def call(words):
        code, output, error = main(words)
        assert (code, output, error.count("\n")) == (1, "", 1), (output, error)
        return complaint((output, error))

    return call


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


@pytest.fixture
def root(tmp_path):
    write_images(tmp_path / "data")
    return tmp_path


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
    assert set(resolved["ops"].values()) <= {"fused", "reference"}
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


# Sample


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of ten steps whose head size a public file can tell (qk-norm), with the cosine path."""
    root = tmp_path_factory.mktemp("trained")
    write_images(root / "data")
    settings = {"model__qk_norm": True, "objective__path": "cosine", "optim__lr": 0.03, "optim__warmup_images": 8}
    assert run(small(root, **settings))[0] == 0
    return root / "runs/a"


def sampled(main, out, weights, *words):
    """The images of `sra-fast sample`: (N, H, W, 3) uint8."""
    settings = ["--sample.sampler", "sde", "--sample.steps", "4", "--sample.count", "6"]
    code, output, error = main(["sample", "--weights", weights, "--out", out, *settings, *words])
    assert code == 0, error
    assert f"6 images in {out}" in output
    with np.load(out / "samples.npz") as file:
        assert file.files == ["arr_0"]
        return file["arr_0"]


def test_sample_writes_a_grid_single_images_and_an_npz(main, trained, tmp_path):
    pixels = sampled(main, tmp_path / "out", trained)
    assert (pixels.shape, pixels.dtype) == ((6, 8, 8, 3), np.uint8)
    names = [f"images/{i:06d}.png" for i in range(6)]
    assert files(tmp_path / "out") == ["grid.png", "images", *names, "samples.npz"]
    for name, image in zip(names, pixels, strict=True):
        with Image.open(tmp_path / "out" / name) as file:
            assert file.mode == "L"
            assert (np.asarray(file)[..., None] == image).all()
    with Image.open(tmp_path / "out/grid.png") as grid:
        assert grid.size == (4 * 33 - 1, 2 * 33 - 1)  # four classes across, 8 x 8 magnified to 32
        assert (np.asarray(grid)[:32:4, :32:4] == pixels[0, ..., 0]).all()


@pytest.mark.parametrize("key", ["ema", "model"])
def test_the_same_weights_give_the_same_images_from_every_source(main, trained, tmp_path, key):
    choice = ["--weights-key", key]
    wanted = sampled(main, tmp_path / "run", trained, *choice)
    assert main(["export", "--weights", trained, "--out", tmp_path / "w.safetensors", *choice])[0] == 0
    assert main(["export", "--weights", trained, "--out", tmp_path / "w.pt"])[0] == 0
    with torch.serialization.safe_globals([argparse.Namespace]):
        content = torch.load(tmp_path / "w.pt", weights_only=True)
    torch.save(content | {"args": argparse.Namespace(model="SiT-S/2")}, tmp_path / "public.pt")
    sources = {
        "checkpoint": (trained / "checkpoints" / f"{80:012d}", choice),
        "safetensors": (tmp_path / "w.safetensors", []),
        "our pt": (tmp_path / "w.pt", choice),
        "public pt": (tmp_path / "public.pt", [*choice, "--path", "cosine"]),  # which does not say its path
    }
    for name, (source, words) in sources.items():
        assert (sampled(main, tmp_path / name, source, *words) == wanted).all(), name
    other = sampled(main, tmp_path / "other", trained, "--weights-key", "model" if key == "ema" else "ema")
    assert (other != wanted).any()
    assert (sampled(main, tmp_path / "linear", tmp_path / "public.pt", *choice) != wanted).any()


def test_sample_takes_a_runs_own_settings_as_defaults(main, trained, tmp_path):
    code, output, _ = main(["sample", "--weights", trained, "--out", tmp_path / "out"])
    assert code == 0
    assert "4 images" in output


def test_chosen_classes_and_files(main, trained, tmp_path):
    every = sampled(main, tmp_path / "a", trained)
    chosen = sampled(main, tmp_path / "b", trained, "--classes", "2", "1", "--grid", "0", "--no-images")
    assert files(tmp_path / "b") == ["samples.npz"]
    # Sample i depends on its number and class alone: 1 is of class 1 in both, 0 is of class 2 here and 0 there.
    assert np.abs(chosen[1].astype(int) - every[1]).max() <= 1
    assert (chosen[0] != every[0]).any()
    main(["sample", "--weights", trained, "--out", tmp_path / "c", "--no-npz", "--grid", "1"])
    assert "samples.npz" not in files(tmp_path / "c")
    with Image.open(tmp_path / "c/grid.png") as grid:
        assert grid.size == (32, 32)


class Planted:
    """Its pickle creates a file when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("command", ["sample", "train"])
def test_code_in_a_pt_file_does_not_run(refused, root, command):
    torch.save({"ema": Planted(root / "ran"), "model": {}}, root / "evil.pt")
    (root / "runs").mkdir()
    before = files(root)
    if command == "sample":
        line = refused(["sample", "--weights", root / "evil.pt", "--out", root / "out"])
    else:
        line = refused(arguments(root, init_from=str(root / "evil.pt")))
    assert "evil.pt: not unpickled" in line
    assert files(root) == before


def foreign(tmp_path, kind):
    path = tmp_path / ("w.safetensors" if "safetensors" in kind else "w.pt")
    if kind == "truncated pt":
        torch.save({"ema": {"x": torch.zeros(1000)}}, path)
        path.write_bytes(path.read_bytes()[:2000])
    elif kind == "other network":
        torch.save({"conv.weight": torch.zeros(3)}, path)
    elif kind == "no such key":
        torch.save({"model": {"x": torch.zeros(3)}, "opt": {}}, path)
    elif kind == "not a dictionary":
        torch.save([1, 2], path)
    else:
        path.write_text("" if kind.startswith("empty") else "These are not weights.\n")
    return path


@pytest.mark.parametrize(
    "kind",
    [
        "text pt",
        "empty pt",
        "truncated pt",
        "other network",
        "no such key",
        "not a dictionary",
        "text safetensors",
        "empty safetensors",
    ],
)
def test_a_file_that_holds_no_weights_is_refused(refused, tmp_path, kind):
    path = foreign(tmp_path, kind)
    before = files(tmp_path)
    assert str(path) in refused(["sample", "--weights", path, "--out", tmp_path / "out"])
    assert files(tmp_path) == before


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--classes", "4"], "classes: 4 given; must be in [0, 4)"),
        (["--classes", "-1"], "classes: -1 given"),
        (["--grid", "-1"], "grid: -1 given"),
        (["--out", "file"], "out: 'file' given; must be a folder"),
        (["--out", "file/below"], "file/below"),
        (["--sample.sampler", "ddpm"], "sample.sampler: 'ddpm' given"),
        (["--sample.guidance", "inf"], "finite"),
        (["--device", "cuda"], "device: 'cuda' given"),
    ],
)
def test_sample_refuses_in_one_line_and_writes_nothing(refused, trained, tmp_path, monkeypatch, words, expected):
    if "cuda" in words and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    assert expected in refused(["sample", "--weights", trained, *words])
    assert files(tmp_path) == ["file"]
    assert (tmp_path / "file").read_text() == "mine"


def test_a_run_that_was_never_saved_is_refused(refused, root):
    folder = root / "runs/b"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    for command in (
        ["sample"],
        ["evaluate"],
        ["export", "--out", root / "a.pt"],
        ["export", "--out", root / "a.safetensors"],
    ):
        assert "must be a run that was saved" in refused([*command, "--weights", folder])
    (folder / "config.json").write_text("{")
    assert str(folder / "config.json") in refused(["sample", "--weights", folder])


# Export


def test_export_writes_the_public_layout(main, trained, tmp_path):
    assert main(["export", "--weights", trained, "--out", tmp_path / "w.pt"])[0] == 0
    with torch.serialization.safe_globals([argparse.Namespace]):
        content = torch.load(tmp_path / "w.pt", weights_only=True)
    assert {"model", "ema", "args", "epoch", "steps"} <= set(content)
    assert isinstance(content["args"], argparse.Namespace)
    assert (content["steps"], type(content["epoch"])) == (10, int)
    for key, file in (("model", "weights"), ("ema", "ema")):
        saved = load_file(trained / "checkpoints" / f"{80:012d}" / f"{file}.safetensors")
        assert content[key].keys() == saved.keys()
        assert all(torch.equal(content[key][name], value) for name, value in saved.items())


@pytest.mark.parametrize(("key", "file"), [("model", "weights"), ("ema", "ema")])
def test_export_writes_safetensors_of_one_set(main, trained, tmp_path, key, file):
    path = tmp_path / "w.safetensors"
    assert main(["export", "--weights", trained, "--out", path, "--weights-key", key])[0] == 0
    saved, exported = load_file(trained / "checkpoints" / f"{80:012d}" / f"{file}.safetensors"), load_file(path)
    assert exported.keys() == saved.keys()
    assert all(torch.equal(exported[name], value) for name, value in saved.items())
    assert files(tmp_path) == ["w.safetensors"]


@pytest.mark.parametrize("name", ["w.pt", "w.safetensors"])
def test_export_over_a_folder_is_refused(refused, trained, tmp_path, name):
    (tmp_path / name).mkdir()
    assert name in refused(["export", "--weights", trained, "--out", tmp_path / name])
    assert files(tmp_path) == [name]


def test_a_pt_file_needs_both_sets(refused, main, trained, tmp_path):
    main(["export", "--weights", trained, "--out", tmp_path / "w.safetensors"])
    line = refused(["export", "--weights", tmp_path / "w.safetensors", "--out", tmp_path / "w.pt"])
    assert "must be a run or a checkpoint" in line


# Starting from weights


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_a_run_starts_from_exported_weights(main, trained, root, suffix):
    path = root / f"w.{suffix}"
    main(["export", "--weights", trained, "--out", path])
    settings = {"model__qk_norm": True, "init_from": str(path), "train__images": 8, "optim__lr": 1e-30}
    assert main(arguments(root, **settings))[0] == 0
    start = load_file(trained / "checkpoints" / f"{80:012d}" / "ema.safetensors")
    for name in ("weights", "ema"):
        after = load_file(root / "runs/a/checkpoints" / f"{8:012d}" / f"{name}.safetensors")
        assert all(torch.equal(value, start[key]) for key, value in after.items())
    assert checkpoints(root / "runs/a") == [f"{8:012d}"]


@pytest.mark.parametrize("kind", ["missing", "other shape"])
def test_weights_that_do_not_fit_a_new_run_are_refused(refused, main, trained, root, kind):
    path = root / "w.safetensors"
    if kind == "other shape":
        main(["export", "--weights", trained, "--out", path])
    line = refused(arguments(root, init_from=str(path), model__qk_norm=True, model__hidden=64))
    assert ("w.safetensors" if kind == "missing" else "init-from: pos_embed: (1, 16, 32) given") in line
    assert not (root / "runs/a").exists()


def test_a_public_file_without_a_head_starts_a_run_and_says_so(main, trained, root):
    ema = load_file(trained / "checkpoints" / f"{80:012d}" / "ema.safetensors")
    plain = {name: value for name, value in ema.items() if not name.startswith("ap_head.")}
    write_public(root / "w.pt", plain, plain, steps=1, epoch=0, args={"model": "SiT-S/2"})
    code, output, _ = main(arguments(root, init_from=str(root / "w.pt"), model__qk_norm=True, train__images=16))
    assert code == 0
    assert "no ap_head" in output
    assert all(row["alignment_loss"] is not None for row in metrics(root / "runs/a"))
