"""Generation as a whole: every sampler, noise that depends on (seed, sample) alone, batches, refusals, files."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from sra_fast.config import SAMPLERS, ModelConfig, SampleConfig
from sra_fast.errors import Refused
from sra_fast.kernels.philox import Draw, normals
from sra_fast.sampling import generate as sampling
from sra_fast.sampling.generate import balanced_labels, block_noise, generate
from sra_fast.sampling.images import save_each, save_grid, save_npz, to_uint8

CLASSES = 10
EVERY_SAMPLER = [(family, sampler) for family, samplers in SAMPLERS.items() for sampler in samplers]


def model(family: str, channels: int = 3, size: int = 8) -> ModelConfig:
    return ModelConfig(family=family, channels=channels, input_size=size, classes=CLASSES)


class SmallNetwork(torch.nn.Module):
    """Random convolutions and a linear layer over everything, so that batch size may change the order of sums."""

    def __init__(self, family: str, channels: int = 3, size: int = 8) -> None:
        super().__init__()
        out, torch_seed = channels * (2 if family == "dit" else 1), 0
        with torch.random.fork_rng():
            torch.manual_seed(torch_seed)
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


def test_the_config_offers_exactly_the_samplers_there_are() -> None:
    assert set(sampling._SAMPLERS) == {name for names in SAMPLERS.values() for name in names}
    assert all(sampling.AUTO[family] in names for family, names in SAMPLERS.items())


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
    assert set(network.rows) == {1, 2}  # one image a call, two rows of it where guided
    assert torch.equal(whole, split)
    assert torch.equal(whole[4:5], alone)
    assert whole.dtype == torch.float32
    assert whole.shape == (7, 3, 8, 8)


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

    config = SampleConfig(sampler=sampler, steps=100, batch=64)
    sizes = model("sit", channels=1, size=16)
    samples = generate(
        network, torch.zeros(64, dtype=torch.int64), torch.arange(64), config=config, model=sizes, path=path
    )
    tolerance = 4 / math.sqrt(samples.numel())
    assert float(samples.mean()) == pytest.approx(mean, abs=std * tolerance + 0.01)
    assert float(samples.std()) == pytest.approx(
        std, rel=tolerance + 0.02
    )  # 100 steps and the long last one: below 2 %
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


def test_progress_counts_images() -> None:
    counts = []
    config = SampleConfig(sampler="euler", steps=1, batch=3)
    generate(
        SmallNetwork("sit"),
        torch.zeros(7, dtype=torch.int64),
        torch.arange(7),
        config=config,
        model=model("sit"),
        path="linear",
        progress=counts.append,
    )
    assert counts == [3, 3, 1]


def test_no_gradient_is_recorded() -> None:
    assert not run(SmallNetwork("sit"), torch.arange(1), "sit").requires_grad


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
        ({"config": SampleConfig(steps=2**34 // 192)}, r"sample\.steps"),
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


def test_balanced_labels() -> None:
    labels = balanced_labels(23, 10)
    assert labels.dtype == torch.int64
    assert labels[:12].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]
    assert torch.bincount(labels).tolist() == [3, 3, 3, 2, 2, 2, 2, 2, 2, 2]


def test_every_level_survives_the_round_trip() -> None:
    """What data in k / 127.5 - 1 means; truncation loses levels, since the float32 quotient may fall just below."""
    levels = torch.arange(256, dtype=torch.uint8)
    pixels = to_uint8((levels.float() / 127.5 - 1).view(1, 1, 16, 16))
    assert pixels.dtype == np.uint8
    assert pixels.flatten().tolist() == list(range(256))


def test_pixels_are_rounded_clamped_and_laid_out_by_channel_last() -> None:
    x = torch.tensor([-7.0, -1.0, 0.9 / 127.5 - 1, 1.4 / 127.5 - 1, 1.0, 7.0]).view(1, 3, 1, 2)
    pixels = to_uint8(x)
    assert pixels.shape == (1, 1, 2, 3)
    assert pixels[0, 0].tolist() == [[0, 1, 255], [0, 1, 255]]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_values_that_are_not_finite_are_refused(bad: float) -> None:
    x = torch.zeros(3, 1, 2, 2)
    x[1, 0, 1, 1] = bad
    with pytest.raises(Refused, match="1 of 3 not finite"):
        to_uint8(x)


def random_pixels(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


@pytest.mark.parametrize("channels", [1, 3])
def test_grid_magnifies_small_images_and_parts_them_by_one_pixel(tmp_path: Path, channels: int) -> None:
    pixels = random_pixels(5, 8, 8, channels)
    save_grid(tmp_path / "new" / "grid.png", pixels, columns=3)
    with Image.open(tmp_path / "new" / "grid.png") as image:
        read = np.asarray(image).reshape(65, 98, channels)
    for i in range(5):
        top, left = 33 * (i // 3), 33 * (i % 3)
        tile = read[top : top + 32, left : left + 32]
        assert np.array_equal(tile, pixels[i].repeat(4, 0).repeat(4, 1))
    assert (read[32] == 96).all()
    assert (read[:, 32] == 96).all()
    assert (read[33:, 66:] == 96).all()  # the place of a sixth image


def test_grid_leaves_large_images_alone(tmp_path: Path) -> None:
    pixels = random_pixels(2, 32, 40, 3)
    save_grid(tmp_path / "grid.png", pixels, columns=8)
    with Image.open(tmp_path / "grid.png") as image:
        assert image.size == (81, 32)


@pytest.mark.parametrize("channels", [1, 3])
def test_each_image_is_a_file_by_its_number(tmp_path: Path, channels: int) -> None:
    pixels = random_pixels(3, 4, 6, channels)
    save_each(tmp_path, pixels, first=41)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["000041.png", "000042.png", "000043.png"]
    for i, expected in enumerate(pixels, start=41):
        with Image.open(tmp_path / f"{i:06d}.png") as image:
            assert image.mode == {1: "L", 3: "RGB"}[channels]
            assert np.array_equal(np.asarray(image).reshape(expected.shape), expected)


@pytest.mark.parametrize("channels", [1, 3])
def test_npz_is_what_the_adm_suite_reads(tmp_path: Path, channels: int) -> None:
    pixels = random_pixels(3, 4, 6, channels)
    save_npz(tmp_path / "samples.npz", pixels)
    with np.load(tmp_path / "samples.npz") as read:
        assert read.files == ["arr_0"]
        array = read["arr_0"]
    assert array.dtype == np.uint8
    assert array.shape == (3, 4, 6, 3)
    assert array.flags.c_contiguous  # the suite reads rows from the stream
    for channel in range(3):
        assert np.array_equal(array[..., channel], pixels[..., channel % channels])


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = random_pixels(1, 4, 4, 3)
    save_npz(tmp_path / "samples.npz", pixels)

    def fail(file, *arrays) -> None:
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(np, "savez", fail)
    with pytest.raises(Refused, match=r"samples.npz: could not be written \(disk full\)"):
        save_npz(tmp_path / "samples.npz", 255 - pixels)
    assert [file.name for file in tmp_path.iterdir()] == ["samples.npz"]
    with np.load(tmp_path / "samples.npz") as read:
        assert np.array_equal(read["arr_0"], pixels)


@pytest.mark.parametrize("shape", [(0, 4, 4, 3), (1, 4, 4, 4), (4, 4, 3)])
def test_pixels_that_are_no_images_are_refused(tmp_path: Path, shape: tuple[int, ...]) -> None:
    for save in (save_npz, save_each, lambda path, pixels: save_grid(path, pixels, 2)):
        with pytest.raises(Refused, match="pixels: "):
            save(tmp_path / "x", np.zeros(shape, np.uint8))
