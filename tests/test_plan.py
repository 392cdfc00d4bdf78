"""The plan of flat buffers, for hundreds of processes, and the tree of sums."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor.debug import CommDebugMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from sra_fast.config import Config, ModelConfig, OptimConfig, TrainConfig, preset
from sra_fast.data.stream import Batch
from sra_fast.distributed import Place, World
from sra_fast.memory import parameters
from sra_fast.model.backends import REFERENCE
from sra_fast.step import tree
from sra_fast.step.plan import ALIGNMENT, Parameter, Plan, backward_order
from sra_fast.step.start import plan_of, start

XL = {"depth": 28, "hidden": 1152, "heads": 16}
THREE_BILLION = {"depth": 40, "hidden": 2048, "heads": 32}


def network(**sizes: int) -> Config:
    model = ModelConfig(input_size=32, channels=4, classes=1000, **sizes)
    return replace(preset("sit-xl-2"), model=model)


@pytest.mark.parametrize("sizes", [XL, THREE_BILLION], ids=["XL", "3 B"])
@pytest.mark.parametrize("ranks", [1, 8, 512])
def test_the_slices_hold_every_parameter_once_and_little_else(sizes, ranks: int) -> None:
    config = network(**sizes)
    plan = plan_of(config, ranks)
    total = sum(parameter.size for bucket in plan.buckets for parameter in bucket.parameters)
    assert total == parameters(config.model) - config.model.tokens * config.model.hidden  # all but the positions
    covered: dict[str, int] = {}
    largest = 0
    for rank in range(ranks):
        pieces = plan.pieces(rank)
        largest = max(largest, sum(piece.stop - piece.start for piece in pieces))
        assert len({piece.name for piece in pieces}) == len(pieces), "one piece of a parameter in a slice"
        for piece in pieces:
            assert piece.start == covered.get(piece.name, 0), "in order, without gaps"
            covered[piece.name] = piece.stop
            assert piece.offset % ALIGNMENT == 0
    assert sum(covered.values()) == total
    padded = sum(bucket.size for bucket in plan.buckets)
    assert padded <= total + len(plan.buckets) * ranks * plan.grain
    assert padded <= 1.25 * total
    assert largest <= 1.35 * total / ranks
    assert all(bucket.slice_size % plan.grain == 0 for bucket in plan.buckets)


def test_buckets_end_where_the_teacher_does_and_follow_the_backward_pass() -> None:
    config = network(**XL)
    plan = plan_of(config, 8)
    names = [parameter.name for bucket in plan.buckets for parameter in bucket.parameters]
    assert names[0].startswith("final_layer.")
    blocks = [int(name.split(".")[1]) for name in names if name.startswith("blocks.")]
    assert blocks == sorted(blocks, reverse=True)
    head = names.index("ap_head.linear1.weight")
    assert names[head - 1].startswith("blocks.8.")  # the ninth block; the eighth is the student's tap
    assert names[-1].split(".")[0] in ("modulation", "y_embedder", "t_embedder", "x_embedder")
    for bucket in plan.buckets:
        assert len({parameter.in_teacher for parameter in bucket.parameters}) == 1
    copied = sum(parameter.size for bucket in plan.buckets if bucket.in_teacher for parameter in bucket.parameters)
    left_out = [name for name in names if name.startswith(("blocks.2", "final_layer", "ap_head")) and name[8:9] != "."]
    assert copied < sum(parameter.size for bucket in plan.buckets for parameter in bucket.parameters)
    assert left_out


@pytest.mark.parametrize("tap", [1, 3])
def test_the_backward_order_is_that_of_autograd(tap: int) -> None:
    """By the hooks of a real backward pass."""
    config = Config(
        model=ModelConfig(depth=4, hidden=32, heads=2, input_size=8, channels=1, classes=4),
        train=TrainConfig(batch=2),
    )
    state, _ = start(config, REFERENCE, torch.device("cpu"), torch.float32)
    order: list[str] = []
    for name, parameter in zip(state.trained_names, state.trained, strict=True):
        parameter.register_hook(lambda gradient, name=name: order.append(name))
    x, t, labels = torch.randn(2, 1, 8, 8), torch.rand(2), torch.tensor([0, 1])
    prediction, features = state.student(x, t, labels, tap)
    torch.autograd.grad(prediction.sum() + features.sum(), state.trained)

    def group(name: str) -> str:
        return ".".join(name.split(".")[:2]) if name.startswith("blocks.") else name.split(".")[0]

    last = {name: place for place, name in enumerate(map(group, order))}
    expected = {name: place for place, name in enumerate(map(group, backward_order(order, tap)))}
    until = [name for name in sorted(expected, key=expected.__getitem__) if name.startswith(("final", "blocks", "ap_"))]
    assert until == [name for name in sorted(last, key=last.__getitem__) if name in until]


@pytest.mark.parametrize("sharded", [True, False])
def test_the_collectives_of_a_step_are_those_of_the_plan(sharded: bool, tmp_path) -> None:
    """One of 512 processes, the others of which are not there."""
    ranks = 512
    dist.init_process_group("fake", rank=3, world_size=ranks, store=FakeStore())
    try:
        config = Config(
            model=ModelConfig(depth=3, hidden=64, heads=2, input_size=8, channels=1, classes=4),
            optim=OptimConfig(shard="world" if sharded else "none"),
            train=TrainConfig(batch=ranks),
        )
        world = World(Place(3, ranks, 3), dist.group.WORLD)
        state, step = start(config, REFERENCE, torch.device("cpu"), torch.float32, world)
        batch = Batch(torch.randn(1, 1, 8, 8), torch.tensor([1]), torch.tensor([3]))
        with CommDebugMode() as collectives:
            step(state, batch, torch.tensor(1e-3), torch.tensor(0.5))
        counts = Counter({str(name).rpartition(".")[2]: n for name, n in collectives.get_comm_counts().items()})
    finally:
        dist.destroy_process_group()
    plan = plan_of(config, ranks)
    teacher = sum(bucket.in_teacher for bucket in plan.buckets)
    gathers = [count for name, count in counts.items() if "gather" in name]
    scatters = [count for name, count in counts.items() if "reduce_scatter" in name]
    sums = [count for name, count in counts.items() if "allreduce" in name or "all_reduce" in name]
    # Both networks and the norm; the gradients; losses.
    assert sum(gathers) == (len(plan.buckets) + teacher if sharded else 0) + 1
    assert sum(scatters) == (len(plan.buckets) if sharded else 0)
    assert sum(sums) == (0 if sharded else len(plan.buckets)) + 1


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_sum_of_a_bucket_begins_while_the_next_is_computed(accumulate: int, monkeypatch) -> None:
    monkeypatch.setattr("sra_fast.step.start.BUCKET", 20_000)
    begun: list[str] = []
    monkeypatch.setattr(World, "reduce_scatter", lambda self, tensor: begun.append("sum"))
    monkeypatch.setattr(World, "all_reduce", lambda self, tensor: None)
    monkeypatch.setattr(World, "all_gather", lambda self, tensor: None)
    config = Config(
        model=ModelConfig(depth=3, hidden=64, heads=2, input_size=8, channels=1, classes=4),
        optim=OptimConfig(shard="world"),
        train=TrainConfig(batch=2 * accumulate, accumulate=accumulate),
    )
    state, step = start(config, REFERENCE, torch.device("cpu"), torch.float32, World(Place(0, 2, 0)))
    for name, parameter in zip(state.trained_names, state.trained, strict=True):
        parameter.register_hook(lambda gradient, name=name: begun.append(name))  # after the sum's own hook
    numbers = torch.arange(accumulate)
    batch = Batch(torch.randn(accumulate, 1, 8, 8), numbers % 4, numbers)
    step(state, batch, torch.tensor(1e-3), torch.tensor(0.5))
    buckets = plan_of(config, 2).buckets
    assert len(buckets) > 4
    assert begun.count("sum") == len(buckets)
    count = len(state.trained_names)
    before = count * (accumulate - 1)
    assert "sum" not in begun[:before], "only the last micro-batch completes a gradient"
    first = begun.index("sum") - before
    assert first < count / 2
    done: set[str] = set()
    sums = 0
    for event in begun[before:]:
        if event == "sum":
            complete = [bucket for bucket in buckets if len({p.name for p in bucket.parameters} - done) <= 1]
            sums += 1
            assert len(complete) >= sums, "a sum begins when a bucket's last gradient is complete"
        done.add(event)


def test_a_network_waits_for_a_bucket_when_it_comes_to_its_modules(monkeypatch) -> None:
    monkeypatch.setattr("sra_fast.step.start.BUCKET", 10_000)
    events: list[str] = []

    class Work:
        def __init__(self, copy: torch.Tensor) -> None:
            self.copy = copy

        def wait(self) -> None:
            events.append(f"copy {names[self.copy.data_ptr()]}")

    config = Config(
        model=ModelConfig(depth=3, hidden=64, heads=2, input_size=8, channels=1, classes=4),
        optim=OptimConfig(shard="world"),
        train=TrainConfig(batch=2),
    )
    state, step = start(config, REFERENCE, torch.device("cpu"), torch.float32, World(Place(0, 2, 0)))
    assert state.shard
    copies = {"student": state.shard.student, "teacher": state.shard.teacher}
    names = {copy.data_ptr(): (who, i) for who, flats in copies.items() for i, copy in enumerate(flats)}
    monkeypatch.setattr(World, "all_gather", lambda self, tensor: Work(tensor) if tensor.data_ptr() in names else None)
    buckets = {"student": {}, "teacher": {}}
    for who, found in buckets.items():
        for piece in state.shard.plan.whole():
            found.setdefault(piece.name.split(".")[1] if piece.name.startswith("blocks.") else "", set()).add(
                piece.bucket
            )
        for number, block in enumerate(getattr(state, who).blocks):
            block.register_forward_pre_hook(lambda *_, who=who, number=number: events.append(f"{who} {number}"))
    state.shard.gather()
    batch = Batch(torch.randn(1, 1, 8, 8), torch.tensor([1]), torch.tensor([0]))
    step.losses(state, batch, torch.tensor(0.5))
    for who, count in (("student", 3), ("teacher", 2)):
        for number in range(count):
            place = events.index(f"{who} {number}")
            for bucket in buckets[who][str(number)]:
                assert f"copy {(who, bucket)}" in events[:place]
    assert f"copy {('student', 0)}" not in events[: events.index("student 0")], "the last block's comes later"


def test_a_small_bucket_and_a_large_parameter() -> None:
    sizes = [100, 70_000, 5, 300]
    plan = Plan.create([Parameter(str(i), size) for i, size in enumerate(sizes)], 3, bucket=1000)
    assert [[p.size for p in bucket.parameters] for bucket in plan.buckets] == [[100, 70_000], [5, 300]]
    assert [piece.stop for piece in plan.whole()] == sizes


# The tree


@pytest.mark.parametrize("count", range(1, 25))
def test_the_tree_does_not_depend_on_who_adds(count: int) -> None:
    """Sums are pairs here: two trees are equal only if every addition has the same operands."""

    def pair(first: object, second: object) -> object:
        return first, second

    alone = tree.total(((tree.Node(0, i), i) for i in range(count)), pair)
    for processes in (n for n in range(1, count + 1) if count % n == 0):
        share, parts = count // processes, []
        for rank in range(processes):
            sums: tree.Sums[object] = tree.Sums()
            for number in range(rank * share, (rank + 1) * share):
                sums.push(tree.Node(0, number), number, pair)
            assert [node for node, _ in sums] == tree.nodes(rank * share, share)
            parts.append(sums)
        assert tree.total(itertools.chain(*parts), pair) == alone
