"""Distances against numpy, and SRA's losses against a student and teacher run in full with hooks.

Every check is also run on a planted fault, which it must catch.
"""

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
from sra_fast.model.layout import joined
from sra_fast.model.transformer import Transformer, around
from sra_fast.objective import Noised
from sra_fast.objective.alignment import Losses, alignment_weight, training_losses
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


def of(name: str) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda s, t: alignment_ref(s, t, name)


@pytest.mark.parametrize("name", DISTANCES)
def test_distance_is_its_formula(name: str) -> None:
    assert agrees(of(name), name)


@pytest.mark.parametrize(("name", "mutant"), MUTANTS)
def test_a_wrong_distance_disagrees_with_the_formula(name: str, mutant: Callable) -> None:
    assert not agrees(mutant, name)


def test_the_configuration_offers_exactly_the_distances_there_are() -> None:
    offered = get_args(get_type_hints(AlignConfig)["distance"])
    assert offered == DISTANCES == tuple(FORMULAS)


@pytest.mark.parametrize("name", DISTANCES)
def test_gradient_of_the_student(name: str) -> None:
    student, teacher = features(2, 4, 5)
    assert torch.autograd.gradcheck(lambda s: alignment_ref(s, teacher, name), [student.requires_grad_()])


@pytest.mark.parametrize("name", DISTANCES)
def test_no_gradient_reaches_the_teacher(name: str) -> None:
    student, teacher = features(2, 4, 5)
    alignment_ref(student.requires_grad_(), teacher.requires_grad_(), name).backward()
    assert student.grad is not None
    assert teacher.grad is None


@pytest.mark.parametrize("name", DISTANCES)
def test_bf16_features_are_compared_in_fp32(name: str) -> None:
    student, teacher = (value.bfloat16() for value in features(2, 64, 32))
    got = alignment_ref(student, teacher, name)
    assert got.dtype == torch.float32
    assert float(got) == pytest.approx(FORMULAS[name](student.double().numpy(), teacher.double().numpy()), rel=1e-5)


def rescaled(axis: int) -> Tensor:
    """(1, T, 1) factors per token for axis 1, (1, 1, D) per channel for axis 2."""
    shape = [1, 1, 1]
    shape[axis] = (10, 7)[axis - 1]
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).exp()


# The per-token cosine does not see a teacher token's length, the per-channel one not a channel's.
@pytest.mark.parametrize(("name", "blind_to", "sees"), [("cosine", 1, 2), ("cosine_channel", 2, 1)])
def test_a_cosine_is_blind_to_the_scale_of_its_own_vectors_only(name: str, blind_to: int, sees: int) -> None:
    student, teacher = features(3, 10, 7)
    base = float(alignment_ref(student, teacher, name))
    assert float(alignment_ref(student, teacher * rescaled(blind_to), name)) == pytest.approx(base, abs=1e-12)
    assert float(alignment_ref(student, teacher * rescaled(sees), name)) > base + 0.01


def test_wrong_input_is_refused_by_name() -> None:
    student, teacher = features(2, 4, 5)
    with pytest.raises(ValueError, match=r"teacher: shape \(2, 4, 4\) given; must be the student's, \(2, 4, 5\)"):
        alignment_ref(student, teacher[..., :4], "l2")
    with pytest.raises(ValueError, match="distance: 'cos' given; must be one of cosine, "):
        alignment_ref(student, teacher, "cos")


# SRA's losses


