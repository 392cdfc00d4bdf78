"""Steps of several processes: what they compute together, against one process."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from small_cluster import on_ranks
from torch import Tensor

from sra_fast.config import AlignConfig, Config, DataConfig, ModelConfig, OptimConfig, TrainConfig
from sra_fast.data.stream import Batch
from sra_fast.distributed import World
from sra_fast.hardware import Hardware
from sra_fast.model.backends import Backends
from sra_fast.step import start as starting
from sra_fast.step import tree
from sra_fast.step.state import PER_PARAMETER, TrainState

CPU = torch.device("cpu")
BATCH, STEPS = 12, 3
FP32, BF16 = torch.float32, torch.bfloat16


def config(family: str = "sit", shard: str = "none", **train: Any) -> Config:
    return Config(
        model=ModelConfig(family=family, depth=3, hidden=32, heads=2, patch=2, input_size=8, channels=1, classes=4),
        align=AlignConfig(method="sra"),
        # A large eps: otherwise Adam enlarges the rounding of a gradient that is zero, as that of a key's bias.
        optim=OptimConfig(lr=1e-2, weight_decay=0.1, eps=1e-2, shard=shard),
        data=DataConfig(resolution=8),
        train=TrainConfig(images=800, batch=BATCH, **train),
    )


def batch(number: int, world: World) -> Batch:
    """This process's images of a step."""
    generator = torch.Generator().manual_seed(number)
    x = torch.randn(BATCH, 1, 8, 8, generator=generator)
    labels = torch.randint(4, (BATCH,), generator=generator)
    numbers = torch.arange(number * BATCH, (number + 1) * BATCH)
    local = BATCH // world.size
    part = slice(world.rank * local, (world.rank + 1) * local)
    return Batch(x[part], labels[part], numbers[part])


def wake(state: TrainState) -> None:
    """Noise everywhere: a fresh network is the identity, and its gradients are zero."""
    generator = torch.Generator().manual_seed(7)
    shapes = {name: tensor.shape for name, tensor in state.whole("weights").items()}
    weights = {name: 0.1 * torch.randn(shapes[name], generator=generator) for name in sorted(shapes)}
    state.load({"weights": weights, "ema": weights})


def trained(
    world: World, config: Config, dtype: torch.dtype = FP32, batches: Callable[[int, World], Batch] = batch
) -> dict[str, Any]:
    """Metrics of each step, and the whole state afterwards."""
    state, step = starting.start(config, Backends.resolve(config, Hardware(CPU, dtype)), CPU, dtype, world)
    wake(state)
    lr, weight = torch.tensor(1e-2), torch.tensor(0.5)
    rows = [[float(x) for x in step(state, batches(number, world), lr, weight)] for number in range(STEPS)]
    if state.shard:
        state.shard.gather()
        state.shard.wait()
    networks = {
        f"{network}.{name}": parameter.detach()
        for network in ("student", "teacher")
        for name, parameter in getattr(state, network).named_parameters()
    }
    tensors = {f"{field}.{name}": tensor for field in PER_PARAMETER for name, tensor in state.whole(field).items()}
    return {"rows": rows, "tensors": {name: tensor.clone() for name, tensor in sorted((networks | tensors).items())}}


