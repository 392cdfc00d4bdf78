"""Weights under the public checkpoints' names: reading public .pt and safetensors files, and writing both.

Our parameter names are SiT-SRA's and DiT-SRA's, so their state dicts load unchanged. Parts that other projects added
are dropped with a note; a state dict of a different network is refused.

Only tensors and argparse.Namespace are unpickled (PyTorch's restricted unpickler), so a file cannot run code.
"""

from __future__ import annotations

import json
import math
import pickle
import re
import struct
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sra_fast.config import SIZES, ModelConfig, ObjectiveConfig, from_dict, to_dict
from sra_fast.errors import Damaged, Refused
from sra_fast.files import replacing
from sra_fast.model.layout import to_public
from sra_fast.model.transformer import Transformer

HEADS_BY_HIDDEN = {hidden: heads for _, hidden, heads in SIZES.values()}
METADATA_KEY = "sra_fast.model"

# What torch.load raises on truncated files and on files of other kinds.
_DAMAGE = (RuntimeError, EOFError, ValueError, KeyError, IndexError, AttributeError, TypeError, OSError, struct.error)

# Parts of other projects that only their training needs.
_FOREIGN = {
    "projectors.": "the projection heads of REPA or Self-Transcendence",
    "projectors_final.": "the velocity head of Self-Transcendence",
}


@dataclass(frozen=True)
class Weights:
    """A network's parameters under the public names, float32 on the CPU, and the network they belong to."""

    tensors: dict[str, Tensor]
    config: ModelConfig
    notes: tuple[str, ...] = ()  # what was dropped or is missing, one line each
    objective: ObjectiveConfig | None = None  # None if the file does not say
    without_head: bool = False  # the projection head was missing and is zeros; sampling does not use it


def read(path: Path, key: str = "ema") -> Weights:
    """Weights from a .safetensors file, or from `key` ("ema" or "model") of a public .pt checkpoint.

    Raises:
        Refused: if the file is missing, damaged, would run code, or holds another network.
    """
    if not path.is_file():
        raise Refused("weights", str(path), "must be a run, a .safetensors or a public .pt file")
    if path.suffix == ".safetensors":
        tensors, metadata = read_safetensors(path)
        description = _description(metadata.get(METADATA_KEY), path)
    else:
        tensors, description = _read_pickle(path, key)
    tensors, notes = _to_our_names(tensors, path)
    config = from_dict(ModelConfig, description["model"], str(path)) if description else infer(tensors, path)
    tensors, without_head = check(tensors, config, path)
    if description is None:
        notes.append(f"{path.name}: by its shapes a {config.family} of {config.depth} blocks, width {config.hidden}")
    if without_head:
        notes.append(f"{path.name}: has no ap_head (trained without alignment)")
    objective = from_dict(ObjectiveConfig, description["objective"], str(path)) if description else None
    return Weights(tensors, config, tuple(notes), objective, without_head)


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, metadata) of a safetensors file on the CPU."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise Damaged(path, f"not a complete safetensors file ({error})") from error


def _description(text: str | None, path: Path) -> dict[str, Any] | None:
    """{"model": ..., "objective": ...}, the metadata that our own files have."""
    if text is None:
        return None
    try:
        description = json.loads(text)
    except json.JSONDecodeError as error:
        raise Damaged(path, f"its {METADATA_KEY} is not JSON ({error})") from error
    if not (isinstance(description, dict) and {"model", "objective"} <= set(description)):
        raise Refused(f"{path}: {METADATA_KEY}", text[:80], "must be an object with model and objective")
    return description


