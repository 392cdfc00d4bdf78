"""How fast training data come: packed latents against the public loader, and decoding by DALI against Pillow.

    python -m benchmarks.bench_data                         JPEGs of ImageNet's sizes are made up
    python -m benchmarks.bench_data --jpegs DIR             all .jpg and .JPEG files below a folder
    python -m benchmarks.bench_data --vae DIR_OR_ID         and the rate of a VAE's encoder

Images per second of wall time, and per second of CPU time of the process and its workers: beside a GPU, loaders share
the cores with all else that the host does. A sample is one epoch or several; candidates take turns; everything is in
the page cache. The public loader, one .npy file a sample under a torch DataLoader, starts its workers anew in every
epoch, as it does in the public code; a real epoch does not notice their start: compare with 0 workers.

No loader gets a number unless it delivers the reference's rows, and no decoder whose pixels are off by more than 0.5
levels in the mean, or 1.0 for an image.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import resource
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from benchmarks import options, timing
from benchmarks.record import digits, markdown
from benchmarks.timing import GateFailed, Samples
from sra_fast.config import DataConfig, Refused
from sra_fast.data import order
from sra_fast.data.images import PillowDecoder, decode_with_pillow, open_decoder
from sra_fast.data.latent_stream import LatentStream
from sra_fast.data.latents import Rows, open_moments
from sra_fast.data.manifest import NAME, Manifest, Shard
from sra_fast.vae import open_vae

WORKERS = (0, 1, 2)
SHAPE = (8, 32, 32)  # of SD's moments at 256 pixels
SHARD = 4096  # rows, as `sra-fast prepare` makes them
MOST_OFF = {"set": 0.5, "image": 1.0}  # grey levels of 255, in the mean
SIDES = ((500, 375), (375, 500), (500, 333), (500, 375), (640, 480), (333, 500), (400, 300), (1200, 900))
GOALS = {  # of the best of ours over the best rival
    ("latents", "images_per_cpu_s"): 20.0,
    ("decode", "images_per_cpu_s"): 1.0,
    ("decode on a GPU", "images_per_s"): 1.5,
}


class Candidate(NamedTuple):
    """Something that delivers images."""

    run: Callable[[], int]
    """Deliver some, and return how many."""
    ours: bool
    params: dict[str, Any]


class Taken(NamedTuple):
    """One sample."""

    images: int
    wall_s: float
    cpu_s: float


def cpu_s() -> float:
    """CPU time of this process so far, and of its children that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(part.ru_utime + part.ru_stime for part in used)


def measure(candidates: dict[str, Candidate], repeats: int, device: torch.device) -> dict[str, list[Taken]]:
    """Samples of every candidate after one to warm up; in turns, starting each round with the next one."""

    def sample(run: Callable[[], int]) -> Taken:
        wall, cpu = time.perf_counter(), cpu_s()
        images = run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return Taken(images, time.perf_counter() - wall, cpu_s() - cpu)

    names, taken = list(candidates), {name: [] for name in candidates}
    for name in names:
        sample(candidates[name].run)
    for _ in range(repeats):
        for name in names:
            taken[name].append(sample(candidates[name].run))
        names = names[1:] + names[:1]
    return taken


def rows(name: str, candidates: dict[str, Candidate], chosen: Any, device: torch.device, bytes_each: int) -> list:
    """Rows of measured candidates: times of a batch, and images per second of either clock."""
    taken, stamp = measure(candidates, chosen.repeats, device), timing.stamp(device)
    for path in filter(None, (chosen.jpegs, chosen.vae)):  # places on this machine
        stamp["command"] = stamp["command"].replace(str(path), "DIR")
    made = []
    for loader, samples in taken.items():
        params = {"loader": loader, **candidates[loader].params}
        ms = tuple(1e3 * one.wall_s / one.images * params["batch"] for one in samples)
        cpu_ms = [1e3 * one.cpu_s / one.images * params["batch"] for one in samples]
        row = timing.row(name, params, Samples(ms, ms), stamp=stamp, bytes=bytes_each * params["batch"])
        row |= {"images_per_s": 1e3 * params["batch"] / float(np.median(ms)), "cpu_samples_ms": cpu_ms}
        row |= {"images_per_cpu_s": 1e3 * params["batch"] / float(np.median(cpu_ms)), "ours": candidates[loader].ours}
        made.append(row)
    return made


# Latents