def between(x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """The linear interpolant."""
    t = t[:, None, None, None]
    return (1 - t) * x + t * noise


@pytest.fixture
def scene(tiny, awake) -> SimpleNamespace:
    """A student and a different teacher, both with gradients on, and a batch in which no two roles share a value."""
    config = tiny()
    student, teacher = (around(config.model, joined(awake(config.model, seed))).requires_grad_() for seed in (1, 2))
    generator = torch.Generator().manual_seed(0)
    x, noise = torch.randn(2, 6, 1, 8, 8, generator=generator)
    t, t_teacher = torch.linspace(0.3, 0.9, 6), torch.linspace(0.2, 0.75, 6)
    return SimpleNamespace(
        taps=config.taps,
        student=student,
        teacher=teacher,
        noised=Noised(t, t_teacher, between(x, noise, t), between(x, noise, t_teacher), noise - x),
        x=x,
        noise=noise,
        labels=torch.tensor([0, 1, 2, 3, 4, 0]),
        teacher_labels=torch.tensor([0, 1, 2, 3, 4, 4]),
    )


def block_output(model: Transformer, number: int, x: Tensor, t: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """(prediction, output of block `number`) of a whole forward pass, caught by a hook."""
    caught = []
    handle = model.blocks[number - 1].register_forward_hook(lambda module, inputs, output: caught.append(output[0]))
    with torch.no_grad():
        prediction, _ = model(x, t, labels)
    handle.remove()
    return prediction, caught[0]


def published(s: SimpleNamespace, weight: float) -> tuple[float, float, float]:
    """student at t through its head, teacher at t_teacher and raw."""
    n = s.noised
    prediction, tapped = block_output(s.student, s.taps[0], n.x_t, n.t, s.labels)
    x_teacher = between(s.x, s.noise, n.t_teacher)
    _, target = block_output(s.teacher, s.taps[1], x_teacher, n.t_teacher, s.teacher_labels)
    generative = float((prediction - (s.noise - s.x)).square().mean())
    alignment = FORMULAS["smooth_l1"](s.student.ap_head(tapped).detach().numpy(), target.numpy())
    return generative + weight * alignment, generative, alignment


def computed(s: SimpleNamespace, weight: float = 0.5, **changes: object) -> Losses:
    parts = {
        "student": s.student,
        "teacher": s.teacher.features,
        "noised": s.noised,
        "labels": s.labels,
        "teacher_labels": s.teacher_labels,
        "taps": s.taps,
    }
    return training_losses(Flow(), distance=of("smooth_l1"), weight=weight, **parts | changes)


def as_published(s: SimpleNamespace, losses: Losses) -> bool:
    return all(a.item() == pytest.approx(b, rel=1e-5) for a, b in zip(losses, published(s, 0.5), strict=True))


def test_losses_are_the_published_ones(scene: SimpleNamespace) -> None:
    assert scene.taps == (1, 3)
    assert as_published(scene, computed(scene))


def projected(teacher: Transformer) -> Callable[..., Tensor]:
    """What a public teacher left in train mode would give: its features through its head."""
    return lambda x, t, labels, tap: teacher(x, t, labels, tap=tap)[1]


FAULTS: dict[str, Callable[[SimpleNamespace], dict[str, object]]] = {
    "times swapped": lambda s: {"noised": s.noised._replace(t=s.noised.t_teacher, t_teacher=s.noised.t)},
    "teacher told the student's time": lambda s: {"noised": s.noised._replace(t_teacher=s.noised.t)},
    "inputs swapped": lambda s: {"noised": s.noised._replace(x_t=s.noised.x_teacher, x_teacher=s.noised.x_t)},
    "teacher shown the student's input": lambda s: {"noised": s.noised._replace(x_teacher=s.noised.x_t)},
    "teacher in train mode": lambda s: {"teacher": projected(s.teacher)},
    "student is its own teacher": lambda s: {"teacher": s.student.features},
    "student without head": lambda s: {"student": lambda *a, tap: (s.student(*a)[0], s.student.features(*a, tap=tap))},
    "taps swapped": lambda s: {"taps": s.taps[::-1]},
    "zero-based taps": lambda s: {"taps": (s.taps[0] + 1, s.taps[1] + 1)},
    "labels swapped": lambda s: {"labels": s.teacher_labels, "teacher_labels": s.labels},
    "weight forgotten": lambda s: {"weight": 1.0},
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_not_as_published(scene: SimpleNamespace, fault: str) -> None:
    assert not as_published(scene, computed(scene, **FAULTS[fault](scene)))


@pytest.mark.parametrize("weight", [0.0, 0.2, torch.tensor(0.7)])
def test_total_is_generative_plus_weighted_alignment(scene: SimpleNamespace, weight: float | Tensor) -> None:
    losses = computed(scene, weight)
    assert torch.equal(losses.total, losses.generative + weight * losses.alignment)


def test_the_teacher_gets_no_gradient_and_the_student_all(scene: SimpleNamespace) -> None:
    computed(scene).total.backward()
    assert all(parameter.grad is None for parameter in scene.teacher.parameters())
    assert all(parameter.grad is not None for parameter in scene.student.parameters())


def test_the_teacher_builds_no_graph(scene: SimpleNamespace) -> None:
    def teacher(*inputs: Tensor, tap: int) -> Tensor:
        features = scene.teacher.features(*inputs, tap=tap)
        assert not features.requires_grad, "activations of the teacher would be kept"
        return features

    assert computed(scene, teacher=teacher).total.requires_grad


def test_alignment_reaches_no_block_beyond_the_students_tap(scene: SimpleNamespace) -> None:
    names, parameters = zip(*scene.student.named_parameters(), strict=True)
    gradients = torch.autograd.grad(computed(scene).alignment, parameters, allow_unused=True)
    reached = {
        name.split(".")[1] for name, g in zip(names, gradients, strict=True) if g is not None and "blocks" in name
    }
    assert reached == {"0"}


def test_the_teacher_runs_no_later_block_no_head_and_no_final_layer(scene: SimpleNamespace) -> None:
    calls = dict.fromkeys([name for name, _ in scene.teacher.named_modules()], 0)

    def count(name: str) -> Callable:
        return lambda module, inputs, output: calls.update({name: calls[name] + 1})

    for name, module in scene.teacher.named_modules():
        module.register_forward_hook(count(name))
    computed(scene)
    assert [calls[f"blocks.{i}"] for i in range(4)] == [1, 1, 1, 0]
    assert calls["final_layer"] == calls["ap_head"] == 0
    assert calls["x_embedder"] == 1


def test_the_plain_model_has_the_generative_loss_alone_and_does_not_run_the_head(scene: SimpleNamespace) -> None:
    scene.student.ap_head.register_forward_hook(lambda *_: pytest.fail("the head was run"))
    losses = computed(scene, teacher=None)
    assert torch.equal(losses.total, losses.generative)
    assert float(losses.alignment) == 0
    assert losses.generative.item() == pytest.approx(published_generative(scene), rel=1e-5)


def published_generative(s: SimpleNamespace) -> float:
    with torch.no_grad():
        prediction, _ = s.student(s.noised.x_t, s.noised.t, s.labels)
    return float((prediction - (s.noise - s.x)).square().mean())


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
