"""What made the samples in a folder: samples of two origins must not mix, because a distance over them would be wrong.

`samples.json` lists everything that the samples depend on. The same job, or one that differs in its length only, writes
the folder anew; another job is refused unless it is told to replace what is there.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from sra_fast.errors import Refused
from sra_fast.files import read_json, write_json

NAME = "samples.json"
FILES = (NAME, "grid.png", "samples.npz", "latents.npz")
IMAGES = "images"
LENGTH = "count"  # what may differ


def digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256, in hex, of weights on the CPU: the same whatever file they are in."""
    result = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        result.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        result.update(tensor.contiguous().numpy().data)
    return result.hexdigest()


def refuse_others(out: Path, origin: dict[str, Any]) -> None:
    """Refuse a folder that has samples of another job.

    Args:
        out: the folder; may be missing.
        origin: JSON values by name.
    """
    if difference := _difference(out, origin):
        rule = f"has samples of another origin ({difference}): choose another --out, or replace them with --overwrite"
        raise Refused("out", str(out), rule)


def begin(out: Path, origin: dict[str, Any]) -> None:
    """Remove the samples in a folder, and write what the new ones are made of. Other files stay."""
    for name in FILES:
        (out / name).unlink(missing_ok=True)
    for image in _images(out):
        image.unlink()
    write_json(out / NAME, origin)


def _images(out: Path) -> list[Path]:
    """The images that `save_each` wrote."""
    return [path for path in out.glob(f"{IMAGES}/*.png") if re.fullmatch(r"\d{6,}\.png", path.name)]


def _difference(out: Path, origin: dict[str, Any]) -> str:
    """How the samples that are there were made otherwise; '' if there are none, or they are of this job."""
    if not (out / NAME).exists():
        unknown = [name for name in FILES if (out / name).exists()] + [path.name for path in _images(out)[:1]]
        return f"{unknown[0]} without a {NAME}" if unknown else ""
    before = read_json(out / NAME)
    if not isinstance(before, dict):
        return f"{NAME} is not an object"
    for name in sorted(before.keys() | origin.keys()):
        if name != LENGTH and before.get(name) != origin.get(name):
            values = [str(values.get(name))[:40] for values in (before, origin)]
            return f"{name}: {values[0]}, now {values[1]}"
    return ""
