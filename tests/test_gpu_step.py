"""What only a GPU can show of a step: the graph computes what the step computes, host and device never wait for each
other, batches arrive intact. `make gpu-report` runs these first; without a GPU they are skipped."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from small_run import content, write_images
from small_step import CPU, GROUPS, STEPS, advance, assert_close, assert_same_state, batch, changed, start
from torch import Tensor

from sra_fast.config import Config, KernelsConfig
from sra_fast.data.stream import Batch
from sra_fast.hardware import Hardware, set_deterministic
from sra_fast.kernels.registry import OPS, why_unavailable
from sra_fast.model.attention import attention, available
from sra_fast.step.graph import Captured
from sra_fast.step.inputs import Prefetch
from sra_fast.step.runner import StepRunner
from sra_fast.step.state import TrainState

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before cuBLAS starts: some tests are deterministic

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
GPU = torch.device("cuda")
FP32, BF16 = torch.float32, torch.bfloat16


def twenty_steps(*arguments: object) -> StepRunner:
    """A runner after twenty steps; arguments as `start`."""
    torch.compiler.reset()
    runner = advance(start(*arguments))
    assert runner.failure is None
    return runner


# Of the noise in the weights: with more, the first loss is in the thousands, and rounding decides where training goes.
STD = 0.05


@pytest.fixture
def config(tiny) -> Config:
    """Heads of 72, the width that matters; 16 tokens."""
    return tiny(hidden=288, heads=4, channels=4)


@pytest.mark.parametrize("family", ["sit", "dit"])
def test_graph_and_compiled_step_are_bitwise_equal(config, awake, family: str) -> None:
    """The same kernels in the same order, none of which adds in varying order (deterministic attention)."""
    config = replace(changed(config, model={"family": family}), deterministic=True)
    weights = awake(config.model, std=STD)
    set_deterministic(True)
    try:
        compiled, graph = (twenty_steps(config, weights, execution, BF16, GPU) for execution in ("compiled", "graph"))
    finally:
        set_deterministic(False)
    assert graph._graphs[0].captured
    assert compiled.ring.last(STEPS) == graph.ring.last(STEPS)
    assert_same_state(compiled.state, graph.state)


def test_graph_in_fp32_agrees_with_the_cpu(config, awake) -> None:
    weights = awake(config.model, std=STD)
    torch.set_float32_matmul_precision("highest")
    cpu, graph = twenty_steps(config, weights, "eager", FP32, CPU), twenty_steps(config, weights, "graph", FP32, GPU)
    assert_close(cpu, graph, weights, losses=1e-3, distance=1e-2)


EAGER, GRAPH, FUSED = ("eager", "reference"), ("graph", "reference"), ("graph", "fused")


# fp32 differs by the order of additions, which Adam turns into up to 1 % of the distance moved where gradients are
# small. A bf16 product is off by up to 2^-9 and rounds at other places when fused, which becomes a few percent.
@pytest.mark.parametrize(
    ("pair", "dtype", "losses", "distance"),
    [((EAGER, GRAPH), BF16, 0.05, 0.3), ((GRAPH, FUSED), FP32, 1e-3, 1e-2), ((GRAPH, FUSED), BF16, 0.05, 0.3)],
    ids=["eager and graph in bf16", "references and kernels in fp32", "references and kernels in bf16"],
)
@pytest.mark.parametrize("family", ["sit", "dit"])
def test_executions_and_kernels_train_alike(config, awake, family: str, pair, dtype, losses: float, distance: float):
    """The optimizer's kernels take part where the library is compiled with GPU code."""
    torch.set_float32_matmul_precision("highest")
    config = changed(config, model={"family": family})
    weights = awake(config.model, std=STD)
    architecture = Hardware(GPU, dtype).architecture
    ops = [op for op in OPS if not why_unavailable(op, architecture) and not (op == "perturb" and family == "dit")]
    runners = []
    for execution, default in pair:
        kernels = KernelsConfig(default="reference", **(dict.fromkeys(ops, "fused") if default == "fused" else {}))
        runners.append(twenty_steps(replace(config, kernels=kernels), weights, execution, dtype, GPU))
        fused = [op for op in OPS if runners[-1].step.backends.names[op] == "fused"]
        assert fused == (ops if default == "fused" else [])
    assert_close(*runners, weights, losses=losses, distance=distance)


@pytest.mark.parametrize(("parts", "graphs"), [(8, 1), (12, 2)])
def test_micro_batches_add_up_to_the_batch(config, awake, parts: int, graphs: int) -> None:
    """Eight are unrolled in one graph, twelve are twelve replays of one graph and one of another."""
    config = changed(config, train={"batch": 24})
    weights = awake(config.model, std=STD)
    single = twenty_steps(config, weights, "graph", FP32, GPU)
    split = twenty_steps(changed(config, train={"accumulate": parts}), weights, "graph", FP32, GPU)
    assert [graph.captured for graph in split._graphs] == [True] * graphs
    assert_close(single, split, weights, losses=1e-3, distance=1e-2)


def test_a_captured_graph_reads_what_is_loaded(config, awake) -> None:
    """After another state is copied into its own, a graph continues from there."""
    torch.set_float32_matmul_precision("highest")
    graph = start(config, awake(config.model, std=STD), "graph", FP32, GPU)
    for k in range(6):
        graph(batch(k, channels=4), 1e-3, 0.5)
    eager = start(config, awake(config.model, seed=1, std=STD), "eager", FP32, GPU)
    fields = (*GROUPS, "adam_step", "skipped_steps", "skipped_in_a_row")
    graph.state.load({field: getattr(eager.state, field) for field in fields})
    for k in range(6, 9):
        for runner in (graph, eager):
            runner(batch(k, channels=4), 1e-3, 0.5)
        assert graph.ring.last(1)[0]._asdict() == pytest.approx(eager.ring.last(1)[0]._asdict(), rel=1e-3), k
    assert graph._graphs[0].captured


