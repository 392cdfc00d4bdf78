"""shards.py: the same bytes whenever the work is killed and however many processes share it; nothing half-written."""

from __future__ import annotations

import errno
import io
import multiprocessing
import os
import random
import resource
import shutil
import signal
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from small_data import Killed, config, content, flip_bit, prepare_without_manifest, refusal, words

from sra_fast import cli
from sra_fast.packing.encoding import ImageEncoder
from sra_fast.packing.prepare import prepare
from sra_fast.packing.shards import Claims, Part, assemble, write_shard

SHARDS = 11


def command(images, out, **changes):
    """44 images in 11 shards, with flips."""
    return config(images, out, flips=True, rows_per_shard=4, **changes)


@pytest.fixture(scope="session")
def undisturbed(images, tmp_path_factory):
    """The files of the set that all of the following must produce."""
    out = tmp_path_factory.mktemp("undisturbed") / "set"
    prepare(command(images, out))
    assert len(content(out)) == 2 + 3 * SHARDS
    return content(out)


def test_arrays_are_written_as_numpy_writes_them(undisturbed):
    for name, file in undisturbed.items():
        if name.endswith(".npy"):
            buffer = io.BytesIO()
            np.save(buffer, np.load(io.BytesIO(file)))
            assert file == buffer.getvalue()


# Processes are forked from one that has imported everything, which takes seconds.
FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload(["pytest", "sra_fast.cli", "sra_fast.packing.prepare"])


def run_slowly(command, output, kill_at, delay, file_limit, together, environment):
    """`sra-fast prepare`, somewhat slowed down, with its output in a file. It is killed `delay` seconds after it has
    begun to encode its batch `kill_at`, if that is not 0; and waits for the others at `together`, if given, before the
    first."""
    os.environ.update(environment)
    torch.set_num_threads(1)
    for stream in (1, 2):
        os.dup2(os.open(f"{output}.{stream}", os.O_CREAT | os.O_WRONLY), stream)
    if file_limit:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    encode, calls = ImageEncoder._encode, []

    def slow_encode(self, *arguments):
        calls.append(1)
        if together and len(calls) == 1:
            together.wait(60)
        if len(calls) == kill_at:
            timer = threading.Timer(delay, os.kill, (os.getpid(), signal.SIGKILL))
            timer.daemon = True
            timer.start()
        time.sleep(0.01)
        return encode(self, *arguments)

    ImageEncoder._encode = slow_encode
    raise SystemExit(cli.main(words(command)))


def start(command, kill_at=0, delay=0.0, file_limit=0, together=None, **environment):
    output = Path(tempfile.mkdtemp(dir=Path(command.out).parent)) / "output"
    process = FORKED.Process(
        target=run_slowly, args=(command, output, kill_at, delay, file_limit, together, environment)
    )
    process.output = output
    process.start()
    return process


def finish(*processes, code=0):
    """[stdout, or stderr of a failure] of processes, when they have ended."""
    for process in processes:
        process.join(120)
    texts = [process.output.with_suffix(".2" if code else ".1").read_text() for process in processes]
    assert [process.exitcode for process in processes] == [code] * len(processes), texts
    return texts


def hold_shard(out, held):
    """Claim shard 3 and keep it."""
    with Claims(out).hold(3, wait=True):
        held.set()
        time.sleep(60)


