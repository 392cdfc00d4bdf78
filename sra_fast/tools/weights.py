"""Weights of runs and of files: loading a network for sampling, and exporting."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from sra_fast.config import ExportCommand, ObjectiveConfig, to_dict
from sra_fast.errors import Refused
from sra_fast.hardware import Hardware
from sra_fast.model import public_weights
from sra_fast.model.layout import from_public
from sra_fast.model.transformer import Transformer
from sra_fast.training import checkpoint


def load_network(source: str, key: str, device: str) -> tuple[public_weights.Weights, Transformer]:
    """Load weights and build their network.

    Args:
        source: a run, one of its checkpoints, a .safetensors or a public .pt file.
        key: "ema" or "model".
        device: "auto", "cpu" or "cuda".
    """
    weights = checkpoint.read_weights(Path(source), key)
    for note in weights.notes:
        print(note, file=sys.stderr)
    chosen = Hardware.choose(device).device
    tensors = {name: tensor.to(chosen) for name, tensor in from_public(weights.tensors).items()}
    return weights, Transformer.from_tensors(weights.config, tensors)


def device_of(network: torch.nn.Module) -> torch.device:
    return next(network.parameters()).device


def export(command: ExportCommand) -> None:
    """Write the weights of a run to a .safetensors or .pt file."""
    source, out = Path(command.weights), Path(command.out)
    if out.suffix == ".safetensors":
        weights = checkpoint.read_weights(source, command.weights_key)
        checkpoint.export(weights.tensors, out, weights.config, weights.objective or ObjectiveConfig())
        return
    if not source.is_dir():
        raise Refused("weights", command.weights, "must be a run or a checkpoint to write a .pt file")
    folder = checkpoint.locate(source)
    state, config = checkpoint.describe(folder)
    model, ema = (checkpoint.read_weights(folder, key).tensors for key in ("model", "ema"))
    public_weights.write_public(out, model, ema, steps=state["adam_step"], epoch=0, args=to_dict(config))