@contextmanager
def waiting_is_an_error() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("execution", ["eager", "compiled", "graph"])
def test_the_host_never_waits_for_the_device(config, awake, execution: str) -> None:
    runner = start(config, awake(config.model), execution, BF16, GPU)
    for k in range(5):
        runner(batch(k, channels=4), 1e-3, 0.5)
    with waiting_is_an_error():
        runner(batch(5, channels=4), 1e-3, 0.5)
        with pytest.raises(RuntimeError):  # the mode does catch a wait
            runner.ring.buffer.cpu()


SOURCES: dict[str, Callable[[Tensor], Tensor]] = {
    "host": lambda tensor: tensor,
    "pinned": lambda tensor: tensor.pin_memory() if tensor.ndim > 1 else tensor,
    "device": lambda tensor: tensor.to(GPU),
}


@pytest.mark.parametrize("source", SOURCES)
def test_batches_arrive_intact_however_far_ahead_the_host_is(source: str) -> None:
    arrived, busy = [], torch.randn(4096, 4096, device=GPU)
    for _ in range(20):  # the buffers' zeros are still to be written when the first batch comes
        busy = (busy @ busy).clamp(-1, 1)
    prefetch = Prefetch((8, 4, 8, 8), GPU)
    for k in range(50):
        prefetch(Batch(*map(SOURCES[source], batch(k, channels=4))), 1e-3 * k, 0.5)
        for _ in range(3):  # the device falls behind
            busy = (busy @ busy).clamp(-1, 1)
        arrived.append([tensor.clone() for tensor in (*prefetch.fixed.batch, prefetch.fixed.lr)])
    for k, tensors in enumerate(arrived):
        for tensor, expected in zip(tensors, (*batch(k, channels=4), torch.tensor(1e-3 * k)), strict=True):
            assert torch.equal(tensor.cpu(), expected), k


def test_a_step_that_cannot_be_captured_goes_on_and_reports_why(config, awake, monkeypatch) -> None:
    lines: list[str] = []
    before = torch.cuda.current_stream()
    runner = start(config, awake(config.model), "graph", BF16, GPU, report_failure=lines.append)
    apply = runner.step.apply

    def apply_with_a_host_read(state: TrainState, gradients: list[Tensor], losses: Tensor, lr: Tensor):
        return apply(state, gradients, losses + losses.cpu().to(GPU) * 0, lr)

    monkeypatch.setattr(runner.step, "apply", apply_with_a_host_read)
    for k in range(6):
        runner(batch(k, channels=4), 1e-3, 0.5)
    assert int(runner.state.adam_step) == 6
    assert len(lines) == 1
    assert lines[0].startswith("no CUDA graph: ")
    assert "previous error" not in lines[0]  # the cause, not its consequence
    assert torch.cuda.current_stream() == before


def test_a_failed_capture_returns_its_memory() -> None:
    """The step that goes on without a graph needs it."""

    def step() -> None:
        activations = torch.empty(2**28, dtype=torch.uint8, device=GPU)
        activations[:1].cpu()  # what no graph can record

    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    captured = Captured(step, torch.cuda.Stream(), torch.cuda.MemPool(), warm_up=1, report=lambda line: None)
    for _ in range(2):
        captured()
    assert captured.failure
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() == before


@pytest.mark.parametrize("backend", available(GPU, BF16, 72) if torch.cuda.is_available() else [])
def test_attention_backends_agree_with_the_formula(backend: str) -> None:
    normal = partial(torch.randn, device=GPU, generator=torch.Generator(GPU).manual_seed(0))
    qkv, upstream = normal(4, 256, 3, 16, 72).bfloat16(), normal(4, 256, 1152).bfloat16()
    exact, rounded = qkv.double().requires_grad_(), qkv.clone().requires_grad_()
    expected, out = attention(exact, "math"), attention(rounded, backend)
    pairs = [
        (out, expected),
        (torch.autograd.grad(out, rounded, upstream)[0], torch.autograd.grad(expected, exact, upstream.double())[0]),
    ]
    for value, truth in pairs:  # 2^-8 per rounding, of which the norm sees the mean
        assert ((value.double() - truth).norm() / truth.norm()).item() < 0.01


DETERMINISTIC = """
import sys
sys.path[:0] = {path!r}
from small_run import run, small
from pathlib import Path
config = small(Path({root!r}), model__hidden=64, deterministic=True, train__save_every_images=1_000_000,
               train__precision="bf16", train__execution="graph", train__device="cuda",
               train__preview_every_images=40)
print(run(config, **{stop!r})[0])
"""


def train_deterministically(root: Path, **stop: int) -> int:
    """Exit code of a training in a process of its own: cuBLAS reads its setting when it starts."""
    code = textwrap.dedent(DETERMINISTIC).format(path=sys.path, root=str(root), stop=stop)
    environment = {**os.environ, "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    ran = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-2000:]
    return int(ran.stdout.split()[-1])


def test_five_steps_resumed_for_five_are_bitwise_ten(tmp_path) -> None:
    for name in ("once", "resumed"):
        write_images(tmp_path / name / "data")
    assert train_deterministically(tmp_path / "once") == 0
    assert train_deterministically(tmp_path / "resumed", stop_after=5) == 143
    assert train_deterministically(tmp_path / "resumed") == 0
    last = "runs/a/checkpoints/000000000080"
    assert content(tmp_path / "once" / last) == content(tmp_path / "resumed" / last)
    assert len(list((tmp_path / "once/runs/a/samples").glob("*.png"))) >= 2
