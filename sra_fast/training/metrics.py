"""The metrics of a run: averages of the device's metrics, written to metrics.jsonl and TensorBoard.

No log is worth a run: what cannot be written is reported once, and training goes on.
"""

from __future__ import annotations

import errno
import json
import math
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from sra_fast.config import Config
from sra_fast.distributed import ALONE, World
from sra_fast.errors import Refused
from sra_fast.files import open_regular, replacing, sync, to_json
from sra_fast.progress import warn
from sra_fast.step.ring import MetricRing
from sra_fast.step.state import MAX_SKIPPED_IN_A_ROW, TrainState
from sra_fast.step.step import Metrics
from sra_fast.training.checkpoint import RunProgress
from sra_fast.training.rhythm import Clock

LONGEST_LINE = 1 << 20  # bytes
AVERAGED = ("loss", "velocity_loss", "alignment_loss", "grad_norm")


class StepLog:
    """Writes a line for every `train.log_every_steps` steps, and one at every validation and checkpoint. Only then does
    the host wait for the device.

    Args:
        file: where lines go.
        config: of the run.
        state: whose skipped steps are reported.
        clock: gives the images per second.
        world: the processes of the run; the first one has the file.
    """

    def __init__(
        self, file: MetricsFile | None, config: Config, state: TrainState, clock: Clock, world: World = ALONE
    ) -> None:
        self.ring = MetricRing(config.train.log_every_steps, state.skipped_steps.device)
        """Where steps put their metrics."""
        self.last_row: dict[str, Any] = {}
        """The line written last."""
        self._file, self._state, self._clock = file, state, clock
        self._every_steps, self._batch = config.train.log_every_steps, config.train.batch
        self._pending_steps, self._pending_images, self._world = 0, 0, world

    def add_step(self, images: int) -> None:
        """Count a step of this many images on this process, whose metrics are in the ring."""
        self._pending_steps += 1
        self._pending_images += images

    def due(self, progress: RunProgress) -> bool:
        """Whether a line is to be written after this step."""
        return progress.step % self._every_steps == 0

    def write(self, progress: RunProgress, **more: float) -> None:
        """Write a line about the steps since the last one, if there are any. A collective.

        Raises:
            Refused: if the last `MAX_SKIPPED_IN_A_ROW` steps were not finite, or the processes have not computed each
                image once.
        """
        if not self._pending_steps:
            return
        images = self._world.gather(self._pending_images)
        self._pending_images = 0
        self._world.together(partial(self._check_images, images, self._pending_steps))
        images_per_s = self._pending_steps * self._batch / self._clock.lap_s()
        metrics = self.ring.last(self._pending_steps)
        self._pending_steps = 0
        self.last_row = {
            "step": progress.step,
            "images_seen": progress.images_seen,
            **_averages(metrics),
            "lr": metrics[-1].lr,
            "ema_decay": metrics[-1].ema_decay,
            "images_per_s": images_per_s,
            "skipped_steps": int(self._state.skipped_steps),
            **({"images_of_ranks": images} if self._world.size > 1 else {}),
            **more,
        }
        if self._file:
            self._file.write(self.last_row)
        self._world.together(self._check_norms)

    def _check_images(self, images: list[int], steps: int) -> None:
        """Refuse to go on if the processes have not computed each image of these steps once."""
        if sum(images) != steps * self._batch:
            expected = f"{steps} steps have {steps * self._batch} images"
            raise Refused(f"training: {expected}, but the processes have computed {images}")

    def _check_norms(self) -> None:
        skipped = int(self._state.skipped_in_a_row)
        if skipped >= MAX_SKIPPED_IN_A_ROW:
            raise Refused(f"training: {skipped} steps in a row had a non-finite gradient norm; the run has diverged")


