"""Runs of several processes: resumed on another number of them, stopped, refused and killed."""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from small_cluster import KILLED, on_ranks
from small_run import small, write_images

from sra_fast import cli
from sra_fast.config import Config
from sra_fast.data.image_stream import ImageStream
from sra_fast.distributed import World
from sra_fast.errors import Refused
from sra_fast.model import public_weights
from sra_fast.step.runner import StepRunner
from sra_fast.training import checkpoint, run_folder, trainer
from sra_fast.training.trainer import Trainer

BATCH, STEPS, STOP = 12, 6, 3
SIZES = (1, 2, 3, 4)
ROOT = "SRA_FAST_CLUSTER_TEST"
CHANGING = ("images_per_s", "images_of_ranks", "save_stall_s")


def config(name: str, **changes: Any) -> Config:
    ordered = {"train__batch": BATCH, "train__micro_batch": 1, "train__reduction": "ordered"}
    images = {"train__images": BATCH * STEPS, "train__validate_every_images": 3 * BATCH, "train__validation_images": 24}
    return small(Path(os.environ[ROOT]), run__name=name, **{**ordered, **images, **changes})


def train(world: World, name: str, stop: int = 0, **changes: Any) -> int:
    """The exit code of a run; SIGTERM arrives at the last process during step `stop`."""
    original, calls = StepRunner.__call__, []

    def step(self, *inputs) -> None:
        original(self, *inputs)
        calls.append(inputs)
        if len(calls) == stop and world.rank == world.size - 1:
            signal.raise_signal(signal.SIGTERM)

    StepRunner.__call__ = step
    try:
        return Trainer(config(name, **changes), lambda line: None, world).run()
    finally:
        StepRunner.__call__ = original


def whole(world: World) -> list[int]:
    """One run to its end, one that is stopped; sums in a fixed order, and fast."""
    codes = [train(world, f"whole{world.size}"), train(world, f"half{world.size}", STOP)]
    fast = {"train__micro_batch": 0, "train__reduction": "fast"}
    return [*codes, train(world, f"fast{world.size}", **fast)]


def resumed(world: World) -> list[int]:
    """The stopped runs of all sizes, to their end on this one."""
    root = Path(os.environ[ROOT]) / "runs"
    for size in SIZES:
        if world.is_first:
            shutil.copytree(root / f"half{size}", root / f"from{size}to{world.size}")
        world.barrier()
    return [train(world, f"from{size}to{world.size}") for size in SIZES]


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """The folder of all runs, after they have ended."""
    root = tmp_path_factory.mktemp("cluster")
    write_images(root / "data")
    os.environ[ROOT] = str(root)
    try:
        codes = on_ranks(__file__, "whole", SIZES)
        assert all(rank == [0, 128 + signal.SIGTERM, 0] for ranks in codes for rank in ranks)
        codes = on_ranks(__file__, "resumed", (1, 3, 4))
        assert all(rank == [0] * len(SIZES) for ranks in codes for rank in ranks)
        yield root
    finally:
        del os.environ[ROOT]


def files(run: Path) -> dict[str, str]:
    """SHA-256 of the last checkpoint's tensors."""
    folder = sorted((run / "checkpoints").iterdir())[-1]
    assert folder.name == f"{BATCH * STEPS:012d}"
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob("*.safetensors"))}


