"""Weights under the public checkpoints' names: reading public .pt and safetensors files, and writing both.

Our parameter names are SiT-SRA's and DiT-SRA's, so their state dicts load unchanged. Parts that other projects added
are dropped with a note; a state dict of a different network is refused.

Only tensors and argparse.Namespace are unpickled (PyTorch's restricted unpickler), so a file cannot run code.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import re
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sra_fast.config import SIZES, ModelConfig, ObjectiveConfig, from_dict, to_dict
from sra_fast.data import class_names
from sra_fast.errors import Damaged, Refused, is_out_of_memory
from sra_fast.files import open_regular, replacing
from sra_fast.model import families
from sra_fast.model.layout import to_public
from sra_fast.model.pickled import read_pickle
from sra_fast.model.transformer import TimestepEmbedder, Transformer

HEADS_BY_HIDDEN = {hidden: heads for _, hidden, heads in SIZES.values()}
T = TypeVar("T")
METADATA_KEY = "sra_fast.model"

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
    classes: tuple[str, ...] = ()  # their names, if the file has them


def read(path: Path, key: str = "ema", family: str = "auto") -> Weights:
    """Weights from a .safetensors file, or from `key` ("ema" or "model") of a public .pt checkpoint.

    Args:
        family: of `families.FAMILIES`, for a file that does not say; auto = what it says.

    Raises:
        Refused: if the file is missing, damaged, would run code, holds another network, or does not say its family.
    """
    if not path.exists():
        raise Refused("weights", str(path), "must be a run, a .safetensors or a public .pt file")
    if path.suffix == ".safetensors":
        tensors, metadata = read_safetensors(path)
        arguments = _description(metadata.get(METADATA_KEY), path)
    else:
        tensors, arguments = _state_dict(read_pickle(path), key, path)
    is_ours = isinstance(arguments.get("model"), dict) and isinstance(arguments.get("objective"), dict)
    unwrapped = {re.sub(r"^((module|_orig_mod)\.)+", "", name): value for name, value in tensors.items()}
    given = {name: _checked(value, name, path) for name, value in unwrapped.items()}
    tensors, notes = _without_foreign(given, path)
    sizes = sizes_of(tensors, path)
    if is_ours:
        config = from_dict(ModelConfig, arguments["model"], str(path))
        if family not in ("auto", config.family):
            raise Refused("weights-family", family, f"but {path} says that it is a {config.family}")
        _compare(config, sizes, path)
    else:
        is_doubled = sizes["outputs"] == 2 * sizes["channels"]
        kind = families.family_of(given, arguments, family, is_doubled, path)
        if kind == "sit-original":
            frequencies = TimestepEmbedder.frequencies(torch.device("cpu"))
            tensors = families.from_original_sit(tensors, sizes["channels"], frequencies)
            notes.append(f"{path.name}: an original SiT; converted, so that its time runs from data to noise")
        config = _infer(sizes, kind, path)
    tensors, without_head = check(tensors, config, path)
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise Damaged(path, f"{name} has numbers that are not finite")
    if not is_ours:
        notes.append(f"{path.name}: by its shapes a {config.family} of {config.depth} blocks, width {config.hidden}")
    if without_head:
        notes.append(f"{path.name}: has no ap_head (trained without alignment)")
    objective = from_dict(ObjectiveConfig, arguments["objective"], str(path)) if is_ours else None
    names = class_names.checked(arguments.get("classes", []), path) if is_ours else ()
    return Weights(tensors, config, tuple(notes), objective, without_head, names)


def open_safetensors(path: Path) -> Any:
    """A safetensors file, whose tensors are read onto the CPU one by one."""
    return _reading(path, lambda: safe_open(path, framework="pt"))


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, metadata) of a safetensors file on the CPU."""
    file = open_safetensors(path)
    return _reading(path, lambda: ({name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}))  # noqa: SIM118


