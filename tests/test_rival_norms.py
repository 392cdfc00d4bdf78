"""Rivals of adaln: what their packages are asked for, with stand-ins that answer as the packages say they do."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import Tensor

from benchmarks import bench_kernels, kernel_cases
from benchmarks.bench_kernels import measure, rows
from benchmarks.harness import tables
from benchmarks.harness.timing import GateFailed
from benchmarks.kernel_cases import check, make_case, truth
from benchmarks.rivals import norms as rival_norms
from benchmarks.rivals.norms import CUDNN, LIGER, modulated_rms_ref
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
        given = {name: tensors[place] for name, place in self.arguments.items() if isinstance(place, Place)}
        x, scale = given["input"].double(), given["scale"].double()
        assert scale.shape == (x.shape[0], 1, x.shape[2])
        if self.kind == "forward":
            mean = x.mean(-1, keepdim=True)
            rstd = (x.var(-1, correction=0, keepdim=True) + given["epsilon"].double()).rsqrt()
            right = ((x - mean) * rstd * scale + given["bias"].double(), mean, rstd)
        else:
            mean, rstd = given["mean"].double(), given["inv_variance"].double()
            n, dy = (x - mean) * rstd, given["grad"].double()
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


@pytest.fixture
def liger(monkeypatch):
    """A stand-in for Liger's function, which notes what it is asked for."""
    module = ModuleType("liger_kernel.ops.modulated_rms_norm")

    def apply(x, weight, scale, shift, eps, offset, casting_mode, in_place):
        assert (weight, offset, casting_mode, in_place) == (None, 0.0, "gemma", False)
        return modulated_rms_ref(x, shift, scale, eps)

    module.LigerModulatedRMSNormFunction = SimpleNamespace(apply=apply)
    for name in ("liger_kernel", "liger_kernel.ops"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


@pytest.fixture
def installed(monkeypatch):
    """Rivals that are installed are found on a CPU too."""
    monkeypatch.setattr(kernel_cases, "rivals", lambda device: rival_norms.rivals(GPU))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_cudnn_is_asked_for_adaln(cudnn, installed, dtype):
    """1 + scale, samples of (1, D), the epsilon and the statistics: results and gradients pass the gate."""
    case = make_case("adaln", "s", 3, CPU, dtype, [CUDNN])
    for which in case.passes:
        check(case, CUDNN, which, truth(case, which, CUDNN))
    forward, backward = Graph.made
    assert forward.settings["compute_data_type"] == forward.settings["intermediate_data_type"] == "FLOAT"
    assert forward.settings["handle"] == backward.settings["handle"] == "handle"
    assert forward.arguments["norm_forward_phase"] == "training"
    assert set(cudnn.streams) == {("handle", 7)}


def test_cudnn_plans_once_for_a_shape(cudnn, installed):
    call = rival_norms.rivals(GPU)[CUDNN]
    for tokens in (4, 4, 5):
        call(torch.randn(2, tokens, 8), torch.randn(2, 8), torch.randn(2, 8))
    assert len(Graph.made) == 2


def test_liger_is_held_to_its_own_function(liger, installed):
    case = make_case("adaln", "s", 3, CPU, torch.bfloat16, [LIGER])
    for which in case.passes:
        check(case, LIGER, which, truth(case, which, LIGER))
        with pytest.raises(GateFailed):  # as adaLN
            check(replace(case, another_function={}), LIGER, which, truth(case, which))


def test_a_modulated_rms_norm_subtracts_no_mean():
    x, shift, scale = torch.randn(2, 5, 8) + 3, torch.randn(2, 8), torch.randn(2, 8)
    wanted = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * (1 + scale[:, None]) + shift[:, None]
    torch.testing.assert_close(modulated_rms_ref(x, shift, scale), wanted)


def test_another_function_is_never_the_fastest(liger, installed):
    chosen = SimpleNamespace(repeats=2, warmup=1)
    case = make_case("adaln", "s", 2, CPU, torch.float32, [LIGER])
    roofs = {"copy_gb_per_s": 10.0, "matmul_tflop_per_s": 0.1}
    made = rows(case, {"size": "s", "batch": 2, "dtype": "fp32"}, CPU, roofs, chosen)
    for row in made:
        if row["params"]["implementation"] == LIGER:
            row["median_ms"] = 1e-6
    table = tables.kernel_table(made)
    assert f"{LIGER} 0.001" in table
    assert f"| {LIGER} " not in table


@pytest.mark.parametrize("name", [CUDNN, LIGER])
def test_a_rival_that_fails_costs_its_own_row_only(monkeypatch, name):
    def broken(x, shift, scale):
        raise TypeError("no such argument\nand more")

    monkeypatch.setattr(kernel_cases, "rivals", lambda device: {name: broken})
    taken = measure(make_case("adaln", "s", 1, CPU, torch.float32, [name]), "forward", CPU, repeats=2, warmup=1)
    assert taken[name].error == "failed (no such argument)"
    assert len(taken["eager"].ms) == 2


def test_what_is_ours_may_not_fail(monkeypatch):
    case = make_case("adaln", "s", 1, CPU, torch.float32, ["eager"])
    case.implementations["fused"] = lambda x, shift, scale: torch.ones(0) @ torch.ones(1)
    with pytest.raises(RuntimeError):
        measure(case, "forward", CPU, repeats=1, warmup=1)


def test_a_rival_that_disagrees_is_named_and_fails_nothing(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(kernel_cases, "rivals", lambda device: {CUDNN: lambda *inputs: adaln_ref(*inputs, eps=1e-3)})
    monkeypatch.setenv("SRA_FAST_RESULTS", str(tmp_path))
    words = "--ops adaln --sizes s --batch 1 --repeats 2 --warmup 1 --device cpu --implementations eager cudnn"
    assert bench_kernels.main(words.split()) == 0
    assert "no number: disagrees with the reference: adaln cudnn" in capsys.readouterr().out


def test_rivals_that_are_not_installed_have_no_row(monkeypatch):
    monkeypatch.setitem(sys.modules, "cudnn", None)
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    assert rival_norms.rivals(GPU) == {}


def test_there_are_no_rivals_on_a_cpu(cudnn, liger):
    assert rival_norms.rivals(CPU) == {}
    assert set(rival_norms.rivals(GPU)) == set(rival_norms.RIVALS)


def test_pytest_benchmark_has_what_the_device_has(monkeypatch):
    """Fused ops and rivals are there on a GPU alone."""
    asked = []

    def case(op, size, batch, device, dtype):
        asked.append(device)
        return SimpleNamespace(passes=("forward",), implementations={"eager": None, "fused": None})

    monkeypatch.setattr(bench_kernels, "default_device", lambda: GPU)
    monkeypatch.setattr(bench_kernels, "make_case", case)
    found = []
    bench_kernels.pytest_generate_tests(SimpleNamespace(parametrize=lambda names, values: found.extend(values)))
    assert set(asked) == {GPU}
    assert ("adaln", "xl", "forward", "fused") in found
