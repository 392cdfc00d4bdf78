"""Decoding: the latent space is known wherever the weights go, and a VAE that does not fit is refused in one line."""

from __future__ import annotations

import json
import re

import pytest
import torch
from small_data import pack, save_kl, stand_in
from small_run import small, write_images

from sra_fast.data.source import open_source
from sra_fast.errors import Refused
from sra_fast.sampling.decoding import (
    BATCH,
    LatentSpace,
    find_latent_space,
    image_decoder,
    latent_space,
    space_of_latents,
)

CPU = torch.device("cpu")


def space(tmp_path, **changes):
    config = small(tmp_path, **changes)
    return latent_space(config, open_source(config, CPU)[0])


def test_the_space_is_that_of_the_set_and_the_vae_may_be_another(tmp_path, monkeypatch):
    pack(tmp_path / "set", vae="its own", scale=[1.0, 2.0, 3.0, 4.0], shift=0.5)
    (tmp_path / "vae").mkdir()
    monkeypatch.chdir(tmp_path)
    latents = {"data__images": "", "data__latents": "set"}
    assert space(tmp_path, **latents) == LatentSpace("its own", (1.0, 2.0, 3.0, 4.0), 0.5)
    assert space(tmp_path, **latents, data__vae="mine").vae == "mine"
    assert space(tmp_path, **latents, data__vae="vae").vae == str((tmp_path / "vae").resolve())  # found from anywhere


def test_pixels_have_no_space(tmp_path):
    pack(tmp_path / "set", dtype="uint8", shape=(1, 8, 8))
    assert space(tmp_path, data__images="", data__latents=str(tmp_path / "set")) is None
    write_images(tmp_path / "data")
    assert space(tmp_path) is None
    x = torch.rand(2, 1, 8, 8)
    assert image_decoder(None, CPU)(x) is x


@pytest.fixture
def run(tmp_path):
    """Folder of a run with a checkpoint."""
    run = tmp_path / "runs/a"
    (run / "checkpoints/000000000080").mkdir(parents=True)
    (run / "config.json").write_text("{}")
    return run


def weights_of(run):
    """All names under which weights of a run may be given."""
    checkpoint = run / "checkpoints/000000000080"
    return run, checkpoint, checkpoint / "ema.safetensors", run / "exported.safetensors"


@pytest.mark.parametrize("written", [LatentSpace("a", 0.5, (1.0, 2.0)), LatentSpace("", (0.5, 1.0), 0.0)])
def test_the_space_is_found_from_all_parts_of_a_run(run, tmp_path, written):
    written.write(run)
    for weights in weights_of(run):
        assert find_latent_space(weights, "", 2) == written
        assert find_latent_space(weights, "mine", 2) == LatentSpace("mine", written.scale, written.shift)
    assert LatentSpace.of_run(tmp_path, 4) is None


NO_FACTORS = [
    f'{{"vae": "a", "scale": {scale}, "shift": {shift}}}'
    for scale, shift in (("null", 0), ("[1, 2, 3]", 0), ("1", "[1, 2, 3]"), ("0", "0"), ("NaN", 0), ("1" * 400, 0))
]


@pytest.mark.parametrize("content", ["{", "[]", *NO_FACTORS])
def test_a_damaged_file_is_refused_by_name(tmp_path, content):
    (tmp_path / "latents.json").write_text(content)
    with pytest.raises(Refused, match=re.escape(str(tmp_path / "latents.json"))):
        LatentSpace.of_run(tmp_path, 4)


def test_weights_outside_a_run_take_the_space_of_the_vae(tmp_path, monkeypatch):
    vae, names = stand_in(monkeypatch)
    weights, x = tmp_path / "ema.safetensors", torch.randn(3, 4, 2, 2)
    assert find_latent_space(weights, "", 3) is None
    with pytest.raises(Refused, match=r"vae: '' given; must be named: these weights generate 4 channels, not pixels$"):
        find_latent_space(weights, "", 4)
    with pytest.raises(Refused, match="latents: True given; needs a run, or --vae for its scale and shift"):
        space_of_latents(weights, "", 4)
    assert names == []
    assert find_latent_space(weights, "a vae", 4) == LatentSpace("a vae", vae.scale, vae.shift)
    assert torch.equal(space_of_latents(weights, "a vae", 4).unscaled(x), x / vae.scale + vae.shift)
    assert (names, vae.given) == (["a vae", "a vae"], [])


