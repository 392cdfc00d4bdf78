"""Data on a GPU: DALI's pixels, a VAE's moments and images, pinned rows that a graph copies, streams that share a
device."""

from __future__ import annotations

import os

import pytest
import torch
from small_data import CPU, SIDE, Killed, config, content, pack, rows, save_kl, save_tiny, write_jpegs
from small_run import run, small
from test_decoders import damaged, files
from torch import Tensor

from sra_fast.config import Config, DataConfig
from sra_fast.data.decoders import Decoder, Undecodable, open_decoder
from sra_fast.data.folder import scan
from sra_fast.data.image_stream import ImageStream
from sra_fast.data.rows import RowSet
from sra_fast.data.stream import Batch
from sra_fast.packing import prepare as prepare_module
from sra_fast.packing.prepare import prepare
from sra_fast.step.runner import StepRunner
from sra_fast.vae import Vae, open_vae

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before cuBLAS starts: prepare is deterministic

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
GPU = torch.device("cuda")
READERS = ["pillow", "dali"]


def decoder(reader: str, device: torch.device = GPU, **fields: object) -> Decoder:
    if reader == "dali":
        pytest.importorskip("nvidia.dali")
    return open_decoder(DataConfig(reader=reader, **fields), device)


def off(one: Tensor, other: Tensor) -> Tensor:
    """(B,) mean differences of images, in levels of 255."""
    return 127.5 * (one.cpu() - other.cpu()).abs().flatten(1).mean(1)


def gap(one: Tensor, other: Tensor) -> float:
    """Relative, in the norm; NaN, which is below no bound, where a number is not finite."""
    return float((one.cpu().double() - other.cpu().double()).norm() / other.cpu().double().norm())


# Levels in an image's mean: the most that benchmarks/bench_data.py accepts of a decoder. CMYK is ink: each library has
# its own rule for how much light it leaves.
MAX_OFF, MAX_OFF_CMYK, MAX_MEAN_OFF = 1.0, 3.0, 0.5


@pytest.mark.parametrize(("channels", "exif", "resolution"), [(3, False, 128), (1, False, 128), (3, True, 256)])
def test_dali_on_the_gpu_has_the_pixels_of_pillow(channels, exif, resolution):
    cases, fields = files(), {"channels": channels, "exif": exif, "resolution": resolution}
    ours = decoder("dali", **fields).decode(list(cases.values()))
    truth = decoder("pillow", CPU, **fields).decode(list(cases.values()))
    assert (ours.shape, ours.dtype, ours.device.type) == (truth.shape, torch.float32, GPU.type)
    assert -1 <= float(ours.min()) <= float(ours.max()) <= 1
    mean = dict(zip(cases, off(ours, truth).tolist(), strict=True))
    bound = dict.fromkeys(cases, MAX_OFF) | {"cmyk jpeg": MAX_OFF_CMYK}
    assert {case: m for case, m in mean.items() if m > bound[case]} == {}
    assert sum(mean.values()) / len(mean) < MAX_MEAN_OFF
    # Decoded by Pillow, and moved to the device as integers.
    for case in ("larger still, halved", "16-bit grey png", "16-bit rgb png", "black and white png"):
        assert mean[case] == 0, case


@pytest.mark.parametrize("channels", [1, 3])
def test_pillow_for_the_gpu_has_its_pixels_in_every_bit(channels):
    cases, fields = list(files().values()), {"channels": channels, "resolution": 32, "exif": True}
    ours, truth = (decoder("pillow", device, **fields).decode(cases) for device in (GPU, CPU))
    assert torch.equal(ours.cpu(), truth)


def test_dali_takes_batches_of_changing_sizes():
    """The place in the batch decides which of two engines decodes a JPEG, and they may round differently; equal batches
    have equal bits."""
    cases, ours = list(files().values()), decoder("dali", resolution=128)
    whole = ours.decode(cases)
    for part in (slice(0, 3), slice(5, 6), slice(0, 12), slice(9, 18)):
        assert float(off(ours.decode(cases[part]), whole[part]).max()) <= MAX_OFF, part
    many = ours.decode(cases[::-1] + cases)  # a larger pipeline
    assert float(off(many, torch.cat([whole.flip(0), whole])).max()) <= MAX_OFF
    assert ours.decode([]).shape == (0, 3, 128, 128)
    assert torch.equal(ours.decode(cases), decoder("dali", resolution=128).decode(cases))