def _read_pickle(path: Path, key: str) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """(state dict, description if this program wrote the file) of a .pt file."""
    try:
        with torch.serialization.safe_globals([Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        call = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it would call {call[1]}" if call else "it is not a checkpoint"
        raise Damaged(path, f"not unpickled: {reason}; only tensors and argparse.Namespace are read") from error
    except _DAMAGE as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise Damaged(path, f"not a complete PyTorch checkpoint ({reason})") from error
    arguments = (
        vars(content["args"]) if isinstance(content, dict) and isinstance(content.get("args"), Namespace) else {}
    )
    is_ours = {"model", "objective"} <= set(arguments) and isinstance(arguments["model"], dict)
    if isinstance(content, dict) and isinstance(content.get(key), dict):
        content = content[key]
    elif isinstance(content, dict) and any(isinstance(value, dict) for value in content.values()):
        names = ", ".join(name for name, value in content.items() if isinstance(value, dict))
        raise Refused(f"{path}: no {key!r} weights; it has {names} (choose with --weights-key)")
    if not (isinstance(content, dict) and content and all(isinstance(value, Tensor) for value in content.values())):
        raise Refused(f"{path}: holds no state dict; must be one, or a public checkpoint with 'model' and 'ema'")
    return content, arguments if is_ours else None


def _to_our_names(tensors: dict[str, Tensor], path: Path) -> tuple[dict[str, Tensor], list[str]]:
    """(tensors without wrappers' prefixes and foreign parts, a note for each part dropped)."""
    notes = []
    tensors = {re.sub(r"^((module|_orig_mod)\.)+", "", name): value for name, value in tensors.items()}
    for prefix, what in _FOREIGN.items():
        if any(name.startswith(prefix) for name in tensors):
            tensors = {name: value for name, value in tensors.items() if not name.startswith(prefix)}
            notes.append(f"{path.name}: left out {prefix}* ({what})")
    if any(name.startswith("projector.") for name in tensors):
        raise Refused(f"{path}: has projector.*: Self-Flow's layout, whose patches and outputs differ from SRA's")
    return {name: value.float() for name, value in tensors.items()}, notes


def infer(tensors: dict[str, Tensor], path: Path) -> ModelConfig:
    """The network a state dict belongs to, from its shapes."""
    try:
        hidden, channels, patch = tensors["x_embedder.proj.weight"].shape[:3]
        side = math.isqrt(tensors["pos_embed"].shape[1])
        outputs = tensors["final_layer.linear.bias"].shape[0] // (patch * patch)
        classes = tensors["y_embedder.embedding_table.weight"].shape[0] - 1
        fc1 = tensors["blocks.0.mlp.fc1.weight"].shape[0]
    except (KeyError, ValueError, IndexError) as error:
        raise Damaged(path, f"not a SiT or DiT state dict ({error} is missing or has another shape)") from error
    head = tensors.get("blocks.0.attn.q_norm.weight")
    heads = hidden // head.shape[0] if head is not None else HEADS_BY_HIDDEN.get(hidden, 0)
    if heads <= 0:
        known = ", ".join(map(str, sorted(HEADS_BY_HIDDEN)))
        raise Refused(f"{path}: width", hidden, f"must be one of {known} for the number of heads to be known")
    if outputs not in (channels, 2 * channels):
        raise Refused(f"{path}: output channels", outputs, f"must be {channels} or {2 * channels}")
    return ModelConfig(
        family="sit" if outputs == channels else "dit",
        depth=1 + max(int(block[1]) for name in tensors if (block := re.match(r"blocks\.(\d+)\.", name))),
        hidden=hidden,
        heads=heads,
        patch=patch,
        mlp_ratio=fc1 // hidden,
        input_size=side * patch,
        channels=channels,
        classes=classes,
        qk_norm=head is not None,
    )


def shapes(config: ModelConfig) -> dict[str, torch.Size]:
    """{public parameter name: shape} of the network, in its order."""
    with torch.device("meta"):
        parameters = dict(Transformer(config).named_parameters())
    return {name: parameter.shape for name, parameter in to_public(parameters).items()}


def check(tensors: dict[str, Tensor], config: ModelConfig, path: Path) -> tuple[dict[str, Tensor], bool]:
    """(tensors in the network's order, whether the head was missing and is now zeros). Refuses any other difference."""
    expected = shapes(config)
    head = {name: shape for name, shape in expected.items() if name.startswith("ap_head.")}
    without_head = not set(head) & set(tensors)
    if without_head:
        tensors = tensors | {name: torch.zeros(shape) for name, shape in head.items()}
    missing, unknown = set(expected) - set(tensors), set(tensors) - set(expected)
    if missing:
        raise Refused(f"{path}: {min(missing)} is missing ({len(missing)} parameters in all)")
    if unknown:
        raise Refused(f"{path}: {min(unknown)} is not a parameter of this network ({len(unknown)} such in all)")
    for name, shape in expected.items():
        if tensors[name].shape != shape:
            raise Refused(f"{path}: {name} has shape {tuple(tensors[name].shape)}; must be {tuple(shape)}")
    return {name: tensors[name] for name in expected}, without_head


def metadata(model: ModelConfig, objective: object) -> dict[str, str]:
    """The metadata of our safetensors files: the network they belong to."""
    return {METADATA_KEY: json.dumps({"model": to_dict(model), "objective": to_dict(objective)}), "format": "pt"}


def write_public(
    path: Path, model: dict[str, Tensor], ema: dict[str, Tensor], steps: int, epoch: int, args: dict[str, Any]
) -> None:
    """Write a checkpoint as SiT-SRA and DiT-SRA do, without optimizer state. It is the only pickle that we write."""
    content = {"model": model, "ema": ema, "args": Namespace(**args), "epoch": epoch, "steps": steps}
    with replacing(path) as partial:
        torch.save(content, partial)
