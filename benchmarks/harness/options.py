"""Command-line options that the benchmarks share, and the model that they name."""

from __future__ import annotations

import argparse
import re
from dataclasses import replace

import torch

from sra_fast.config import Config, preset


def default_device() -> torch.device:
    """The GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def parser(name: str, doc: str | None, needs_device: bool = False) -> argparse.ArgumentParser:
    """The parser of a program, from its module's name and docstring; with --device if it needs one."""
    result = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=str(doc).splitlines()[0])
    if needs_device:
        result.add_argument("--device", type=device, default=default_device(), help="default: the GPU if there is one")
    return result


def positive(text: str) -> int:
    """An integer of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} given; must be a whole number of at least 1")
    return int(text)


def depth(text: str) -> int:
    """0, or enough blocks for a teacher tap after the student tap."""
    if text != "0" and positive(text) < 3:
        raise argparse.ArgumentTypeError(f"{text!r} given; must be 0 or at least 3, to have a block for each tap")
    return int(text)


def device(text: str) -> torch.device:
    """A device of this machine."""
    if not re.fullmatch(r"cpu|cuda(:\d+)?", text):
        raise argparse.ArgumentTypeError(f"{text!r} given; must be cpu or cuda")
    if text != "cpu" and not torch.cuda.is_available():
        raise argparse.ArgumentTypeError(f"{text!r} given; no NVIDIA GPU is usable here")
    return torch.device(text)


def batch(text: str) -> int | str:
    """A number of images, or "auto-check"."""
    return text if text == "auto-check" else positive(text)


def sit(size: str, tokens: int = 256, batch: int = 32, depth: int = 0) -> Config:
    """A SiT with patch 2 on 4-channel latents; depth 0 = the size's."""
    base = preset(f"sit-{size}-2")
    side = 2 * round(tokens**0.5)
    model = replace(base.model, input_size=side, channels=4, classes=1000, depth=depth or base.model.depth)
    return replace(base, model=model, train=replace(base.train, batch=batch))
