"""What a packed data set says of itself: manifest.json.

    manifest.json            count, classes, shape and dtype of a row, what numbers these are, shards, what was left out
    moments-00000.npy        (n, 2C, h, w) float16: means and standard deviations of a VAE's posterior; or (n, C, h, w)
                             float16: latents without a posterior; or (n, C, H, W) uint8: pixels
    moments_flip-00000.npy   the same of the mirrored images, where asked for
    labels-00000.npy         (n,) int64

A set without a manifest is one that is being made.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sra_fast.config import refuse_unless
from sra_fast.errors import Refused
from sra_fast.vae import Factor

NAME = "manifest.json"
SETTINGS = "prepare.json"  # what `sra-fast prepare` keeps beside a set, to go on with it or make it again
FORMAT_VERSION = 1
DTYPES = ("float16", "float32", "uint8")
_LARGEST = 3.4e38  # of float32, as which factors are applied; NaN is not below it


@dataclass(frozen=True)
class Shard:
    """Some consecutive rows."""

    file: str
    rows: int
    sha256: str
    labels: str
    labels_sha256: str
    flip: str = ""
    flip_sha256: str = ""

    def files(self) -> dict[str, str]:
        """{file: SHA-256 of its bytes}."""
        found = {self.file: self.sha256, self.labels: self.labels_sha256}
        return found | ({self.flip: self.flip_sha256} if self.flip else {})


@dataclass(frozen=True)
class Skipped:
    """An image that is not in the set."""

    file: str
    reason: str


@dataclass(frozen=True)
class Manifest:
    """A packed set. x of training = (z - shift) * scale, where z is a row, or with `posterior` a sample of
    N(mean, std^2) for its first and second half of channels."""

    count: int
    classes: tuple[str, ...]
    shape: tuple[int, int, int]
    """Of a row: (channels, height, width)."""
    dtype: str
    posterior: bool
    scale: Factor
    shift: Factor
    vae: str
    """Where the VAE came from: a folder, or an id on the Hugging Face hub; empty for pixels."""
    crop: str
    resolution: int
    """Side in pixels of the images."""
    shards: tuple[Shard, ...]
    skipped: tuple[Skipped, ...] = ()
    format_version: int = FORMAT_VERSION

    @property
    def channels(self) -> int:
        """Of x."""
        return self.shape[0] // 2 if self.posterior else self.shape[0]

    @property
    def flips(self) -> bool:
        """Whether there is a mirrored row for every row."""
        return bool(self.shards) and all(shard.flip for shard in self.shards)

    def size(self, root: Path) -> int:
        """Bytes of the shards' files that are in a folder."""
        files = [root / name for shard in self.shards for name in shard.files()]
        return sum(path.stat().st_size for path in files if path.is_file())

    def fingerprint(self) -> str:
        """SHA-256, in hex, of everything that makes a training run what it is: equal for equal rows, wherever they
        lie."""
        facts = (self.count, self.shape, self.dtype, self.posterior, self.scale, self.shift, len(self.classes))
        digest = hashlib.sha256(repr(facts).encode())
        for shard in self.shards:
            digest.update(f"{shard.rows} {shard.sha256} {shard.labels_sha256} {shard.flip_sha256}\n".encode())
        return digest.hexdigest()


def read_manifest(root: Path) -> Manifest:
    """The manifest of the set in a folder.

    Raises:
        Refused: if there is none, or it cannot be what it says: naming the file and the field.
    """
    path = root / NAME
    refuse_unless(root.is_dir(), "data.latents", str(root), "must be a folder that `sra-fast prepare` made")
    try:
        given = json.loads(path.read_text())
    except FileNotFoundError:
        begun = (root / SETTINGS).exists() or any(root.glob("*.npy"))
        unfinished = " (it is unfinished: run the same `sra-fast prepare` again)" if begun else ""
        raise Refused(f"data.latents: {str(root)!r} given; has no {NAME}{unfinished}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise Refused(f"{path}: cannot be read ({error})") from error
    try:
        return _manifest(given)
    except Refused as error:
        raise Refused(f"{path}: {error}") from None
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise Refused(f"{path}: is no manifest ({type(error).__name__}: {error})") from error


def _manifest(given: dict[str, Any]) -> Manifest:
    version = given["format_version"]
    refuse_unless(version == FORMAT_VERSION, "format_version", version, f"must be {FORMAT_VERSION}, which we read")
    fields = given | {
        "classes": tuple(given["classes"]),
        "shape": tuple(given["shape"]),
        "scale": _factor(given["scale"]),
        "shift": _factor(given["shift"]),
        "shards": tuple(Shard(**shard) for shard in given["shards"]),
        "skipped": tuple(Skipped(**file) for file in given["skipped"]),
    }
    made = Manifest(**fields)
    texts = {"vae": made.vae, "crop": made.crop, "classes": "".join(made.classes)}
    for name, value in texts.items():
        refuse_unless(type(value) is str, name, value, "must be text")
    refuse_unless(type(given["classes"]) is list, "classes", given["classes"], "must be a list of names")
    refuse_unless(type(made.posterior) is bool, "posterior", made.posterior, "must be true or false")
    positive = type(made.resolution) is int and made.resolution > 0
    refuse_unless(positive, "resolution", made.resolution, "must be a number of pixels")
    for shard in made.shards:
        refuse_unless(type(shard.rows) is int and shard.rows > 0, "shards", shard.rows, "must have rows, a number")
    rows = sum(shard.rows for shard in made.shards)
    refuse_unless(
        made.count == rows > 0, "count", made.count, f"must be the sum of the shards' rows, {rows}, and not 0"
    )
    refuse_unless(made.dtype in DTYPES, "dtype", made.dtype, f"must be one of {', '.join(DTYPES)}")
    good = len(made.shape) == 3 and all(type(n) is int and n > 0 for n in made.shape)
    refuse_unless(good, "shape", made.shape, "must be (channels, height, width)")
    refuse_unless(made.shape[1] == made.shape[2], "shape", made.shape, "must be square")
    refuse_unless(
        not made.posterior or made.shape[0] % 2 == 0, "shape", made.shape, "must have means and deviations: 2C channels"
    )
    pixels = made.dtype == "uint8"
    fits = not pixels or (made.shape[0] in (1, 3) and not made.posterior)
    refuse_unless(fits, "shape", made.shape, "of uint8 must be pixels: 1 or 3 channels, without a posterior")
    for name in ("scale", "shift"):
        factor = getattr(made, name)
        numbers = factor if isinstance(factor, tuple) else (factor,)
        good = all(abs(n) <= _LARGEST for n in numbers) and len(numbers) in (1, made.channels)
        refuse_unless(good, name, factor, f"must be a number, or one for each of {made.channels} channels")
        refuse_unless(name == "shift" or 0 not in numbers, name, factor, "must not be 0")
    seen: set[str] = set()
    for shard in made.shards:
        refuse_unless(bool(shard.flip) == made.flips, "shards", shard.flip, "must have mirrored rows all or none")
        for file in (shard.file, shard.labels, *([shard.flip] if shard.flip else [])):
            alone = file == Path(file).name and file not in ("", "..")
            refuse_unless(alone, "shards", file, "must be the name of a file beside the manifest")
            refuse_unless(file not in seen, "shards", file, "is named twice")
            seen.add(file)
    return made


def _factor(value: Any) -> Factor:
    return tuple(map(float, value)) if isinstance(value, list) else float(value)
