"""vae.py: the numbers are those of diffusers, and a VAE that cannot be opened is refused with a hint."""

from __future__ import annotations

import json
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_data import CPU, save_kl, save_tiny
from small_data import refusal as refusal_of

from sra_fast.vae import open_vae

diffusers = pytest.importorskip("diffusers")
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="session")
def kl(tmp_path_factory):
    return save_kl(tmp_path_factory.mktemp("kl"), scaling_factor=0.13025)


@pytest.fixture(scope="session")
def tiny_vae(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("tiny"))


def opened(path, dtype=torch.float32):
    return open_vae(str(path), CPU, dtype)


def reconfigure(root, **changes):
    """Change fields of a saved VAE's config.json."""
    path = root / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return root


def images(count=3, side=16, seed=0):
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_moments_are_what_diffusers_gives(kl):
    vae, x = opened(kl), images()
    posterior = diffusers.AutoencoderKL.from_pretrained(kl).eval().encode(x).latent_dist
    moments = vae.encode(x)
    assert (moments.shape, moments.dtype, moments.requires_grad) == ((3, 8, 4, 4), torch.float32, False)
    assert torch.equal(moments[:, :4], posterior.mean)
    assert torch.equal(moments[:, 4:], posterior.std)
    assert (moments[:, 4:] > 0).all()
    facts = (vae.kind, vae.channels, vae.posterior, vae.downsampling, vae.scale, vae.shift)
    assert facts == ("AutoencoderKL", 4, True, 4, 0.13025, 0.0)


def test_latents_of_the_tiny_one_are_what_its_pipelines_use(tiny_vae):
    vae, x = opened(tiny_vae), images()
    model = diffusers.AutoencoderTiny.from_pretrained(tiny_vae).eval()
    z = vae.encode(x)
    assert (z.shape, z.dtype) == ((3, 4, 4, 4), torch.float32)
    assert torch.equal(z, model.encode(x).latents)
    assert torch.equal(vae.decode(z), model.decode(z).sample)
    facts = (vae.kind, vae.channels, vae.posterior, vae.downsampling, vae.scale, vae.shift)
    assert facts == ("AutoencoderTiny", 4, False, 4, 1.0, 0.0)


def test_decoding_takes_latents_before_scaling(kl):
    vae = opened(kl)
    z = vae.encode(images())[:, :4]
    decoded = vae.decode(z)
    assert (decoded.shape, decoded.dtype) == ((3, 3, 16, 16), torch.float32)
    # As a pipeline has it: its latents are scaled, and it undoes that before it decodes.
    scaled = (z - vae.shift) * vae.scale
    expected = diffusers.AutoencoderKL.from_pretrained(kl).eval().decode(scaled / 0.13025).sample
    torch.testing.assert_close(decoded, expected, rtol=1e-5, atol=1e-5)
    loud = vae.decode(1000 * z)
    assert loud.abs().max() > 1.01  # not clamped


def test_half_precision_returns_float32(kl):
    exact, rough = (opened(kl, dtype).encode(images()) for dtype in (torch.float32, torch.bfloat16))
    assert rough.dtype == torch.float32
    torch.testing.assert_close(rough, exact, rtol=0.1, atol=0.1)


@pytest.mark.parametrize(
    ("config", "scale", "shift"),
    [
        ({"scaling_factor": 1.5305, "shift_factor": 0.0609}, 1.5305, 0.0609),  # as SD3 has them
        ({"scaling_factor": 0.5, "shift_factor": None}, 0.5, 0.0),
        (
            {"scaling_factor": 0.5, "latents_mean": [1.0, 2.0, 3.0, 4.0], "latents_std": [1.0, 2.0, 4.0, 8.0]},
            (0.5, 0.25, 0.125, 0.0625),
            (1.0, 2.0, 3.0, 4.0),
        ),
    ],
    ids=["shift", "no shift", "per channel"],
)
def test_scale_and_shift_are_those_of_the_configuration(kl, tmp_path, config, scale, shift):
    vae = opened(reconfigure(shutil.copytree(kl, tmp_path / "vae"), **config))
    assert (vae.scale, vae.shift) == (scale, shift)