@pytest.mark.parametrize("reader", READERS)
def test_every_bad_file_is_named_and_the_decoder_goes_on(reader):
    ours, good, bad = decoder(reader, resolution=128), list(files().values()), damaged()
    expected, mixed, places = ours.decode(good), list(good), {}
    for offset, (case, file) in enumerate(bad.items()):
        places[2 * offset + 1] = case
        mixed.insert(2 * offset + 1, file)
    with pytest.raises(Undecodable) as caught:
        ours.decode(mixed)
    assert {index: places.get(index) for index in caught.value.reasons} == places
    assert all(reason and "\n" not in reason and "0x" not in reason for reason in caught.value.reasons.values())
    assert torch.equal(ours.decode(good), expected)


# Relative errors in the norm. cuDNN rounds fp32 factors to TF32's 11 bits; bf16 has 8. In bf16 on a CPU the same
# networks are off by 0.009 in moments and 0.022 in images; TF32 by an eighth of that.
MOMENTS_ERROR, IMAGES_ERROR = {"fp32": 0.005, "bf16": 0.03}, {"fp32": 0.01, "bf16": 0.08}
both = pytest.mark.parametrize("precision", ["fp32", "bf16"])


def on_gpu(images, out, vae, **changes: object):
    return config(images, out, vae=str(vae), flips=True, device=GPU.type, **changes)


@both
@pytest.mark.parametrize("save", [save_kl, save_tiny])
def test_moments_made_on_the_gpu_are_near_those_made_on_the_cpu(images, tmp_path, save, precision):
    vae = save(tmp_path / "vae")
    manifest = prepare(on_gpu(images, tmp_path / "gpu", vae, precision=precision))
    truth = prepare(config(images, tmp_path / "cpu", vae=str(vae), flips=True, precision="fp32"))
    assert (manifest.count, manifest.skipped, manifest.shape) == (truth.count, truth.skipped, truth.shape)
    for which in ("file", "flip"):
        (ours, labels), (theirs, same) = (rows(tmp_path / name, which) for name in ("gpu", "cpu"))
        assert labels.tolist() == same.tolist()
        parts = (torch.from_numpy(x).split(4, 1) for x in (ours, theirs))
        for one, other in zip(*parts, strict=True):  # means, and deviations where there are some
            assert gap(one, other) < MOMENTS_ERROR[precision], which


@pytest.fixture(scope="module", params=["fp32", "bf16"])
def undisturbed(request, images, kl, tmp_path_factory):
    """(precision, what is in the set): three shards of three or four batches each."""
    out = tmp_path_factory.mktemp("undisturbed") / "set"
    prepare(on_gpu(images, out, kl, precision=request.param))
    return request.param, content(out)


@pytest.mark.parametrize(("rank", "then"), [(0, 0), (0, 1), (1, 0)])
def test_interrupted_it_continues_to_the_same_bytes(images, kl, undisturbed, tmp_path, monkeypatch, rank, then):
    """Two processes of a launcher, one after the other; they start at different shards."""
    (precision, expected), written, write_shard = undisturbed, [], prepare_module.write_shard

    def killed_at_the_second(out, number, *more, **named):
        if written:
            raise Killed
        written.append(number)
        return write_shard(out, number, *more, **named)

    command = on_gpu(images, tmp_path / "set", kl, precision=precision)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with monkeypatch.context() as patch:
        patch.setenv("RANK", str(rank))
        patch.setattr(prepare_module, "write_shard", killed_at_the_second)
        with pytest.raises(Killed):
            prepare(command)
    assert written == [rank]  # of three, the second begins at 3 // 2
    monkeypatch.setenv("RANK", str(then))
    prepare(command)
    assert content(tmp_path / "set") == expected


def on_rows(root, **changes: object) -> Config:
    """A small run on the set in root/set."""
    fields = {"train__device": GPU.type, "train__precision": "bf16", "model__hidden": 64, "data__images": ""}
    return small(root, data__latents=str(root / "set"), **fields, **changes)


def watched(config: Config, **stop: int) -> tuple[int, list[dict], list[Batch], set[bool]]:
    """(exit code, metrics of each step, its batch, whether batches are pinned) of a training."""
    batches, pinned, step = [], set(), StepRunner.__call__

    def record(self, batch: Batch, *more: float) -> None:
        batches.append(Batch(*(tensor.clone() for tensor in batch)))
        pinned.add(batch.x.is_pinned())
        step(self, batch, *more)

    torch.compiler.reset()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StepRunner, "__call__", record)
        return *run(config, **stop), batches, pinned


