"""Parameter names and layout in memory, and the public names of checkpoint files.

Every block projects the same vector, SiLU of the condition, to its own shifts, scales and gates. In memory these
projections are one matrix, so that one product computes them all:

    modulation.weight ((6 L + 2) D, D)    rows: shift, scale, gate of block 1's attention, of its MLP, block 2 ...,
    modulation.bias   ((6 L + 2) D,)      shift and scale of the final layer

In files they are blocks.<i>.adaLN_modulation.1.* (6 D rows each) and final_layer.adaLN_modulation.1.* (2 D rows). All
other names are the same in both.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

KINDS = ("weight", "bias")
PER_BLOCK, PER_FINAL_LAYER = 6, 2  # modulation vectors of D
_PUBLIC_MODULATION = re.compile(r"(?:blocks\.\d+|final_layer)\.adaLN_modulation\.1\.(weight|bias)")


def public_parts(names: Iterable[str]) -> dict[str, list[str]]:
    """{name in memory: the public names of what it consists of, in this order}.

    Args:
        names: public, blocks in the network's order.
    """
    parts: dict[str, list[str]] = {}
    joined: dict[str, list[str]] = {f"modulation.{kind}": [] for kind in KINDS}
    for name in names:
        if match := _PUBLIC_MODULATION.fullmatch(name):
            joined[f"modulation.{match[1]}"].append(name)
        else:
            parts[name] = [name]
    return parts | joined


def from_public(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under public names -> under the names in memory. The modulations are copied, the others are shared.

    Args:
        tensors: blocks in the network's order.
    """
    return {name: join([tensors[part] for part in parts]) for name, parts in public_parts(tensors).items()}


def join(parts: Sequence[Tensor]) -> Tensor:
    """A tensor in memory from its public parts."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def to_public(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under the names in memory -> under public names, in the public order. Nothing is copied: the modulations
    are views."""
    width = tensors["modulation.weight"].shape[1]
    depth = (len(tensors["modulation.bias"]) // width - PER_FINAL_LAYER) // PER_BLOCK
    sizes = [PER_BLOCK * width] * depth + [PER_FINAL_LAYER * width]
    owners = [f"blocks.{i}" for i in range(depth)] + ["final_layer"]
    rows = {kind: dict(zip(owners, tensors[f"modulation.{kind}"].split(sizes), strict=True)) for kind in KINDS}
    public = {}
    for name, tensor in tensors.items():
        if name.startswith("modulation."):
            continue
        public[name] = tensor
        if name.endswith(("mlp.fc2.bias", "final_layer.linear.bias")):  # the last of its owner's other parameters
            owner = name.removesuffix(".mlp.fc2.bias").removesuffix(".linear.bias")
            public |= {f"{owner}.adaLN_modulation.1.{kind}": rows[kind][owner] for kind in KINDS}
    return public
