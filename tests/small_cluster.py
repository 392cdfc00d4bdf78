"""Processes on one machine, connected by gloo: what they compute together is returned to a test.

    python tests/small_cluster.py FILE NAME RANKS...

calls the function NAME of FILE on 1, 2, ... processes, once for each of RANKS. They are forked from one process that
has imported everything, which takes longer than all the rest.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import pickle
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

KILLED = "killed"  # instead of what a process would have returned


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def on_ranks(file: str, name: str, ranks: Sequence[int], timeout_s: float = 240) -> list[list[Any]]:
    """For each number of processes: what the function has returned on each of them, by rank, or `KILLED`. It is called
    with the `World`."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, file, name, *map(str, ranks)]
    result = subprocess.run(command, env=environment, capture_output=True, timeout=timeout_s)
    assert result.returncode == 0, result.stderr.decode()
    return pickle.loads(result.stdout)


def _child(function: Any, place: dict[str, int], results: Any) -> None:
    import torch

    from sra_fast.distributed import join
    from sra_fast.errors import Refused

    os.environ |= {name: str(value) for name, value in place.items()}
    torch.set_num_threads(1)
    os.dup2(2, 1)  # what is printed must not mix with the answers
    try:
        with join(torch.device("cpu")) as world:
            answer = place["RANK"], function(world), ""
    except Refused as error:
        answer = place["RANK"], f"{type(error).__name__}: {error}", ""
    except BaseException:
        answer = place["RANK"], None, traceback.format_exc()
    results.put(pickle.dumps(answer))  # bytes: the queue would share the memory of tensors, which ends with the process


def _main() -> None:
    file, name, *ranks = sys.argv[1:]
    sys.path.insert(0, str(Path(file).parent))
    function = getattr(importlib.import_module(Path(file).stem), name)
    context, found = multiprocessing.get_context("fork"), []
    for size in map(int, ranks):
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        results = context.SimpleQueue()
        places = [{"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size} for rank in range(size)]
        children = [context.Process(target=_child, args=(function, place, results)) for place in places]
        for child in children:
            child.start()
        answers = []
        while len(answers) < size and (any(child.is_alive() for child in children) or not results.empty()):
            if not results.empty():
                answers.append(pickle.loads(results.get()))
            time.sleep(0.01)
        for child in children:
            child.join()
        answers += [(r, KILLED, "") for r in range(size) if r not in {answer[0] for answer in answers}]
        answers.sort(key=lambda answer: answer[0])
        if errors := [f"rank {rank} of {size}:\n{error}" for rank, _, error in answers if error]:
            sys.exit("\n".join(errors))
        found.append([value for _, value, _ in answers])
    sys.stdout.buffer.write(pickle.dumps(found))


if __name__ == "__main__":
    _main()
