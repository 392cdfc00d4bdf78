"""What computes each op of a run, for a configuration and a device."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from sra_fast.config import Config, KernelsConfig, preset
from sra_fast.errors import Refused
from sra_fast.hardware import Hardware
from sra_fast.kernels import language, library
from sra_fast.kernels.registry import OPS
from sra_fast.model import backends
from sra_fast.model.backends import REFERENCE, Backends, choose_execution

CPU = Hardware(torch.device("cpu"), torch.float32)
GPU = Hardware(torch.device("cuda"), torch.bfloat16)
FUSED = [name for name, op in OPS.items() if op.fused]
OF_PYTORCH = [name for name, op in OPS.items() if op.of == "torch"]  # on every GPU, and on no CPU
COMPILED = [name for name, op in OPS.items() if op.of == "library"]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with an H200, Triton and the compiled library."""
    monkeypatch.setattr(language, "why_unavailable", lambda: "")
    monkeypatch.setattr(language, "INTERPRETED", False)
    monkeypatch.setattr(library, "why_unavailable", lambda on_gpu=False: "")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(backends, "choose_attention", lambda *_: "cudnn")
    monkeypatch.setattr(language, "AVAILABLE", True)


def config(family: str = "sit", **kernels: str) -> Config:
    return replace(preset(f"{family}-s-2"), kernels=KernelsConfig(**kernels))


def fused_ops(config: Config, hardware: Hardware) -> list[str]:
    resolved = Backends.resolve(config, hardware)
    for name, op in OPS.items():
        assert getattr(resolved, name) is getattr(op, resolved.names[name])
    return [name for name in OPS if resolved.names[name] == "fused"]


ALL_BUT_TWO = [name for name in FUSED if name not in ("gated_adaln", "alignment")]
ALL_BUT_PERTURB = [name for name in FUSED if name != "perturb"]


@pytest.mark.parametrize(
    ("family", "kernels", "expected"),
    [
        ("sit", {}, COMPILED),
        ("dit", {}, COMPILED),
        ("sit", {"default": "reference"}, []),
        ("sit", {"default": "fused"}, FUSED),  # gated_residual has none
        ("sit", {"default": "fused", "alignment": "reference", "gated_adaln": "reference"}, ALL_BUT_TWO),
        ("sit", {"default": "reference", "perturb": "fused"}, ["perturb"]),
        ("dit", {"default": "fused"}, ALL_BUT_PERTURB),
        ("dit", {"default": "fused", "perturb": "auto"}, ALL_BUT_PERTURB),
    ],
)
@pytest.mark.usefixtures("gpu")
def test_an_op_named_in_the_configuration_precedes_the_default(family: str, kernels: dict, expected: list[str]) -> None:
    assert fused_ops(config(family, **kernels), GPU) == expected


@pytest.mark.usefixtures("gpu")
def test_unmeasured_auto_takes_the_compiled_library_where_it_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    assert fused_ops(config(), CPU) == COMPILED
    assert fused_ops(config(default="reference", adamw_ema="auto"), GPU) == ["adamw_ema"]
    monkeypatch.setattr(library, "why_unavailable", lambda on_gpu=False: "not built")
    assert fused_ops(config(), GPU) == []


@pytest.mark.usefixtures("gpu")
def test_what_is_undecided_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "candidates", lambda *_: ("cudnn", "flash"))
    assert list(backends.undecided(config("dit"), GPU)) == [*ALL_BUT_PERTURB, "attention"]
    assert all(names[0] in ("reference", "fused", "cudnn") for names in backends.undecided(config(), GPU).values())
    assert backends.undecided(config(default="fused"), GPU) == {"attention": ("cudnn", "flash")}
    assert any("a run measures its implementations" in note for note in Backends.resolve(config(), GPU).notes)
    assert "measures" not in " ".join(Backends.resolve(config(), CPU).notes)
    monkeypatch.setattr(language, "why_unavailable", lambda: "Triton is not installed")
    assert list(backends.undecided(config(), GPU)) == [*OF_PYTORCH, *COMPILED, "attention"]


@pytest.mark.parametrize(
    ("hardware", "family", "kernels", "message"),
    [
        (GPU, "dit", {"perturb": "fused"}, "kernels.perturb: 'fused' given, but DiT reads its noise levels"),
        (GPU, "sit", {"gated_residual": "fused"}, "kernels.gated_residual: 'fused' given, but this op has no fused k"),
        (CPU, "sit", {"default": "fused"}, "kernels.adaln: 'fused' given, but it runs on GPUs only; must"),
    ],
)
@pytest.mark.usefixtures("gpu")
def test_refusals(hardware: Hardware, family: str, kernels: dict, message: str) -> None:
    with pytest.raises(Refused) as caught:
        Backends.resolve(config(family, **kernels), hardware)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("op", sorted(set(FUSED) - set(OF_PYTORCH)))
@pytest.mark.usefixtures("gpu")
def test_a_kernel_that_cannot_run_is_refused_with_the_reason(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(language, "why_unavailable", lambda: "it is missing")
    monkeypatch.setattr(library, "why_unavailable", lambda on_gpu=False: "it is missing" if on_gpu else "")
    with pytest.raises(Refused) as caught:
        Backends.resolve(config(**{op: "fused"}), GPU)
    assert str(caught.value) == f"kernels.{op}: 'fused' given, but it is missing; must be auto or reference"
    if op in COMPILED:  # compiled without GPU code
        assert op in fused_ops(config(**{op: "fused"}), CPU)


@pytest.mark.usefixtures("gpu")
def test_the_interpreter_runs_kernels_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(language, "INTERPRETED", True)
    assert fused_ops(config(default="fused"), CPU) == [name for name in FUSED if name not in OF_PYTORCH]


@pytest.mark.usefixtures("gpu")
def test_the_summary_names_every_choice() -> None:
    resolved = Backends.resolve(config("dit", default="reference"), GPU)
    expected = {**dict.fromkeys(OPS, "reference"), "attention": "cudnn", "step": "graph"}
    assert resolved.summary() == expected
    assert resolved.attention.keywords == {"backend": "cudnn"}
    assert any("perturb" in note for note in resolved.notes)
    assert resolved.for_fp32().summary() == expected | {"attention": "sdpa"}
    assert resolved.for_fp32().attention is REFERENCE.attention


def test_every_op_has_a_field_in_the_configuration() -> None:
    assert set(OPS) == set(vars(KernelsConfig())) - {"default", "retune"}


# Execution


@pytest.mark.usefixtures("gpu")
def test_execution() -> None:
    choices = ("auto", "eager", "compiled", "graph")
    assert [choose_execution(choice, CPU.device) for choice in choices[:3]] == ["eager", "eager", "compiled"]
    assert [choose_execution(choice, GPU.device) for choice in choices] == ["graph", "eager", "compiled", "graph"]


def test_an_execution_that_cannot_run_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Refused, match=r"train.execution: 'graph' given; needs an NVIDIA GPU; must be auto, eager or c"):
        choose_execution("graph", CPU.device)

    monkeypatch.setattr(language, "AVAILABLE", False)
    monkeypatch.setenv("CXX", "no-such-compiler")
    for device, missing in ((GPU.device, "Triton"), (CPU.device, r"a C\+\+ compiler")):
        assert choose_execution("auto", device) == "eager"
        with pytest.raises(Refused, match=f"train.execution: 'compiled' given; needs {missing}"):
            choose_execution("compiled", device)
