"""The processes of a run. Data-parallel training is not implemented yet: a run is one process."""

from __future__ import annotations

import os

from sra_fast.errors import Refused


def refuse_several_processes() -> None:
    """Refuse to start under a launcher with more than one process, which would train identical runs."""
    world_size = os.environ.get("WORLD_SIZE", "1")
    if world_size != "1":
        raise Refused("WORLD_SIZE", world_size, "must be 1: data-parallel training is not implemented yet")
