"""decoding.py: what samples are is known wherever their weights go, and a VAE that does not fit is one line."""

from __future__ import annotations

import json

import pytest
import torch
from small_run import small, write_images
from small_sets import pack, stand_in
from small_vae import save_kl

from sra_fast.data.source import open_source
from sra_fast.errors import Refused
from sra_fast.sampling.decoding import (
    BATCH,
    LatentSpace,
    image_decoder,
    latent_decoder,
    latent_space,
    find_latent_space,
)

CPU = torch.device("cpu")


def space(tmp_path, **changes):
    config = small(tmp_path, **changes)
    return latent_space(config, open_source(config, CPU)[0])


def test_the_space_is_the_set_s_and_the_vae_may_be_another(tmp_path):
    pack(tmp_path / "set", vae="its own", scale=[1.0, 2.0, 3.0, 4.0], shift=0.5)
    latents = {"data__images": "", "data__latents": str(tmp_path / "set")}
    assert space(tmp_path, **latents) == LatentSpace("its own", (1.0, 2.0, 3.0, 4.0), 0.5)
    assert space(tmp_path, **latents, data__vae="mine").vae == "mine"


def test_a_folder_is_found_again_from_elsewhere(tmp_path, monkeypatch):
    pack(tmp_path / "set")
    (tmp_path / "vae").mkdir()
    monkeypatch.chdir(tmp_path)
    latents = {"data__images": "", "data__latents": "set"}
    assert space(tmp_path, **latents, data__vae="vae").vae == str((tmp_path / "vae").resolve())


def test_pixels_have_no_space(tmp_path):
    pack(tmp_path / "set", dtype="uint8", shape=(1, 8, 8))
    assert space(tmp_path, data__images="", data__latents=str(tmp_path / "set")) is None
    write_images(tmp_path / "data")
    assert space(tmp_path) is None
    x = torch.rand(2, 1, 8, 8)
    assert image_decoder(None, CPU)(x) is x


@pytest.mark.parametrize("given", [LatentSpace("a", 0.5, (1.0, 2.0)), LatentSpace("", (0.5, 1.0), 0.0)])
def test_what_a_run_writes_is_read_from_all_its_parts(tmp_path, given):
    run = tmp_path / "runs/a"
    checkpoint = run / "checkpoints/000000000080"
    checkpoint.mkdir(parents=True)
    given.write(run)
    assert LatentSpace.of_run(run) == given
    for weights in (run, checkpoint, checkpoint / "ema.safetensors", run / "exported.safetensors"):
        assert find_latent_space(weights, "", 4) == given
        assert find_latent_space(weights, "mine", 4) == LatentSpace("mine", given.scale, given.shift)
    assert LatentSpace.of_run(tmp_path) is None


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "{}", '{"vae": "a", "scale": null, "shift": 0}', '{"vae": "a", "scale": [1], "shift": "x"}'],
)
def test_a_damaged_note_is_refused_by_name(tmp_path, content):
    (tmp_path / "latents.json").write_text(content)
    with pytest.raises(Refused) as caught:
        LatentSpace.of_run(tmp_path)
    assert str(tmp_path / "latents.json") in str(caught.value)


def test_weights_of_no_run_take_the_vae_s_own_space(tmp_path, monkeypatch):
    vae, names = stand_in(monkeypatch)
    weights = tmp_path / "ema.safetensors"
    assert find_latent_space(weights, "a vae", 4) == LatentSpace("a vae", vae.scale, vae.shift)
    assert names == ["a vae"]
    assert find_latent_space(weights, "", 3) is None
    with pytest.raises(Refused, match=r"vae: '' given; must be named: these weights make 4 channels, not pixels$"):
        find_latent_space(weights, "", 4)


@pytest.mark.parametrize("make", [find_latent_space, latent_decoder])
def test_weights_of_no_run_are_refused_with_a_vae_of_other_channels(tmp_path, monkeypatch, make):
    stand_in(monkeypatch, channels=16)
    with pytest.raises(Refused, match="vae: 'a vae' given; it decodes 16 channels; must decode 4"):
        make(tmp_path / "ema.safetensors", "a vae", 4)


def test_latents_of_a_run_are_unscaled_without_a_vae(tmp_path, monkeypatch):
    _, names = stand_in(monkeypatch)
    run = tmp_path / "runs/a"
    checkpoint = run / "checkpoints/000000000080"
    checkpoint.mkdir(parents=True)
    (run / "config.json").write_text("{}")
    LatentSpace("a vae", (1.0, 2.0, 4.0, 8.0), 0.5).write(run)
    x = torch.randn(3, 4, 2, 2, dtype=torch.float64)
    z = x.float() / torch.tensor([1.0, 2.0, 4.0, 8.0])[:, None, None] + 0.5
    for weights in (run, checkpoint, checkpoint / "ema.safetensors", run / "exported.safetensors"):
        for vae in ("", "another"):
            found = latent_decoder(weights, vae, 4)(x)
            assert found.dtype == torch.float32
            assert torch.equal(found, z)
    assert names == []


