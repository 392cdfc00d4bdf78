"""Checkpoints: everything needed to resume exactly. A crash at any moment leaves the previous checkpoint complete.

    runs/<name>/checkpoints/<images_seen:012d>/
        weights, ema, adam_m, adam_v .safetensors     fp32, under the public parameter names
        state.json                                    counters, the whole configuration, the data's fingerprint,
                                                      size and SHA-256 of the other files

Written to `<name>.tmp`, fsynced, then renamed. Nothing here is a pickle. What is read must have the sums that were
written, and counters that agree. Checkpoints of format 1 have no sums and are read for ever.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from sra_fast.config import Config, from_dict, to_dict
from sra_fast.distributed import ALONE, World
from sra_fast.errors import Damaged, Refused
from sra_fast.files import open_regular, read_json, sync, write_json
from sra_fast.model import public_weights
from sra_fast.model.layout import join, public_parts, to_public
from sra_fast.step.state import HEAD, TrainState

T = TypeVar("T")
FORMAT_VERSION = 2
FIRST_FORMAT = 1  # without sums
TENSORS = ("weights", "ema", "adam_m", "adam_v")
FILES = tuple(f"{name}.safetensors" for name in TENSORS)
COUNTERS = ("adam_step", "skipped_steps", "skipped_in_a_row")
MAX_IMAGES = 1 << 62  # image numbers from here on are those of held-out images

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
    "data.max_pixels",
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
    "train.validation_precision",
    "train.preview_every_images",
    "train.save_every_images",
    "train.save_every_minutes",
    "train.keep_checkpoints",
    "train.keep_every_images",
    "resume",
    "init_from",
    "weights_family",
    "deterministic",
    "optim.shard",
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


@dataclass(frozen=True)
class Snapshot:
    """The part of a checkpoint that this process writes: some of the files, and the content of state.json without their
    checksums. Later steps do not change it."""

    target: Path
    config: Config
    description: dict[str, Any]
    files: dict[str, dict[str, Tensor]]  # by name; on the CPU, under the public names


def snapshot(
    folder: Path, state: TrainState, config: Config, progress: RunProgress, world: World = ALONE, copy: bool = True
) -> Snapshot:
    """Collect what a checkpoint holds. A collective: the processes share the files.

    Args:
        copy: whether the state changes before the snapshot is written.
    """
    description = {"format_version": FORMAT_VERSION, **dataclasses.asdict(progress), "config": to_dict(config)}
    description |= {name: int(getattr(state, name)) for name in COUNTERS}
    files = {}
    for number, (name, file) in enumerate(zip(TENSORS, FILES, strict=True)):
        tensors = state.whole(name)
        if number % world.size == world.rank:
            files[file] = {key: _on_host(tensor, copy) for key, tensor in to_public(tensors).items()}
    if state.skipped_steps.is_cuda:
        torch.cuda.current_stream().synchronize()
    return Snapshot(folder / f"{progress.images_seen:012d}", config, description, files)


def _on_host(tensor: Tensor, copy: bool) -> Tensor:
    """The tensor in memory of the CPU; from a GPU, copied to pinned memory, which is not complete yet."""
    if tensor.is_cuda:
        return torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)
    return tensor.clone() if copy else tensor


def save(folder: Path, state: TrainState, config: Config, progress: RunProgress, world: World = ALONE) -> Path:
    """Write a checkpoint below `folder` and return its path. A collective; errors as in `write`."""
    return write(snapshot(folder, state, config, progress, world, copy=False), world)


def write(content: Snapshot, world: World = ALONE) -> Path:
    """Write a checkpoint and return its path. A collective: each process writes its files, then the first one the
    description, and renames the folder.

    Raises:
        Refused: if it cannot be written; older checkpoints are untouched and no partial file remains.
    """
    target = content.target
    partial = target.with_name(target.name + ".tmp")

    def begin() -> None:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)

    def write_own() -> dict[str, dict[str, Any]]:
        model, objective, sums = content.config.model, content.config.objective, {}
        for file, tensors in content.files.items():
            sha256 = public_weights.write_safetensors(partial / file, tensors, model, objective)
            sums[file] = {"bytes": (partial / file).stat().st_size, "sha256": sha256}
            sync(partial / file)
        return sums

    def end() -> None:
        every = {file: parts[file] for file in FILES for parts in sums if file in parts}
        write_json(partial / "state.json", {**content.description, "files": every})
        sync(partial)
        if target.exists():  # an earlier checkpoint of the same step, or what is left of one
            replaced = target.with_name(target.name + ".old.tmp")
            shutil.rmtree(replaced, ignore_errors=True)
            target.rename(replaced)
        partial.rename(target)
        sync(target.parent)

    try:
        world.first(_refusing(begin, target))
        sums = world.gather(world.together(_refusing(write_own, target)))
        world.first(_refusing(end, target))
    except Refused:
        if world.is_first:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    return target


def _refusing(function: Callable[[], T], target: Path) -> Callable[[], T]:
    """The function, with the error of a disk as a refusal to write this checkpoint."""

    def call() -> T:
        try:
            return function()
        except (OSError, Refused) as error:
            raise Refused(f"{target}: could not be written ({error}); earlier checkpoints are untouched") from error

    return call


def describe(path: Path) -> tuple[dict[str, Any], Config]:
    """(state.json, the configuration in it) of a checkpoint.

    Raises:
        Refused: if it is no checkpoint, or of a later format.
        Damaged: if its fields are not those of a checkpoint, or contradict each other or the folder's name.
    """
    file = path / "state.json"
    if not file.is_file():
        raise Refused("checkpoint", str(path), "not a checkpoint: it has no state.json")
    state = read_json(file)
    version = state.get("format_version") if isinstance(state, dict) else None
    if type(version) is not int or not FIRST_FORMAT <= version <= FORMAT_VERSION:
        rule = f"must be {FIRST_FORMAT} to {FORMAT_VERSION}; a later one needs a later version of this program"
        raise Refused(f"{path}: format_version", version, rule)
    defaults = {**dataclasses.asdict(RunProgress()), **dict.fromkeys(COUNTERS, 0), "config": {}}
    if version > FIRST_FORMAT:
        defaults["files"] = {}
    for name, default in defaults.items():
        if type(state.get(name)) is not type(default):
            rule = f"must be of type {type(default).__name__}"
            raise Refused(f"{file}: {name}", state.get(name), rule)
    config = from_dict(Config, state["config"], str(file))
    if contradiction := _contradiction(path, state, config.train.batch):
        raise Damaged(file, contradiction)
    return state, config


def _contradiction(path: Path, state: dict[str, Any], batch: int) -> str:
    """What cannot be true of a checkpoint's counters; '' if they agree."""
    images, step, skipped = state["images_seen"], state["step"], state["skipped_steps"]
    numbers = {name: state[name] for name in (*COUNTERS, "images_seen", "step", "replaced_images", "train_s")}
    for name, value in numbers.items():
        if not (math.isfinite(value) and 0 <= value < MAX_IMAGES):
            return f"{name} is {value}"
    if not all(isinstance(reason, str) for reason in state["undecodable_files"].values()):
        return "undecodable_files must have a reason for each file"
    if images != step * batch:
        return f"images_seen is {images}, but step is {step} and the batch {batch}"
    if state["adam_step"] + skipped != step:
        return f"step is {step}, but adam_step is {state['adam_step']} and skipped_steps {skipped}"
    if state["skipped_in_a_row"] > skipped:
        return f"skipped_in_a_row is {state['skipped_in_a_row']}, but skipped_steps {skipped}"
    if re.fullmatch("[0-9]{12}", path.name) and int(path.name) != images:
        return f"images_seen is {images}, but the folder is named {path.name}"
    return ""


