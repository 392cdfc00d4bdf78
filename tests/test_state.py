"""The update of a whole state: what it moves, what a non-finite gradient must not touch, and where the copies end."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from sra_fast.config import Config, OptimConfig
from sra_fast.kernels import IMPLEMENTATIONS, library
from sra_fast.kernels.adamw_ema import Lists, Scalars
from sra_fast.model.transformer import REFERENCE
from sra_fast.step.state import MOST_SKIPPED_IN_A_ROW, TrainState, ema_decay, learning_rate
from sra_fast.step.state import update as update_by

CPU = torch.device("cpu")
SHAPES = [(16, 8), (8,), (4, 4, 2)]


class Ours(NamedTuple):
    """The two ops, from one implementation."""

    norm_of: Callable[..., Tensor]
    adamw_ema: Callable[..., None]


@pytest.fixture(params=["fused", "reference"])
def ops(request) -> Ours:
    if request.param == "fused" and library.why_unavailable():
        pytest.skip(library.why_unavailable())
    return Ours(*(IMPLEMENTATIONS[op][request.param] for op in ("gradient_norm", "adamw_ema")))


@pytest.fixture
def update(ops: Ours) -> Callable[..., tuple[Tensor, Tensor]]:
    return partial(update_by, norm_of=ops.norm_of, adamw_ema=ops.adamw_ema)


def draw(seed: int, scale: float = 1.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [scale * torch.randn(shape, generator=generator) for shape in SHAPES]


def clipped(ops: Ours, gradients: list[Tensor], clip: float) -> list[Tensor]:
    """What the gradients are after clipping: the first moments, where these remember nothing."""
    weights, m, v = ([torch.zeros_like(g) for g in gradients] for _ in range(3))
    step, skipped = torch.zeros((2,), dtype=torch.int64)
    constants = [torch.tensor(value) for value in (1e-3, 0.9, clip, 1.0)]
    scalars = Scalars(ops.norm_of(gradients), step, skipped, *constants)
    ops.adamw_ema(Lists(gradients, weights, m, v), scalars, betas=(0.0, 0.999), eps=1e-8)
    return m


def test_clipping_is_by_the_global_norm(ops) -> None:
    gradients = draw(1, scale=3.0)
    norm = ops.norm_of(gradients)
    assert float(norm) == pytest.approx(math.sqrt(sum(float(g.double().square().sum()) for g in gradients)), rel=1e-6)
    parameters = [torch.zeros_like(g).requires_grad_() for g in gradients]
    for parameter, g in zip(parameters, gradients, strict=True):
        parameter.grad = g.clone()
    assert float(torch.nn.utils.clip_grad_norm_(parameters, 1.0)) == pytest.approx(float(norm), rel=1e-6)
    for got, parameter in zip(clipped(ops, gradients, 1.0), parameters, strict=True):
        torch.testing.assert_close(got, parameter.grad, rtol=1e-6, atol=0)


def test_a_norm_below_the_clip_leaves_the_gradient_as_it_is(ops) -> None:
    gradients = draw(1, scale=1e-3)
    for clip in (1.0, 0.0):
        assert all(torch.equal(a, b) for a, b in zip(clipped(ops, gradients, clip), gradients, strict=True))


def test_ema_warm_up_is_one_plus_k_over_ten_plus_k() -> None:
    for k, wanted in ((0, 0.1), (1, 2 / 11), (89, 90 / 99), (89_989, 89_990 / 89_999), (10**6, 0.9999)):
        assert float(ema_decay(OptimConfig(), torch.tensor(k))) == pytest.approx(min(wanted, 0.9999), rel=1e-7)
    assert float(ema_decay(OptimConfig(ema_warmup=False), torch.tensor(0))) == pytest.approx(0.9999, rel=1e-7)


# The update of a whole state


@pytest.fixture
def start(tiny) -> Callable[..., tuple[TrainState, OptimConfig]]:
    def make(
        dtype: torch.dtype = torch.float32, method: str = "sra", **optim: object
    ) -> tuple[TrainState, OptimConfig]:
        config: Config = replace(tiny(method, hidden=16), optim=OptimConfig(**optim))
        return TrainState.create(config, REFERENCE, CPU, dtype), config.optim

    return make


def gradients_for(state: TrainState, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(p.shape, generator=generator) for p in state.trained]


def snapshot(state: TrainState) -> dict[str, Tensor]:
    """Every bit of masters, EMA, moments and both networks, and the number of updates."""
    kept = {"adam_step": state.adam_step.clone()}
    for group in ("weights", "ema", "adam_m", "adam_v"):
        kept |= {f"{group}.{name}": value.clone() for name, value in getattr(state, group).items()}
    for network in ("student", "teacher"):
        parameters = getattr(state, network).named_parameters()
        kept |= {f"{network}.{name}": value.detach().clone() for name, value in parameters}
    return kept


def differing(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    def bits(value: Tensor) -> Tensor:
        return value.reshape(-1).view(torch.uint8)

    return {name for name in before if not torch.equal(bits(before[name]), bits(after[name]))}


LR = torch.tensor(1e-3)


def test_a_fresh_state_is_its_own_ema_and_has_empty_moments(start) -> None:
    state, _ = start()
    assert all(torch.equal(state.ema[name], value) for name, value in state.weights.items())
    assert all(state.ema[name].data_ptr() != value.data_ptr() for name, value in state.weights.items())
    assert set(state.adam_m) == set(state.adam_v) == set(state.weights) - {"pos_embed"}
    assert not any(value.any() for value in (*state.adam_m.values(), *state.adam_v.values()))
    assert state.student.training
    assert not state.teacher.training
    assert not any(p.requires_grad for p in state.teacher.parameters())


def test_the_update_moves_everything_trained_and_leaves_the_position_table(start, update) -> None:
    state, optim = start()
    before = snapshot(state)
    norm, decay = update(state, gradients_for(state, 0), LR, optim)
    still = {name.split(".", 1)[1] for name in set(before) - differing(before, snapshot(state)) if "." in name}
    assert still == {"pos_embed"}
    assert int(state.adam_step) == 1
    assert float(decay) == pytest.approx(0.1)
    assert norm.dtype == decay.dtype == torch.float32


def test_ema_moves_by_its_share_of_the_way_to_the_new_weights(start, update) -> None:
    state, optim = start()
    before = {name: value.double() for name, value in state.ema.items()}
    update(state, gradients_for(state, 0), LR, optim)
    for name, value in state.ema.items():
        wanted = 0.1 * before[name] + 0.9 * state.weights[name].double()
        torch.testing.assert_close(value.double(), wanted, atol=1e-7, rtol=1e-6)


def test_weight_decay_acts_on_matrices_alone(start, update) -> None:
    states = []
    for weight_decay in (0.0, 0.1):
        state, optim = start(weight_decay=weight_decay)
        for value in state.weights.values():
            value.add_(1.0)  # so that a bias, too, would have something to decay
        update(state, gradients_for(state, 0), LR, optim)
        states.append(state)
    plain, decayed = states
    changed = {name for name in plain.weights if not torch.equal(plain.weights[name], decayed.weights[name])}
    assert changed == {name for name, value in plain.weights.items() if value.ndim > 1 and name != "pos_embed"}


BAD = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf, "overflow": 3e38}


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("done", [0, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_non_finite_gradient_changes_no_bit(start, update, bad: str, done: int, dtype: torch.dtype) -> None:
    state, optim = start(dtype, weight_decay=0.1)
    for k in range(done):
        update(state, gradients_for(state, k), LR, optim)
    before, gradients = snapshot(state), gradients_for(state, 99)
    gradients[5].view(-1)[0:2] = BAD[bad]
    norm, _ = update(state, gradients, LR, optim)
    assert not norm.isfinite()
    assert differing(before, snapshot(state)) == set()
    assert (int(state.skipped_steps), int(state.skipped_in_a_row)) == (1, 1)


def test_training_goes_on_after_a_skipped_step_as_if_it_had_not_been(start, update) -> None:
    (spared, optim), (struck, _) = start(), start()
    for k in range(4):
        if k in (0, 2):
            update(struck, [g * math.nan for g in gradients_for(struck, 50)], LR, optim)
        for state in (spared, struck):
            update(state, gradients_for(state, k), LR, optim)
    assert differing(snapshot(spared), snapshot(struck)) == set()
    assert (int(struck.skipped_steps), int(struck.skipped_in_a_row)) == (2, 0)


def test_sixty_four_skipped_in_a_row_stay_visible(start, update) -> None:
    state, optim = start()
    nan, good = [g * math.nan for g in gradients_for(state, 0)], gradients_for(state, 0)
    for gradients, in_a_row in [(nan, 1), (nan, 2), (good, 0)]:
        update(state, gradients, LR, optim)
        assert int(state.skipped_in_a_row) == in_a_row
    state.skipped_in_a_row.fill_(MOST_SKIPPED_IN_A_ROW - 1)
    update(state, good, LR, optim)
    assert int(state.skipped_in_a_row) == 0
    state.skipped_in_a_row.fill_(MOST_SKIPPED_IN_A_ROW - 1)
    for gradients in (nan, good, nan, good):
        update(state, gradients, LR, optim)
        assert int(state.skipped_in_a_row) == MOST_SKIPPED_IN_A_ROW == 64
    assert int(state.skipped_steps) == 4


def test_bf16_networks_are_the_masters_rounded(start, update) -> None:
    state, optim = start(torch.bfloat16)
    for k in range(3):
        update(state, [g.bfloat16() for g in gradients_for(state, k)], LR, optim)
        for network, source in ((state.student, state.weights), (state.teacher, state.ema)):
            for name, parameter in network.named_parameters():
                assert source[name].dtype == torch.float32
                assert parameter.dtype == torch.bfloat16
                assert torch.equal(parameter, source[name][: len(parameter)].bfloat16()), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_state_takes_over_another_where_it_stands(start, update, dtype: torch.dtype) -> None:
    """A captured graph has the addresses: not one tensor may move, and the networks must see the new values."""
    state, optim = start(dtype)
    other, _ = start(torch.float32)
    for k in range(3):
        update(other, gradients_for(other, k), LR, optim)
    fields = ("weights", "ema", "adam_m", "adam_v", "adam_step", "skipped_steps", "skipped_in_a_row")
    before = {name: value.data_ptr() for name, value in tensors_of(state).items()}
    state.load({field: getattr(other, field) for field in fields})
    assert {name: value.data_ptr() for name, value in tensors_of(state).items()} == before
    assert int(state.adam_step) == 3
    for field in fields[:4]:
        for name, value in getattr(other, field).items():
            assert torch.equal(getattr(state, field)[name], value), (field, name)
    for network, source in ((state.student, other.weights), (state.teacher, other.ema)):
        assert all(torch.equal(p, source[name][: len(p)].to(dtype)) for name, p in network.named_parameters())


def tensors_of(state: TrainState) -> dict[str, Tensor]:
    """Every tensor itself, not a copy."""
    held = {"adam_step": state.adam_step, "skipped_steps": state.skipped_steps}
    for group in ("weights", "ema", "adam_m", "adam_v"):
        held |= {f"{group}.{name}": value for name, value in getattr(state, group).items()}
    for network in ("student", "teacher"):
        held |= {f"{network}.{name}": value for name, value in getattr(state, network).named_parameters()}
    return held


def test_fp32_networks_hold_the_masters_themselves(start) -> None:
    state, _ = start()
    for network, source in ((state.student, state.weights), (state.teacher, state.ema)):
        assert all(p.data_ptr() == source[name].data_ptr() for name, p in network.named_parameters())


# The teacher's copies stop at its tap

EMBEDDERS = ("pos_embed", "x_embedder.", "t_embedder.", "y_embedder.")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("method", "blocks"), [("sra", 3), ("none", 0)])
def test_the_teacher_has_what_it_reads_and_no_more(start, dtype: torch.dtype, method: str, blocks: int) -> None:
    state, _ = start(dtype, method)
    held = dict(state.teacher.named_parameters())
    read = (*EMBEDDERS, "modulation.", *(f"blocks.{i}." for i in range(blocks)))
    assert set(held) == {name for name in state.ema if name.startswith(read)}
    assert {name for name in state.ema if not name.startswith(read)}  # there is more to the EMA
    for kind in ("weight", "bias"):
        own, whole = held[f"modulation.{kind}"], state.ema[f"modulation.{kind}"]
        assert (len(own), len(whole)) == (6 * 16 * blocks, (6 * 4 + 2) * 16)
        assert torch.equal(own, whole[: len(own)].to(dtype))
    assert all(p.dtype == dtype for p in held.values())


@pytest.mark.parametrize("method", ["sra", "none"])
def test_an_update_is_given_every_tensor_where_it_lies(start, method: str) -> None:
    state, _ = start(torch.bfloat16, method)
    student, teacher = (dict(network.named_parameters()) for network in (state.student, state.teacher))
    groups = state.weights, state.adam_m, state.adam_v, state.ema, student
    for tensors, whole in zip(state.lists, groups, strict=False):
        held = [(t.data_ptr(), t.numel()) for t in tensors if t.numel()]
        wanted = []
        for name in state.adam_m:
            cut = len(teacher[name]) if name in teacher else 0
            pieces = whole[name][:cut], whole[name][cut:]
            wanted += [(t.data_ptr(), t.numel()) for t in pieces if t.numel()]
        assert held == wanted
    copies = [copy for copy in state.lists[5] if copy.numel()]
    trained = [p for name, p in teacher.items() if name in state.adam_m and p.numel()]
    assert {copy.data_ptr() for copy in copies} == {p.data_ptr() for p in trained}
    assert sum(copy.numel() for copy in copies) == sum(p.numel() for p in trained)
    for copy, average in zip(state.lists[5], state.lists[3], strict=True):
        assert copy.shape == average.shape or not copy.numel()


def test_fp32_networks_need_no_copies(start) -> None:
    state, _ = start()
    assert state.lists[4:] == ([], [])
    assert [len(tensors) for tensors in state.lists[:4]] == [len(state.adam_m)] * 4
    assert all(a is b for a, b in zip(state.lists[0], (state.weights[name] for name in state.adam_m), strict=True))


@pytest.mark.parametrize("method", ["sra", "none"])
def test_the_average_covers_what_the_teacher_has_no_copy_of(start, update, method: str) -> None:
    (copying, optim), (holding, _) = start(torch.bfloat16, method), start(torch.float32, method)
    for k in range(3):
        for state in (copying, holding):
            update(state, gradients_for(state, k), LR, optim)
    for group in ("weights", "ema", "adam_m", "adam_v"):
        for name, value in getattr(holding, group).items():
            assert torch.equal(getattr(copying, group)[name], value), (group, name)
    fresh, _ = start(torch.float32, method)
    still = {name for name in fresh.ema if torch.equal(fresh.ema[name], holding.ema[name])}
    assert still == set(fresh.weights) - set(fresh.adam_m)


def test_loading_and_refreshing_leave_the_teacher_cut(start, update) -> None:
    state, optim = start(torch.bfloat16)
    held = {name: (p.data_ptr(), p.shape) for name, p in state.teacher.named_parameters()}
    for value in state.ema.values():
        value.add_(1.0)
    state.refresh()
    other, _ = start(torch.bfloat16)
    for step in (
        lambda: None,
        lambda: state.load({"ema": other.ema}),
        lambda: update(state, gradients_for(state, 0), LR, optim),
    ):
        step()
        assert {name: (p.data_ptr(), p.shape) for name, p in state.teacher.named_parameters()} == held
        for name, p in state.teacher.named_parameters():
            assert torch.equal(p, state.ema[name][: len(p)].bfloat16()), name


# Learning rate


def scheduled(tiny, images_seen: int, **optim: object) -> float:
    """800 images in steps of 8, peak 1."""
    return learning_rate(replace(tiny(), optim=OptimConfig(lr=1.0, **optim)), images_seen)


def test_constant_rate_is_constant(tiny) -> None:
    assert {scheduled(tiny, seen) for seen in (0, 8, 400, 792)} == {1.0}


def test_warm_up_rises_linearly_and_its_first_step_is_not_zero(tiny) -> None:
    rates = [scheduled(tiny, seen, warmup_images=80) for seen in range(0, 96, 8)]
    assert rates == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.0, 1.0])


def test_cosine_falls_from_the_end_of_the_warm_up_to_zero_at_the_last_image(tiny) -> None:
    def rate(seen: int) -> float:
        return scheduled(tiny, seen, schedule="cosine", warmup_images=80)

    assert rate(80) == pytest.approx(1)
    assert rate(260) == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))
    assert rate(440) == pytest.approx(0.5)
    assert rate(800) == pytest.approx(0, abs=1e-12)
    assert rate(808) == pytest.approx(0, abs=1e-12)  # the last batch is a whole one
    rates = [rate(seen) for seen in range(80, 800, 8)]
    assert rates == sorted(rates, reverse=True)
