"""Attention: every backend against the formula, packed inputs, and the choice among backends."""

from __future__ import annotations

import math
import sys
from types import ModuleType

import pytest
import torch
from torch import Tensor

from sra_fast.config import ModelConfig
from sra_fast.errors import Refused
from sra_fast.model import attention as module
from sra_fast.model.attention import BACKENDS, PACKAGES, attention, available, choose
from sra_fast.model.layout import joined
from sra_fast.model.transformer import REFERENCE, Ops, around

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def packed(dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    """(B, T, 3, H, d) with five different sizes, so that no two axes can be mistaken for each other."""
    return torch.randn(2, 5, 3, 4, 8, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def formula(qkv: Tensor) -> Tensor:
    q, k, v = qkv.unbind(2)
    weights = (torch.einsum("bihd,bjhd->bhij", q, k) / math.sqrt(q.shape[-1])).exp()
    return torch.einsum("bhij,bjhd->bihd", weights / weights.sum(3, keepdim=True), v).flatten(2)


@pytest.mark.parametrize("backend", available(CPU))
def test_backends_and_their_gradients_agree_with_the_formula(backend: str) -> None:
    qkv = packed().requires_grad_()
    upstream = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    got, wanted = attention(qkv, backend), formula(qkv)
    torch.testing.assert_close(got, wanted, atol=1e-12, rtol=0)
    gradients = [torch.autograd.grad(out, qkv, upstream)[0] for out in (got, wanted)]
    torch.testing.assert_close(*gradients, atol=1e-12, rtol=0)
    assert torch.autograd.gradcheck(lambda x: attention(x, backend), [packed(seed=2)[:1, :3].requires_grad_()])


@pytest.mark.parametrize("backend", available(CPU))
def test_a_strided_view_gives_the_same(backend: str) -> None:
    wide = torch.randn(2, 10, 3, 4, 16, generator=torch.Generator().manual_seed(0))
    view = wide[:, ::2, ..., :8]
    assert not view.is_contiguous()
    torch.testing.assert_close(attention(view, backend), attention(view.contiguous(), backend))


@pytest.mark.parametrize("backend", available(CPU))
def test_bf16_stays_bf16_and_close(backend: str) -> None:
    got = attention(packed(torch.bfloat16), backend)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.double(), formula(packed(torch.bfloat16).double()), atol=0.02, rtol=0.02)


def test_an_unknown_backend_is_named() -> None:
    with pytest.raises(ValueError, match="backend: 'fast' given; must be one of sdpa, cudnn, flash"):
        attention(packed(), "fast")


def test_the_networks_backends_agree(tiny, awake) -> None:
    config = tiny().model
    inputs = (torch.randn(2, 1, 8, 8), torch.tensor([0.2, 0.8]), torch.tensor([0, 3]))
    found = []
    for backend in available(CPU):
        ops = Ops.select(
            {**dict.fromkeys(("adaln", "gated_adaln", "gated_residual"), "reference"), "attention": backend}
        )
        found.append(around(config, joined(awake(config)), ops)(*inputs)[0])
    assert len(found) == 3
    for other in found[1:]:
        torch.testing.assert_close(found[0], other, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found[0], around(config, joined(awake(config)), REFERENCE)(*inputs)[0])


@pytest.mark.parametrize("name", PACKAGES)
def test_a_flash_attn_package_is_called_as_it_wants_to_be(name: str, monkeypatch) -> None:
    path, function, takes_packed = PACKAGES[name]
    calls = []

    def call(*given: Tensor) -> tuple[Tensor, Tensor]:
        calls.append([tuple(tensor.shape) for tensor in given])
        qkv = given[0] if takes_packed else torch.stack(given, 2)
        return formula(qkv).unflatten(2, (4, 8)), torch.zeros(2, 4, 5)

    for depth in range(1, path.count(".") + 2):  # flash_attn, flash_attn.cute
        parent = ".".join(path.split(".")[:depth])
        monkeypatch.setitem(sys.modules, parent, ModuleType(parent))
    setattr(sys.modules[path], function, call)
    torch.testing.assert_close(attention(packed(), name), formula(packed()))
    assert calls == [[(2, 5, 3, 4, 8)] if takes_packed else 3 * [(2, 5, 4, 8)]]


# The choice


@pytest.fixture
def gpu(monkeypatch):
    """A machine that says it has such a GPU."""

    def make(major: int, packages: tuple[str, ...] = ()) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (major, 0))
        monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
        monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
        monkeypatch.setattr(module, "_installed", lambda name: name in {PACKAGES[package][0] for package in packages})

    return make


@pytest.mark.parametrize(
    ("major", "dtype", "head", "deterministic", "wanted"),
    [
        (9, torch.bfloat16, 72, False, "cudnn"),
        (10, torch.bfloat16, 72, False, "cudnn"),
        (9, torch.bfloat16, 72, True, "flash"),
        (8, torch.bfloat16, 72, False, "flash"),
        (7, torch.bfloat16, 72, False, "sdpa"),
        (12, torch.bfloat16, 72, False, "flash"),
        (9, torch.float32, 72, False, "sdpa"),
        (9, torch.bfloat16, 20, False, "sdpa"),
        (9, torch.bfloat16, 136, False, "sdpa"),
        (9, torch.float16, 64, False, "cudnn"),
    ],
)
def test_auto_follows_the_rule(
    gpu, major: int, dtype: torch.dtype, head: int, deterministic: bool, wanted: str
) -> None:
    gpu(major, packages=("flash-attn-2", "flash-attn-3"))  # being installed is no reason to be taken
    assert choose("auto", CUDA, dtype, head, deterministic) == wanted


def test_on_a_cpu_pytorch_chooses() -> None:
    assert choose("auto", CPU, torch.bfloat16, 64, False) == "sdpa"
    assert available(CPU) == ("sdpa", "flash", "math")


def test_a_wish_is_granted_or_refused(gpu) -> None:
    gpu(9, packages=("flash-attn-3",))
    assert choose("flash-attn-3", CUDA, torch.bfloat16, 72, False) == "flash-attn-3"
    with pytest.raises(
        Refused, match=r"model.attention: 'flash-attn-2' given; not available for cuda, bfloat16, heads"
    ):
        choose("flash-attn-2", CUDA, torch.bfloat16, 72, False)
    with pytest.raises(Refused, match=r"model.attention: 'cudnn' given; not available for cuda, float32"):
        choose("cudnn", CUDA, torch.float32, 72, False)
    with pytest.raises(Refused, match=r"model.attention: 'cudnn' given; not deterministic"):
        choose("cudnn", CUDA, torch.bfloat16, 72, True)
    with pytest.raises(Refused, match=r"model.attention: 'cudnn' given; not available for cpu"):
        choose("cudnn", CPU, torch.bfloat16, 64, False)


def test_every_backend_can_be_asked_for() -> None:
    for backend in ("auto", *BACKENDS):
        ModelConfig(attention=backend)
