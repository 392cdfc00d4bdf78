"""Generation with every sampler: noise that depends on (seed, sample) alone, batches, guidance, refusals."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from sra_fast.config import SAMPLERS, ModelConfig, SampleConfig
from sra_fast.errors import Refused
from sra_fast.kernels.philox import Draw, normals
from sra_fast.sampling import generate as sampling
from sra_fast.sampling.generate import balanced_labels, block_noise, generate
from sra_fast.sampling.images import to_uint8

CLASSES = 10
EVERY_SAMPLER = [(family, sampler) for family, samplers in SAMPLERS.items() for sampler in samplers]


def model(family: str, channels: int = 3, size: int = 8) -> ModelConfig:
    return ModelConfig(family=family, channels=channels, input_size=size, classes=CLASSES)


class SmallNetwork(torch.nn.Module):
    """Random convolutions and a linear layer over everything, so that batch size may change the order of sums."""

    def __init__(self, family: str, channels: int = 3, size: int = 8) -> None:
        super().__init__()
        out = channels * (2 if family == "dit" else 1)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.first = torch.nn.Conv2d(channels, 16, 3, padding=1)
            self.labels = torch.nn.Embedding(CLASSES + 1, 16)
            self.mix = torch.nn.Linear(16 * size * size, 16 * size * size)
            self.last = torch.nn.Conv2d(16, out, 3, padding=1)
        self.time_scale = 999 if family == "dit" else 1
        self.rows = []

    def forward(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        assert x.dtype == t.dtype == torch.float32
        assert labels.dtype == torch.int64
        self.rows.append(len(x))
        hidden = self.first(x) + self.labels(labels)[..., None, None] + (t / self.time_scale).view(-1, 1, 1, 1)
        hidden = hidden + self.mix(hidden.flatten(1)).view_as(hidden)
        return self.last(torch.tanh(hidden)).tanh()


def run(network: torch.nn.Module, numbers: Tensor, family: str, labels: Tensor | None = None, **fields) -> Tensor:
    config = dataclasses.replace(SampleConfig(steps=6, guidance=2.0, guidance_low=0.2, guidance_high=0.8), **fields)
    labels = numbers % CLASSES if labels is None else labels
    return generate(network, labels, numbers, config=config, model=model(family), path="linear")


@pytest.mark.parametrize(("family", "sampler"), [("sit", "sde"), ("dit", "ddpm")])
def test_auto(family: str, sampler: str) -> None:
    network, numbers = SmallNetwork(family), torch.arange(2)
    assert torch.equal(run(network, numbers, family, sampler="auto"), run(network, numbers, family, sampler=sampler))


@pytest.mark.parametrize(("family", "sampler"), EVERY_SAMPLER)
def test_batch_invariant_is_bitwise_so(family: str, sampler: str) -> None:
    network, numbers = SmallNetwork(family), torch.arange(7)
    whole = run(network, numbers, family, sampler=sampler, batch=7, batch_invariant=True)
    split = run(network, numbers, family, sampler=sampler, batch=3, batch_invariant=True)
    alone = run(network, numbers[4:5], family, sampler=sampler, batch=1)
    assert set(network.rows) == {1, 2}  # one image per call, under guidance as two rows
    assert torch.equal(whole, split)
    assert torch.equal(whole[4:5], alone)
    assert (whole.dtype, whole.shape, whole.requires_grad) == (torch.float32, (7, 3, 8, 8), False)


@pytest.mark.parametrize(("family", "sampler"), EVERY_SAMPLER)
def test_batch_split_changes_at_most_one_level_in_a_thousand_values(family: str, sampler: str) -> None:
    network, numbers = SmallNetwork(family), torch.arange(16)
    levels = [to_uint8(run(network, numbers, family, sampler=sampler, batch=batch)).astype(int) for batch in (16, 5, 1)]
    for other in levels[1:]:
        difference = np.abs(levels[0] - other)
        assert difference.max() <= 1
        assert (difference > 0).mean() <= 0.001


@pytest.mark.parametrize(("family", "sampler"), EVERY_SAMPLER)
def test_a_sample_depends_on_its_number_seed_and_label(family: str, sampler: str) -> None:
    network, numbers = SmallNetwork(family), torch.tensor([5, 2**40, 0])
    fields = {"sampler": sampler, "batch_invariant": True}
    result = run(network, numbers, family, **fields)
    order = torch.tensor([2, 0])
    assert torch.equal(run(network, numbers[order], family, **fields), result[order])
    for other in (
        run(network, numbers, family, seed=1, **fields),
        run(network, numbers + 1, family, labels=numbers % CLASSES, **fields),
        run(network, numbers, family, labels=(numbers + 1) % CLASSES, **fields),
    ):
        assert all(not torch.equal(a, b) for a, b in zip(result, other, strict=True))


def test_noise_blocks_follow_each_other_in_one_stream() -> None:
    numbers = torch.tensor([3, 2**33 + 1])
    stream = normals(7, numbers, Draw.SAMPLER, 5 * 12)  # 9 values take 12 elements, whole Philox calls
    for block in range(5):
        noise = block_noise(7, numbers, (1, 3, 3), block)
        assert noise.dtype == torch.float64
        assert torch.equal(noise.flatten(1), stream[:, block * 12 : block * 12 + 9].double())


def test_every_step_draws_its_own_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    for family, sampler in EVERY_SAMPLER:
        blocks = []
        monkeypatch.setattr(
            sampling, "block_noise", lambda *given, blocks=blocks: blocks.append(given[3]) or block_noise(*given)
        )
        run(SmallNetwork(family), torch.arange(1), family, sampler=sampler, steps=5)
        assert sorted(blocks) == ([0, 1, 2, 3, 4] if sampler in ("sde", "ddpm") else [0])


@pytest.mark.parametrize("path", ["linear", "cosine"])
@pytest.mark.parametrize("sampler", SAMPLERS["sit"])
def test_samples_of_a_gaussian_have_its_moments(sampler: str, path: str) -> None:
    """From `generate` down, with true noise: the data's mean and deviation at the rate of 16,384 values."""
    mean, std = 0.3, 0.5

    def network(x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        t, half = t.view(-1, 1, 1, 1), math.pi / 2
        alpha, sigma = (1 - t, t) if path == "linear" else ((half * t).cos(), (half * t).sin())
        d_alpha, d_sigma = (-1, 1) if path == "linear" else (-half * sigma, half * alpha)
        surprise = (x - alpha * mean) / (alpha**2 * std**2 + sigma**2)
        return d_sigma * sigma * surprise + d_alpha * (mean + alpha * std**2 * surprise)

    config, counts = SampleConfig(sampler=sampler, steps=100, batch=48), []
    sizes = model("sit", channels=1, size=16)
    labels = balanced_labels(64, CLASSES)
    numbers = torch.arange(64)
    samples = generate(network, labels, numbers, config=config, model=sizes, path=path, progress=counts.append)
    assert counts == [48, 16]
    tolerance = 4 / math.sqrt(samples.numel())
    assert float(samples.mean()) == pytest.approx(mean, abs=std * tolerance + 0.01)
    # The error of 100 steps and the long last one is below 2 %.
    assert float(samples.std()) == pytest.approx(std, rel=tolerance + 0.02)
    rows = samples.flatten(1).double()
    correlation = torch.corrcoef(rows)[~torch.eye(64, dtype=torch.bool)]
    assert float(correlation.abs().max()) < 6 / math.sqrt(256)  # no two samples share their noise


@pytest.mark.parametrize(
    ("family", "sampler", "rows"),
    [
        ("sit", "euler", [1, 1, 2, 2, 1]),  # t = 1, .8, .6, .4, .2 with guidance on [0.3, 0.7]
        ("sit", "heun", [1, 1, 1, 2, 2, 2, 2, 1, 1]),
        ("sit", "sde", [1, 1, 2, 1, 1]),  # t = 1, .76, .52, .28, .04
        ("dit", "ddim", [1, 1, 2, 1, 1]),  # steps 999, 749, 500, 250, 0 over 999
    ],
)
def test_guidance_follows_the_noise_level(family: str, sampler: str, rows: list[int]) -> None:
    network = SmallNetwork(family)
    run(network, torch.arange(1), family, sampler=sampler, steps=5, guidance_low=0.3, guidance_high=0.7)
    assert network.rows == rows


def test_guidance_reads_null_class_scale_and_channels() -> None:
    """The velocity is the label, so one Euler step shows c in channel 2 and u + s (c - u) in the others."""

    def network(x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        return labels.view(-1, 1, 1, 1).float().expand_as(x)

    labels, numbers = torch.tensor([3, 7]), torch.arange(2)
    config = SampleConfig(sampler="euler", steps=1, guidance=1.5, guidance_channels=2)
    samples = generate(network, labels, numbers, config=config, model=model("sit"), path="linear")
    velocity = block_noise(0, numbers, (3, 8, 8), 0) - samples
    expected = torch.stack([CLASSES + 1.5 * (labels - CLASSES)] * 2 + [labels], dim=1).double()
    torch.testing.assert_close(velocity.mean((2, 3)), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"config": SampleConfig(sampler="ddpm")}, r"sample\.sampler: 'ddpm' given; must be one of euler, heun, sde"),
        ({"path": "spiral"}, r"objective\.path: 'spiral' given"),
        ({"model": dataclasses.replace(model("sit"), classes=0)}, r"model\.classes: 0 given"),
        ({"labels": torch.tensor([0, CLASSES + 1])}, r"labels: \(0, 11\) given; must be in \[0, 10\]"),
        ({"labels": torch.tensor([-1, 0])}, r"labels: \(-1, 0\) given"),
        ({"labels": torch.tensor([1])}, "labels, indices"),
        ({"indices": torch.tensor([0.0, 1.0])}, "labels, indices"),
        (
            {"model": model("sit", size=1024), "config": SampleConfig(steps=5461)},
            r"sample\.steps",
        ),  # 5462 x 3 x 2^20 > 2^34
        ({"model": model("dit"), "config": SampleConfig(steps=1001)}, r"sample\.steps: 1001 given"),
    ],
)
def test_refusals(changes: dict, message: str) -> None:
    given = {
        "labels": torch.tensor([0, CLASSES]),
        "indices": torch.arange(2),
        "config": SampleConfig(steps=2),
        "model": model("sit"),
        "path": "linear",
    } | changes
    with pytest.raises(Refused, match=message) as refusal:
        generate(SmallNetwork("sit"), given.pop("labels"), given.pop("indices"), **given)
    assert "\n" not in str(refusal.value)
