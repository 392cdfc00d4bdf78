"""Runs of a few seconds for tests: a small image folder, a small network, and ways to start, stop and read a run."""

from __future__ import annotations

import itertools
import json
import os
import pkgutil
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

from sra_fast.config import Config, from_dict, preset, to_dict
from sra_fast.step.runner import StepRunner
from sra_fast.training.trainer import Trainer

TENSORS = ("weights", "ema", "adam_m", "adam_v")
COUNTERS = ("images_seen", "step", "adam_step", "skipped_steps", "skipped_in_a_row", "data_fingerprint")

SMALL = {  # what differs from the digits preset
    "model.depth": 3,
    "model.hidden": 32,
    "model.heads": 2,
    "objective.times": "uniform",
    "optim.lr": 1e-3,
    "optim.warmup_images": 24,
    "data.reader": "pillow",
    "data.threads": 1,
    "train.images": 80,
    "train.batch": 8,
    "train.log_every_steps": 1,
    "train.validate_every_images": 0,
    "train.validation_images": 8,
    "train.preview_every_images": 0,
    "train.save_every_images": 1_000_000,
    "sample.sampler": "heun",
    "sample.steps": 2,
    "sample.count": 4,
    "evaluate.after_training": False,
}


def write_images(root: Path, count: int = 80, classes: int = 4) -> Path:
    """`count` different 8 x 8 grey PNGs in class folders c0, c1, ...; each class has a brightness of its own."""
    generator = np.random.default_rng(0)
    for index in range(count):
        label = index % classes
        path = root / f"c{label}" / f"{index:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((50 * label + generator.integers(0, 60, (8, 8))).astype(np.uint8)).save(path)
    return root


def _options(root: Path, changes: dict[str, object]) -> dict[str, object]:
    """SMALL below `root` (images in root/data, run root/runs/a), with some fields changed."""
    places = {"run.dir": str(root / "runs"), "run.name": "a", "data.images": str(root / "data")}
    return {**SMALL, **places, **{name.replace("__", "."): value for name, value in changes.items()}}


def small(root: Path, **changes: object) -> Config:
    """The digits preset, made small. `train__batch=4` sets train.batch."""
    values = to_dict(preset("digits"))
    for name, value in _options(root, changes).items():
        *section, last = name.split(".")
        (values[section[0]] if section else values)[last] = value
    return from_dict(Config, values, "small")


def arguments(root: Path, *extra: str, **changes: object) -> list[str]:
    """The same on the command line: train digits --model.depth 3 ..., then `extra`."""
    words = ["train", "digits"]
    for name, value in _options(root, changes).items():
        section, _, last = name.replace("_", "-").rpartition(".")
        prefix = f"--{section}." if section else "--"
        words += [f"{prefix}{'' if value else 'no-'}{last}"] if isinstance(value, bool) else [prefix + last, str(value)]
    return [*words, *extra]


def run(
    config: Config, stop_after: int = 0, report: Callable[[str], None] = lambda line: None
) -> tuple[int, list[dict[str, float]]]:
    """(exit code, metrics of each step) of a training; SIGTERM arrives during step `stop_after` of this process."""
    rows, original = [], StepRunner.__call__

    def step(self, *inputs):
        original(self, *inputs)
        rows.append(self.ring.last(1)[0]._asdict())
        if len(rows) == stop_after:
            signal.raise_signal(signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StepRunner, "__call__", step)
        return Trainer(config, report=report).run(), rows


def signal_at(number: int, function: str, call: int) -> None:
    """Send this process a signal at the `call`-th call of a function ("os.fsync")."""
    owner, name = function.rsplit(".", 1)
    owner = pkgutil.resolve_name(owner)
    original, count = getattr(owner, name), itertools.count(1)

    def counted(*arguments, **options):
        if next(count) == call:
            os.kill(os.getpid(), number)
        return original(*arguments, **options)

    setattr(owner, name, counted)


def process(root: Path, number: int, function: str, call: int, **changes: object) -> subprocess.CompletedProcess:
    """`sra-fast train` in a process of its own, which `signal_at` ends."""
    code = f"""
import sys
sys.path[:0] = {sys.path}
from small_run import signal_at
from sra_fast import cli
signal_at({int(number)}, {function!r}, {call})
sys.exit(cli.main({arguments(root, **changes)}))
"""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)


@contextmanager
def full_disk(file_size: int) -> Iterator[None]:
    """No file may grow beyond `file_size` bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def strict_json(text: str) -> object:
    """JSON by its standard, which knows no NaN and no Infinity."""

    def refuse(word):
        raise ValueError(f"{word} is not JSON")

    return json.loads(text, parse_constant=refuse)


def metrics(folder: Path) -> list[dict]:
    return [strict_json(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def without_speed(rows: list[dict]) -> list[dict]:
    """Rows of metrics without what depends on the machine."""
    return [{name: value for name, value in row.items() if name != "images_per_s"} for row in rows]


def summary(folder: Path) -> dict:
    return strict_json((folder / "summary.json").read_text())


def checkpoints(folder: Path) -> list[str]:
    """Names of everything in the run's folder of checkpoints."""
    return sorted(path.name for path in (folder / "checkpoints").glob("*"))


def content(folder: Path) -> dict[str, dict]:
    """Everything a checkpoint holds that decides how the run goes on: bytes of all tensors, and the counters."""
    state = json.loads((folder / "state.json").read_text())
    tensors = {file: load_file(folder / f"{file}.safetensors") for file in TENSORS}
    values = {file: {name: value.numpy().tobytes() for name, value in tensors[file].items()} for file in TENSORS}
    return values | {"counters": {name: state[name] for name in COUNTERS}}


def complaint(captured: tuple[str, str]) -> str:
    """The one line of `sra-fast:` on stderr, which is also its last, without a traceback before it."""
    error = captured[1]
    lines = error.replace("\r", "\n").splitlines()
    messages = [line for line in lines if line.startswith("sra-fast:")]
    assert messages == lines[-1:], error
    assert "Traceback" not in error
    return messages[0]