class PublicFiles(Dataset):
    """The public SRA code's data set, written anew: names from a walk, labels from dataset.json, np.load of a file a
    sample."""

    def __init__(self, root: Path) -> None:
        self.root = str(root / "vae-sd")
        found = [os.path.join(folder, name) for folder, _, names in os.walk(self.root) for name in names]
        self.names = sorted(os.path.relpath(path, self.root) for path in found if path.endswith(".npy"))
        with open(os.path.join(self.root, "dataset.json"), "rb") as file:
            labels = dict(json.load(file)["labels"])
        self.labels = np.array([labels[name.replace("\\", "/")] for name in self.names], dtype=np.int64)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
        with open(os.path.join(self.root, self.names[row]), "rb") as file:
            moments = np.load(file)
        return torch.from_numpy(moments), torch.tensor(self.labels[row])


def write_sets(root: Path, count: int) -> None:
    """The same moments in root/packed and root/public: float16 values, which float32 holds too."""
    generator, classes, shards, pairs = np.random.default_rng(0), 1000, [], []
    (root / "packed").mkdir(parents=True)
    for number, first in enumerate(range(0, count, SHARD)):
        size = min(SHARD, count - first)
        moments = generator.standard_normal((size, *SHAPE), dtype=np.float32).astype(np.float16)
        labels = np.arange(first, first + size) % min(classes, count)
        files = [f"{kind}-{number:05d}.npy" for kind in ("moments", "labels")]
        for name, values in zip(files, (moments, labels), strict=True):
            np.save(root / "packed" / name, values)
        shards.append(Shard(files[0], size, "", files[1], ""))
        for row, (one, label) in enumerate(zip(moments.astype(np.float32), labels.tolist(), strict=True), start=first):
            pairs.append([f"{row // 1000:05d}/img-mean-std-{row:08d}.npy", label])
            path = root / "public" / "vae-sd" / pairs[-1][0]
            path.parent.mkdir(parents=True, exist_ok=True)
            np.save(path, one)
    (root / "public" / "vae-sd" / "dataset.json").write_text(json.dumps({"labels": pairs}))
    names = tuple(f"{label}" for label in range(min(classes, count)))
    facts = {"posterior": True, "scale": 0.18215, "shift": 0.0, "vae": "", "crop": "adm", "resolution": 256}
    manifest = Manifest(count, names, SHAPE, "float16", **facts, shards=tuple(shards))
    (root / "packed" / NAME).write_text(json.dumps(asdict(manifest)))


def same_rows(name: str, delivered: Iterator, reference: Iterator, count: int) -> None:
    """Raise `GateFailed` unless two loaders deliver equal rows and labels, batch by batch."""
    for batch in range(count):
        (x, labels), (right, right_labels) = next(delivered)[:2], next(reference)[:2]
        if not (torch.equal(x.float(), right.float()) and torch.equal(labels, right_labels)):
            raise GateFailed(f"{name}: batch {batch} has other rows than the reference")


def bench_latents(chosen: Any, folder: Path) -> list:
    """Rows of all loaders of latents."""
    write_sets(folder, chosen.rows)
    batch, steps = chosen.batch, chosen.rows // chosen.batch
    public = PublicFiles(folder / "public")
    known = np.arange(chosen.rows)
    with ExitStack() as stack:

        def stream(kind: str) -> LatentStream:
            moments = open_moments(folder / kind)
            return stack.enter_context(LatentStream(Rows(moments, known), seed=0, batch=batch, first_image=0))

        def loader(workers: int, **sampling: Any) -> DataLoader:
            return DataLoader(public, batch, num_workers=workers, drop_last=True, **sampling)

        def epochs(batches: Any, count: int) -> int:
            return sum(len(labels) for _, (_, labels, *_) in zip(range(count), batches, strict=False))

        in_order = order.rows(0, 0, steps * batch, chosen.rows).tolist()
        for kind in ("packed", "public"):
            same_rows(f"ours, {kind}", stream(kind), iter(loader(0, sampler=in_order)), steps)
        for workers in WORKERS[1:]:
            same_rows(f"public, {workers} workers", iter(loader(workers, sampler=in_order)), stream("packed"), steps)
        ours, files = stream("packed"), stream("public")
        found = {
            "ours, packed": Candidate(lambda: epochs(ours, 8 * steps), True, {"batch": batch}),
            "ours, public files": Candidate(lambda: epochs(files, steps), True, {"batch": batch}),
        }
        for workers in WORKERS:
            shuffled = loader(workers, shuffle=True)
            found[f"public, {workers} workers"] = Candidate(
                lambda shuffled=shuffled: epochs(shuffled, steps), False, {"batch": batch}
            )
        found = {name: one._replace(params={**one.params, "rows": chosen.rows}) for name, one in found.items()}
        return rows("latents", found, chosen, torch.device("cpu"), int(np.prod(SHAPE)) * 2)


