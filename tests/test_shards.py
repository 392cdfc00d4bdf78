"""shards.py: the same bytes however often the work was killed and however many shared it; nothing half-written."""

from __future__ import annotations

import errno
import io
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from small_set import (
    Killed,
    config,
    content,
    jpeg,
    kill,
    refusal,
    words,
    write_set,
)
from test_archives import write_tar

from sra_fast.data.manifest import Skipped
from sra_fast.errors import Refused
from sra_fast.packing import encoding, shards
from sra_fast.packing.archives import open_images
from sra_fast.packing.prepare import prepare
from sra_fast.packing.shards import Part, assemble, write_shard
from sra_fast.vae import Vae

# The same bytes


@pytest.fixture(scope="session")
def undisturbed(images, kl, tmp_path_factory):
    """The set that all of the following must come to: 11 shards, with flips."""
    out = tmp_path_factory.mktemp("undisturbed") / "set"
    prepare(config(images, out, vae=str(kl), flips=True, rows_per_shard=4))
    made = content(out)
    assert len(made) == 2 + 3 * 11
    return made


def same(images, kl, out, **changes):
    return config(images, out, vae=str(kl), flips=True, rows_per_shard=4, **changes)


def test_arrays_are_what_numpy_itself_would_write(undisturbed):
    for name, found in undisturbed.items():
        if name.endswith(".npy"):
            buffer = io.BytesIO()
            np.save(buffer, np.load(io.BytesIO(found)))
            assert found == buffer.getvalue()


@pytest.mark.parametrize("batch", [1, 3, 64])
def test_on_a_cpu_the_batch_changes_no_bit(images, kl, undisturbed, tmp_path, batch):
    prepare(same(images, kl, tmp_path / "set", batch=batch))
    assert content(tmp_path / "set") == undisturbed


def test_on_a_cpu_the_number_of_threads_changes_no_bit(kl, tmp_path):
    # Of a size at which it would: two of a thousand numbers, if the threads shared an image.
    root, made, before = write_set(tmp_path / "images", 6), [], torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            prepare(config(root, tmp_path / f"{threads}", vae=str(kl), resolution=128))
            assert torch.get_num_threads() == threads
            made.append(content(tmp_path / f"{threads}"))
    finally:
        torch.set_num_threads(before)
    assert made[0] == made[1]


STARTED = """
import os, signal, sys, threading, time
from sra_fast import cli
from sra_fast.packing.encoding import ImageEncoder
kill_at, after = int(sys.argv[1]), float(sys.argv[2])
encode, calls = ImageEncoder._encode, []
def slow(self, *given):
    calls.append(1)
    if len(calls) == kill_at:
        timer = threading.Timer(after, os.kill, (os.getpid(), signal.SIGKILL))
        timer.daemon = True
        timer.start()
    time.sleep(0.01)
    return encode(self, *given)
ImageEncoder._encode = slow
raise SystemExit(cli.main(sys.argv[3:]))
"""