def digest(result: dict[str, Any]) -> str:
    """Of every bit."""
    sums = hashlib.sha256(repr(result["rows"]).encode())
    for name, tensor in result["tensors"].items():
        sums.update(name.encode() + tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return sums.hexdigest()


ORDERED = {
    f"{family}, {dtype}, micro-batches of {size}": (family, size, dtype)
    for family, size, dtype in (("sit", 1, FP32), ("sit", 3, FP32), ("sit", 1, BF16), ("dit", 1, FP32))
}


def ordered(world: World) -> dict[str, list[str]]:
    """Digests of ordered runs, unsharded and sharded."""
    results = {}
    for name, (family, size, dtype) in ORDERED.items():
        parts = BATCH // size
        if parts % world.size:
            continue
        configs = [config(family, shard, micro_batch=size, reduction="ordered") for shard in ("none", "world")]
        results[name] = [digest(trained(world, one, dtype)) for one in configs]
    return results


def fast(world: World) -> dict[str, Any]:
    once, again, shard = (trained(world, config(shard=shard)) for shard in ("none", "none", "world"))
    accumulated = trained(world, config(shard="world", accumulate=BATCH // world.size))
    return {
        "rows": once["rows"],
        "tensors": once["tensors"],
        "digests": [digest(result) for result in (once, again, shard)],
        "accumulated": accumulated,
    }


def planted(world: World) -> dict[str, str]:
    """{fault: digest of an ordered run that has it}, on two processes."""
    sound, total = World.slice_of, tree.total

    def shifted(self: World, tensor: Tensor) -> Tensor:
        own = sound(self, tensor)
        return tensor[1 : 1 + len(own)] if self.rank == 0 and len(own) > 3 else own

    def reverse(parts: Iterable[tuple[tree.Node, Tensor]], add: Any) -> Tensor:
        first, *others = [value for _, value in parts][::-1]
        for other in others:
            first = add(first, other)
        return first

    def own_number(number: int, world: World) -> Batch:
        images = batch(number, world)
        return images._replace(number=torch.arange(len(images.number)))

    faults = {
        "": (tree, "total", total),
        "slice off by one": (World, "slice_of", shifted),
        "another order": (tree, "total", reverse),
    }
    digests = {}
    one = config(shard="world", micro_batch=2, reduction="ordered")
    for name, fault in faults.items():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(*fault)
            digests[name] = digest(trained(world, one))
    return digests | {"numbers of the process": digest(trained(world, one, batches=own_number))}


def both(world: World) -> tuple[dict[str, list[str]], dict[str, Any], dict[str, str]]:
    return ordered(world), fast(world), planted(world) if world.size == 2 else {}


@pytest.fixture(scope="module")
def results() -> dict[int, list[Any]]:
    sizes = (1, 2, 3, 4)
    return dict(zip(sizes, on_ranks(__file__, "both", sizes), strict=True))


@pytest.mark.parametrize("name", ORDERED)
def test_ordered_runs_have_the_same_bits_on_any_number_of_processes(results, name: str) -> None:
    digests = {size: [rank[0].get(name) for rank in ranks] for size, ranks in results.items()}
    (expected,) = set(digests[1][0])
    computed = {size: ranks for size, ranks in digests.items() if ranks[0]}
    assert len(computed) >= 3
    for size, ranks in computed.items():
        assert all(digest == expected for rank in ranks for digest in rank), size


@pytest.mark.parametrize("size", [2, 3, 4])
def test_a_fast_run_is_that_of_one_process_but_for_rounding(results, size: int) -> None:
    alone = results[1][0][1]
    for _, rank, _ in results[size]:
        first, again, sharded = rank["digests"]
        assert first == again, "twice the same bits"
        assert first == sharded, "sharded = replicated"
        assert rank["digests"] == results[size][0][1]["digests"], "all processes agree"
        for result in (rank, rank["accumulated"]):
            assert_close(result, alone)


def test_planted_faults_change_the_bits(results) -> None:
    for _, _, digests in results[2]:
        sound = digests.pop("")
        assert len({sound, *digests.values()}) == 1 + len(digests) == 4


def assert_close(result: dict[str, Any], expected: dict[str, Any]) -> None:
    """fp32 sums of 12 gradients in another order: a few units in the last place of the largest term, for 3 steps."""
    torch.testing.assert_close(torch.tensor(result["rows"]), torch.tensor(expected["rows"]), rtol=1e-5, atol=1e-6)
    for name, tensor in expected["tensors"].items():
        torch.testing.assert_close(result["tensors"][name], tensor, rtol=1e-4, atol=2e-6, msg=name)
