"""From samples to images: as they are, or through the VAE of a latent space; or to the latents that it would decode."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sra_fast.config import Config, refuse_unless
from sra_fast.data.source import LatentSource, Source
from sra_fast.errors import Refused
from sra_fast.files import read_json, write_json
from sra_fast.vae import Factor, from_anywhere, open_vae, per_channel

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

    def unscaled(self, x: Tensor) -> Tensor:
        """z (N, C, h, w) float32 of samples x (N, C, h, w), on their device."""
        scale, shift = (
            torch.from_numpy(per_channel(factor, x.shape[1]).astype(np.float32)).to(x.device)[:, None, None]
            for factor in (self.scale, self.shift)
        )
        return x.float() / scale + shift

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
    return LatentSpace(from_anywhere(config.data.vae) or source.moments.vae, source.moments.scale, source.moments.shift)


def space_of(weights: Path, vae: str, channels: int) -> LatentSpace | None:
    """The space that weights sample from: of the run they are in, or that a VAE names itself; None: pixels.

    Args:
        weights: a run, one of its checkpoints, or a file.
        vae: a folder or hub id, that takes the place of the run's; may be empty.
        channels: of a sample.

    Raises:
        Refused: if they can be no pixels and nothing says what they are, or the VAE that says it does not fit them.
    """
    for folder in _around(weights):
        if space := LatentSpace.of_run(folder):
            return replace(space, vae=vae or space.vae)
    if vae:
        return _space_of_vae(vae, channels)
    refuse_unless(channels in (1, 3), "vae", vae, f"must be named: these weights make {channels} channels, not pixels")
    return None


def latent_maker(weights: Path, vae: str, channels: int) -> Callable[[Tensor], Tensor]:
    """What makes latents z (N, C, h, w) float32, as a VAE decodes them, of samples (N, C, h, w). For a run's weights
    no VAE is opened.

    Args: as `space_of`.

    Raises:
        Refused: if the weights are of a run on pixels, or of none and no VAE is named or it does not fit.
    """
    for folder in _around(weights):
        if space := LatentSpace.of_run(folder):
            return space.unscaled
        run_on_pixels = (folder / "config.json").is_file() and (folder / "checkpoints").is_dir()
        refuse_unless(not run_on_pixels, "latents", True, f"but the run {folder} makes pixels")
    needs = "needs a run, or --vae for its scale and shift: these weights do not say how their samples are scaled"
    refuse_unless(bool(vae), "latents", True, needs)
    return _space_of_vae(vae, channels).unscaled


def _around(weights: Path) -> list[Path]:
    """Where a run's folder may be: runs/<name>/checkpoints/<images>/ema.safetensors are its weights, or less of it."""
    weights = weights.absolute()
    return [weights, *list(weights.parents)[:3]]


def _space_of_vae(name: str, channels: int) -> LatentSpace:
    vae = open_vae(name, torch.device("cpu"), torch.float32)
    _refuse_channels(name, vae.channels, channels)
    return LatentSpace(name, vae.scale, vae.shift)


def _refuse_channels(vae: str, decoded: int, channels: int) -> None:
    refuse_unless(decoded == channels, "vae", vae, f"it decodes {decoded} channels; must decode {channels}")


def image_maker(space: LatentSpace | None, device: torch.device) -> Callable[[Tensor], Tensor]:
    """What makes images (N, C, H, W) float32 in [-1, 1] of samples (N, C, h, w).

    Raises:
        Refused: if the space's VAE cannot be had: which, and how to get it.
    """
    if space is None:
        return lambda x: x
    if not space.vae:
        raise Refused(
            "vae: none is named by these latents; --data.vae or --vae names one, a folder or a hub id, and "
            "`sra-fast sample --latents` needs none"
        )
    vae = open_vae(space.vae, device, torch.bfloat16 if device.type == "cuda" else torch.float32)

    @torch.no_grad()
    def make(x: Tensor) -> Tensor:
        _refuse_channels(space.vae, vae.channels, x.shape[1])
        return torch.cat([vae.decode(z) for z in space.unscaled(x).split(BATCH)])

    return make
