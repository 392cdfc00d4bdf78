"""docs/packed-sets.md: its example makes a set to inspect, train on and sample from; its tables are complete."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from small_run import run, small

from sra_fast.data.manifest import Manifest, Shard, Skipped, read_manifest
from sra_fast.data.source import open_source
from sra_fast.kernels.perturb import clean_ref

PAGE = (Path(__file__).parents[1] / "docs/packed-sets.md").read_text()
COUNT = 24


@pytest.fixture
def arrays():
    """The arrays that the page asks the reader for."""
    generator = np.random.default_rng(0)
    mean = generator.standard_normal(32).astype(np.float32)
    std = generator.uniform(0.5, 4, 32).astype(np.float32)
    noise = generator.standard_normal((COUNT, 32, 16, 16)).astype(np.float32)
    latents = mean[:, None, None] + std[:, None, None] * noise
    return {"latents": latents, "labels": np.arange(COUNT) % 3, "mean": mean, "std": std}


@pytest.fixture
def packed(tmp_path, monkeypatch, arrays):
    """The set that the page's example makes of them."""
    monkeypatch.chdir(tmp_path)
    (example,) = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    exec(compile(example, "docs/packed-sets.md", "exec"), dict(arrays))
    return tmp_path / "vavae"


def config(root, packed):
    """The page's run, but small, with a held-out share that leaves some rows on both sides."""
    sizes = {"model__patch": 4, "train__batch": 4, "train__images": 8, "optim__warmup_images": 0}
    return small(root, data__images="", data__latents=str(packed), data__held_out=0.3, **sizes)


def test_the_example_writes_a_set_that_inspect_accepts(packed, arrays, main):
    assert sorted(path.name for path in packed.iterdir()) == ["labels-00000.npy", "manifest.json", "moments-00000.npy"]
    manifest = read_manifest(packed)
    assert (manifest.shape, manifest.dtype, manifest.posterior) == ((32, 16, 16), "float16", False)
    assert np.array_equal(np.load(packed / "moments-00000.npy"), arrays["latents"].astype(np.float16))
    code, _, error = main(["inspect", packed, "--images", "0"])
    assert code == 0, error
    assert "warning" not in error


def test_training_normalises_by_the_statistics(packed, arrays, tmp_path):
    source, _ = open_source(config(tmp_path, packed), torch.device("cpu"))
    rows, labels = source.load(source.train)
    x = clean_ref(rows, torch.arange(len(rows)), 0, source.stored)
    mean, std = arrays["mean"][:, None, None], arrays["std"][:, None, None]
    expected = (arrays["latents"][source.train.index] - mean) / std
    assert np.allclose(x.numpy(), expected, atol=0.02)  # rows are float16
    assert np.array_equal(labels.numpy(), arrays["labels"][source.train.index])


def test_the_run_is_sampled_as_latents_without_data_or_vae(packed, arrays, tmp_path, main, monkeypatch):
    monkeypatch.setattr("sra_fast.sampling.decoding.open_vae", lambda *_: pytest.fail("a VAE was opened"))
    assert run(config(tmp_path, packed))[0] == 0
    packed.rename(tmp_path / "moved")
    options = ["--sample.count", "5", "--sample.batch", "3", "--out", tmp_path / "generated"]
    code, _, error = main(["sample", "--weights", tmp_path / "runs/a", "--latents", *options])
    assert code == 0, error
    with np.load(tmp_path / "generated/latents.npz") as file:
        assert sorted(file.files) == ["labels", "z"]
        z, labels = file["z"], file["labels"]
    assert (z.shape, z.dtype) == ((5, 32, 16, 16), np.float32)
    assert (labels.dtype, labels.tolist()) == (np.int64, [0, 1, 2, 0, 1])
    # A network that has hardly learned anything returns the noise it began with. Bounds: five standard errors.
    x = (z - arrays["mean"][:, None, None]) / arrays["std"][:, None, None]
    assert np.allclose(x.mean((0, 2, 3)), 0, atol=0.14)
    assert np.allclose(x.std((0, 2, 3)), 1, atol=0.1)


@pytest.mark.parametrize("command", re.findall(r"^sra-fast train [^#\n]*", PAGE, re.MULTILINE))
def test_the_training_command_of_the_page_runs(packed, main, command):
    code, output, error = main([*command.split()[1:], "--run.dry-run"])
    assert code == 0, error
    assert '"patch": 1' in output


def test_the_tables_have_every_field():
    for cls in (Manifest, Shard, Skipped):
        for field in dataclasses.fields(cls):
            assert re.search(rf"^\|.*`{field.name}`", PAGE, re.MULTILINE), (cls.__name__, field.name)
