"""Samples of two origins never mix in a folder."""

from __future__ import annotations

import json

import pytest
from small_data import pack, stand_in
from small_run import run, small, write_images


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    root = tmp_path_factory.mktemp("trained")
    write_images(root / "data")
    assert run(small(root))[0] == 0
    return root / "runs/a"


def words(trained, out, count, *more):
    settings = ["--sample.sampler", "heun", "--sample.steps", "2", "--sample.count", count]
    return ["sample", "--weights", trained, "--out", out, *settings, *more]


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_the_same_job_leaves_what_it_made_and_nothing_else(main, trained, tmp_path):
    out = tmp_path / "out"
    assert main(words(trained, out, 5))[0] == 0
    (out / "notes.txt").write_text("mine")
    (out / "images/photo.png").write_text("mine")
    assert main(words(trained, out, 2, "--no-npz", "--grid", "0"))[0] == 0
    assert files(out) == ["images/000000.png", "images/000001.png", "images/photo.png", "notes.txt", "samples.json"]
    assert main(words(trained, out, 3, "--sample.batch", "1"))[0] == 0
    assert [name for name in files(out) if name.startswith("images/0")] == [f"images/{i:06d}.png" for i in range(3)]


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        (["--sample.seed", "1"], "seed: 0, now 1"),
        (["--sample.guidance", "2"], "guidance: 1.0, now 2.0"),
        (["--classes", "c1"], "classes: [0, 1, 2, 3], now [1]"),
        (["--weights-key", "model"], "weights: "),
    ],
)
def test_another_job_is_refused_until_it_is_told_to_replace(main, refused, trained, tmp_path, change, difference):
    out = tmp_path / "out"
    main(words(trained, out, 4))
    before = {name: (out / name).read_bytes() for name in files(out)}
    assert difference in refused(words(trained, out, 2, *change))
    assert {name: (out / name).read_bytes() for name in files(out)} == before
    assert main(words(trained, out, 2, *change, "--overwrite"))[0] == 0
    assert len(list((out / "images").iterdir())) == 2


@pytest.mark.parametrize("spoil", ["no origin", "damaged", "not an object"])
def test_samples_of_unknown_origin_are_refused(main, refused, trained, tmp_path, spoil):
    out = tmp_path / "out"
    main(words(trained, out, 2))
    path = out / "samples.json"
    path.unlink() if spoil == "no origin" else path.write_text("{" if spoil == "damaged" else json.dumps([]))
    assert str(out) in refused(words(trained, out, 2))


def test_another_scale_of_latents_is_another_origin(main, refused, tmp_path, monkeypatch):
    stand_in(monkeypatch)
    pack(tmp_path / "set", vae="a vae")
    run_on_latents = small(tmp_path, data__images="", data__latents=str(tmp_path / "set"))
    assert run(run_on_latents)[0] == 0
    trained = tmp_path / "runs/a"
    assert main(words(trained, tmp_path / "out", 2))[0] == 0
    latents = json.loads((trained / "latents.json").read_text())
    (trained / "latents.json").write_text(json.dumps({**latents, "scale": 0.5}))
    assert "scale: 0.9, now 0.5" in refused(words(trained, tmp_path / "out", 2))
    (trained / "latents.json").write_text(json.dumps({**latents, "scale": True}))
    assert "latents.json: must have vae, scale and shift" in refused(words(trained, tmp_path / "out", 2, "--overwrite"))
