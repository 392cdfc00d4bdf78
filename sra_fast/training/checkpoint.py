"""Checkpoints: everything needed to resume exactly. A crash at any moment leaves the previous checkpoint complete.

    runs/<name>/checkpoints/<images_seen:012d>/
        weights, ema, adam_m, adam_v .safetensors     fp32, under the public parameter names
        state.json                                    counters, the whole configuration, the data's fingerprint

Written to `<name>.tmp`, fsynced, then renamed. Nothing here is a pickle.
"""

from __future__ import annotations

import dataclasses
import fcntl
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from sra_fast.config import Config, ModelConfig, ObjectiveConfig, from_dict, to_dict
from sra_fast.errors import Damaged, Refused
from sra_fast.files import read_json, replacing, sync, write_json
from sra_fast.model import public_weights
from sra_fast.model.layout import from_public, to_public
from sra_fast.step.state import HEAD, TrainState
from sra_fast.training.rhythm import Every

FORMAT_VERSION = 1
LOCK = ".lock"
TENSORS = ("weights", "ema", "adam_m", "adam_v")
COUNTERS = ("adam_step", "skipped_steps", "skipped_in_a_row")

# What may change when a run resumes: where and how it is computed and observed, not the recipe. Some of these may
# change last bits, or pixels by a fraction of a grey level (data.reader).
FREE_ON_RESUME = {
    "run.name",
    "run.dir",
    "run.dry_run",
    "data.images",  # the fingerprint tells whether it is the same data
    "data.latents",
    "data.vae",
    "data.reader",
    "data.threads",
    "data.strict",
    "data.max_bad_share",
    "model.attention",
    "model.checkpoint_every",
    "train.images",
    "train.device",
    "train.execution",
    "train.log_every_steps",
    "train.validate_every_images",
    "train.validation_images",
    "train.preview_every_images",
    "train.save_every_images",
    "train.save_every_minutes",
    "train.keep_checkpoints",
    "train.keep_every_images",
    "resume",
    "init_from",
    "deterministic",
}
FREE_SECTIONS = ("kernels", "sample", "evaluate")


@dataclass(frozen=True)
class RunProgress:
    """How far a run has come."""

    images_seen: int = 0
    step: int = 0  # optimizer steps attempted, skipped ones included
    train_s: float = 0.0
    replaced_images: int = 0  # images that replaced undecodable ones
    data_fingerprint: str = ""
    undecodable_files: dict[str, str] = field(default_factory=dict)  # name -> reason


class Saver:
    """Writes checkpoints when `train.save_*` asks for one, and removes old ones.

    Args:
        folder: of the checkpoints.
        config: of the run.
        progress: at the start; it is not saved again.
    """

    def __init__(self, folder: Path, config: Config, progress: RunProgress) -> None:
        self._folder, self._config = folder, config
        self._every = Every(config.train.save_every_images, config.train.batch)
        self._saved_step, self._last_save = progress.step, time.monotonic()

    def due(self, progress: RunProgress) -> bool:
        minutes = (time.monotonic() - self._last_save) / 60
        return self._every.due(progress.images_seen) or minutes > self._config.train.save_every_minutes

    def save(self, state: TrainState, progress: RunProgress) -> None:
        """Write a checkpoint, unless this step has been saved already."""
        if progress.step == self._saved_step:
            return
        save(self._folder, state, self._config, progress)
        prune(self._folder, self._config.train.keep_checkpoints, self._config.train.keep_every_images)
        self._saved_step, self._last_save = progress.step, time.monotonic()


def save(folder: Path, state: TrainState, config: Config, progress: RunProgress) -> Path:
    """Write a checkpoint below `folder` and return its path.

    Raises:
        Refused: if it cannot be written; older checkpoints are untouched and no partial file remains.
    """
    target = folder / f"{progress.images_seen:012d}"
    partial = target.with_name(target.name + ".tmp")
    description = {"format_version": FORMAT_VERSION, **dataclasses.asdict(progress), "config": to_dict(config)}
    description |= {name: int(getattr(state, name)) for name in COUNTERS}
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        metadata = public_weights.metadata(config.model, config.objective)
        for name in TENSORS:
            tensors = {key: value.contiguous() for key, value in to_public(getattr(state, name)).items()}
            save_file(tensors, partial / f"{name}.safetensors", metadata)
        write_json(partial / "state.json", description)
        for path in partial.iterdir():
            path.chmod((partial / "state.json").stat().st_mode)  # safetensors makes its files private
            sync(path)
        sync(partial)
        if target.exists():  # an earlier checkpoint of the same step; `prune` removes it
            target.rename(target.with_name(target.name + ".old.tmp"))
        partial.rename(target)
        sync(folder)
    except (OSError, SafetensorError, Refused) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise Refused(f"{target}: could not be written ({error}); earlier checkpoints are untouched") from error
    return target


def newest(folder: Path) -> Path | None:
    """The checkpoint with the most images below `folder`, if any."""
    complete = _complete(folder)
    return complete[-1] if complete else None


def _complete(folder: Path) -> list[Path]:
    return sorted(folder.glob("[0-9]" * 12))


def prune(folder: Path, keep: int, keep_every_images: int) -> None:
    """Remove all but the newest `keep` checkpoints and those at multiples of `keep_every_images`, and what a crash left
    unfinished."""
    for path in _complete(folder)[:-keep]:
        if not keep_every_images or int(path.name) % keep_every_images:
            shutil.rmtree(path)
    for path in folder.glob("*.tmp"):
        shutil.rmtree(path)