@pytest.mark.parametrize(("times", "seed"), [(2, 3), *(pytest.param(4, n, marks=pytest.mark.slow) for n in range(3))])
def test_killed_at_random_moments_it_continues_to_the_same_bytes(images, undisturbed, tmp_path, times, seed):
    draw, finished, out = random.Random(seed), [0], tmp_path / "set"
    for _ in range(times):
        batch = draw.randint(1, 20 // times - 1)  # of 22 batches, flips counted too
        killed = start(command(images, out), batch, draw.uniform(0.0, 0.01))
        killed.join(60)
        assert killed.exitcode == -signal.SIGKILL
        assert not (out / "manifest.json").exists()
        # No finished shard is lost, nor one that this process finished, with two batches each.
        finished.append(len(list(out.glob("shard-*.json"))))
        assert finished[-1] >= finished[-2] + (batch - 1) // 2
    prepare(command(images, out))
    assert content(out) == undisturbed


RENAMES = 1 + SHARDS * 4 + 1  # prepare.json; of each shard moments, flips, labels, record; manifest.json


@pytest.mark.parametrize(
    ("function", "moment"), [*(("replace", n) for n in [*range(6), *range(RENAMES - 3, RENAMES)]), ("unlink", 3)]
)
def test_killed_between_any_two_files_it_continues(images, undisturbed, tmp_path, monkeypatch, function, moment):
    out, left, original, steps = tmp_path / "set", tmp_path / "left", getattr(Path, function), []

    def crash(self, *arguments, **named):
        if function == "replace" or self.match("shard-*.json"):
            if len(steps) == moment:
                shutil.copytree(out, left)  # as a kill would leave it, with what is half-written
                raise Killed
            steps.append(self.name)
        return original(self, *arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(Path, function, crash)
        with pytest.raises(Killed):
            prepare(command(images, out))
    assert (left / "manifest.json").exists() == (function == "unlink")  # then the records are being removed
    prepare(command(images, left))
    assert content(left) == undisturbed


def test_two_processes_share_the_work(images, undisturbed, tmp_path):
    out = tmp_path / "set"
    together = FORKED.Barrier(2)  # neither ends before the other has begun
    both = [start(command(images, out), together=together, RANK=str(rank), WORLD_SIZE="2") for rank in range(2)]
    assert all("images/s here" in output for output in finish(*both))
    assert content(out) == undisturbed


def test_a_claimed_shard_is_made_when_its_owner_dies(images, undisturbed, tmp_path):
    """Another process holds shard 3 and is killed while we wait."""
    out = tmp_path / "set"
    out.mkdir()
    held = FORKED.Event()
    owner = FORKED.Process(target=hold_shard, args=(out, held))
    owner.start()
    assert held.wait(60)
    helper = start(command(images, out))
    deadline = time.monotonic() + 60
    while len(list(out.glob("shard-*.json"))) < SHARDS - 1 and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.2)
    assert helper.is_alive()
    assert not (out / "shard-00003.json").exists()
    owner.kill()
    assert "44 images" in finish(helper)[0]
    assert content(out) == undisturbed


@pytest.mark.parametrize("name", ["moments-00001.npy", "moments_flip-00001.npy", "labels-00001.npy"])
def test_a_shard_that_changed_after_it_was_finished_is_made_again(images, undisturbed, tmp_path, name):
    out = tmp_path / "set"
    prepare_without_manifest(command(images, out))
    flip_bit(out / name)
    assert f"{out / name}: " in refusal(prepare, command(images, out))
    prepare(command(images, out))
    assert content(out) == undisturbed


def test_an_incomplete_shard_is_made_again(images, undisturbed, tmp_path):
    out = tmp_path / "set"
    prepare_without_manifest(command(images, out))
    (out / "moments-00000.npy").unlink()
    os.truncate(out / "labels-00001.npy", 140)
    (out / "shard-00004.json").write_text("{")
    prepare(command(images, out))
    assert content(out) == undisturbed


@pytest.mark.parametrize("after", [0, 1, 3, 4, 6])
def test_a_full_disk_is_one_line_and_leaves_nothing_half_written(
    images, undisturbed, tmp_path, monkeypatch, main, after
):
    """The disk is full after so many files have been synced."""
    out, fsync, synced = tmp_path / "set", os.fsync, []

    def full(file):
        if len(synced) == after:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        synced.append(file)
        return fsync(file)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        code, _, error = main(words(command(images, out)))
    assert code == 1
    line = error.splitlines()[-1]
    assert line.startswith(f"sra-fast: {out}")
    assert "No space left on device" in line
    assert not list(out.glob("*.tmp"))
    assert not (out / "manifest.json").exists()
    prepare(command(images, out))
    assert content(out) == undisturbed


def test_a_full_disk_in_the_middle_of_a_file(images, tmp_path):
    """A limit on the size of files makes write fail halfway, with EFBIG in place of ENOSPC."""
    out = tmp_path / "set"
    (error,) = finish(start(config(images, out), file_limit=8000), code=1)
    assert error.splitlines()[-1] == f"sra-fast: {out}/moments-00000.npy: could not be written (File too large)"
    assert sorted(content(out)) == [".prepare.lock", "prepare.json"]


def test_rows_of_another_dtype_and_labels_without_a_class_are_refused(tmp_path):
    def write(label, dtype=np.float16):
        part = Part(np.zeros((2, 1, 2, 2), dtype), None, np.array([0, label]), ())
        return write_shard(tmp_path, 0, [part], shape=(1, 2, 2), dtype=np.dtype(np.float16), flips=False)

    with pytest.raises(ValueError, match="float32"):
        write(1, np.float32)
    assert content(tmp_path) == {}
    facts = {"shape": (1, 2, 2), "dtype": "float16", "posterior": False, "scale": 1.0, "shift": 0.0}
    facts |= {"classes": ("a", "b"), "vae": "", "crop": "", "resolution": 16}
    for label in (-1, 2):
        line = refusal(lambda records: assemble(tmp_path, records, **facts), [write(label)])
        assert line.startswith(f"{tmp_path / 'labels-00000.npy'}: label {label} of row 1; must be in [0, 2)")
    assert not (tmp_path / "manifest.json").exists()