def test_a_latents_json_outside_a_run_is_not_read(tmp_path):
    LatentSpace("a vae", 2.0, 0.0).write(tmp_path)  # `inspect --json latents.json` writes a file of this name too
    assert find_latent_space(tmp_path / "ema.safetensors", "", 1) is None


def test_a_vae_of_other_channels_is_refused(tmp_path, monkeypatch):
    stand_in(monkeypatch, channels=16)
    refusal = "vae: 'a vae' given; it decodes 16 channels; must decode 4"
    for make in (find_latent_space, space_of_latents):
        with pytest.raises(Refused, match=refusal):
            make(tmp_path / "ema.safetensors", "a vae", 4)
    decode = image_decoder(LatentSpace("a vae", 1.0, 0.0), CPU)
    with pytest.raises(Refused, match=refusal):
        decode(torch.zeros(1, 4, 2, 2))


def test_latents_of_a_run_are_unscaled_without_a_vae(run, monkeypatch):
    _, names = stand_in(monkeypatch)
    LatentSpace("a vae", (1.0, 2.0, 4.0, 8.0), 0.5).write(run)
    x = torch.randn(3, 4, 2, 2, dtype=torch.float64)
    for weights in weights_of(run):
        z = space_of_latents(weights, "another", 4).unscaled(x)
        assert z.dtype == torch.float32
        assert torch.equal(z, x.float() / torch.tensor([1.0, 2.0, 4.0, 8.0])[:, None, None] + 0.5)
    assert names == []


def test_a_run_on_pixels_has_no_latents(run):
    for weights in weights_of(run):
        with pytest.raises(Refused, match=re.escape(f"latents: True given; but the run {run} generates pixels")):
            space_of_latents(weights, "", 3)


def test_samples_are_unscaled_and_decoded_in_small_batches(monkeypatch):
    vae, names = stand_in(monkeypatch)
    decode = image_decoder(LatentSpace("a vae", (1.0, 2.0, 4.0, 8.0), (0.0, 1.0, 0.0, 0.0)), CPU)
    x = torch.randn(2 * BATCH + 3, 4, 2, 2)
    images = decode(x)
    assert names == ["a vae"]
    assert [len(part) for part in vae.given] == [BATCH, BATCH, 3]
    scale, shift = torch.tensor([1.0, 2.0, 4.0, 8.0]), torch.tensor([0.0, 1.0, 0.0, 0.0])
    z = x / scale[:, None, None] + shift[:, None, None]
    assert torch.equal(torch.cat(vae.given), z)
    assert torch.equal(images, torch.tanh(z[:, :1]).repeat(1, 3, 2, 2))
    assert not images.requires_grad


def test_the_scaling_of_training_is_undone(tmp_path, monkeypatch):
    """Training uses x = (z - shift) * scale, decoding z = x / scale + shift."""
    stored = pack(tmp_path / "set", posterior=False, shape=(4, 4, 4), scale=[0.5, 1, 2, 3], shift=[1, 0, 0, 2], vae="v")
    config = small(tmp_path, data__images="", data__latents=str(tmp_path / "set"))
    source, _ = open_source(config, CPU)
    vae, _ = stand_in(monkeypatch)
    raw, _ = source.load(source.held_out)
    x = (raw.float() - source.stored.shift[:, None, None]) * source.stored.scale[:, None, None]
    image_decoder(latent_space(config, source), CPU)(x)
    rows = torch.from_numpy(stored.rows[source.held_out.index]).float()
    assert torch.allclose(torch.cat(vae.given), rows, atol=1e-6)


def test_a_vae_that_is_not_available_is_refused(tmp_path):
    with pytest.raises(Refused, match=r"these latents name none; set --data.vae or --vae .*sample --latents"):
        image_decoder(LatentSpace("", 1.0, 0.0), CPU)
    pytest.importorskip("diffusers")
    with pytest.raises(Refused) as caught:
        image_decoder(LatentSpace(str(tmp_path / "nowhere"), 1.0, 0.0), CPU)
    assert str(tmp_path / "nowhere") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_vae_of_diffusers_decodes_images(tmp_path):
    folder = save_kl(tmp_path / "vae", scaling_factor=0.5)
    images = image_decoder(LatentSpace(str(folder), 0.5, 0.0), CPU)(torch.randn(2, 4, 4, 4))
    assert (images.shape, images.dtype) == ((2, 3, 16, 16), torch.float32)
    found = find_latent_space(tmp_path / "ema.safetensors", str(folder), 4)
    assert json.loads(json.dumps([found.scale, found.shift])) == [0.5, 0.0]
