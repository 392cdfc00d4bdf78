"""One training step: what it reads, what it may not read, and what it must reproduce."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from small_step import CPU, batch, changed, start
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from sra_fast.config import OptimConfig
from sra_fast.data.stream import Batch
from sra_fast.kernels.perturb import Settings, Stored, clean_ref, perturb_ref
from sra_fast.step.ring import MetricRing
from sra_fast.step.state import TrainState
from sra_fast.step.step import TrainingStep

LR, WEIGHT = torch.tensor(1e-3), torch.tensor(0.5)


def begin(*arguments: object, **options: object) -> tuple[TrainingStep, TrainState]:
    """A step and its state, whose teacher differs from the student; arguments as `start`."""
    runner = start(*arguments, ema=1.1, **options)
    return runner.step, runner.state


def rows(batch: Batch, index: Tensor) -> Batch:
    return Batch(*(tensor[index] for tensor in batch))


@pytest.mark.parametrize(("family", "method", "accumulate"), [("sit", "none", 1), ("dit", "sra", 2)])
def test_the_host_reads_no_device_value(tiny, family: str, method: str, accumulate: int) -> None:
    config = tiny(method, accumulate=accumulate, family=family, depth=3, hidden=16)
    with FakeTensorMode():  # tensors without values: reading one raises
        step, state = begin(config)
        images = Batch(torch.randn(8, 1, 8, 8), torch.zeros(8, dtype=torch.int64), torch.arange(8))
        metrics = step(state, images, torch.tensor(1e-3), torch.tensor(0.5))
        MetricRing(4, CPU).push(metrics)
        with pytest.raises(DataDependentOutputException):
            bool(metrics.loss > 0)
    assert all(value.shape == () and value.dtype == torch.float32 for value in metrics)


@pytest.mark.parametrize(
    ("family", "distance", "accumulate"), [("sit", "cosine", 2), ("sit", "cosine_channel", 4), ("dit", "smooth_l1", 4)]
)
def test_micro_batches_add_up_to_the_batch(tiny, awake, family: str, distance: str, accumulate: int) -> None:
    moments, metrics = [], []
    for parts in (1, accumulate):
        # beta1 = 0 and no clip: the first moment is the gradient.
        config = changed(
            tiny(accumulate=parts, family=family), align={"distance": distance}, optim={"beta1": 0, "clip": 0}
        )
        step, state = begin(config, awake(config.model))
        metrics.append(step(state, batch(0), LR, WEIGHT))
        moments.append(state.adam_m)
    # Only the order of fp32 additions differs. Sums over 128 tokens through 4 blocks and back cost some hundred
    # roundings of 2^-24 where they cancel; a forgotten division or micro-batch costs a quarter or more.
    torch.testing.assert_close(torch.stack(metrics[0]), torch.stack(metrics[1]), rtol=1e-5, atol=1e-6)
    for name, gradient in moments[0].items():
        error = (gradient - moments[1][name]).norm()
        assert float(error) <= 2**-24 * 1000 * float(gradient.norm()), name


@pytest.mark.parametrize("family", ["sit", "dit"])
def test_draws_belong_to_the_image_number_not_to_the_place_in_the_batch(tiny, awake, family: str) -> None:
    config = tiny(family=family)
    step, state = begin(config, awake(config.model))
    images, order = batch(0), torch.tensor([3, 7, 0, 1, 6, 2, 5, 4])
    noised, shuffled = step.perturb(images), step.perturb(rows(images, order))
    for name, value, other in zip(noised._fields, noised, shuffled, strict=True):
        assert value is other is None or torch.equal(value[order], other), name
    loss = step.losses(state, images, WEIGHT).total.item()
    assert step.losses(state, rows(images, order), WEIGHT).total.item() == pytest.approx(loss, rel=1e-5)
    renumbered = images._replace(number=images.number + 8)
    assert step.losses(state, renumbered, WEIGHT).total.item() != pytest.approx(loss, rel=1e-3)


def test_both_networks_get_what_perturb_drew(tiny, awake) -> None:
    config = tiny()
    step, state = begin(config, awake(config.model))
    noised = step.perturb(batch(0))
    prediction, features = state.student(noised.x_t, noised.t, noised.labels, tap=1)
    with torch.no_grad():
        target = state.teacher.features(noised.x_teacher, noised.t_teacher, noised.teacher_labels, tap=3)
    losses = step.losses(state, batch(0), WEIGHT)
    generative = (prediction - noised.target).square().mean()
    alignment = 1 - torch.nn.functional.cosine_similarity(features, target, dim=-1).mean()
    assert losses.generative.item() == pytest.approx(generative.item(), rel=1e-5)
    assert losses.alignment.item() == pytest.approx(alignment.item(), rel=1e-5)
    assert losses.total.item() == pytest.approx((generative + 0.5 * alignment).item(), rel=1e-5)
    metrics = step(state, batch(0), LR, WEIGHT)
    assert torch.equal(torch.stack(metrics[:3]), torch.stack(losses))
    assert (float(metrics.lr), float(metrics.ema_decay)) == (float(LR), pytest.approx(0.1))


def test_draws_follow_the_configuration(tiny) -> None:
    config = changed(
        tiny(),
        run={"seed": 2**64 - 5},
        objective={"path": "cosine", "times": "lognormal", "label_dropout": 0.5},
        align={"t_max": 0.7, "shared_label_dropout": False},
    )
    noised = begin(config)[0].perturb(batch(0, 64))
    expected = perturb_ref(*batch(0, 64), Settings(2**64 - 5, "cosine", "lognormal", 0.7, 4, 0.5, False))
    for name, value, other in zip(noised._fields, noised, expected, strict=True):
        assert value is other is None or torch.equal(value, other), name
    assert set(noised.labels.tolist()) == {0, 1, 2, 3, 4}


MOMENTS = Stored(True, torch.tensor([0.5]), torch.tensor([0.25]))
PIXELS = Stored(False, torch.tensor([127.5]), torch.tensor([1 / 127.5]))


@pytest.mark.parametrize("family", ["sit", "dit"])
@pytest.mark.parametrize(("dtype", "stored"), [(torch.float16, MOMENTS), (torch.uint8, PIXELS)])
def test_stored_data_train_like_the_images_they_stand_for(tiny, awake, family: str, dtype, stored: Stored) -> None:
    config = tiny(family=family)
    data = 100 * torch.rand(8, 2 if stored.posterior else 1, 8, 8, generator=torch.Generator().manual_seed(0))
    packed = batch(0)._replace(x=data.to(dtype))
    images = packed._replace(x=clean_ref(packed.x, packed.number, config.run.seed, stored))
    step, state = begin(config, awake(config.model), stored=stored)
    plain, _ = begin(config)
    losses, expected = step.losses(state, packed, WEIGHT), plain.losses(state, images, WEIGHT)
    assert all(torch.equal(*values) for values in zip(losses, expected, strict=True))


@pytest.mark.parametrize("family", ["sit", "dit"])
def test_the_losses_go_down(tiny, family: str) -> None:
    step, state = begin(tiny(batch=32, family=family, depth=3))
    images = batch(0, 32)
    images = images._replace(x=images.x[..., :1, :1].expand(-1, -1, 8, 8).contiguous())  # one grey each
    numbers = [torch.arange(32 * k, 32 * k + 32) for k in range(40)]
    metrics = [step(state, images._replace(number=number), torch.tensor(3e-3), WEIGHT) for number in numbers]
    for name in ("velocity_loss", "alignment_loss"):
        values = torch.stack([getattr(row, name) for row in metrics])
        assert float(values[-5:].mean()) < 0.6 * float(values[:5].mean()), name
    assert int(state.skipped_steps) == 0


def test_the_plain_model_uses_neither_head_nor_teacher(tiny) -> None:
    step, state = begin(replace(tiny("none"), optim=OptimConfig(weight_decay=0.1)))
    head = {name: value.clone() for name, value in state.weights.items() if name.startswith("ap_head")}
    assert not len(state.teacher.blocks)
    for module in (state.student.ap_head, state.teacher.x_embedder):
        module.register_forward_hook(lambda *_: pytest.fail("was run"))
    for k in range(2):
        metrics = step(state, batch(k), LR, WEIGHT)
    assert float(metrics.alignment_loss) == 0
    assert float(metrics.loss) == float(metrics.velocity_loss)
    assert len(head) == 4
    for name, value in head.items():
        assert name not in state.adam_m
        assert torch.equal(state.weights[name], value)
        assert torch.equal(state.ema[name], value)


@pytest.mark.parametrize("family", ["sit", "dit"])
def test_bf16_losses_are_near_those_in_fp32(tiny, awake, family: str) -> None:
    config = tiny(family=family)
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        step, state = begin(config, awake(config.model, std=0.05), dtype=dtype)
        metrics = step(state, batch(0), LR, WEIGHT)
        assert all(value.dtype == torch.float32 for value in (*metrics, *state.weights.values()))
        results.append(metrics)
    for name in ("loss", "velocity_loss", "alignment_loss", "grad_norm"):
        exact, rounded = (float(getattr(metrics, name)) for metrics in results)
        assert rounded == pytest.approx(exact, rel=0.02), name  # five roundings of 2^-8, averaged over many elements
        assert rounded != exact, name