def test_a_graph_on_pinned_rows_learns_as_eager_steps_on_others_and_resumes(images, kl, tmp_path, monkeypatch, capsys):
    """From prepare on the GPU to the end of a run; to the tolerance of tests/test_gpu_step.py for bf16."""
    prepare(on_gpu(images, tmp_path / "set", kl, precision="bf16"))
    graph = on_rows(tmp_path, run__name="graph", train__execution="graph")
    code, first, before, pinned = watched(graph, stop_after=6)  # three to warm up, a capture, replays
    assert (code, len(first), pinned) == (143, 6, {True})
    code, last, after, pinned = watched(graph)
    assert (code, len(last), pinned) == (0, 4, {True})
    assert "no CUDA graph" not in capsys.readouterr().err
    gather = RowSet.gather
    monkeypatch.setattr(RowSet, "gather", lambda self, index, flipped=None, pinned=False: gather(self, index, flipped))
    code, eager, plain, pinned = watched(on_rows(tmp_path, run__name="eager", train__execution="eager"))
    assert (code, len(eager), pinned) == (0, 10, {False})
    for ours, theirs in zip(before + after, plain, strict=True):
        assert all(map(torch.equal, ours, theirs))
    for k, (ours, theirs) in enumerate(zip(first + last, eager, strict=True)):
        for name in ("loss", "velocity_loss", "alignment_loss"):
            assert ours[name] == pytest.approx(theirs[name], rel=0.05, abs=0.05), (k, name)


def test_previews_of_latents_are_decoded_on_the_gpu(kl, tmp_path, monkeypatch):
    pack(tmp_path / "set", vae=str(kl))
    decode, decoded = Vae.decode, []

    def record(self, z: Tensor) -> Tensor:
        decoded.append((self.device.type, self.dtype, z, decode(self, z)))
        return decoded[-1][-1]

    with monkeypatch.context() as patch:
        patch.setattr(Vae, "decode", record)
        settings = {"train__execution": "eager", "train__images": 16, "train__preview_every_images": 8}
        assert run(on_rows(tmp_path, **settings))[0] == 0
    shown = sorted((tmp_path / "runs/a/samples").iterdir())
    assert [path.name for path in shown] == ["000000000008.png", "000000000016.png"]
    vae = open_vae(str(kl), CPU, torch.float32)
    for device, dtype, z, images in decoded:
        assert (device, dtype, images.device.type) == (GPU.type, torch.bfloat16, GPU.type)
        assert gap(images, vae.decode(z)) < IMAGES_ERROR["bf16"]


@pytest.mark.parametrize("reader", READERS)
def test_streams_of_one_seed_give_the_same_batches_whatever_was_read_before(images, reader):
    """Both at once; one begins later, with a decoder that has seen other files and damage."""
    folder, settings = scan(images), {"seed": 5, "batch": 8, "max_bad_share": 0.5}
    fresh, used = (decoder(reader, resolution=SIDE) for _ in range(2))
    used.decode(list(files().values()))
    with pytest.raises(Undecodable):
        used.decode(list(damaged().values()))
    opened = [ImageStream(folder, one, first_image=first, **settings) for one, first in ((fresh, 0), (used, 32))]
    with opened[0] as whole, opened[1] as later:
        for _ in range(4):
            next(whole)
        for k in range(20):
            one, other = next(whole), next(later)
            assert {tensor.device.type for tensor in one} == {GPU.type}
            assert all(map(torch.equal, one, other)), k


@pytest.mark.parametrize("reader", READERS)
def test_memory_of_the_device_stays_flat_over_200_batches(tmp_path, reader):
    """Memory of PyTorch, and of the whole device, because DALI has its own; the first 100 batches fill what is kept."""
    folder, ours = scan(write_jpegs(tmp_path, 96)), decoder(reader, resolution=64)
    peaks, free = [], []
    with ImageStream(folder, ours, seed=0, batch=64, first_image=0) as stream:
        for number in range(1, 201):
            x = next(stream).x
            if number % 50 == 0:
                peaks.append(torch.cuda.max_memory_allocated())
                torch.cuda.reset_peak_memory_stats()
                free.append(torch.cuda.mem_get_info()[0])
    assert max(peaks[2:]) <= peaks[1] + 4 * x.nbytes  # as many wait to be handed over, or fewer
    assert free[1] - free[-1] < 32 * 2**20  # the bytes of the pixels of these alone are 75 MiB
