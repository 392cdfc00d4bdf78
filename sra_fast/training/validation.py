"""Looking at the EMA during training: validation loss and preview images."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sra_fast.config import Config
from sra_fast.data.source import Source
from sra_fast.data.stream import Batch
from sra_fast.distributed import ALONE, World
from sra_fast.errors import Damaged, Refused
from sra_fast.model.transformer import Transformer
from sra_fast.progress import warn
from sra_fast.sampling.decoding import LatentSpace, image_decoder
from sra_fast.sampling.generate import balanced_labels, generate
from sra_fast.sampling.guidance import prediction_only
from sra_fast.sampling.images import grid_columns, save_grid, to_uint8
from sra_fast.step.step import TrainingStep
from sra_fast.training.rhythm import Every

FIRST_NUMBER = 1 << 62  # image numbers of held-out images start here, out of training's reach
BATCH = 64


class Validation:
    """The generative loss on held-out images with their labels, at the same noise and times every time."""

    def __init__(self, config: Config, source: Source, step: TrainingStep) -> None:
        self._every = Every(config.train.validate_every_images, config.train.batch)
        self._count, self._source, self._step = config.train.validation_images, source, step

    def due(self, images_seen: int) -> bool:
        return self._every.due(images_seen)

    @torch.no_grad()
    def loss(self, network: Transformer, world: World = ALONE) -> float:
        """The mean over all images, to which every process contributes some batches. A collective; the bits do not
        depend on the number of processes."""
        x, labels = self._images
        number = torch.arange(len(x), device=x.device) + FIRST_NUMBER
        batches = [*map(Batch._make, zip(x.split(BATCH), labels.split(BATCH), number.split(BATCH), strict=True))]
        own: dict[int, float] = {}
        for place in range(world.rank, len(batches), world.size):
            noised = self._step.perturb(batches[place])
            prediction, _ = network(noised.x_t, noised.t, batches[place].labels)
            own[place] = float(self._step.objective.loss(prediction, noised)) * len(batches[place].x)
        sums: dict[int, float] = {}
        for part in world.gather(own):
            sums |= part
        return sum(sums[place] for place in range(len(batches))) / len(x)

    @cached_property
    def _images(self) -> tuple[Tensor, Tensor]:
        """(x, labels) of held-out images, evenly spread over the data set's order."""
        held_out = self._source.held_out
        rows = np.linspace(0, len(held_out) - 1, min(self._count, len(held_out))).astype(np.int64)
        try:
            return self._source.load(held_out.take(rows))
        except Damaged as error:
            raise Refused(f"held-out images: {error}") from error


class Previews:
    """Grids of samples in `samples/`, one PNG each, a column per class where there are few."""

    def __init__(self, config: Config, space: LatentSpace | None, device: torch.device) -> None:
        self._every = Every(config.train.preview_every_images, config.train.batch)
        self._config, self._space, self._device = config, space, device

    def due(self, images_seen: int) -> bool:
        return self._every.due(images_seen)

    def write(self, network: Transformer, path: Path) -> None:
        """Write a grid. If that is impossible, say why on stderr: the training goes on."""
        model, sample = self._config.model, self._config.sample
        labels = balanced_labels(sample.count, model.classes).to(self._device)
        indices = torch.arange(sample.count, device=self._device)
        try:
            decode = self._decode
            samples = generate(
                prediction_only(network),
                labels,
                indices,
                config=sample,
                model=model,
                path=self._config.objective.path,
            )
            save_grid(path, to_uint8(decode(samples)), grid_columns(sample.count, model.classes))
        # Samples of a young network may overflow; a VAE may be missing or too large; a disk may be full.
        except (Refused, OSError, MemoryError, RuntimeError) as error:
            warn(f"no preview: {(str(error) or 'out of memory').splitlines()[0]}")

    @cached_property
    def _decode(self) -> Callable[[Tensor], Tensor]:
        return image_decoder(self._space, self._device)
