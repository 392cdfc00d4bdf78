"""Decoders of images get a number for Pillow's pixels only; a VAE's encoder gets its rate with any weights."""

from __future__ import annotations

import argparse
import json
import re
import sys
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.harness import throughput
from benchmarks.harness.timing import GateFailed
from benchmarks.rivals import image_decoders
from benchmarks.rivals.image_decoders import (
    SIDES,
    THREADS,
    JpegFiles,
    bench_decoding,
    bench_encoding,
    pillow_crop,
    same_pixels,
    write_jpegs,
    write_vae,
)
from sra_fast.data.decoders import DaliDecoder, PillowDecoder
from sra_fast.errors import Refused
from sra_fast.vae import open_vae

CPU = torch.device("cpu")


def chosen(**changes):
    words = {"resolution": 32, "decode_batch": 2, "passes": 1, "repeats": 2, "jpegs": None, "vae": None}
    return argparse.Namespace(**words | changes)


# Decoding -----------------------------------------------------------------------------------------------------------


def test_made_up_jpegs_have_the_sizes_of_imagenet(tmp_path):
    paths = write_jpegs(tmp_path, 8)
    assert [Image.open(path).size for path in paths] == list(SIDES)
    assert 50_000 < np.mean([path.stat().st_size for path in paths]) < 300_000


def test_the_rival_reads_every_file_in_every_pass(tmp_path):
    files = write_jpegs(tmp_path, 3, shrunk=8)
    rival = JpegFiles(files, 32, 2)
    right = [np.asarray(pillow_crop(Image.open(path), 32)).transpose(2, 0, 1) for path in files]
    assert len(rival) == 6
    assert all(np.array_equal(rival[index].numpy(), right[index % 3]) for index in range(6))


def test_the_gate_on_pixels_is_half_a_level_and_a_whole_one_for_an_image():
    x = torch.zeros(4, 3, 8, 8)
    assert same_pixels("a", x + 0.4 / 127.5, x) == pytest.approx(0.4, rel=1e-3)
    for off in (torch.full((4, 1, 1, 1), 0.6), torch.tensor([1.1, 0, 0, 0])[:, None, None, None]):
        with pytest.raises(GateFailed):
            same_pixels("a", x + off / 127.5, x)
    with pytest.raises(GateFailed):
        same_pixels("a", x * float("nan"), x)


@pytest.mark.parametrize(("title", "decoder"), [("Pillow", PillowDecoder), ("DALI", DaliDecoder)])
def test_a_decoder_of_other_pixels_gets_no_number(tmp_path, monkeypatch, title, decoder):
    """Though only one image in the second batch is off."""
    if title == "DALI":
        pytest.importorskip("nvidia.dali")
    decode = decoder.decode
    files = write_jpegs(tmp_path, 3, shrunk=8)

    def spoiled(self, batch):
        x = decode(self, batch)
        return x.roll(4, -1) if batch == [files[2].read_bytes()] else x

    monkeypatch.setattr(decoder, "decode", spoiled)
    monkeypatch.setattr(throughput, "measure", lambda *_: pytest.fail("measured"))
    with pytest.raises(GateFailed, match=rf"^ours, {title}, 1 threads: pixels are off by \d"):
        bench_decoding(chosen(), files, CPU)


def test_without_dali_pillow_is_measured_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    monkeypatch.setattr(image_decoders, "WORKERS", (0,))
    made = bench_decoding(chosen(), write_jpegs(tmp_path, 2, shrunk=8), CPU)
    ours = [f"ours, Pillow, {threads} threads" for threads in THREADS]
    assert [row["params"]["loader"] for row in made] == [*ours, "Pillow, DataLoader, 0 workers"]
    assert [row["ours"] for row in made] == [True] * len(ours) + [False]
    assert "DALI not run" in capsys.readouterr().out


@pytest.mark.parametrize("jpegs", [None, "photos"])
def test_a_sample_is_all_files_in_every_pass(tmp_path, monkeypatch, jpegs):
    """A last batch that is not full counts too; and rows tell whether the files were made up."""
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    monkeypatch.setattr(image_decoders, "WORKERS", (0,))
    found, decoded, decode = {}, [], PillowDecoder.decode
    monkeypatch.setattr(throughput, "measure", lambda candidates, *_: found.update(candidates) or {})
    monkeypatch.setattr(PillowDecoder, "decode", lambda self, batch: decoded.extend(batch) or decode(self, batch))
    bench_decoding(chosen(passes=2, jpegs=jpegs), write_jpegs(tmp_path, 3, shrunk=8), CPU)
    decoded.clear()
    assert {name: one.run() for name, one in found.items()} == dict.fromkeys(found, 6)
    assert len(decoded) == 6 * len(THREADS)
    facts = {"files": 3, "made_up": not jpegs, "resolution": 32, "batch": 2}
    assert all(one.params == facts for one in found.values())  # which tell rows apart, and measure nothing