# Images


class JpegFiles(Dataset):
    """Files decoded by Pillow, as data sets of torchvision are; `passes` times over."""

    def __init__(self, files: Sequence[Path], data: DataConfig, passes: int) -> None:
        self.files, self.data, self.passes = list(files), data, passes

    def __len__(self) -> int:
        return len(self.files) * self.passes

    def __getitem__(self, index: int) -> Tensor:
        return torch.from_numpy(decode_with_pillow(self.files[index % len(self.files)].read_bytes(), self.data).copy())


def write_jpegs(root: Path, count: int, shrunk: int = 1) -> list[Path]:
    """Pictures with smooth parts, edges and noise, in ImageNet's usual sizes; `shrunk`: sides divided by it."""
    root.mkdir(parents=True, exist_ok=True)
    paths, generator = [], np.random.default_rng(0)
    for number in range(count):
        width, height = (side // shrunk for side in SIDES[number % len(SIDES)])
        y, x = np.mgrid[0:height, 0:width] / max(width, height)
        a, b, c, d = generator.uniform(2, 12, (4, 3, 1, 1))
        planes = 128 + 60 * np.sin(a * x + b * y) + 40 * np.sign(np.sin(c * x - d * y))
        planes += generator.normal(0, 6, planes.shape)
        buffer = io.BytesIO()
        Image.fromarray(planes.clip(0, 255).astype(np.uint8).transpose(1, 2, 0)).save(buffer, "JPEG", quality=90)
        paths.append(root / f"{number:05d}.jpg")
        paths[-1].write_bytes(buffer.getvalue())
    return paths


def same_pixels(name: str, x: Tensor, reference: Tensor) -> float:
    """The mean difference, (N, C, H, W) in [-1, 1], in grey levels. Raises `GateFailed` where it is too large."""
    off = (x - reference).abs().mean((1, 2, 3)) * 127.5
    worst, mean = float(off.max()), float(off.mean())
    if not (worst <= MOST_OFF["image"] and mean <= MOST_OFF["set"]):
        raise GateFailed(f"{name}: pixels are off by {mean:.2f} levels in the mean and {worst:.2f} for an image")
    return mean


def bench_decoding(chosen: Any, files: Sequence[Path], device: torch.device) -> list:
    """Rows of all decoders that are installed, with output on the device."""
    data = DataConfig(resolution=chosen.resolution, channels=3)
    batch, parts = chosen.decode_batch, [*range(0, len(files), chosen.decode_batch)]
    pillow = PillowDecoder(data, device)
    decoders = {}
    try:
        for threads in sorted({1, pillow.threads}):
            dali = open_decoder(replace(data, reader="dali", threads=threads), device)
            decoders[f"ours, DALI, {threads} threads"] = dali
    except Refused as error:
        print(f"DALI not run: {error}")
    decoders[f"ours, Pillow, {pillow.threads} threads"] = pillow

    def read(first: int) -> list[bytes]:
        return [path.read_bytes() for path in files[first : first + batch]]

    def decode(decoder: Any) -> int:
        for _ in range(chosen.passes):
            for first in parts:
                decoder.decode(read(first))
        return chosen.passes * len(files)

    def iterate(loader: DataLoader) -> int:
        return sum(len(x.to(device).float().div_(127.5).sub_(1)) for x in loader)

    right = torch.cat([pillow.decode(read(first)).cpu() for first in parts])
    params = {"files": len(files), "made_up": not chosen.jpegs, "resolution": data.resolution, "batch": batch}
    found = {}
    for name, decoder in decoders.items():
        off = same_pixels(name, torch.cat([decoder.decode(read(first)).cpu() for first in parts]), right)
        found[name] = Candidate(lambda decoder=decoder: decode(decoder), True, {**params, "levels_off": round(off, 3)})
    rival = JpegFiles(files, data, chosen.passes)
    unchanged = torch.stack([rival[index] for index in range(len(files))]).float().div_(127.5).sub_(1)
    same_pixels("Pillow under DataLoader", unchanged, right)
    for workers in WORKERS:
        loader = DataLoader(rival, batch, num_workers=workers, pin_memory=device.type == "cuda")
        found[f"Pillow, DataLoader, {workers} workers"] = Candidate(
            lambda loader=loader: iterate(loader), False, params
        )
    size = sum(path.stat().st_size for path in files) // len(files)
    return rows("decode on a GPU" if device.type == "cuda" else "decode", found, chosen, device, size)


def bench_encoding(chosen: Any, device: torch.device) -> list:
    """The row of a VAE's encoder."""
    gpu = device.type == "cuda"
    vae = open_vae(chosen.vae, device, torch.bfloat16 if gpu else torch.float32)
    x = torch.rand(chosen.decode_batch if gpu else 4, 3, chosen.resolution, chosen.resolution, device=device) * 2 - 1

    def encode() -> int:
        vae.encode(x)
        return len(x)

    params = {"resolution": chosen.resolution, "batch": len(x), "dtype": "bf16" if gpu else "fp32"}
    return rows("encode", {vae.kind: Candidate(encode, True, params)}, chosen, device, x[0].numel() * 4)


# The report


def report(made: Sequence[dict[str, Any]]) -> str:
    """A table of one kind of rows, and whether the best of ours reaches the goal, by either clock."""
    head = ("loader", "images/s", "images/CPU-s", "x best rival", "ms a batch", "p20 ... p80")
    best = max((row["images_per_cpu_s"] for row in made if not row["ours"]), default=None)
    lines = [
        [
            row["params"]["loader"],
            digits(row["images_per_s"]),
            digits(row["images_per_cpu_s"]),
            f"{row['images_per_cpu_s'] / best:.2f}" if best else "",
            digits(row["median_ms"]),
            f"{digits(row['p20_ms'])} ... {digits(row['p80_ms'])}",
        ]
        for row in made
    ]
    text = f"{made[0]['name']}\n\n{markdown(head, lines)}\n"
    for clock in ("images_per_cpu_s", "images_per_s") if best else ():
        mine = max((row for row in made if row["ours"]), key=lambda row: row[clock])
        ratio = mine[clock] / max(row[clock] for row in made if not row["ours"])
        text += f"\n{clock}: {mine['params']['loader']} {ratio:.2f} x the best rival"
        if goal := GOALS.get((made[0]["name"], clock)):
            text += f"; goal {goal:g}: {'reached' if ratio >= goal else 'missed'}"
    return text + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """The program. Returns its exit code: 1 if a gate failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_data", description=__doc__.splitlines()[0])
    parser.add_argument("--jpegs", type=Path, help="folder of JPEG files; default: some are made")
    parser.add_argument("--vae", help="also measure this VAE's encoder: a folder or an id on the hub")
    parser.add_argument("--rows", type=options.positive, default=8192, help="of the generated latents")
    parser.add_argument("--batch", type=options.positive, default=256, help="of latents")
    parser.add_argument("--resolution", type=options.positive, default=256, help="of decoded images")
    parser.add_argument("--decode-batch", type=options.positive, default=32)
    parser.add_argument("--passes", type=options.positive, default=3, help="over the JPEGs in a sample")
    parser.add_argument("--repeats", type=options.positive, default=7, help="samples of each")
    parser.add_argument("--device", type=options.device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that all works; nothing is written")
    chosen = parser.parse_args(arguments)
    made_up, shrunk = 96, 1
    if chosen.quick:
        chosen.rows, chosen.batch, chosen.resolution, chosen.repeats, chosen.passes = 96, 16, 64, 2, 1
        chosen.decode_batch, made_up, shrunk = 4, 8, 4
    if chosen.rows < chosen.batch:
        parser.error(f"--rows: {chosen.rows} given; must be at least --batch, {chosen.batch}")
    made, device = [], chosen.device
    with tempfile.TemporaryDirectory() as name:
        if chosen.jpegs:
            files = sorted(path for path in chosen.jpegs.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))
            if not files:
                parser.error(f"--jpegs: {str(chosen.jpegs)!r} given; has no .jpg or .jpeg files")
        else:
            files = write_jpegs(Path(name) / "jpegs", made_up, shrunk)
        try:
            made += bench_latents(chosen, Path(name) / "latents")
            made += bench_decoding(chosen, files, torch.device("cpu"))
            if device.type == "cuda":
                made += bench_decoding(chosen, files, device)
            if chosen.vae:
                made += bench_encoding(chosen, device)
        except (GateFailed, Refused) as failure:
            print(f"no number: {failure}")
            return 1
    for kind in dict.fromkeys(row["name"] for row in made):
        print(report([row for row in made if row["name"] == kind]))
    if not chosen.quick or "SRA_FAST_RESULTS" in os.environ:
        stamp = timing.stamp(device) | {"command": made[0]["command"]}
        path = timing.write(timing.folder(stamp), "data-jpegs" if chosen.jpegs else "data", made, stamp)
        print(f"raw samples in {path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
