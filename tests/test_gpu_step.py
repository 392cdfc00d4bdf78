"""What only a GPU can show of a step: the graph does what the step does, host and device never wait for each other,
batches arrive whole. `make gpu-report` runs these first; without a GPU they are skipped."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from small_run import content, run, small, write_images
from torch import Tensor

from sra_fast.config import Config, KernelsConfig
from sra_fast.data.stream import Batch
from sra_fast.hardware import Hardware, set_deterministic
from sra_fast.kernels import IMPLEMENTATIONS, missing
from sra_fast.model.attention import attention, available
from sra_fast.model.backends import resolve
from sra_fast.model.layout import joined
from sra_fast.model.transformer import Ops
from sra_fast.step.inputs import Prefetch
from sra_fast.step.runner import StepRunner
from sra_fast.step.state import TrainState
from sra_fast.step.step import MetricRing, TrainingStep

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before cuBLAS starts: some tests are deterministic

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
GPU, CPU = torch.device("cuda"), torch.device("cpu")
STEPS = 20


def batch(number: int, size: int = 8) -> Batch:
    generator = torch.Generator().manual_seed(number)
    x = torch.randn(size, 4, 8, 8, generator=generator)
    return Batch(x, torch.randint(4, (size,), generator=generator), torch.arange(size) + number * size)


def begin(config: Config, weights: dict[str, Tensor], execution: str, dtype: torch.dtype, device: torch.device):
    """(runner, state, ring) from awake weights."""
    resolved = resolve(config, Hardware(device, dtype))
    state = TrainState.create(config, Ops.select(resolved), device, dtype)
    held = {name: value.to(device) for name, value in joined(weights).items()}
    state.load({"weights": held, "ema": held})
    ring = MetricRing(STEPS, device)
    return (
        StepRunner(TrainingStep(config, resolved, device), state, ring, execution, resolved["attention"]),
        state,
        ring,
    )


def twenty(config: Config, weights: dict[str, Tensor], execution: str, dtype: torch.dtype, device=GPU):
    torch.compiler.reset()
    runner, state, ring = begin(config, weights, execution, dtype, device)
    for k in range(STEPS):
        runner(batch(k, config.train.batch), 1e-3 * (1 + k % 3), 0.5 + 0.01 * k)
    assert runner.failure is None
    return SimpleNamespace(metrics=ring.last(STEPS), state=state, runner=runner)


# Of the noise in the weights: with more, the first loss is in the thousands, and rounding decides where training goes.
STD = 0.05


@pytest.fixture
def config(tiny) -> Config:
    """Heads of 72, the width that matters; 16 tokens."""
    return tiny(hidden=288, heads=4, channels=4)


def compare(one: SimpleNamespace, other: SimpleNamespace, start: dict[str, Tensor], losses: float, way: float) -> None:
    """Losses of all steps to a relative error, parameters to a share of the way from their start."""
    for k, (a, b) in enumerate(zip(one.metrics, other.metrics, strict=True)):
        for name in ("loss", "velocity_loss", "alignment_loss"):
            assert getattr(a, name) == pytest.approx(getattr(b, name), rel=losses, abs=losses), (k, name)
    for kind in ("weights", "ema"):
        for name, value in getattr(one.state, kind).items():
            ends = [t.cpu() for t in (value, getattr(other.state, kind)[name], start[name])]
            if name.endswith("qkv.bias"):  # the keys' part has no gradient but rounding
                ends = [torch.cat([t.chunk(3)[0], t.chunk(3)[2]]) for t in ends]
            gap, gone = float((ends[0] - ends[1]).norm()), float((ends[0] - ends[2]).norm())
            assert gap <= way * gone, (kind, name, gap, gone)


@pytest.mark.parametrize("family", ["sit", "dit"])
def test_graph_and_compiled_step_are_the_same_in_every_bit(config, awake, family: str) -> None:
    """The same kernels in the same order, with nothing that adds in any order (deterministic attention)."""
    config = replace(config, deterministic=True, model=replace(config.model, family=family))
    weights = awake(config.model, std=STD)
    set_deterministic(True)
    try:
        compiled, graph = (twenty(config, weights, how, torch.bfloat16) for how in ("compiled", "graph"))
    finally:
        set_deterministic(False)
    assert graph.runner._graphs[0].captured
    assert compiled.metrics == graph.metrics
    for kind in ("weights", "ema", "adam_m", "adam_v"):
        for name, value in getattr(compiled.state, kind).items():
            assert torch.equal(value, getattr(graph.state, kind)[name]), (kind, name)


@pytest.mark.parametrize("family", ["sit", "dit"])
def test_graph_and_eager_step_agree_in_bf16(config, awake, family: str) -> None:
    """A bf16 product is off by 2^-9 at most and rounds at other places when fused; what Adam makes of gradients that
    differ so is, over twenty steps, a few percent of the way, more where gradients are small."""
    config = replace(config, model=replace(config.model, family=family))
    weights = awake(config.model, std=STD)
    eager, graph = (twenty(config, weights, how, torch.bfloat16) for how in ("eager", "graph"))
    compare(eager, graph, joined(weights), losses=0.05, way=0.3)


def test_graph_in_fp32_agrees_with_the_cpu(config, awake) -> None:
    weights = awake(config.model, std=STD)
    torch.set_float32_matmul_precision("highest")
    cpu = twenty(config, weights, "eager", torch.float32, CPU)
    graph = twenty(config, weights, "graph", torch.float32)
    compare(cpu, graph, joined(weights), losses=1e-3, way=1e-2)


# fp32 differs by the order of additions, which Adam turns into up to 1 % of the way where gradients are small; bf16 by
# roundings in other places too, as a graph and the eager step do above.
@pytest.mark.parametrize(
    ("dtype", "losses", "way"), [(torch.float32, 1e-3, 1e-2), (torch.bfloat16, 0.05, 0.3)], ids=["fp32", "bf16"]
)
@pytest.mark.parametrize("family", ["sit", "dit"])
def test_fused_ops_train_as_their_references_do(config, awake, family: str, dtype, losses: float, way: float) -> None:
    """All kernels of the step in one CUDA graph, against Inductor's for the same ops; the optimizer's where it is built
    with GPU code."""
    torch.set_float32_matmul_precision("highest")
    config = replace(config, model=replace(config.model, family=family))
    weights = awake(config.model, std=STD)
    compiled = {} if missing("adamw_ema", "sm_90") else {"gradient_norm": "fused", "adamw_ema": "fused"}
    triton = dict.fromkeys(("adaln", "gated_adaln", "alignment"), "fused")
    triton |= {"perturb": "fused"} if family == "sit" else {}
    reference, fused = (
        twenty(replace(config, kernels=KernelsConfig(default="reference", **wishes)), weights, "graph", dtype)
        for wishes in ({}, triton | compiled)
    )
    for op in triton | compiled:
        assert computed_by(fused, op) is IMPLEMENTATIONS[op]["fused"]
        assert computed_by(reference, op) is not IMPLEMENTATIONS[op]["fused"]
    compare(reference, fused, joined(weights), losses=losses, way=way)


def computed_by(run: SimpleNamespace, op: str) -> Callable:
    """The function that computed an op in a run."""
    step = run.runner.step
    of_step = {"alignment": "_align", "perturb": "_draw", "gradient_norm": "_gradient_norm", "adamw_ema": "_adamw_ema"}
    return getattr(step, of_step[op]) if op in of_step else getattr(run.state.student.ops, op)


@pytest.mark.parametrize("parts", [8, 12])
def test_micro_batches_add_up_to_the_batch(config, awake, parts: int) -> None:
    """Eight are unrolled in one graph, twelve are twelve replays of one graph and one of another."""
    config = replace(config, train=replace(config.train, batch=24))
    weights = awake(config.model, std=STD)
    whole = twenty(config, weights, "graph", torch.float32)
    split = twenty(replace(config, train=replace(config.train, accumulate=parts)), weights, "graph", torch.float32)
    assert all(graph.captured for graph in split.runner._graphs)
    assert len(split.runner._graphs) == (1 if parts == 8 else 2)
    compare(whole, split, joined(weights), losses=1e-3, way=1e-2)


def test_a_captured_graph_reads_what_is_loaded(config, awake) -> None:
    """Another run's values, copied into the state of a graph, are what its next replay goes on from."""
    torch.set_float32_matmul_precision("highest")
    weights = awake(config.model, std=STD)
    runner, state, ring = begin(config, weights, "graph", torch.float32, GPU)
    for k in range(6):
        runner(batch(k), 1e-3, 0.5)
    fresh, other, its_ring = begin(config, awake(config.model, seed=1, std=STD), "eager", torch.float32, GPU)
    fields = ("weights", "ema", "adam_m", "adam_v", "adam_step", "skipped_steps", "skipped_in_a_row")
    state.load({field: getattr(other, field) for field in fields})
    for k in range(6, 9):
        runner(batch(k), 1e-3, 0.5)
        fresh(batch(k), 1e-3, 0.5)
        assert ring.last(1)[0]._asdict() == pytest.approx(its_ring.last(1)[0]._asdict(), rel=1e-3), k
    assert runner._graphs[0].captured


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
    runner, _, ring = begin(config, awake(config.model), execution, torch.bfloat16, GPU)
    for k in range(5):
        runner(batch(k), 1e-3, 0.5)
    with waiting_is_an_error():
        runner(batch(5), 1e-3, 0.5)
        with pytest.raises(RuntimeError):  # and the mode does catch a wait
            ring.buffer.cpu()


