"""Damaged files of every format that is read, from a seeded mutator: a command that reads one ends with the right
result or with one line, and never with another result where the format has checksums.
"""

from __future__ import annotations

import io
import json
import random
import shutil
import struct
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import small_data
from small_data import config, jpeg, pack, prepare_without_manifest, publish, save_kl, write_jpegs
from small_faults import SCALE, SEED, Outcome, Server, named
from small_run import arguments, content, write_images
from test_archives import write_tar

pytestmark = pytest.mark.slow

TRIALS = 15  # of each case
NASTY = [
    *(None, True, False, 0, -1, 1, 10**30, 2**63, -(2**63), 1e308, 5e-324, float("nan"), float("inf"), 0.5, -0.0),
    *("", " ", "x" * 5000, "../../../etc/passwd", "/dev/zero", "\0", "\ud800", "\x1b[31m", "nan", "1", "é"),
    *([], {}, [[]], [None], {"": 0}, [0] * 1000),
]


# Damage


def damaged(content: bytes, name: str, rng: random.Random) -> bytes:
    """The content of a file, damaged in a way that its format invites."""
    kind = Path(name).suffix
    if rng.random() < 0.5:
        if kind == ".json":
            return _json(content, rng)
        if kind == ".jsonl":
            lines = content.splitlines(keepends=True)
            place = rng.randrange(len(lines))
            return b"".join([*lines[:place], _json(lines[place], rng) + b"\n", *lines[place + 1 :]])
        if kind == ".safetensors":
            (size,) = struct.unpack("<Q", content[:8])
            header = _json(content[8 : 8 + size], rng)
            return struct.pack("<Q", len(header)) + header + content[8 + size :]
        if kind == ".pt":
            return _zip(content, rng)
        if kind == ".tar":
            return _tar(content, rng)
    return _bytes(content, rng)


def _bytes(content: bytes, rng: random.Random) -> bytes:
    """Bits, bytes, pages and pieces: changed, lost, inserted, doubled, swapped."""
    size = len(content)
    first = rng.randrange(
        min(size, 400) if rng.random() < 0.5 else size
    )  # headers are short, and most is decided there
    last = min(size, first + rng.choice((1, 2, 8, 100, 4096)))
    head, piece, tail = content[:first], content[first:last], content[last:]
    ways: list[Callable[[], bytes]] = [
        lambda: head + bytes([piece[0] ^ (1 << rng.randrange(8))]) + content[first + 1 :],
        lambda: head + bytes([piece[0] ^ (1 << rng.randrange(8))]) + content[first + 1 :],
        lambda: head + rng.randbytes(len(piece)) + tail,
        lambda: head + bytes(len(piece)) + tail,
        lambda: head + b"\xff" * len(piece) + tail,
        lambda: head,
        lambda: head + tail,
        lambda: head + piece + piece + tail,
        lambda: head + rng.randbytes(len(piece)) + piece + tail,
        lambda: tail + piece + head,
        lambda: content + rng.randbytes(10),
        lambda: b"",
    ]
    return rng.choice(ways)()


def _json(content: bytes, rng: random.Random) -> bytes:
    """Another value, name or number of entries somewhere; or text that is deep, long or no JSON."""
    if rng.random() < 0.1:
        return rng.choice(
            (b"[" * 200_000, b"1" * 6000, b"{}", b"null", b"\xef\xbb\xbf" + content, b"{" + content, b"[NaN]")
        )
    value = json.loads(content)
    holder: Any = [value]
    place: Any = 0
    while isinstance(holder[place], dict | list) and holder[place] and rng.random() < 0.9:
        holder = holder[place]
        place = rng.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
    way = rng.randrange(5)
    if way == 0 and isinstance(holder, dict):
        del holder[place]
    elif way == 1 and isinstance(holder, dict):
        holder[rng.choice(("", "x", place.upper(), place + " "))] = holder.pop(place)
    elif way == 2 and isinstance(holder[place], int | float) and not isinstance(holder[place], bool):
        holder[place] = rng.choice((holder[place] + 1, -holder[place], holder[place] * 10**9, float(holder[place])))
    elif way == 3 and isinstance(holder, list):
        holder.insert(place, holder[place])
    else:
        holder[place] = rng.choice(NASTY)
    return json.dumps(value if isinstance(value, dict | list) else holder[0]).encode()


def _zip(content: bytes, rng: random.Random) -> bytes:
    """A member damaged, under a checksum that is right."""
    source, result = zipfile.ZipFile(io.BytesIO(content)), io.BytesIO()
    names = source.namelist()
    victim = rng.choice(names) if rng.random() < 0.3 else next(name for name in names if name.endswith("data.pkl"))
    with zipfile.ZipFile(result, "w") as archive:
        for name in names:
            member = source.read(name)
            archive.writestr(name, _bytes(member, rng) if name == victim and member else member)
    return result.getvalue()


