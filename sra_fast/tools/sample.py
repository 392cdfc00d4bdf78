"""`sra-fast sample`: from weights to files of images or latents."""

from __future__ import annotations

from pathlib import Path

import torch

from sra_fast.config import SampleCommand
from sra_fast.errors import Refused
from sra_fast.evaluation.evaluate import prediction_only
from sra_fast.progress import Progress
from sra_fast.sampling.decoding import find_latent_space, image_decoder, latent_decoder
from sra_fast.sampling.generate import balanced_labels, generate
from sra_fast.sampling.images import ImageFiles, LatentsFile, grid_columns
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

    classes = torch.tensor(command.classes or range(model.classes))
    labels = classes[balanced_labels(config.count, len(classes))]
    source = Path(command.weights), command.vae, model.channels
    if command.latents:
        decode = latent_decoder(*source)
        files = LatentsFile(out / "latents.npz", labels)
    else:
        decode = image_decoder(find_latent_space(*source), device)
        columns = grid_columns(command.grid, len(classes))
        files = ImageFiles(out, images=command.images, grid=command.grid, columns=columns, npz=command.npz)

    network = prediction_only(network)
    path = command.path or (weights.objective.path if weights.objective else "linear")
    indices = torch.arange(config.count)
    with Progress(config.count, "sampling") as bar:
        for part in indices.split(config.batch):
            x = generate(network, labels[part].to(device), part.to(device), config=config, model=model, path=path)
            files.add(decode(x))
            bar.update(len(part))
    files.finish()
