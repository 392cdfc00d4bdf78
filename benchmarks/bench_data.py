"""How fast training data arrive: packed latents against the public loader, our decoders against Pillow and DataLoader.

    python -m benchmarks.bench_data                         on generated JPEGs of ImageNet's sizes
    python -m benchmarks.bench_data --jpegs DIR             on all .jpg and .JPEG files below a folder
    python -m benchmarks.bench_data --vae DIR_OR_ID         also the rate of a VAE's encoder, on a GPU always measured

A sample is one epoch or several, from the page cache, by wall clock and by CPU time including workers: beside a GPU,
loaders share the cores with everything else the host does. The public loader starts its workers anew in every epoch, as
the public code does.

Gates: loaders of latents must deliver the same rows in the same order, and a decoder's pixels may differ from Pillow's
by 0.5 grey levels in the mean and 1.0 in one image.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shlex
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import islice, product
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from benchmarks.harness import options
from benchmarks.harness.rows import Row, folder, row, stamp, write
from benchmarks.harness.tables import show
from benchmarks.rivals.loaders import JpegFiles, PublicFiles
from sra_fast.config import DataConfig, PrepareCommand
from sra_fast.data import order
from sra_fast.data.decoders import open_decoder
from sra_fast.data.latent_stream import LatentStream
from sra_fast.data.packed import open_row_set
from sra_fast.data.rows import Rows
from sra_fast.errors import Refused
from sra_fast.packing.prepare import prepare
from sra_fast.tuning.timing import Call, CpuClock, GateFailed, Samples, measure
from sra_fast.vae import open_vae

SHAPE = (8, 32, 32)  # of the SD autoencoder's moments at 256 pixels
LOADER_WORKERS = (0, 1, 2)
THREADS = sorted({1, min(8, os.cpu_count() or 1)})
DECODER_WORKERS = sorted({0, *THREADS, 2})
READERS: dict[Literal["dali", "pillow"], str] = {"pillow": "Pillow", "dali": "DALI"}  # DALI may be missing
MAX_MEAN_DIFFERENCE, MAX_IMAGE_DIFFERENCE = 0.5, 1.0  # grey levels of 255
JPEG_SIZES = ((500, 375), (375, 500), (500, 333), (500, 375), (640, 480), (333, 500), (400, 300), (1200, 900))


@dataclass(frozen=True)
class Candidate:
    """Something that delivers images."""

    run: Call
    images: int  # that one `run` delivers
    ours: bool
    params: dict[str, Any]  # of its row; `batch` is among them
    levels_off: float | None = None  # mean difference of its pixels from the reference's, in grey levels of 255


class ThroughputClock(CpuClock):
    """Wall time to the end of the device's work; CPU time, with workers that have ended, takes the place of host
    time."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def prepare(self, call: Call, warmup: int) -> tuple[None, Call]:
        for _ in range(warmup):
            call()
        return None, call  # measuring memory would take one more epoch

    def sample(self, call: Call) -> tuple[float, float]:
        wall, cpu = time.perf_counter(), self._cpu_seconds()
        call()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return 1e3 * (time.perf_counter() - wall), 1e3 * (self._cpu_seconds() - cpu)

    def _cpu_seconds(self) -> float:
        workers = resource.getrusage(resource.RUSAGE_CHILDREN)
        return time.process_time() + workers.ru_utime + workers.ru_stime


def write_latents(root: Path, count: int) -> None:
    """Write moments in the public layout to root/public, and packed to root/packed: float16 values, so that both hold
    the same numbers."""
    generator = np.random.default_rng(0)
    folder = root / "public" / "vae-sd"
    pairs = []
    for index in range(count):
        moments = generator.standard_normal(SHAPE, dtype=np.float32).astype(np.float16).astype(np.float32)
        moments[SHAPE[0] // 2 :] = np.abs(moments[SHAPE[0] // 2 :])  # standard deviations
        pairs.append([f"{index // 1000:05d}/img-mean-std-{index:08d}.npy", index % min(1000, count)])
        path = folder / pairs[-1][0]
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, moments)
    (folder / "dataset.json").write_text(json.dumps({"labels": pairs}))
    prepare(PrepareCommand(out=str(root / "packed"), from_public=str(root / "public")))


