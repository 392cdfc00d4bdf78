"""image_stream.py, stream.py: the images of a run, whatever the batch, the resume point and the damage."""

from __future__ import annotations

import errno
import threading
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from small_data import CPU, refusal

from sra_fast import files
from sra_fast.config import DataConfig
from sra_fast.data import decoders
from sra_fast.data.decoders import open_decoder
from sra_fast.data.folder import scan
from sra_fast.data.image_stream import ImageStream, load
from sra_fast.data.order import rows
from sra_fast.data.stream import DEPTH, ReadAhead
from sra_fast.kernels.philox import Draw, words

SIZE = 60
BAD = (3, 17, 18, 41)


@pytest.fixture(params=["pillow", "dali"])
def decoder(request):
    if request.param == "dali":
        pytest.importorskip("nvidia.dali")
    return open_decoder(DataConfig(resolution=8, channels=1, reader=request.param), CPU)


@pytest.fixture
def folder(tmp_path):
    """60 images in 3 classes; every pixel of row r is r, so that a batch shows which rows it holds."""
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
    assert labels == [row // 20 for row in shown_rows]
    with ImageStream(folder, decoder, seed=0, batch=7, first_image=2**40) as stream:
        x, labels, number = next(stream)
    assert (x.shape, x.dtype, x.device) == ((7, 1, 8, 8), torch.float32, CPU)
    assert labels.dtype == number.dtype == torch.int64
    assert number.tolist() == list(range(2**40, 2**40 + 7))


def test_replacements_are_a_function_of_seed_and_number(damaged, decoder):
    shown_rows, labels, _ = taken(damaged, decoder, 180, 12)
    assert shown_rows == [expected_row(5, number) for number in range(180)]
    assert labels == [row // 20 for row in shown_rows]
    assert taken(damaged, decoder, 180, 45)[:2] == (shown_rows, labels)
    for first in (12, 60, 132):
        assert taken(damaged, decoder, 180 - first, 12, first=first)[:2] == (shown_rows[first:], labels[first:])


def test_bad_files_are_counted_and_announced_once(damaged, decoder, capsys):
    with ImageStream(damaged, decoder, seed=5, batch=20, first_image=0, max_bad_share=0.5) as stream:
        for batch in range(1, 10):
            next(stream)
            assert stream.replaced == sum(row in BAD for row in rows(5, 0, 20 * batch, SIZE).tolist())
        assert set(stream.bad) == {damaged.files[row] for row in BAD}
    announced = capsys.readouterr().err.splitlines()
    assert len(announced) == len(BAD)
    first_met = {row: rows(5, 0, SIZE, SIZE).tolist().index(row) for row in BAD}
    for row in BAD:
        (line,) = (line for line in announced if damaged.files[row] in line)
        # The number is that of the first image that met the file: its own turn, or earlier as an unlucky replacement.
        assert int(line.split("image ")[1].split()[0]) <= first_met[row]
        assert stream.bad[damaged.files[row]] in line


def test_known_bad_files_are_not_read_again(damaged, decoder, monkeypatch):
    reads, read = [], type(damaged).read
    bad = {damaged.files[row]: "known" for row in BAD}
    monkeypatch.setattr(type(damaged), "read", lambda folder, row: (reads.append(row), read(folder, row))[1])
    assert taken(damaged, decoder, 120, SIZE, bad=bad)[0] == [expected_row(5, number) for number in range(120)]
    assert not set(reads) & set(BAD)


def test_too_many_bad_files_stop_the_run(damaged, decoder):
    assert len(taken(damaged, decoder, 120, 60, max_bad_share=4 / SIZE)[0]) == 120
    with ImageStream(damaged, decoder, seed=5, batch=60, first_image=0, max_bad_share=0.06) as stream:
        lines = {refusal(next, stream) for _ in range(DEPTH + 2)}  # the same every time
    (line,) = lines
    assert line.startswith(f"{damaged.root}: 4 of 60 files are undecodable, the first ")
    assert line.endswith("data.max-bad-share = 0.06 allows no more")
    with ImageStream(damaged, decoder, seed=5, batch=SIZE, first_image=0, strict=True) as stream:
        line = refusal(next, stream)
    assert any(line.startswith(f"{damaged.root / damaged.files[row]}: undecodable (") for row in BAD)
    assert line.endswith("data.strict allows none")


def test_nothing_but_bad_files_ends_too(folder, decoder):
    for name in folder.files:
        (folder.root / name).write_bytes(b"no image")
    with ImageStream(folder, decoder, seed=5, batch=10, first_image=0, max_bad_share=1.0) as stream:
        assert "60 of 60 files" in refusal(next, stream)
    assert refusal(load, folder, decoder) == f"{folder.root}: none of 60 files can be decoded"


def test_load_gives_the_whole_folder_in_order(damaged, decoder, capsys):
    x, labels = load(damaged, decoder, batch=7)
    kept = [row for row in range(SIZE) if row not in BAD]
    assert ((x[:, 0, 0, 0] + 1) * 127.5).round().long().tolist() == kept
    assert labels.tolist() == [row // 20 for row in kept]
    announced = capsys.readouterr().err.splitlines()
    assert sorted(line.split(": ")[1] for line in announced) == [damaged.files[row] for row in BAD]
    assert torch.equal(load(damaged, decoder)[0], x)


def test_reading_ahead_is_bounded_ordered_and_stops_when_closed():
    started, gate = [], threading.Semaphore(0)

    def compute(item):
        started.append(item)
        gate.acquire()
        return item

    def open_gate(count):
        for _ in range(count):
            gate.release()

    ahead = ReadAhead(compute, range(100))
    open_gate(DEPTH)
    assert next(ahead) == 0
    open_gate(100)
    assert [next(ahead) for _ in range(4)] == [1, 2, 3, 4]
    ahead.close()
    assert started == list(range(len(started)))
    assert len(started) <= 8  # five were taken
    assert not any(thread.name.startswith("read ahead") for thread in threading.enumerate())
    with pytest.raises(StopIteration):
        next(ahead)
    ahead.close()
    with ReadAhead(str, range(7)) as ahead:
        assert list(ahead) == list("0123456")


def test_nothing_is_computed_after_a_failure():
    computed = []

    def compute(item):
        computed.append(item)
        if item == 2:
            raise OSError("gone")
        return item

    with ReadAhead(compute, range(100)) as ahead:
        assert [next(ahead), next(ahead)] == [0, 1]
        for _ in range(5):
            with pytest.raises(OSError, match="gone"):
                next(ahead)
    assert computed == [0, 1, 2]


def test_an_error_of_the_machine_is_not_one_of_an_image(folder, decoder, monkeypatch, capsys):
    """It passes, or ends the run; no image is replaced because of it."""
    errors, real = [OSError(errno.EIO, "Input/output error")], files.open_regular

    def open_regular(path):
        if str(path).endswith(folder.files[7]) and errors:
            raise errors.pop()
        return real(path)

    monkeypatch.setattr(files, "open_regular", open_regular)
    monkeypatch.setattr(files, "PAUSES_S", (0.0, 0.0))
    assert sorted(taken(folder, decoder, SIZE, 12)[0]) == list(range(SIZE))
    errors += [OSError(errno.EIO, "Input/output error")] * 3
    line = refusal(taken, folder, decoder, SIZE, 12)
    assert line == f"{folder.root / folder.files[7]}: cannot be read (Input/output error)"
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("error", [MemoryError(), OSError("out of memory when reading image file")])
def test_a_lack_of_memory_is_not_an_error_of_an_image(folder, monkeypatch, error):
    decoder = open_decoder(DataConfig(resolution=8, channels=1, reader="pillow"), CPU)
    monkeypatch.setattr(decoders, "adm_crop", mock.Mock(side_effect=error))
    with pytest.raises(type(error)):
        taken(folder, decoder, 12, 12)
