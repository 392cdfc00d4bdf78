"""The manifest of a packed data set, manifest.json. It is written last: a folder without it is an unfinished set.

docs/packed-sets.md describes the format of a set.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sra_fast.errors import Damaged, Refused
from sra_fast.files import read_json
from sra_fast.vae import Factor

NAME = "manifest.json"
SETTINGS = "prepare.json"  # the settings of `sra-fast prepare`, kept beside the set to continue or repair it
FORMAT_VERSION = 1
DTYPES = ("float16", "float32", "uint8")
_LARGEST = 3.4e38  # of float32, in which the factors are applied


@dataclass(frozen=True)
class Shard:
    """Consecutive rows, in files beside the manifest."""

    file: str
    rows: int
    sha256: str
    labels: str
    labels_sha256: str
    flip: str = ""
    flip_sha256: str = ""

    def files(self) -> dict[str, str]:
        """{file: SHA-256 of its bytes}."""
        files = {self.file: self.sha256, self.labels: self.labels_sha256}
        return files | ({self.flip: self.flip_sha256} if self.flip else {})


@dataclass(frozen=True)
class Skipped:
    """An image that is not in the set."""

    file: str
    reason: str


@dataclass(frozen=True)
class Manifest:
    """A packed set. The network is trained on x = (z - shift) * scale, where z is a row or, with `posterior`, a sample
    of N(mean, std^2), whose mean and std are the first and second half of the row's channels."""

    count: int
    classes: tuple[str, ...]
    shape: tuple[int, int, int]
    """Of a row: (channels, height, width)."""
    dtype: str
    posterior: bool
    scale: Factor
    shift: Factor
    vae: str
    """Folder of the VAE or its id on the Hugging Face hub; empty for pixels."""
    crop: str
    resolution: int
    """Side of the images in pixels."""
    shards: tuple[Shard, ...]
    skipped: tuple[Skipped, ...] = ()
    format_version: int = FORMAT_VERSION

    @property
    def channels(self) -> int:
        """Channels of x."""
        return self.shape[0] // 2 if self.posterior else self.shape[0]

    @property
    def flips(self) -> bool:
        """Whether every row has a mirrored one."""
        return bool(self.shards) and all(shard.flip for shard in self.shards)

    def size(self, root: Path) -> int:
        """Bytes of the shards' files that exist in `root`."""
        paths = [root / name for shard in self.shards for name in shard.files()]
        return sum(path.stat().st_size for path in paths if path.is_file())

    def fingerprint(self) -> str:
        """SHA-256, in hex, of everything that influences training: equal for equal rows, wherever they are stored."""
        facts = (self.count, self.shape, self.dtype, self.posterior, self.scale, self.shift, len(self.classes))
        digest = hashlib.sha256(repr(facts).encode())
        for shard in self.shards:
            digest.update(f"{shard.rows} {shard.sha256} {shard.labels_sha256} {shard.flip_sha256}\n".encode())
        return digest.hexdigest()


def read_manifest(root: Path) -> Manifest:
    """Read and check the manifest of the set in a folder.

    Raises:
        Damaged: if there is none or it is invalid, naming the file and the field.
    """
    path = root / NAME
    if not root.is_dir():
        raise Damaged(root, "must be a folder that `sra-fast prepare` made")
    if not path.exists():
        begun = (root / SETTINGS).exists() or any(root.glob("*.npy"))
        unfinished = "; the set is unfinished: run the same `sra-fast prepare` again" if begun else ""
        raise Damaged(root, f"has no {NAME}{unfinished}")
    fields = read_json(path)
    try:
        manifest = _parse(fields)
        _check(manifest)
        _check_files(manifest)
    except Refused as error:
        raise Damaged(path, error) from None
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise Damaged(path, f"not a manifest ({type(error).__name__}: {error})") from error
    return manifest


def _parse(fields: dict[str, Any]) -> Manifest:
    version = fields["format_version"]
    if version != FORMAT_VERSION:
        raise Refused("format_version", version, f"must be {FORMAT_VERSION}")
    if type(fields["classes"]) is not list:
        raise Refused("classes", fields["classes"], "must be a list of names")
    parsed = {
        "classes": tuple(fields["classes"]),
        "shape": tuple(fields["shape"]),
        "scale": _factor(fields["scale"]),
        "shift": _factor(fields["shift"]),
        "shards": tuple(Shard(**shard) for shard in fields["shards"]),
        "skipped": tuple(Skipped(**file) for file in fields["skipped"]),
    }
    return Manifest(**fields | parsed)


def _factor(value: Any) -> Factor:
    return tuple(map(float, value)) if isinstance(value, list) else float(value)


def _check(m: Manifest) -> None:
    for name, text in [("vae", m.vae), ("crop", m.crop), *(("classes", name) for name in m.classes)]:
        if type(text) is not str:
            raise Refused(name, text, "must be text")
    if type(m.posterior) is not bool:
        raise Refused("posterior", m.posterior, "must be true or false")
    if not _is_positive(m.resolution):
        raise Refused("resolution", m.resolution, "must be a number of pixels")
    if m.dtype not in DTYPES:
        raise Refused("dtype", m.dtype, f"must be one of {', '.join(DTYPES)}")
    if len(m.shape) != 3 or not all(map(_is_positive, m.shape)):
        raise Refused("shape", m.shape, "must be (channels, height, width)")
    if m.shape[1] != m.shape[2]:
        raise Refused("shape", m.shape, "must be square")
    if m.posterior and m.shape[0] % 2:
        raise Refused("shape", m.shape, "must have means and deviations: 2C channels")
    if m.dtype == "uint8" and (m.posterior or m.shape[0] not in (1, 3)):
        raise Refused("shape", m.shape, "of uint8 must be pixels: 1 or 3 channels, without a posterior")
    for name, factor in {"scale": m.scale, "shift": m.shift}.items():
        numbers = factor if isinstance(factor, tuple) else (factor,)
        # A NaN fails the comparison.
        if len(numbers) not in (1, m.channels) or not all(abs(number) <= _LARGEST for number in numbers):
            raise Refused(name, factor, f"must be a number, or one for each of {m.channels} channels")
        if name == "scale" and 0 in numbers:
            raise Refused(name, factor, "must not be 0")


def _check_files(m: Manifest) -> None:
    for shard in m.shards:
        if not _is_positive(shard.rows):
            raise Refused("shards", shard.rows, "must be a positive number of rows")
        if bool(shard.flip) != m.flips:
            raise Refused("shards", shard.flip, "all shards must have mirrored rows, or none")
    rows = sum(shard.rows for shard in m.shards)
    if m.count != rows or not rows:
        raise Refused("count", m.count, f"must be positive and the sum of the shards' rows, {rows}")
    seen: set[str] = set()
    for file in (name for shard in m.shards for name in (shard.file, shard.labels, *filter(None, [shard.flip]))):
        if file != Path(file).name or file in ("", ".."):
            raise Refused("shards", file, "must be the name of a file beside the manifest")
        if file in seen:
            raise Refused("shards", file, "is named twice")
        seen.add(file)


def _is_positive(value: object) -> bool:
    return type(value) is int and value > 0
