"""The processes of a run: which of them this one is, and what they tell each other.

Processes are started by torchrun or by Slurm's srun, one for each GPU, or several on CPUs. `join` connects them by
torch.distributed: NCCL between GPUs, gloo between CPUs, and gloo for what the hosts agree on.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from sra_fast.errors import Refused

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from torch.distributed import Work

T = TypeVar("T")
PORTS = 20_000, 40_000  # of the first process under srun, by the number of the job
TIMEOUT = timedelta(minutes=30)  # of a collective: other processes wait while the first one draws previews
LOST = ("connection closed", "connection reset", "broken pipe", "timed out", "timeout", "remote process")


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
    world, world_name = _number(("WORLD_SIZE", "SLURM_STEP_NUM_TASKS"), 1)  # a batch script has no step
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


def refuse_several_processes(command: str) -> None:
    """Refuse to start a command under a launcher with several processes, which would all do the same."""
    world = place().world
    if world != 1:
        raise Refused("WORLD_SIZE", str(world), f"must be 1: {command} is one process")


class ElsewhereRefused(Refused):
    """Raised on every process but the one that has refused, which says why."""


class World:
    """The processes of a run. With one process, every collective returns its input.

    Collectives must be called by all processes in the same order. Those on tensors return a handle to wait for.

    Attributes:
        rank, size, local_rank: as in `Place`.
        saving: the same processes, for a thread of its own: threads that share connections would wait for each other.
    """

    def __init__(self, where: Place, control: Any = None, saving: Any = None) -> None:
        self.rank, self.size, self.local_rank = where.rank, where.world, where.local_rank
        self._control = control  # gloo, for objects
        self.saving = self if saving is None else World(where, saving)

    @property
    def is_first(self) -> bool:
        """Whether this process speaks and writes for all."""
        return self.rank == 0

    @property
    def name(self) -> str:
        """For messages."""
        return f"rank {self.rank} on {socket.gethostname()}"

    def gather(self, value: T) -> list[T]:
        """The values of all processes, by rank; any objects."""
        if self.size == 1:
            return [value]
        import torch.distributed as dist

        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self._control)
        return values

    def barrier(self) -> None:
        """Wait until all processes are here."""
        self.gather(None)

    def largest(self, *values: int) -> list[int]:
        """The maximum of each value over all processes."""
        if self.size == 1:
            return list(values)
        import torch
        import torch.distributed as dist

        numbers = torch.tensor(values, dtype=torch.int64)
        dist.all_reduce(numbers, dist.ReduceOp.MAX, group=self._control)
        return numbers.tolist()

    def together(self, function: Callable[[], T]) -> T:
        """Call a function on every process. If it is refused on some, all are: the first of these raises what its own
        call raised, the others `ElsewhereRefused`."""
        error: Refused | None = None
        result: Any = None
        try:
            result = function()
        except Refused as refused:
            error = refused
        failed = [rank for rank, refused in enumerate(self.gather(error is not None)) if refused]
        if error and failed[0] == self.rank:
            raise error
        if failed:
            raise ElsewhereRefused(f"refused by rank {failed[0]}")
        return result

    def first(self, function: Callable[[], T]) -> T:
        """What the first process gets from a function, on every process; if it is refused there, on every process."""
        return self.gather(self.together(lambda: function() if self.is_first else None))[0]  # pyright: ignore[reportReturnType]

    def all_reduce(self, tensor: Tensor) -> Work | None:
        """Replace a tensor by its sum over all processes."""
        if self.size == 1:
            return None
        import torch.distributed as dist

        return dist.all_reduce(tensor, async_op=True)

    def reduce_scatter(self, tensor: Tensor) -> Work | None:
        """Replace this process's slice of a tensor, one of `size` equal ones, by its sum over all processes. The other
        slices are undefined afterwards."""
        if self.size == 1:
            return None
        return _collective("reduce_scatter")(self.slice_of(tensor), tensor, async_op=True)

    def all_gather(self, tensor: Tensor) -> Work | None:
        """Replace every slice of a tensor by that of the process that owns it."""
        if self.size == 1:
            return None
        return _collective("all_gather")(tensor, self.slice_of(tensor), async_op=True)

    def all_to_all(
        self, output: Tensor, tensor: Tensor, output_sizes: Sequence[int], sizes: Sequence[int]
    ) -> Work | None:
        """Send consecutive parts of a flat tensor, of these sizes, to the processes, and receive theirs."""
        if self.size == 1:
            output.copy_(tensor)
            return None
        import torch.distributed as dist

        return dist.all_to_all_single(output, tensor, list(output_sizes), list(sizes), async_op=True)

    def slice_of(self, tensor: Tensor) -> Tensor:
        """This process's slice of a flat tensor, a view."""
        size = len(tensor) // self.size
        return tensor[self.rank * size : (self.rank + 1) * size]