def test_how_far_pixels_are_off_is_kept(tmp_path, monkeypatch):
    """For ours alone; the rival is the reference."""
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    monkeypatch.setattr(image_decoders, "WORKERS", (0,))
    decode = PillowDecoder.decode
    monkeypatch.setattr(PillowDecoder, "decode", lambda self, batch: decode(self, batch) + 0.25 / 127.5)
    made = bench_decoding(chosen(), write_jpegs(tmp_path, 2, shrunk=8), CPU)
    assert [row["levels_off"] for row in made if row["ours"]] == pytest.approx([0.25] * len(THREADS), abs=0.02)
    assert [row["levels_off"] for row in made if not row["ours"]] == [None]
    assert not any("levels_off" in row["params"] for row in made)


@pytest.mark.parametrize("damage", ["cut", "other"])
def test_a_damaged_jpeg_is_named(tmp_path, monkeypatch, damage):
    monkeypatch.setattr(throughput, "measure", lambda *_: pytest.fail("measured"))
    files = write_jpegs(tmp_path, 3, shrunk=8)
    files[1].write_bytes(files[1].read_bytes()[:400] if damage == "cut" else b"no image")
    with pytest.raises(Refused) as refused:
        bench_decoding(chosen(), files, CPU)
    assert re.match(rf"--jpegs: {re.escape(str(files[1]))}: cannot be decoded \(.+\)", str(refused.value))


# Encoding -----------------------------------------------------------------------------------------------------------


def test_an_encoder_has_its_rate(kl, tmp_path, monkeypatch):
    monkeypatch.setattr(image_decoders, "write_vae", lambda *_: pytest.fail("another one made"))
    monkeypatch.setattr(sys, "orig_argv", ["python", "--vae", str(kl)])
    (made,) = bench_encoding(chosen(vae=str(kl)), CPU, tmp_path / "vae")
    facts = {"loader": "AutoencoderKL (a folder)", "resolution": 32, "batch": 4, "dtype": "fp32"}
    assert (made["name"], made["params"], made["ours"]) == ("encode", facts, True)
    assert len(made["samples_ms"]) == 2
    assert made["images_per_s"] > 0
    assert made["bytes"] == 4 * 3 * 32 * 32 * 4
    assert str(kl) not in json.dumps(made)


def test_an_encoder_of_the_hub_has_its_id(kl, tmp_path, monkeypatch):
    opened = []
    monkeypatch.setattr(image_decoders, "open_vae", lambda vae, *rest: opened.append(vae) or open_vae(str(kl), *rest))
    monkeypatch.setattr(sys, "orig_argv", ["python", "--vae", "org/name"])
    (made,) = bench_encoding(chosen(vae="org/name"), CPU, tmp_path / "vae")
    assert opened == ["org/name"]
    assert made["params"]["loader"] == "AutoencoderKL (org/name)"
    assert made["command"] == "python --vae org/name"


def test_without_a_vae_named_one_of_random_weights_is_measured(tmp_path, monkeypatch):
    pytest.importorskip("diffusers")
    monkeypatch.setattr(image_decoders, "write_vae", partial(write_vae, channels=(32, 32)))
    (made,) = bench_encoding(chosen(), CPU, tmp_path / "vae")
    assert made["params"]["loader"] == "AutoencoderKL (random weights)"
    assert str(tmp_path) not in json.dumps(made)
    assert (tmp_path / "vae" / "config.json").exists()


def test_the_random_vae_opens_as_any_other(tmp_path):
    pytest.importorskip("diffusers")
    write_vae(tmp_path, (32, 32, 64, 64))
    vae = open_vae(str(tmp_path), CPU, torch.float32)
    assert (vae.kind, vae.channels, vae.posterior, vae.downsampling) == ("AutoencoderKL", 4, True, 8)
    encoded = vae.encode(torch.zeros(2, 3, 16, 16))
    assert encoded.shape == (2, 8, 2, 2)
    assert encoded.isfinite().all()


def test_the_random_vae_is_of_stable_diffusions_size(tmp_path, monkeypatch):
    """That of CompVis/stable-diffusion-v1-4; on the meta device, as it is large."""
    diffusers = pytest.importorskip("diffusers")
    sizes = []
    monkeypatch.setattr(
        diffusers.AutoencoderKL,
        "save_pretrained",
        lambda model, folder: sizes.append(sum(weights.numel() for weights in model.parameters())),
    )
    with torch.device("meta"):
        write_vae(tmp_path)
    assert sizes == [83_653_863]


def test_without_diffusers_only_a_vae_that_is_named_is_refused(kl, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    assert bench_encoding(chosen(), CPU, tmp_path) == []
    assert capsys.readouterr().out == "encoder not run: needs `pip install diffusers`\n"
    with pytest.raises(Refused, match="pip install diffusers"):
        bench_encoding(chosen(vae=str(kl)), CPU, tmp_path)
