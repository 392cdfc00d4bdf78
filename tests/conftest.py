"""A network small enough for a test, and weights under which it does something."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from small_faults import Server
from small_run import complaint, run, small, write_images
from torch import Tensor

from sra_fast import cli
from sra_fast.config import AlignConfig, Config, DataConfig, ModelConfig, TrainConfig
from sra_fast.model.initial import initial_weights

torch.set_num_threads(1)  # tensors here are too small to share between threads


@pytest.fixture(scope="session")
def tiny() -> Callable[..., Config]:
    """Digits-like: 8 x 8 x 1, 4 classes, 4 blocks of width 32, taps 1 -> 3. Named arguments change the model."""

    def make(method: str = "sra", batch: int = 8, accumulate: int = 1, **model: object) -> Config:
        sizes = {"depth": 4, "hidden": 32, "heads": 2, "patch": 2, "input_size": 8, "channels": 1, "classes": 4} | model
        return Config(
            model=ModelConfig(**sizes),
            align=AlignConfig(method=method),
            data=DataConfig(resolution=sizes["input_size"]),
            train=TrainConfig(images=800, batch=batch, accumulate=accumulate),
        )

    return make


@pytest.fixture(scope="session")
def awake() -> Callable[..., dict[str, Tensor]]:
    """Initial weights plus noise everywhere, because a fresh network is the identity and predicts zero."""

    def make(model: ModelConfig, seed: int = 0, std: float = 0.2) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        weights = initial_weights(model, seed, torch.device("cpu"))
        for name, value in weights.items():
            if name != "pos_embed":
                value += std * torch.randn(value.shape, generator=generator)
        return weights

    return make


@pytest.fixture(scope="session")
def template(tmp_path_factory) -> Path:
    """A folder with images in data/ and the run runs/a, stopped after five steps. Only to be copied."""
    root = tmp_path_factory.mktemp("template")
    write_images(root / "data")
    assert run(small(root), stop_after=5)[0] == 143
    return root


@pytest.fixture
def stopped(template, tmp_path) -> Path:
    """A copy of it."""
    return shutil.copytree(template, tmp_path / "copy")


@pytest.fixture
def root(tmp_path):
    write_images(tmp_path / "data")
    return tmp_path


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


@pytest.fixture(scope="session")
def server(tmp_path_factory) -> Iterator[Server]:
    """Runs commands in which calls fail."""
    server = Server(tmp_path_factory.mktemp("server"))
    yield server
    server.close()


@pytest.fixture(scope="session")
def kl(tmp_path_factory):
    """Folder of a small random AutoencoderKL; skips where diffusers is missing."""
    from small_data import save_kl

    return save_kl(tmp_path_factory.mktemp("kl"))


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """44 JPEGs in class folders, of which four cannot be decoded."""
    from small_data import BAD, write_jpegs

    return write_jpegs(tmp_path_factory.mktemp("images"), extra=BAD)
