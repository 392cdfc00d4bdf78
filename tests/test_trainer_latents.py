"""Whole runs on latents and packed pixels: the same bits after a resume, previews, samples, and what is refused."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
import torch
from PIL import Image
from small_data import change, pack, publish, stand_in
from small_run import arguments, checkpoints, complaint, content, metrics, run, small, summary

from sra_fast.data.latent_stream import LatentStream
from sra_fast.errors import Refused
from sra_fast.kernels.perturb import clean_ref
from sra_fast.sampling.images import to_uint8
from sra_fast.training.trainer import Trainer

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
    code, whole = run(small(tmp_path, run__name="whole", **changes))
    assert (code, len(whole)) == (0, 10)
    code, first = run(small(tmp_path, run__name="pieces", **changes), stop_after=5)
    assert (code, len(first)) == (143, 5)
    code, last = run(small(tmp_path, run__name="pieces", **changes))
    assert code == 0
    assert first + last == whole
    ends = [content(tmp_path / "runs" / name / "checkpoints" / END) for name in ("whole", "pieces")]
    assert ends[0] == ends[1]
    said = summary(tmp_path / "runs/whole")
    assert np.isfinite(said["velocity_loss"])
    assert said["frechet_distance"] is None
    config = json.loads((tmp_path / "runs/whole/config.json").read_text())
    assert (config["model"]["input_size"], config["model"]["channels"], config["model"]["classes"]) == (4, 4, 4)


def test_steps_see_posteriors_sampled_and_scaled_per_channel(tmp_path, packed):
    trainer = Trainer(small(tmp_path, **options(tmp_path)), report=lambda line: None)
    with LatentStream(trainer.source.train, seed=0, batch=8, first_image=0) as stream:
        batch = next(stream)
    seen = trainer.step.perturb(batch)
    x = clean_ref(batch.x, batch.number, 0, trainer.source.stored)
    t = seen.t.view(-1, 1, 1, 1)
    noise = (seen.x_t - (1 - t) * x) / t
    assert torch.allclose(seen.target, noise - x, atol=2e-3)
    means = batch.x.float().chunk(2, 1)[0]
    assert not torch.allclose(x, (means - trainer.source.stored.shift.view(-1, 1, 1)), atol=0.1)


def test_previews_go_through_the_vae(tmp_path, packed, monkeypatch):
    vae, names = stand_in(monkeypatch)
    assert train(tmp_path, train__preview_every_images=40)[0] == 0
    assert names == ["a vae"]  # opened once
    previews = sorted((tmp_path / "runs/a/samples").iterdir())
    assert [path.name for path in previews] == ["000000000040.png", "000000000080.png"]
    assert {len(z) for z in vae.given} == {4}
    assert vae.given[0].shape == (4, 4, 4, 4)
    tile = to_uint8(torch.tanh(vae.given[-1][:1, :1]).repeat(1, 3, 2, 2))[0]
    shown = np.asarray(Image.open(previews[-1]))[:32:4, :32:4]  # magnified by four
    assert np.array_equal(shown, tile)
    note = json.loads((tmp_path / "runs/a/latents.json").read_text())
    assert note == {"vae": "a vae", **FACTORS}


@pytest.mark.parametrize("vae", ["", "nowhere at all", "another"])
def test_a_vae_that_cannot_serve_costs_the_preview_alone(tmp_path, vae, capsys, monkeypatch):
    pack(tmp_path / "set", vae=vae)
    if vae == "another":
        stand_in(monkeypatch, channels=16)
    assert train(tmp_path)[0] == 0
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("no preview: vae: ")]
    assert len(said) == 1
    assert vae in said[0]
    assert list((tmp_path / "runs/a/samples").iterdir()) == []
    assert summary(tmp_path / "runs/a")["images_seen"] == 80


def test_samples_are_decoded_in_the_run_s_space(tmp_path, packed, monkeypatch, main):
    vae, names = stand_in(monkeypatch)
    assert train(tmp_path, data__vae="of the run")[0] == 0
    packed.root.rename(tmp_path / "moved")  # sampling needs no data
    words = ["sample", "--out", tmp_path / "out", "--sample.count", "4", "--sample.sampler", "heun"]
    words += ["--sample.steps", "2", "--weights"]
    exported = tmp_path / "ema.safetensors"
    assert main(["export", "--weights", tmp_path / "runs/a", "--out", exported])[0] == 0
    decoded = {}
    for weights, named in (
        (tmp_path / "runs/a", ""),
        (tmp_path / "runs/a/checkpoints" / END, "mine"),
        (exported, "mine"),
    ):
        vae.given.clear()
        names.clear()
        code, _, error = main([*words, weights, *(["--vae", named] if named else [])])
        assert code == 0, error
        assert set(names) == {named or "of the run"}
        decoded[weights] = torch.cat(vae.given)
    own, same, other = decoded.values()
    assert torch.equal(own, same)
    shift, scale = (torch.tensor(FACTORS[name])[:, None, None] for name in ("shift", "scale"))
    x = (own - shift) * scale
    assert torch.allclose(other, x / vae.scale + vae.shift, atol=1e-4)
    pixels = np.load(tmp_path / "out/samples.npz")["arr_0"]
    assert pixels.shape == (4, 8, 8, 3)
    assert complaint(main([*words, exported])[1:]).startswith("sra-fast: vae: '' given; must be named")


def test_latents_cannot_be_judged(tmp_path, packed, monkeypatch, main):
    with pytest.raises(Refused, match=r"evaluate\.after-training: True given; must be False: latents"):
        train(tmp_path, evaluate__after_training=True)
    assert not (tmp_path / "runs").exists()
    stand_in(monkeypatch)
    assert train(tmp_path)[0] == 0
    code, output, error = main(["evaluate", "--weights", tmp_path / "runs/a"])
    assert code == 1
    assert "must be images to be judged" in complaint((output, error))


def test_packed_pixels_train_and_are_judged_like_images(tmp_path, main):
    pytest.importorskip("sklearn")
    pack(tmp_path / "set", dtype="uint8", shape=(1, 8, 8))
    changes = {"evaluate__after_training": True, "evaluate__samples": 12, "evaluate__min_class_accuracy": 0.0}
    changes |= {"evaluate__min_class_accuracy_guided": 0.0, "evaluate__max_frechet_ratio": 1e9}
    assert train(tmp_path, **changes, evaluate__min_nearest_ratio=0.0)[0] == 0
    said = summary(tmp_path / "runs/a")
    assert said["real_accuracy"] > 0.9  # a class is a brightness
    assert said["frechet_distance"] > 0
    assert not (tmp_path / "runs/a/latents.json").exists()
    shown = Image.open(tmp_path / f"runs/a/samples/{END}.png")
    assert (shown.mode, shown.height) == ("L", 32)
    words = ["evaluate", "--weights", tmp_path / "runs/a", "--evaluate.samples", "12"]
    assert '"class_accuracy"' in main(words)[1]


def test_the_public_layout_trains_as_it_is(tmp_path):
    publish(tmp_path / "set")
    code, rows = train(tmp_path, train__batch=4, train__images=12)
    assert (code, len(rows)) == (0, 3)
    assert json.loads((tmp_path / "runs/a/latents.json").read_text())["scale"] == 0.18215


def test_a_shard_cut_short_ends_the_run_with_what_was_learned(tmp_path, packed, main, monkeypatch):
    make = LatentStream.read_batch
    path = packed.root / "moments-00003.npy"

    def cut(stream, first):
        if first == 32:
            os.truncate(path, 200)
            os.truncate(path.with_name("moments_flip-00003.npy"), 200)
        return make(stream, first)

    monkeypatch.setattr(LatentStream, "read_batch", cut)
    code, output, error = main(arguments(tmp_path, **options(tmp_path)))
    assert code == 1
    said = complaint((output, error))
    assert "00003.npy: cut short; row" in said
    (saved,) = checkpoints(tmp_path / "runs/a")
    assert 32 <= int(saved) < 80
    assert metrics(tmp_path / "runs/a")[-1]["images_seen"] == int(saved)
    said = complaint(main(arguments(tmp_path, **options(tmp_path)))[1:])
    assert str(packed.root) in said
    assert "bytes long; must be" in said
    assert checkpoints(tmp_path / "runs/a") == [saved]


def damaged(edit):
    return lambda root: change(root, edit)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda root: (root / "manifest.json").unlink(), "unfinished"),
        (lambda root: (root / "labels-00001.npy").unlink(), "labels-00001.npy: cannot be read"),
        (
            lambda root: os.truncate(root / "moments-00001.npy", 500),
            "moments-00001.npy: cannot be read (500",
        ),
        (damaged(lambda m: m.update(scale=[1, 2])), "scale: (1.0, 2.0) given"),
        (damaged(lambda m: m.update(format_version=9)), "format_version: 9 given"),
        (damaged(lambda m: m["classes"].append("zebra")), "class 4 (zebra) has no images"),
    ],
)
def test_a_set_that_cannot_serve_is_refused_before_anything_is_written(tmp_path, packed, refused, spoil, said):
    spoil(packed.root)
    message = refused(arguments(tmp_path, **options(tmp_path)))
    assert str(packed.root) in message
    assert said in message
    assert not (tmp_path / "runs").exists()


def test_a_set_of_another_resolution_is_refused(tmp_path, packed, refused, monkeypatch):
    stand_in(monkeypatch)
    assert run(small(tmp_path, **options(tmp_path)), stop_after=3)[0] == 143
    before = checkpoints(tmp_path / "runs/a")
    for path in packed.root.iterdir():
        path.unlink()
    pack(packed.root, shape=(8, 8, 8))
    assert refused(arguments(tmp_path, **options(tmp_path))).startswith("sra-fast: model.input-size: 8 given, but ")
    wrong = arguments(tmp_path, **options(tmp_path, model__input_size=4))
    assert refused(wrong).startswith("sra-fast: model.input-size: 4 given; must be 8")
    for path in packed.root.iterdir():
        path.unlink()
    pack(packed.root, seed=1, flips=True, **FACTORS)
    message = refused(arguments(tmp_path, **options(tmp_path)))
    assert message.startswith(f"sra-fast: data.latents: {str(packed.root)!r} has other files or classes than ")
    assert checkpoints(tmp_path / "runs/a") == before


def test_a_set_may_move_between_two_parts_of_a_run(tmp_path, packed, monkeypatch):
    stand_in(monkeypatch)
    assert run(small(tmp_path, **options(tmp_path)), stop_after=3)[0] == 143
    packed.root.rename(tmp_path / "moved")
    code, rows = run(small(tmp_path, data__images="", data__latents=str(tmp_path / "moved")))
    assert (code, len(rows)) == (0, 7)
