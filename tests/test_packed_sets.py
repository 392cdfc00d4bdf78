"""docs/packed-sets.md: its example makes a set that opens, trains and is sampled from, and its tables miss no field."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from small_run import run, small

from sra_fast.data.manifest import Manifest, Shard, Skipped, read_manifest
from sra_fast.data.packed import open_moments
from sra_fast.data.source import open_source
from sra_fast.kernels.perturb import clean_ref

PAGE = (Path(__file__).parents[1] / "docs/packed-sets.md").read_text()
CPU = torch.device("cpu")
COUNT = 24


def example():
    """The page's Python."""
    (block,) = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    return block


@pytest.fixture
def given():
    """What the page asks the reader for."""
    generator = np.random.default_rng(0)
    mean = generator.standard_normal(32).astype(np.float32)
    std = generator.uniform(0.5, 4, 32).astype(np.float32)
    noise = generator.standard_normal((COUNT, 32, 16, 16)).astype(np.float32)
    latents = mean[:, None, None] + std[:, None, None] * noise
    return {"latents": latents, "labels": np.arange(COUNT) % 3, "mean": mean, "std": std}


@pytest.fixture
def made(tmp_path, monkeypatch, given):
    """The set that the page makes of it."""
    monkeypatch.chdir(tmp_path)
    exec(compile(example(), "docs/packed-sets.md", "exec"), dict(given))
    return tmp_path / "vavae"


def config(root, made, **changes):
    """The page's run, small; a held-out share that leaves both sides some of a few rows."""
    sizes = {"model__patch": 4, "train__batch": 4, "train__images": 8, "optim__warmup_images": 0}
    return small(root, data__images="", data__latents=str(made), data__held_out=0.3, **sizes, **changes)


def test_the_set_holds_what_was_given(made, given):
    opened = open_moments(made)
    assert sorted(path.name for path in made.iterdir()) == ["labels-00000.npy", "manifest.json", "moments-00000.npy"]
    assert (opened.shape, opened.dtype, opened.posterior) == ((32, 16, 16), np.float16, False)
    assert opened.classes == ("class 0", "class 1", "class 2")
    assert np.array_equal(opened.labels, given["labels"])
    rows = opened.gather(np.arange(COUNT))
    assert np.array_equal(rows.numpy(), given["latents"].astype(np.float16))


def test_x_is_normalised_by_the_statistics(made, given, tmp_path):
    source, _ = open_source(config(tmp_path, made), CPU)
    rows, labels = source.load(source.train)
    x = clean_ref(rows, torch.arange(len(rows)), 0, source.stored)
    mean, std = given["mean"][:, None, None], given["std"][:, None, None]
    wanted = (given["latents"][source.train.index] - mean) / std
    assert np.allclose(x.numpy(), wanted, atol=0.02)  # rows are float16
    assert np.array_equal(labels.numpy(), given["labels"][source.train.index])


def test_inspect_finds_nothing_wrong(made, main):
    code, output, error = main(["inspect", made, "--images", "0"])
    assert code == 0, error
    assert "warning" not in error
    assert "nothing wrong found" in output


def test_the_run_is_sampled_as_latents_without_a_vae(made, given, tmp_path, main, monkeypatch):
    def refuse(*arguments):
        raise AssertionError("a VAE was opened")

    monkeypatch.setattr("sra_fast.sampling.decoding.open_vae", refuse)
    assert run(config(tmp_path, made))[0] == 0
    made.rename(tmp_path / "moved")  # sampling needs no data
    seen = []

    def keep(*arguments, **options):
        seen.append(generate(*arguments, **options))
        return seen[-1]

    from sra_fast.sampling.generate import generate

    monkeypatch.setattr("sra_fast.sampling.generate", keep)
    words = ["--sample.count", "5", "--sample.batch", "3", "--out", tmp_path / "generated"]
    code, output, error = main(["sample", "--weights", tmp_path / "runs/a", "--latents", *words])
    assert code == 0, error
    assert "5 latents in" in output
    assert [path.name for path in (tmp_path / "generated").iterdir()] == ["latents.npz"]
    with np.load(tmp_path / "generated/latents.npz") as file:
        assert sorted(file.files) == ["labels", "z"]
        z, labels = file["z"], file["labels"]
    assert (z.shape, z.dtype) == ((5, 32, 16, 16), np.float32)
    assert (labels.dtype, labels.tolist()) == (np.int64, [0, 1, 2, 0, 1])
    x = torch.cat(seen).numpy()
    assert [len(part) for part in seen] == [3, 2]
    assert np.allclose(z, x * given["std"][:, None, None] + given["mean"][:, None, None], atol=1e-5)


@pytest.mark.parametrize("words", re.findall(r"^sra-fast train .*$", PAGE, re.MULTILINE))
def test_the_page_s_training_is_a_command(made, main, words):
    words = words.partition("#")[0].split()[1:]
    code, output, error = main([*words, "--run.dry-run"])
    assert code == 0, error
    assert '"patch": 1' in output


def test_every_field_has_its_place_on_the_page(made):
    for cls in (Manifest, Shard, Skipped):
        for field in dataclasses.fields(cls):
            assert re.search(rf"^\|.*`{field.name}`", PAGE, re.MULTILINE), (cls.__name__, field.name)
    assert read_manifest(made).format_version == 1
    assert "| `format_version` | 1 |" in PAGE
