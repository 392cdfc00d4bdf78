"""Checkpoints: everything needed to go on exactly, written so that a crash at any moment leaves the previous one whole.

    runs/<name>/checkpoints/<images_seen:012d>/
        weights, ema, adam_m, adam_v .safetensors     fp32, under the public parameter names
        state.json                                    counters, the whole configuration, the data's fingerprint

Written to `<name>.tmp`, flushed to the disk, then renamed. Nothing here is a pickle.
"""

from __future__ import annotations

import dataclasses
import fcntl
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from sra_fast.config import Config, ModelConfig, ObjectiveConfig, from_dict, refuse_unless, to_dict
from sra_fast.errors import Refused
from sra_fast.files import read_json, replacing, sync, write_json
from sra_fast.model import public_weights
from sra_fast.model.layout import apart, joined
from sra_fast.step.state import HEAD, TrainState

FORMAT_VERSION = 1
LOCK = ".lock"
TENSORS = ("weights", "ema", "adam_m", "adam_v")
COUNTERS = ("adam_step", "skipped_steps", "skipped_in_a_row")

# What may differ when a run goes on: where and how it is computed and looked at, not the recipe. Some of these may
# change last bits, or pixels by a fraction of a grey level (data.reader).
FREE_ON_RESUME = {
    "run.name",
    "run.dir",
    "run.dry_run",
    "data.images",  # the fingerprint says whether it is the same data
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
class Progress:
    """What the host knows about a run."""

    images_seen: int = 0
    step: int = 0  # optimizer steps attempted, skipped ones included
    train_s: float = 0.0
    replaced_images: int = 0  # that stood in for undecodable ones
    data_fingerprint: str = ""
    undecodable_files: dict[str, str] = field(default_factory=dict)  # name -> reason


def save(folder: Path, state: TrainState, config: Config, progress: Progress) -> Path:
    """Write a checkpoint below `folder` and return its path.

    Raises:
        Refused: if it cannot be written; older checkpoints are untouched and nothing half-written remains.
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
            tensors = {key: value.contiguous() for key, value in apart(getattr(state, name)).items()}
            save_file(tensors, partial / f"{name}.safetensors", metadata)
        write_json(partial / "state.json", description)
        for path in partial.iterdir():
            path.chmod((partial / "state.json").stat().st_mode)  # safetensors keeps its files to their owner
            sync(path)
        sync(partial)
        if target.exists():  # the same moment, saved before; pruning removes it
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
    """Remove all but the newest `keep` checkpoints and those at multiples of `keep_every_images`, and what a crash
    left half-written."""
    for path in _complete(folder)[:-keep]:
        if not keep_every_images or int(path.name) % keep_every_images:
            shutil.rmtree(path)
    for path in folder.glob("*.tmp"):
        shutil.rmtree(path)


def describe(path: Path) -> tuple[dict[str, Any], Config]:
    """(state.json, the configuration in it) of a checkpoint."""
    refuse_unless((path / "state.json").is_file(), "checkpoint", str(path), "not a checkpoint: it has no state.json")
    state = read_json(path / "state.json")
    version = state.get("format_version") if isinstance(state, dict) else None
    refuse_unless(version == FORMAT_VERSION, f"{path}: format_version", version, f"must be {FORMAT_VERSION}")
    defaults = {**dataclasses.asdict(Progress()), **dict.fromkeys(COUNTERS, 0), "config": {}}
    for name, default in defaults.items():
        fits = type(state.get(name)) is type(default)
        refuse_unless(fits, f"{path}/state.json: {name}", state.get(name), f"must be of type {type(default).__name__}")
    return state, from_dict(Config, state["config"], str(path / "state.json"))


def load(path: Path, config: Config, fingerprint: str, device: torch.device) -> tuple[dict[str, Any], Progress]:
    """(tensors and counters for `TrainState.assemble`, progress) of a checkpoint that `config` may go on from.

    Raises:
        Refused: if it is damaged, belongs to another network or data set, or was trained with other settings.
    """
    state, saved = describe(path)
    for name, was, now in differences(to_dict(saved), to_dict(config)):
        if name not in FREE_ON_RESUME and not name.startswith(FREE_SECTIONS):
            field = name.replace("_", "-")
            raise Refused(
                f"{field}: {now!r} given, but {path} was trained with {was!r}; start another --run.name to change it"
            )
    if state["data_fingerprint"] != fingerprint:
        name, given = ("latents", config.data.latents) if config.data.latents else ("images", config.data.images)
        raise Refused(f"data.{name}: {given!r} holds other files or classes than {path} was trained on")
    expected = public_weights.shapes(config.model)
    moments = set(expected) - {"pos_embed"}
    if config.align.method == "none":
        moments = {name for name in moments if not name.startswith(HEAD)}
    loaded: dict[str, Any] = {}
    for name in TENSORS:
        file = path / f"{name}.safetensors"
        tensors, _ = public_weights.read_safetensors(file)
        wanted = {key: shape for key, shape in expected.items() if not name.startswith("adam") or key in moments}
        held = joined(_exactly(tensors, wanted, file))
        loaded[name] = {key: value.to(device) for key, value in held.items()}
    for name in COUNTERS:
        loaded[name] = torch.tensor(state[name], dtype=torch.int64, device=device)
    return loaded, Progress(**{field.name: state[field.name] for field in dataclasses.fields(Progress)})


def _exactly(tensors: dict[str, Tensor], wanted: dict[str, torch.Size], file: Path) -> dict[str, Tensor]:
    if set(tensors) != set(wanted):
        odd = min(set(tensors) ^ set(wanted))
        raise Refused(f"{file}: {odd} is {'missing' if odd in wanted else 'not a parameter of this network'}")
    for name, shape in wanted.items():
        if tensors[name].shape != shape:
            raise Refused(f"{file}: {name} has shape {tuple(tensors[name].shape)}; must be {tuple(shape)}")
        if tensors[name].dtype != torch.float32:
            raise Refused(f"{file}: {name} is {tensors[name].dtype}; must be torch.float32")
    return {name: tensors[name] for name in wanted}


def differences(old: dict[str, Any], new: dict[str, Any], where: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(dotted name, old, new) of every field that differs."""
    for name in sorted(old.keys() | new.keys()):
        before, after = old.get(name), new.get(name)
        if isinstance(before, dict) and isinstance(after, dict):
            yield from differences(before, after, f"{where}{name}.")
        elif before != after:
            yield f"{where}{name}", before, after


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a run directory; refuse if another process does. The operating system lets go when the process ends,
    however it ends. A directory made here in which nothing was written disappears again."""
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
        source: where to read.
        key: "ema", or "model" for the raw weights. A safetensors file has one set only.
    """
    if source.is_dir():
        source = locate(source) / ("ema.safetensors" if key == "ema" else "weights.safetensors")
    return public_weights.read(source, key)


def locate(source: Path) -> Path:
    """The checkpoint that a path names: itself, or the newest of a run."""
    found = source if (source / "state.json").is_file() else newest(source / "checkpoints")
    refuse_unless(found is not None, "weights", str(source), "must be a run that was saved, or a checkpoint")
    return found


def export(tensors: dict[str, Tensor], path: Path, model: ModelConfig, objective: ObjectiveConfig) -> None:
    """One set of weights as a safetensors file that `read_weights` and other tools read."""
    with replacing(path) as partial:
        save_file(tensors, partial, public_weights.metadata(model, objective))
