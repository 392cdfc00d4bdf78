"""How a step is executed: compiled steps and steps over fixed buffers against eager ones."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from small_step import STEPS, advance, assert_close, assert_same_state, batch, start
from torch import Tensor

from sra_fast.data.stream import Batch
from sra_fast.step import runner
from sra_fast.step.inputs import Inputs
from sra_fast.step.step import TrainingStep


@pytest.fixture(scope="module", params=["sit", "dit"])
def runs(request) -> SimpleNamespace:
    """The same twenty steps, eager and compiled. From the second step on, recompilation is an error."""
    tiny, awake = (request.getfixturevalue(name) for name in ("tiny", "awake"))
    config = tiny(family=request.param)
    weights = awake(config.model)
    torch.compiler.reset()
    eager, compiled = (advance(start(config, weights, how), stop=1) for how in ("eager", "compiled"))
    with torch._dynamo.config.patch(error_on_recompile=True):
        return SimpleNamespace(eager=advance(eager, 1), compiled=advance(compiled, 1), weights=weights)


def test_compiled_and_eager_steps_agree(runs) -> None:
    # fp32 sums in another order: some 1e-7 of a loss at first. Later the parameters differ by a share of 1e-3 of the
    # distance moved, over which the losses change by tens of percent.
    assert_close(runs.eager, runs.compiled, runs.weights, losses=1e-3, distance=1e-2)
    eager, compiled = (execute.ring.last(STEPS) for execute in (runs.eager, runs.compiled))
    assert eager[0]._asdict() == pytest.approx(compiled[0]._asdict(), rel=1e-5)
    assert [row.lr for row in compiled[:3]] == pytest.approx([1e-3, 2e-3, 3e-3])


def test_everything_is_compiled_and_a_recompilation_would_be_seen(runs) -> None:
    state = runs.compiled.state
    assert int(state.adam_step) == STEPS
    assert all(block._compiled_call_impl for network in (state.student, state.teacher) for block in network.blocks)
    with torch._dynamo.config.patch(error_on_recompile=True), pytest.raises(torch._dynamo.exc.RecompileError):
        runs.compiled(batch(0, size=4), 1e-3, 0.5)


def test_a_graph_break_in_a_block_is_an_error(tiny, monkeypatch) -> None:
    execute = start(tiny(hidden=16), execution="compiled")

    def breaks(qkv: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return qkv

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


@pytest.mark.parametrize(("accumulate", "calls"), [(1, [3]), (8, [3]), (12, [36, 3]), (24, [72, 3])])
def test_steps_over_fixed_buffers_are_bitwise_the_same(tiny, awake, monkeypatch, accumulate: int, calls: list[int]):
    config = tiny(batch=24, accumulate=accumulate, hidden=16)
    weights = awake(config.model)
    monkeypatch.setattr(TrainingStep, "compile", lambda *_: None)
    plain = advance(start(config, weights, "graph"), stop=3)
    monkeypatch.setattr(runner, "_uses_fixed_buffers", lambda device: True)
    monkeypatch.setattr(runner, "Prefetch", FakePrefetch)
    monkeypatch.setattr(runner, "Captured", FakeCaptured)
    monkeypatch.setattr(FakeCaptured, "graphs", [])
    monkeypatch.setattr(torch.cuda, "MemPool", object)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: object())
    fixed = advance(start(config, weights, "graph"), stop=3)
    assert fixed.ring.last(3) == plain.ring.last(3)
    assert_same_state(fixed.state, plain.state)
    assert [graph.calls for graph in FakeCaptured.graphs] == calls
    assert len({graph.shared for graph in FakeCaptured.graphs}) == 1  # one stream and one pool