def _reading(path: Path, read: Callable[[], T]) -> T:
    try:
        os.close(open_regular(path))
        return read()
    except (SafetensorError, OSError, ValueError, TypeError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        reason = getattr(error, "strerror", None) or error
        raise Damaged(path, f"not a readable safetensors file ({reason})") from error


def _description(text: str | None, path: Path) -> dict[str, Any]:
    """{"model": ..., "objective": ...}, the metadata that our own files have; empty for other files."""
    if text is None:
        return {}
    try:
        description = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Damaged(path, f"its {METADATA_KEY} is not JSON ({error})") from error
    if not isinstance(description, dict) or any(
        not isinstance(description.get(name), dict) for name in ("model", "objective")
    ):
        raise Refused(f"{path}: {METADATA_KEY}", text[:80], "must be an object with model and objective")
    return description


def _state_dict(content: Any, key: str, path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(state dict, arguments of the training, empty if unknown) of a .pt file's content."""
    arguments = content.get("args") if isinstance(content, dict) else None
    if isinstance(content, dict) and isinstance(content.get(key), dict):
        content = content[key]
    elif isinstance(content, dict) and any(isinstance(value, dict) for value in content.values()):
        names = ", ".join(str(name) for name, value in content.items() if isinstance(value, dict))
        raise Refused(f"{path}: no {key!r} weights; it has {names} (choose with --weights-key)")
    if not (isinstance(content, dict) and content and all(isinstance(value, Tensor) for value in content.values())):
        raise Refused(f"{path}: holds no state dict; must be one, or a public checkpoint with 'model' and 'ema'")
    if not all(isinstance(name, str) for name in content):
        raise Damaged(path, "the names of its tensors must be text")
    return content, vars(arguments) if isinstance(arguments, Namespace) else {}


def _checked(tensor: Tensor, name: str, path: Path) -> Tensor:
    """The tensor in float32, if it can be a parameter."""
    if tensor.layout != torch.strided or not tensor.dtype.is_floating_point or not tensor.numel():
        kind = "empty" if not tensor.numel() else f"{tensor.dtype}, {tensor.layout}"
        raise Damaged(path, f"{name} cannot be a parameter: it is {kind}")
    return tensor.float()


def _without_foreign(tensors: dict[str, Tensor], path: Path) -> tuple[dict[str, Tensor], list[str]]:
    """(tensors without parts of other projects, a note for each part dropped)."""
    notes = []
    for prefix, what in _FOREIGN.items():
        if any(name.startswith(prefix) for name in tensors):
            tensors = {name: value for name, value in tensors.items() if not name.startswith(prefix)}
            notes.append(f"{path.name}: left out {prefix}* ({what})")
    if any(name.startswith("projector.") for name in tensors):
        raise Refused(f"{path}: has projector.*: Self-Flow's layout, whose patches and outputs differ from SRA's")
    return tensors, notes


def sizes_of(tensors: dict[str, Tensor], path: Path) -> dict[str, int]:
    """The sizes that a state dict's tensors have: of `ModelConfig`, `outputs` (channels that the last layer predicts),
    and `head`, the width of a head if the keys are normalised, else 0.

    Raises:
        Damaged: if the tensors are not those of a SiT or DiT. Nothing is built before they are.
    """
    try:
        hidden, channels, patch = tensors["x_embedder.proj.weight"].shape[:3]
        side = math.isqrt(tensors["pos_embed"].shape[1])
        outputs = tensors["final_layer.linear.bias"].shape[0] // (patch * patch)
        classes = tensors["y_embedder.embedding_table.weight"].shape[0] - 1
        fc1 = tensors["blocks.0.mlp.fc1.weight"].shape[0]
    except (KeyError, ValueError, IndexError) as error:
        raise Damaged(path, f"not a SiT or DiT state dict ({error} is missing or has another shape)") from error
    blocks = {int(block[1]) for name in tensors if (block := re.match(r"blocks\.(\d{1,9})\.", name))}
    if blocks != set(range(len(blocks))):
        raise Damaged(path, f"has {len(blocks)} blocks, the last of number {max(blocks)}")
    norm = tensors.get("blocks.0.attn.q_norm.weight")
    return {
        "depth": len(blocks),
        "hidden": hidden,
        "patch": patch,
        "mlp_ratio": fc1 // hidden,
        "input_size": side * patch,
        "channels": channels,
        "classes": classes,
        "outputs": outputs,
        "head": norm.shape[0] if norm is not None else 0,
    }


def _compare(config: ModelConfig, sizes: dict[str, int], path: Path) -> None:
    """Raise Damaged if a network that a file describes is not the one whose tensors it holds."""
    described = {name: getattr(config, name) for name in sizes if hasattr(config, name)}
    described |= {"outputs": config.output_channels, "head": config.hidden // config.heads if config.qk_norm else 0}
    for name, size in sizes.items():
        if described[name] != size:
            raise Damaged(path, f"describes a network of {name} = {described[name]}, but its tensors have {size}")


def _infer(sizes: dict[str, int], family: str, path: Path) -> ModelConfig:
    """The network of a family whose tensors have these sizes."""
    hidden, channels, outputs = sizes["hidden"], sizes["channels"], sizes["outputs"]
    heads = hidden // sizes["head"] if sizes["head"] else HEADS_BY_HIDDEN.get(hidden, 0)
    if heads <= 0:
        known = ", ".join(map(str, sorted(HEADS_BY_HIDDEN)))
        raise Refused(f"{path}: width", hidden, f"must be one of {known} for the number of heads to be known")
    if outputs not in (channels, 2 * channels):
        raise Refused(f"{path}: output channels", outputs, f"must be {channels} or {2 * channels}")
    fields: dict[str, Any] = {name: size for name, size in sizes.items() if name not in ("outputs", "head")}
    family = "dit" if family == "dit" else "sit"
    return ModelConfig(family=family, heads=heads, qk_norm=sizes["head"] > 0, **fields)


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


def write_public(
    path: Path, model: dict[str, Tensor], ema: dict[str, Tensor], steps: int, epoch: int, args: dict[str, Any]
) -> None:
    """Write a checkpoint as SiT-SRA and DiT-SRA do, without optimizer state. It is the only pickle that we write."""
    content = {"model": model, "ema": ema, "args": Namespace(**args), "epoch": epoch, "steps": steps}
    with replacing(path) as partial:
        try:
            torch.save(content, partial)
        except RuntimeError as error:  # what torch makes of a full disk
            raise OSError(str(error).splitlines()[0]) from error


def write_safetensors(
    path: Path,
    tensors: dict[str, Tensor],
    model: ModelConfig,
    objective: ObjectiveConfig,
    classes: Sequence[str] = (),
) -> str:
    """Write a safetensors file that `read` and other tools read. Equal weights give equal bytes.

    Unlike the library's writer it leaves no file of another name behind if it is killed, has a fixed order of metadata,
    and computes the checksum on the way.

    Args:
        tensors: float32, on the CPU or a GPU.
        classes: their names; empty if unknown.

    Returns:
        SHA-256 of the file, in hex.

    Raises:
        OSError: if it cannot be written.
    """
    named = {"classes": list(classes)} if classes else {}
    description = json.dumps({"model": to_dict(model), "objective": to_dict(objective), **named})
    header: dict[str, Any] = {"__metadata__": {"format": "pt", METADATA_KEY: description}}
    end = 0
    for name, value in sorted(tensors.items()):
        begin, end = end, end + value.nbytes
        header[name] = {"dtype": "F32", "shape": list(value.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text = text.ljust(-(-len(text) // 8) * 8)  # tensors begin at a multiple of their size
    digest = hashlib.sha256()
    with path.open("wb") as file:
        rows = (value.cpu().contiguous().numpy().data for _, value in sorted(tensors.items()))
        for part in itertools.chain([len(text).to_bytes(8, "little"), text], rows):
            file.write(part)
            digest.update(part)
    return digest.hexdigest()
