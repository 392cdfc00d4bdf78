"""What a checkpoint is made of, that a crash or a full disk spares the one before, and that damage is refused."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_run import TENSORS, arguments, checkpoints, complaint, content, process, run, small, write_images

from sra_fast import cli
from sra_fast.config import ModelConfig
from sra_fast.errors import Refused
from sra_fast.model.public_weights import shapes
from sra_fast.model.backends import REFERENCE
from sra_fast.step.state import TrainState
from sra_fast.training import checkpoint
from sra_fast.training.checkpoint import RunProgress
from sra_fast.training.metrics import MetricsFile

CPU = torch.device("cpu")
FILES = sorted([*(f"{name}.safetensors" for name in TENSORS), "state.json"])
FIRST = "000000000040"  # where the fixture stops


@pytest.fixture
def saved(stopped):
    return stopped / "runs/a/checkpoints" / FIRST


@pytest.fixture
def refused(capfd):
    """The one line with which the command line refuses."""

    def call(words):
        capfd.readouterr()
        assert cli.main(words) == 1
        return complaint(capfd.readouterr())

    return call


def test_layout(saved):
    assert sorted(path.name for path in saved.iterdir()) == FILES
    state = json.loads((saved / "state.json").read_text())
    assert (state["images_seen"], state["step"], state["adam_step"], state["format_version"]) == (40, 5, 5, 1)
    model = state["config"]["model"]
    assert (model["input_size"], model["channels"], model["classes"]) == (8, 1, 4)  # as the data says
    expected = shapes(ModelConfig(**model))
    for name in TENSORS:
        tensors = load_file(saved / f"{name}.safetensors")
        assert {value.dtype for value in tensors.values()} == {torch.float32}
        wanted = set(expected) - ({"pos_embed"} if name.startswith("adam") else set())
        assert {key: value.shape for key, value in tensors.items()} == {key: expected[key] for key in wanted}
    public = ["x_embedder.proj.weight", "blocks.2.attn.qkv.weight", "blocks.0.adaLN_modulation.1.bias", "pos_embed"]
    assert set(public) < set(load_file(saved / "ema.safetensors"))


def test_without_alignment_the_head_has_no_moments(tmp_path):
    write_images(tmp_path / "data")
    run(small(tmp_path, align__method="none"), stop_after=1)
    folder = tmp_path / "runs/a/checkpoints/000000000008"
    heads = {name: [key for key in load_file(folder / f"{name}.safetensors") if "ap_head" in key] for name in TENSORS}
    assert heads["weights"]
    assert heads["ema"]
    assert heads["adam_m"] == heads["adam_v"] == []


@pytest.fixture
def full_state(tiny):
    """(config, state) with random bits everywhere, subnormal numbers and negative zeros among them."""
    config = tiny()
    state = TrainState.create(config, REFERENCE, CPU, torch.float32)
    generator = torch.Generator().manual_seed(0)
    for name in TENSORS:
        for value in getattr(state, name).values():
            bits = torch.randint(-(2**31), 2**31, value.shape, generator=generator).int()
            value.copy_(bits.view(torch.float32).nan_to_num(0.0))
            value.view(-1)[0] = -0.0
    for name, value in zip(checkpoint.COUNTERS, (2**40, 3, 2), strict=True):
        getattr(state, name).fill_(value)
    return config, state


def test_a_round_trip_keeps_every_bit(full_state, tmp_path):
    config, state = full_state
    progress = RunProgress(images_seen=2**45, step=2**37, train_s=0.1 + 0.2, data_fingerprint="abc")
    path = checkpoint.save(tmp_path / "checkpoints", state, config, progress)
    assert path.name == f"{2**45:012d}"
    loaded, again = checkpoint.load(path, config, "abc", CPU)
    assert again == progress
    for name in TENSORS:
        for key, value in getattr(state, name).items():
            assert torch.equal(loaded[name][key].view(torch.int32), value.view(torch.int32)), f"{name}: {key}"
    assert [int(loaded[name]) for name in checkpoint.COUNTERS] == [2**40, 3, 2]


def test_everything_is_on_the_disk_before_the_name_appears(full_state, tmp_path, monkeypatch):
    flushed, real = [], os.fsync

    def fsync(descriptor):
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        flushed.append((path.name, (tmp_path / "checkpoints" / f"{8:012d}").exists()))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    config, state = full_state
    checkpoint.save(tmp_path / "checkpoints", state, config, RunProgress(images_seen=8))
    before = {name for name, visible in flushed if not visible}
    assert before >= {*FILES, f"{8:012d}.tmp"}
    assert ("checkpoints", True) in flushed  # the new name itself


# Pruning


@pytest.mark.parametrize(
    ("keep", "every", "left"),
    [
        (1, 0, [10]),
        (3, 0, [8, 9, 10]),
        (99, 0, range(1, 11)),
        (2, 4, [4, 8, 9, 10]),
        (1, 10, [10]),
        (1, 3, [3, 6, 9, 10]),
    ],
)
def test_the_newest_and_the_multiples_are_kept(tmp_path, keep, every, left):
    for number in range(1, 11):
        (tmp_path / f"{number:012d}").mkdir()
        (tmp_path / f"{number:012d}" / "state.json").write_text("{}")
    (tmp_path / f"{11:012d}.tmp").mkdir()
    checkpoint.prune(tmp_path, keep, every)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{number:012d}" for number in left]


def test_a_run_prunes_as_it_goes(tmp_path):
    write_images(tmp_path / "data")
    run(small(tmp_path, train__save_every_images=8, train__keep_checkpoints=2, train__keep_every_images=32))
    assert [int(name) for name in checkpoints(tmp_path / "runs/a")] == [32, 64, 72, 80]


# A full disk


def limit_file_size():
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))


def test_a_file_that_cannot_be_written_whole_spares_the_checkpoint_before(stopped, saved):
    before = content(saved)
    child = process(arguments(stopped), preexec_fn=limit_file_size)
    captured = child.communicate(timeout=120)
    assert child.returncode == 1
    assert "could not be written" in complaint(captured)
    assert checkpoints(stopped / "runs/a") == [FIRST]
    assert content(saved) == before


@pytest.mark.parametrize("call", range(8))
def test_a_full_disk_at_any_flush_spares_the_checkpoint_before(stopped, saved, refused, monkeypatch, call):
    before, calls, real = content(saved), [], os.fsync

    def fsync(descriptor):
        if "checkpoints" in os.readlink(f"/proc/self/fd/{descriptor}"):
            calls.append(descriptor)
            if len(calls) == call + 1:
                raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    line = refused(arguments(stopped))
    assert "No space left on device" in line
    assert f"{80:012d}" in line
    left = checkpoints(stopped / "runs/a")
    assert left == [FIRST] if call < 6 else left[0] == FIRST  # the last flush comes after the renaming
    assert content(saved) == before
    monkeypatch.undo()
    assert run(small(stopped))[0] == 0


def test_a_disk_that_is_full_from_the_start_is_one_line(tmp_path):
    write_images(tmp_path / "data")
    child = process(arguments(tmp_path), preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (300, 300)))
    captured = child.communicate(timeout=120)
    assert child.returncode == 1
    assert "config.json" in complaint(captured)
    assert not (tmp_path / "runs/a/config.json").exists()


def test_a_disk_that_fills_with_metrics_is_one_line(stopped, refused, saved, monkeypatch):
    before = content(saved)

    def write(self, row):
        raise OSError(errno.ENOSPC, "No space left on device", str(stopped / "runs/a/metrics.jsonl"))

    monkeypatch.setattr(MetricsFile, "write", write)
    line = refused(arguments(stopped))
    assert "metrics.jsonl" in line
    assert "No space left" in line
    assert content(saved) == before


# Damage


def test_a_truncated_file_is_refused(saved, stopped, refused):
    for name in TENSORS:
        path = saved / f"{name}.safetensors"
        whole = path.read_bytes()
        for size in (0, 5, 200, len(whole) // 2, len(whole) - 1):
            path.write_bytes(whole[:size])
            assert str(path) in refused(arguments(stopped))
        path.write_bytes(whole)
    assert checkpoints(stopped / "runs/a") == [FIRST]


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_refused(saved, stopped, refused, name):
    (saved / name).unlink()
    assert str(saved) in refused(arguments(stopped))


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", "7", "{}", '{"format_version": 1}', '{"format_version": 1, "config": 3}']
)
def test_a_state_file_of_something_else_is_refused(saved, stopped, refused, text):
    (saved / "state.json").write_text(text)
    assert str(saved) in refused(arguments(stopped))


def test_a_state_file_without_one_of_its_fields_is_refused(saved, stopped, refused):
    state = json.loads((saved / "state.json").read_text())
    for name in state:
        less = {key: value for key, value in state.items() if key != name}
        for changed in (less, {**state, name: ["odd"]}):
            (saved / "state.json").write_text(json.dumps(changed))
            assert str(saved) in refused(arguments(stopped)), name


def test_a_flipped_bit_is_refused_or_harmless(saved, stopped):
    """Of state.json and of the tensors' headers: never an exception that is not `Refused`."""
    config, fingerprint = (
        checkpoint.describe(saved)[1],
        json.loads((saved / "state.json").read_text())["data_fingerprint"],
    )
    generator = random.Random(0)
    for name in ("state.json", "weights.safetensors"):
        path = saved / name
        whole = path.read_bytes()
        size = len(whole) if name == "state.json" else 8 + int.from_bytes(whole[:8], "little")
        for _ in range(150):
            flipped = bytearray(whole)
            flipped[generator.randrange(size)] ^= 1 << generator.randrange(8)
            path.write_bytes(flipped)
            with contextlib.suppress(Refused):
                checkpoint.load(saved, config, fingerprint, CPU)
        path.write_bytes(whole)


