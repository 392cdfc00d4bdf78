"""Generating images: `generate` picks the sampler and guidance, draws the noise, and works through the samples in
batches.

Sample i depends on (seed, i, its label) alone. Its initial noise is block 0 of its Philox stream and the noise of step
k is block k + 1; a block is C H W elements, rounded up to whole Philox calls of four.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sra_fast.config import SAMPLERS, ModelConfig, SampleConfig
from sra_fast.errors import Refused
from sra_fast.kernels.perturb import PATHS
from sra_fast.kernels.philox import Draw, normals
from sra_fast.objective.ddpm import DIFFUSION_STEPS
from sra_fast.sampling.ddpm import ddim, ddpm
from sra_fast.sampling.guidance import Network, guided
from sra_fast.sampling.ode import euler, heun
from sra_fast.sampling.sde import euler_maruyama

DEFAULT_SAMPLER = {"sit": "sde", "dit": "ddpm"}
TIME_OF_NOISE = {"sit": 1, "dit": DIFFUSION_STEPS - 1}  # the time at noise level 1; noise level 0 is at time 0

# Called with (predict, x, noise, steps, path). The keys are those of config.SAMPLERS.
_SAMPLERS: dict[str, Callable[..., Tensor]] = {
    "euler": lambda predict, x, noise, steps, path: euler(predict, x, steps=steps),
    "heun": lambda predict, x, noise, steps, path: heun(predict, x, steps=steps),
    "sde": lambda predict, x, noise, steps, path: euler_maruyama(predict, x, path=path, steps=steps, noise=noise),
    "ddpm": lambda predict, x, noise, steps, path: ddpm(predict, x, steps=steps, noise=noise),
    "ddim": lambda predict, x, noise, steps, path: ddim(predict, x, steps=steps),
}


def balanced_labels(count: int, classes: int) -> Tensor:
    """Labels of samples 0 to count - 1: i mod classes, (count,) int64."""
    return torch.arange(count) % classes


def block_noise(seed: int, indices: Tensor, shape: tuple[int, ...], block: int) -> Tensor:
    """Standard normal noise of samples `indices` (B,) int64: (B, *shape) float64 holding float32 values.

    Philox counts a sample's elements in groups of four with 32 bits: (block + 1) x padded size must not exceed 2^34.
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
    """Sample from a network, in the space it was trained in (pixels or latents).

    The state is float64, the network is called in float32. Batches have config.batch images, under guidance twice as
    many rows. With config.batch_invariant the network gets one image at a time, under guidance as two rows: the same
    shapes every time, hence the same bits.

    Args:
        network: see `Network`; in evaluation mode.
        labels: (N,) int64 in [0, model.classes]; model.classes is the null class.
        indices: (N,) int64, sample numbers. A large set may be generated in parts, on any machine.
        config: sampler, steps, guidance, batch and seed; its count is ignored.
        model: family, channels, input_size and classes.
        path: interpolant of sit, "linear" or "cosine"; ignored for dit.
        progress: called after each batch with the number of images in it.

    Returns:
        (N, C, H, W) float32 on labels.device.

    Raises:
        Refused: on a sampler of the other family, a model without sizes, or labels and indices that do not match.
    """
    sampler = DEFAULT_SAMPLER[model.family] if config.sampler == "auto" else config.sampler
    _check(sampler, labels, indices, config, model, path)
    shape = (model.channels, model.input_size, model.input_size)
    guided_network = guided(
        network,
        scale=config.guidance,
        low=config.guidance_low,
        high=config.guidance_high,
        null_label=model.classes,
        channels=config.guidance_channels,
    )

    def sample(labels: Tensor, indices: Tensor) -> Tensor:
        """(B, C, H, W) float64 of one batch."""

        def predict(x: Tensor, t: float) -> Tensor:
            times = torch.full((len(x),), float(t), dtype=torch.float32, device=x.device)
            return guided_network(x.float(), times, labels, t / TIME_OF_NOISE[model.family])

        def noise(step: int) -> Tensor:
            return block_noise(config.seed, indices, shape, step + 1)

        return _SAMPLERS[sampler](predict, block_noise(config.seed, indices, shape, 0), noise, config.steps, path)

    samples = torch.empty((len(labels), *shape), dtype=torch.float32, device=labels.device)
    size = 1 if config.batch_invariant else config.batch
    batches = zip(samples.split(size), labels.split(size), indices.to(labels.device).split(size), strict=True)
    for out, batch_labels, batch_indices in batches:
        out.copy_(sample(batch_labels, batch_indices))
        if progress is not None:
            progress(len(out))
    return samples


def _check(sampler: str, labels: Tensor, indices: Tensor, config: SampleConfig, model: ModelConfig, path: str) -> None:
    samplers = SAMPLERS[model.family]
    if sampler not in samplers:
        raise Refused("sample.sampler", sampler, f"must be one of {', '.join(samplers)}")
    if path not in PATHS:
        raise Refused("objective.path", path, f"must be one of {', '.join(PATHS)}")
    for name in ("channels", "input_size", "classes"):
        if getattr(model, name) <= 0:
            raise Refused(f"model.{name.replace('_', '-')}", getattr(model, name), "must be positive to generate")
    if labels.ndim != 1 or labels.shape != indices.shape or {labels.dtype, indices.dtype} != {torch.int64}:
        value = f"{labels.dtype} {tuple(labels.shape)} and {indices.dtype} {tuple(indices.shape)}"
        raise Refused("labels, indices", value, "must be int64 vectors of one length")
    if len(labels):
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high > model.classes:
            raise Refused("labels", (low, high), f"must be in [0, {model.classes}] (null class)")
    if (config.steps + 1) * _padded(model.channels * model.input_size**2) > 2**34:
        raise Refused("sample.steps", config.steps, "(steps + 1) x values per image must be <= 2^34")
