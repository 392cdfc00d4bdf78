"""The processes of a run. Data-parallel training is not implemented yet: a run is one process."""

from __future__ import annotations

import os
from typing import NamedTuple

from sra_fast.errors import Refused


class Place(NamedTuple):
    """The place of this process among those that a launcher has started."""

    rank: int
    world: int
    local_rank: int


def place() -> Place:
    """The place that torchrun or Slurm has given to this process; (0, 1, 0) without a launcher.

    Raises:
        Refused: if the environment's variables are no numbers or contradict each other, as one that an earlier launcher
            left behind does.
    """
    rank, rank_name = _number(("RANK", "SLURM_PROCID"), 0)
    world, world_name = _number(("WORLD_SIZE", "SLURM_NTASKS"), 1)
    local_rank, _ = _number(("LOCAL_RANK", "SLURM_LOCALID"), 0)
    if world < 1:
        raise Refused(world_name, str(world), "must be a number, 1 or more")
    if rank >= world:
        other = f"{world_name} = {world}" if world_name else "there is no WORLD_SIZE"
        raise Refused(rank_name, str(rank), f"but {other}; without a launcher, unset {rank_name}")
    return Place(rank, world, local_rank)


def _number(names: tuple[str, str], default: int) -> tuple[int, str]:
    """(value, name) of the first variable that is set."""
    for name in names:
        if value := os.environ.get(name):
            if not (value.isdecimal() and len(value) < 10):
                raise Refused(name, value, "must be a number, 0 or more")
            return int(value), name
    return default, ""


def refuse_several_processes() -> None:
    """Refuse to start under a launcher with more than one process, which would train identical runs."""
    world = os.environ.get("WORLD_SIZE", "1")
    if world != "1":
        raise Refused("WORLD_SIZE", world, "must be 1: data-parallel training is not implemented yet")