@pytest.mark.parametrize("damage", ["other shape", "other names", "half precision"])
def test_tensors_that_do_not_fit_are_refused(saved, stopped, refused, damage):
    path = saved / "adam_m.safetensors"
    tensors = load_file(path)
    name = "blocks.1.mlp.fc1.weight"
    if damage == "other shape":
        tensors[name] = torch.zeros(5, 7)
    elif damage == "other names":
        tensors[name + "_v"] = tensors.pop(name)
    else:
        tensors = {key: value.half() for key, value in tensors.items()}
    save_file(tensors, path)
    assert str(path) in refused(arguments(stopped))


def test_a_later_format_is_refused(saved, stopped, refused):
    state = json.loads((saved / "state.json").read_text())
    (saved / "state.json").write_text(json.dumps({**state, "format_version": 2}))
    assert "format_version: 2 given; must be 1" in refused(arguments(stopped))


def test_a_foreign_folder_is_refused(stopped, refused):
    foreign = stopped / "foreign"
    foreign.mkdir()
    (foreign / "pytorch_model.bin").write_bytes(b"x")
    line = refused(arguments(stopped, run__name="b", resume=str(foreign)))
    assert str(foreign) in line
    assert not (stopped / "runs/b").exists()


def test_a_checkpoint_of_another_family_is_refused(stopped, refused):
    path = stopped / "runs/a/checkpoints" / FIRST
    line = refused(arguments(stopped, run__name="b", resume=str(path), model__family="dit", sample__sampler="auto"))
    assert "model.family: 'dit' given" in line
    assert not (stopped / "runs/b").exists()


