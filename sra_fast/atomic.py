"""Writing a file whole or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from sra_fast.config import Refused


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write to that becomes `path` once the block has ended well, and vanishes otherwise.

    Raises:
        Refused: if the disk is full or the place cannot be written; what stood at `path` before still stands there.
    """
    partial = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        partial.replace(path)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise Refused(f"{path}: could not be written ({reason})") from error
    finally:
        # Where the folder could not be made, there is nothing to remove, and the first error says why.
        if partial.parent.is_dir():
            partial.unlink(missing_ok=True)
