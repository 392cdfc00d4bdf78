"""Memory that a run cannot do without, and what the machine has: what cannot fit is refused before it is allocated.

The figures are lower bounds, so that nothing is refused that would fit; a run that is not refused may still need more.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import torch

from sra_fast.config import Config, ModelConfig, SampleConfig
from sra_fast.errors import Refused
from sra_fast.flops import FREQUENCIES
from sra_fast.hardware import Hardware

GB = 1e9
# Rows of width D that a block keeps for its backward pass, at least: its two inputs, qkv, the output of attention, and
# two of the MLP's hidden layer at its smallest.
ROWS_PER_BLOCK = 8
CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def parameters(config: ModelConfig) -> int:
    """Number of parameters of the network with its head, the position table included."""
    width, patch = config.hidden, config.patch**2
    total = width * config.channels * patch + width  # patch embedding
    total += FREQUENCIES * width + width + width * width + width  # time embedder
    total += (config.classes + 1) * width + config.tokens * width
    block = 4 * width * width + 4 * width  # qkv and proj
    block += 2 * config.mlp_ratio * width * width + (config.mlp_ratio + 1) * width
    if config.qk_norm:
        block += 4 * (width // config.heads)
    total += config.depth * block
    total += (6 * config.depth + 2) * (width * width + width)  # modulation
    total += patch * config.output_channels * (width + 1)  # final layer
    return total + 4 * width * width + 3 * width  # head


def training_bytes(config: Config, dtype: torch.dtype, processes: int = 1) -> dict[str, int]:
    """{what: bytes} that training needs at least. Sizes that are not known yet count as their smallest.

    Args:
        dtype: that the networks compute in.
        processes: of the run, each with a device of its own.
    """
    model, data, size = config.model, config.data, dtype.itemsize
    if data.images and not model.input_size:  # before the images have been looked at
        model = replace(model, input_size=data.resolution, channels=data.channels)
    images = config.train.batch // config.train.micro_batches
    count = parameters(model)
    blocks = 1 if model.checkpoint_every else ROWS_PER_BLOCK
    copies = 0 if dtype == torch.float32 else 2 * size
    shares = processes if config.optim.shard != "none" else 1
    if shares > 1:  # networks of their own, and a flat buffer of gradients
        copies = 3 * size
    return {
        "weights, EMA and moments": 16 * count // shares,
        "gradients and copies": (size + copies) * count,
        f"the activations of {images:,} images": images * model.tokens * model.hidden * model.depth * blocks * size,
        "inputs": 4 * config.train.batch // processes * model.channels * model.input_size**2,
    }


def sampling_bytes(config: SampleConfig, model: ModelConfig) -> dict[str, int]:
    """{what: bytes} that a call of the network needs at least, in fp32: the inputs of one MLP, and
    its hidden layer before and after GELU."""
    images = min(config.count, 1 if config.batch_invariant else config.batch) * (2 if config.guidance != 1 else 1)
    block = images * model.tokens * model.hidden * 2 * (1 + model.mlp_ratio)
    return {"weights": 4 * parameters(model), f"the activations of {images:,} images": 4 * block}


def available(device: torch.device) -> int:
    """Bytes of a GPU, or those that this process may use of the machine."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for path in map(Path, CGROUP_LIMITS):
        try:
            memory = min(memory, int(path.read_text()))
        except (OSError, ValueError):  # no such file, or "max"
            continue
    return memory


def refuse_training(config: Config, hardware: Hardware, processes: int = 1) -> None:
    """Refuse a run that needs more memory than its device has; processes on a CPU share it."""
    rule = "lower --train.batch, raise --train.accumulate, or choose a smaller network"
    needed = training_bytes(config, hardware.dtype, processes)
    if hardware.device.type == "cpu":
        needed = {what: size * processes for what, size in needed.items()}
    refuse_beyond(needed, hardware.device, rule)


def refuse_beyond(needed: dict[str, int], device: torch.device, rule: str) -> None:
    """Refuse what needs more memory than there is, with the arithmetic.

    Args:
        needed: {what: bytes}.
        rule: how to need less.
    """
    there = available(device)
    if sum(needed.values()) > there:
        parts = " + ".join(f"{size / GB:,.1f} GB for {what}" for what, size in needed.items() if size > 0.01 * GB)
        name = "the GPU" if device.type == "cuda" else "this machine"
        raise Refused(f"memory: at least {parts}, but {name} has {there / GB:,.1f} GB: {rule}")
