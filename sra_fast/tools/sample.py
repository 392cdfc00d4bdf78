"""`sra-fast sample`: from weights to files of images or latents."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from sra_fast.config import SampleCommand
from sra_fast.errors import Refused
from sra_fast.progress import Progress
from sra_fast.sampling.decoding import find_latent_space, image_decoder, latent_decoder
from sra_fast.sampling.generate import balanced_labels, generate
from sra_fast.sampling.guidance import prediction_only
from sra_fast.sampling.images import grid_columns, save_images, save_latents
from sra_fast.tools.weights import device_of, load_network


def sample(command: SampleCommand) -> None:
    """Generate images or latents and write them to the output folder."""
    weights, network = load_network(command.weights, command.weights_key, command.device)
    config, model, device = command.sample, weights.config, device_of(network)
    for label in command.classes:
        if not 0 <= label < model.classes:
            raise Refused("classes", label, f"must be in [0, {model.classes})")
    out = Path(command.out)
    if out.exists() and not out.is_dir():
        raise Refused("out", command.out, "must be a folder")
    if command.tf32:
        torch.set_float32_matmul_precision("high")

    source = Path(command.weights), command.vae, model.channels
    decode = latent_decoder(*source) if command.latents else image_decoder(find_latent_space(*source), device)
    classes = torch.tensor(command.classes or range(model.classes))
    labels = classes[balanced_labels(config.count, len(classes))]
    path = command.path or (weights.objective.path if weights.objective else "linear")

    def batches() -> Iterator[Tensor]:
        predict = prediction_only(network)
        with Progress(config.count, "sampling") as bar:
            for indices in torch.arange(config.count, device=device).split(config.batch):
                batch_labels = labels.to(device)[indices]
                yield decode(generate(predict, batch_labels, indices, config=config, model=model, path=path))
                bar.update(len(indices))

    if command.latents:
        save_latents(out / "latents.npz", batches(), labels)
    else:
        columns = grid_columns(command.grid, len(classes))
        save_images(out, batches(), images=command.images, grid=command.grid, columns=columns, npz=command.npz)