def rows(run: Path) -> list[dict[str, Any]]:
    """Metrics without what depends on time and on the number of processes."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in CHANGING} for row in lines]


@pytest.mark.parametrize("size", SIZES[1:])
def test_any_number_of_processes_trains_the_same_weights(root, size: int) -> None:
    assert files(root / f"runs/whole{size}") == files(root / "runs/whole1")
    assert rows(root / f"runs/whole{size}") == rows(root / "runs/whole1")


@pytest.mark.parametrize("after", [1, 3, 4])
@pytest.mark.parametrize("before", SIZES)
def test_a_run_goes_on_with_another_number_of_processes(root, before: int, after: int) -> None:
    assert files(root / f"runs/from{before}to{after}") == files(root / "runs/whole1")
    assert rows(root / f"runs/from{before}to{after}") == rows(root / "runs/whole1")


def test_every_process_logs_its_images_and_together_they_are_the_batch(root) -> None:
    for size in SIZES[1:]:
        for line in (root / f"runs/whole{size}/metrics.jsonl").read_text().splitlines():
            assert json.loads(line)["images_of_ranks"] == [BATCH // size] * size


def test_a_fast_run_stays_near(root) -> None:
    for size in SIZES[1:]:
        for row, alone in zip(rows(root / f"runs/fast{size}"), rows(root / "runs/fast1"), strict=True):
            assert row == pytest.approx(alone, rel=1e-3)


def sampled(world: World) -> None:
    """Seven images, three at a time."""
    run, out = Path(os.environ[ROOT]) / "runs/whole1", Path(os.environ[ROOT]) / f"samples{world.size}"
    words = ["--weights", str(run), "--out", str(out), "--sample.count", "7", "--sample.batch", "3"]
    assert cli.main(["sample", *words]) == 0


def test_samples_are_the_same_files_on_any_number_of_processes(root) -> None:
    on_ranks(__file__, "sampled", (1, 2, 4))

    def content(size: int) -> dict[str, bytes]:
        folder = root / f"samples{size}"
        return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    assert len(content(1)) == 10  # seven images, the grid, the npz and what they were made of
    assert content(2) == content(4) == content(1)


def compiled(world: World) -> int:
    return train(world, f"compiled{world.size}", train__execution="compiled")


@pytest.mark.slow
def test_compiled_steps_too(root) -> None:
    assert on_ranks(__file__, "compiled", (1, 2)) == [[0], [0, 0]]
    assert files(root / "runs/compiled2") == files(root / "runs/compiled1")


# Faults


def ended(world: World, name: str, **changes: Any) -> str:
    """How a run ends on this process: its exit code, or why it is refused."""
    try:
        return str(train(world, name, **changes))
    except Refused as error:
        return f"{type(error).__name__}: {error}"


def refusals(world: World) -> dict[str, str]:
    """{what is wrong: how the run ends}."""
    ends = {
        "batch": ended(world, "batch", train__batch=14),
        "deterministic": ended(world, "fast", train__micro_batch=0, train__reduction="fast", deterministic=True),
    }
    with pytest.MonkeyPatch.context() as patch:
        if world.rank == 2:
            patch.setattr(trainer, "open_source", refused)
        ends["one rank"] = ended(world, "one")
    with pytest.MonkeyPatch.context() as patch:
        if world.rank == 1:  # reads the whole batch
            begin = ImageStream.__init__
            patch.setattr(ImageStream, "__init__", lambda *a, **k: begin(*a, **{**k, "batch": BATCH}))
        ends["whole batch"] = ended(world, "all")
    with pytest.MonkeyPatch.context() as patch:
        if world.is_first:
            patch.setattr(public_weights, "write_safetensors", full)
        ends["full disk"] = ended(world, "full", train__save_every_images=3 * BATCH)
    with pytest.MonkeyPatch.context() as patch:
        if world.rank == 1:
            patch.setattr(public_weights, "write_safetensors", full)
        ends["another full disk"] = ended(world, "other", train__save_every_images=3 * BATCH)
    return ends


def refused(*_: object) -> None:
    raise Refused("the disk of this machine is missing")


def full(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    write_images(tmp_path / "data")
    monkeypatch.setenv(ROOT, str(tmp_path))
    return tmp_path


def test_what_one_process_refuses_all_refuse_and_one_says_why(place) -> None:
    (ends,) = on_ranks(__file__, "refusals", (3,))
    said = {
        "batch": (0, "train.batch: 14 given; its 14 micro-batches must be a multiple of the 3 processes"),
        "deterministic": (0, "deterministic: True given; needs --train.reduction ordered"),
        "one rank": (2, "the disk of this machine is missing"),
        "whole batch": (0, "1 steps have 12 images, but the processes have computed [4, 12, 4]"),
        "full disk": (0, "No space left on device"),
        "another full disk": (1, "No space left on device"),
    }
    for what, (speaker, line) in said.items():
        for rank, end in enumerate(ends):
            assert line in end[what] if rank == speaker else end[what] == f"ElsewhereRefused: refused by rank {speaker}"
    assert not (place / "runs/one").exists()
    for name in ("full", "other"):
        assert not list((place / f"runs/{name}/checkpoints").iterdir())


def killed(world: World) -> str:
    """A run of which a process is killed while its second checkpoint is written."""
    victim, saves, write, sync = int(os.environ["VICTIM"]), itertools.count(1), checkpoint.write, checkpoint.sync

    def kill(*arguments: Any) -> Any:
        if next(saves) == (2 if victim else 6):  # the first of three processes syncs two files and two folders
            os.kill(os.getpid(), signal.SIGKILL)
        return (write if victim else sync)(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        if world.rank == victim:
            patch.setattr(checkpoint, "write" if victim else "sync", kill)
        return ended(world, "killed", train__save_every_images=2 * BATCH)


@pytest.mark.parametrize("victim", [0, 2])
def test_a_process_killed_during_a_save_leaves_the_earlier_checkpoint(place, monkeypatch, victim: int) -> None:
    monkeypatch.setenv("VICTIM", str(victim))
    (ends,) = on_ranks(__file__, "killed", (3,))
    assert ends.pop(victim) == KILLED
    assert all("another process has ended" in end for end in ends)
    folder = place / "runs/killed/checkpoints"
    names = [path.name for path in run_folder.complete(folder)]
    assert names[0] == f"{2 * BATCH:012d}"
    assert on_ranks(__file__, "goes_on", (2,)) == [[0, 0]]
    assert files(place / "runs/killed")


def goes_on(world: World) -> int:
    return train(world, "killed", train__save_every_images=2 * BATCH)
