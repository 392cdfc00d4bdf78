"""Attention: every backend against the formula, and the choice among backends."""

from __future__ import annotations

import math
import sys
from types import ModuleType

import pytest
import torch
from torch import Tensor

from sra_fast.errors import Refused
from sra_fast.model import attention as module
from sra_fast.model.attention import PACKAGES, attention, available, choose_attention

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
on_cpu = pytest.mark.parametrize("backend", ["sdpa", "flash", "math"])


def packed(dtype: torch.dtype = torch.float64) -> Tensor:
    """(B, T, 3, H, d) with five different sizes, so that no two axes can be mistaken for each other."""
    return torch.randn(2, 5, 3, 4, 8, generator=torch.Generator().manual_seed(0), dtype=dtype)


def formula(qkv: Tensor) -> Tensor:
    q, k, v = qkv.unbind(2)
    weights = (torch.einsum("bihd,bjhd->bhij", q, k) / math.sqrt(q.shape[-1])).exp()
    return torch.einsum("bhij,bjhd->bihd", weights / weights.sum(3, keepdim=True), v).flatten(2)


@on_cpu
def test_backends_and_their_gradients_agree_with_the_formula(backend: str) -> None:
    qkv = packed().requires_grad_()
    upstream = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    out, expected = attention(qkv, backend), formula(qkv)
    torch.testing.assert_close(out, expected, atol=1e-12, rtol=0)
    gradients = [torch.autograd.grad(value, qkv, upstream)[0] for value in (out, expected)]
    torch.testing.assert_close(*gradients, atol=1e-12, rtol=0)


@on_cpu
def test_bf16_stays_bf16_and_close(backend: str) -> None:
    out = attention(packed(BF16), backend)
    assert out.dtype == BF16
    torch.testing.assert_close(out.double(), formula(packed(BF16).double()), atol=0.02, rtol=0.02)


@pytest.mark.parametrize("backend", PACKAGES)
def test_flash_attn_packages_are_called_with_their_signatures(backend: str, monkeypatch) -> None:
    path, function, takes_packed = PACKAGES[backend]
    calls = []

    def call(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        calls.append([tuple(tensor.shape) for tensor in inputs])
        qkv = inputs[0] if takes_packed else torch.stack(inputs, 2)
        return formula(qkv).unflatten(2, (4, 8)), torch.zeros(2, 4, 5)

    for depth in range(1, path.count(".") + 2):  # flash_attn, flash_attn.cute
        parent = ".".join(path.split(".")[:depth])
        monkeypatch.setitem(sys.modules, parent, ModuleType(parent))
    setattr(sys.modules[path], function, call)
    torch.testing.assert_close(attention(packed(), backend), formula(packed()))
    assert calls == [[(2, 5, 3, 4, 8)] if takes_packed else 3 * [(2, 5, 4, 8)]]


@pytest.fixture
def gpu(monkeypatch):
    """A machine with a GPU of this major compute capability and these packages."""

    def make(major: int, packages: tuple[str, ...] = ()) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (major, 0))
        monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
        monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
        monkeypatch.setattr(module, "_installed", lambda name: name in {PACKAGES[package][0] for package in packages})

    return make


@pytest.mark.parametrize(
    ("major", "dtype", "head", "deterministic", "expected"),
    [
        (9, BF16, 72, False, "cudnn"),
        (10, FP16, 64, False, "cudnn"),
        (9, BF16, 72, True, "flash"),
        (8, BF16, 72, False, "flash"),
        (12, BF16, 72, False, "flash"),
        (7, BF16, 72, False, "sdpa"),
        (9, FP32, 72, False, "sdpa"),
        (9, BF16, 20, False, "sdpa"),
        (9, BF16, 136, False, "sdpa"),
    ],
)
def test_auto(gpu, major: int, dtype: torch.dtype, head: int, deterministic: bool, expected: str) -> None:
    gpu(major, packages=("flash-attn-2", "flash-attn-3"))  # are taken by name only
    assert choose_attention("auto", CUDA, dtype, head, deterministic) == expected


def test_on_a_cpu_auto_is_sdpa() -> None:
    assert choose_attention("auto", CPU, BF16, 64, False) == "sdpa"
    assert available(CPU) == ("sdpa", "flash", "math")


def test_a_backend_that_is_available_is_taken_by_name(gpu) -> None:
    gpu(9, packages=("flash-attn-3",))
    assert choose_attention("flash-attn-3", CUDA, BF16, 72, False) == "flash-attn-3"


@pytest.mark.parametrize(
    ("choice", "device", "dtype", "deterministic", "message"),
    [
        ("flash-attn-2", CUDA, BF16, False, "not available for cuda, bfloat16, heads of 72"),
        ("cudnn", CUDA, FP32, False, "not available for cuda, float32"),
        ("cudnn", CUDA, BF16, True, "not deterministic; must be auto, flash or math"),
        ("cudnn", CPU, BF16, False, "not available for cpu"),
    ],
)
def test_refusals(gpu, choice: str, device, dtype: torch.dtype, deterministic: bool, message: str) -> None:
    gpu(9, packages=("flash-attn-3",))
    with pytest.raises(Refused, match=f"model.attention: '{choice}' given; {message}"):
        choose_attention(choice, device, dtype, 72, deterministic)
