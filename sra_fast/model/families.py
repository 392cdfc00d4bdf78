"""What the numbers of a checkpoint mean: which way its time runs, and what its last layer predicts.

Public checkpoints of SiT-SRA, DiT, REPA and the original SiT have the same names and, in part, the same shapes:

    sit             t = 1 is noise; predicts noise - data, C channels                 SiT-SRA, REPA
    sit-original    t = 1 is data; predicts data - noise, 2 C channels, half unused   github.com/willisma/SiT
    dit             1,000 steps; predicts noise and its variance, 2 C channels        DiT, DiT-SRA

A file that does not say which it is, by SRA's head, by the heads of a method that builds on it, or by the arguments it
was trained with, is refused until the user says it. The weights of an original SiT are converted into those of a sit.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sra_fast.errors import Refused

FAMILIES = ("sit", "sit-original", "dit")
# Heads that only checkpoints with SiT-SRA's direction of time have: SRA's own, REPA's and Self-Transcendence's.
HEADS_OF_SIT = ("ap_head.", "projectors.", "projectors_final.")


def family_of(
    tensors: Mapping[str, Tensor], arguments: Mapping[str, Any], named: str, doubled: bool, path: Path
) -> str:
    """The family of a state dict.

    Args:
        tensors: under the public names, with the heads of other projects.
        arguments: what the file says about its training; may be empty.
        named: by the user; "auto" = what the file says.
        doubled: whether the last layer has 2 C channels.
        path: for messages.

    Raises:
        Refused: if the file does not say, or the family that is named cannot have such a layer.
    """
    model = str(arguments.get("model", ""))
    has_head = any(name.startswith(HEADS_OF_SIT) for name in tensors)
    if has_head:
        known = "dit" if doubled else "sit"
    elif re.match("DiT", model):
        known = "dit"
    elif re.match("SiT", model) and doubled:
        known = "sit-original"  # its second half was for a variance that is not learned
    else:
        known = ""
    if named == "auto":
        if not known:
            choice = "dit or sit-original" if doubled else "sit or sit-original"
            raise Refused(
                f"{path}: does not say whether it is {choice}, which differ in what they predict and in the direction "
                "of time; say it with --weights-family"
            )
        return known
    possible = ("dit", "sit-original") if doubled else ("sit", "sit-original")
    if known and named != known:
        raise Refused("weights-family", named, f"but {path} is of family {known}")
    if named not in possible:
        rule = f"but {path} predicts {'twice ' if doubled else ''}as many channels as it reads: {' or '.join(possible)}"
        raise Refused("weights-family", named, rule)
    return named


def from_original_sit(tensors: dict[str, Tensor], channels: int, frequencies: Tensor) -> dict[str, Tensor]:
    """The weights of a sit that computes -v(x, 1 - t), where the original SiT with these weights computes v(x, t).

    The last layer loses its unused half and changes its sign. The first layer of the time embedding reads cos(t f) and
    sin(t f); those of 1 - t are sums of them:

        cos((1 - t) f) = cos f cos(t f) + sin f sin(t f)
        sin((1 - t) f) = sin f cos(t f) - cos f sin(t f)

    Args:
        tensors: under the public names, floating dtype.
        channels: C.
        frequencies: f, (128,) float32.
    """
    time, last = "t_embedder.mlp.0.weight", ("final_layer.linear.weight", "final_layer.linear.bias")
    cos_columns, sin_columns = tensors[time].double().chunk(2, dim=1)
    cos, sin = frequencies.double().cos(), frequencies.double().sin()
    columns = [cos_columns * cos + sin_columns * sin, cos_columns * sin - sin_columns * cos]
    converted = {time: torch.cat(columns, dim=1).to(tensors[time].dtype)}
    for name in last:
        patches = tensors[name].unflatten(0, (-1, 2 * channels if _is_doubled(tensors, channels) else channels))
        converted[name] = -patches[:, :channels].flatten(0, 1)
    return {**tensors, **converted}


def _is_doubled(tensors: Mapping[str, Tensor], channels: int) -> bool:
    patch = tensors["x_embedder.proj.weight"].shape[-1]
    return len(tensors["final_layer.linear.bias"]) == 2 * channels * patch**2