def test_latents_of_no_run_are_scaled_as_a_named_vae_says(tmp_path, monkeypatch):
    vae, names = stand_in(monkeypatch)
    x = torch.randn(3, 4, 2, 2)
    with pytest.raises(Refused, match="latents: True given; needs a run, or --vae for its scale and shift"):
        latent_decoder(tmp_path / "ema.safetensors", "", 4)
    assert names == []
    z = latent_decoder(tmp_path / "ema.safetensors", "a vae", 4)(x)
    assert torch.equal(z, x / vae.scale + vae.shift)
    assert (names, vae.given) == (["a vae"], [])


def test_a_run_on_pixels_has_no_latents(tmp_path):
    checkpoint = tmp_path / "runs/a/checkpoints/000000000080"
    checkpoint.mkdir(parents=True)
    (tmp_path / "runs/a/config.json").write_text("{}")
    for weights in (tmp_path / "runs/a", checkpoint, checkpoint / "ema.safetensors"):
        with pytest.raises(Refused) as caught:
            latent_decoder(weights, "", 3)
        assert str(caught.value) == f"latents: True given; but the run {tmp_path / 'runs/a'} makes pixels"


def test_samples_are_unscaled_and_decoded_in_small_batches(monkeypatch):
    vae, names = stand_in(monkeypatch)
    make = image_decoder(LatentSpace("a vae", (1.0, 2.0, 4.0, 8.0), (0.0, 1.0, 0.0, 0.0)), CPU)
    x = torch.randn(2 * BATCH + 3, 4, 2, 2)
    images = make(x)
    assert names == ["a vae"]
    assert [len(part) for part in vae.given] == [BATCH, BATCH, 3]
    scale, shift = torch.tensor([1.0, 2.0, 4.0, 8.0]), torch.tensor([0.0, 1.0, 0.0, 0.0])
    z = x / scale[:, None, None] + shift[:, None, None]
    assert torch.equal(torch.cat(vae.given), z)
    assert torch.equal(images, torch.tanh(z[:, :1]).repeat(1, 3, 2, 2))
    assert not images.requires_grad


def test_one_factor_serves_all_channels(monkeypatch):
    vae, _ = stand_in(monkeypatch, channels=2)
    image_decoder(LatentSpace("a vae", 0.5, 0.25), CPU)(torch.ones(1, 2, 2, 2))
    assert vae.given[0].flatten().tolist() == [2.25] * 8


def test_what_training_made_of_a_mean_is_undone(tmp_path, monkeypatch):
    """x = (z - shift) * scale there, x / scale + shift here."""
    stored = pack(tmp_path / "set", posterior=False, shape=(4, 4, 4), scale=[0.5, 1, 2, 3], shift=[1, 0, 0, 2], vae="v")
    config = small(tmp_path, data__images="", data__latents=str(tmp_path / "set"))
    source, _ = open_source(config, CPU)
    vae, _ = stand_in(monkeypatch)
    raw, _ = source.load(source.held_out)
    x = (raw.float() - source.stored.shift[:, None, None]) * source.stored.scale[:, None, None]
    image_decoder(latent_space(config, source), CPU)(x)
    rows = torch.from_numpy(stored.rows[source.held_out.index]).float()
    assert torch.allclose(torch.cat(vae.given), rows, atol=1e-6)


def test_a_vae_of_other_channels_is_one_line(monkeypatch):
    stand_in(monkeypatch, channels=16)
    make = image_decoder(LatentSpace("a vae", 1.0, 0.0), CPU)
    with pytest.raises(Refused, match="vae: 'a vae' given; it decodes 16 channels; must decode 4"):
        make(torch.zeros(1, 4, 2, 2))


def test_no_vae_is_one_line_with_the_cure(tmp_path):
    with pytest.raises(Refused, match=r"none is named by these latents; --data.vae or --vae .*sample --latents"):
        image_decoder(LatentSpace("", 1.0, 0.0), CPU)
    pytest.importorskip("diffusers")
    with pytest.raises(Refused) as caught:
        image_decoder(LatentSpace(str(tmp_path / "nowhere"), 1.0, 0.0), CPU)
    assert str(tmp_path / "nowhere") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_vae_of_diffusers_makes_images(tmp_path):
    folder = save_kl(tmp_path / "vae", scaling_factor=0.5)
    images = image_decoder(LatentSpace(str(folder), 0.5, 0.0), CPU)(torch.randn(2, 4, 4, 4))
    assert (images.shape, images.dtype) == ((2, 3, 16, 16), torch.float32)
    found = find_latent_space(tmp_path / "ema.safetensors", str(folder), 4)
    assert json.loads(json.dumps([found.scale, found.shift])) == [0.5, 0.0]
