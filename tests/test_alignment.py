"""Distances against numpy, and SRA's losses against a student and teacher run in full with hooks. Every check is also
run on planted faults, which it must catch."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import get_args, get_type_hints

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sra_fast.config import AlignConfig, preset
from sra_fast.kernels.alignment import DISTANCES, alignment_ref
from sra_fast.kernels.perturb import NoisedBatch
from sra_fast.model.layout import from_public
from sra_fast.model.transformer import Transformer
from sra_fast.objective.alignment import Alignment, Losses, alignment_weight, training_losses
from sra_fast.objective.flow import Flow


def cosine(s: np.ndarray, t: np.ndarray, axis: int) -> float:
    """1 - mean of the cosines over `axis` of (B, T, D)."""
    products = (s * t).sum(axis=axis)
    return float(1 - (products / np.sqrt((s**2).sum(axis=axis)) / np.sqrt((t**2).sum(axis=axis))).mean())


def huber(s: np.ndarray, t: np.ndarray, beta: float) -> float:
    """Quadratic below beta, linear above, continuous, with slope 1."""
    d = np.abs(s - t)
    return float(np.where(d < beta, d**2 / (2 * beta), d - beta / 2).mean())


FORMULAS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "cosine": lambda s, t: cosine(s, t, axis=2),  # channels: one cosine per token
    "cosine_channel": lambda s, t: cosine(s, t, axis=1),  # tokens: one cosine per channel
    "smooth_l1": lambda s, t: huber(s, t, beta=0.05),
    "l1": lambda s, t: float(np.abs(s - t).mean()),
    "l2": lambda s, t: float(((s - t) ** 2).mean()),
}

# A wrong version of every distance: the other axis, the batch axis, another beta, a sum for a mean, each other's power.
MUTANTS: list[tuple[str, Callable[[Tensor, Tensor], Tensor]]] = [
    ("cosine", lambda s, t: (1 - F.cosine_similarity(s, t, dim=1)).mean()),
    ("cosine", lambda s, t: (1 - F.cosine_similarity(s, t, dim=0)).mean()),
    ("cosine_channel", lambda s, t: (1 - F.cosine_similarity(s, t, dim=2)).mean()),
    ("cosine_channel", lambda s, t: (1 - F.cosine_similarity(s.flatten(1), t.flatten(1), dim=1)).mean()),
    ("smooth_l1", lambda s, t: F.smooth_l1_loss(s, t, beta=1.0)),
    ("smooth_l1", lambda s, t: F.huber_loss(s, t, delta=0.05)),
    ("l1", lambda s, t: (s - t).abs().sum(2).mean()),
    ("l2", lambda s, t: 0.5 * (s - t).square().mean()),
]


def features(*shape: int) -> tuple[Tensor, Tensor]:
    """A student and a teacher that resembles it; differences on both sides of beta = 0.05."""
    generator = torch.Generator().manual_seed(0)
    student, noise = torch.randn(2, *shape, generator=generator, dtype=torch.float64)
    return student, student + 0.2 * noise


def agrees(distance: Callable[[Tensor, Tensor], Tensor], name: str) -> bool:
    student, teacher = features(3, 10, 7)
    return bool(np.isclose(float(distance(student, teacher)), FORMULAS[name](student.numpy(), teacher.numpy()), 1e-12))


def distance_of(name: str) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda s, t: alignment_ref(s, t, name)


@pytest.mark.parametrize("name", DISTANCES)
def test_distance_is_its_formula(name: str) -> None:
    assert agrees(distance_of(name), name)


@pytest.mark.parametrize(("name", "mutant"), MUTANTS)
def test_a_wrong_distance_disagrees_with_the_formula(name: str, mutant: Callable) -> None:
    assert not agrees(mutant, name)


def test_the_configuration_offers_exactly_these_distances() -> None:
    assert get_args(get_type_hints(AlignConfig)["distance"]) == DISTANCES == tuple(FORMULAS)


@pytest.mark.parametrize("name", DISTANCES)
def test_only_the_student_has_a_gradient(name: str) -> None:
    student, teacher = features(2, 4, 5)
    student.requires_grad_()
    assert torch.autograd.gradcheck(lambda s: alignment_ref(s, teacher, name), [student])
    alignment_ref(student, teacher.requires_grad_(), name).backward()
    assert teacher.grad is None


@pytest.mark.parametrize("name", DISTANCES)
def test_bf16_features_are_compared_in_fp32(name: str) -> None:
    student, teacher = (value.bfloat16() for value in features(2, 64, 32))
    distance = alignment_ref(student, teacher, name)
    assert distance.dtype == torch.float32
    expected = FORMULAS[name](student.double().numpy(), teacher.double().numpy())
    assert float(distance) == pytest.approx(expected, rel=1e-5)


def test_invalid_arguments_are_refused() -> None:
    student, teacher = features(2, 4, 5)
    with pytest.raises(ValueError, match=r"teacher: shape \(2, 4, 4\) given; must be the student's, \(2, 4, 5\)"):
        alignment_ref(student, teacher[..., :4], "l2")
    with pytest.raises(ValueError, match="distance: 'cos' given; must be one of cosine, "):
        alignment_ref(student, teacher, "cos")


def interpolate(x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """The linear path."""
    t = t[:, None, None, None]
    return (1 - t) * x + t * noise


@pytest.fixture
def scene(tiny, awake) -> SimpleNamespace:
    """A student and a different teacher, both with gradients, and a batch in which no two roles share a value."""
    config = tiny()
    student, teacher = (
        Transformer.from_tensors(config.model, from_public(awake(config.model, seed))).requires_grad_()
        for seed in (1, 2)
    )
    generator = torch.Generator().manual_seed(0)
    x, noise = torch.randn(2, 6, 1, 8, 8, generator=generator)
    t, t_teacher = torch.linspace(0.3, 0.9, 6), torch.linspace(0.2, 0.75, 6)
    labels, teacher_labels = torch.tensor([0, 1, 2, 3, 4, 0]), torch.tensor([0, 1, 2, 3, 4, 4])
    x_t, x_teacher = interpolate(x, noise, t), interpolate(x, noise, t_teacher)
    batch = NoisedBatch(t, t_teacher, x_t, x_teacher, noise - x, labels, teacher_labels)
    alignment = Alignment(*config.taps, distance_of("smooth_l1"))
    return SimpleNamespace(student=student, teacher=teacher, batch=batch, alignment=alignment)


def block_output(model: Transformer, number: int, x: Tensor, t: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """(prediction, output of block `number`) of a complete forward pass, caught by a hook."""
    outputs = []
    handle = model.blocks[number - 1].register_forward_hook(lambda module, inputs, output: outputs.append(output[0]))
    with torch.no_grad():
        prediction, _ = model(x, t, labels)
    handle.remove()
    return prediction, outputs[0]


def published(s: SimpleNamespace, weight: float) -> tuple[float, float, float]:
    """(total, generative, alignment): the student at t through its head, the teacher at t_teacher without."""
    b = s.batch
    prediction, student = block_output(s.student, 1, b.x_t, b.t, b.labels)
    _, teacher = block_output(s.teacher, 3, b.x_teacher, b.t_teacher, b.teacher_labels)
    generative = float((prediction - b.target).square().mean())
    alignment = FORMULAS["smooth_l1"](s.student.ap_head(student).detach().numpy(), teacher.numpy())
    return generative + weight * alignment, generative, alignment


def losses_of(s: SimpleNamespace, weight: float | Tensor = 0.5, **changes: object) -> Losses:
    parts = {"alignment": s.alignment, "student": s.student, "teacher": s.teacher.features, "batch": s.batch}
    return training_losses(Flow(), weight=weight, **parts | changes)


def are_published(s: SimpleNamespace, losses: Losses) -> bool:
    return all(a.item() == pytest.approx(b, rel=1e-5) for a, b in zip(losses, published(s, 0.5), strict=True))


def test_losses_are_the_published_ones(scene: SimpleNamespace) -> None:
    assert are_published(scene, losses_of(scene))


def batch_with(**sources: str) -> Callable[[SimpleNamespace], dict[str, object]]:
    """Fields of the batch taken from other fields."""
    return lambda s: {"batch": s.batch._replace(**{name: getattr(s.batch, source) for name, source in sources.items()})}


FAULTS: dict[str, Callable[[SimpleNamespace], dict[str, object]]] = {
    "times swapped": batch_with(t="t_teacher", t_teacher="t"),
    "teacher told the student's time": batch_with(t_teacher="t"),
    "inputs swapped": batch_with(x_t="x_teacher", x_teacher="x_t"),
    "teacher shown the student's input": batch_with(x_teacher="x_t"),
    "labels swapped": batch_with(labels="teacher_labels", teacher_labels="labels"),
    "teacher with head": lambda s: {"teacher": lambda *inputs: s.teacher(*inputs)[1]},
    "student is its own teacher": lambda s: {"teacher": s.student.features},
    "student without head": lambda s: {"student": lambda *inputs: (s.student(*inputs)[0], s.student.features(*inputs))},
    "taps swapped": lambda s: {"alignment": s.alignment._replace(student_tap=3, teacher_tap=1)},
    "zero-based taps": lambda s: {"alignment": s.alignment._replace(student_tap=2, teacher_tap=4)},
    "weight forgotten": lambda s: {"weight": 1.0},
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_not_as_published(scene: SimpleNamespace, fault: str) -> None:
    assert not are_published(scene, losses_of(scene, **FAULTS[fault](scene)))


@pytest.mark.parametrize("weight", [0.0, torch.tensor(0.7)])
def test_total_is_generative_plus_weighted_alignment(scene: SimpleNamespace, weight: float | Tensor) -> None:
    losses = losses_of(scene, weight)
    assert torch.equal(losses.total, losses.generative + weight * losses.alignment)


def test_gradients_reach_the_student_alone_and_those_of_the_alignment_no_block_beyond_the_tap(scene) -> None:
    def teacher(*inputs: object) -> Tensor:
        features = scene.teacher.features(*inputs)
        assert not features.requires_grad, "activations of the teacher would be kept"
        return features

    losses = losses_of(scene, teacher=teacher)
    names, parameters = zip(*scene.student.named_parameters(), strict=True)
    gradients = torch.autograd.grad(losses.alignment, parameters, allow_unused=True, retain_graph=True)
    reached = {name for name, gradient in zip(names, gradients, strict=True) if gradient is not None}
    assert {name.split(".")[1] for name in reached if "blocks" in name} == {"0"}
    losses.total.backward()
    assert all(parameter.grad is None for parameter in scene.teacher.parameters())
    assert all(parameter.grad is not None for parameter in parameters)


def test_the_teacher_runs_no_later_block_no_head_and_no_final_layer(scene: SimpleNamespace) -> None:
    calls: list[str] = []
    for name, module in scene.teacher.named_modules():
        module.register_forward_hook(lambda *_, name=name: calls.append(name))
    losses_of(scene)
    assert [calls.count(f"blocks.{i}") for i in range(4)] == [1, 1, 1, 0]
    assert calls.count("final_layer") == calls.count("ap_head") == 0
    assert calls.count("x_embedder") == 1


def test_the_plain_model_has_the_generative_loss_alone_and_does_not_run_the_head(scene: SimpleNamespace) -> None:
    expected = published(scene, 0.0)[1]
    scene.student.ap_head.register_forward_hook(lambda *_: pytest.fail("the head was run"))
    losses = losses_of(scene, alignment=None, teacher=None)
    assert torch.equal(losses.total, losses.generative)
    assert float(losses.alignment) == 0
    assert losses.generative.item() == pytest.approx(expected, rel=1e-5)


# The public code at three significant figures.
@pytest.mark.parametrize(
    ("epoch", "weight"), [(0, 0.2), (149, 0.2), (150, 0.19954), (400, 0.112), (600, 0.071), (800, 0.0447)]
)
def test_sit_weight_over_the_epochs_is_the_published_one(epoch: int, weight: float) -> None:
    assert alignment_weight(preset("sit-xl-2-paper").align, epoch) == pytest.approx(weight, rel=5e-3)


def test_dit_weight_is_a_fifth_of_it() -> None:
    sit, dit = preset("sit-xl-2-paper").align, preset("dit-xl-2-paper").align
    assert alignment_weight(dit, 149) == 0.04
    assert alignment_weight(dit, 700) == pytest.approx(alignment_weight(sit, 700) / 5)


def test_weight_without_decay_is_constant_and_without_alignment_zero() -> None:
    assert {alignment_weight(AlignConfig(weight=0.5), epoch) for epoch in (0, 149, 150, 5000)} == {0.5}
    assert alignment_weight(AlignConfig(method="none", weight=0.5), 0) == 0
    assert alignment_weight(AlignConfig(weight=0.2, weight_hold_epochs=99, weight_decade_epochs=800), 400) == (
        pytest.approx(0.084, rel=5e-3)  # SiT at 512 px
    )
