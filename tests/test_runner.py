"""How a step is executed: compiled steps and steps over fixed buffers against eager ones."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from sra_fast.config import Config
from sra_fast.data.stream import Batch
from sra_fast.model.backends import REFERENCE
from sra_fast.model.layout import from_public
from sra_fast.step import runner
from sra_fast.step.inputs import Inputs
from sra_fast.step.ring import MetricRing
from sra_fast.step.runner import StepRunner
from sra_fast.step.state import TrainState
from sra_fast.step.step import TrainingStep

CPU = torch.device("cpu")
STEPS = 20


def batch(number: int, size: int = 8) -> Batch:
    generator = torch.Generator().manual_seed(number)
    x = torch.randn(size, 1, 8, 8, generator=generator)
    return Batch(x, torch.randint(4, (size,), generator=generator), torch.arange(size) + number * size)


def start(config: Config, weights: dict[str, Tensor], execution: str) -> StepRunner:
    """A runner whose weights and EMA are `weights` (names in memory)."""
    state = TrainState.create(config, REFERENCE, CPU, torch.float32)
    state.load({"weights": weights, "ema": weights})
    return StepRunner(TrainingStep(config, REFERENCE, CPU), state, MetricRing(STEPS, CPU), execution)


@pytest.fixture(scope="module", params=["sit", "dit"])
def runs(request) -> SimpleNamespace:
    """Runners after the same twenty steps, eager and compiled. From the second step on, recompilation is an error."""
    tiny, awake = (request.getfixturevalue(name) for name in ("tiny", "awake"))
    config = tiny(family=request.param)
    weights = from_public(awake(config.model))
    torch.compiler.reset()
    runners = {}
    for execution in ("eager", "compiled"):
        runners[execution] = start(config, weights, execution)
        for k in range(STEPS):
            with torch._dynamo.config.patch(error_on_recompile=k > 0):
                runners[execution](batch(k), 1e-3 * (1 + k % 3), 0.5 + 0.01 * k)  # may not be compiled in as constants
    return SimpleNamespace(**runners, weights=weights)


def test_compiled_and_eager_steps_have_the_same_metrics(runs) -> None:
    eager, compiled = runs.eager.ring.last(STEPS), runs.compiled.ring.last(STEPS)
    for k in range(STEPS):
        # fp32 sums in another order: some 1e-7 of a loss at first. Later Adam makes of it what the next test says: a
        # share of 1e-3 of the way gone, and the losses change by tens of percent on that way.
        assert eager[k]._asdict() == pytest.approx(compiled[k]._asdict(), rel=1e-5 if k == 0 else 1e-3), k
    assert [row.lr for row in eager[:3]] == pytest.approx([1e-3, 2e-3, 3e-3])


def test_compiled_and_eager_steps_end_at_the_same_parameters(runs) -> None:
    for group in ("weights", "ema"):
        for name, value in getattr(runs.eager.state, group).items():
            other, first = getattr(runs.compiled.state, group)[name], runs.weights[name]
            if name == "pos_embed":
                assert torch.equal(value, other)
                continue
            if name.endswith("qkv.bias"):
                # A bias of the keys adds the same to all of a query's scores, which softmax takes away: its gradient
                # is nothing but rounding, and Adam takes steps of full size along it.
                value, other, first = (torch.cat([t.chunk(3)[0], t.chunk(3)[2]]) for t in (value, other, first))
            # Adam divides by the gradient's own size, so elements whose gradient is nearly all rounding may go another
            # way. They are few: over a tensor, the two ends are close compared with the way from the start.
            distance = float((value - first).norm())
            assert distance > 0
            assert float((value - other).norm()) < 1e-2 * distance, (group, name)


def test_everything_is_compiled_and_a_recompilation_would_be_seen(runs) -> None:
    state = runs.compiled.state
    assert int(state.adam_step) == STEPS
    assert all(block._compiled_call_impl for network in (state.student, state.teacher) for block in network.blocks)
    with (
        torch._dynamo.config.patch(error_on_recompile=True),
        pytest.raises(torch._dynamo.exc.RecompileError),
    ):
        runs.compiled(batch(0, size=4), 1e-3, 0.5)


def test_a_graph_break_in_a_block_is_an_error(tiny, awake, monkeypatch) -> None:
    config = tiny(hidden=16)
    execute = start(config, from_public(awake(config.model)), "compiled")

    def breaks(*inputs: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return inputs[0]

    for block in execute.state.student.blocks:
        monkeypatch.setattr(block.attn, "attend", breaks)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="graph_break"):
        execute(batch(0), 1e-3, 0.5)


# Fixed buffers, with stand-ins for the GPU: a batch arrives at once, and a graph calls its function.


class FakePrefetch:
    def __init__(self, shape: tuple[int, int, int, int], device: torch.device, dtype: torch.dtype) -> None:
        self.fixed = Inputs(shape, device, dtype=dtype)

    def __call__(self, batch: Batch, lr: float, weight: float) -> None:
        self.fixed.bytes.fill_(255)  # NaN in every float: nothing of the last step is left
        self.fixed.fill(batch, lr, weight)


class FakeCaptured:
    graphs: ClassVar[list[FakeCaptured]] = []
    failure = None

    def __init__(self, function: Callable[[], None], stream: object, pool: object, report: object) -> None:
        self.function, self.shared, self.calls = function, (stream, pool), 0
        self.graphs.append(self)

    def __call__(self) -> None:
        self.calls += 1
        self.function()


@pytest.mark.parametrize(("accumulate", "calls"), [(1, [3]), (2, [3]), (8, [3]), (12, [36, 3]), (24, [72, 3])])
def test_steps_over_fixed_buffers_are_bitwise_the_same(tiny, awake, monkeypatch, accumulate: int, calls: list[int]):
    config = tiny(batch=24, accumulate=accumulate, hidden=16)
    weights = from_public(awake(config.model))
    monkeypatch.setattr(TrainingStep, "compile", lambda *_: None)

    def three_steps() -> StepRunner:
        execute = start(config, weights, "graph")
        for k in range(3):
            execute(batch(k, size=24), 1e-3 * (k + 1), 0.5 + k)
        return execute

    plain = three_steps()
    monkeypatch.setattr(runner, "_uses_fixed_buffers", lambda device: True)
    monkeypatch.setattr(runner, "Prefetch", FakePrefetch)
    monkeypatch.setattr(runner, "Captured", FakeCaptured)
    monkeypatch.setattr(FakeCaptured, "graphs", [])
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: object())
    fixed = three_steps()
    assert fixed.ring.last(3) == plain.ring.last(3)
    for group in ("weights", "ema", "adam_m", "adam_v"):
        for name, value in getattr(fixed.state, group).items():
            assert torch.equal(value, getattr(plain.state, group)[name]), (group, name)
    assert [graph.calls for graph in FakeCaptured.graphs] == calls
    assert len({graph.shared for graph in FakeCaptured.graphs}) == 1  # one stream and one pool