def describe(path: Path) -> tuple[dict[str, Any], Config]:
    """(state.json, the configuration in it) of a checkpoint."""
    if not (path / "state.json").is_file():
        raise Refused("checkpoint", str(path), "not a checkpoint: it has no state.json")
    state = read_json(path / "state.json")
    version = state.get("format_version") if isinstance(state, dict) else None
    if version != FORMAT_VERSION:
        raise Refused(f"{path}: format_version", version, f"must be {FORMAT_VERSION}")
    defaults = {**dataclasses.asdict(RunProgress()), **dict.fromkeys(COUNTERS, 0), "config": {}}
    for name, default in defaults.items():
        if type(state.get(name)) is not type(default):
            rule = f"must be of type {type(default).__name__}"
            raise Refused(f"{path}/state.json: {name}", state.get(name), rule)
    return state, from_dict(Config, state["config"], str(path / "state.json"))


def load(path: Path, config: Config, fingerprint: str, device: torch.device) -> tuple[dict[str, Any], RunProgress]:
    """(tensors and counters for `TrainState.load`, progress) of a checkpoint that `config` may resume from.

    Raises:
        Refused: if it is damaged, belongs to another network or data set, or was trained with other settings.
    """
    state, saved = describe(path)
    for name, before, now in differences(to_dict(saved), to_dict(config)):
        if name not in FREE_ON_RESUME and not name.startswith(FREE_SECTIONS):
            rule = f"but {path} was trained with {before!r}; start another --run.name to change it"
            raise Refused(f"{name.replace('_', '-')}: {now!r} given, {rule}")
    if state["data_fingerprint"] != fingerprint:
        name = "latents" if config.data.latents else "images"
        source = getattr(config.data, name)
        raise Refused(f"data.{name}: {source!r} has other files or classes than {path} was trained on")
    expected = public_weights.shapes(config.model)
    moments = set(expected) - {"pos_embed"}
    if config.align.method == "none":
        moments = {name for name in moments if not name.startswith(HEAD)}
    loaded: dict[str, Any] = {}
    for name in TENSORS:
        file = path / f"{name}.safetensors"
        tensors, _ = public_weights.read_safetensors(file)
        shapes = {key: shape for key, shape in expected.items() if not name.startswith("adam") or key in moments}
        internal = from_public(_exactly(tensors, shapes, file))
        loaded[name] = {key: value.to(device) for key, value in internal.items()}
    for name in COUNTERS:
        loaded[name] = torch.tensor(state[name], dtype=torch.int64, device=device)
    return loaded, RunProgress(**{field.name: state[field.name] for field in dataclasses.fields(RunProgress)})


def _exactly(tensors: dict[str, Tensor], shapes: dict[str, torch.Size], file: Path) -> dict[str, Tensor]:
    """The tensors in the order of `shapes`, if they are float32 and have these names and shapes."""
    if set(tensors) != set(shapes):
        name = min(set(tensors) ^ set(shapes))
        raise Damaged(file, f"{name} is {'missing' if name in shapes else 'not a parameter of this network'}")
    for name, shape in shapes.items():
        if tensors[name].shape != shape:
            raise Damaged(file, f"{name} has shape {tuple(tensors[name].shape)}; must be {tuple(shape)}")
        if tensors[name].dtype != torch.float32:
            raise Damaged(file, f"{name} is {tensors[name].dtype}; must be torch.float32")
    return {name: tensors[name] for name in shapes}


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(dotted name, old, new) of every field that differs."""
    for name in sorted(old.keys() | new.keys()):
        before, after = old.get(name), new.get(name)
        if isinstance(before, dict) and isinstance(after, dict):
            yield from differences(before, after, f"{prefix}{name}.")
        elif before != after:
            yield f"{prefix}{name}", before, after


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock a run directory; refuse if another process has locked it. The lock ends with the process, however it ends. A
    new directory in which nothing was written is removed again."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / LOCK).open("w")
    except OSError as error:
        raise Refused(f"run.dir: {folder} cannot be written ({error.strerror})") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise Refused(f"run.name: {folder} is in use by another process; choose another --run.name") from error
        try:
            yield
        finally:
            if [path.name for path in folder.iterdir()] == [LOCK]:
                shutil.rmtree(folder)


def read_weights(source: Path, key: str) -> public_weights.Weights:
    """Weights of a run, of one of its checkpoints, of a safetensors file or of a public .pt file.

    Args:
        source: the run, checkpoint or file.
        key: "ema", or "model" for the raw weights. A safetensors file has only one set.
    """
    if source.is_dir():
        source = locate(source) / ("ema.safetensors" if key == "ema" else "weights.safetensors")
    return public_weights.read(source, key)


def locate(source: Path) -> Path:
    """The checkpoint that a path names: itself, or the newest of a run."""
    if (source / "state.json").is_file():
        return source
    checkpoint = newest(source / "checkpoints")
    if checkpoint is None:
        raise Refused("weights", str(source), "must be a run that was saved, or a checkpoint")
    return checkpoint


def export(tensors: dict[str, Tensor], path: Path, model: ModelConfig, objective: ObjectiveConfig) -> None:
    """One set of weights as a safetensors file that `read_weights` and other tools read."""
    with replacing(path) as partial:
        save_file(tensors, partial, public_weights.metadata(model, objective))
