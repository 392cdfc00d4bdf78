"""The command line: arguments -> configuration -> trainer, sampler, evaluation, export, profiling.

Options come from the dataclasses of config.py and of this file, through tyro. Wrong input ends with one line and exit
code 1.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import tyro

from sra_fast.config import (
    Config,
    EvaluateCommand,
    ExportCommand,
    InspectCommand,
    PrepareCommand,
    ProfileCommand,
    SampleCommand,
    SampleConfig,
    preset,
    refuse_unless,
    to_dict,
)
from sra_fast.errors import Refused

T = TypeVar("T")


def train(arguments: Sequence[str]) -> int:
    """Train a preset: `sra-fast train PRESET [options]`."""
    name, rest = _preset_of(arguments)
    config = _parse(Config, preset(name), rest, f"sra-fast train {name}")
    if config.run.dry_run:
        print(json.dumps(_resolved(config), indent=2))
        return 0
    _prepare_cublas(config)
    from sra_fast.training import trainer

    return trainer.train(config)


def _preset_of(arguments: Sequence[str]) -> tuple[str, list[str]]:
    """(name of the preset, options) of a command that begins with one."""
    name, *rest = arguments or ["--help"]
    return ("digits", ["--help"]) if name in ("-h", "--help") else (name, rest)


def _prepare_cublas(config: Config) -> None:
    if config.deterministic:  # cuBLAS reads it when it starts
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def _resolved(config: Config) -> dict[str, Any]:
    """The configuration, and what its automatic choices come to on this machine."""
    from sra_fast.hardware import Hardware
    from sra_fast.model.backends import resolve
    from sra_fast.step.runner import choose_execution

    hardware = Hardware.choose(config.train.device, config.train.precision)
    choices = {
        "student_tap": config.taps[0],
        "teacher_tap": config.taps[1],
        "device": hardware.name,
        "precision": hardware.precision,
        "ops": resolve(config, hardware),
        "execution": choose_execution(config.train.execution, hardware.device),
    }
    return {**to_dict(config), "resolved": choices}


def sample(arguments: Sequence[str]) -> int:
    """Generate images: `sra-fast sample --weights FILE|RUN [options]`."""
    run = _run_of(arguments)
    default = SampleCommand(weights=tyro.MISSING, sample=run.sample if run else SampleConfig())
    command = _parse(SampleCommand, default, arguments, "sra-fast sample")
    refuse_unless(command.grid >= 0, "grid", command.grid, "must not be negative")
    import torch
    from tqdm import tqdm

    from sra_fast.evaluation.evaluate import prediction_only
    from sra_fast.sampling.decoding import image_decoder, latent_decoder, find_latent_space
    from sra_fast.sampling.generate import balanced_labels, generate
    from sra_fast.sampling.images import ImageFiles, LatentsFile, grid_columns

    weights, network = _network(command.weights, command.weights_key, command.device)
    settings, model = command.sample, weights.config
    for label in command.classes:
        refuse_unless(0 <= label < model.classes, "classes", label, f"must be in [0, {model.classes})")
    out = Path(command.out)
    refuse_unless(not out.exists() or out.is_dir(), "out", command.out, "must be a folder")
    if command.tf32:
        torch.set_float32_matmul_precision("high")
    device = next(network.parameters()).device
    labels = balanced_labels(settings.count, len(command.classes) or model.classes)
    if command.classes:
        labels = torch.tensor(command.classes)[labels]
    path = command.path or (weights.objective.path if weights.objective else "linear")
    source = Path(command.weights), command.vae, model.channels
    if command.latents:
        made, make, files = "latents", latent_decoder(*source), LatentsFile(out / "latents.npz", labels)
    else:
        made, make = "images", image_decoder(find_latent_space(*source), device)
        columns = grid_columns(command.grid, len(command.classes) or model.classes)
        files = ImageFiles(out, images=command.images, grid=command.grid, columns=columns, npz=command.npz)
    with tqdm(total=settings.count, unit="img", disable=None) as bar:
        for part in torch.arange(settings.count).split(settings.batch):
            x = generate(
                prediction_only(network),
                labels[part].to(device),
                part.to(device),
                config=settings,
                model=model,
                path=path,
            )
            files.add(make(x))
            bar.update(len(part))
    files.finish()
    print(f"{settings.count} {made} in {out}")
    return 0


def evaluate(arguments: Sequence[str]) -> int:
    """Judge a run: `sra-fast evaluate --weights RUN [options]`."""
    run = _run_of(arguments)
    defaults = {"sample": run.sample, "evaluate": run.evaluate} if run else {}
    command = _parse(EvaluateCommand, EvaluateCommand(weights=tyro.MISSING, **defaults), arguments, "sra-fast evaluate")
    refuse_unless(run is not None, "weights", command.weights, "must be a run: its images are needed too")
    from tqdm import tqdm

    from sra_fast.data.source import open_source
    from sra_fast.evaluation import evaluate as evaluation

    weights, network = _network(command.weights, command.weights_key, command.device)
    source, _ = open_source(run, next(network.parameters()).device)
    with tqdm(total=2 * command.evaluate.samples, unit="img", disable=None) as bar:
        report = evaluation.evaluate(
            network,
            source.pixels(source.train),
            source.pixels(source.held_out),
            model=weights.config,
            path=run.objective.path,
            sample=command.sample,
            config=command.evaluate,
            progress=bar.update,
        )
    print(json.dumps(report.as_dict(), indent=2))
    failures = report.failures(command.evaluate)
    for failure in failures:
        print(f"below the bar: {failure}", file=sys.stderr)
    return 1 if failures else 0


def export(arguments: Sequence[str]) -> int:
    """Write weights for other programs: `sra-fast export --weights RUN --out FILE`."""
    command = _parse(ExportCommand, None, arguments, "sra-fast export")
    from sra_fast.config import ObjectiveConfig
    from sra_fast.model import public_weights
    from sra_fast.training import checkpoint

    out, source = Path(command.out), Path(command.weights)
    refuse_unless(out.suffix in (".safetensors", ".pt"), "out", command.out, "must end in .safetensors or .pt")
    refuse_unless(out.parent.is_dir(), "out", command.out, f"the folder {out.parent} does not exist")
    if out.suffix == ".safetensors":
        weights = checkpoint.read_weights(source, command.weights_key)
        checkpoint.export(weights.tensors, out, weights.config, weights.objective or ObjectiveConfig())
    else:
        refuse_unless(source.is_dir(), "weights", command.weights, "must be a run or a checkpoint to write a .pt file")
        folder = checkpoint.locate(source)
        state, config = checkpoint.describe(folder)
        model, ema = (checkpoint.read_weights(folder, key).tensors for key in ("model", "ema"))
        public_weights.write_public(out, model, ema, steps=state["adam_step"], epoch=0, args=to_dict(config))
    print(f"wrote {out}")
    return 0


def prepare(arguments: Sequence[str]) -> int:
    """Encode images once, for training to read: `sra-fast prepare --images DIR|TARS --out DIR --vae PATH_OR_ID`."""
    config = _parse(PrepareCommand, None, arguments, "sra-fast prepare")
    from sra_fast.packing.prepare import prepare

    prepare(config)
    return 0


def inspect(arguments: Sequence[str]) -> int:
    """Look at a data set, and read all of it for damage: `sra-fast inspect DATA [options]`."""
    from sra_fast.tools.inspect import inspect

    return inspect(_parse(InspectCommand, None, arguments, "sra-fast inspect"))


def profile(arguments: Sequence[str]) -> int:
    """Say where the time of a step goes: `sra-fast profile PRESET [options]`."""
    name, rest = _preset_of(arguments)
    command = _parse(ProfileCommand, ProfileCommand(preset(name)), rest, f"sra-fast profile {name}")
    if command.config.run.dry_run:
        print(json.dumps(_resolved(command.config), indent=2))
        return 0
    _prepare_cublas(command.config)
    from sra_fast.tools.profile import profile as run_profile

    return run_profile(command.config, command.profile)


def doctor(arguments: Sequence[str]) -> int:
    """Say what this machine has and what will be used."""
    refuse_unless(not arguments, "doctor", " ".join(arguments), "takes no arguments")
    from sra_fast.tools.doctor import lines

    for line in lines():
        print(line)
    return 0


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "train": train,
    "sample": sample,
    "evaluate": evaluate,
    "export": export,
    "prepare": prepare,
    "inspect": inspect,
    "profile": profile,
    "doctor": doctor,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """The program. Returns its exit code."""
    name, *rest = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if name in ("-h", "--help"):
        for command, function in COMMANDS.items():
            print(f"sra-fast {command:<9} {(function.__doc__ or '').strip()}")
        print("\nsra-fast COMMAND --help lists the options of one.")
        return 0
    try:
        refuse_unless(name in COMMANDS, "command", name, f"must be one of {', '.join(COMMANDS)}")
        return COMMANDS[name](rest)
    except Refused as error:
        print(f"sra-fast: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # whoever read our output has had enough, as in `sra-fast train --help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        print(f"sra-fast: {error.filename or 'writing'}: {error.strerror or error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("sra-fast: interrupted", file=sys.stderr)
        return 130


def _parse(cls: type[T], default: T | None, arguments: Sequence[str], program: str) -> T:
    """A dataclass from command-line options; tyro's complaint, if any, as one line."""
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            options = {} if default is None else {"default": default}
            return tyro.cli(cls, args=list(arguments), prog=program, **options)
    except SystemExit as stop:
        if not stop.code:  # --help
            raise
        raise Refused(_one_line(complaint.getvalue())) from None


