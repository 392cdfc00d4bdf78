"""decoders.py: both decoders against Pillow alone, against each other, and on files that are not images."""

from __future__ import annotations

import io
import struct
import sys
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin
from small_data import CPU, refusal

from benchmarks.rivals.loaders import pillow_crop
from sra_fast.config import DataConfig
from sra_fast.data.decoders import DaliDecoder, PixelBudget, Undecodable, open_decoder
from sra_fast.data.image_file import without_text


def picture(width, height, channels=3, seed=0):
    """(H, W[, C]) uint8 with smooth parts, edges and some noise, as photographs have."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width] / max(width, height)
    planes = []
    for _ in range(channels):
        a, b, c, d = rng.uniform(2, 12, 4)
        plane = 128 + 60 * np.sin(a * x + b * y) + 40 * np.sign(np.sin(c * x - d * y)) + rng.normal(0, 4, x.shape)
        planes.append(plane.clip(0, 255).astype(np.uint8))
    return planes[0] if channels == 1 else np.stack(planes, axis=-1)


def encoded(image, kind, **options):
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png16(values):
    """A 16-bit PNG of (H, W) or (H, W, 3) uint16, written by hand: Pillow has no 16-bit RGB."""
    height, width = values.shape[:2]
    colour = 0 if values.ndim == 2 else 2
    lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in values)

    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, 16, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")


def turned(array, orientation=6):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(array, "JPEG", quality=95, exif=exif)


def files():
    rgb, grey, large = picture(300, 200), picture(220, 180, 1), picture(500, 375, seed=3)
    alpha = np.dstack([rgb, np.full(rgb.shape[:2], 200, np.uint8)])
    deep = np.linspace(0, 65535, 150 * 90).reshape(90, 150).astype(np.uint16)
    return {
        "rgb jpeg": encoded(rgb, "JPEG", quality=90),
        "rgb png": encoded(rgb, "PNG"),
        "grey jpeg": encoded(grey, "JPEG", quality=90),
        "grey png": encoded(grey, "PNG"),
        "rgba png": encoded(alpha, "PNG"),
        "grey and alpha png": encoded(Image.fromarray(grey).convert("LA"), "PNG"),
        "palette png": encoded(Image.fromarray(rgb).quantize(64), "PNG"),
        "black and white png": encoded(Image.fromarray(grey).convert("1"), "PNG"),
        "cmyk jpeg": encoded(Image.fromarray(rgb).convert("CMYK"), "JPEG", quality=95),
        "progressive jpeg": encoded(rgb, "JPEG", quality=85, progressive=True),
        "tiny jpeg, enlarged": encoded(picture(75, 56), "JPEG", quality=90),
        "large jpeg": encoded(large, "JPEG", quality=90),
        "upright jpeg": encoded(picture(131, 260), "JPEG", quality=90),
        "very wide png": encoded(picture(640, 130), "PNG"),
        "larger still, halved": encoded(picture(1300, 1100, seed=5), "JPEG", quality=90),
        "turned jpeg": turned(rgb),
        "16-bit grey png": png16(deep),
        "16-bit rgb png": png16(np.stack([deep, deep[::-1], deep[:, ::-1]], axis=-1)),
    }


def reader(name, **fields):
    if name == "dali":
        pytest.importorskip("nvidia.dali")
    return open_decoder(DataConfig(reader=name, **fields), CPU)


def levels(x):
    return (x + 1) * 127.5


both = pytest.mark.parametrize("name", ["pillow", "dali"])


@both
@pytest.mark.parametrize("channels", [1, 3])
def test_digits_pass_unchanged(name, channels):
    arrays = [np.arange(i, i + 64, dtype=np.uint8).reshape(8, 8) for i in range(0, 193, 3)]  # 0 to 255
    x = reader(name, resolution=8, channels=channels).decode([encoded(a, "PNG") for a in arrays])
    assert (x.shape, x.dtype, x.device) == ((65, channels, 8, 8), torch.float32, CPU)
    expected = torch.from_numpy(np.stack(arrays)).float() / 127.5 - 1
    assert (expected.min(), expected.max()) == (-1, 1)
    assert torch.equal(x, expected[:, None].expand(-1, channels, -1, -1))


@both
@pytest.mark.parametrize("resolution", [32, 256])
def test_pixels_are_those_of_pillow_alone(name, resolution):
    """Also with the public code's crop: at most 0.5 levels in the mean, and 1 for an image."""
    cases = [file for case, file in files().items() if not case.startswith("16-bit")]
    right = [np.asarray(pillow_crop(Image.open(io.BytesIO(file)).convert("RGB"), resolution)) for file in cases]
    off = levels(reader(name, resolution=resolution).decode(cases)).permute(0, 2, 3, 1).numpy() - np.stack(right)
    mean = np.abs(off).mean((1, 2, 3))
    assert mean.max() < 0.25
    assert mean.mean() < 0.1


