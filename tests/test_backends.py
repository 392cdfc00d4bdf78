"""What computes each op of a run, for a wish, a model and a device."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from sra_fast import kernels
from sra_fast.config import Config, KernelsConfig, preset
from sra_fast.errors import Refused
from sra_fast.hardware import Hardware
from sra_fast.kernels import language, library
from sra_fast.model import backends as choices
from sra_fast.model.backends import resolve

CPU = Hardware(torch.device("cpu"), torch.float32)
GPU = Hardware(torch.device("cuda"), torch.bfloat16)
FUSED = [op for op, found in kernels.IMPLEMENTATIONS.items() if "fused" in found]
TRITON = [op for op in FUSED if op not in kernels.COMPILED]
DIT = "reference (ddpm)"


@pytest.fixture
def beside_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine where Triton runs and the library is built for its GPU, an H200."""
    monkeypatch.setattr(language, "why_unavailable", lambda: "")
    monkeypatch.setattr(language, "INTERPRETED", False)
    monkeypatch.setattr(library, "why_unavailable", lambda on_gpu=False: "")
    monkeypatch.setattr(library, "has_gpu_code", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(choices, "choose", lambda *_: "cudnn")


def run(family: str, **wishes: str) -> Config:
    return replace(preset(f"{family}-s-2"), kernels=KernelsConfig(**wishes))


def refusal(config: Config, hardware: Hardware) -> str:
    with pytest.raises(Refused) as caught:
        resolve(config, hardware)
    return str(caught.value)


@pytest.mark.parametrize("family", ["sit", "dit"])
@pytest.mark.parametrize("hardware", [CPU, GPU], ids=["cpu", "gpu"])
@pytest.mark.parametrize("default", ["auto", "reference"])
@pytest.mark.usefixtures("beside_a_gpu")
def test_every_op_has_its_reference_until_a_benchmark_shows_more(
    family: str, hardware: Hardware, default: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "WINS", {})
    resolved = resolve(run(family, default=default), hardware)
    assert resolved.pop("attention") == "cudnn"
    assert resolved.pop("perturb") == (DIT if family == "dit" else "reference")
    assert resolved == dict.fromkeys(kernels.IMPLEMENTATIONS.keys() - {"perturb"}, "reference")


@pytest.mark.usefixtures("beside_a_gpu")
def test_a_fused_default_takes_every_kernel_there_is() -> None:
    resolved = resolve(run("sit", default="fused"), GPU)
    assert {op for op, computed_by in resolved.items() if computed_by == "fused"} == set(FUSED)
    assert {"adaln", "gated_adaln", "alignment", "perturb"} <= set(FUSED)
    assert resolved["gated_residual"] == "reference"


@pytest.mark.usefixtures("beside_a_gpu")
def test_a_wish_for_one_op_goes_before_the_default() -> None:
    resolved = resolve(run("sit", default="fused", alignment="reference", gated_adaln="reference"), GPU)
    assert [op for op in FUSED if resolved[op] != "fused"] == ["gated_adaln", "alignment"]
    resolved = resolve(run("sit", default="reference", perturb="fused"), GPU)
    assert [op for op, computed_by in resolved.items() if computed_by == "fused"] == ["perturb"]


@pytest.mark.parametrize("default", ["auto", "fused", "reference"])
@pytest.mark.parametrize("perturb", [None, "auto", "reference"])
@pytest.mark.usefixtures("beside_a_gpu")
def test_dits_perturb_is_the_reference_whatever_the_default_is(default: str, perturb: str | None) -> None:
    resolved = resolve(run("dit", default=default, perturb=perturb), GPU)
    assert resolved["perturb"] == DIT
    assert default == "auto" or resolved["adaln"] == default


@pytest.mark.parametrize("default", ["auto", "fused", "reference"])
@pytest.mark.usefixtures("beside_a_gpu")
def test_a_fused_perturb_is_refused_to_dit_by_name(default: str) -> None:
    config = run("dit", default=default, perturb="fused")
    assert refusal(config, GPU).startswith(
        "kernels.perturb: 'fused' given; must be auto or reference for model.family = dit"
    )


@pytest.mark.usefixtures("beside_a_gpu")
def test_a_fused_gated_residual_is_refused_because_there_is_none() -> None:
    said = refusal(run("sit", gated_residual="fused"), GPU)
    assert said.startswith("kernels.gated_residual: 'fused' given, but this op has no fused kernel")


@pytest.mark.parametrize("op", TRITON)
@pytest.mark.usefixtures("beside_a_gpu")
def test_a_run_on_the_cpu_beside_a_gpu_is_refused_a_kernel_by_name(op: str) -> None:
    said = refusal(run("sit", **{op: "fused"}), CPU)
    assert said == f"kernels.{op}: 'fused' given, but it runs on GPUs; must be auto or reference"
    assert refusal(run("sit", default="fused"), CPU).startswith("kernels.adaln: 'fused' given")


@pytest.mark.parametrize("op", kernels.COMPILED)
@pytest.mark.usefixtures("beside_a_gpu")
def test_compiled_ops_run_on_the_cpu_too(op: str) -> None:
    resolved = resolve(run("sit", default="reference", **{op: "fused"}), CPU)
    assert [name for name, computed_by in resolved.items() if computed_by == "fused"] == [op]


@pytest.mark.parametrize("op", FUSED)
@pytest.mark.usefixtures("beside_a_gpu")
def test_what_is_missing_for_a_fused_op_is_said_with_its_name(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for function in ("missing", "missing_on_a_gpu") if op in kernels.COMPILED else ("missing",):
        where = library if op in kernels.COMPILED else language
        monkeypatch.setattr(where, function, lambda: "this and that is not there")
    for hardware in (CPU, GPU):
        said = refusal(run("sit", **{op: "fused"}), hardware)
        assert said == f"kernels.{op}: 'fused' given, but this and that is not there; must be auto or reference"


@pytest.mark.parametrize("op", kernels.COMPILED)
@pytest.mark.usefixtures("beside_a_gpu")
def test_a_library_without_gpu_code_is_refused_on_a_gpu(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "why_unavailable", lambda on_gpu=False: "the compiled operators have no GPU code")
    config = run("sit", **{op: "fused"})
    assert refusal(config, GPU).startswith(f"kernels.{op}: 'fused' given, but the compiled operators have no GPU code;")
    assert resolve(config, CPU)[op] == "fused"


@pytest.mark.usefixtures("beside_a_gpu")
def test_the_interpreter_runs_fused_ops_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(language, "INTERPRETED", True)
    assert resolve(run("sit", default="fused"), CPU)["perturb"] == "fused"


@pytest.mark.usefixtures("beside_a_gpu")
def test_auto_takes_the_fused_op_where_it_has_won_and_can_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "WINS", {"alignment": ("sm_90",), "adaln": ("sm_80",), "perturb": ("sm_90", "cpu")})
    for wishes in ({}, {"default": "reference", "alignment": "auto", "perturb": "auto"}):
        resolved = resolve(run("sit", **wishes), GPU)
        assert [op for op, computed_by in resolved.items() if computed_by == "fused"] == ["alignment", "perturb"]
    assert resolve(run("dit"), GPU)["perturb"] == DIT
    assert "fused" not in resolve(run("sit"), CPU).values()  # which has no Triton
    monkeypatch.setattr(language, "why_unavailable", lambda: "Triton is not installed")
    assert "fused" not in resolve(run("sit"), GPU).values()


def test_every_op_can_be_wished_for() -> None:
    assert set(kernels.IMPLEMENTATIONS) == set(vars(KernelsConfig())) - {"default"}
