"""Commands on the weights of a run or a file: sample, evaluate and export."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from sra_fast.config import Config, EvaluateCommand, ExportCommand, ObjectiveConfig, SampleCommand, to_dict
from sra_fast.data import class_names
from sra_fast.data.source import open_source
from sra_fast.distributed import World, join, refuse_several_processes
from sra_fast.errors import Damaged, Refused
from sra_fast.evaluation import evaluate as evaluation
from sra_fast.files import refuse_unwritable, replacing
from sra_fast.hardware import Hardware
from sra_fast.memory import refuse_beyond, sampling_bytes
from sra_fast.model import public_weights
from sra_fast.model.layout import from_public
from sra_fast.model.transformer import Transformer
from sra_fast.progress import Progress, warn
from sra_fast.sampling import origin
from sra_fast.sampling.decoding import find_latent_space, find_run, image_decoder, space_of_latents
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
        warn(note)
    device = Hardware.choose(command.device).device
    tensors = {name: tensor.to(device) for name, tensor in from_public(weights.tensors).items()}
    return weights, Transformer.from_tensors(weights.config, tensors), device


def sample(command: SampleCommand) -> None:
    """Generate images or latents and write them to the output folder. Several processes share the batches; the files
    are the same as of one."""
    with join(Hardware.choose(command.device).device) as world:
        _sample(command, world)


def _sample(command: SampleCommand, world: World) -> None:
    weights, network, device = world.together(lambda: _load_network(command))
    config, model, out = command.sample, weights.config, Path(command.out)
    names = _class_names(weights, Path(command.weights))
    chosen = class_names.labels_of(command.classes, names, model.classes) or list(range(model.classes))
    if config.guidance_channels > model.channels:
        rule = f"must be at most {model.channels}, the channels of these weights"
        raise Refused("sample.guidance-channels", config.guidance_channels, rule)
    if command.path and model.family == "dit":
        raise Refused("path", command.path, "but these weights are of a dit, which has no interpolant")
    if out.exists() and not out.is_dir():
        raise Refused("out", command.out, "must be a folder")
    refuse_unwritable(out, "out")
    kept = config.count if command.npz or command.latents else min(config.count, command.grid)
    needed = {"samples": kept * model.channels * model.input_size**2, "labels and numbers": 16 * config.count}
    refuse_beyond(needed, torch.device("cpu"), "lower --sample.count, or use --no-npz")
    refuse_beyond(sampling_bytes(config, model), device, "lower --sample.batch")
    if command.tf32:
        torch.set_float32_matmul_precision("high")

    source = Path(command.weights), command.vae, model.channels
    space = space_of_latents(*source) if command.latents else find_latent_space(*source)
    decode = space.unscaled if space and command.latents else image_decoder(space, device)
    path = command.path or (weights.objective.path if weights.objective else "linear")
    made_of = {
        "weights": origin.digest(weights.tensors),
        "classes": chosen,
        "path": path,
        "latents": command.latents,
        "vae": space.vae if space and not command.latents else "",
        "scale": space.scale if space else None,
        "shift": space.shift if space else None,
        **{name: value for name, value in to_dict(config).items() if name != "batch"},
    }
    if not command.overwrite:
        origin.refuse_others(out, made_of)
    classes = torch.tensor(chosen)
    labels = classes[balanced_labels(config.count, len(classes))].to(device)

    def batches() -> Iterator[Tensor]:
        """All batches in their order on the first process, none on the others."""
        predict = prediction_only(network)
        parts = torch.arange(config.count, device=device).split(config.batch)
        with Progress(config.count, "sampling", hidden=not world.is_first) as bar:
            for first in range(0, len(parts), world.size):
                samples = None
                if first + world.rank < len(parts):
                    indices = parts[first + world.rank]
                    samples = decode(generate(predict, labels[indices], indices, config=config, model=model, path=path))
                if not first and world.is_first:  # what can be refused has been
                    origin.begin(out, made_of)
                    if names:
                        print(f"classes  {class_names.numbered(names, chosen)}")
                every = [samples] if world.size == 1 else world.gather(None if samples is None else samples.cpu())
                for samples in every if world.is_first else ():
                    if samples is not None:
                        yield samples
                        bar.update(len(samples))

    if not world.is_first:
        for _ in batches():
            pass
    elif command.latents:
        save_latents(out / "latents.npz", batches(), labels)
    else:
        columns = grid_columns(command.grid, len(classes))
        save_images(out, batches(), images=command.images, grid=command.grid, columns=columns, npz=command.npz)


def evaluate(command: EvaluateCommand, run: Config) -> evaluation.Report:
    """Compare samples with the real images of the run, whose configuration is `run`."""
    refuse_several_processes("evaluate")
    weights, network, device = _load_network(command)
    source, _ = open_source(run, device)
    state, _ = checkpoint.describe(run_folder.locate(Path(command.weights)))
    if source.fingerprint != state["data_fingerprint"]:
        place = run.data.images or run.data.latents
        raise Refused(f"{place}: has other files or classes than {command.weights} was trained on")
    with Progress(2 * command.evaluate.samples, "evaluating") as bar:
        return evaluation.evaluate(
            network,
            source.pixels(source.train),
            source.pixels(source.held_out),
            model=weights.config,
            path=(weights.objective or run.objective).path,
            sample=command.sample,
            config=command.evaluate,
            progress=bar.update,
        )


def _class_names(weights: public_weights.Weights, source: Path) -> tuple[str, ...]:
    """Names of the classes, from the weights or from their run; empty if unknown. Raises Damaged if it are too few or
    too many."""
    run = find_run(source)
    names = weights.classes or (class_names.read(run) if run else ())
    if names and len(names) != weights.config.classes:
        raise Damaged(run or source, f"has the names of {len(names)} classes, but weights of {weights.config.classes}")
    return names


def export(command: ExportCommand) -> None:
    """Write one set of weights as .safetensors, or both sets as .pt in the public layout."""
    refuse_several_processes("export")
    source, out = Path(command.weights), Path(command.out)
    if out.suffix == ".safetensors":
        weights = run_folder.read_weights(source, command.weights_key, command.weights_family)
        for note in weights.notes:
            warn(note)
        if (out.parent / "state.json").exists():
            raise Refused("out", command.out, f"must not be inside the checkpoint {out.parent}")
        with replacing(out) as partial:
            objective = weights.objective or ObjectiveConfig()
            names = _class_names(weights, source)
            public_weights.write_safetensors(partial, weights.tensors, weights.config, objective, names)
        return
    if not source.is_dir():
        raise Refused("weights", command.weights, "must be a run or a checkpoint to write a .pt file")
    folder = run_folder.locate(source)
    state, config = checkpoint.describe(folder)
    model, ema = (run_folder.read_weights(folder, key).tensors for key in ("model", "ema"))
    public_weights.write_public(out, model, ema, steps=state["adam_step"], epoch=0, args=to_dict(config))
