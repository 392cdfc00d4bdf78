"""What a run writes down: metrics.jsonl, one object a line, and the same to TensorBoard where it is installed."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

from sra_fast.errors import Refused
from sra_fast.files import to_json, write_text


class MetricsLog:
    """Appends to `metrics.jsonl` and TensorBoard. Lines beyond `images_seen`, written by a run that was killed later,
    are dropped.

    Args:
        folder: the run directory.
        images_seen: where the run begins or resumes.
    """

    def __init__(self, folder: Path, images_seen: int) -> None:
        path = folder / "metrics.jsonl"
        kept = [line for line in _lines(path) if line["images_seen"] <= images_seen]
        write_text(path, "".join(to_json(line) for line in kept))
        self._file = path.open("a")
        self._board = _tensorboard(folder, images_seen)

    def write(self, row: dict[str, Any]) -> None:
        """One line. Floats that are not finite become null, as JSON has no word for them."""
        try:
            self._file.write(to_json(row))
            self._file.flush()
        except OSError as error:
            raise Refused(f"{self._file.name}: could not be written ({error.strerror})") from error
        if self._board:
            for name, value in row.items():
                if isinstance(value, int | float) and math.isfinite(value):
                    self._board.add_scalar(name, value, row["images_seen"])

    def close(self) -> None:
        self._file.close()
        if self._board:
            self._board.close()


def _lines(path: Path) -> list[dict[str, Any]]:
    """Complete lines of a metrics file; the last may have been cut by a kill."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def _tensorboard(folder: Path, images_seen: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        print(
            "TensorBoard is not installed: metrics go to metrics.jsonl only (pip install tensorboard)", file=sys.stderr
        )
        return None
    return SummaryWriter(str(folder), purge_step=images_seen + 1)
