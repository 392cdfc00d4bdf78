"""Commands on the weights of a run or a file: sample, evaluate and export."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from sra_fast.config import Config, EvaluateCommand, ExportCommand, ObjectiveConfig, SampleCommand, to_dict
from sra_fast.data.source import open_source
from sra_fast.errors import Refused
from sra_fast.evaluation import evaluate as evaluation
from sra_fast.files import replacing
from sra_fast.hardware import Hardware
from sra_fast.model import public_weights
from sra_fast.model.layout import from_public
from sra_fast.model.transformer import Transformer
from sra_fast.progress import Progress
from sra_fast.sampling.decoding import find_latent_space, image_decoder, latent_decoder
from sra_fast.sampling.generate import balanced_labels, generate
from sra_fast.sampling.guidance import prediction_only
from sra_fast.sampling.images import grid_columns, save_images, save_latents
from sra_fast.training import checkpoint, run_folder


def _load_network(
    command: SampleCommand | EvaluateCommand,
) -> tuple[public_weights.Weights, Transformer, torch.device]:
    """(weights, their network, its device)."""
    family = command.weights_family if isinstance(command, SampleCommand) else "auto"
    weights = run_folder.read_weights(Path(command.weights), command.weights_key, family)
    for note in weights.notes:
        print(note, file=sys.stderr)
    device = Hardware.choose(command.device).device
    tensors = {name: tensor.to(device) for name, tensor in from_public(weights.tensors).items()}
    return weights, Transformer.from_tensors(weights.config, tensors), device


def sample(command: SampleCommand) -> None:
    """Generate images or latents and write them to the output folder."""
    weights, network, device = _load_network(command)
    config, model, out = command.sample, weights.config, Path(command.out)
    for label in command.classes:
        if not 0 <= label < model.classes:
            raise Refused("classes", label, f"must be in [0, {model.classes})")
    if command.path and model.family == "dit":
        raise Refused("path", command.path, "but these weights are of a dit, which has no interpolant")
    if out.exists() and not out.is_dir():
        raise Refused("out", command.out, "must be a folder")
    if command.tf32:
        torch.set_float32_matmul_precision("high")

    source = Path(command.weights), command.vae, model.channels
    decode = latent_decoder(*source) if command.latents else image_decoder(find_latent_space(*source), device)
    classes = torch.tensor(command.classes or range(model.classes))
    labels = classes[balanced_labels(config.count, len(classes))].to(device)
    path = command.path or (weights.objective.path if weights.objective else "linear")

    def batches() -> Iterator[Tensor]:
        predict = prediction_only(network)
        with Progress(config.count, "sampling") as bar:
            for indices in torch.arange(config.count, device=device).split(config.batch):
                yield decode(generate(predict, labels[indices], indices, config=config, model=model, path=path))
                bar.update(len(indices))

    if command.latents:
        save_latents(out / "latents.npz", batches(), labels)
    else:
        columns = grid_columns(command.grid, len(classes))
        save_images(out, batches(), images=command.images, grid=command.grid, columns=columns, npz=command.npz)


def evaluate(command: EvaluateCommand, run: Config) -> evaluation.Report:
    """Compare samples with the real images of the run, whose configuration is `run`."""
    weights, network, device = _load_network(command)
    source, _ = open_source(run, device)
    with Progress(2 * command.evaluate.samples, "evaluating") as bar:
        return evaluation.evaluate(
            network,
            source.pixels(source.train),
            source.pixels(source.held_out),
            model=weights.config,
            path=run.objective.path,
            sample=command.sample,
            config=command.evaluate,
            progress=bar.update,
        )


def export(command: ExportCommand) -> None:
    """Write one set of weights as .safetensors, or both sets as .pt in the public layout."""
    source, out = Path(command.weights), Path(command.out)
    if out.suffix == ".safetensors":
        weights = run_folder.read_weights(source, command.weights_key, command.weights_family)
        for note in weights.notes:
            print(note, file=sys.stderr)
        with replacing(out) as partial:
            objective = weights.objective or ObjectiveConfig()
            public_weights.write_safetensors(partial, weights.tensors, weights.config, objective)
        return
    if not source.is_dir():
        raise Refused("weights", command.weights, "must be a run or a checkpoint to write a .pt file")
    folder = run_folder.locate(source)
    state, config = checkpoint.describe(folder)
    model, ema = (run_folder.read_weights(folder, key).tensors for key in ("model", "ema"))
    public_weights.write_public(out, model, ema, steps=state["adam_step"], epoch=0, args=to_dict(config))
