"""One training step on the device that does not exist: its launches, and their sums."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch._dynamo.utils import counters

from benchmarks.harness import options
from benchmarks.static.device import DEVICE
from benchmarks.static.launches import Launch, Recorder
from sra_fast.config import Config
from sra_fast.data.stream import Batch
from sra_fast.hardware import Hardware
from sra_fast.model.backends import Backends
from sra_fast.step.ring import MetricRing
from sra_fast.step.state import TrainState
from sra_fast.step.step import TrainingStep


@dataclass(frozen=True)
class Count:
    """What one step launches. Sums over all of it, then by phase and kind, then the launches themselves."""

    launches: int
    gb: float
    gflop: float
    floor_ms: float
    parts: dict[str, dict[str, float]]
    """{"student, product": {"launches": ..., "gb": ..., "gflop": ..., "floor_ms": ...}}"""
    wrong: tuple[str, ...]
    """What a step must not do: breaks of a graph, compiling anew, operations between CPU and GPU."""


def configuration(size: str, batch: int, depth: int, family: str, ops: str) -> Config:
    """The configuration of a step.

    Args:
        size: key of SIZES.
        depth: number of blocks; 0 = the size's.
        ops: "best", every kernel of ours; "fused", those of the network and the loss; "reference", none.
    """
    config = options.sit(size, batch=batch, depth=depth)
    config = replace(config, model=replace(config.model, family=family))
    default = "reference" if ops == "reference" else "fused"
    kernels = replace(config.kernels, default=default)
    if ops == "fused":
        kernels = replace(kernels, adamw_ema="reference", gradient_norm="reference")
    return replace(config, kernels=kernels)


def launches_of(config: Config, execution: str, mode: Any) -> tuple[list[Launch], list[str]]:
    """(launches, what is wrong) of the second step; the first one compiles.

    Args:
        mode: of `device.pretend`.

    Raises:
        RuntimeError: if the host reads a value of the device, which fake tensors do not have.
    """
    torch._dynamo.reset()
    counters.clear()
    recorder = Recorder()
    hardware = Hardware(DEVICE, torch.bfloat16)
    backends = Backends.resolve(config, hardware)
    with recorder.installed(), mode:
        state = TrainState.create(config, backends, DEVICE, hardware.dtype)
        step, ring = TrainingStep(config, backends, DEVICE), MetricRing(8, DEVICE)
        if execution == "compiled":
            step.compile(state)
        side, images = config.model.input_size, config.train.batch
        x = torch.empty(images, config.model.channels, side, side, device=DEVICE)
        labels, number = (torch.empty(images, dtype=torch.int64, device=DEVICE) for _ in range(2))
        lr, weight = (torch.empty((), device=DEVICE) for _ in range(2))
        ring.push(step(state, Batch(x, labels, number), lr, weight))
        compiled = counters["stats"]["unique_graphs"]
        with recorder.active():
            ring.push(step(state, Batch(x, labels, number), lr, weight))
    wrong = [f"graph break: {reason}" for reason in counters["graph_break"]]
    if counters["stats"]["unique_graphs"] != compiled:
        wrong.append(f"{counters['stats']['unique_graphs'] - compiled} graphs are compiled anew in the second step")
    wrong += [f"CPU and GPU in one operation: {launch.name}" for launch in recorder.launches if launch.is_mixed]
    gc.collect()
    return recorder.launches, wrong


def count(launches: Sequence[Launch], wrong: Sequence[str], tflops: float, tb_per_s: float) -> Count:
    """Sums of launches, with the floor at these roofs."""

    def sums(some: Sequence[Launch]) -> dict[str, Any]:
        floor_s = sum(max(one.flops / (1e12 * tflops), one.bytes / (1e12 * tb_per_s)) for one in some)
        gb, gflop = sum(one.bytes for one in some) / 1e9, sum(one.flops for one in some) / 1e9
        return {
            "launches": len(some),
            "gb": round(gb, 4),
            "gflop": round(gflop, 2),
            "floor_ms": round(1e3 * floor_s, 3),
        }

    parts: dict[str, list[Launch]] = {}
    for one in launches:
        parts.setdefault(f"{one.phase}, {one.kind}", []).append(one)
    return Count(**sums(launches), parts={name: sums(some) for name, some in sorted(parts.items())}, wrong=tuple(wrong))
