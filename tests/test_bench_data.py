"""bench_data.py: both sides deliver the same or get no number, and CPU time is that of workers too."""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch

from benchmarks import bench_data
from benchmarks.bench_data import Candidate, PublicFiles, cpu_s, measure, report, same_pixels, write_jpegs, write_sets
from benchmarks.record import read
from benchmarks.timing import GateFailed
from sra_fast.data.images import DaliDecoder
from sra_fast.data.latent_stream import LatentStream
from sra_fast.data.latents import open_moments

CPU = torch.device("cpu")


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setenv("SRA_FAST_RESULTS", str(tmp_path / "results"))
    return tmp_path / "results" / "data.json"


def test_every_loader_and_decoder_gets_its_numbers(results, tmp_path, capsys, monkeypatch):
    pytest.importorskip("nvidia.dali")
    folder = tmp_path / "my own photos"
    write_jpegs(folder, 5, shrunk=4)
    words = ["--quick", "--jpegs", str(folder)]
    monkeypatch.setattr(sys, "orig_argv", ["/somewhere/bin/python", "-m", "benchmarks.bench_data", *words])
    assert bench_data.main([*words, "--device", "cpu"]) == 0
    assert not results.exists()
    results = results.with_name("data-jpegs.json")
    content = read(results)
    found = {(row["name"], row["params"]["loader"]): row for row in content["rows"]}
    latents = ["ours, packed", "ours, public files", *(f"public, {n} workers" for n in (0, 1, 2))]
    cores = min(8, os.cpu_count())
    images = [f"ours, DALI, {threads} threads" for threads in sorted({1, cores})]
    images += [f"ours, Pillow, {cores} threads", *(f"Pillow, DataLoader, {n} workers" for n in (0, 1, 2))]
    assert list(found) == [("latents", name) for name in latents] + [("decode", name) for name in images]
    for row in found.values():
        batch = row["params"]["batch"]
        assert len(row["samples_ms"]) == len(row["cpu_samples_ms"]) == 2
        assert row["images_per_s"] == pytest.approx(1e3 * batch / row["median_ms"])
        assert row["images_per_cpu_s"] == pytest.approx(1e3 * batch / np.median(row["cpu_samples_ms"]))
    assert found["latents", "ours, packed"]["bytes"] == 16 * 8 * 32 * 32 * 2
    assert found["decode", "ours, DALI, 1 threads"]["params"]["files"] == 5
    text = results.read_text()
    assert str(tmp_path) not in text
    assert "/somewhere" not in text
    assert "photos" not in text
    printed = capsys.readouterr().out
    for name in (*latents, *images):
        assert f"| {name} " in printed


def test_quick_writes_no_result_of_its_own(tmp_path, monkeypatch):
    monkeypatch.delenv("SRA_FAST_RESULTS", raising=False)
    monkeypatch.setattr(bench_data.timing, "write", lambda *_: pytest.fail("written"))
    monkeypatch.setattr(bench_data, "bench_decoding", lambda *_: [])
    monkeypatch.setattr(bench_data, "WORKERS", (0,))
    assert bench_data.main(["--quick", "--device", "cpu"]) == 0


def test_both_sets_hold_the_same_rows_and_labels(tmp_path):
    write_sets(tmp_path, 40)
    packed, files, public = (
        open_moments(tmp_path / "packed"),
        open_moments(tmp_path / "public"),
        PublicFiles(tmp_path / "public"),
    )
    x = packed.gather(np.arange(40)).float()
    assert torch.equal(x, files.gather(np.arange(40)))
    assert torch.equal(x, torch.stack([public[row][0] for row in range(40)]))
    assert [int(public[row][1]) for row in range(40)] == packed.labels.tolist() == list(range(40))
    assert public[0][0].dtype == torch.float32
    assert x[0].numel() == 8192


def spoiled_order(monkeypatch):
    order = LatentStream._order
    monkeypatch.setattr(LatentStream, "_order", lambda stream, first: order(stream, first + 1))


def spoiled_labels(monkeypatch):
    make = LatentStream.make

    def other(stream, first):
        batch, replaced = make(stream, first)
        batch.labels[3] += 1
        return batch, replaced

    monkeypatch.setattr(LatentStream, "make", other)


def spoiled_values(monkeypatch):
    get = PublicFiles.__getitem__
    monkeypatch.setattr(
        PublicFiles, "__getitem__", lambda files, row: (get(files, row)[0] + (row == 9), get(files, row)[1])
    )


@pytest.mark.parametrize("spoil", [spoiled_order, spoiled_labels, spoiled_values])
def test_a_loader_of_other_rows_gets_no_number(results, monkeypatch, capsys, spoil):
    spoil(monkeypatch)
    monkeypatch.setattr(bench_data, "measure", lambda *_: pytest.fail("measured"))
    assert bench_data.main(["--quick", "--device", "cpu"]) == 1
    assert "no number: ours, packed: batch" in capsys.readouterr().out
    assert not results.exists()


