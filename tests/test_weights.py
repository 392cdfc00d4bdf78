"""Commands on weights: sample, export, and runs that start from exported weights."""

from __future__ import annotations

import argparse

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from small_run import arguments, checkpoints, metrics, run, small, write_images

from sra_fast.model.public_weights import write_public


def files(root):
    return sorted(str(path.relative_to(root)) for path in root.rglob("*"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of ten steps with qk-norm, whose shapes tell the head size to readers of a public file, and the cosine
    path."""
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


def checkpoint(run):
    return run / "checkpoints" / f"{80:012d}"


def test_sample_writes_a_grid_single_images_and_an_npz(main, trained, tmp_path):
    pixels = sampled(main, tmp_path / "out", trained, "--sample.batch", "4")
    assert (pixels.shape, pixels.dtype) == ((6, 8, 8, 3), np.uint8)
    names = [f"images/{i:06d}.png" for i in range(6)]
    assert files(tmp_path / "out") == ["grid.png", "images", *names, "samples.json", "samples.npz"]
    for name, image in zip(names, pixels, strict=True):
        with Image.open(tmp_path / "out" / name) as file:
            assert file.mode == "L"
            assert (np.asarray(file)[..., None] == image).all()
    with Image.open(tmp_path / "out/grid.png") as grid:
        assert grid.size == (4 * 33 - 1, 2 * 33 - 1)  # four classes across, 8 x 8 magnified to 32
        assert (np.asarray(grid)[:32:4, :32:4] == pixels[0, ..., 0]).all()


def load_public(path):
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(path, weights_only=True)


@pytest.mark.parametrize("key", ["ema", "model"])
def test_the_same_weights_give_the_same_images_from_every_source(main, trained, tmp_path, key):
    choice = ["--weights-key", key]
    wanted = sampled(main, tmp_path / "run", trained, *choice)
    assert main(["export", "--weights", trained, "--out", tmp_path / "w.safetensors", *choice])[0] == 0
    assert main(["export", "--weights", trained, "--out", tmp_path / "w.pt"])[0] == 0
    content = load_public(tmp_path / "w.pt")
    torch.save(content | {"args": argparse.Namespace(model="SiT-S/2")}, tmp_path / "public.pt")
    sources = {
        "checkpoint": (checkpoint(trained), choice),
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
    assert output.startswith("classes  0 c0, 1 c1, 2 c2, 3 c3\n4 images in")


def test_chosen_classes_and_files(main, trained, tmp_path):
    every = sampled(main, tmp_path / "a", trained)
    chosen = sampled(main, tmp_path / "b", trained, "--classes", "2", "1", "--grid", "0", "--no-images")
    assert files(tmp_path / "b") == ["samples.json", "samples.npz"]
    # Sample i depends on its number and class alone: 1 is of class 1 in both, 0 is of class 2 here and 0 there.
    assert np.abs(chosen[1].astype(int) - every[1]).max() <= 1
    assert (chosen[0] != every[0]).any()
    main(["sample", "--weights", trained, "--out", tmp_path / "c", "--no-npz", "--grid", "1"])
    assert "samples.npz" not in files(tmp_path / "c")
    with Image.open(tmp_path / "c/grid.png") as grid:
        assert grid.size == (32, 32)


class Planted:
    """Unpickling it creates a file."""

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
    objects = {
        "other network": {"conv.weight": torch.zeros(3)},
        "no such key": {"model": {"x": torch.zeros(3)}, "opt": {}},
        "not a dictionary": [1, 2],
        "truncated pt": {"ema": {"x": torch.zeros(1000)}},
    }
    if kind in objects:
        torch.save(objects[kind], path)
    else:
        path.write_text("These are not weights.\n")
    if kind == "truncated pt":
        path.write_bytes(path.read_bytes()[:2000])
    return path


@pytest.mark.parametrize(
    "kind",
    ["text pt", "truncated pt", "other network", "no such key", "not a dictionary", "text safetensors"],
)
def test_a_file_that_holds_no_weights_is_refused(refused, tmp_path, kind):
    path = foreign(tmp_path, kind)
    before = files(tmp_path)
    assert str(path) in refused(["sample", "--weights", path, "--out", tmp_path / "out"])
    assert files(tmp_path) == before


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--classes", "4"], "classes: '4' given; must be in [0, 4)"),
        (["--classes", "-1"], "classes: '-1' given; must be in"),
        (["--grid", "-1"], "grid: -1 given"),
        (["--out", "file"], "out: 'file' given; must be a folder"),
        (["--out", "file/below"], "file/below"),
        (["--sample.sampler", "ddpm"], "sample.sampler: 'ddpm' given"),
        (["--sample.guidance", "inf"], "finite"),
        (["--device", "cuda"], "device: 'cuda' given"),
        (["--latents"], "latents: True given; but the run "),
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


def test_export_writes_the_public_layout(main, trained, tmp_path):
    assert main(["export", "--weights", trained, "--out", tmp_path / "w.pt"])[0] == 0
    content = load_public(tmp_path / "w.pt")
    assert {"model", "ema", "args", "epoch", "steps"} <= set(content)
    assert isinstance(content["args"], argparse.Namespace)
    assert (content["steps"], type(content["epoch"])) == (10, int)
    for key, file in (("model", "weights"), ("ema", "ema")):
        saved = load_file(checkpoint(trained) / f"{file}.safetensors")
        assert content[key].keys() == saved.keys()
        assert all(torch.equal(content[key][name], value) for name, value in saved.items())


@pytest.mark.parametrize("name", ["w.pt", "w.safetensors"])
def test_export_over_a_folder_is_refused(refused, trained, tmp_path, name):
    (tmp_path / name).mkdir()
    assert name in refused(["export", "--weights", trained, "--out", tmp_path / name])
    assert files(tmp_path) == [name]


def test_a_pt_file_needs_both_sets(refused, trained, tmp_path):
    source = checkpoint(trained) / "ema.safetensors"
    assert "must be a run or a checkpoint" in refused(["export", "--weights", source, "--out", tmp_path / "w.pt"])


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_a_run_starts_from_exported_weights(main, trained, root, suffix):
    path = root / f"w.{suffix}"
    main(["export", "--weights", trained, "--out", path])
    settings = {"model__qk_norm": True, "init_from": str(path), "train__images": 8, "optim__lr": 1e-30}
    assert main(arguments(root, **settings))[0] == 0
    start = load_file(checkpoint(trained) / "ema.safetensors")
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
    ema = load_file(checkpoint(trained) / "ema.safetensors")
    plain = {name: value for name, value in ema.items() if not name.startswith("ap_head.")}
    write_public(root / "w.pt", plain, plain, steps=1, epoch=0, args={"model": "SiT-S/2"})
    words = arguments(root, init_from=str(root / "w.pt"), model__qk_norm=True, train__images=16)
    assert main(words)[0] == 1  # it does not say which way its time runs
    code, output, _ = main([*words, "--weights-family", "sit"])
    assert code == 0
    assert "no ap_head" in output
    assert all(row["alignment_loss"] is not None for row in metrics(root / "runs/a"))


def test_a_family_that_contradicts_the_file_is_refused(refused, trained, tmp_path):
    words = ["sample", "--weights", trained, "--weights-family", "dit", "--out", tmp_path / "out"]
    assert "weights-family: 'dit' given; but" in refused(words)


def test_export_into_a_checkpoint_is_refused(refused, trained):
    (checkpoint,) = (trained / "checkpoints").iterdir()
    before = (checkpoint / "ema.safetensors").read_bytes()
    words = ["export", "--weights", trained, "--weights-key", "model", "--out", checkpoint / "ema.safetensors"]
    assert "must not be inside the checkpoint" in refused(words)
    assert (checkpoint / "ema.safetensors").read_bytes() == before


def test_evaluate_refuses_other_images_than_the_run_was_trained_on(refused, root):
    assert run(small(root))[0] == 0
    (root / "data/c0").rename(root / "data/x")
    assert "has other files or classes than" in refused(["evaluate", "--weights", root / "runs/a"])
