"""Small sets of real JPEG and PNG files, and ways to prepare them and to read what came of it."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sra_fast.config import DataConfig, PrepareCommand
from sra_fast.data.decoders import decode_with_pillow
from sra_fast.data.manifest import read_manifest
from sra_fast.errors import Refused
from sra_fast.packing.prepare import prepare

CPU = torch.device("cpu")
SIDE = 16


def picture(seed, width=24, height=20):
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width] / 20
    planes = [128 + 60 * np.sin(a * x + b * y) + rng.normal(0, 8, x.shape) for a, b in rng.uniform(1, 6, (3, 2))]
    return np.stack(planes, -1).clip(0, 255).astype(np.uint8)


def jpeg(seed, width=24, height=20, mode="RGB", **options):
    buffer = io.BytesIO()
    Image.fromarray(picture(seed, width, height)).convert(mode).save(buffer, "JPEG", quality=92, **options)
    return buffer.getvalue()


def png(image):
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def odd_files():
    """{name: bytes}: whole files of all the kinds that data sets hold."""
    exif = Image.Exif()
    exif[0x0112] = 6
    deep = np.linspace(0, 65535, 24 * 20).reshape(20, 24).astype(np.uint16)
    return {
        "cmyk.jpg": jpeg(1, mode="CMYK"),
        "deep.png": png(deep),
        "grey.jpg": jpeg(2, mode="L"),
        "halved.jpg": jpeg(3, 90, 70),
        "progressive.jpeg": jpeg(4, progressive=True),
        "really a png.jpg": png(picture(5)),
        "tiny.jpg": jpeg(6, 75, 56),
        "turned.jpg": jpeg(7, exif=exif),
    }


BAD = {"cut.jpg": jpeg(8, 60, 50)[:700], "empty.jpg": b"", "text.png": b"not an image", "zeros.jpg": bytes(900)}


def write_set(root, count=40, classes=3, extra=()):
    """`count` JPEGs in class folders by turns, and {name: bytes} of class c1."""
    for index in range(count):
        path = root / f"c{index % classes}" / f"{index:03d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(index + 100))
    for name, content in dict(extra).items():
        (root / "c1" / name).write_bytes(content)
    return root


def config(images, out, **changes):
    fields = {"resolution": SIDE, "batch": 4, "rows_per_shard": 16, "reader": "pillow", "device": "cpu"} | changes
    if "vae" not in fields and "from_public" not in fields:
        fields["no_vae"] = True
    return PrepareCommand(images=str(images) if images else "", out=str(out), **fields)


def words(config):
    """The same on the command line."""
    made = ["prepare"]
    for name, value in vars(config).items():
        if value is True:
            made.append(f"--{name.replace('_', '-')}")
        elif value not in (False, ""):
            made += [f"--{name.replace('_', '-')}", str(value)]
    return made


def content(out):
    """{name: bytes} of a folder."""
    return {path.name: path.read_bytes() for path in Path(out).iterdir()}


def rows(out, kind="moments"):
    """All rows of a set, with their labels, checked against its manifest."""
    manifest = read_manifest(Path(out))
    parts, labels = [], []
    for shard in manifest.shards:
        for name, sha256 in shard.files().items():
            assert hashlib.sha256((Path(out) / name).read_bytes()).hexdigest() == sha256
        parts.append(np.load(Path(out) / (shard.flip if kind == "flips" else shard.file)))
        labels.append(np.load(Path(out) / shard.labels))
        assert (parts[-1].shape, parts[-1].dtype) == ((shard.rows, *manifest.shape), manifest.dtype)
        assert (labels[-1].shape, labels[-1].dtype) == ((shard.rows,), np.int64)
    return np.concatenate(parts), np.concatenate(labels)


def resident_kib():
    """Memory that this process holds now."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1])


def pixels(file, exif=False):
    return decode_with_pillow(file, DataConfig(resolution=SIDE, exif=exif))


def write_images(root):
    """44 files, of which four cannot be decoded."""
    return write_set(root, extra={f"{index}{name}": content for index, (name, content) in enumerate(BAD.items())})


def refusal(given):
    """The line with which `prepare` refuses."""
    with pytest.raises(Refused) as refused:
        prepare(given)
    line = str(refused.value)
    assert "\n" not in line
    return line


class Killed(BaseException):
    """Stands for SIGKILL where it is to come at a certain line."""


def kill(*_, **__):
    """In place of a function: the process ends there."""
    raise Killed