def verify(path: Path, state: dict[str, Any], file: str) -> Path:
    """The path of a checkpoint's file, if it has the size and SHA-256 that state.json says. Format 1 says neither.

    The file is read once for this, and then again, from the page cache if it fits there.

    Raises:
        Damaged: if it differs.
    """
    if state["format_version"] > FIRST_FORMAT:
        expected, actual = state["files"].get(file), {}
        try:
            with os.fdopen(open_regular(path / file), "rb") as content:
                actual["bytes"] = os.fstat(content.fileno()).st_size
                if isinstance(expected, dict) and actual["bytes"] == expected.get("bytes"):
                    actual["sha256"] = hashlib.file_digest(content, "sha256").hexdigest()
        except OSError as error:
            raise Damaged(path / file, error.strerror or error) from error
        if actual != expected:
            raise Damaged(path / file, "not the file that was saved: state.json has another size or SHA-256")
    return path / file


def load(path: Path, config: Config, fingerprint: str, device: torch.device) -> tuple[dict[str, Any], RunProgress]:
    """(tensors and counters for `TrainState.load`, progress) of a checkpoint that `config` may resume from. A tensor is
    read when it is used, so that a process which needs a share of each never has all of them.

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
    for name, file_name in zip(TENSORS, FILES, strict=True):
        file = verify(path, state, file_name)
        shapes = {key: shape for key, shape in expected.items() if not name.startswith("adam") or key in moments}
        loaded[name] = StoredTensors(file, shapes, device)
    for name in COUNTERS:
        loaded[name] = torch.tensor(state[name], dtype=torch.int64, device=device)
    return loaded, RunProgress(**{field.name: state[field.name] for field in dataclasses.fields(RunProgress)})


class StoredTensors(Mapping[str, Tensor]):
    """The tensors of a file, under the names in memory, each read anew whenever it is used.

    Args:
        file: a safetensors file.
        shapes: public names and shapes of the tensors that it must have, float32 all of them.
        device: where they are wanted.

    Raises:
        Damaged: if it has others.
    """

    def __init__(self, file: Path, shapes: Mapping[str, torch.Size], device: torch.device) -> None:
        self._device, self._parts = device, public_parts(shapes)
        self._content = public_weights.open_safetensors(file)
        names = set(self._content.keys())
        if names != set(shapes):
            name = min(names ^ set(shapes))
            raise Damaged(file, f"{name} is {'missing' if name in shapes else 'not a parameter of this network'}")
        for name, shape in shapes.items():
            stored = self._content.get_slice(name)
            if tuple(stored.get_shape()) != tuple(shape):
                raise Damaged(file, f"{name} has shape {tuple(stored.get_shape())}; must be {tuple(shape)}")
            if stored.get_dtype() != "F32":
                raise Damaged(file, f"{name} is of type {stored.get_dtype()}; must be F32")

    def __getitem__(self, name: str) -> Tensor:
        return join([self._content.get_tensor(part) for part in self._parts[name]]).to(self._device)

    def __contains__(self, name: object) -> bool:
        return name in self._parts  # without reading it

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(dotted name, old, new) of every field that differs."""
    for name in sorted(old.keys() | new.keys()):
        before, after = old.get(name), new.get(name)
        if isinstance(before, dict) and isinstance(after, dict):
            yield from differences(before, after, f"{prefix}{name}.")
        elif before != after:
            yield f"{prefix}{name}", before, after
