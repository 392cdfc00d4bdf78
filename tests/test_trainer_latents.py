"""Whole runs on latents and packed pixels: the same bits after a resume, previews, samples, and what is refused."""

from __future__ import annotations

import json
import os
import re

import numpy as np
import pytest
import torch
from PIL import Image
from small_data import pack, stand_in
from small_run import arguments, checkpoints, complaint, content, metrics, run, small, summary

from sra_fast.data.latent_stream import LatentStream
from sra_fast.errors import Refused
from sra_fast.sampling.images import to_uint8

END = "000000000080"
FACTORS = {"scale": [0.8, 1.0, 1.2, 1.1], "shift": [0.1, 0.0, -0.1, 0.2]}


def options(root, **changes):
    """On the set in root/set."""
    return {"data__images": "", "data__latents": str(root / "set"), **changes}


def train(root, **changes):
    return run(small(root, **options(root, **changes)))


@pytest.fixture
def packed(tmp_path):
    return pack(tmp_path / "set", vae="a vae", flips=True, **FACTORS)


@pytest.mark.parametrize(("family", "accumulate"), [("sit", 2), ("dit", 1)])
def test_ten_steps_equal_five_and_five_in_every_bit(tmp_path, packed, family, accumulate, monkeypatch):
    stand_in(monkeypatch)
    changes = options(tmp_path, model__family=family, train__accumulate=accumulate, sample__sampler="auto")
    code, unbroken = run(small(tmp_path, run__name="unbroken", **changes))
    assert (code, len(unbroken)) == (0, 10)
    code, first = run(small(tmp_path, run__name="pieces", **changes), stop_after=5)
    assert (code, len(first)) == (143, 5)
    packed.root.rename(tmp_path / "moved")
    code, last = run(small(tmp_path, run__name="pieces", **{**changes, "data__latents": str(tmp_path / "moved")}))
    assert code == 0
    assert first + last == unbroken
    ends = [content(tmp_path / "runs" / name / "checkpoints" / END) for name in ("unbroken", "pieces")]
    assert ends[0] == ends[1]
    assert summary(tmp_path / "runs/unbroken")["frechet_distance"] is None
    model = json.loads((tmp_path / "runs/unbroken/config.json").read_text())["model"]
    assert (model["input_size"], model["channels"], model["classes"]) == (4, 4, 4)


def test_previews_and_samples_are_decoded_by_the_vae_of_the_run(tmp_path, packed, monkeypatch, main):
    vae, names = stand_in(monkeypatch)
    assert train(tmp_path, train__preview_every_images=40)[0] == 0
    assert names == ["a vae"]  # opened once
    previews = sorted((tmp_path / "runs/a/samples").iterdir())
    assert [path.name for path in previews] == ["000000000040.png", f"{END}.png"]
    assert [z.shape for z in vae.given] == [(4, 4, 4, 4)] * 2
    tile = to_uint8(torch.tanh(vae.given[-1][:1, :1]).repeat(1, 3, 2, 2))[0]
    assert np.array_equal(np.asarray(Image.open(previews[-1]))[:32:4, :32:4], tile)  # magnified by four
    assert json.loads((tmp_path / "runs/a/latents.json").read_text()) == {"vae": "a vae", **FACTORS}

    packed.root.rename(tmp_path / "moved")  # sampling needs no data
    words = ["sample", "--out", tmp_path / "out", "--sample.count", "4", "--weights"]
    assert main([*words, tmp_path / "runs/a"])[0] == 0
    assert set(names) == {"a vae"}
    assert np.load(tmp_path / "out/samples.npz")["arr_0"].shape == (4, 8, 8, 3)
    assert main(["export", "--weights", tmp_path / "runs/a", "--out", tmp_path / "ema.safetensors"])[0] == 0
    assert complaint(main([*words, tmp_path / "ema.safetensors"])[1:]).startswith("sra-fast: vae: '' given")


@pytest.mark.parametrize("vae", ["", "another"])
def test_a_vae_that_cannot_be_used_costs_the_preview_alone(tmp_path, vae, capsys, monkeypatch):
    pack(tmp_path / "set", vae=vae)
    stand_in(monkeypatch, channels=16)
    assert train(tmp_path)[0] == 0
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("no preview: vae: ")]
    assert vae in line
    assert list((tmp_path / "runs/a/samples").iterdir()) == []
    assert summary(tmp_path / "runs/a")["images_seen"] == 80