@pytest.mark.parametrize(("channels", "exif", "resolution"), [(1, False, 128), (3, False, 32), (3, True, 128)])
def test_dali_agrees_with_pillow(channels, exif, resolution):
    cases = files()
    fields = {"channels": channels, "exif": exif, "resolution": resolution}
    ours = levels(reader("dali", **fields).decode(list(cases.values())))
    truth = levels(reader("pillow", **fields).decode(list(cases.values())))
    mean = (ours - truth).abs().flatten(1).mean(1)
    # Grey from colours, unless a JPEG stores it, is rounded differently: 0.5 levels. CMYK is converted by each itself.
    bound = 0.6 if channels == 1 else 0.25
    if channels == 3:
        assert [case for case, m in zip(cases, mean.tolist(), strict=True) if m] in ([], ["cmyk jpeg"])
    assert {case: m for case, m in zip(cases, mean.tolist(), strict=True) if m > bound} == {}
    # Halved images and those of other than 8 bits are equal in every bit, being decoded by the same code.
    for case in ("larger still, halved", "16-bit grey png", "16-bit rgb png", "black and white png"):
        assert mean[list(cases).index(case)] == 0


@both
def test_colours(name):
    decoder = reader(name, resolution=16)
    red = np.zeros((16, 16, 3), np.uint8) + np.array([200, 30, 60], np.uint8)
    deep = np.full((16, 16), 0x8000, np.uint16)
    palette = Image.fromarray(red).quantize(4)
    clear = np.dstack([red, np.zeros((16, 16), np.uint8)])
    x = decoder.decode([encoded(red, "PNG"), encoded(palette, "PNG"), encoded(clear, "PNG"), png16(deep)])
    for image in levels(x[:3]):  # transparency is dropped, not blended
        assert image.mean((1, 2)).tolist() == pytest.approx([200, 30, 60], abs=1e-3)
    assert levels(x[3]).unique().tolist() == pytest.approx([128], abs=1e-3)  # 32768 / 257 = 127.5
    grey = reader(name, resolution=16, channels=1).decode([encoded(red, "PNG")])
    # ITU-R 601 luma
    assert levels(grey).unique().tolist() == pytest.approx([0.299 * 200 + 0.587 * 30 + 0.114 * 60], abs=0.6)
    four = Image.fromarray(red).convert("CMYK")
    x = decoder.decode([encoded(four, "JPEG", quality=100)])
    assert levels(x[0]).mean((1, 2)).tolist() == pytest.approx([200, 30, 60], abs=3)


@both
def test_orientation_is_ignored_unless_asked_for(name):
    array = picture(64, 64)
    plain = encoded(array, "JPEG", quality=95)
    ignored = reader(name, resolution=64).decode([plain, turned(array)])
    assert torch.equal(ignored[0], ignored[1])
    followed = reader(name, resolution=64, exif=True).decode([turned(array)])
    # Orientation 6: turn clockwise to see it upright.
    assert torch.equal(followed[0], ignored[0].rot90(-1, (1, 2)))


@both
def test_batches_of_any_size_and_order(name):
    cases = list(files().values())
    decoder = reader(name, resolution=32)
    whole = decoder.decode(cases)
    assert torch.equal(decoder.decode(cases[::-1] + cases), torch.cat([whole.flip(0), whole]))
    assert torch.equal(decoder.decode(cases[5:6]), whole[5:6])
    assert decoder.decode([]).shape == (0, 3, 32, 32)


