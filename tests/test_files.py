"""Files are read in full, written completely or not at all, and JSON is strict."""

from __future__ import annotations

import errno
import math
import os
import stat
from pathlib import Path

import pytest
from small_run import full_disk, strict_json

from sra_fast import files
from sra_fast.errors import Damaged, Refused
from sra_fast.files import is_of_one_file, lock_file, read_file, read_json, replacing, write_json, write_text


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_becomes_null(tmp_path: Path, value: float) -> None:
    write_json(tmp_path / "a.json", {"a": [1.5, {"b": value}], "c": (value,)})
    assert strict_json((tmp_path / "a.json").read_text()) == {"a": [1.5, {"b": None}], "c": [None]}


def interrupt(path: Path) -> None:
    with replacing(path) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt


def overfill(path: Path) -> None:
    with full_disk(100):
        write_text(path, "x" * 200)


@pytest.mark.parametrize(
    ("write", "error"),
    [
        (lambda path: write_json(path, {"a": object()}), TypeError),
        (interrupt, KeyboardInterrupt),
        (overfill, Refused),
    ],
)
def test_a_file_is_replaced_completely_or_not_at_all(tmp_path: Path, write, error: type[BaseException]) -> None:
    path = tmp_path / "new folder/a.json"
    write_json(path, {"a": 1})
    with pytest.raises(error) as raised:
        write(path)
    assert error is not Refused or str(path) in str(raised.value)
    assert read_json(path) == {"a": 1}
    assert [path.name for path in path.parent.iterdir()] == ["a.json"]


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b"1" * 5_000, None])
def test_an_unreadable_json_file_is_refused_by_name(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "a.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(Damaged, match=r"a\.json: not a readable JSON file") as refusal:
        read_json(path)
    assert "\n" not in str(refusal.value)
    assert refusal.value.path == path


@pytest.fixture
def failing(monkeypatch):
    """Let the next reads fail with these errors, and do not wait between them."""

    def plan(*numbers: int) -> None:
        left, real = list(numbers), os.open

        def fail(path, flags, *more):
            if left:
                number = left.pop(0)
                raise OSError(number, os.strerror(number), str(path))
            return real(path, flags, *more)

        monkeypatch.setattr(files.os, "open", fail)
        monkeypatch.setattr(files, "PAUSES_S", (0.0, 0.0, 0.0))

    return plan


def test_an_error_that_passes_is_waited_for(tmp_path: Path, failing) -> None:
    (tmp_path / "a").write_bytes(b"content")
    failing(errno.EIO, errno.ESTALE, errno.EMFILE)
    assert read_file(tmp_path / "a") == b"content"


@pytest.mark.parametrize(
    ("number", "attempts", "of_one"),
    [(errno.ENOENT, 1, True), (errno.EACCES, 1, True), (errno.EIO, 4, False), (errno.ENFILE, 4, False)],
)
def test_an_error_is_of_a_file_or_of_the_machine(tmp_path: Path, failing, number: int, attempts: int, of_one: bool):
    (tmp_path / "a").write_bytes(b"content")
    failing(*[number] * attempts)
    with pytest.raises(OSError, match=os.strerror(number)) as raised:
        read_file(tmp_path / "a")
    assert is_of_one_file(raised.value, tmp_path / "a") == of_one
    assert not is_of_one_file(raised.value, tmp_path / "a mount that is gone/a")
    assert read_file(tmp_path / "a") == b"content"


def test_only_regular_files_of_bearable_size_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "device").symlink_to("/dev/zero")
    (tmp_path / "sparse").touch()
    os.truncate(tmp_path / "sparse", 6 << 30)
    for name, reason in {"pipe": "not a regular", "device": "not a regular", "sparse": "larger than 1024 MiB"}.items():
        with pytest.raises(OSError, match=reason):
            read_file(tmp_path / name)
        with pytest.raises(Damaged, match=reason):
            read_json(tmp_path / name)


def test_two_writers_of_a_file_do_not_mix(tmp_path: Path) -> None:
    path = tmp_path / "result"
    with replacing(path) as temporary:
        temporary.write_text("first")
        with pytest.raises(Refused, match="another process is writing it"), replacing(path):
            pytest.fail("written by both")
    assert path.read_text() == "first"
    assert list(tmp_path.iterdir()) == [path]


def test_what_is_no_regular_file_is_not_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name in ("pipe", "folder"):
        with pytest.raises(Refused, match="not a regular file"):
            write_text(tmp_path / name, "text")
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


def test_a_lock_changes_no_file_and_waits_for_no_pipe(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("content")
    (tmp_path / "link").symlink_to(tmp_path / "mine")
    os.mkfifo(tmp_path / "pipe")
    for name in ("link", "pipe"):
        with pytest.raises(OSError, match=r"symbolic links|not a regular file"):
            lock_file(tmp_path / name)
    os.close(lock_file(tmp_path / "mine"))
    assert (tmp_path / "mine").read_text() == "content"
