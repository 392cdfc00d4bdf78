"""Small data sets and VAEs for tests: image files, packed sets, the public layout, ways to prepare and read them."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from sra_fast.config import DataConfig, PrepareCommand
from sra_fast.data.decoders import decode_with_pillow
from sra_fast.data.manifest import read_manifest
from sra_fast.errors import Refused
from sra_fast.packing.prepare import prepare

CPU = torch.device("cpu")
SIDE = 16
SHARDS = (7, 30, 1, 42)  # rows
ROW = (8, 4, 4)  # four means, four deviations


def picture(seed: int, width: int = 24, height: int = 20) -> np.ndarray:
    """(H, W, 3) uint8 with smooth parts and some noise."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width] / 20
    planes = [128 + 60 * np.sin(a * x + b * y) + rng.normal(0, 8, x.shape) for a, b in rng.uniform(1, 6, (3, 2))]
    return np.stack(planes, -1).clip(0, 255).astype(np.uint8)


def jpeg(seed: int, width: int = 24, height: int = 20, mode: str = "RGB", **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture(seed, width, height)).convert(mode).save(buffer, "JPEG", quality=92, **options)
    return buffer.getvalue()


BAD = {"0cut.jpg": jpeg(8, 60, 50)[:700], "1empty.jpg": b"", "2text.png": b"not an image", "3zeros.jpg": bytes(900)}


def write_jpegs(root: Path, count: int = 40, classes: int = 3, extra: dict[str, bytes] | None = None) -> Path:
    """`count` JPEGs in class folders in turn, and extra {name: bytes} in c1."""
    files = {f"c{index % classes}/{index:03d}.jpg": jpeg(index + 100) for index in range(count)}
    for name, file in (files | {f"c1/{name}": file for name, file in (extra or {}).items()}).items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(file)
    return root


def pixels(file: bytes, exif: bool = False) -> np.ndarray:
    """(3, SIDE, SIDE) uint8, as `prepare` packs them."""
    return decode_with_pillow(file, DataConfig(resolution=SIDE, exif=exif))


# Running `prepare`


def config(images: Path | str, out: Path, **changes: object) -> PrepareCommand:
    """Options of a small set: pixels unless a vae or from_public is given, 16 images per shard."""
    fields = {"resolution": SIDE, "batch": 4, "rows_per_shard": 16, "reader": "pillow", "device": "cpu"} | changes
    if "vae" not in fields and "from_public" not in fields:
        fields["no_vae"] = True
    return PrepareCommand(images=str(images) if images else "", out=str(out), **fields)


def words(command: PrepareCommand) -> list[str]:
    """The same on the command line."""
    arguments = ["prepare"]
    for name, value in vars(command).items():
        if value is True:
            arguments.append(f"--{name.replace('_', '-')}")
        elif value not in (False, ""):
            arguments += [f"--{name.replace('_', '-')}", str(value)]
    return arguments


def content(folder: Path | str) -> dict[str, bytes]:
    """{name: bytes} of a folder."""
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def rows(out: Path, kind: str = "file") -> tuple[np.ndarray, np.ndarray]:
    """All rows ("file", or "flip" for mirrored ones) and labels of a set, checked against its manifest."""
    manifest = read_manifest(out)
    parts, labels = [], []
    for shard in manifest.shards:
        for name, sha256 in shard.files().items():
            assert hashlib.sha256((out / name).read_bytes()).hexdigest() == sha256
        parts.append(np.load(out / getattr(shard, kind)))
        labels.append(np.load(out / shard.labels))
        assert (parts[-1].shape, parts[-1].dtype) == ((shard.rows, *manifest.shape), manifest.dtype)
        assert (labels[-1].shape, labels[-1].dtype) == ((shard.rows,), np.int64)
    return np.concatenate(parts), np.concatenate(labels)


def refusal(function: Callable[..., object], *arguments: object) -> str:
    """The line with which a call refuses."""
    with pytest.raises(Refused) as refused:
        function(*arguments)
    assert "\n" not in str(refused.value)
    return str(refused.value)


class Killed(BaseException):
    """Stands for SIGKILL at a certain line."""


def kill(*_: object, **__: object) -> None:
    """Replaces a function, to end the process there."""
    raise Killed


def prepare_without_manifest(command: PrepareCommand) -> None:
    """Make all shards, but be killed before the manifest."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sra_fast.packing.prepare.assemble", kill)
        with pytest.raises(Killed):
            prepare(command)


def resident_kib() -> int:
    """Memory of this process."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1])


# Stored rows


class Stored(NamedTuple):
    """What was written, row by row."""

    root: Path
    rows: np.ndarray
    flips: np.ndarray
    labels: np.ndarray


