"""cuDNN's adaLN: what its package is asked for, with a stand-in that answers as the package says it does."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import Tensor

from benchmarks import bench_kernels, kernel_cases
from benchmarks.harness.rows import read
from benchmarks.kernel_cases import check, make_case, truth
from benchmarks.rivals import norms
from benchmarks.rivals.norms import CUDNN
from sra_fast.kernels.adaln import adaln_ref

CPU, GPU = torch.device("cpu"), torch.device("cuda")
TYPES = {"FLOAT": torch.float32, "HALF": torch.float16, "BFLOAT16": torch.bfloat16}


class Place:
    """A tensor of a graph."""

    def __init__(self, **described: object) -> None:
        self.described = described
        self.output = False

    def set_output(self, wanted: bool) -> Place:
        self.output = wanted
        return self

    def set_data_type(self, kind: str) -> Place:
        self.described["data_type"] = kind
        return self


class Graph:
    """One node that cuDNN's formula computes, with what it was asked for."""

    made: list[Graph]

    def __init__(self, **settings: object) -> None:
        self.settings, self.steps = settings, []
        Graph.made.append(self)

    def tensor(self, **described: object) -> Place:
        return Place(**described)

    def adalayernorm(self, **arguments: object) -> list[Place]:
        self.kind, self.arguments = "forward", arguments
        self.outputs = [Place(), Place(), Place()]
        return self.outputs

    def adalayernorm_backward(self, **arguments: object) -> list[Place]:
        self.kind, self.arguments = "backward", arguments
        self.outputs = [Place(), Place(), Place()]
        return self.outputs

    def __getattr__(self, name: str):
        return lambda *arguments: self.steps.append(name)

    def get_workspace_size(self) -> int:
        return 0

    def execute(self, tensors: dict[Place, Tensor], workspace: Tensor, handle: object) -> None:
        assert self.steps == [
            "validate",
            "build_operation_graph",
            "create_execution_plans",
            "check_support",
            "build_plans",
        ]
        assert workspace.numel() > 0
        for place, tensor in tensors.items():
            assert tensor.dtype == TYPES[place.described["data_type"]]
            if "dim" in place.described:
                assert list(tensor.shape) == place.described["dim"]
                assert list(tensor.stride()) == place.described["stride"]
                assert place.described["is_pass_by_value"] == (place.described["name"] == "epsilon")
        inputs = {name: tensors[place] for name, place in self.arguments.items() if isinstance(place, Place)}
        x, scale = inputs["input"].double(), inputs["scale"].double()
        assert scale.shape == (x.shape[0], 1, x.shape[2])
        if self.kind == "forward":
            mean = x.mean(-1, keepdim=True)
            rstd = (x.var(-1, correction=0, keepdim=True) + inputs["epsilon"].double()).rsqrt()
            right = ((x - mean) * rstd * scale + inputs["bias"].double(), mean, rstd)
        else:
            mean, rstd = inputs["mean"].double(), inputs["inv_variance"].double()
            n, dy = (x - mean) * rstd, inputs["grad"].double()
            g = dy * scale
            dx = (g - g.mean(-1, keepdim=True) - n * (g * n).mean(-1, keepdim=True)) * rstd
            right = (dx, (dy * n).sum(1, keepdim=True), dy.sum(1, keepdim=True))
        for place, value in zip(self.outputs, right, strict=True):
            assert place.output
            tensors[place].copy_(value)


@pytest.fixture
def cudnn(monkeypatch):
    """A stand-in for nvidia-cudnn-frontend, on the CPU."""
    module = ModuleType("cudnn")
    module.data_type = SimpleNamespace(**{name: name for name in TYPES})
    module.norm_forward_phase = SimpleNamespace(TRAINING="training")
    module.heur_mode = SimpleNamespace(A="a", FALLBACK="fallback")
    module.pygraph, module.create_handle, module.streams = Graph, lambda: "handle", []
    module.set_stream = lambda *, handle, stream: module.streams.append((handle, stream))
    monkeypatch.setitem(sys.modules, "cudnn", module)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=7))
    monkeypatch.setattr(Graph, "made", [], raising=False)
    return module


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cudnn_is_asked_for_adaln(cudnn, monkeypatch, dtype):
    """1 + scale, samples of (1, D), the epsilon and the statistics: results and gradients pass the gate."""
    monkeypatch.setattr(kernel_cases, "rivals", lambda device: norms.rivals(GPU))
    case = make_case("adaln", "s", 3, CPU, dtype, [CUDNN])
    for which in case.passes:
        check(case, CUDNN, which, truth(case, which))
    forward, backward = Graph.made
    assert forward.settings["compute_data_type"] == forward.settings["intermediate_data_type"] == "FLOAT"
    assert forward.settings["handle"] == backward.settings["handle"] == "handle"
    assert forward.arguments["norm_forward_phase"] == "training"
    assert set(cudnn.streams) == {("handle", 7)}


def test_cudnn_plans_once_for_a_shape(cudnn):
    call = norms.rivals(GPU)[CUDNN]
    for tokens in (4, 4, 5):
        call(torch.randn(2, tokens, 8), torch.randn(2, 8), torch.randn(2, 8))
    assert len(Graph.made) == 2


def raises(x, shift, scale):
    raise TypeError("no such argument\nand more")


@pytest.mark.parametrize(
    ("rival", "error"),
    [
        (raises, "failed (no such argument)"),
        (lambda *inputs: adaln_ref(*inputs, eps=1e-3), "disagrees with the reference: adaln cudnn"),
    ],
)
def test_a_rival_that_fails_costs_only_its_own_row(monkeypatch, tmp_path, rival, error):
    monkeypatch.setattr(kernel_cases, "rivals", lambda device: {CUDNN: rival})
    monkeypatch.setattr(bench_kernels, "roofs", lambda device: {"copy_gb_per_s": 10.0, "matmul_tflop_per_s": 1.0})
    monkeypatch.setenv("SRA_FAST_RESULTS", str(tmp_path))
    words = "--ops adaln --sizes s --batch 1 --repeats 2 --warmup 1 --device cpu --implementations eager cudnn"
    assert bench_kernels.main(words.split()) == 0
    rows = {row["params"]["implementation"]: row for row in read(tmp_path / "kernels.json")["rows"]}
    assert rows[CUDNN]["error"].startswith(error)
    assert len(rows["eager"]["samples_ms"]) == 2


def test_there_is_no_rival_on_a_cpu_or_without_the_package(cudnn, monkeypatch):
    assert norms.rivals(CPU) == {}
    monkeypatch.setitem(sys.modules, "cudnn", None)
    assert norms.rivals(GPU) == {}
