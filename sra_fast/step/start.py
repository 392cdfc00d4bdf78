"""State and step of a run, for one process or several."""

from __future__ import annotations

from dataclasses import replace

import torch

from sra_fast.config import Config
from sra_fast.distributed import ALONE, World
from sra_fast.kernels.perturb import Stored
from sra_fast.model.backends import Backends
from sra_fast.model.transformer import Transformer
from sra_fast.step.plan import BUCKET, Parameter, Plan, backward_order
from sra_fast.step.state import TrainState, trained_names
from sra_fast.step.step import TrainingStep
from sra_fast.step.sync import Synchronisation


def start(
    config: Config,
    backends: Backends,
    device: torch.device,
    dtype: torch.dtype,
    world: World = ALONE,
    stored: Stored | None = None,
) -> tuple[TrainState, TrainingStep]:
    """A new state and the step that trains it. On one process, unless sums are in a fixed order, nothing is
    synchronised and nothing is cut.

    Args:
        config: of the run, with the model's sizes filled in.
        backends: what computes each op.
        device: of the state.
        dtype: of the networks.
        world: the processes of the run.
        stored: how to compute x from stored data; None if batches have x itself.

    Raises:
        Refused: if the batch cannot be split between the processes.
    """
    train = config.train.on(world.size)
    config = replace(config, train=train)
    if world.size == 1 and train.reduction == "fast":
        state = TrainState.create(config, backends, device, dtype)
        return state, TrainingStep(config, backends, device, stored)
    plan = plan_of(config, world.size)
    is_sharded = is_state_sharded(config, world)
    state = TrainState.create(config, backends, device, dtype, world, plan if is_sharded else None)
    whole = {piece.name: piece for piece in plan.whole()}
    pieces = plan.pieces(world.rank) if is_sharded else [whole[name] for name in state.adam_m]
    micro_batches = train.micro_batches // world.size
    is_ordered = train.reduction == "ordered"
    auto = dtype if is_ordered or micro_batches == 1 else torch.float32
    sent = auto if is_ordered else {"bf16": torch.bfloat16, "fp32": torch.float32}.get(train.reduce_dtype, auto)
    sync = Synchronisation(
        plan,
        world,
        state.trained_names,
        pieces,
        [state.weights[piece.name].shape for piece in pieces],
        sent,
        is_ordered,
        micro_batches,
        is_sharded,
        device,
    )
    if not is_ordered:
        sync.watch(state.trained)
    return state, TrainingStep(config, backends, device, stored, sync, world.size)


def is_state_sharded(config: Config, world: World) -> bool:
    """Whether each process has its share of the state only."""
    return config.optim.shard == "world" or (config.optim.shard == "auto" and world.size > 1)


def plan_of(config: Config, ranks: int) -> Plan:
    """Where the trained parameters of a run lie in its flat buffers."""
    with torch.device("meta"):
        student, teacher = Transformer(config.model), Transformer(config.model)
    teacher.truncate_after(0 if config.align.method == "none" else config.taps[1])
    in_teacher = {name for name, _ in teacher.named_parameters()}
    sizes = {name: parameter.numel() for name, parameter in student.named_parameters()}
    order = backward_order(trained_names(config, sizes), config.taps[0])
    return Plan.create([Parameter(name, sizes[name], name in in_teacher) for name in order], ranks, BUCKET)
