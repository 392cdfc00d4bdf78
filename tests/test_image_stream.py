"""stream.py: the images of a run, whatever the batch, the resume point and the damage."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
import torch
from PIL import Image

from sra_fast.config import DataConfig
from sra_fast.data.decoders import open_decoder
from sra_fast.data.folder import scan
from sra_fast.data.image_stream import ImageStream, load
from sra_fast.data.order import rows
from sra_fast.errors import Refused
from sra_fast.kernels.philox import Draw, words

CPU = torch.device("cpu")
SIZE = 60
BAD = (3, 17, 18, 41)


@pytest.fixture(params=["pillow", "dali"])
def decoder(request):
    if request.param == "dali":
        pytest.importorskip("nvidia.dali")
    return open_decoder(DataConfig(resolution=8, channels=1, reader=request.param), CPU)


@pytest.fixture
def folder(tmp_path):
    """60 images in 3 classes; every pixel of row r is r, so that a batch tells which rows it holds."""
    for row in range(SIZE):
        path = tmp_path / "abc"[row // 20] / f"{row:02d}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(np.full((8, 8), row, np.uint8)).save(path)
    return scan(tmp_path)


@pytest.fixture
def damaged(folder):
    """The same with a text file, an empty one, a truncated one and one that vanishes after the scan."""
    texts = b"no image", b"", (folder.root / folder.files[BAD[2]]).read_bytes()[:50]
    for row, content in zip(BAD, texts, strict=False):
        (folder.root / folder.files[row]).write_bytes(content)
    (folder.root / folder.files[BAD[3]]).unlink()
    return folder


def shown(batch):
    """Rows (B,) that a batch's pixels show."""
    assert batch.x.dtype == torch.float32
    assert (batch.x.amax((1, 2, 3)) == batch.x.amin((1, 2, 3))).all()
    return ((batch.x[:, 0, 0, 0] + 1) * 127.5).round().long().tolist()