def write_jpegs(root: Path, count: int, divisor: int = 1) -> list[Path]:
    """Write pictures with smooth areas, edges and noise, of ImageNet's usual sizes divided by `divisor`."""
    root.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    paths = [root / f"{number:05d}.jpg" for number in range(count)]
    for number, path in enumerate(paths):
        width, height = (side // divisor for side in JPEG_SIZES[number % len(JPEG_SIZES)])
        y, x = np.mgrid[0:height, 0:width] / max(width, height)
        a, b, c, d = generator.uniform(2, 12, (4, 3, 1, 1))
        planes = 128 + 60 * np.sin(a * x + b * y) + 40 * np.sign(np.sin(c * x - d * y))
        planes += generator.normal(0, 6, planes.shape)
        Image.fromarray(planes.clip(0, 255).astype(np.uint8).transpose(1, 2, 0)).save(path, quality=90)
    return paths


def check_rows(name: str, batches: Iterator, reference: Iterator, count: int) -> None:
    """Raise `GateFailed` unless two loaders deliver equal rows and labels, batch by batch."""
    for number in range(count):
        (x, labels), (expected, expected_labels) = next(batches)[:2], next(reference)[:2]
        if not (torch.equal(x.float(), expected.float()) and torch.equal(labels, expected_labels)):
            raise GateFailed(f"{name}: batch {number} has other rows than the reference")


def check_pixels(name: str, x: Tensor, reference: Tensor) -> float:
    """The mean difference of (N, C, H, W) in [-1, 1], in grey levels. Raises `GateFailed` if it is too large."""
    difference = (x - reference).abs().mean((1, 2, 3)) * 127.5
    worst, mean = float(difference.max()), float(difference.mean())
    if not (worst <= MAX_IMAGE_DIFFERENCE and mean <= MAX_MEAN_DIFFERENCE):  # NaN fails too
        raise GateFailed(f"{name}: pixels are off by {mean:.2f} levels in the mean and {worst:.2f} for an image")
    return mean


def bench_latents(args: argparse.Namespace, root: Path) -> list[Row]:
    """Rows of all loaders of latents."""
    write_latents(root, args.rows)
    steps = args.rows // args.batch
    public = PublicFiles(root / "public")

    def loader(workers: int, **sampling: Any) -> DataLoader:
        return DataLoader(public, args.batch, num_workers=workers, drop_last=True, **sampling)

    with ExitStack() as stack:

        def stream(layout: str) -> LatentStream:
            rows = Rows(open_row_set(root / layout), np.arange(args.rows))
            return stack.enter_context(LatentStream(rows, seed=0, batch=args.batch, first_image=0))

        in_order = order.rows(0, 0, steps * args.batch, args.rows).tolist()
        for layout in ("packed", "public"):
            check_rows(f"ours, {layout}", stream(layout), iter(loader(0, sampler=in_order)), steps)
        for workers in LOADER_WORKERS[1:]:
            check_rows(f"public, {workers} workers", iter(loader(workers, sampler=in_order)), stream("packed"), steps)

        def candidate(batches: Iterable, ours: bool, epochs: int = 1) -> Candidate:
            params = {"batch": args.batch, "rows": args.rows}
            return Candidate(partial(_take, batches, epochs * steps), epochs * steps * args.batch, ours, params)

        candidates = {
            "ours, packed": candidate(stream("packed"), True, epochs=8),  # one is too short to time
            "ours, public files": candidate(stream("public"), True),
        }
        for workers in LOADER_WORKERS:
            candidates[f"public, {workers} workers"] = candidate(loader(workers, shuffle=True), False)
        return measure_rows("latents", candidates, args, torch.device("cpu"), int(np.prod(SHAPE)) * 2)


def _take(batches: Iterable, count: int | None = None) -> None:
    for _ in islice(batches, count):
        pass


def bench_decoding(args: argparse.Namespace, files: Sequence[Path], device: torch.device) -> list[Row]:
    """Rows of all installed decoders, with their output on the device.

    Raises:
        Refused: if a file cannot be decoded.
    """
    rival = JpegFiles(files, args.resolution, args.passes)
    images = []
    for number, file in enumerate(files):
        try:
            images.append(rival[number])
        except Exception as error:  # Pillow raises many kinds of errors for a damaged file
            raise Refused(f"--jpegs: {file}: cannot be decoded ({error})") from error
    reference = torch.stack(images).float().div_(127.5).sub_(1)

    def decode(decoder: Any) -> Iterator[Tensor]:
        for first in range(0, len(files), args.decode_batch):
            yield decoder.decode([path.read_bytes() for path in files[first : first + args.decode_batch]])

    def decode_all(decoder: Any) -> None:
        for _ in range(args.passes):
            _take(decode(decoder))

    def load_all(loader: DataLoader) -> None:
        for x in loader:
            x.to(device).float().div_(127.5).sub_(1)

    params = {"files": len(files), "made_up": not args.jpegs, "resolution": args.resolution, "batch": args.decode_batch}
    count = args.passes * len(files)
    candidates = {}
    for (reader, title), threads in product(READERS.items(), THREADS):
        name = f"ours, {title}, {threads} threads"
        config = DataConfig(resolution=args.resolution, channels=3, reader=reader, threads=threads)
        try:
            decoder = open_decoder(config, device)
        except Refused as error:
            print(f"{title} not run: {error}")
            break
        difference = check_pixels(name, torch.cat([x.cpu() for x in decode(decoder)]), reference)
        candidates[name] = Candidate(partial(decode_all, decoder), count, True, params, round(difference, 3))
    is_gpu = device.type == "cuda"
    for workers in DECODER_WORKERS:
        loader = DataLoader(rival, args.decode_batch, num_workers=workers, pin_memory=is_gpu)
        candidates[f"Pillow, DataLoader, {workers} workers"] = Candidate(
            partial(load_all, loader), count, False, params
        )
    size = sum(path.stat().st_size for path in files) // len(files)
    threads = torch.get_num_threads()
    # With more threads the rival's conversion to floats would leave torch's threads spinning, at its expense.
    torch.set_num_threads(1)
    try:
        return measure_rows("decode on a GPU" if is_gpu else "decode", candidates, args, device, size)
    finally:
        torch.set_num_threads(threads)


def bench_encoding(args: argparse.Namespace, device: torch.device, root: Path) -> list[Row]:
    """The row of a VAE's encoder; without --vae, of one with random weights if diffusers is installed."""
    is_gpu = device.type == "cuda"
    if not args.vae:
        try:
            from diffusers import AutoencoderKL
        except ImportError:
            print("encoder not run: needs `pip install diffusers`")
            return []
        AutoencoderKL(  # of Stable Diffusion's shape, 83.7 M parameters
            block_out_channels=(128, 256, 512, 512),  # pyright: ignore[reportArgumentType]
            down_block_types=("DownEncoderBlock2D",) * 4,  # pyright: ignore[reportArgumentType]
            up_block_types=("UpDecoderBlock2D",) * 4,  # pyright: ignore[reportArgumentType]
            layers_per_block=2,
        ).save_pretrained(root)
    vae = open_vae(args.vae or str(root), device, torch.bfloat16 if is_gpu else torch.float32)
    side = args.resolution
    x = torch.rand(args.decode_batch if is_gpu else 4, 3, side, side, device=device) * 2 - 1
    origin = "random weights" if not args.vae else "a folder" if Path(args.vae).exists() else args.vae
    params = {"resolution": side, "batch": len(x), "dtype": "bf16" if is_gpu else "fp32"}
    encode = Candidate(lambda: vae.encode(x), len(x), True, params)
    return measure_rows("encode", {f"{vae.kind} ({origin})": encode}, args, device, x[0].numel() * 4)


def measure_rows(
    name: str, candidates: dict[str, Candidate], args: argparse.Namespace, device: torch.device, bytes_per_image: int
) -> list[Row]:
    """Rows of all candidates, interleaved: times of a batch, and images per second by either clock."""
    calls = {loader: candidate.run for loader, candidate in candidates.items()}
    taken = measure(calls, device=device, repeats=args.repeats, warmup=1, clock=ThroughputClock(device))
    now = stamp(device)
    now["command"] = without_paths(now["command"], (args.jpegs, args.vae))
    rows = []
    for loader, candidate in candidates.items():
        if taken[loader].error:
            raise torch.OutOfMemoryError(f"{loader}: {taken[loader].error}")
        batch = candidate.params["batch"]
        ms = tuple(batch / candidate.images * call_ms for call_ms in taken[loader].ms)
        cpu_ms = [batch / candidate.images * call_ms for call_ms in taken[loader].host_samples_ms]
        params = {"loader": loader, **candidate.params}
        measured = row(name, params, Samples(ms, ms), stamp=now, bytes=bytes_per_image * batch)
        measured["images_per_s"] = 1e3 * batch / float(np.median(ms))
        measured["images_per_cpu_s"] = 1e3 * batch / float(np.median(cpu_ms))
        rows.append(measured | {"cpu_samples_ms": cpu_ms, "ours": candidate.ours, "levels_off": candidate.levels_off})
    return rows


def without_paths(command: str, arguments: Sequence[Path | str | None]) -> str:
    """The command with DIR for every argument that is a path of this machine: one that exists, or an absolute one."""
    paths = {Path(path) for path in arguments if path and (Path(path).exists() or Path(path).is_absolute())}
    words = []
    for word in shlex.split(command):
        option, _, value = word.partition("=")
        if word and Path(word) in paths:
            word = "DIR"
        elif value and Path(value) in paths:
            word = f"{option}=DIR"
        words.append(word)
    return shlex.join(words)


def main(arguments: Sequence[str] | None = None) -> int:
    """The program. Returns its exit code: 1 if a gate failed or a part could not be measured."""
    parser = options.parser("bench_data", __doc__, needs_device=True)
    parser.add_argument("--jpegs", type=Path, help="folder of JPEG files; default: generated ones")
    parser.add_argument("--vae", help="also measure this VAE's encoder: a folder or an id on the hub")
    parser.add_argument("--rows", type=options.positive, default=8192, help="of the generated latents")
    parser.add_argument("--batch", type=options.positive, default=256, help="of latents")
    parser.add_argument("--resolution", type=options.positive, default=256, help="of decoded images")
    parser.add_argument("--decode-batch", type=options.positive, default=32)
    parser.add_argument("--passes", type=options.positive, default=3, help="over the JPEGs in a sample")
    parser.add_argument("--repeats", type=options.positive, default=7, help="samples of each")
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that everything runs; writes nothing")
    args = parser.parse_args(arguments)
    count, divisor = 96, 1
    if args.quick:
        args.rows, args.batch, args.resolution, args.repeats, args.passes = 96, 16, 64, 2, 1
        args.decode_batch, count, divisor = 4, 8, 4
    if args.rows < args.batch:
        parser.error(f"--rows: {args.rows} given; must be at least --batch, {args.batch}")
    with tempfile.TemporaryDirectory() as name:
        temporary = Path(name)
        if args.jpegs:
            paths = sorted(path for path in args.jpegs.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))
            files = [path for path in paths if path.is_file()]
            if not files:
                parser.error(f"--jpegs: {str(args.jpegs)!r} given; has no .jpg or .jpeg files")
        else:
            files = write_jpegs(temporary / "jpegs", count, divisor)
        is_gpu = args.device.type == "cuda"
        parts = [lambda: bench_latents(args, temporary / "latents")]
        for device in [torch.device("cpu"), args.device] if is_gpu else [args.device]:
            parts.append(lambda device=device: bench_decoding(args, files, device))
        if is_gpu or args.vae:
            parts.append(lambda: bench_encoding(args, args.device, temporary / "vae"))
        rows, failed = [], False
        for part in parts:
            try:
                rows += part()
            except GateFailed as error:
                print(f"no number: {error}")
                return 1
            except (Refused, torch.OutOfMemoryError) as error:
                print(f"not run: {(str(error) or type(error).__name__).splitlines()[0]}")
                failed = True
    print(show(rows))
    if rows and (not args.quick or "SRA_FAST_RESULTS" in os.environ):
        now = stamp(args.device) | {"command": rows[0]["command"]}
        print(f"raw samples in {write(folder(now), 'data-jpegs' if args.jpegs else 'data', rows, now)}")
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
