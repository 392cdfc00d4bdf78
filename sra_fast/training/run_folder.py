"""The folder of a run: its lock, and which checkpoints it has, keeps and loses.

    runs/<name>/.lock
    runs/<name>/checkpoints/<images_seen:012d>/

A checkpoint is renamed to `<name>.tmp` before it is removed, so that every folder of twelve digits is complete.
"""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from sra_fast.config import Config
from sra_fast.distributed import World
from sra_fast.errors import Refused
from sra_fast.files import lock_file
from sra_fast.model import public_weights
from sra_fast.progress import warn
from sra_fast.step.state import TrainState
from sra_fast.training import checkpoint
from sra_fast.training.checkpoint import RunProgress
from sra_fast.training.rhythm import Every

LOCK = ".lock"
CHECKPOINT = re.compile("[0-9]{12}")
UNFINISHED = re.compile(r"[0-9]{12}(\.old)?\.tmp")  # being written, or being removed


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock a run's folder; the lock ends with the process, however it ends. Folders that are created for it, and in
    which nothing else was written, are removed again.

    Raises:
        Refused: if another process has locked it, or it cannot be written.
    """
    created = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        lock = _lock(folder / LOCK)
    except BlockingIOError as error:
        raise Refused(f"run.name: {folder} is in use by another process; choose another --run.name") from error
    except OSError as error:
        raise Refused(f"run.dir: {folder} cannot be written ({error.strerror})") from error
    try:
        yield
    finally:
        if created and os.listdir(folder) == [LOCK]:
            (folder / LOCK).unlink()
            with suppress(OSError):  # another process has begun to use it
                for path in created:
                    path.rmdir()
        os.close(lock)


def _lock(path: Path) -> int:
    """`lock_file` in a folder that another process may be removing."""
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):
            return lock_file(path)


class Saver:
    """Writes checkpoints when `train.save_*` asks for one, and removes old ones.

    On GPUs and on several processes training waits only until the state has been copied, and a thread writes it, one
    checkpoint at a time. On a CPU alone, where the thread would take its cores, training waits for all of it.

    Args:
        folder: of the checkpoints.
        config: of the run.
        progress: at the start; it is not saved again.
        world: the processes of the run.
        device: of the state.
    """

    def __init__(self, folder: Path, config: Config, progress: RunProgress, world: World, device: torch.device) -> None:
        self._folder, self._config, self._world = folder, config, world
        self._every = Every(config.train.save_every_images, config.train.batch)
        self._saved_step, self._last_save = progress.step, time.monotonic()
        self._thread = ThreadPoolExecutor(1, "save") if device.type == "cuda" or world.size > 1 else None
        self._pending: Future[None] | None = None
        self._stalls: list[float] = []

    def due(self, progress: RunProgress) -> bool:
        minutes = (time.monotonic() - self._last_save) / 60
        return self._every.due(progress.images_seen) or minutes > self._config.train.save_every_minutes

    def save(self, state: TrainState, progress: RunProgress) -> None:
        """Write a checkpoint, or begin to, unless this step has been saved already. A collective.

        Raises:
            Refused: if this checkpoint, or the one before, cannot be written.
        """
        if progress.step == self._saved_step:
            return
        self.finish()
        start = time.monotonic()
        is_copied = self._thread is not None
        content = checkpoint.snapshot(self._folder, state, self._config, progress, self._world, is_copied)
        if self._thread is None:
            self._write(content)
        else:
            self._pending = self._thread.submit(self._write, content)
            self._stalls.append(time.monotonic() - start)
        self._saved_step, self._last_save = progress.step, time.monotonic()

    def _write(self, content: checkpoint.Snapshot) -> None:
        checkpoint.write(content, self._world.saving)
        if self._world.is_first:
            prune(self._folder, self._config.train.keep_checkpoints, self._config.train.keep_every_images)

    @property
    def has_failed(self) -> bool:
        """Whether the checkpoint in progress could not be written; `finish` says why."""
        return self._pending is not None and self._pending.done() and self._pending.exception() is not None

    def finish(self) -> None:
        """Wait until the checkpoint in progress is written.

        Raises:
            Refused: if it cannot be.
        """
        pending, self._pending = self._pending, None
        if pending:
            pending.result()

    def close(self) -> None:
        """Wait for the thread, whatever becomes of its checkpoint."""
        if self._thread:
            self._thread.shutdown()

    def stalls(self) -> dict[str, float]:
        """{"save_stall_s": how long training has waited for copies since the last call}; empty if it has not."""
        stalls, self._stalls = self._stalls, []
        return {"save_stall_s": sum(stalls)} if stalls else {}


def _named(folder: Path) -> list[Path]:
    """What has the name of a checkpoint below `folder`, the oldest first.

    Raises:
        Refused: if the folder cannot be listed, which is not the same as an empty one.
    """
    try:
        names = os.listdir(folder) if folder.exists() else []
    except OSError as error:
        raise Refused(f"{folder}: cannot be listed ({error.strerror})") from error
    return [folder / name for name in sorted(names) if CHECKPOINT.fullmatch(name)]


def complete(folder: Path) -> list[Path]:
    """The complete checkpoints below `folder`, the oldest first."""
    return [path for path in _named(folder) if (path / "state.json").is_file()]


def newest(folder: Path) -> Path | None:
    """The complete checkpoint with the most images below `folder`, if any. Says on stderr what it passes over.

    Raises:
        Refused: if there are checkpoints, and none is complete.
    """
    checkpoints = complete(folder)
    last = checkpoints[-1] if checkpoints else None
    for path in _named(folder):
        if last is None:
            raise Refused(f"{path}: not a complete checkpoint (it has no state.json), and there is no other")
        if path > last:
            warn(f"{path}: not a complete checkpoint (it has no state.json); passed over")
    return last


def prune(folder: Path, keep: int, keep_every_images: int) -> None:
    """Remove all but the newest `keep` checkpoints and those at multiples of `keep_every_images`, and what a crash left
    unfinished. What cannot be removed is named on stderr, and stays."""
    for path in complete(folder)[:-keep]:
        if not keep_every_images or int(path.name) % keep_every_images:
            with _named_errors():
                path.rename(path.with_name(path.name + ".old.tmp"))
    for path in folder.iterdir():
        if UNFINISHED.fullmatch(path.name):
            with _named_errors():
                shutil.rmtree(path)


@contextmanager
def _named_errors() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        warn(f"{error.filename}: could not be removed ({error.strerror}); training goes on")


def locate(source: Path) -> Path:
    """The checkpoint that a path names: itself, or the newest of a run."""
    if (source / "state.json").is_file():
        return source
    path = newest(source / "checkpoints")
    if path is None:
        raise Refused("weights", str(source), "must be a run that was saved, or a checkpoint")
    return path


def read_weights(source: Path, key: str, family: str = "auto") -> public_weights.Weights:
    """Weights of a run, of one of its checkpoints, of a safetensors file or of a public .pt file.

    Args:
        source: the run, checkpoint or file.
        key: "ema", or "model" for the raw weights. A safetensors file has only one set.
        family: of a file that does not say, see `public_weights.read`.
    """
    if source.is_dir():
        path = locate(source)
        state, _ = checkpoint.describe(path)
        source = checkpoint.verify(path, state, "ema.safetensors" if key == "ema" else "weights.safetensors")
    return public_weights.read(source, key, family)
