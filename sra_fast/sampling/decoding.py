"""Decoding samples: to images, directly or through the VAE of a latent space, or to the latents that a VAE decodes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sra_fast.config import Config
from sra_fast.data.source import LatentSource, Source
from sra_fast.errors import Refused
from sra_fast.files import read_json, write_json
from sra_fast.vae import Factor, absolute_name, check_factors, open_vae, per_channel

NAME = "latents.json"
BATCH = 16  # images decoded at a time: a VAE's activations are large


@dataclass(frozen=True)
class LatentSpace:
    """The scaling of a network's samples x: the VAE decodes z = x / scale + shift."""

    vae: str
    """A folder or a Hugging Face hub id; empty: unknown."""
    scale: Factor
    shift: Factor

    def write(self, run: Path) -> None:
        """Save to a run directory, so that its samples can be decoded where the data set is not available."""
        write_json(run / NAME, asdict(self))

    def unscaled(self, x: Tensor) -> Tensor:
        """z (N, C, h, w) float32 of samples x (N, C, h, w), on their device."""
        scale, shift = (
            torch.from_numpy(per_channel(factor, x.shape[1]).astype(np.float32)).to(x.device)[:, None, None]
            for factor in (self.scale, self.shift)
        )
        return x.float() / scale + shift

    @classmethod
    def of_run(cls, run: Path, channels: int) -> LatentSpace | None:
        """Read what `write` saved; None if the run's samples are pixels.

        Args:
            channels: of a sample.

        Raises:
            Refused: if the file is damaged.
        """
        path = run / NAME
        if not path.exists():
            return None
        values = read_json(path)
        try:
            scale, shift = (_factor(values[name]) for name in ("scale", "shift"))
            check_factors(scale, shift, channels)
            return cls(str(values["vae"]), scale, shift)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise Refused(f"{path}: must have vae, scale and shift ({error})") from error

    @classmethod
    def of_vae(cls, name: str, channels: int) -> LatentSpace:
        """The space of a VAE, which must decode this many channels."""
        vae = open_vae(name, torch.device("cpu"), torch.float32)
        _check_channels(name, vae.channels, channels)
        return cls(name, vae.scale, vae.shift)


def _factor(value: object) -> Factor:
    """A scale or shift of JSON. Raises TypeError for anything but a number, or one for each channel."""
    if isinstance(value, list):
        return tuple(float(_factor(one)) for one in value)  # pyright: ignore[reportArgumentType]: a list in it raises
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{value!r} is not a number")
    return float(value)


def latent_space(config: Config, source: Source) -> LatentSpace | None:
    """The space of a run's samples when it trains on this source; None: pixels."""
    if not isinstance(source, LatentSource) or source.holds_pixels:
        return None
    return LatentSpace(absolute_name(config.data.vae) or source.row_set.vae, source.row_set.scale, source.row_set.shift)


def find_latent_space(weights: Path, vae: str, channels: int) -> LatentSpace | None:
    """The space of the samples of given weights: the one saved in their run, else that of the VAE; None: pixels.

    Args:
        weights: a run, one of its checkpoints, or a file.
        vae: a folder or hub id that replaces the run's; may be empty.
        channels: channels of a sample.

    Raises:
        Refused: if the samples cannot be pixels and nothing says what they are, or the VAE decodes other channels.
    """
    run = find_run(weights)
    if run and (space := LatentSpace.of_run(run, channels)):
        return replace(space, vae=vae or space.vae)
    if vae:
        return LatentSpace.of_vae(vae, channels)
    if channels not in (1, 3):
        raise Refused("vae", vae, f"must be named: these weights generate {channels} channels, not pixels")
    return None


def space_of_latents(weights: Path, vae: str, channels: int) -> LatentSpace:
    """The space of samples that are to be latents. Weights of a run need no VAE.

    Args: as `find_latent_space`.

    Raises:
        Refused: if the run's samples are pixels, or weights outside a run come without a VAE that fits them.
    """
    if run := find_run(weights):
        if space := LatentSpace.of_run(run, channels):
            return space
        raise Refused("latents", True, f"but the run {run} generates pixels")
    if not vae:
        rule = "needs a run, or --vae for its scale and shift: these weights do not say how their samples are scaled"
        raise Refused("latents", True, rule)
    return LatentSpace.of_vae(vae, channels)


def find_run(weights: Path) -> Path | None:
    """The run that weights belong to: its EMA is runs/<name>/checkpoints/<images>/ema.safetensors."""
    weights = weights.absolute()
    folders = [weights, *list(weights.parents)[:3]]
    return next((f for f in folders if (f / "config.json").is_file() and (f / "checkpoints").is_dir()), None)


def _check_channels(vae: str, decoded: int, channels: int) -> None:
    if decoded != channels:
        raise Refused("vae", vae, f"it decodes {decoded} channels; must decode {channels}")


def image_decoder(space: LatentSpace | None, device: torch.device) -> Callable[[Tensor], Tensor]:
    """A function from samples (N, C, h, w) to images (N, C, H, W) float32 in [-1, 1].

    Raises:
        Refused: if the space names no VAE or the VAE is not available.
    """
    if space is None:
        return lambda x: x
    if not space.vae:
        raise Refused(
            "vae: these latents name none; set --data.vae or --vae to a folder or a hub id, or write latents with "
            "`sra-fast sample --latents`"
        )
    vae = open_vae(space.vae, device, torch.bfloat16 if device.type == "cuda" else torch.float32)

    @torch.no_grad()
    def decode(x: Tensor) -> Tensor:
        _check_channels(space.vae, vae.channels, x.shape[1])
        return torch.cat([vae.decode(z) for z in space.unscaled(x).split(BATCH)])

    return decode