def test_batches_arrive_whole_however_far_ahead_the_host_is() -> None:
    prefetch = Prefetch((8, 4, 8, 8), GPU)
    sums, busy = [], torch.randn(4096, 4096, device=GPU)
    for k in range(50):
        prefetch(batch(k), 1e-3 * k, 0.5)
        for _ in range(3):  # the device falls behind
            busy = (busy @ busy).clamp(-1, 1)
        fixed = prefetch.fixed
        sums.append(torch.stack([fixed.x.sum(), fixed.number.sum().float(), fixed.lr]))
    for k, got in enumerate(torch.stack(sums).cpu()):
        wanted = torch.stack([batch(k).x.sum(), batch(k).number.sum().float(), torch.tensor(1e-3 * k)])
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


def test_a_batch_from_the_device_arrives_too() -> None:
    prefetch = Prefetch((8, 4, 8, 8), GPU)
    for k in range(5):
        prefetch(Batch(*(tensor.to(GPU) for tensor in batch(k))), 0.1, 0.5)
        assert torch.equal(prefetch.fixed.x.cpu(), batch(k).x)
        assert torch.equal(prefetch.fixed.number.cpu(), batch(k).number)


def test_a_pinned_batch_arrives_without_a_detour() -> None:
    prefetch = Prefetch((8, 4, 8, 8), GPU)
    for k in range(50):
        given = batch(k)
        prefetch(given._replace(x=given.x.pin_memory()), 1e-3 * k, 0.5)
        fixed = prefetch.fixed
        assert torch.equal(fixed.x.cpu(), given.x)
        assert torch.equal(fixed.number.cpu(), given.number)
        assert torch.equal(fixed.labels.cpu(), given.labels)
        assert float(fixed.lr) == pytest.approx(1e-3 * k)


