"""One training step: what it reads, what it may not read, and what it must reproduce."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from sra_fast.config import Config, OptimConfig
from sra_fast.kernels.perturb import Settings, Stored, clean_ref, draw_ref, perturb_ref
from sra_fast.model.layout import joined
from sra_fast.model.transformer import Ops
from sra_fast.step.state import TrainState
from sra_fast.step.step import MetricRing, Metrics, TrainingStep

CPU = torch.device("cpu")
LR, WEIGHT = torch.tensor(1e-3), torch.tensor(0.5)


def begin(
    config: Config,
    weights: dict[str, Tensor] | None = None,
    dtype: torch.dtype = torch.float32,
    stored: Stored | None = None,
):
    """(step, state), the state's networks awake where weights are given."""
    resolved = config.kernels.resolve()
    state = TrainState.create(config, Ops.select(resolved), CPU, dtype)
    for name, value in (joined(weights) if weights else {}).items():
        state.weights[name].copy_(value)
        state.ema[name].copy_(1.1 * value)  # a teacher of its own
    state.refresh()
    return TrainingStep(config, resolved, CPU, stored), state


def batch(size: int = 8, first: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Images with little in them, labels, image numbers."""
    x = torch.randn(size, 1, 1, 1, generator=torch.Generator().manual_seed(first)) * torch.ones(1, 1, 8, 8)
    return x, torch.arange(size) % 4, torch.arange(first, first + size)


def everything(state: TrainState) -> dict[str, Tensor]:
    groups = ("weights", "ema", "adam_m", "adam_v")
    return {f"{g}.{name}": value for g in groups for name, value in getattr(state, g).items()}


@pytest.mark.parametrize("family", ["sit", "dit"])
@pytest.mark.parametrize("method", ["sra", "none"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_host_decides_nothing_from_device_values(tiny, family: str, method: str, accumulate: int) -> None:
    config = tiny(method, accumulate=accumulate, family=family, depth=3, hidden=16)
    with FakeTensorMode():  # tensors without values: any look at one raises
        step, state = begin(config)
        x, labels, number = torch.randn(8, 1, 8, 8), torch.zeros(8, dtype=torch.int64), torch.arange(8)
        metrics = step(state, x, labels, number, torch.tensor(1e-3), torch.tensor(0.5))
        MetricRing(4, CPU).push(metrics)
    assert all(value.shape == () and value.dtype == torch.float32 for value in metrics)


def test_fake_tensors_do_catch_a_look() -> None:
    with FakeTensorMode(), pytest.raises(DataDependentOutputException):
        bool(torch.randn(8).sum() > 0)


@pytest.mark.parametrize("family", ["sit", "dit"])
@pytest.mark.parametrize("method", ["sra", "none"])
def test_two_runs_are_equal_in_every_bit(tiny, family: str, method: str) -> None:
    results = []
    for _ in range(2):
        step, state = begin(tiny(method, family=family))
        rows = [torch.stack(step(state, *batch(first=8 * k), LR, WEIGHT)) for k in range(3)]
        results.append(everything(state) | {"metrics": torch.stack(rows)})
    for name, value in results[0].items():
        assert torch.equal(value, results[1][name]), name


@pytest.mark.parametrize("family", ["sit", "dit"])
@pytest.mark.parametrize("distance", ["cosine", "cosine_channel", "smooth_l1"])
@pytest.mark.parametrize("accumulate", [2, 4])
def test_micro_batches_add_up_to_the_whole_batch(tiny, awake, family: str, distance: str, accumulate: int) -> None:
    moments, metrics = [], []
    for parts in (1, accumulate):
        config = tiny(accumulate=parts, family=family)
        # beta1 = 0 and no clip: the first moment is the gradient.
        config = replace(config, align=replace(config.align, distance=distance), optim=OptimConfig(beta1=0, clip=0))
        step, state = begin(config, awake(config.model))
        metrics.append(step(state, *batch(), LR, WEIGHT))
        moments.append(state.adam_m)
    # Only the order of fp32 additions differs. Sums over 128 tokens through 4 blocks and back cost some hundred
    # roundings of 2^-24 where they cancel; a forgotten division or micro-batch costs a quarter or more.
    torch.testing.assert_close(torch.stack(metrics[0]), torch.stack(metrics[1]), rtol=1e-5, atol=1e-6)
    for name, whole in moments[0].items():
        error, scale = (whole - moments[1][name]).norm(), whole.norm()
        assert float(error) <= 2**-24 * 1000 * float(scale), name


@pytest.mark.parametrize("family", ["sit", "dit"])
def test_noise_belongs_to_the_image_number_not_to_the_place_in_the_batch(tiny, awake, family: str) -> None:
    config = tiny(family=family)
    step, state = begin(config, awake(config.model))
    x, labels, number = batch()
    order = torch.tensor([3, 7, 0, 1, 6, 2, 5, 4])
    here, there = (step.perturb(*(value[rows] for value in (x, labels, number))) for rows in (torch.arange(8), order))
    for name, a, b in zip(here[0]._fields, here[0], there[0], strict=True):
        assert (a is b is None) or torch.equal(a[order], b), name
    assert (here[0].x is None) == (family == "sit")
    assert torch.equal(here[1][order], there[1])
    same = step.losses(state, x[order], labels[order], number[order], WEIGHT).total.item()
    other = step.losses(state, x, labels, number + 8, WEIGHT).total.item()
    wanted = step.losses(state, x, labels, number, WEIGHT).total.item()
    assert same == pytest.approx(wanted, rel=1e-5)
    assert other != pytest.approx(wanted, rel=1e-3)


def test_both_networks_compute_from_what_perturb_drew(tiny, awake) -> None:
    config = tiny()
    step, state = begin(config, awake(config.model))
    noised, labels, teacher_labels = step.perturb(*batch())
    drawn = draw_ref(*batch(), step.settings)
    prediction, features = state.student(noised.x_t, noised.t, labels, tap=1)
    with torch.no_grad():
        target = state.teacher.features(noised.x_teacher, noised.t_teacher, teacher_labels, tap=3)
    losses = step.losses(state, *batch(), WEIGHT)
    generative = (prediction - (drawn.noise - drawn.x)).square().mean()
    alignment = 1 - torch.nn.functional.cosine_similarity(features, target, dim=-1).mean()
    assert losses.generative.item() == pytest.approx(generative.item(), rel=1e-5)
    assert losses.alignment.item() == pytest.approx(alignment.item(), rel=1e-5)
    assert losses.total.item() == pytest.approx((generative + 0.5 * alignment).item(), rel=1e-5)


def test_draws_follow_the_configuration(tiny) -> None:
    config = tiny()
    config = replace(
        config,
        run=replace(config.run, seed=2**64 - 5),
        objective=replace(config.objective, path="cosine", times="lognormal", label_dropout=0.5),
        align=replace(config.align, t_max=0.7, shared_label_dropout=False),
    )
    noised, labels, teacher_labels = begin(config)[0].perturb(*batch(64))
    wanted = perturb_ref(*batch(64), Settings(2**64 - 5, "cosine", "lognormal", 0.7, 4, 0.5, False))
    for value, right in zip((*noised[:5], labels, teacher_labels), wanted, strict=True):
        assert torch.equal(value, right)
    assert set(labels.tolist()) == {0, 1, 2, 3, 4}


STORED = {  # data, and what makes images of them
    "moments": (torch.float16, Stored(True, torch.tensor([0.5]), torch.tensor([0.25]))),
    "latents": (torch.float16, Stored(False, torch.tensor([0.5]), torch.tensor([0.25]))),
    "pixels": (torch.uint8, Stored(False, torch.tensor([127.5]), torch.tensor([1 / 127.5]))),
}


@pytest.mark.parametrize("family", ["sit", "dit"])
@pytest.mark.parametrize("kind", STORED)
def test_stored_data_train_as_the_images_that_they_stand_for(tiny, awake, family: str, kind: str) -> None:
    config, (dtype, stored) = tiny(family=family), STORED[kind]
    _, labels, number = batch()
    channels = 2 if stored.posterior else 1
    data = (100 * torch.rand(8, channels, 8, 8, generator=torch.Generator().manual_seed(0))).to(dtype)
    weights = awake(config.model)
    step, state = begin(config, weights, stored=stored)
    got = step.losses(state, data, labels, number, WEIGHT)
    plain, state = begin(config, weights)
    wanted = plain.losses(state, clean_ref(data, number, config.run.seed, stored), labels, number, WEIGHT)
    for value, right in zip(got, wanted, strict=True):
        assert torch.equal(value, right)
    other = plain.losses(state, data[:, :1].float(), labels, number, WEIGHT)
    assert other.generative.item() != pytest.approx(got.generative.item(), rel=1e-3)


def test_label_sharing_follows_the_configuration(tiny) -> None:
    config = tiny()
    config = replace(config, objective=replace(config.objective, label_dropout=0.5))
    _, labels, teacher_labels = begin(config)[0].perturb(*batch(64))
    assert torch.equal(labels, teacher_labels)
    config = replace(config, align=replace(config.align, shared_label_dropout=False))
    _, own, teachers_own = begin(config)[0].perturb(*batch(64))
    assert torch.equal(own, labels)
    assert not torch.equal(own, teachers_own)


@pytest.mark.parametrize(("family", "method"), [("sit", "sra"), ("sit", "none"), ("dit", "sra")])
def test_the_loss_goes_down(tiny, family: str, method: str) -> None:
    step, state = begin(tiny(method, batch=32, family=family, depth=3))
    x, labels, _ = batch(32)
    rows = [step(state, x, labels, torch.arange(32 * k, 32 * k + 32), torch.tensor(3e-3), WEIGHT) for k in range(40)]
    first, last = (torch.stack([row.velocity_loss for row in part]).mean() for part in (rows[:5], rows[-5:]))
    assert float(last) < 0.6 * float(first)
    if method == "sra":
        first, last = (torch.stack([row.alignment_loss for row in part]).mean() for part in (rows[:5], rows[-5:]))
        assert float(last) < 0.6 * float(first)
    assert int(state.skipped_steps) == 0


def test_the_plain_model_never_touches_the_head_or_the_teacher(tiny) -> None:
    config = replace(tiny("none"), optim=OptimConfig(weight_decay=0.1))
    step, state = begin(config)
    head = {name: value.clone() for name, value in state.weights.items() if name.startswith("ap_head")}
    for module in (state.student.ap_head, state.teacher.x_embedder):
        module.register_forward_hook(lambda *_: pytest.fail("was run"))
    for k in range(2):
        metrics = step(state, *batch(first=8 * k), LR, WEIGHT)
    assert float(metrics.alignment_loss) == 0
    assert float(metrics.loss) == float(metrics.velocity_loss)
    assert len(head) == 4
    for name, value in head.items():
        assert name not in state.adam_m
        assert torch.equal(state.weights[name], value)
        assert torch.equal(state.ema[name], value)


def test_the_teacher_stops_at_its_tap(tiny) -> None:
    step, state = begin(tiny())
    calls = []
    for number, block in enumerate(state.teacher.blocks, start=1):
        block.register_forward_hook(lambda *_, number=number: calls.append(number))
    step(state, *batch(), LR, WEIGHT)
    assert calls == [1, 2, 3]
    assert {name.split(".")[0] for name, _ in state.teacher.named_parameters()}.isdisjoint({"final_layer", "ap_head"})


@pytest.mark.parametrize("family", ["sit", "dit"])
def test_bf16_losses_are_near_those_in_fp32(tiny, awake, family: str) -> None:
    config = tiny(family=family)
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        step, state = begin(config, awake(config.model, std=0.05), dtype)
        metrics = step(state, *batch(), LR, WEIGHT)
        assert all(value.dtype == torch.float32 for value in (*metrics, *state.weights.values()))
        results.append(metrics)
    for name in ("loss", "velocity_loss", "alignment_loss", "grad_norm"):
        exact, rounded = (float(getattr(metrics, name)) for metrics in results)
        assert rounded == pytest.approx(exact, rel=0.02), name  # five roundings of 2^-8, averaged over many elements
        assert rounded != exact, name


def test_metrics_are_those_of_this_step(tiny) -> None:
    step, state = begin(tiny())
    metrics = step(state, *batch(), LR, WEIGHT)
    assert float(metrics.loss) == pytest.approx(float(metrics.velocity_loss) + 0.5 * float(metrics.alignment_loss))
    assert float(metrics.lr) == float(LR)
    assert float(metrics.ema_decay) == pytest.approx(0.1)
    assert 0 < float(metrics.grad_norm) < 100


@pytest.mark.parametrize("pushed", [1, 3, 4, 5, 8, 11])
def test_the_ring_gives_the_newest_rows_oldest_first(pushed: int) -> None:
    ring = MetricRing(4, CPU)
    for k in range(pushed):
        ring.push(Metrics(*(torch.tensor(float(10 * k + column)) for column in range(6))))
    for rows in range(1, min(pushed, 4) + 1):
        wanted = [Metrics(*(10.0 * k + column for column in range(6))) for k in range(pushed - rows, pushed)]
        assert ring.last(rows) == wanted


def run_of(step: Callable, state: TrainState, numbers: range) -> None:
    for k in numbers:
        step(state, *batch(first=8 * k), LR, WEIGHT)


def test_a_skipped_step_consumes_its_images_and_changes_nothing(tiny) -> None:
    step, state = begin(tiny())
    run_of(step, state, range(2))
    before = {name: value.clone() for name, value in everything(state).items()}
    x, labels, number = batch(first=16)
    x[3, 0, 0, 0] = torch.nan
    metrics = step(state, x, labels, number, LR, WEIGHT)
    assert not metrics.grad_norm.isfinite()
    assert all(torch.equal(value, before[name]) for name, value in everything(state).items())
    assert (int(state.adam_step), int(state.skipped_steps)) == (2, 1)
    run_of(step, state, range(3, 4))
    assert (int(state.adam_step), int(state.skipped_in_a_row)) == (3, 0)
