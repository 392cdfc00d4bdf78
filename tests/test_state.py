"""The update of a whole state: what it changes, what a non-finite gradient must not change, and the networks' copies.
The optimizer's arithmetic is tested in test_adamw_ema.py."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from sra_fast.config import OptimConfig
from sra_fast.kernels import library
from sra_fast.kernels.gradient_norm import gradient_norm_ref
from sra_fast.kernels.registry import OPS
from sra_fast.model.backends import REFERENCE
from sra_fast.step.state import MAX_SKIPPED_IN_A_ROW, TrainState, ema_decay, learning_rate
from sra_fast.step.state import update as update_state

CPU = torch.device("cpu")
LR = torch.tensor(1e-3)
GROUPS = ("weights", "ema", "adam_m", "adam_v")
COUNTERS = ("adam_step", "skipped_steps", "skipped_in_a_row")
both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


@pytest.fixture(params=["fused", "reference"])
def update(request) -> Callable[..., tuple[Tensor, Tensor]]:
    """`update` by the compiled kernels, and by the references."""
    if request.param == "fused" and library.why_unavailable():
        pytest.skip(library.why_unavailable())
    gradient_norm, adamw_ema = (getattr(OPS[op], request.param) for op in ("gradient_norm", "adamw_ema"))

    def call(state: TrainState, gradients: list[Tensor], lr: Tensor, optim: OptimConfig) -> tuple[Tensor, Tensor]:
        norm = gradient_norm(gradients)
        return norm, update_state(state, gradients, norm, lr, optim, adamw_ema)

    return call


@pytest.fixture
def start(tiny) -> Callable[..., tuple[TrainState, OptimConfig]]:
    def create(
        dtype: torch.dtype = torch.float32, method: str = "sra", **optim: object
    ) -> tuple[TrainState, OptimConfig]:
        config = replace(tiny(method, hidden=16), optim=OptimConfig(**optim))
        return TrainState.create(config, REFERENCE, CPU, dtype), config.optim

    return create


def gradients_for(state: TrainState, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(parameter.shape, generator=generator) for parameter in state.trained]


def updated(state: TrainState, gradients: list[Tensor], optim: OptimConfig) -> None:
    """An update by the references."""
    update_state(state, gradients, gradient_norm_ref(gradients), LR, optim)


def tensors_of(state: TrainState) -> dict[str, Tensor]:
    """Masters, EMA, moments and the parameters of both networks: the tensors themselves."""
    tensors = {f"{group}.{name}": value for group in GROUPS for name, value in getattr(state, group).items()}
    for network in ("student", "teacher"):
        parameters = getattr(state, network).named_parameters()
        tensors |= {f"{network}.{name}": value.detach() for name, value in parameters}
    return tensors


def snapshot(state: TrainState) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in (tensors_of(state) | {"adam_step": state.adam_step}).items()}


def differing(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    """Names of tensors that are not bitwise equal."""

    def bits(value: Tensor) -> Tensor:
        return value.reshape(-1).view(torch.uint8)

    return {name for name in before if not torch.equal(bits(before[name]), bits(after[name]))}


def assert_networks_are_rounded_masters(state: TrainState, dtype: torch.dtype) -> None:
    for network, source in ((state.student, state.weights), (state.teacher, state.ema)):
        for name, parameter in network.named_parameters():
            assert source[name].dtype == torch.float32
            assert parameter.dtype == dtype
            assert torch.equal(parameter, source[name].to(dtype)), name


@both_dtypes
def test_a_new_state(start, dtype: torch.dtype) -> None:
    """The EMA is a copy of the weights, moments are zero, fp32 networks share the masters, the teacher has no
    gradients and no parameters past its tap."""
    state, _ = start(dtype)
    assert all(torch.equal(state.ema[name], value) for name, value in state.weights.items())
    assert all(state.ema[name].data_ptr() != value.data_ptr() for name, value in state.weights.items())
    assert set(state.adam_m) == set(state.adam_v) == set(state.weights) - {"pos_embed"}
    assert not any(value.any() for value in (*state.adam_m.values(), *state.adam_v.values()))
    assert (state.student.training, state.teacher.training) == (True, False)
    assert not any(parameter.requires_grad for parameter in state.teacher.parameters())
    left_out = {name for name in state.ema if name.startswith(("blocks.3.", "ap_head.", "final_layer."))}
    assert {name for name, _ in state.teacher.named_parameters()} == set(state.ema) - left_out
    assert_networks_are_rounded_masters(state, dtype)
    for network, source in ((state.student, state.weights), (state.teacher, state.ema)):
        for name, parameter in network.named_parameters():
            assert (parameter.data_ptr() == source[name].data_ptr()) == (dtype == torch.float32)


def test_an_update_moves_everything_trained_and_the_ema_follows(start, update) -> None:
    state, optim = start()
    before = snapshot(state)
    norm, decay = update(state, gradients_for(state, 0), LR, optim)
    unchanged = {name.split(".", 1)[1] for name in set(before) - differing(before, snapshot(state))}
    assert unchanged == {"pos_embed"}
    assert int(state.adam_step) == 1
    assert float(decay) == pytest.approx(0.1)
    assert norm.dtype == decay.dtype == torch.float32
    for name, value in state.ema.items():
        expected = 0.1 * before[f"ema.{name}"].double() + 0.9 * state.weights[name].double()
        torch.testing.assert_close(value.double(), expected, atol=1e-7, rtol=1e-6)


def test_two_updates_are_torchs_adamw_with_clipping(start, update) -> None:
    state, optim = start(weight_decay=0.1, clip=1.0)
    for value in state.weights.values():
        value.add_(1.0)  # so that a bias, too, would have something to decay
    masters = {name: value.clone().requires_grad_() for name, value in state.weights.items() if name in state.adam_m}
    matrices = [parameter for parameter in masters.values() if parameter.ndim > 1]
    vectors = [parameter for parameter in masters.values() if parameter.ndim < 2]
    torchs = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        lr=float(LR),
        betas=(optim.beta1, optim.beta2),
        eps=optim.eps,
    )
    for seed in range(2):
        gradients = gradients_for(state, seed)
        for parameter, gradient in zip(masters.values(), gradients, strict=True):
            parameter.grad = gradient.clone()
        expected = torch.nn.utils.clip_grad_norm_(masters.values(), 1.0)
        torchs.step()
        norm, _ = update(state, gradients, LR, optim)
        assert float(norm) == pytest.approx(float(expected), rel=1e-6)
    for name, parameter in masters.items():
        torch.testing.assert_close(state.weights[name], parameter.detach(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("bad", [math.nan, -math.inf, 3e38], ids=["nan", "-inf", "overflow"])
@both_dtypes
def test_a_non_finite_gradient_changes_no_bit(start, update, bad: float, dtype: torch.dtype) -> None:
    state, optim = start(dtype, weight_decay=0.1)
    update(state, gradients_for(state, 0), LR, optim)
    before, gradients = snapshot(state), gradients_for(state, 99)
    gradients[5].view(-1)[0:2] = bad
    norm, _ = update(state, gradients, LR, optim)
    assert not norm.isfinite()
    assert differing(before, snapshot(state)) == set()
    assert (int(state.skipped_steps), int(state.skipped_in_a_row)) == (1, 1)


def test_skipped_in_a_row_is_reset_by_a_finite_step_but_stays_at_the_limit(start) -> None:
    state, optim = start()
    good = gradients_for(state, 0)
    bad = [gradient * math.nan for gradient in good]
    for gradients, in_a_row in [(bad, 1), (bad, 2), (good, 0)]:
        updated(state, gradients, optim)
        assert int(state.skipped_in_a_row) == in_a_row
    state.skipped_in_a_row.fill_(MAX_SKIPPED_IN_A_ROW - 1)
    for gradients in (bad, good, bad, good):
        updated(state, gradients, optim)
        assert int(state.skipped_in_a_row) == MAX_SKIPPED_IN_A_ROW == 64


@pytest.mark.parametrize("method", ["sra", "none"])
def test_bf16_networks_are_the_masters_rounded_and_train_the_same_masters(start, update, method: str) -> None:
    (state, optim), (in_fp32, _) = start(torch.bfloat16, method), start(torch.float32, method)
    for k in range(3):
        for each in (state, in_fp32):
            update(each, gradients_for(each, k), LR, optim)
        assert_networks_are_rounded_masters(state, torch.bfloat16)
    for group in GROUPS:
        for name, value in getattr(in_fp32, group).items():
            assert torch.equal(getattr(state, group)[name], value), (group, name)


@both_dtypes
def test_loading_copies_in_place(start, dtype: torch.dtype) -> None:
    """A captured graph has the addresses: no tensor may move, and the networks must see the new values."""
    (state, optim), (other, _) = start(dtype), start()
    for k in range(3):
        updated(other, gradients_for(other, k), optim)
    addresses = {name: value.data_ptr() for name, value in tensors_of(state).items()}
    state.load({field: getattr(other, field) for field in GROUPS + COUNTERS})
    assert {name: value.data_ptr() for name, value in tensors_of(state).items()} == addresses
    assert int(state.adam_step) == 3
    for group in GROUPS:
        for name, value in getattr(other, group).items():
            assert torch.equal(getattr(state, group)[name], value), (group, name)
    assert_networks_are_rounded_masters(state, dtype)


# EMA decay and learning rate


def test_ema_warm_up_is_one_plus_k_over_ten_plus_k() -> None:
    for k, expected in ((0, 0.1), (1, 2 / 11), (89_989, 89_990 / 89_999), (10**6, 0.9999)):
        assert float(ema_decay(OptimConfig(), torch.tensor(k))) == pytest.approx(min(expected, 0.9999), rel=1e-7)
    assert float(ema_decay(OptimConfig(ema_warmup=False), torch.tensor(0))) == pytest.approx(0.9999, rel=1e-7)


COSINE = {"schedule": "cosine", "warmup_images": 80}


@pytest.mark.parametrize(
    ("optim", "images_seen", "expected"),
    [
        ({}, 0, 1),
        ({}, 792, 1),
        ({"warmup_images": 80}, 0, 0.1),
        ({"warmup_images": 80}, 64, 0.9),
        ({"warmup_images": 80}, 88, 1),
        (COSINE, 0, 0.1),
        (COSINE, 80, 1),
        (COSINE, 260, 0.5 * (1 + math.cos(math.pi / 4))),
        (COSINE, 440, 0.5),
        (COSINE, 800, 0),
        (COSINE, 808, 0),  # the last batch is a whole one
    ],
)
def test_learning_rate(tiny, optim: dict, images_seen: int, expected: float) -> None:
    """800 images in steps of 8, peak 1."""
    config = replace(tiny(), optim=OptimConfig(lr=1.0, **optim))
    assert learning_rate(config, images_seen) == pytest.approx(expected, abs=1e-12)
