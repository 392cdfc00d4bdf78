"""What a checkpoint is made of, that a full disk spares the one before, and that damage is refused."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_run import TENSORS, arguments, checkpoints, complaint, content, full_disk, run, small

from sra_fast.config import ModelConfig
from sra_fast.errors import Damaged, Refused
from sra_fast.model.backends import REFERENCE
from sra_fast.model.public_weights import shapes
from sra_fast.step.state import TrainState
from sra_fast.training import checkpoint
from sra_fast.training.checkpoint import RunProgress

CPU = torch.device("cpu")
FILES = sorted([*(f"{name}.safetensors" for name in TENSORS), "state.json"])
FIRST = "000000000040"  # where the fixture `stopped` stops


@pytest.fixture
def saved(stopped):
    return stopped / "runs/a/checkpoints" / FIRST


def test_layout(saved):
    assert sorted(path.name for path in saved.iterdir()) == FILES
    state = json.loads((saved / "state.json").read_text())
    assert (state["images_seen"], state["step"], state["adam_step"], state["format_version"]) == (40, 5, 5, 2)
    model = state["config"]["model"]
    assert (model["input_size"], model["channels"], model["classes"]) == (8, 1, 4)  # as the data says
    expected = shapes(ModelConfig(**model))
    for name in TENSORS:
        tensors = load_file(saved / f"{name}.safetensors")
        assert {value.dtype for value in tensors.values()} == {torch.float32}
        names = set(expected) - ({"pos_embed"} if name.startswith("adam") else set())
        assert {key: value.shape for key, value in tensors.items()} == {key: expected[key] for key in names}
    public = ["x_embedder.proj.weight", "blocks.2.attn.qkv.weight", "blocks.0.adaLN_modulation.1.bias", "pos_embed"]
    assert set(public) < set(load_file(saved / "ema.safetensors"))


def test_without_alignment_the_head_has_no_moments(root):
    run(small(root, align__method="none"), stop_after=1)
    folder = root / "runs/a/checkpoints/000000000008"
    with_head = [name for name in TENSORS if any("ap_head" in key for key in load_file(folder / f"{name}.safetensors"))]
    assert with_head == ["weights", "ema"]


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
    for name, value in zip(checkpoint.COUNTERS, (2**40 - 3, 3, 2), strict=True):
        getattr(state, name).fill_(value)
    return config, state


def test_a_round_trip_keeps_every_bit(full_state, tmp_path):
    config, state = full_state
    progress = RunProgress(images_seen=2**43, step=2**40, train_s=0.1 + 0.2, data_fingerprint="abc")
    path = checkpoint.save(tmp_path / "checkpoints", state, config, progress)
    assert path.name == f"{2**43:012d}"
    loaded, loaded_progress = checkpoint.load(path, config, "abc", CPU)
    assert loaded_progress == progress
    for name in TENSORS:
        for key, value in getattr(state, name).items():
            assert torch.equal(loaded[name][key].view(torch.int32), value.view(torch.int32)), f"{name}: {key}"
    assert [int(loaded[name]) for name in checkpoint.COUNTERS] == [2**40 - 3, 3, 2]


def test_everything_is_on_the_disk_before_the_name_appears(full_state, tmp_path, monkeypatch):
    flushed, real = [], os.fsync

    def fsync(descriptor):
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        flushed.append((path.name.removesuffix(".tmp"), (tmp_path / "checkpoints" / f"{8:012d}").exists()))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    config, state = full_state
    checkpoint.save(tmp_path / "checkpoints", state, config, RunProgress(images_seen=8))
    before = {name for name, is_visible in flushed if not is_visible}
    assert before >= {*FILES, f"{8:012d}"}
    assert ("checkpoints", True) in flushed  # the new name itself


def test_a_run_prunes_as_it_goes(root):
    run(small(root, train__save_every_images=8, train__keep_checkpoints=2, train__keep_every_images=32))
    assert [int(name) for name in checkpoints(root / "runs/a")] == [32, 64, 72, 80]


# A full disk


@pytest.mark.parametrize("call", range(7))
def test_a_full_disk_at_any_flush_spares_the_checkpoint_before(stopped, saved, main, monkeypatch, call):
    before, calls, real = content(saved), [], os.fsync

    def fsync(descriptor):
        if "checkpoints" in os.readlink(f"/proc/self/fd/{descriptor}"):
            calls.append(descriptor)
            if len(calls) == call + 1:
                raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    line = complaint(main(arguments(stopped))[1:])
    assert "No space left on device" in line
    assert f"{80:012d}" in line
    left = checkpoints(stopped / "runs/a")
    assert left == [FIRST] if call < 6 else left[0] == FIRST  # the last flush comes after the renaming
    assert content(saved) == before
    monkeypatch.undo()
    assert run(small(stopped))[0] == 0


def test_a_tensor_file_that_cannot_be_written_spares_the_checkpoint_before(stopped, saved, main):
    before = content(saved)
    with full_disk(100_000):
        code, *output = main(arguments(stopped))
    assert code == 1
    assert "could not be written" in complaint(output)
    assert checkpoints(stopped / "runs/a") == [FIRST]
    assert content(saved) == before


# Damage


def edit(path, change):
    """Rewrite state.json or a file of tensors."""
    if path.suffix == ".json":
        path.write_text(json.dumps(change(json.loads(path.read_text()))))
    else:
        save_file(change(load_file(path)), path)


MATRIX = "blocks.1.mlp.fc1.weight"
DAMAGES = {
    "other shape": ("adam_m.safetensors", lambda path: edit(path, lambda t: t | {MATRIX: torch.zeros(5, 7)})),
    "other names": ("ema.safetensors", lambda path: edit(path, lambda t: t | {"other": t.pop(MATRIX)})),
    "half precision": ("weights.safetensors", lambda path: edit(path, lambda t: {k: v.half() for k, v in t.items()})),
    "later format": ("state.json", lambda path: edit(path, lambda state: state | {"format_version": 3})),
    "version true": ("state.json", lambda path: edit(path, lambda state: state | {"format_version": True})),
    "no object": ("state.json", lambda path: path.write_text("[]")),
    **{f"no {name}": (name, Path.unlink) for name in FILES},
    **{f"half of {name}": (name, lambda path: os.truncate(path, 200)) for name in FILES},
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_refused_by_name(saved, stopped, refused, damage):
    name, spoil = DAMAGES[damage]
    spoil(saved / name)
    assert str(saved) in refused(arguments(stopped))
    assert checkpoints(stopped / "runs/a") == [FIRST]


def flip(path: Path, offset: int) -> None:
    """Flip the lowest bit of a byte."""
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def exchange(folder: Path) -> None:
    first, second = (folder / f"adam_{name}.safetensors" for name in "mv")
    first.rename(folder / "x")
    second.rename(first)
    (folder / "x").rename(second)


@pytest.fixture(scope="module")
def older(template, tmp_path_factory):
    """A checkpoint of the same run after four steps."""
    folder = tmp_path_factory.mktemp("older")
    config = small(template, run__dir=str(folder))
    assert run(config, stop_after=4)[0] == 143
    return folder / "a/checkpoints/000000000032"


CHANGES = {
    **{f"a bit of {name}": lambda saved, older, name=name: flip(saved / name, -5) for name in FILES[:4]},
    "a page of zeros": lambda saved, older: (saved / "ema.safetensors").open("r+b").write(bytes(4096)),
    "two files exchanged": lambda saved, older: exchange(saved),
    "a file of an older checkpoint": lambda saved, older: shutil.copy(older / "adam_v.safetensors", saved),
    "the state of an older checkpoint": lambda saved, older: shutil.copy(older / "state.json", saved),
    "an older checkpoint under this name": lambda saved, older: shutil.copytree(older, saved, dirs_exist_ok=True),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_was_not_saved_is_not_loaded(saved, older, stopped, refused, change):
    CHANGES[change](saved, older)
    assert str(saved) in refused(arguments(stopped))
    assert checkpoints(stopped / "runs/a") == [FIRST]


@pytest.mark.parametrize("key", ["ema", "model"])
def test_damaged_weights_are_neither_sampled_nor_exported(saved, stopped, refused, tmp_path, key):
    flip(saved / ("ema.safetensors" if key == "ema" else "weights.safetensors"), -5)
    out = tmp_path / "x.safetensors"
    for command in ("sample", "export"):
        line = refused([command, "--weights", stopped / "runs/a", "--weights-key", key, "--out", out])
        assert "state.json has another size or SHA-256" in line
    assert not out.exists()


COUNTERS = {
    "images_seen": 48, "step": 6, "adam_step": 4, "skipped_steps": 1, "skipped_in_a_row": 1, "replaced_images": -1,
    "train_s": float("nan"),
}  # fmt: skip


@pytest.mark.parametrize("name", COUNTERS)
def test_counters_that_contradict_each_other_are_refused(saved, name):
    edit(saved / "state.json", lambda state: state | {name: COUNTERS[name]})
    with pytest.raises(Refused, match=f"{saved}.*{name}"):
        checkpoint.describe(saved)


def test_a_renamed_checkpoint_is_refused_and_a_copy_under_a_name_of_its_own_is_not(saved):
    assert checkpoint.describe(saved.rename(saved.with_name("best")))[0]["images_seen"] == 40
    renamed = saved.with_name("best").rename(saved.with_name(f"{48:012d}"))
    with pytest.raises(Refused, match="the folder is named 000000000048"):
        checkpoint.describe(renamed)


def test_the_line_about_a_damaged_checkpoint_says_how_to_go_on_from_the_one_before(root, refused):
    run(small(root, train__save_every_images=8), stop_after=5)
    newest, before = (root / "runs/a/checkpoints" / f"{images:012d}" for images in (40, 32))
    flip(newest / "adam_m.safetensors", -5)
    assert refused(arguments(root)).endswith(f"to go on from {before}, remove {newest}")
    shutil.rmtree(newest)
    assert run(small(root))[0] == 0


def test_a_state_file_without_one_of_its_fields_is_refused(saved):
    state = json.loads((saved / "state.json").read_text())
    for name in state:
        without = {key: value for key, value in state.items() if key != name}
        for changed in (without, {**state, name: ["odd"]}):
            (saved / "state.json").write_text(json.dumps(changed))
            with pytest.raises(Refused, match=str(saved)):
                checkpoint.describe(saved)


def test_a_flipped_bit_is_refused_or_harmless(saved):
    """Of state.json and of the tensors' headers: never an exception that is not `Refused`."""
    state, config = checkpoint.describe(saved)
    generator = random.Random(0)
    for name in ("state.json", "weights.safetensors"):
        path = saved / name
        original = path.read_bytes()
        size = len(original) if name == "state.json" else 8 + int.from_bytes(original[:8], "little")
        for _ in range(150):
            flipped = bytearray(original)
            flipped[generator.randrange(size)] ^= 1 << generator.randrange(8)
            path.write_bytes(flipped)
            with contextlib.suppress(Refused):
                checkpoint.load(saved, config, state["data_fingerprint"], CPU)
        path.write_bytes(original)


def test_a_file_of_another_size_or_kind_is_refused_before_it_is_read(saved):
    state, _ = checkpoint.describe(saved)
    os.truncate(saved / "ema.safetensors", 1 << 40)
    with pytest.raises(Damaged, match="another size"):
        checkpoint.verify(saved, state, "ema.safetensors")
    (saved / "ema.safetensors").unlink()
    os.mkfifo(saved / "ema.safetensors")
    with pytest.raises(Damaged, match="not a regular file"):
        checkpoint.verify(saved, state, "ema.safetensors")
