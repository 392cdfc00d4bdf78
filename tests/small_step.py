"""Steps of the small network in conftest.py: batches, runners, and a comparison of two runs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from sra_fast.config import Config
from sra_fast.data.stream import Batch
from sra_fast.hardware import Hardware
from sra_fast.kernels.perturb import Stored
from sra_fast.model.backends import Backends
from sra_fast.model.layout import from_public
from sra_fast.step.ring import MetricRing
from sra_fast.step.runner import StepRunner
from sra_fast.step.state import TrainState
from sra_fast.step.step import TrainingStep

CPU = torch.device("cpu")
STEPS = 20
GROUPS = ("weights", "ema", "adam_m", "adam_v")


def changed(config: Config, **sections: dict) -> Config:
    """A configuration with some fields of some sections changed."""
    return replace(config, **{name: replace(getattr(config, name), **fields) for name, fields in sections.items()})


def batch(number: int, size: int = 8, channels: int = 1) -> Batch:
    """Batch `number` of a run."""
    generator = torch.Generator().manual_seed(number)
    x = torch.randn(size, channels, 8, 8, generator=generator)
    return Batch(x, torch.randint(4, (size,), generator=generator), torch.arange(size) + number * size)


def start(
    config: Config,
    weights: dict[str, Tensor] | None = None,
    execution: str = "eager",
    dtype: torch.dtype = torch.float32,
    device: torch.device = CPU,
    ema: float = 1.0,
    stored: Stored | None = None,
    **options: object,
) -> StepRunner:
    """A runner, at `weights` (public names) and an EMA of `ema` times these if they are given."""
    backends = Backends.resolve(config, Hardware(device, dtype))
    state = TrainState.create(config, backends, device, dtype)
    if weights:
        tensors = {name: value.to(device) for name, value in from_public(weights).items()}
        state.load({"weights": tensors, "ema": {name: ema * value for name, value in tensors.items()}})
    step = TrainingStep(config, backends, device, stored)
    return StepRunner(step, state, MetricRing(STEPS, device), execution, **options)


def advance(runner: StepRunner, first: int = 0, stop: int = STEPS) -> StepRunner:
    """The runner after steps `first` to `stop` - 1. Rates and weights change: they must not become constants."""
    config = runner.step.config
    for k in range(first, stop):
        runner(batch(k, config.train.batch, config.model.channels), 1e-3 * (1 + k % 3), 0.5 + 0.01 * k)
    return runner


def assert_same_state(a: TrainState, b: TrainState) -> None:
    """Bitwise."""
    for group in GROUPS:
        for name, value in getattr(a, group).items():
            assert torch.equal(value, getattr(b, group)[name]), (group, name)


def assert_close(a: StepRunner, b: StepRunner, weights: dict[str, Tensor], losses: float, distance: float) -> None:
    """Losses of all steps to a relative error, parameters to a share of the distance from their start.

    Adam divides by the gradient's own size, so elements whose gradient is nearly all rounding may go another way. They
    are few: over a tensor, two ends are close compared with the distance from the start.
    """
    for k, rows in enumerate(zip(a.ring.last(STEPS), b.ring.last(STEPS), strict=True)):
        for name in ("loss", "velocity_loss", "alignment_loss"):
            values = [getattr(row, name) for row in rows]
            assert values[0] == pytest.approx(values[1], rel=losses, abs=losses), (k, name)
    first = from_public(weights)
    for group in ("weights", "ema"):
        for name, value in getattr(a.state, group).items():
            tensors = [tensor.cpu() for tensor in (value, getattr(b.state, group)[name], first[name])]
            if name.endswith("qkv.bias"):
                # A bias of the keys adds the same to all of a query's scores, which softmax takes away: its gradient
                # is nothing but rounding, and Adam takes steps of full size along it.
                tensors = [torch.cat([t.chunk(3)[0], t.chunk(3)[2]]) for t in tensors]
            gap, moved = float((tensors[0] - tensors[1]).norm()), float((tensors[0] - tensors[2]).norm())
            assert moved > 0 or name == "pos_embed"
            assert gap <= distance * moved, (group, name, gap, moved)
