"""The folder of a run: one process at a time, complete checkpoints only, and housekeeping that never ends a run."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from small_run import arguments, checkpoints, metrics, run, small

from sra_fast.errors import Refused
from sra_fast.training import run_folder

FIRST = "000000000040"  # where the fixture `stopped` stops


# The lock


def test_a_run_in_use_is_refused(stopped, refused):
    with run_folder.locked(stopped / "runs/a"):
        assert "in use by another process" in refused(arguments(stopped))
    assert checkpoints(stopped / "runs/a") == [FIRST]
    assert run(small(stopped))[0] == 0


def test_a_folder_that_cannot_be_written_is_refused(root, refused):
    (root / "file").write_text("")
    assert str(root / "file") in refused(arguments(root, run__dir=str(root / "file")))


def test_a_refused_start_leaves_nothing(root, refused):
    refused(arguments(root, resume=str(root / "nothing")))
    assert sorted(path.name for path in root.iterdir()) == ["data"]


def test_a_lock_that_was_removed_before_it_was_locked_is_not_held(tmp_path, monkeypatch):
    """Its last owner removes an empty folder while another process has opened the lock and not yet locked it."""
    folder, real, calls = tmp_path / "run", fcntl.flock, []

    def flock(lock, operation):
        calls.append(lock)
        if len(calls) == 1:
            shutil.rmtree(folder)
        real(lock, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    with run_folder.locked(folder):
        assert len(calls) == 2
        monkeypatch.undo()
        with pytest.raises(Refused, match="in use"), run_folder.locked(folder):
            pass


# Checkpoints


def test_a_folder_without_state_hides_no_checkpoint(stopped, capsys):
    folder = stopped / "runs/a/checkpoints"
    (folder / f"{48:012d}").mkdir()
    assert run_folder.newest(folder) == folder / FIRST
    assert f"{48:012d}: not a complete checkpoint" in capsys.readouterr().err
    assert run(small(stopped))[0] == 0
    assert [row["images_seen"] for row in metrics(stopped / "runs/a")] == list(range(8, 88, 8))


def test_a_run_without_a_complete_checkpoint_is_not_begun_again(stopped, refused):
    (stopped / "runs/a/checkpoints" / FIRST / "state.json").unlink()
    assert "not a complete checkpoint (it has no state.json), and there is no other" in refused(arguments(stopped))


KILL = """
import os, signal, sys
from pathlib import Path
from sra_fast.training import run_folder
real = os.unlink
def unlink(*arguments, **options):
    real(*arguments, **options)
    os.kill(os.getpid(), signal.SIGKILL)
os.unlink = unlink
run_folder.prune(Path(sys.argv[1]), 1, 0)
"""


def test_a_kill_while_a_checkpoint_is_removed_leaves_none_that_looks_complete(root):
    run(small(root, train__save_every_images=8, train__keep_checkpoints=9), stop_after=3)
    folder = root / "runs/a/checkpoints"
    assert subprocess.run([sys.executable, "-c", KILL, folder]).returncode == -signal.SIGKILL
    named = [path for path in folder.iterdir() if path.name.isdigit()]
    assert [path.name for path in run_folder.complete(folder)] == sorted(path.name for path in named)
    run_folder.prune(folder, 1, 0)
    assert checkpoints(root / "runs/a") == [f"{24:012d}"]


def test_what_cannot_be_removed_is_named_and_training_goes_on(root, capfd, monkeypatch):
    folder = root / "runs/a/checkpoints"
    folder.mkdir(parents=True)
    (folder / "x.tmp").write_text("not ours")
    (folder / f"{8:012d}.tmp").write_text("a file where a folder is expected")
    code, _ = run(small(root, train__save_every_images=40, train__keep_checkpoints=1))
    assert code == 0
    assert f"{8:012d}.tmp: could not be removed" in capfd.readouterr().err
    assert (folder / "x.tmp").exists()
    assert f"{80:012d}" in checkpoints(root / "runs/a")


def test_a_checkpoint_that_cannot_be_renamed_stays(stopped, monkeypatch, capfd):
    real = Path.rename

    def rename(self, target):
        if str(target).endswith(".old.tmp"):
            raise PermissionError(1, "Operation not permitted", str(self))
        return real(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    assert run(small(stopped, train__keep_checkpoints=1))[0] == 0
    assert checkpoints(stopped / "runs/a") == [FIRST, f"{80:012d}"]
    assert "Operation not permitted" in capfd.readouterr().err


def test_a_preview_lost_by_a_kill_is_made_up_for(stopped):
    """Between a checkpoint and its preview."""
    folder = stopped / "runs/a/samples"
    shutil.rmtree(folder)
    run(small(stopped, train__preview_every_images=40), stop_after=1)
    assert os.listdir(folder) == [f"{40:012d}.png"]


def test_a_folder_that_cannot_be_listed_is_not_an_empty_one(stopped, refused, monkeypatch):
    def fail(path):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    before = metrics(stopped / "runs/a")
    with monkeypatch.context() as patch:
        patch.setattr("sra_fast.training.run_folder.os.listdir", fail)
        with pytest.raises(Refused, match=r"checkpoints: cannot be listed \(Permission denied\)"):
            run_folder.newest(stopped / "runs/a/checkpoints")
    assert metrics(stopped / "runs/a") == before


def test_a_run_inside_its_images_is_refused(root, refused):
    line = refused(arguments(root, run__dir=str(root / "data")))
    assert "run.dir: " in line
    assert "must not be inside" in line
    assert sorted(path.name for path in (root / "data").iterdir()) == ["c0", "c1", "c2", "c3"]
