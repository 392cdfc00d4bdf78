"""Files: read in full and only if they are files, written completely or not at all; and JSON."""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from sra_fast.errors import Damaged, Refused

T = TypeVar("T")

LARGEST = 1 << 30  # bytes of a file that is read into memory
# Errors that say something about one file. All others are of the machine: its memory, disk, network or limits.
OF_ONE_FILE = (
    errno.ENOENT,
    errno.EACCES,
    errno.EPERM,
    errno.EISDIR,
    errno.ELOOP,
    errno.EINVAL,
    errno.EFBIG,
    errno.ENAMETOOLONG,
)
PASSING = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.ENFILE, errno.EMFILE, errno.ENOMEM)
PAUSES_S = (0.1, 0.4, 1.5)  # before the second, third and fourth attempt


def retried(call: Callable[[], T]) -> T:
    """The result of a call. If it fails with an error that may pass, such as that of a network file system, it is
    repeated a few times."""
    for pause in PAUSES_S:
        try:
            return call()
        except OSError as error:
            if error.errno not in PASSING:
                raise
            time.sleep(pause)
    return call()


def open_regular(path: Path | str) -> int:
    """A descriptor to read a file. Raises OSError also for devices, pipes and sockets, which may block or never end."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return descriptor


def read_file(path: Path | str) -> bytes:
    """The content of a regular file of at most `LARGEST` bytes.

    Raises:
        OSError: if it cannot be read in full; `is_of_one_file` tells whether other files may be readable.
    """

    def read() -> bytes:
        descriptor = open_regular(path)
        with os.fdopen(descriptor, "rb") as file:
            size = os.fstat(descriptor).st_size
            if size > LARGEST:
                raise OSError(errno.EFBIG, f"larger than {LARGEST >> 20} MiB", str(path))
            content = file.read(size)
        if len(content) != size:
            raise OSError(errno.EIO, "cut short while it was read", str(path))
        return content

    return retried(read)


def is_of_one_file(error: OSError, path: Path | str) -> bool:
    """Whether an error in reading `path` concerns that file alone: its folder is there, and so is the machine."""
    return error.errno in OF_ONE_FILE and os.path.isdir(os.path.dirname(path))


def refuse_unwritable(path: Path, option: str) -> None:
    """Refuse a file or folder that cannot be created, before the work whose results it is to hold."""
    existing = next(parent for parent in (path.absolute(), *path.absolute().parents) if parent.exists())
    if existing != path.absolute() and not existing.is_dir():
        raise Refused(option, str(path), f"cannot be created: {existing} is a file")
    if not os.access(existing, os.W_OK):
        raise Refused(option, str(path), f"{existing} cannot be written")


def lock_file(path: Path) -> int:
    """A descriptor of a file, created if it is missing and otherwise unchanged, that this process alone holds.

    Raises:
        BlockingIOError: if another process holds it.
        OSError: if it is a link or no regular file, or cannot be opened.
    """
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise OSError(errno.EINVAL, "not a regular file", str(path))
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Between opening and locking, its last owner may have removed it: others would lock another file.
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                    return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path to write to. When the block ends without an error it becomes `path`, otherwise it is removed.

    Raises:
        Refused: if the disk is full, another process is writing `path`, or it cannot be written; a file that was there
            before is unchanged.
    """
    if path.exists() and not path.is_file():
        raise Refused(f"{path}: could not be written (not a regular file)")
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = lock_file(temporary)
    except BlockingIOError as error:
        raise Refused(f"{path}: another process is writing it") from error
    except OSError as error:
        raise Refused(f"{path}: could not be written ({error.strerror})") from error
    is_replaced = False
    try:
        yield temporary
        temporary.replace(path)
        is_replaced = True
    except OSError as error:
        raise Refused(f"{path}: could not be written ({error.strerror or error})") from error
    finally:
        if not is_replaced:
            with suppress(OSError):  # the first error is the one to report
                temporary.unlink(missing_ok=True)
        os.close(lock)


def sync(path: Path) -> None:
    """fsync a file or a folder: its content, or its list of names, survives a power failure from here on.

    Raises:
        OSError: if the disk reports an error.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Replace a file by this text (UTF-8), on the disk when this returns. Raises Refused if it cannot be written."""
    with replacing(path) as temporary:
        temporary.write_bytes(text.encode())
        sync(temporary)


def to_json(value: Any, indent: int | None = None) -> str:
    """JSON text. Floats that are not finite become null, because JSON has no word for them."""
    return json.dumps(_finite(value), indent=indent) + "\n"


def write_json(path: Path, value: Any) -> None:
    """Replace a file by `value` as JSON, see `write_text` and `to_json`."""
    write_text(path, to_json(value, indent=2))


def read_json(path: Path) -> Any:
    """The value in a JSON file.

    Raises:
        Damaged: if it cannot be read or is not JSON.
    """
    try:
        return json.loads(read_file(path))
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or error
        raise Damaged(path, f"not a readable JSON file ({reason})") from error


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
