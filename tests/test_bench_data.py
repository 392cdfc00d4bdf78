"""Loaders and decoders get a number only if they deliver the same rows and pixels; a part that cannot be measured costs
only its own numbers."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys

import pytest
import torch
from torch.utils.data import get_worker_info

from benchmarks import bench_data
from benchmarks.bench_data import (
    DECODER_WORKERS,
    LOADER_WORKERS,
    READERS,
    THREADS,
    Candidate,
    bench_decoding,
    bench_encoding,
    bench_latents,
    check_pixels,
    write_jpegs,
)
from benchmarks.harness.rows import read, stamp
from benchmarks.rivals.loaders import PublicFiles
from sra_fast.data.decoders import PillowDecoder
from sra_fast.data.latent_stream import LatentStream
from sra_fast.errors import Refused
from sra_fast.tuning.timing import GateFailed

CPU = torch.device("cpu")


def options(**changes):
    values = {"rows": 40, "batch": 16, "resolution": 32, "decode_batch": 2, "passes": 1, "repeats": 2}
    return argparse.Namespace(**values | {"jpegs": None, "vae": None} | changes)


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setenv("SRA_FAST_RESULTS", str(tmp_path / "results"))
    return tmp_path / "results" / "data.json"


@pytest.fixture
def unmeasured(monkeypatch):
    """Candidates by name, without measuring them."""
    seen = {}
    monkeypatch.setattr(bench_data, "measure_rows", lambda name, candidates, *_: seen.update(candidates) or [])
    return seen


def test_cpu_time_includes_children_that_have_ended():
    clock = bench_data.ThroughputClock(CPU)
    command = [sys.executable, "-S", "-c", "sum(range(10_000_000))"]
    wall, cpu = clock.sample(lambda: subprocess.run(command, check=True))
    assert wall > cpu / 2 > 10


def test_a_row_has_times_of_a_batch_and_the_rates_of_both_clocks(monkeypatch, tmp_path):
    samples = iter([(1000.0, 4000.0), (4000.0, 4000.0), (3000.0, 8000.0)])  # ms by either clock, for 20 images
    monkeypatch.setattr(bench_data.ThroughputClock, "sample", lambda *_: next(samples))
    monkeypatch.setattr(sys, "orig_argv", ["/bin/python", "-m", "x", "--jpegs", str(tmp_path), "--vae", "org/name"])
    candidates = {"a": Candidate(int, 20, False, {"batch": 5}, 0.25)}
    (row,) = bench_data.measure_rows("decode", candidates, options(repeats=3, jpegs=tmp_path, vae="org/name"), CPU, 7)
    assert row["samples_ms"] == [250, 1000, 750]
    assert row["cpu_samples_ms"] == [1000, 1000, 2000]
    assert (row["images_per_s"], row["images_per_cpu_s"]) == (pytest.approx(20 / 3), 5)
    assert (row["name"], row["params"], row["ours"]) == ("decode", {"loader": "a", "batch": 5}, False)
    assert (row["bytes"], row["levels_off"]) == (35, 0.25)
    assert row["command"] == "python -m x --jpegs DIR --vae org/name"


def test_images_are_counted_as_they_come(tmp_path, unmeasured):
    """Two whole batches of the forty rows, which all differ."""
    bench_latents(options(), tmp_path)
    public = PublicFiles(tmp_path / "public")
    assert len(torch.stack([public[row][0] for row in range(40)]).flatten(1).unique(dim=0)) == 40
    assert {name: candidate.images for name, candidate in unmeasured.items()} == {
        "ours, packed": 8 * 32,
        "ours, public files": 32,
        **{f"public, {workers} workers": 32 for workers in LOADER_WORKERS},
    }


def spoil_labels(monkeypatch):
    read_batch = LatentStream.read_batch

    def spoiled(stream, first):
        batch, replaced = read_batch(stream, first)
        batch.labels[3] += 1
        return batch, replaced

    monkeypatch.setattr(LatentStream, "read_batch", spoiled)


def spoil_values_of_workers(monkeypatch):
    get = PublicFiles.__getitem__

    def spoiled(files, row):
        moments, label = get(files, row)
        return moments + (get_worker_info() is not None), label

    monkeypatch.setattr(PublicFiles, "__getitem__", spoiled)


@pytest.mark.parametrize(
    ("spoil", "name"), [(spoil_labels, "ours, packed"), (spoil_values_of_workers, "public, 1 workers")]
)
def test_a_loader_of_other_rows_gets_no_number(tmp_path, monkeypatch, unmeasured, spoil, name):
    spoil(monkeypatch)
    with pytest.raises(GateFailed, match=f"^{name}: batch [01] has other rows"):
        bench_latents(options(rows=32), tmp_path)
    assert not unmeasured


def test_the_gate_on_pixels_is_half_a_level_and_a_whole_one_for_an_image():
    x = torch.zeros(4, 3, 8, 8)
    assert check_pixels("a", x + 0.4 / 127.5, x) == pytest.approx(0.4, rel=1e-3)
    nan = torch.full((4, 1, 1, 1), float("nan"))
    for off in (torch.full((4, 1, 1, 1), 0.6), torch.tensor([1.1, 0, 0, 0])[:, None, None, None], nan):
        with pytest.raises(GateFailed):
            check_pixels("a", x + off / 127.5, x)


def test_a_decoder_of_other_pixels_gets_no_number(tmp_path, monkeypatch, unmeasured):
    """Though only one image in the second batch is wrong."""
    decode = PillowDecoder.decode
    files = write_jpegs(tmp_path, 3, divisor=8)

    def spoiled(self, batch):
        x = decode(self, batch)
        return x.roll(4, -1) if batch == [files[2].read_bytes()] else x

    monkeypatch.setattr(PillowDecoder, "decode", spoiled)
    with pytest.raises(GateFailed, match=r"^ours, Pillow, 1 threads: pixels are off by \d"):
        bench_decoding(options(), files, CPU)
    assert not unmeasured


def test_a_sample_is_all_files_in_every_pass(tmp_path, monkeypatch, unmeasured, capsys):
    """With a last batch that is not full; without DALI, Pillow is measured alone."""
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    monkeypatch.setattr(bench_data, "DECODER_WORKERS", (0,))
    bench_decoding(options(passes=2), write_jpegs(tmp_path, 3, divisor=8), CPU)
    assert "DALI not run" in capsys.readouterr().out
    assert list(unmeasured) == [*(f"ours, Pillow, {n} threads" for n in THREADS), "Pillow, DataLoader, 0 workers"]
    decoded, decode = [], PillowDecoder.decode
    monkeypatch.setattr(PillowDecoder, "decode", lambda self, batch: decoded.extend(batch) or decode(self, batch))
    for candidate in unmeasured.values():
        candidate.run()
        assert candidate.images == 6
        assert (candidate.levels_off is None) != candidate.ours
    assert len(decoded) == 6 * len(THREADS)


def test_a_damaged_jpeg_is_named(tmp_path, unmeasured):
    files = write_jpegs(tmp_path, 3, divisor=8)
    files[1].write_bytes(files[1].read_bytes()[:400])
    with pytest.raises(Refused, match=r"^--jpegs: .*00001\.jpg: cannot be decoded \(.+\)"):
        bench_decoding(options(), files, CPU)


def test_an_encoder_has_its_rate_and_no_path(kl, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "orig_argv", ["python", "--vae", str(kl)])
    (row,) = bench_encoding(options(vae=str(kl)), CPU, tmp_path / "vae")
    params = {"loader": "AutoencoderKL (a folder)", "resolution": 32, "batch": 4, "dtype": "fp32"}
    assert (row["name"], row["params"], row["ours"]) == ("encode", params, True)
    assert row["images_per_s"] > 0
    assert row["bytes"] == 4 * 3 * 32 * 32 * 4
    assert str(kl) not in json.dumps(row)


def test_every_loader_and_decoder_gets_its_numbers(results, tmp_path, monkeypatch):
    pytest.importorskip("nvidia.dali")
    folder = tmp_path / "my own photos"
    write_jpegs(folder / "deeper", 5, divisor=4)
    (folder / "deeper" / "00000.jpg").rename(folder / "a.JPEG")
    (folder / "none.jpg").mkdir()
    words = ["--quick", f"--jpegs={folder}"]
    monkeypatch.setattr(sys, "orig_argv", ["/somewhere/bin/python", "-m", "benchmarks.bench_data", *words])
    assert bench_data.main([*words, "--device", "cpu"]) == 0
    results = results.with_name("data-jpegs.json")
    rows = {(row["name"], row["params"]["loader"]): row for row in read(results)["rows"]}
    latents = ["ours, packed", "ours, public files", *(f"public, {n} workers" for n in LOADER_WORKERS)]
    images = [f"ours, {title}, {threads} threads" for title in READERS.values() for threads in THREADS]
    images += [f"Pillow, DataLoader, {n} workers" for n in DECODER_WORKERS]
    assert list(rows) == [("latents", name) for name in latents] + [("decode", name) for name in images]
    assert rows["latents", "ours, packed"]["bytes"] == 16 * 8 * 32 * 32 * 2
    assert rows["decode", "ours, DALI, 1 threads"]["params"]["files"] == 5
    text = results.read_text()
    assert not any(private in text for private in (str(tmp_path), "/somewhere", "photos"))


@pytest.fixture
def planted(monkeypatch):
    """Parts that take no time, on a machine that seems to have a GPU."""
    here = stamp("cpu")
    monkeypatch.setattr(bench_data.options, "device", torch.device)
    monkeypatch.setattr(bench_data, "stamp", lambda device: here | {"kind": device.type})
    monkeypatch.setattr(bench_data, "write_jpegs", lambda *_: [])

    def part(name):
        speeds = {"images_per_s": 9.0, "images_per_cpu_s": 7.0, "median_ms": 1.0, "p20_ms": 1.0, "p80_ms": 1.0}
        return [{"name": name, "params": {"loader": name}, "ours": True, "command": "python", **speeds}]

    monkeypatch.setattr(bench_data, "bench_latents", lambda *_: part("latents"))
    monkeypatch.setattr(bench_data, "bench_decoding", lambda args, files, device: part(f"decode, {device.type}"))
    monkeypatch.setattr(bench_data, "bench_encoding", lambda *_: part("encode"))


@pytest.mark.parametrize(
    ("error", "message"),
    [(torch.OutOfMemoryError("first\nsecond"), "not run: first\n"), (GateFailed("pixels"), "no number: pixels\n")],
)
def test_a_part_that_cannot_run_costs_its_own_numbers_and_a_failing_gate_all(
    planted, results, monkeypatch, capsys, error, message
):
    def fail(*_):
        raise error

    monkeypatch.setattr(bench_data, "bench_encoding", fail)
    assert bench_data.main(["--quick", "--device", "cuda"]) == 1
    assert capsys.readouterr().out.startswith(message)
    names = [row["name"] for row in read(results)["rows"]] if results.exists() else []
    assert names == ([] if isinstance(error, GateFailed) else ["latents", "decode, cpu", "decode, cuda"])


def test_wrong_options_are_refused(results, tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("a.jpg")
    for words, message in ((["--rows", "8"], "--rows: 8 given"), (["--jpegs", str(tmp_path)], "has no .jpg or .jpeg")):
        with pytest.raises(SystemExit) as ended:
            bench_data.main([*words, "--device", "cpu"])
        assert ended.value.code == 2
        assert message in capsys.readouterr().err