def test_a_decoder_of_other_pixels_gets_no_number(results, monkeypatch, capsys):
    pytest.importorskip("nvidia.dali")
    decode = DaliDecoder.decode
    monkeypatch.setattr(DaliDecoder, "decode", lambda decoder, files: decode(decoder, files).roll(1, -1))
    monkeypatch.setattr(bench_data, "bench_latents", lambda *_: [])
    assert bench_data.main(["--quick", "--device", "cpu"]) == 1
    assert re.search(r"no number: ours, DALI, 1 threads: pixels are off by \d", capsys.readouterr().out)


def test_the_gate_on_pixels_is_half_a_level_and_a_whole_one_for_an_image():
    x = torch.zeros(4, 3, 8, 8)
    assert same_pixels("a", x + 0.4 / 127.5, x) == pytest.approx(0.4, rel=1e-3)
    for off in (torch.full((4, 1, 1, 1), 0.6), torch.tensor([1.1, 0, 0, 0])[:, None, None, None]):
        with pytest.raises(GateFailed):
            same_pixels("a", x + off / 127.5, x)
    with pytest.raises(GateFailed):
        same_pixels("a", x * float("nan"), x)


def test_without_dali_pillow_is_measured_alone(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    monkeypatch.setattr(bench_data, "WORKERS", (0,))
    chosen = argparse.Namespace(resolution=32, decode_batch=2, passes=1, repeats=1, jpegs=None, vae=None)
    made = bench_data.bench_decoding(chosen, write_jpegs(tmp_path, 2, shrunk=8), CPU)
    threads = f"ours, Pillow, {min(8, os.cpu_count())} threads"
    assert [row["params"]["loader"] for row in made] == [threads, "Pillow, DataLoader, 0 workers"]
    assert "DALI not run" in capsys.readouterr().out


def test_cpu_time_is_that_of_the_process_and_of_children_that_have_ended():
    before = cpu_s()
    sum(range(3_000_000))
    own = cpu_s() - before
    assert own > 0.005
    subprocess.run([sys.executable, "-S", "-c", "sum(range(10_000_000))"], check=True)
    assert cpu_s() - before > 2 * own


def test_candidates_take_turns_and_are_warmed_up_first():
    calls = []
    found = {name: Candidate(lambda name=name: calls.append(name) or 5, True, {}) for name in "abc"}
    taken = measure(found, 3, CPU)
    assert "".join(calls) == "abc" + "abc" + "bca" + "cab"
    assert {name: [one.images for one in samples] for name, samples in taken.items()} == dict.fromkeys("abc", [5] * 3)


def row(loader, speed, ours, name="latents"):
    figures = {"images_per_s": speed, "images_per_cpu_s": 2 * speed, "median_ms": 1.0, "p20_ms": 1.0, "p80_ms": 1.0}
    return {"name": name, "params": {"loader": loader, "batch": 1}, "ours": ours, **figures}


def test_the_goal_is_against_the_best_rival():
    made = [row("ours, packed", 300, True), row("public, 0 workers", 10, False), row("public, 2 workers", 16, False)]
    assert "images_per_cpu_s: ours, packed 18.75 x the best rival; goal 20: missed\n" in report(made)
    assert "images_per_s: ours, packed 18.75 x the best rival\n" in report(made)
    made[2] = row("public, 2 workers", 15, False)
    assert "ours, packed 20.00 x the best rival; goal 20: reached" in report(made)
    assert "goal" not in report([row("AutoencoderKL", 3, True, "encode")])


def test_an_encoder_has_its_rate(results, tmp_path, monkeypatch):
    from small_vae import save_kl

    vae = save_kl(tmp_path / "vae")
    chosen = argparse.Namespace(vae=str(vae), decode_batch=4, resolution=16, repeats=2, jpegs=None)
    (made,) = bench_data.bench_encoding(chosen, CPU)
    assert (made["name"], made["params"]["loader"], len(made["samples_ms"])) == ("encode", "AutoencoderKL", 2)
    assert str(tmp_path) not in json.dumps(made)


def test_what_cannot_be_measured_is_refused(tmp_path, capsys):
    for words, said in ((["--rows", "8"], "--rows: 8 given"), (["--jpegs", str(tmp_path)], "has no .jpg or .jpeg")):
        with pytest.raises(SystemExit):
            bench_data.main(words)
        assert said in capsys.readouterr().err


def test_made_up_jpegs_have_the_sizes_of_imagenet(tmp_path):
    from PIL import Image

    paths = write_jpegs(tmp_path, 8)
    assert [Image.open(path).size for path in paths] == list(bench_data.SIDES)
    assert 50_000 < np.mean([path.stat().st_size for path in paths]) < 300_000
