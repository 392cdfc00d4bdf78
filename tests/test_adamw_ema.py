"""The update of all parameters in one pass against torch.optim.AdamW and a plain EMA in float64: how exact it is, and
what it leaves alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from update_lists import (
    BETAS,
    BRAIN,
    DECAYS,
    EMA,
    EPS,
    FULL,
    GROUP,
    HALF,
    ONE,
    OPTIONS,
    RATES,
    SHAPES,
    all_words,
    compiled,
    copied,
    draw,
    either,
    scalars,
    used,
    words,
)

from sra_fast.kernels.adamw_ema import Lists, adamw_ema, adamw_ema_ref, parameter_ref
from sra_fast.kernels.gradient_norm import gradient_norm, gradient_norm_ref


def fresh(gradients: list[Tensor], copies: torch.dtype | None, shapes: Sequence[tuple[int, ...]] = SHAPES) -> Lists:
    """Before the first update: moments are zero, the EMA is the weights, the copies are yet to be made."""
    weights = draw(0, shapes=shapes)
    zeros, more = ([torch.zeros_like(w) for w in weights] for _ in range(2))
    student, teacher = ([torch.zeros_like(w, dtype=copies) for w in weights if copies] for _ in range(2))
    return Lists(gradients, weights, zeros, more, [w.clone() for w in weights], student, teacher)


# How exact it is


class Mix(NamedTuple):
    gradients: torch.dtype
    clip: float
    loss_scale: float


def gradients_of(mix: Mix, k: int) -> list[Tensor]:
    """Norms on both sides of the clip; scaled by what is no power of two."""
    return [(mix.loss_scale * g).to(mix.gradients) for g in draw(100 + k, scale=10 ** (k % 5 - 4))]


@cache
def torchs(mix: Mix, dtype: torch.dtype, steps: int) -> dict[str, list[Tensor]]:
    weights = [w.to(dtype).requires_grad_() for w in draw(0)]
    ema = [w.detach().clone() for w in weights]
    groups = [
        {
            "params": [w for w, own in zip(weights, GROUP, strict=True) if own == i],
            "lr": float(lr),
            "weight_decay": decay,
        }
        for i, (lr, decay) in enumerate(zip(RATES, DECAYS, strict=True))
    ]
    adamw, keep = torch.optim.AdamW(groups, betas=BETAS, eps=EPS), float(torch.tensor(EMA))
    for k in range(steps):
        for weight, g in zip(weights, gradients_of(mix, k), strict=True):
            weight.grad = g.to(dtype) / mix.loss_scale
        if mix.clip:
            torch.nn.utils.clip_grad_norm_(weights, mix.clip)
        adamw.step()
        for average, weight in zip(ema, weights, strict=True):
            average.mul_(keep).add_(weight.detach(), alpha=1 - keep)
    moments = [[adamw.state[weight][name] for weight in weights] for name in ("exp_avg", "exp_avg_sq")]
    return {"weights": [w.detach() for w in weights], "m": moments[0], "v": moments[1], "ema": ema}


def assert_as_exact(got: Lists, mix: Mix, steps: int) -> None:
    truth, theirs = torchs(mix, torch.float64, steps), torchs(mix, FULL, steps)
    for name, wanted in truth.items():
        error, allowed = (
            max(float((a - b).abs().max()) for a, b in zip(found, wanted, strict=True) if b.numel())
            for found in (getattr(got, name), theirs[name])
        )
        largest = max(float(b.abs().max()) for b in wanted if b.numel())
        assert 0 < allowed < 1e-4 * largest, "the comparison shows nothing"
        # Floor: our worst element may fall where theirs got lucky; one rounding of the largest value.
        assert error <= 2 * allowed + 2**-24 * largest, name


@either
@pytest.mark.parametrize("copies", [None, BRAIN, HALF], ids=str)
@pytest.mark.parametrize(
    "mix", [Mix(FULL, 0.0, 1.0), Mix(FULL, 1.0, 1.0), Mix(BRAIN, 1.0, 3.0), Mix(HALF, 1.0, 96.0)], ids=str
)
def test_a_hundred_updates_err_at_most_twice_as_much_as_torchs(call, mix: Mix, copies: torch.dtype | None) -> None:
    norm_of = gradient_norm if call is adamw_ema else gradient_norm_ref
    lists, given = fresh([], copies), scalars(clip=mix.clip, loss_scale=mix.loss_scale)
    norms = []
    for k in range(100):
        lists = lists._replace(gradients=gradients_of(mix, k))
        if k == 50:  # in the middle one that must leave no trace
            bad = given._replace(norm=torch.tensor(math.nan))
            call(lists._replace(gradients=[g * math.nan for g in lists.gradients]), bad, **OPTIONS)
        given = given._replace(norm=norm_of(lists.gradients))
        call(lists, given, **OPTIONS)
        norms.append(float(given.norm) / mix.loss_scale)
    assert (int(given.step), int(given.skipped)) == (100, 1)
    assert min(norms) < 1 < max(norms)
    assert_as_exact(lists, mix, 100)
    for copy, source in ((lists.student, lists.weights), (lists.teacher, lists.ema)):
        assert words(copy) == (words([w.to(copies) for w in source]) if copies else [])


def test_the_reference_compiled_for_every_shape_is_as_exact() -> None:
    mix = Mix(BRAIN, 1.0, 3.0)
    call = partial(adamw_ema_ref, parameter=torch.compile(parameter_ref, fullgraph=True, dynamic=True))
    lists, given = fresh([], BRAIN), scalars(clip=mix.clip, loss_scale=mix.loss_scale)
    for k in range(20):
        lists = lists._replace(gradients=gradients_of(mix, k))
        call(lists, given._replace(norm=gradient_norm_ref(lists.gradients)), **OPTIONS)
    assert_as_exact(lists, mix, 20)
    assert words(lists.student) == words([w.bfloat16() for w in lists.weights])
    assert words(lists.teacher) == words([w.bfloat16() for w in lists.ema])
    before = all_words(lists, given)[1:7]
    call(lists, given._replace(norm=torch.tensor(math.inf)), **OPTIONS)
    assert all_words(lists, given)[1:7] == before


# What it leaves alone


@either
@pytest.mark.parametrize("norm", [math.nan, -math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("zero_gradients", [False, True])
@pytest.mark.parametrize("step", [0, 7])
def test_a_norm_that_is_not_finite_changes_no_bit(call, norm: float, zero_gradients: bool, step: int) -> None:
    lists, given = used(), scalars(norm, step=step, clip=1.0)
    lists.gradients[1][3] = math.nan
    for part in lists[1:]:
        part[1][:5] = torch.tensor([-0.0, math.inf, -math.inf, math.nan, 1e-41])
    before = all_words(lists, given)
    call(lists, given, **OPTIONS, zero_gradients=zero_gradients)
    if zero_gradients:
        assert not any(g.any() for g in lists.gradients)
    after = all_words(lists, given._replace(skipped=torch.tensor(0)))
    assert after[zero_gradients:] == before[zero_gradients:]
    assert (int(given.step), int(given.skipped)) == (step, 1)


@either
def test_training_goes_on_as_if_a_skipped_update_had_not_been(call) -> None:
    spared, struck = used(), used()
    counts = [scalars(), scalars()]
    for k in range(3):
        for lists, given in zip((spared, struck), counts, strict=True):
            call(lists._replace(gradients=draw(50 + k)), given, **OPTIONS)
        nan = [g * math.nan for g in draw(60)]
        call(struck._replace(gradients=nan), counts[1]._replace(norm=torch.tensor(math.nan)), **OPTIONS)
    assert all_words(spared, counts[0])[1:7] == all_words(struck, counts[1])[1:7]
    assert [int(given.step) for given in counts] == [3, 3]
    assert [int(given.skipped) for given in counts] == [0, 3]


@either
def test_gradients_and_rates_stay_unless_they_are_to_be_zero(call) -> None:
    lists, given = used(gradients=BRAIN), scalars(2.0, clip=1.0, loss_scale=4.0)
    before, rates = words(lists.gradients), words([*given[:1], *given[3:]])
    call(lists, given, **OPTIONS)
    assert words(lists.gradients) == before
    assert words([*given[:1], *given[3:]]) == rates
    call(lists, given, **OPTIONS, zero_gradients=True)
    assert not any(g.view(torch.int16).any() for g in lists.gradients)  # +0, each


# Parts absent


@either
@pytest.mark.parametrize("copies", [BRAIN, HALF], ids=str)
def test_parts_alone_are_the_same_parts_of_the_whole(call, copies: torch.dtype) -> None:
    whole = used(copies=copies)
    alone = copied(whole)
    call(whole, scalars(), **OPTIONS)
    adam = copied(alone)._replace(ema=[], student=[], teacher=[])
    call(adam, scalars(), **OPTIONS)
    assert [*map(words, adam[1:4])] == [*map(words, whole[1:4])]
    # The rest from the new weights on.
    follow = copied(alone)._replace(gradients=[], weights=[w.clone() for w in whole.weights], m=[], v=[], student=[])
    call(follow, given := scalars(step=5), **OPTIONS)
    assert [words(part) for part in follow[1:]] == [*map(words, (whole.weights, [], [], whole.ema, [], whole.teacher))]
    assert int(given.step) == 6
    only = Lists([], [w.clone() for w in whole.weights], [], [], [], student=copied(alone).student)
    call(only, scalars(), **OPTIONS)
    assert [*map(words, (only.weights, only.student))] == [*map(words, (whole.weights, whole.student))]


@either
def test_a_copy_without_elements_is_left_out(call) -> None:
    whole = used()
    some, none = copied(whole), torch.empty(0, dtype=BRAIN)
    some = some._replace(teacher=[none if i % 2 else copy for i, copy in enumerate(some.teacher)])
    call(whole, scalars(), **OPTIONS)
    call(some, scalars(), **OPTIONS)
    assert [*map(words, some[:6])] == [*map(words, whole[:6])]
    assert words(some.teacher) == [b"" if i % 2 else word for i, word in enumerate(words(whole.teacher))]


@either
def test_one_rate_for_all_groups_and_no_groups_are_what_they_stand_for(call) -> None:
    results = []
    for lr, group in ((ONE, GROUP), (ONE.view(1), GROUP), (ONE.expand(2).clone(), GROUP)):
        call(lists := used(), scalars(lr=lr), **OPTIONS | {"group": group})
        results.append([*map(words, lists)])
    assert results[0] == results[1] == results[2]
    first = []
    for group in ([], [0] * len(SHAPES)):
        call(lists := used(), scalars(), **OPTIONS | {"group": group})
        first.append([*map(words, lists)])
    assert first[0] == first[1] != results[0]


# The same bits, whoever computes them


@either
def test_bits_do_not_depend_on_the_number_of_threads(call, threads: Callable[[int], None]) -> None:
    shapes = [(300, 777), (5,), (16384,), (16385,), (99_991,)]
    found = []
    for count in (1, 1, 2, 4):
        threads(count)
        lists, given = used(shapes=shapes), scalars(lr=ONE)
        for _ in range(2):
            call(lists, given, betas=BETAS, eps=EPS)
        found.append(all_words(lists, given))
    assert all(words == found[0] for words in found)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@either
@pytest.mark.parametrize(("gradients", "copies"), [(FULL, BRAIN), (BRAIN, HALF), (HALF, BRAIN)], ids=str)
def test_thousands_of_unaligned_views_are_as_good_as_tensors(call, gradients, copies) -> None:
    """Cut from one buffer without padding, at odd places; what lies around them stays."""
    count = 3000 if call is adamw_ema else 100
    shapes = [(37 * i % 61,) if i % 50 else (1001 + i,) for i in range(count)]
    apart = used(gradients=gradients, copies=copies, shapes=shapes)
    buffers = [torch.cat([torch.full((3,), 7.0), *part, torch.full((3,), 7.0)]).to(part[0].dtype) for part in apart]
    sizes = [3, *(size for (size,) in shapes), 3]
    views = Lists(*(list(buffer.split(sizes)[1:-1]) for buffer in buffers))
    assert {view.data_ptr() % 16 for view in views.weights} == {0, 4, 8, 12}
    for lists in (apart, views):
        call(lists, scalars(lr=ONE, clip=0.5), betas=BETAS, eps=EPS, zero_gradients=True)
    assert [*map(words, views)] == [*map(words, apart)]
    assert all(buffer[edge].tolist() == [7.0] * 3 for buffer in buffers for edge in (slice(3), slice(-3, None)))


@compiled
def test_copies_too_large_for_the_caches_are_the_same() -> None:
    """64 MiB of copies in one call are written past the caches, and those of two calls are not."""
    size = (1 << 24) + 77
    part = torch.randn(size, generator=torch.Generator().manual_seed(0))
    whole = Lists(*([part.clone()] for _ in range(5)), *([part.bfloat16()] for _ in range(2)))
    whole.v[0].abs_()
    halves = Lists(*(list(tensors[0].clone().split(size // 2 + 1)) for tensors in whole))
    adamw_ema(whole, scalars(lr=ONE), betas=BETAS, eps=EPS)
    for i in range(2):
        adamw_ema(Lists(*([tensors[i]] for tensors in halves)), scalars(lr=ONE), betas=BETAS, eps=EPS)
    for one, two in zip(whole, halves, strict=True):
        assert torch.equal(one[0], torch.cat(two))