def _tar(content: bytes, rng: random.Random) -> bytes:
    """A field of a member's header, under a checksum that is right."""
    headers = [at for at in range(0, len(content), 512) if content[at + 257 : at + 262] == b"ustar"]
    at = rng.choice(headers)
    first, length = rng.choice(((0, 100), (100, 8), (124, 12), (136, 12), (156, 1), (157, 100), (345, 155)))
    values = (rng.randbytes(length), b"7" * length, bytes(length), b"\x80".ljust(length, b"\x01"), b"-1".ljust(length))
    header = bytearray(content[at : at + 512])
    kind = rng.choice(b"xgLKSV1256").to_bytes() * length
    header[first : first + length] = rng.choice((*values, kind))[:length]
    header[148:156] = b"%06o\0 " % (sum(header[:148]) + 8 * 32 + sum(header[156:]))
    return content[:at] + bytes(header) + content[at + 512 :]


# What reads it


@dataclass(frozen=True)
class Case:
    """A command, and files that it reads."""

    files: Sequence[Path]
    words: Sequence[object]
    check: Callable[[Outcome], object] = lambda outcome: None
    """Fails if the outcome is not allowed; may look at what was written."""
    root: Path = Path()
    """Restored before each trial; if it is not given, only the damaged file is."""


def one_result(expected: object, result: Callable[[], object]) -> Callable[[Outcome], None]:
    """A check that only the result of the intact files passes with exit code 0."""

    def check(outcome: Outcome) -> None:
        assert outcome.code == 1 or result() == expected

    return check


def refused(outcome: Outcome) -> None:
    assert outcome.code == 1


def finished(outcome: Outcome) -> None:
    assert outcome.code == 0


def resumed(server: Server, root: Path, files: str, may_be_refused: bool = True) -> Case:
    """A run of 48 images, continued from 24."""
    write_images(root / "data")
    words = arguments(root, train__images=48, train__save_every_images=24)
    assert server.run(words).check().code == 0
    folder = root / "runs/a"
    last = folder / "checkpoints/000000000048"
    expected = content(last)
    shutil.rmtree(last)
    (folder / "summary.json").unlink()
    compare = one_result(expected, lambda: content(last))

    def check(outcome: Outcome) -> None:
        assert may_be_refused or outcome.code == 0
        compare(outcome)

    return Case(sorted(folder.glob(files)), words, check, root)


def sampled(server: Server, root: Path, files: str, *options: object, same: bool = False) -> Case:
    """A run's samples."""
    write_images(root / "data")
    assert server.run(arguments(root, train__images=16)).check().code == 0
    out = root / "out"
    words = ["sample", "--weights", root / "runs/a", "--out", out, "--sample.count", 2, "--no-images", *options]
    assert server.run(words).check().code == 0
    expected = (out / "samples.npz").read_bytes()
    if not same:
        return Case(sorted(root.glob(files)), words, root=root)
    return Case(sorted(root.glob(files)), words, one_result(expected, (out / "samples.npz").read_bytes), root)


def exported(server: Server, root: Path, suffix: str) -> Case:
    write_images(root / "data")
    assert server.run(arguments(root, train__images=16)).check().code == 0
    path = root / f"weights{suffix}"
    assert server.run(["export", "--weights", root / "runs/a", "--out", path]).check().code == 0
    words = [
        "sample",
        "--weights",
        path,
        "--out",
        root / "out",
        "--sample.count",
        1,
        "--sample.steps",
        2,
        "--overwrite",
    ]
    return Case([path], words)


def packed(server: Server, root: Path, files: str, check: Callable[[Outcome], object]) -> Case:
    pack(root / "set")
    words = ["inspect", root / "set", "--images", 0, "--json", root / "report.json"]
    return Case(sorted((root / "set").glob(files)), words, check)


def trained_on_latents(server: Server, root: Path, files: str) -> Case:
    pack(root / "set")
    words = arguments(root, data__images="", data__latents=str(root / "set"), train__images=16)
    return Case(sorted((root / "set").glob(files)), words, root=root)


def latents_sampled(server: Server, root: Path) -> Case:
    case = trained_on_latents(server, root, "manifest.json")
    assert server.run(case.words).check().code == 0
    run = root / "runs/a"
    words = ["sample", "--weights", run, "--out", root / "out", "--latents", "--sample.count", 1, "--overwrite"]
    return Case([run / "latents.json"], words)


def public(server: Server, root: Path, files: str, command: str) -> Case:
    publish(root / "public", count=12)
    out = root / "out"
    words = ["prepare", "--from-public", root / "public", "--out", out]
    if command == "inspect":
        words = ["inspect", root / "public", "--images", 0]
    return Case(sorted((root / "public/vae-sd").glob(files)), words, root=root)


def images(server: Server, root: Path, png: bool, reader: str) -> Case:
    """A folder of which one file is damaged: it is left out, or decoded."""
    if png:
        write_images(root / "images", count=12, classes=3)
    else:
        write_jpegs(root / "images", count=12, extra={"progressive.jpg": jpeg(5, 40, 30, progressive=True)})
    words = small_data.words(config(root / "images", root / "out", reader=reader))
    return Case(sorted((root / "images").rglob("*.*g")), words, finished, root)


