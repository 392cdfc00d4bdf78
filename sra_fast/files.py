"""Files that are written completely or not at all, and JSON."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from sra_fast.errors import Damaged, Refused


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path to write to. When the block ends without an error it becomes `path`, otherwise it is removed.

    Raises:
        Refused: if the disk is full or `path` cannot be written; a file that was there before is unchanged.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise Refused(f"{path}: could not be written ({reason})") from error
    finally:
        # If the folder could not be created there is nothing to remove, and the first error is the one to report.
        if temporary.parent.is_dir():
            temporary.unlink(missing_ok=True)


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
        return json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise Damaged(path, f"not a readable JSON file ({error})") from error


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