ALONE = World(Place(0, 1, 0))


def _collective(name: str) -> Callable[..., Work]:
    """all_gather or reduce_scatter of flat tensors, which torch 2.13 has renamed."""
    import torch.distributed as dist

    older = {"all_gather": "all_gather_into_tensor", "reduce_scatter": "reduce_scatter_tensor"}[name]
    return getattr(dist, f"{name}_single", None) or getattr(dist, older)


@contextmanager
def join(device: torch.device) -> Iterator[World]:
    """Connect with the other processes of the run, for the time of this block, or use the connections there are.

    Args:
        device: where tensors are. With GPUs, this process gets the one of its local rank as the current one.

    Raises:
        Refused: if the launcher's variables cannot be used.
    """
    where = place()
    if where.world == 1:
        yield ALONE
        return
    _check_local_rank(where, device)
    _set_address(where)
    import torch
    import torch.distributed as dist

    options: dict[str, Any] = {"backend": "gloo"}
    if device.type == "cuda":
        torch.cuda.set_device(where.local_rank)
        options = {"backend": "nccl", "device_id": torch.device("cuda", where.local_rank)}
    is_joined = dist.is_initialized()
    try:
        if not is_joined:
            dist.init_process_group(**options, rank=where.rank, world_size=where.world, timeout=TIMEOUT)
        control, saving = (dist.new_group(backend="gloo", timeout=TIMEOUT) for _ in range(2))
    except (RuntimeError, ValueError) as error:
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise Refused(f"the processes cannot connect through {address}: {str(error).splitlines()[0]}") from error
    world = World(where, control, saving)
    try:
        yield world
    except ElsewhereRefused:
        raise
    except Refused as error:
        raise error if world.is_first else Refused(f"{world.name}: {error}") from error
    except RuntimeError as error:
        if not any(words in str(error).lower() for words in LOST):
            error.add_note(f"on {world.name}")
            raise
        reason = re.sub(r"^\[\S*\] ", "", str(error).splitlines()[0]).split(". ")[0]  # without gloo's source line
        raise Refused(f"{world.name}: another process has ended or does not answer ({reason})") from error
    finally:
        if not is_joined:
            dist.destroy_process_group()


def _check_local_rank(where: Place, device: torch.device) -> None:
    if not any(os.environ.get(name) for name in ("LOCAL_RANK", "SLURM_LOCALID")):
        rule = (
            "but there is no LOCAL_RANK: this launcher counts machines, not processes; start torchrun on each machine:"
            " torchrun --nnodes WORLD_SIZE --node-rank RANK --nproc-per-node GPUS --no-python sra-fast train ..."
        )
        raise Refused("WORLD_SIZE", str(where.world), rule)
    if device.type == "cuda":
        import torch

        if where.local_rank >= (count := torch.cuda.device_count()):
            rule = f"but this machine has {count} GPUs; start one process for each"
            raise Refused("LOCAL_RANK", str(where.local_rank), rule)


def _set_address(where: Place) -> None:
    """Where the first process is, if the launcher has not said so: under srun, on the first host of the job."""
    if os.environ.get("MASTER_ADDR") and os.environ.get("MASTER_PORT"):
        return
    hosts, job = os.environ.get("SLURM_JOB_NODELIST", ""), os.environ.get("SLURM_JOB_ID", "")
    if not hosts or not job.isdecimal():
        raise Refused(
            "WORLD_SIZE", str(where.world), "but there is no MASTER_ADDR and MASTER_PORT; start with torchrun or srun"
        )
    first, last = PORTS
    os.environ.setdefault("MASTER_ADDR", first_host(hosts))
    os.environ.setdefault("MASTER_PORT", str(first + int(job) % (last - first)))


def first_host(hosts: str) -> str:
    """The first of Slurm's list: node[03-07,12],login1 -> node03."""
    match = re.match(r"([^,\[]*)(?:\[(\d+)[^\]]*\]([^,\[]*))?", hosts)
    assert match, "every text begins with an empty one"
    return "".join(part or "" for part in match.groups())