def archive(server: Server, root: Path, format: int) -> Case:
    members = {}
    for index in range(8):
        members |= {
            f"{'x' * 120}{index:03d}.jpg": jpeg(index),
            f"{'x' * 120}{index:03d}.json": b'{"label": %d}' % (index % 3),
        }
    path = write_tar(root / "tars/a.tar", members, format=format)
    return Case([path], small_data.words(config(root / "tars", root / "out")), root=root)


def begun(server: Server, root: Path) -> Case:
    """A packed set whose process was killed before the manifest."""
    write_jpegs(root / "images")
    command = config(root / "images", root / "out")
    prepare_without_manifest(command)
    words = small_data.words(command)
    saved = shutil.copytree(root / "out", root / "saved")
    assert server.run(words).check().code == 0

    def rows() -> dict[str, bytes]:
        return {name: file for name, file in small_data.content(root / "out").items() if name != "prepare.json"}

    expected = rows()
    shutil.rmtree(root / "out")
    saved.rename(root / "out")
    files = sorted(path for path in (root / "out").iterdir() if path.stat().st_size)
    return Case(files, words, one_result(expected, rows), root)


def vae(server: Server, root: Path) -> Case:
    save_kl(root / "vae")
    write_jpegs(root / "images", count=4)
    words = small_data.words(config(root / "images", root / "out", vae=str(root / "vae")))
    return Case(sorted((root / "vae").iterdir()), words, root=root)


CASES: dict[str, Callable[[Server, Path], Case]] = {
    "tensors of a checkpoint, resumed": lambda s, root: resumed(s, root, "checkpoints/*/*.safetensors"),
    "state.json, resumed": lambda s, root: resumed(s, root, "checkpoints/*/state.json"),
    "metrics.jsonl, resumed": lambda s, root: resumed(s, root, "metrics.jsonl", may_be_refused=False),
    "config.json and classes.json, resumed": lambda s, root: resumed(s, root, "c*.json", may_be_refused=False),
    "EMA of a checkpoint, sampled": lambda s, root: sampled(s, root, "runs/a/checkpoints/*/ema.*", same=True),
    "config.json, sampled": lambda s, root: sampled(s, root, "runs/a/config.json"),
    "classes.json, sampled": lambda s, root: sampled(s, root, "runs/a/classes.json", "--classes", "c1"),
    "samples.json, sampled again": lambda s, root: sampled(s, root, "out/samples.json"),
    "exported safetensors": lambda s, root: exported(s, root, ".safetensors"),
    "exported .pt": lambda s, root: exported(s, root, ".pt"),
    "manifest.json, inspected": lambda s, root: packed(s, root, "manifest.json", lambda outcome: None),
    "rows and labels, inspected": lambda s, root: packed(s, root, "*.npy", refused),
    "a packed set, trained on": lambda s, root: trained_on_latents(s, root, "*"),
    "latents.json, sampled": latents_sampled,
    "dataset.json, prepared": lambda s, root: public(s, root, "dataset.json", "prepare"),
    "public rows, prepared": lambda s, root: public(s, root, "*/*.npy", "prepare"),
    "public set, inspected": lambda s, root: public(s, root, "**/*.*", "inspect"),
    "PNG by Pillow": lambda s, root: images(s, root, True, "pillow"),
    "JPEG by Pillow": lambda s, root: images(s, root, False, "pillow"),
    "JPEG by DALI": lambda s, root: images(s, root, False, "dali"),
    "ustar and pax archives": lambda s, root: archive(s, root, 2),
    "GNU archives": lambda s, root: archive(s, root, 1),
    "a set that is half prepared": begun,
    "VAE": vae,
}


@pytest.mark.parametrize("name", CASES)
def test_damage_gives_one_line_or_the_right_result(server, tmp_path, name):
    if "DALI" in name:
        pytest.importorskip("nvidia.dali")
    root = tmp_path / "root"
    root.mkdir()
    case = CASES[name](server, root)
    assert case.files
    intact = {path: path.read_bytes() for path in case.files}
    backup = shutil.copytree(root, tmp_path / "backup") if case.root != Path() else None
    for trial in range(round(TRIALS * SCALE)):
        rng = random.Random(f"{SEED} {name} {trial}")
        path = rng.choice(case.files)
        content = damaged(intact[path], path.name, rng)
        if content == intact[path]:
            continue
        if backup:
            shutil.rmtree(root)
            shutil.copytree(backup, root)
        path.write_bytes(content)
        kept = tmp_path / f"damaged-{path.name}"
        kept.write_bytes(content)
        with named(f"{name}, trial {trial}: {path.relative_to(root)}, kept as {kept}"):
            case.check(server.run(case.words).check())
        path.write_bytes(intact[path])