def test_fingerprint_is_of_weights_and_configuration_not_of_the_place(kl, tmp_path):
    prints = {opened(kl).fingerprint}
    shutil.copytree(kl, tmp_path / "sd" / "vae")  # as in the folder of a pipeline
    prints.add(opened(tmp_path / "sd").fingerprint)
    prints.add(opened(reconfigure(shutil.copytree(kl, tmp_path / "v"), _diffusers_version="0.1")).fingerprint)
    assert len(prints) == 1
    prints.add(opened(reconfigure(shutil.copytree(kl, tmp_path / "scaled"), scaling_factor=1.0)).fingerprint)
    prints.add(opened(save_kl(tmp_path / "other", seed=9, scaling_factor=0.13025)).fingerprint)
    prints.add(opened(kl, torch.bfloat16).fingerprint)
    assert len(prints) == 4


def refusal(name):
    line = refusal_of(open_vae, str(name), CPU, torch.float32)
    assert line.startswith(f"vae: {str(name)!r} given; ")
    return line


def test_a_folder_that_is_none_is_refused_without_asking_the_hub(tmp_path, monkeypatch):
    def ask(*_, **__):
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(diffusers.AutoencoderKL, "load_config", ask)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "sd").mkdir(parents=True)
    for name in ("", "vae", "./models/vae", "~/nowhere/vae", tmp_path / "vae", "models/sd/vae", "a/b/"):
        assert "there is no such folder" in refusal(name)
    assert "config.json is missing" in refusal(tmp_path / "models")


def test_an_id_that_cannot_be_loaded_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "`hf download nobody/no-vae --local-dir DIR`" in refusal("nobody/no-vae")
    line = refusal("nobody/no-pipeline/vae")
    assert "`hf download nobody/no-pipeline --include 'vae/*' --local-dir DIR`, then give DIR/vae" in line


def test_a_missing_diffusers_says_what_to_install(kl, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    assert refusal_of(opened, kl).endswith(": pip install diffusers")


def test_other_models_are_refused(kl, tmp_path):
    copy = shutil.copytree(kl, tmp_path / "vae")
    assert "'UNet2DModel'; must be one of AutoencoderKL, A" in refusal(reconfigure(copy, _class_name="UNet2DModel"))
    reconfigure(copy, _class_name="AutoencoderKL", in_channels=4)
    assert "must take 3 channels" in refusal(copy)
    config = json.loads((kl / "config.json").read_text())
    del config["down_block_types"]  # its default has one block: it loads, and its layers do not fit together
    (copy / "config.json").write_text(json.dumps(config))
    assert "config.json cannot be used" in refusal(copy)
    (copy / "config.json").write_text("[1]")
    assert "config.json is of class None" in refusal(copy)
    (copy / "config.json").write_text("{")
    assert "config.json cannot be read" in refusal(copy)


def test_damaged_weights_are_refused(kl, tmp_path, capfd):
    copy = shutil.copytree(kl, tmp_path / "vae")
    whole = (copy / WEIGHTS).read_bytes()
    (copy / WEIGHTS).write_bytes(whole[:-100])
    assert "its weights cannot be loaded" in refusal(copy)
    (copy / WEIGHTS).unlink()
    assert f"{WEIGHTS}" in refusal(copy)
    # A pickle is not opened, whatever is in it.
    torch.save(load_file(kl / WEIGHTS), copy / "diffusion_pytorch_model.bin")
    assert "its weights cannot be loaded" in refusal(copy)
    assert capfd.readouterr().err == ""


def test_weights_that_lack_a_tensor_are_refused(kl, tmp_path):
    # diffusers would fill it with random numbers and go on.
    copy = shutil.copytree(kl, tmp_path / "vae")
    tensors = load_file(copy / WEIGHTS)
    del tensors["encoder.conv_in.weight"]
    save_file(tensors, copy / WEIGHTS, {"format": "pt"})
    assert "its weights lack 1 tensors, the first encoder.conv_in.weight" in refusal(copy)
    tensors["encoder.conv_in.weight"] = torch.zeros(4, 3, 3, 3)
    save_file(tensors, copy / WEIGHTS, {"format": "pt"})
    assert "encoder.conv_in.weight" in refusal(copy)


def test_a_configuration_of_endless_layers_is_refused_before_they_are_built(kl, tmp_path):
    copy = shutil.copytree(kl, tmp_path / "vae")
    for setting in ({"layers_per_block": 10**8}, {"block_out_channels": [8] * 1000}, {"latent_channels": 10**12}):
        reconfigure(copy, **setting)
        assert f"{next(iter(setting))} is too large" in refusal(copy)
        reconfigure(copy, layers_per_block=1, block_out_channels=[8, 8, 16], latent_channels=4)
    assert "there is no such user" in refusal("~nosuchuser/x")