def pack(
    root: Path,
    shards: Sequence[int] = SHARDS,
    shape: tuple[int, int, int] = ROW,
    dtype: str = "float16",
    classes: int = 4,
    flips: bool = False,
    seed: int = 0,
    **fields: object,
) -> Stored:
    """A packed set: means around 0, deviations around 0.5, or pixels whose brightness is their class. Row n has label
    n % classes; `fields` replace those of the manifest."""
    generator, count = np.random.default_rng(seed), sum(shards)
    labels = np.arange(count) % classes
    posterior = dtype != "uint8" and bool(fields.get("posterior", True))
    both = []
    for _ in range(2):
        values = generator.standard_normal((count, *shape))
        if posterior:
            values[:, shape[0] // 2 :] = 0.5 + 0.1 * np.abs(values[:, shape[0] // 2 :])
        if dtype == "uint8":
            values = 60 * labels[:, None, None, None] + generator.integers(0, 30, values.shape)
        both.append(values.astype(dtype))
    root.mkdir(parents=True, exist_ok=True)
    listed, first = [], 0
    for number, size in enumerate(shards):
        part, shard = slice(first, first + size), {"rows": size}
        arrays = {("file", "sha256"): ("moments", both[0]), ("labels", "labels_sha256"): ("labels", labels)}
        if flips:
            arrays["flip", "flip_sha256"] = "moments_flip", both[1]
        for (file, sha256), (kind, values) in arrays.items():
            shard[file] = f"{kind}-{number:05d}.npy"
            np.save(root / shard[file], values[part])
            shard[sha256] = hashlib.sha256((root / shard[file]).read_bytes()).hexdigest()
        listed.append(shard)
        first += size
    manifest = {
        "format_version": 1,
        "count": count,
        "classes": [f"c{label}" for label in range(classes)],
        "shape": list(shape),
        "dtype": dtype,
        "posterior": posterior,
        "scale": 1 / 127.5 if dtype == "uint8" else 0.9,
        "shift": 127.5 if dtype == "uint8" else 0.0,
        "vae": "",
        "crop": "adm",
        "resolution": 8 * shape[1],
        "shards": listed,
        "skipped": [],
    }
    (root / "manifest.json").write_text(json.dumps(manifest | fields))
    return Stored(root, *both, labels)


def change(root: Path, edit: Callable[[dict], object]) -> Path:
    """Edit a set's manifest. Returns its path."""
    path = root / "manifest.json"
    manifest = json.loads(path.read_text())
    edit(manifest)
    path.write_text(json.dumps(manifest))
    return path


def flip_bit(path: Path, place: int = -5) -> None:
    damaged = bytearray(path.read_bytes())
    damaged[place] ^= 4
    path.write_bytes(damaged)


def publish(root: Path, count: int = 24, shape: tuple[int, int, int] = ROW, leading: Iterable[int] = ()) -> Stored:
    """root/vae-sd in the public layout, float32, ten files per folder. The rows `leading` have shape (1, *shape)."""
    values = np.random.default_rng(3).standard_normal((count, *shape)).astype(np.float32)
    values[:, shape[0] // 2 :] = np.abs(values[:, shape[0] // 2 :])
    labels, pairs = np.arange(count) % 3, []
    for row in reversed(range(count)):
        name = f"{row // 10:05d}/img-mean-std-{row:08d}.npy"
        path = root / "vae-sd" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, values[row][None] if row in leading else values[row])
        pairs.append([name, int(labels[row])])
    (root / "vae-sd" / "dataset.json").write_text(json.dumps({"labels": pairs}))
    return Stored(root, values, values, labels)


# VAEs


def save_kl(root: Path, channels: int = 4, seed: int = 0, **config: object) -> Path:
    """An AutoencoderKL of a few thousand random weights that halves the sides twice."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(seed)
    model = diffusers.AutoencoderKL(
        block_out_channels=(8, 8, 16),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=4,
        **config,
    )
    model.save_pretrained(root)
    return root


def save_tiny(root: Path, **config: object) -> Path:
    """An AutoencoderTiny that halves the sides twice."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(1)
    model = diffusers.AutoencoderTiny(
        encoder_block_out_channels=(8, 8, 8),
        decoder_block_out_channels=(8, 8, 8),
        num_encoder_blocks=(1, 1, 1),
        num_decoder_blocks=(1, 1, 1),
        **config,
    )
    model.save_pretrained(root)
    return root


class StandInVae:
    """Decodes to grey images of twice the side, from z's first channel; keeps its inputs."""

    scale, shift = 0.5, 0.25

    def __init__(self, channels: int) -> None:
        self.channels, self.given = channels, []

    def decode(self, z: Tensor) -> Tensor:
        """(B, 3, 2h, 2w) of (B, C, h, w)."""
        self.given.append(z.clone())
        return torch.tanh(z[:, :1]).repeat(1, 3, 2, 2)


def stand_in(monkeypatch: pytest.MonkeyPatch, channels: int = 4) -> tuple[StandInVae, list[str]]:
    """Replace every VAE by a stand-in: (the stand-in, the names it was opened with)."""
    vae, names = StandInVae(channels), []
    monkeypatch.setattr("sra_fast.sampling.decoding.open_vae", lambda name, device, dtype: (names.append(name), vae)[1])
    return vae, names