def test_latents_cannot_be_judged(tmp_path, packed, monkeypatch, main):
    with pytest.raises(Refused, match=r"evaluate\.after-training: True given; must be False: latents"):
        train(tmp_path, evaluate__after_training=True)
    assert not (tmp_path / "runs").exists()
    stand_in(monkeypatch)
    assert train(tmp_path, train__images=8)[0] == 0
    code, *output = main(["evaluate", "--weights", tmp_path / "runs/a"])
    assert code == 1
    assert "must be images to be judged" in complaint(output)


def test_packed_pixels_train_and_are_judged_like_images(tmp_path, main):
    pytest.importorskip("sklearn")
    pack(tmp_path / "set", dtype="uint8", shape=(1, 8, 8))
    changes = {"evaluate__after_training": True, "evaluate__samples": 12, "evaluate__min_class_accuracy": 0.0}
    changes |= {"evaluate__min_class_accuracy_guided": 0.0, "evaluate__max_frechet_ratio": 1e9}
    assert train(tmp_path, **changes, evaluate__min_nearest_ratio=0.0)[0] == 0
    figures = summary(tmp_path / "runs/a")
    assert figures["real_accuracy"] > 0.9  # a class is a brightness
    assert figures["frechet_distance"] > 0
    assert not (tmp_path / "runs/a/latents.json").exists()
    preview = Image.open(tmp_path / f"runs/a/samples/{END}.png")
    assert (preview.mode, preview.height) == ("L", 32)
    words = ["evaluate", "--weights", tmp_path / "runs/a", "--evaluate.samples", "12"]
    assert '"class_accuracy"' in main(words)[1]


def test_a_shard_cut_short_ends_the_run_with_what_was_learned(tmp_path, packed, main, refused, monkeypatch):
    original = LatentStream.read_batch
    path = packed.root / "moments-00003.npy"

    def cut(stream, first):
        if first == 32:
            os.truncate(path, 200)
            os.truncate(path.with_name("moments_flip-00003.npy"), 200)
        return original(stream, first)

    monkeypatch.setattr(LatentStream, "read_batch", cut)
    code, *output = main(arguments(tmp_path, **options(tmp_path)))
    assert code == 1
    assert "00003.npy: cut short; row" in complaint(output)
    (saved,) = checkpoints(tmp_path / "runs/a")
    assert 32 <= int(saved) < 80
    assert metrics(tmp_path / "runs/a")[-1]["images_seen"] == int(saved)
    message = refused(arguments(tmp_path, **options(tmp_path)))
    assert str(packed.root) in message
    assert "bytes long; must be" in message
    assert checkpoints(tmp_path / "runs/a") == [saved]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"shape": (8, 8, 8)}, "model.input-size: 8 given, but "),
        ({"seed": 1, "flips": True, **FACTORS}, "data.latents: "),
    ],
)
def test_a_run_goes_on_with_its_own_set_only(tmp_path, packed, refused, monkeypatch, changes, reason):
    stand_in(monkeypatch)
    assert run(small(tmp_path, **options(tmp_path)), stop_after=3)[0] == 143
    for path in packed.root.iterdir():
        path.unlink()
    pack(packed.root, **changes)
    assert refused(arguments(tmp_path, **options(tmp_path))).startswith(f"sra-fast: {reason}")
    assert checkpoints(tmp_path / "runs/a") == ["000000000024"]


@pytest.mark.parametrize(("dtype", "value"), [("float16", np.nan), ("float16", -np.inf), ("float32", np.inf)])
def test_a_row_that_is_not_finite_ends_the_run_by_name(tmp_path, main, dtype, value):
    packed = pack(tmp_path / "set", dtype=dtype)
    path = packed.root / "moments-00003.npy"
    rows = np.load(path)
    rows[:, 1, 2, 3] = value
    np.save(path, rows)
    line = complaint(main(arguments(tmp_path, **options(tmp_path)))[1:])
    assert re.search(r"moments-00003\.npy: row \d+ of the set has a number that is not finite", line)