def _averages(metrics: list[Metrics]) -> dict[str, float]:
    """Losses and gradient norm, averaged over the finite steps."""
    finite = [row for row in metrics if math.isfinite(row.grad_norm)]
    if not finite:
        return dict.fromkeys(AVERAGED, math.nan)
    return {name: sum(getattr(row, name) for row in finite) / len(finite) for name in AVERAGED}


class MetricsFile:
    """Appends to `metrics.jsonl`, one object a line, and to TensorBoard if it is installed.

    Lines beyond `images_seen`, from a run that was killed after its last checkpoint, are dropped.

    Args:
        folder: the run directory.
        images_seen: where the run starts or resumes.
    """

    def __init__(self, folder: Path, images_seen: int) -> None:
        path = folder / "metrics.jsonl"
        with replacing(path) as temporary:
            with temporary.open("wb") as file:
                file.writelines(_kept(path, images_seen))
            sync(temporary)
        self._file = path.open("ab", buffering=0)
        self._begin_line = False  # whether the last line was written in part
        self._board = _tensorboard(folder, images_seen)
        self._reported: set[str] = set()

    def write(self, row: dict[str, Any]) -> None:
        """Append a line."""
        line = to_json(row).encode()
        with self._going_on(self._file.name):
            written = self._file.write(b"\n" * self._begin_line + line)
            self._begin_line = written < self._begin_line + len(line)
            if self._begin_line:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if self._board:
            with self._going_on("TensorBoard"):
                for name, value in row.items():
                    if isinstance(value, int | float) and math.isfinite(value):
                        self._board.add_scalar(name, value, row["images_seen"])

    def close(self) -> None:
        with self._going_on(self._file.name):
            self._file.close()
        if self._board:
            with self._going_on("TensorBoard"):
                self._board.close()

    @contextmanager
    def _going_on(self, what: str) -> Iterator[None]:
        """Report an error of `what` once, and go on without that line."""
        try:
            yield
        except Exception as error:  # of any kind: TensorBoard repeats here what failed in its thread
            if what not in self._reported:
                reason = getattr(error, "strerror", None) or error
                warn(f"{what}: a line could not be written ({reason}); training goes on")
            self._reported.add(what)


def _kept(path: Path, images_seen: int) -> Iterator[bytes]:
    """Lines of a metrics file up to a number of images. Lines that are no rows, such as a kill or a full disk leaves,
    are left out and counted on stderr."""
    if not path.exists():
        return
    damaged, is_whole = 0, True
    with os.fdopen(open_regular(path), "rb") as file:
        while line := file.readline(LONGEST_LINE):
            row = _row(line) if is_whole else None
            if row and row["images_seen"] <= images_seen:
                yield line.strip() + b"\n"
            damaged += is_whole and not row and bool(line.strip())
            is_whole = line.endswith(b"\n")
    if damaged:
        warn(f"{path}: {damaged} damaged {'line' if damaged == 1 else 'lines'} left out")


def _row(line: bytes) -> dict[str, Any] | None:
    """The row in a line; None if there is none."""

    def refuse(word: str) -> None:
        raise ValueError(f"{word} is not JSON")

    try:
        row = json.loads(line, parse_constant=refuse)
    except (ValueError, RecursionError):  # not JSON, or not UTF-8
        return None
    return row if isinstance(row, dict) and type(row.get("images_seen")) is int else None


def _tensorboard(folder: Path, images_seen: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        warn("TensorBoard is not installed: metrics go to metrics.jsonl only (pip install tensorboard)")
        return None
    usual = threading.excepthook
    # Its writing thread ends with the error that the next `add_scalar` raises, and would print a traceback of it.
    threading.excepthook = lambda args: None if _is_tensorboards(args.thread) else usual(args)
    try:
        return SummaryWriter(str(folder), purge_step=images_seen + 1)
    except OSError as error:
        reason = error.strerror or error
        warn(f"TensorBoard: {folder} could not be written ({reason}); training goes on without it")
        return None


def _is_tensorboards(thread: threading.Thread | None) -> bool:
    return type(thread).__module__.startswith("tensorboard.")