def _one_line(complaint: str) -> str:
    """The text of tyro's framed message up to its first rule, in the words of our own refusals."""
    words = []
    for line in complaint.splitlines()[1:]:
        text = line.strip("│ ")
        if text.startswith("─"):
            break
        words.append(text)
    message = " ".join(words)
    choice = re.fullmatch(r"invalid choice (.+) for argument '--(.+)'\. Expected one of \((.+?),?\)\.", message)
    if choice:
        return f"{choice[2]}: {choice[1]} given; must be one of {choice[3]}"
    # "Error parsing optim: optim.lr: ..." names the section twice.
    return re.sub(r"^Error parsing (--)?(\S+: )?(?=\S)", lambda m: "" if m[1] is None else m[2], message)


def _run_of(arguments: Sequence[str]) -> Config | None:
    """The configuration of the run that --weights names, if it names one."""
    for position, argument in enumerate(arguments):
        option, _, value = argument.partition("=")
        if option == "--weights":
            value = value or "".join(arguments[position + 1 : position + 2])
            if (Path(value) / "config.json").is_file():
                from sra_fast.config import from_dict
                from sra_fast.files import read_json

                path = Path(value) / "config.json"
                return from_dict(Config, read_json(path), str(path))
    return None


def _network(source: str, key: str, device: str) -> tuple[Any, Any]:
    """(weights, network on the device) of what --weights and --weights-key name."""
    from sra_fast.hardware import Hardware
    from sra_fast.model.layout import joined
    from sra_fast.model.transformer import around
    from sra_fast.training import checkpoint

    weights = checkpoint.read_weights(Path(source), key)
    for note in weights.notes:
        print(note, file=sys.stderr)
    chosen = Hardware.choose(device).device
    tensors = {name: tensor.to(chosen) for name, tensor in joined(weights.tensors).items()}
    return weights, around(weights.config, tensors)


if __name__ == "__main__":
    sys.exit(main())
