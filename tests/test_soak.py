"""Kills, signals and errors of the disk at random places, seeded: what is then started again ends as if nothing had
happened, and every end is one that docs/reliability.md promises.
"""

from __future__ import annotations

import errno
import random
import shutil
import signal
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import small_data
from small_data import write_jpegs
from small_faults import FOR_GOOD, READS, SCALE, SEED, STOPS, WRITES, Fault, Server, named
from small_run import arguments, checkpoints, content, metrics, summary, without_speed, write_images

pytestmark = pytest.mark.slow

# Errors of the machine. Those that say something about one file, such as ENOENT, may leave an image out by right.
READ_ERRORS = (errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE, errno.ETIMEDOUT)
WRITE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EACCES, errno.EFBIG)


def random_fault(rng: random.Random, folder: Path, calls: dict[int, int]) -> Fault:
    """A kill, a signal or an error at a random call; `calls` has the number of reads and of writes."""
    what = rng.choice(("kill", "kill", "stop", "read", "write", "write"))
    kinds = {"read": READS, "write": WRITES}.get(what) or rng.choice((READS, WRITES))
    fault = Fault(str(folder), kinds, rng.randint(1, calls[kinds]))
    fields: dict[str, int] = {"signal": signal.SIGKILL}
    if what == "stop":
        fields = {"signal": rng.choice(STOPS), "repeats": rng.choice((1, 1, 1, 2, 3))}
    elif what in ("read", "write"):
        errors = READ_ERRORS if what == "read" else WRITE_ERRORS
        fields = {"error": rng.choice(errors), "repeats": rng.choice((1, 2, 3, 10, FOR_GOOD))}
    return Fault(**{**vars(fault), **fields})


def soak(
    server: Server,
    folder: Path,
    trials: int,
    words: Sequence[object],
    begin: Callable[[], object],
    check: Callable[[], object],
) -> None:
    """Run a command with one or two faults and then without, again and again.

    Args:
        folder: below which calls are struck.
        words: of the command.
        begin: makes everything as it was before the first start.
        check: fails if the result is not that of an unbroken run.
    """
    calls = {}
    for kinds in (READS, WRITES):
        begin()
        outcome = server.run(words, Fault(str(folder), kinds)).check()
        assert outcome.code == 0
        calls[kinds] = outcome.calls
        check()
    assert min(calls.values()) > 3, calls
    for trial in range(round(trials * SCALE)):
        rng = random.Random(f"{SEED} {words[0]} {trial}")
        faults = [random_fault(rng, folder, calls) for _ in range(rng.choice((1, 1, 2)))]
        with named(f"trial {trial} of {words[0]}: {', then '.join(map(str, faults))}"):
            begin()
            for fault in faults:
                code = server.run(words, fault).check().code
                if code == 0:
                    break
            else:
                code = server.run(words).check().code
            assert code == 0
            check()


def test_training_goes_on_as_if_nothing_had_happened(server, tmp_path):
    images, unbroken, root = write_images(tmp_path / "images"), tmp_path / "unbroken", tmp_path / "broken"
    options = {
        "data__images": str(images),
        "train__save_every_images": 16,
        "train__keep_checkpoints": 2,
        "train__preview_every_images": 40,
        "train__validate_every_images": 40,
    }
    assert server.run(arguments(unbroken, **options)).check().code == 0
    expected = unbroken / "runs/a"
    names = checkpoints(expected)
    rows = {row["step"]: row for row in without_speed(metrics(expected))}

    def check():
        folder = root / "runs/a"
        assert checkpoints(folder)[-1] == names[-1]
        for name in checkpoints(folder):
            if name in names:
                assert content(folder / "checkpoints" / name) == content(expected / "checkpoints" / name)
        for row in without_speed(metrics(folder)):  # lines may be missing after an error of the disk
            assert row == rows[row["step"]]
        assert (summary(folder)["replaced_images"], summary(folder)["images_seen"]) == (0, 80)

    def begin():
        shutil.rmtree(root, ignore_errors=True)

    soak(server, tmp_path, 100, arguments(root, **options), begin, check)


def test_packed_sets_have_the_same_bytes(server, tmp_path):
    images, out = write_jpegs(tmp_path / "images"), tmp_path / "set"
    words = small_data.words(small_data.config(images, out, flips=True))
    assert server.run(words).check().code == 0
    expected = small_data.content(out)

    def check():
        assert small_data.content(out) == expected

    soak(server, tmp_path, 120, words, lambda: shutil.rmtree(out, ignore_errors=True), check)


@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("sample", ("--out", "samples", "--sample.count", 6, "--sample.batch", 2)),
        ("export", ("--out", "weights.safetensors")),
        ("export", ("--out", "weights.pt")),
    ],
    ids=["sample", "safetensors", "pt"],
)
def test_results_are_whole_or_not_there(server, tmp_path, command, options):
    root, work = tmp_path / "run", tmp_path / "work"
    write_images(root / "data")
    assert server.run(arguments(root, train__images=16)).check().code == 0
    place, name = options[:2]
    words = [command, "--weights", root / "runs/a", place, work / str(name), *options[2:]]

    def begin():
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()

    def files():
        return {path.relative_to(work): path.read_bytes() for path in work.rglob("*") if path.is_file()}

    begin()
    assert server.run(words).check().code == 0
    expected = files()

    def check():
        assert files() == expected

    soak(server, tmp_path, 50, words, begin, check)


def test_signals_at_any_moment_save(server, tmp_path):
    """Also between calls, at times that no seed repeats."""
    root = tmp_path / "broken"
    write_images(root / "data")
    words = arguments(root, train__save_every_images=16, train__images=160)
    rng = random.Random(SEED)
    assert server.run(words).check().code == 0
    expected = content(root / "runs/a/checkpoints" / f"{160:012d}")
    for trial in range(round(40 * SCALE)):
        number, after_s = rng.choice(STOPS), rng.uniform(0.001, 0.6)
        with named(f"{signal.Signals(number).name} after {after_s:.3f} s, trial {trial}"):
            shutil.rmtree(root / "runs")
            outcome = server.run(words, after_s=after_s, number=number).check()
            assert outcome.code in (0, 128 + number, -number)
            assert ("stopped and saved" in outcome.output) <= bool(checkpoints(root / "runs/a"))
            is_finished = (root / "runs/a/summary.json").exists()
            assert is_finished or server.run(words).check().code == 0
            assert content(root / "runs/a/checkpoints" / f"{160:012d}") == expected
