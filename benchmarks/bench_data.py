"""How fast training data come: packed latents against the public loader, our decoders against Pillow and DataLoader.

    python -m benchmarks.bench_data                         JPEGs of ImageNet's sizes are made up
    python -m benchmarks.bench_data --jpegs DIR             all .jpg and .JPEG files below a folder
    python -m benchmarks.bench_data --vae DIR_OR_ID         and the rate of a VAE's encoder

A sample is one epoch or several; candidates take turns; everything is in the page cache. On a GPU the encoder is
measured in any case: without --vae, Stable Diffusion's, with random weights.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.harness import options, timing
from benchmarks.harness.rows import RESULTS
from benchmarks.harness.throughput import fastest_step, report
from benchmarks.harness.timing import GateFailed
from benchmarks.rivals.image_decoders import bench_decoding, bench_encoding, write_jpegs
from benchmarks.rivals.latent_loaders import bench_latents
from sra_fast.errors import Refused


def main(arguments: Sequence[str] | None = None) -> int:
    """The program. Returns its exit code: 1 if a gate failed, or what was asked for could not be measured."""
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
    made, device, failed = [], chosen.device, False
    with tempfile.TemporaryDirectory() as name:
        if chosen.jpegs:
            found = (path for path in chosen.jpegs.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))
            files = sorted(path for path in found if path.is_file())
            if not files:
                parser.error(f"--jpegs: {str(chosen.jpegs)!r} given; has no .jpg or .jpeg files")
        else:
            files = write_jpegs(Path(name) / "jpegs", made_up, shrunk)
        parts = [
            lambda: bench_latents(chosen, Path(name) / "latents"),
            lambda: bench_decoding(chosen, files, torch.device("cpu")),
        ]
        if device.type == "cuda":
            parts.append(lambda: bench_decoding(chosen, files, device))
        if device.type == "cuda" or chosen.vae:
            parts.append(lambda: bench_encoding(chosen, device, Path(name) / "vae"))
        for part in parts:
            try:
                made += part()
            except GateFailed as failure:
                print(f"no number: {failure}")
                return 1
            except (Refused, torch.OutOfMemoryError) as error:
                print(f"not run: {(str(error) or type(error).__name__).splitlines()[0]}")
                failed = True
    gathered = os.environ.get("SRA_FAST_RESULTS")  # of a report, whose other parts are beside it
    others = Path(gathered).parent.glob("*/step*.json") if gathered else ()
    step = fastest_step([*RESULTS.glob("*/step*.json"), *others])
    for kind in dict.fromkeys(row["name"] for row in made):
        print(report([row for row in made if row["name"] == kind], step if kind == "latents" else None))
    if made and (not chosen.quick or "SRA_FAST_RESULTS" in os.environ):
        stamp = timing.stamp(device) | {"command": made[0]["command"]}
        path = timing.write(timing.folder(stamp), "data-jpegs" if chosen.jpegs else "data", made, stamp)
        print(f"raw samples in {path}")
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