def test_a_step_that_cannot_be_captured_goes_on_and_says_why(config, awake, monkeypatch) -> None:
    said: list[str] = []
    before = torch.cuda.current_stream()
    resolved = resolve(config, Hardware(GPU, torch.bfloat16))
    state = TrainState.create(config, Ops.select(resolved), GPU, torch.bfloat16)
    step = TrainingStep(config, resolved, GPU)
    apply = step.apply
    monkeypatch.setattr(step, "apply", lambda s, g, losses, lr: apply(s, g, losses + losses.cpu().to(GPU) * 0, lr))
    runner = StepRunner(step, state, MetricRing(8, GPU), "graph", resolved["attention"], say=said.append)
    for k in range(6):
        runner(batch(k), 1e-3, 0.5)
    assert int(state.adam_step) == 6
    assert len(said) == 1
    assert said[0].startswith("no CUDA graph: ")
    assert "previous error" not in said[0]  # the reason, not the aftermath
    assert torch.cuda.current_stream() == before


@pytest.mark.parametrize("backend", available(GPU, torch.bfloat16, 72) if torch.cuda.is_available() else [])
def test_attention_backends_agree_with_the_formula(backend: str) -> None:
    qkv = torch.randn(4, 256, 3, 16, 72, device=GPU, generator=torch.Generator(GPU).manual_seed(0)).bfloat16()
    upstream = torch.randn(4, 256, 1152, device=GPU, generator=torch.Generator(GPU).manual_seed(1)).bfloat16()
    truth, rounded = qkv.double().requires_grad_(), qkv.clone().requires_grad_()
    wanted, got = attention(truth, "math"), attention(rounded, backend)
    gradient = torch.autograd.grad(wanted, truth, upstream.double())[0]
    errors = [
        float((got.double() - wanted).norm() / wanted.norm()),
        float((torch.autograd.grad(got, rounded, upstream)[0].double() - gradient).norm() / gradient.norm()),
    ]
    assert max(errors) < 0.01, errors  # 2^-8 per rounding, of which the norm sees the mean


DETERMINISTIC = """
import sys
sys.path[:0] = {path!r}
from small_run import run, small
from pathlib import Path
config = small(Path({root!r}), model__hidden=64, deterministic=True, train__save_every_images=1_000_000, **{changes!r})
print(run(config, **{stop!r})[0])
"""


def trained(root, **stop: int) -> int:
    """Exit code of a deterministic training in a process of its own, as cuBLAS wants to be told at its start."""
    changes = {"train__precision": "bf16", "train__execution": "graph", "train__device": "cuda"}
    code = textwrap.dedent(DETERMINISTIC).format(path=sys.path, root=str(root), changes=changes, stop=stop)
    environment = {**os.environ, "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    ran = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-2000:]
    return int(ran.stdout.split()[-1])


def test_five_steps_resumed_for_five_are_ten_in_every_bit(tmp_path) -> None:
    for name in ("whole", "parts"):
        write_images(tmp_path / name / "data")
    assert trained(tmp_path / "whole") == 0
    assert trained(tmp_path / "parts", stop_after=5) == 143
    assert trained(tmp_path / "parts") == 0
    last = "000000000080"
    one, other = (content(tmp_path / name / "runs" / "a" / "checkpoints" / last) for name in ("whole", "parts"))
    assert one == other


def test_a_run_trains_and_previews_on_the_gpu(tmp_path) -> None:
    write_images(tmp_path / "data")
    lines: list[str] = []
    config = small(tmp_path, train__precision="bf16", model__hidden=64, train__preview_every_images=40)
    assert run(config, report=lines.append)[0] == 0
    assert any("one CUDA graph" in line for line in lines)
    assert len(list((tmp_path / "runs" / "a" / "samples").glob("*.png"))) >= 2