def taken(folder, decoder, count, batch, first=0, seed=5, **options):
    """(rows, labels, numbers) of `count` images."""
    options = {"max_bad_share": 0.5} | options
    seen = [], [], []
    with ImageStream(folder, decoder, seed=seed, batch=batch, first_image=first, **options) as stream:
        for _ in range(count // batch):
            item = next(stream)
            for values, new in zip(seen, (shown(item), item.labels.tolist(), item.number.tolist()), strict=True):
                values.extend(new)
    return seen


def expected_row(seed, number):
    """The row of image `number` in the damaged folder, from the description."""
    row, attempt = int(rows(seed, number, 1, SIZE)[0]), 0
    while row in BAD:
        word = int(words(seed, torch.tensor([number]), Draw.REPLACEMENT, 64)[0, attempt])
        row, attempt = word * SIZE >> 32, attempt + 1
    return row


def test_images_come_in_the_run_s_order_with_their_labels(folder, decoder):
    shown_rows, labels, numbers = taken(folder, decoder, 140, 14)
    assert numbers == list(range(140))
    assert shown_rows == rows(5, 0, 140, SIZE).tolist()
    assert sorted(shown_rows[:SIZE]) == list(range(SIZE))
    assert labels == [row // 20 for row in shown_rows]


def test_batches_hold_tensors_of_the_promised_types(folder, decoder):
    with ImageStream(folder, decoder, seed=0, batch=7, first_image=2**40) as stream:
        assert iter(stream) is stream
        x, labels, number = next(stream)
    assert (x.shape, x.dtype, x.device) == ((7, 1, 8, 8), torch.float32, CPU)
    assert labels.dtype == number.dtype == torch.int64
    assert number.tolist() == list(range(2**40, 2**40 + 7))


def test_replacements_are_a_function_of_seed_and_number(damaged, decoder, capfd):
    shown_rows, labels, _ = taken(damaged, decoder, 180, 12)
    assert shown_rows == [expected_row(5, number) for number in range(180)]
    assert labels == [row // 20 for row in shown_rows]
    other_batch, other_labels, _ = taken(damaged, decoder, 180, 45)
    assert (other_batch, other_labels) == (shown_rows, labels)


@pytest.mark.parametrize("first", [12, 48, 60, 132])
def test_resuming_gives_the_same_batches(damaged, decoder, first):
    whole = taken(damaged, decoder, 180, 12)
    resumed = taken(damaged, decoder, 180 - first, 12, first=first)
    assert resumed == tuple(values[first:] for values in whole)


def test_bad_files_are_counted_and_announced_once(damaged, decoder, capsys):
    with ImageStream(damaged, decoder, seed=5, batch=20, first_image=0, max_bad_share=0.5) as stream:
        for batch in range(1, 10):
            next(stream)
            touched = sum(row in BAD for row in rows(5, 0, 20 * batch, SIZE).tolist())
            assert stream.replaced == touched
        assert stream.replaced == 3 * len(BAD)
        assert set(stream.bad) == {damaged.files[row] for row in BAD}
    announced = capsys.readouterr().err.splitlines()
    assert len(announced) == len(BAD)
    first_met = {row: rows(5, 0, SIZE, SIZE).tolist().index(row) for row in BAD}
    for row in BAD:
        (line,) = (line for line in announced if damaged.files[row] in line)
        # The number is that of the first image that met the file: its own turn, or earlier as an unlucky replacement.
        number = int(line.split("image ")[1].split()[0])
        assert number <= first_met[row]
        assert stream.bad[damaged.files[row]] in line


def test_known_bad_files_are_not_read_again(damaged, decoder, monkeypatch):
    reads = []
    read = type(damaged).read
    monkeypatch.setattr(type(damaged), "read", lambda folder, row: (reads.append(row), read(folder, row))[1])
    with ImageStream(damaged, decoder, seed=5, batch=SIZE, first_image=0, max_bad_share=0.5) as stream:
        next(stream)
        for _ in range(5):
            before = len(reads)
            next(stream)
        assert not set(reads[before:]) & set(BAD)


def test_strict_stops_at_the_first(damaged, decoder):
    with ImageStream(damaged, decoder, seed=5, batch=SIZE, first_image=0, strict=True) as stream:
        for _ in range(2):  # and goes on saying so
            with pytest.raises(
                Refused, match=r"data\.images: [abc]/\d\d\.png: undecodable \(.+\); data\.strict"
            ) as caught:
                next(stream)
    assert "\n" not in str(caught.value)


def test_too_many_bad_files_stop_the_run(damaged, decoder):
    assert len(taken(damaged, decoder, 120, 60, max_bad_share=4 / SIZE)[0]) == 120
    pattern = r"4 of 60 files are undecodable, the first [abc]/\d\d\.png; .*data\.max-bad-share = 0\.06 "
    with pytest.raises(Refused, match=pattern) as caught:
        taken(damaged, decoder, 120, 60, max_bad_share=0.06)
    assert "\n" not in str(caught.value)


def test_nothing_but_bad_files_ends_too(folder, decoder):
    for name in folder.files:
        (folder.root / name).write_bytes(b"no image")
    with pytest.raises(Refused, match="60 of 60 files"):
        taken(folder, decoder, 10, 10, max_bad_share=1.0)
    with pytest.raises(Refused, match="none of 60 files"):
        load(folder, decoder)


def test_an_exception_of_the_thread_reaches_the_caller(folder, decoder, monkeypatch):
    def broken(files):
        raise MemoryError("out of memory")

    monkeypatch.setattr(decoder, "decode", broken)
    with ImageStream(folder, decoder, seed=0, batch=4, first_image=0) as stream:
        for _ in range(2):
            with pytest.raises(MemoryError, match="out of memory"):
                next(stream)


@pytest.mark.parametrize("wait", [0.0, 0.5])
def test_closing_stops_the_thread_even_when_the_queue_is_full(folder, decoder, wait):
    stream = ImageStream(folder, decoder, seed=0, batch=4, first_image=0)
    next(stream)
    time.sleep(wait)  # long enough to fill the queue, or not
    begun = time.perf_counter()
    stream.close()
    assert time.perf_counter() - begun < 2.0
    assert not any(thread.name == "image stream" for thread in threading.enumerate())
    stream.close()
    with pytest.raises(RuntimeError, match="closed"):
        next(stream)


def test_it_reads_ahead_but_not_far(folder, decoder, monkeypatch):
    calls = []
    decode = decoder.decode
    monkeypatch.setattr(decoder, "decode", lambda files: (calls.append(len(files)), decode(files))[1])
    with ImageStream(folder, decoder, seed=0, batch=4, first_image=0) as stream:
        next(stream)
        time.sleep(0.5)
        # One handed out, two in the queue, one in the thread's hand.
        assert calls == [4] * 4


def test_load_gives_the_whole_folder_in_order(folder, damaged, decoder, capsys):
    x, labels = load(damaged, decoder, batch=7)
    kept = [row for row in range(SIZE) if row not in BAD]
    assert ((x[:, 0, 0, 0] + 1) * 127.5).round().long().tolist() == kept
    assert labels.tolist() == [row // 20 for row in kept]
    assert (x.dtype, labels.dtype) == (torch.float32, torch.int64)
    announced = capsys.readouterr().err.splitlines()
    assert [line.split(": ")[1] for line in sorted(announced)] == [damaged.files[row] for row in BAD]
    assert torch.equal(load(damaged, decoder)[0], x)