# The lock

HOLD = (
    "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.flock(f, fcntl.LOCK_EX); print('held', flush=True); input()"
)


def test_a_run_in_use_by_another_process_is_refused(stopped, refused):
    lock = stopped / "runs/a/.lock"
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, lock], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout.readline() == "held\n"
        line = refused(arguments(stopped))
        child.communicate("done\n")
    assert "in use by another process" in line
    assert checkpoints(stopped / "runs/a") == [FIRST]
    assert run(small(stopped))[0] == 0  # the other process has ended


def test_a_folder_that_cannot_be_written_is_refused(stopped, refused):
    (stopped / "file").write_text("")
    line = refused(arguments(stopped, run__dir=str(stopped / "file")))
    assert str(stopped / "file") in line


def test_the_newest_complete_checkpoint_is_found(saved):
    shutil.copytree(saved, saved.with_name(f"{48:012d}"))
    shutil.copytree(saved, saved.with_name(f"{56:012d}.tmp"))
    assert checkpoint.newest(saved.parent).name == f"{48:012d}"
    assert checkpoint.newest(saved / "nothing") is None


def test_a_state_file_that_cannot_be_written_leaves_nothing(stopped, saved, monkeypatch):
    before = content(saved)

    def full(path, value):
        raise Refused(f"{path}: could not be written (No space left on device)")

    monkeypatch.setattr(checkpoint, "write_json", full)
    _, config = checkpoint.describe(saved)
    state = checkpoint.load(saved, config, checkpoint.describe(saved)[0]["data_fingerprint"], torch.device("cpu"))[0]
    state = TrainState.assemble(config, REFERENCE, torch.float32, **state)
    with pytest.raises(Refused, match="earlier checkpoints are untouched"):
        checkpoint.save(saved.parent, state, config, RunProgress(images_seen=48))
    assert content(saved) == before
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]