def damaged():
    jpeg, png = encoded(picture(90, 80), "JPEG"), encoded(picture(90, 80), "PNG")
    progressive = encoded(picture(90, 80), "JPEG", progressive=True)
    thumbnail = b"\xff\xe1" + struct.pack(">H", len(jpeg) + 2) + jpeg  # a whole JPEG in an APP1 segment
    flipped = bytearray(png)
    flipped[len(png) // 2] ^= 0xFF
    return {
        "empty": b"",
        "text": b"this is no image\n",
        "gif": encoded(Image.fromarray(picture(9, 9, 1)), "GIF"),
        "half a jpeg": jpeg[: len(jpeg) // 2],
        "a jpeg's header": jpeg[:100],
        "three bytes of a jpeg": jpeg[:3],
        "jpeg without its end": jpeg[:-2],
        "half a progressive jpeg": progressive[: len(progressive) // 2],
        "half a jpeg after its thumbnail": jpeg[:2] + thumbnail + jpeg[2 : len(jpeg) // 2],
        "half a png": png[: len(png) // 2],
        "png without its end": png[:-12],
        "a png's first bytes": png[:20],
        "damaged png": bytes(flipped),
    }


@both
def test_every_bad_file_is_named_and_the_decoder_goes_on(name):
    decoder = reader(name, resolution=32)
    good, bad = list(files().values()), damaged() | {"very thin": encoded(picture(600, 1), "PNG")}
    expected = decoder.decode(good)
    mixed, places = list(good), {}
    for offset, (case, file) in enumerate(bad.items()):
        places[2 * offset + 1] = case
        mixed.insert(2 * offset + 1, file)
    for _ in range(2):
        with pytest.raises(Undecodable) as caught:
            decoder.decode(mixed)
        assert {index: places.get(index) for index in caught.value.reasons} == places
        assert all(reason and "\n" not in reason and "0x" not in reason for reason in caught.value.reasons.values())
        assert torch.equal(decoder.decode(good), expected)
    kept, x, reasons = decoder.decode_readable(dict(enumerate(mixed, 100)))
    assert [mixed[key - 100] for key in kept] == good
    assert torch.equal(x, expected)
    assert {key - 100: places[key - 100] for key in reasons} == places
    for file in bad.values():
        with pytest.raises(Undecodable) as caught:
            decoder.decode([file])
        assert list(caught.value.reasons) == [0]


@both
def test_odd_but_whole_files_decode(name):
    jpeg, png = encoded(picture(40, 40), "JPEG"), encoded(picture(40, 40), "PNG")
    thumbnail = b"\xff\xe1" + struct.pack(">H", len(jpeg) + 2) + jpeg
    decoder = reader(name, resolution=32)
    plain = decoder.decode([jpeg, png])
    trailing = b"\x00\xff\xda appended video \xff\xda"
    odd = [jpeg + trailing, png + b"more", jpeg[:2] + thumbnail + jpeg[2:], jpeg[:2] + b"\xff\xff" + jpeg[2:]]
    x = decoder.decode(odd)
    for index, same_as in enumerate((0, 1, 0, 0)):
        assert torch.equal(x[index], plain[same_as])


def test_auto_is_dali_or_else_pillow_with_a_line(monkeypatch, capsys):
    data = DataConfig(resolution=8)
    if find_spec("nvidia.dali"):
        assert open_decoder(data, CPU).name.startswith("dali cpu")
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    assert open_decoder(replace(data, reader="pillow"), CPU).name == "pillow"
    assert capsys.readouterr().err == ""
    assert open_decoder(data, CPU).name == "pillow"
    (line,) = capsys.readouterr().err.splitlines()
    assert "pip install nvidia-dali-cuda130" in line
    line = refusal(open_decoder, replace(data, reader="dali"), CPU)
    assert line.startswith("reader: 'dali' given; needs `pip install nvidia-dali-cuda130`")


def test_a_dali_that_cannot_start_is_no_bad_file(monkeypatch):
    pytest.importorskip("nvidia.dali")

    def broken(self, capacity):
        raise RuntimeError("driver version is insufficient\nand more")

    monkeypatch.setattr(DaliDecoder, "_build", broken)
    decoder = DaliDecoder(DataConfig(resolution=32), CPU)
    line = refusal(decoder.decode, [encoded(picture(40, 40), "JPEG")])
    assert "DALI cannot start (driver version is insufficient)" in line


def test_an_image_of_too_many_pixels_is_never_decoded(monkeypatch):
    decoder = reader("pillow", resolution=32, max_pixels=2_000)
    large, small = encoded(picture(60, 50), "PNG"), encoded(picture(40, 50), "PNG")
    with pytest.raises(Undecodable, match="60 x 50 pixels, more than max-pixels = 2,000") as caught:
        decoder.decode([small, large])
    assert list(caught.value.reasons) == [1]


def test_threads_hold_no_more_pixels_together_than_the_bound():
    budget, held, most = PixelBudget(100), [], []

    def work(pixels):
        with budget.hold(pixels):
            held.append(pixels)
            most.append(sum(held))
            time.sleep(0.002)
            held.remove(pixels)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, [30, 60, 50, 10, 90, 40] * 8))
        assert 60 < max(most) <= 100
        list(pool.map(work, [250, 30, 250]))  # each of the large ones alone
    assert {total for total in most if total > 100} == {250}


@both
def test_long_texts_and_many_pixels_are_no_damage(name, recwarn):
    """Generators of images write prompts of megabytes into their PNGs; Pillow alone refuses them."""
    texts = PngImagePlugin.PngInfo()
    texts.add_text("prompt", "a" * 3_000_000)
    texts.add_itxt("workflow", "b" * 3_000_000, zip=True)
    image = picture(40, 40)
    decoder = reader(name, resolution=32)
    plain, long = decoder.decode([encoded(image, "PNG"), encoded(image, "PNG", pnginfo=texts)])
    assert torch.equal(plain, long)
    assert not recwarn.list


def test_a_png_keeps_the_orientation_that_is_in_a_text():
    texts = PngImagePlugin.PngInfo()
    texts.add_text("prompt", "a" * 3_000_000)
    texts.add_itxt("XML:com.adobe.xmp", '<x tiff:Orientation="6"/>')
    file = encoded(picture(40, 30), "PNG", pnginfo=texts)
    assert b"adobe" in without_text(file, exif=True)
    assert b"prompt" not in without_text(file, exif=True)
    assert b"adobe" not in without_text(file, exif=False)
