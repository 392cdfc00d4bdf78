"""bench_data.py from its words to its file: what cannot be measured costs its own number, or all if it would lie."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

from benchmarks import bench_data
from benchmarks.harness.rows import read, write
from benchmarks.harness.stamp import stamp
from benchmarks.harness.throughput import fastest_step
from benchmarks.harness.timing import GateFailed
from benchmarks.rivals import image_decoders, latent_loaders
from benchmarks.rivals.image_decoders import READERS, THREADS, write_jpegs
from sra_fast.errors import Refused

QUICK = ["--quick", "--device", "cpu"]


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setenv("SRA_FAST_RESULTS", str(tmp_path / "results"))
    return tmp_path / "results" / "data.json"


def row(name, loader):
    figures = {"images_per_s": 9.0, "images_per_cpu_s": 7.0, "median_ms": 1.0, "p20_ms": 1.0, "p80_ms": 1.0}
    return {"name": name, "params": {"loader": loader}, "ours": True, "command": "python", **figures}


@pytest.fixture
def planted(monkeypatch):
    """Benchmarks that take no time; what ran, in order."""
    ran = []

    def bench(name):
        ran.append(name)
        return [row(name, f"ours, {name}")]

    monkeypatch.setattr(bench_data, "write_jpegs", lambda *_: [])
    monkeypatch.setattr(bench_data, "bench_latents", lambda chosen, folder: bench("latents"))
    monkeypatch.setattr(bench_data, "bench_decoding", lambda chosen, files, device: bench(f"decode, {device.type}"))
    monkeypatch.setattr(bench_data, "bench_encoding", lambda chosen, device, folder: bench("encode"))
    monkeypatch.setattr(bench_data, "fastest_step", lambda files: None)
    return ran


@pytest.fixture
def gpu(monkeypatch):
    """A machine that seems to have one."""
    here = stamp("cpu")
    monkeypatch.setattr(bench_data.options, "device", torch.device)
    monkeypatch.setattr(bench_data.timing, "stamp", lambda device: here | {"kind": device.type})


def test_every_loader_and_decoder_gets_its_numbers(results, tmp_path, capsys, monkeypatch):
    pytest.importorskip("nvidia.dali")
    folder = tmp_path / "my own photos"
    write_jpegs(folder / "deeper", 5, shrunk=4)
    (folder / "deeper" / "00000.jpg").rename(folder / "a.JPEG")
    words = ["--quick", "--jpegs", str(folder)]
    monkeypatch.setattr(sys, "orig_argv", ["/somewhere/bin/python", "-m", "benchmarks.bench_data", *words])
    assert bench_data.main([*words, "--device", "cpu"]) == 0
    assert not results.exists()
    results = results.with_name("data-jpegs.json")
    content = read(results)
    found = {(row["name"], row["params"]["loader"]): row for row in content["rows"]}
    latents = ["ours, packed", "ours, public files", *(f"public, {n} workers" for n in latent_loaders.WORKERS)]
    images = [f"ours, {title}, {threads} threads" for title in READERS.values() for threads in THREADS]
    images += [f"Pillow, DataLoader, {n} workers" for n in image_decoders.WORKERS]
    assert images[0] == "ours, Pillow, 1 threads"
    assert list(found) == [("latents", name) for name in latents] + [("decode", name) for name in images]
    for made in found.values():
        batch = made["params"]["batch"]
        assert len(made["samples_ms"]) == len(made["cpu_samples_ms"]) == 2
        assert made["images_per_s"] == pytest.approx(1e3 * batch / made["median_ms"])
        assert made["images_per_cpu_s"] == pytest.approx(1e3 * batch / np.median(made["cpu_samples_ms"]))
    assert found["latents", "ours, packed"]["bytes"] == 16 * 8 * 32 * 32 * 2
    assert found["decode", "ours, DALI, 1 threads"]["params"]["files"] == 5
    text = results.read_text()
    assert str(tmp_path) not in text
    assert "/somewhere" not in text
    assert "photos" not in text
    printed = capsys.readouterr().out
    for name in (*latents, *images):
        assert f"| {name} " in printed
    assert printed.count("x the fastest measured step") <= 1  # of latents, if there are results of steps


def test_quick_writes_no_result_of_its_own(planted, monkeypatch):
    monkeypatch.delenv("SRA_FAST_RESULTS", raising=False)
    monkeypatch.setattr(bench_data.timing, "write", lambda *_: pytest.fail("written"))
    assert bench_data.main(QUICK) == 0
    assert planted == ["latents", "decode, cpu"]


def test_latents_alone_are_held_to_the_fastest_step(planted, results, monkeypatch, capsys):
    params = {"size": "s", "tokens": 256, "batch": 8, "rung": "ours"}
    step = {"name": "step", "params": params, "device": "a GPU", "images_per_s": 3.0}
    monkeypatch.setattr(bench_data, "fastest_step", lambda files: step)
    assert bench_data.main(QUICK) == 0
    printed = capsys.readouterr().out
    assert "ours, latents 3 x the fastest measured step (SiT-S/2, 256 tokens, batch 8 on a GPU" in printed
    assert printed.count("fastest measured step") == 1


@pytest.mark.parametrize("broken", ["bench_latents", "bench_decoding"])
def test_a_gate_that_fails_leaves_no_result(planted, results, monkeypatch, capsys, broken):
    def fail(*_):
        raise GateFailed("ours: pixels are off")

    monkeypatch.setattr(bench_data, broken, fail)
    assert bench_data.main([*QUICK, "--vae", "any"]) == 1
    assert capsys.readouterr().out == "no number: ours: pixels are off\n"
    assert "encode" not in planted
    assert not results.parent.exists()


def test_an_unknown_vae_costs_only_its_own_number(planted, results, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench_data, "bench_encoding", image_decoders.bench_encoding)
    assert bench_data.main([*QUICK, "--vae", str(tmp_path / "none")]) == 1
    printed = capsys.readouterr().out
    assert printed.startswith("not run: vae: ")
    assert f"raw samples in {results}" in printed
    assert [row["name"] for row in read(results)["rows"]] == ["latents", "decode, cpu"]


def test_a_vae_is_measured_where_one_is_named(planted, results):
    assert bench_data.main([*QUICK, "--vae", "any"]) == 0
    assert [row["name"] for row in read(results)["rows"]] == ["latents", "decode, cpu", "encode"]


def test_on_a_gpu_both_decode_and_the_encoder_is_measured_in_any_case(planted, gpu, results):
    assert bench_data.main(["--quick", "--device", "cuda"]) == 0
    content = read(results)
    assert [row["name"] for row in content["rows"]] == ["latents", "decode, cpu", "decode, cuda", "encode"]
    assert content["stamp"]["kind"] == "cuda"


def test_without_diffusers_a_gpu_lacks_the_encoder_alone(planted, gpu, results, monkeypatch, capsys):
    """Which is no failure, as no VAE was asked for."""
    monkeypatch.setitem(sys.modules, "diffusers", None)
    monkeypatch.setattr(bench_data, "bench_encoding", image_decoders.bench_encoding)
    assert bench_data.main(["--quick", "--device", "cuda"]) == 0
    assert "encoder not run: needs `pip install diffusers`" in capsys.readouterr().out
    assert [row["name"] for row in read(results)["rows"]] == ["latents", "decode, cpu", "decode, cuda"]


def test_where_no_part_can_run_nothing_is_written(planted, results, monkeypatch, capsys):
    def fail(*_):
        raise Refused("not here")

    for part in ("bench_latents", "bench_decoding"):
        monkeypatch.setattr(bench_data, part, fail)
    assert bench_data.main(["--quick", "--device", "cpu"]) == 1
    assert capsys.readouterr().out == 2 * "not run: not here\n"
    assert not results.exists()


@pytest.mark.parametrize(
    "error", [Refused("first line\nsecond"), torch.OutOfMemoryError("first line\nsecond")], ids=["refused", "memory"]
)
@pytest.mark.parametrize(
    ("broken", "lost"),
    [
        ("bench_latents", ["latents"]),
        ("bench_decoding", ["decode, cpu", "decode, cuda"]),
        ("bench_encoding", ["encode"]),
    ],
)
def test_a_part_that_cannot_run_costs_only_its_own_numbers(
    planted, gpu, results, monkeypatch, capsys, broken, lost, error
):
    def fail(*_):
        raise error

    monkeypatch.setattr(bench_data, broken, fail)
    assert bench_data.main(["--quick", "--device", "cuda"]) == 1
    printed = capsys.readouterr().out
    assert printed.startswith("not run: first line\n" * len(lost))
    assert "second" not in printed
    found = [row["name"] for row in read(results)["rows"]]
    assert found == [name for name in ("latents", "decode, cpu", "decode, cuda", "encode") if name not in lost]


def test_a_gate_that_fails_after_a_part_that_cannot_run_leaves_no_result(planted, results, monkeypatch, capsys):
    def fail(error):
        raise error

    monkeypatch.setattr(bench_data, "bench_latents", lambda *_: fail(Refused("too few")))
    monkeypatch.setattr(bench_data, "bench_decoding", lambda *_: fail(GateFailed("pixels")))
    assert bench_data.main(QUICK) == 1
    assert capsys.readouterr().out == "not run: too few\nno number: pixels\n"
    assert not results.parent.exists()


def test_a_damaged_jpeg_costs_the_decoders_alone(planted, results, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench_data, "bench_decoding", image_decoders.bench_decoding)
    files = write_jpegs(tmp_path / "photos", 2, shrunk=8)
    files[1].write_bytes(files[1].read_bytes()[:400])
    assert bench_data.main([*QUICK, "--jpegs", str(tmp_path / "photos")]) == 1
    printed = capsys.readouterr().out.splitlines()
    said = [line for line in printed if line.startswith("not run: ")]
    assert len(said) == 1
    assert said[0].startswith(f"not run: --jpegs: {files[1]}: cannot be decoded (")
    assert [row["name"] for row in read(results.with_name("data-jpegs.json"))["rows"]] == ["latents"]


def test_folders_are_no_jpegs(planted, results, tmp_path, monkeypatch):
    found = []
    monkeypatch.setattr(bench_data, "bench_decoding", lambda chosen, files, device: found.extend(files) or [])
    place = tmp_path / "photos" / "all.jpg"
    names = ("b.jpg", "a.JPEG", "c.jpeg", "notes.txt", "jpg")
    (place / "none.JPEG").mkdir(parents=True)
    for name in names:
        (place / name).write_bytes(b"")
    assert bench_data.main([*QUICK, "--jpegs", str(tmp_path / "photos")]) == 0
    assert found == [place / name for name in ("a.JPEG", "b.jpg", "c.jpeg")]


def test_the_steps_of_the_same_report_count_too(planted, results, tmp_path, monkeypatch, capsys):
    """Whose parts each have a folder beside this one's."""
    params = {"size": "s", "tokens": 256, "batch": 8, "rung": "ours"}

    def kept(folder, name, speed):
        made = {"name": "step", "params": params, "device": "a GPU", "images_per_s": speed}
        write(folder, name, [made], {})

    monkeypatch.setattr(bench_data, "fastest_step", fastest_step)
    monkeypatch.setattr(bench_data, "RESULTS", tmp_path / "committed" / "all")
    assert bench_data.main(QUICK) == 0
    assert "fastest measured step" not in capsys.readouterr().out
    kept(tmp_path / "committed" / "all" / "h200-a", "step-s-256-8", 1.0)
    assert bench_data.main(QUICK) == 0
    assert "ours, latents 9 x the fastest measured step" in capsys.readouterr().out
    kept(tmp_path / "03-bench_step", "step-s-256-8", 3.0)
    kept(tmp_path / "03-bench_step", "other", 9.0)
    kept(tmp_path / "03-bench_step" / "deeper", "step", 9.0)
    assert bench_data.main(QUICK) == 0
    assert "ours, latents 3 x the fastest measured step" in capsys.readouterr().out
    monkeypatch.delenv("SRA_FAST_RESULTS")
    assert bench_data.main(QUICK) == 0
    assert "ours, latents 9 x the fastest measured step" in capsys.readouterr().out


def test_what_cannot_be_measured_is_refused(planted, results, tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("a.jpg")
    for words, said in ((["--rows", "8"], "--rows: 8 given"), (["--jpegs", str(tmp_path)], "has no .jpg or .jpeg")):
        with pytest.raises(SystemExit) as ended:
            bench_data.main([*words, "--device", "cpu"])
        assert ended.value.code == 2
        assert said in capsys.readouterr().err
    assert planted == []
    assert not results.parent.exists()
