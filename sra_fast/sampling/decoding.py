"""From samples to images: as they are, or through the VAE of a latent space."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sra_fast.config import Config, Refused, refuse_unless
from sra_fast.data.manifest import Factor
from sra_fast.data.source import LatentSource, Source
from sra_fast.metrics import read_json, write_json
from sra_fast.vae import open_vae

NAME = "latents.json"
BATCH = 16  # images decoded at a time: a VAE's activations are large


@dataclass(frozen=True)
class LatentSpace:
    """What a network's samples x are: z = x / scale + shift is what the VAE decodes."""

    vae: str
    """A folder, or an id on the Hugging Face hub; empty if nobody said."""
    scale: Factor
    shift: Factor

    def write(self, run: Path) -> None:
        """Beside a run's configuration, for those who sample from it where the data are not."""
        write_json(run / NAME, asdict(self))

    @classmethod
    def of_run(cls, run: Path) -> LatentSpace | None:
        """What `write` wrote; None: the run's samples are pixels.

        Raises:
            Refused: if the file is damaged.
        """
        path = run / NAME
        if not path.exists():
            return None
        given = read_json(path)
        try:
            factors = (tuple(f) if isinstance(f, list) else float(f) for f in (given["scale"], given["shift"]))
            return cls(str(given["vae"]), *factors)
        except (KeyError, TypeError, ValueError) as error:
            raise Refused(f"{path}: must have vae, scale and shift ({error})") from error


def latent_space(config: Config, source: Source) -> LatentSpace | None:
    """The space that a run on this source samples from; None: pixels."""
    if not isinstance(source, LatentSource) or source.holds_pixels:
        return None
    return LatentSpace(config.data.vae or source.moments.vae, source.moments.scale, source.moments.shift)


def space_of(weights: Path, vae: str, channels: int) -> LatentSpace | None:
    """The space that weights sample from: of the run they are in, or that a VAE names itself; None: pixels.

    Args:
        weights: a run, one of its checkpoints, or a file.
        vae: a folder or hub id, that takes the place of the run's; may be empty.
        channels: of a sample.

    Raises:
        Refused: if they can be no pixels and nothing says what they are.
    """
    weights = weights.absolute()
    for folder in (weights, *list(weights.parents)[:3]):  # runs/<name>/checkpoints/<images>/ema.safetensors
        if space := LatentSpace.of_run(folder):
            return replace(space, vae=vae or space.vae)
    if vae:
        named = open_vae(vae, torch.device("cpu"), torch.float32)
        return LatentSpace(vae, named.scale, named.shift)
    refuse_unless(channels in (1, 3), "vae", vae, f"must be named: these weights make {channels} channels, not pixels")
    return None


def image_maker(space: LatentSpace | None, device: torch.device) -> Callable[[Tensor], Tensor]:
    """What makes images (N, C, H, W) float32 in [-1, 1] of samples (N, C, h, w).

    Raises:
        Refused: if the space's VAE cannot be had: which, and how to get it.
    """
    if space is None:
        return lambda x: x
    if not space.vae:
        raise Refused("vae: none is named by these latents; --data.vae or --vae names one, a folder or a hub id")
    vae = open_vae(space.vae, device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    scale, shift = (
        torch.from_numpy(np.atleast_1d(np.float32(factor))).to(device)[:, None, None]
        for factor in (space.scale, space.shift)
    )

    @torch.no_grad()
    def make(x: Tensor) -> Tensor:
        if x.shape[1] != vae.channels:
            raise Refused(f"vae: {space.vae!r} given; it decodes {vae.channels} channels; must decode {x.shape[1]}")
        return torch.cat([vae.decode(part / scale + shift) for part in x.float().split(BATCH)])

    return make
