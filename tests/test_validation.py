"""The validation loss is one number for given weights; a preview that cannot be drawn does not end a run."""

from __future__ import annotations

import pytest
import torch
from small_run import metrics, run, small

from sra_fast.config import ObjectiveConfig
from sra_fast.errors import Refused
from sra_fast.model.public_weights import write_safetensors
from sra_fast.step import step as step_module
from sra_fast.step.step import TrainingStep


@pytest.fixture
def start(root, tiny, awake):
    """A file of weights under which the network does something."""
    model = tiny(depth=3).model
    write_safetensors(root / "start.safetensors", awake(model), model, ObjectiveConfig())
    return str(root / "start.safetensors")


def validation_losses(folder):
    return [row["validation_velocity_loss"] for row in metrics(folder) if "validation_velocity_loss" in row]


def test_the_loss_is_one_number_at_equal_weights_whenever_it_is_computed(root, start, monkeypatch):
    original = step_module.training_losses

    def not_finite(*inputs):  # every step is skipped: no weight changes
        losses = original(*inputs)
        return losses._replace(total=losses.total * torch.nan)

    monkeypatch.setattr(step_module, "training_losses", not_finite)
    values = []
    for name, batch in (("a", 8), ("b", 20), ("c", 40)):
        changes = {"init_from": start, "train__validate_every_images": batch, "train__validation_images": 22}
        with pytest.raises(Refused, match="no step had a finite gradient norm"):
            run(small(root, run__name=name, train__batch=batch, **changes))
        values += validation_losses(root / "runs" / name)
    assert len(values) == 10 + 4 + 2
    assert len(set(values)) == 1
    assert 0 < values[0] < 1e3


def test_the_loss_follows_the_ema_and_not_the_weights(root, start, monkeypatch):
    original = TrainingStep.__call__

    def disturb(self, state, *inputs):
        result = original(self, state, *inputs)
        for value in state.weights.values():
            value.add_(1)
        return result

    changes = {"init_from": start, "train__images": 8, "optim__lr": 1e-30}
    run(small(root, run__name="plain", **changes))
    monkeypatch.setattr(TrainingStep, "__call__", disturb)
    run(small(root, run__name="disturbed", **changes))
    assert validation_losses(root / "runs/plain") == validation_losses(root / "runs/disturbed")


@pytest.mark.parametrize(
    "samples",
    [
        Refused("nothing finite"),
        torch.OutOfMemoryError("no memory\nTried to allocate"),
        torch.full((4, 1, 8, 8), torch.nan),
    ],
    ids=["refused", "out of memory", "not finite"],
)
def test_a_preview_that_cannot_be_drawn_does_not_end_the_run(root, monkeypatch, capfd, samples):
    def generate(*_, **__):
        if isinstance(samples, Exception):
            raise samples
        return samples

    monkeypatch.setattr("sra_fast.training.validation.generate", generate)
    code, rows = run(small(root))
    assert (code, len(rows)) == (0, 10)
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("no preview: ")]
    assert isinstance(samples, torch.Tensor) or line == f"no preview: {str(samples).splitlines()[0]}"
