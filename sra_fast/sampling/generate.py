"""Generating images: `generate` picks sampler and guidance, makes the noise, and goes through the samples in batches.

Sample i is a function of (seed, i, its label) alone. Its initial noise is block 0 of its Philox stream and the noise of
step k is block k + 1; a block is C H W elements, rounded up to whole Philox calls of four.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sra_fast.config import SAMPLERS, ModelConfig, SampleConfig, refuse_unless
from sra_fast.kernels.perturb import PATHS
from sra_fast.kernels.philox import Draw, normals
from sra_fast.objective.ddpm import DIFFUSION_STEPS
from sra_fast.sampling.ddpm import ddim, ddpm
from sra_fast.sampling.guidance import Guided, Network, guided
from sra_fast.sampling.ode import euler, heun
from sra_fast.sampling.sde import euler_maruyama

AUTO = {"sit": "sde", "dit": "ddpm"}
TIME_OF_NOISE = {"sit": 1, "dit": DIFFUSION_STEPS - 1}  # the time at which the noise level is 1; at time 0 it is 0

# Called with (predict, x, noise, steps, path); keys are the names that config.SAMPLERS offers.
_SAMPLERS: dict[str, Callable[..., Tensor]] = {
    "euler": lambda predict, x, noise, steps, path: euler(predict, x, steps=steps),
    "heun": lambda predict, x, noise, steps, path: heun(predict, x, steps=steps),
    "sde": lambda predict, x, noise, steps, path: euler_maruyama(predict, x, path=path, steps=steps, noise=noise),
    "ddpm": lambda predict, x, noise, steps, path: ddpm(predict, x, steps=steps, noise=noise),
    "ddim": lambda predict, x, noise, steps, path: ddim(predict, x, steps=steps),
}


def balanced_labels(count: int, classes: int) -> Tensor:
    """Labels of samples 0 to count - 1: i mod classes, (count,) int64. Classes differ by one sample at most."""
    return torch.arange(count) % classes


def block_noise(seed: int, indices: Tensor, shape: tuple[int, ...], block: int) -> Tensor:
    """Standard normal noise of samples `indices` (B,) int64: (B, *shape) float64 holding float32 values.

    Philox counts a sample's elements in groups of four in 32 bits: (block + 1) x padded size must not exceed 2^34.
    """
    count = torch.Size(shape).numel()
    return normals(seed, indices, Draw.SAMPLER, count, block * _padded(count)).view(-1, *shape).double()


def _padded(count: int) -> int:
    return -(-count // 4) * 4


@torch.no_grad()
def generate(
    network: Network,
    labels: Tensor,
    indices: Tensor,
    *,
    config: SampleConfig,
    model: ModelConfig,
    path: str,
    progress: Callable[[int], object] | None = None,
) -> Tensor:
    """Samples of a network, in the space it was trained in (pixels or latents).

    The state is float64, the network is called in float32. Batches have config.batch images, under guidance twice as
    many rows. With config.batch_invariant each image goes alone, under guidance as one batch of two rows: always the
    same shapes, hence the same bits.

    Args:
        network: see `Network`; already in evaluation mode.
        labels: (N,) int64 in [0, model.classes]; model.classes is the null class.
        indices: (N,) int64, sample numbers. A large set can be made in pieces, and pieces anywhere.
        config: sampler, steps, guidance, batch and seed; its count is not read.
        model: family, channels, input_size and classes.
        path: interpolant of sit, "linear" or "cosine"; not used for dit.
        progress: called after each batch with the number of images in it.

    Returns:
        (N, C, H, W) float32 on labels.device.

    Raises:
        Refused: on a sampler of the other family, a model without its sizes, or labels and indices that do not fit.
    """
    sampler = AUTO[model.family] if config.sampler == "auto" else config.sampler
    _check(sampler, labels, indices, config, model, path)
    shape = (model.channels, model.input_size, model.input_size)
    predict = guided(
        network,
        scale=config.guidance,
        low=config.guidance_low,
        high=config.guidance_high,
        null_label=model.classes,
        channels=config.guidance_channels,
    )
    samples = torch.empty((len(labels), *shape), dtype=torch.float32, device=labels.device)
    size = 1 if config.batch_invariant else config.batch
    numbers = indices.to(labels.device)
    for part, label, number in zip(samples.split(size), labels.split(size), numbers.split(size), strict=True):
        part.copy_(_generate_batch(predict, label, number, shape, sampler, config, TIME_OF_NOISE[model.family], path))
        if progress is not None:
            progress(len(part))
    return samples


def _generate_batch(
    predict: Guided,
    labels: Tensor,
    numbers: Tensor,
    shape: tuple[int, ...],
    sampler: str,
    config: SampleConfig,
    time_of_noise: int,
    path: str,
) -> Tensor:
    """(B, C, H, W) float64."""

    def at(x: Tensor, t: float) -> Tensor:
        times = torch.full((len(x),), float(t), dtype=torch.float32, device=x.device)
        return predict(x.float(), times, labels, t / time_of_noise)

    def noise(step: int) -> Tensor:
        return block_noise(config.seed, numbers, shape, step + 1)

    return _SAMPLERS[sampler](at, block_noise(config.seed, numbers, shape, 0), noise, config.steps, path)


def _check(sampler: str, labels: Tensor, indices: Tensor, config: SampleConfig, model: ModelConfig, path: str) -> None:
    allowed = SAMPLERS[model.family]
    refuse_unless(sampler in allowed, "sample.sampler", sampler, f"must be one of {', '.join(allowed)}")
    refuse_unless(path in PATHS, "objective.path", path, f"must be one of {', '.join(PATHS)}")
    for name in ("channels", "input_size", "classes"):
        given = getattr(model, name)
        refuse_unless(given > 0, f"model.{name.replace('_', '-')}", given, "must be positive to generate")
    fits = labels.ndim == 1 and labels.shape == indices.shape and labels.dtype == indices.dtype == torch.int64
    given = f"{labels.dtype} {tuple(labels.shape)} and {indices.dtype} {tuple(indices.shape)}"
    refuse_unless(fits, "labels, indices", given, "must be int64 vectors of one length")
    if len(labels):
        low, high = int(labels.min()), int(labels.max())
        refuse_unless(
            low >= 0 and high <= model.classes, "labels", (low, high), f"must be in [0, {model.classes}] (null class)"
        )
    elements = (config.steps + 1) * _padded(model.channels * model.input_size**2)
    refuse_unless(elements <= 2**34, "sample.steps", config.steps, "(steps + 1) x values per image must be <= 2^34")
