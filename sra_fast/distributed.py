"""The processes of a run. Data-parallel training has not landed: a run is one process."""

from __future__ import annotations

import os

from sra_fast.config import refuse_unless


def refuse_several_processes() -> None:
    """Refuse to start under a launcher that made more than one process, which would train as many identical runs."""
    world = os.environ.get("WORLD_SIZE", "1")
    refuse_unless(world == "1", "WORLD_SIZE", world, "must be 1: data-parallel training has not landed yet")