def start(config, kill_at=0, after=0.0, **environment):
    """prepare, somewhat slowed down, in a process that kills itself so many seconds after it has begun to encode batch
    `kill_at` of its own, flips counted too; 0: it does not."""
    return subprocess.Popen(
        [sys.executable, "-c", STARTED, str(kill_at), str(after), *words(config)],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(scope="session")
def undisturbed_pixels(images, tmp_path_factory):
    """The same without a VAE, for processes, which then start in half the time."""
    out = tmp_path_factory.mktemp("pixels") / "set"
    prepare(same_pixels(images, out))
    return content(out)


def same_pixels(images, out, **changes):
    return config(images, out, flips=True, rows_per_shard=4, **changes)


def kill_often(given, times, seed):
    """Kill so many processes at random moments of their work, one after the other; of its 22 batches they do not get
    further than 20."""
    draw, progress, out = random.Random(seed), [0], Path(given.out)
    for _ in range(times):
        batch = draw.randint(1, 20 // times - 1)
        killed = start(given, batch, draw.uniform(0.0, 0.01))
        assert killed.wait(60) == -signal.SIGKILL, killed.communicate()
        assert not (out / "manifest.json").exists()
        # Nothing that was finished is lost, and no shard that this one finished, of two batches each.
        progress.append(len(list(out.glob("shard-*.json"))))
        assert progress[-1] >= progress[-2] + (batch - 1) // 2


def test_killed_at_random_moments_it_goes_on_to_the_same_bytes(images, undisturbed_pixels, tmp_path):
    kill_often(same_pixels(images, tmp_path / "set"), 2, seed=3)
    prepare(same_pixels(images, tmp_path / "set"))
    assert content(tmp_path / "set") == undisturbed_pixels


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_killed_with_a_vae_at_random_moments_it_goes_on_to_the_same_bytes(images, kl, undisturbed, tmp_path, seed):
    kill_often(same(images, kl, tmp_path / "set"), 4, seed)
    prepare(same(images, kl, tmp_path / "set"))
    assert content(tmp_path / "set") == undisturbed


RENAMES = 1 + 11 * 4 + 1  # prepare.json; of each shard moments, flips, labels, record; manifest.json


@pytest.mark.parametrize("moment", [*range(9), *range(RENAMES - 5, RENAMES)])
def test_killed_between_any_two_files_it_goes_on(images, kl, undisturbed, tmp_path, monkeypatch, moment):
    out, left, steps, replace = tmp_path / "set", tmp_path / "left", [], Path.replace

    def crash(self, target):
        if len(steps) == moment:
            shutil.copytree(out, left)  # as a kill would leave it, with what is half-written
            raise Killed
        steps.append(target.name)
        return replace(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", crash)
        with pytest.raises(Killed):
            prepare(same(images, kl, out))
    assert any(name.endswith(".tmp") for name in content(left))
    assert not (left / "manifest.json").exists()
    prepare(same(images, kl, left))
    assert content(left) == undisturbed


def test_killed_while_the_records_go_it_is_complete(images, kl, undisturbed, tmp_path, monkeypatch):
    out, left, unlink = tmp_path / "set", tmp_path / "left", Path.unlink

    def crash(self, missing_ok=False):
        if self.name == "shard-00002.json":
            shutil.copytree(out, left)
            raise Killed
        unlink(self, missing_ok)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", crash)
        with pytest.raises(Killed):
            prepare(same(images, kl, out))
    prepare(same(images, kl, left))
    assert content(left) == undisturbed


@pytest.mark.parametrize("kind", ["pixels", pytest.param("moments", marks=pytest.mark.slow)])
def test_two_processes_at_once_make_the_same_bytes_and_share_the_work(
    images, kl, undisturbed, undisturbed_pixels, tmp_path, kind
):
    out = tmp_path / "set"
    given = same_pixels(images, out) if kind == "pixels" else same(images, kl, out)
    both = [start(given, RANK=str(rank), WORLD_SIZE="2") for rank in range(2)]
    said = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert content(out) == (undisturbed_pixels if kind == "pixels" else undisturbed)
    assert sum("images/s here" in output for output, _ in said) == 2


def test_a_claimed_shard_is_waited_for_and_made_if_its_owner_dies(images, undisturbed_pixels, tmp_path):
    """Another process holds shard 3 and is killed while we wait."""
    out = tmp_path / "set"
    out.mkdir()
    hold = (
        "import sys, time\nfrom pathlib import Path\nfrom sra_fast.packing.shards import Claims\n"
        "with Claims(Path(sys.argv[1])).hold(3, wait=True):\n    print('held', flush=True)\n    time.sleep(60)\n"
    )
    holder = subprocess.Popen([sys.executable, "-c", hold, str(out)], stdout=subprocess.PIPE, text=True)
    helper = start(same_pixels(images, out))
    assert holder.stdout.readline() == "held\n"
    deadline = time.monotonic() + 60
    while len(list(out.glob("shard-*.json"))) < 10 and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.2)
    assert helper.poll() is None
    assert not (out / "shard-00003.json").exists()
    assert not (out / "manifest.json").exists()
    holder.kill()
    holder.communicate()
    output, error = helper.communicate(timeout=30)
    assert (helper.returncode, "44 images" in output) == (0, True), error
    assert content(out) == undisturbed_pixels


def test_a_shard_that_lost_a_file_or_a_byte_before_the_end_is_made_again(
    images, kl, undisturbed, tmp_path, monkeypatch
):
    out = tmp_path / "set"
    monkeypatch.setattr("sra_fast.packing.prepare.assemble", kill)
    with pytest.raises(Killed):
        prepare(same(images, kl, out))
    monkeypatch.undo()
    (out / "moments-00000.npy").unlink()
    whole = (out / "labels-00001.npy").read_bytes()
    (out / "labels-00001.npy").write_bytes(whole[:-1])
    (out / "shard-00004.json").write_text("{")
    prepare(same(images, kl, out))
    assert content(out) == undisturbed


def test_a_complete_set_is_left_as_it_is(images, tmp_path, monkeypatch, capsys):
    prepare(config(images, tmp_path / "set"))
    before = content(tmp_path / "set")
    monkeypatch.setattr(encoding.ImageEncoder, "_decode", kill)
    capsys.readouterr()
    assert prepare(config(images, tmp_path / "set")).count == 40
    assert content(tmp_path / "set") == before
    assert "complete before" in capsys.readouterr().out


# Trouble on the way


class Full:
    """The disk is full when so many files have been synced."""

    def __init__(self, after):
        self.left, self.fsync = after, os.fsync

    def __call__(self, file):
        self.left -= 1
        if self.left < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self.fsync(file)


@pytest.mark.parametrize("after", range(8))
def test_a_full_disk_is_one_line_and_leaves_nothing_half_written(
    images, kl, undisturbed, tmp_path, monkeypatch, capfd, main, after
):
    out = tmp_path / "set"
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", Full(after))
        code, _, error = main(words(same(images, kl, out)))
    assert code == 1
    (line,) = [line for line in error.splitlines() if line.startswith("sra-fast")]
    assert line == error.splitlines()[-1]
    assert "No space left on device" in line
    assert str(out) in line
    assert not list(out.glob("*.tmp"))
    assert not (out / "manifest.json").exists()
    prepare(same(images, kl, out))
    assert content(out) == undisturbed


def test_a_full_disk_in_the_middle_of_a_file(images, tmp_path):
    """A limit on the size of files raises EFBIG where a full disk raises ENOSPC: in write, halfway."""
    out = tmp_path / "set"
    code = (
        "import resource, signal, sys\nfrom sra_fast import cli\nsignal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (8000, 8000))\nraise SystemExit(cli.main(sys.argv[1:]))\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code, *words(config(images, out))],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert ran.returncode == 1
    assert ran.stderr.splitlines()[-1] == f"sra-fast: {out}/moments-00000.npy: could not be written (File too large)"
    assert sorted(content(out)) == [".prepare.lock", "prepare.json"]
    assert prepare(config(images, out)).count == 40


def test_a_file_that_vanishes_is_left_out_and_a_disk_that_does_is_not(tmp_path, monkeypatch):
    root = write_set(tmp_path / "images", 8, 1)
    source, read = open_images(str(root)), type(open_images(str(root))).read

    def vanish(self, row):
        if row == 2:
            raise FileNotFoundError(errno.ENOENT, "gone")
        return read(self, row)

    monkeypatch.setattr(type(source), "read", vanish)
    assert prepare(config(root, tmp_path / "one")).skipped == (Skipped("c0/002.jpg", "gone"),)

    def stale(self, row):
        raise OSError(errno.ESTALE, "stale handle")

    monkeypatch.setattr(type(source), "read", stale)
    assert "c0/000.jpg: cannot be read (stale handle)" in refusal(config(root, tmp_path / "two"))

    def unmount(self, row):
        if root.exists():
            root.rename(tmp_path / "elsewhere")
        raise FileNotFoundError(errno.ENOENT, "gone")

    monkeypatch.setattr(type(source), "read", unmount)
    assert "c0/000.jpg: cannot be read (gone)" in refusal(config(root, tmp_path / "three"))


def test_an_archive_that_goes_bad_is_no_thousand_bad_images(tmp_path):
    members = {}
    for row in range(4):
        members |= {f"{row}.jpg": jpeg(row), f"{row}.cls": b"0"}
    path = write_tar(tmp_path / "a.tar", members)
    source = open_images(str(path))
    maker = encoding.ImageEncoder(config(path, tmp_path / "set"), source)
    path.unlink()
    with pytest.raises(Refused, match="cannot be read"):
        list(maker.parts(0, 4))


def test_interrupted_it_stops_without_a_trace_of_half_a_shard(images, kl, tmp_path, monkeypatch, main):
    encode, calls = Vae.encode, []

    def interrupted(self, x):
        calls.append(1)
        if len(calls) == 9:
            raise KeyboardInterrupt
        return encode(self, x)

    monkeypatch.setattr(Vae, "encode", interrupted)
    code, _, error = main(words(config(images, tmp_path / "set", vae=str(kl))))
    assert (code, error.splitlines()[-1]) == (130, "sra-fast: interrupted")
    assert sorted(content(tmp_path / "set")) == [".prepare.lock", "prepare.json"]


def test_a_shards_rows_must_be_what_they_are_said_to_be(tmp_path):
    part = shards.Part(np.zeros((2, 3), np.float32), None, np.zeros(2, np.int64), ())
    with pytest.raises(ValueError, match="float32"):
        shards.write_shard(tmp_path, 0, [part], shape=(3,), dtype=np.dtype(np.float16), flips=False)
    assert content(tmp_path) == {}


FACTS = {"classes": ("a", "b"), "shape": (1, 2, 2), "dtype": "float16", "posterior": False, "scale": 1.0, "shift": 0.0}
FACTS |= {"vae": "", "crop": "", "resolution": 16}


def test_labels_without_a_class_are_refused(tmp_path):
    for label in (-1, 2):
        rows = Part(np.zeros((2, 1, 2, 2), np.float16), None, np.array([0, label]), ())
        record = write_shard(tmp_path, 0, [rows], shape=(1, 2, 2), dtype=np.dtype(np.float16), flips=False)
        with pytest.raises(Refused, match=r"labels-00000.npy: labels must be in \[0, 2\), as there are classes"):
            assemble(tmp_path, [record], **FACTS)
    assert not (tmp_path / "manifest.json").exists()
