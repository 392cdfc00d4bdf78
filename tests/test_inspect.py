"""inspecting.py: what it says is true, and every damaged file is named."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from small_run import strict_json, write_images
from small_sets import change, pack, publish, stand_in

from sra_fast import cli


@pytest.fixture
def inspect(main, tmp_path):
    """(exit code, stdout, lines of what is wrong, warnings) of `sra-fast inspect` with its PNG at sheet.png."""

    def call(data, *words):
        code, output, error = main(["inspect", data, "--out", tmp_path / "sheet.png", *words])
        lines = error.replace("\r", "\n").splitlines()
        assert "Traceback" not in error
        return code, output, *([line for line in lines if line.startswith(kind)] for kind in ("wrong: ", "warning: "))

    return call


def figures(output, row):
    """Numbers of a row of the statistics."""
    line = next(line for line in output.partition("statistics")[2].splitlines() if re.match(rf"\s+{row}(\s|$)", line))
    return [float(word) for word in line.split()[1:]]


@pytest.fixture
def packed(tmp_path):
    return pack(
        tmp_path / "set", flips=True, skipped=[{"file": f"c0/{n}.jpg", "reason": "cut short"} for n in range(12)]
    )


def flip(path, place=-5):
    damaged = bytearray(path.read_bytes())
    damaged[place] ^= 4
    path.write_bytes(damaged)


def test_a_whole_set_on_one_screen(inspect, packed):
    code, output, wrong, warnings = inspect(packed.root)
    assert (code, wrong, warnings) == (0, [], [])
    size = sum(path.stat().st_size for path in packed.root.glob("*.npy"))
    for said in (
        str(packed.root),
        "80 of 32 x 32 pixels, crop adm",
        "(8, 4, 4) float16: means and deviations, and of mirrored images",
        f"4, {size:,} bytes",
        "0.9, 0.0: x = (z - shift) * scale",
        "4: smallest c0 with 20, largest c0 with 20",
        "skipped       12",
        "c0/9.jpg: cut short",
        "statistics    of 80 rows",
        "nothing wrong found",
    ):
        assert said in output
    assert "c0/10.jpg" not in output  # the first ten
    assert len(output.splitlines()) < 40
    assert max(map(len, output.splitlines())) < 200


def test_the_statistics_are_numpy_s(inspect, packed):
    """x is a sample of the posterior, so the deviations are part of its variance."""
    _, output, _, _ = inspect(packed.root)
    means, deviations = np.split(packed.rows.astype(np.float64), 2, axis=1)
    for channel in range(4):
        z, std = means[:, channel], deviations[:, channel]
        x_std = 0.9 * np.sqrt(z.var() + (std**2).mean())
        expected = [z.mean(), z.std(), std.mean(), std.std(), 0.9 * z.mean(), x_std]
        assert np.allclose(figures(output, channel), expected, rtol=1e-3, atol=1e-6)


def test_a_sample_of_the_rows_is_spread_over_the_set(inspect, packed):
    _, output, _, _ = inspect(packed.root, "--rows", 5)
    means = packed.rows[[0, 19, 39, 59, 79], 0].astype(np.float64)
    assert "of 5 rows" in output
    assert np.allclose(figures(output, 0)[:2], [means.mean(), means.std()], rtol=1e-3)


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        ({"scale": 5.0}, "x of channel 0 has a standard deviation of 5"),
        ({"scale": [1.0, 1.0, 0.1, 1.0]}, "x of channel 2 has a standard deviation of 0.1"),
        ({"shift": [0.0, 4.0, 0.0, 0.0]}, "x of channel 1 has a mean of -3"),
        ({"dtype": "uint8", "shape": (3, 4, 4), "scale": 1.0}, "x of channel 0 has a standard deviation of"),
    ],
)
def test_a_forgotten_factor_is_a_warning(inspect, tmp_path, facts, said):
    pack(tmp_path / "set", **facts)
    code, _, wrong, warnings = inspect(tmp_path / "set")
    assert (code, wrong) == (0, [])
    assert said in warnings[0]


def test_pixels_as_prepare_writes_them_are_no_warning(inspect, tmp_path):
    stored = pack(tmp_path / "set", dtype="uint8", shape=(3, 8, 8))
    code, output, _, warnings = inspect(tmp_path / "set", "--images", 4)
    assert (code, warnings) == (0, [])
    assert "the pixels as they are stored" in output
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert sheet.shape == (65, 65, 3)  # 8 x 8, magnified by four, two in a row
    shown = {sheet[top : top + 32 : 4, left : left + 32 : 4].tobytes() for top in (0, 33) for left in (0, 33)}
    held = {row.transpose(1, 2, 0).tobytes(): label for row, label in zip(stored.rows, stored.labels, strict=True)}
    assert sorted(held[image] for image in shown) == [0, 1, 2, 3]  # spread over the classes


def test_classes_have_bars_and_many_classes_those_of_their_sizes(inspect, tmp_path):
    pack(tmp_path / "few", classes=3)
    output = inspect(tmp_path / "few")[1]
    assert re.search(r"\n\s+c0 +27 #{40}\n\s+c1 +27 #{40}\n\s+c2 +26 #{39}\n", output)
    pack(tmp_path / "many", classes=30)
    output = inspect(tmp_path / "many")[1]
    assert "30: 10%, half and 90% of them have up to 2 3 3\n" in output
    assert re.search(r"\n\s+2 images +10 #{20}\n\s+3 images +20 #{40}\n", output)
    assert re.search(r"\nsmallest +c20 with 2, c21 with 2, c22 with 2, c23 with 2, c24 with 2\n", output)
    assert re.search(r"\nlargest +c0 with 3, c1 with 3, c2 with 3, c3 with 3, c4 with 3\n", output)


def test_json_holds_what_is_printed(inspect, tmp_path):
    facts = {"shift": [0.0, 4.0, 0.0, 0.0], "vae": "mine", "skipped": [{"file": "c0/a.jpg", "reason": "cut short"}]}
    stored = pack(tmp_path / "set", classes=30, **facts)
    code, output, _, warnings = inspect(stored.root, "--json", tmp_path / "made/found.json")
    given = strict_json((tmp_path / "made/found.json").read_text())
    assert code == given["exit_code"] == 0
    assert given["classes"] == [{"name": f"c{n}", "images": 3 if n < 20 else 2} for n in range(30)]
    size = sum(path.stat().st_size for path in stored.root.glob("*.npy"))
    for name, value in {
        "kind": "packed set",
        "data": str(stored.root),
        "checksums": True,
        "images": 80,
        "shards": 4,
        "bytes": size,
        "resolution": 32,
        "crop": "adm",
        "shape": [8, 4, 4],
        "dtype": "float16",
        "posterior": True,
        "flips": False,
        "scale": 0.9,
        **facts,
        "wrong": [],
        "advice": "",
        "shorter_side": None,
    }.items():
        assert given[name] == value, name
    assert [f"warning: {text}" for text in given["warnings"]] == warnings != []
    assert given["sheet"]["file"] == str(tmp_path / "sheet.png")
    assert given["sheet"]["missing"] in output
    assert given["statistics"]["rows"] == 80
    for channel, numbers in enumerate(given["statistics"]["channels"]):
        assert list(numbers) == ["mean", "std", "deviation_mean", "deviation_std", "x_mean", "x_std"]
        assert figures(output, channel) == [float(f"{number:.4g}") for number in numbers.values()]
    assert not list(tmp_path.rglob("*.tmp"))


def test_json_of_damage_and_of_other_kinds_of_sets(inspect, refused, tmp_path):
    def found(data, *words):
        code, _, wrong, _ = inspect(data, "--json", tmp_path / "found.json", *words)
        given = strict_json((tmp_path / "found.json").read_text())
        assert given["exit_code"] == code == bool(given["wrong"])
        assert [f"wrong: {file['file']}: {file['reason']}" for file in given["wrong"]] == wrong
        return given

    stored = pack(tmp_path / "set")
    (stored.root / "moments-00002.npy").unlink()
    given = found(stored.root)
    assert [Path(file["file"]).name for file in given["wrong"]] == ["moments-00002.npy"]
    assert given["classes"][0] == {"name": "c0", "images": None}  # the set cannot be opened
    assert (given["statistics"], given["sheet"]) == (None, None)
    publish(tmp_path / "public")
    given = found(tmp_path / "public")
    assert (given["kind"], given["dtype"], given["shape"]) == ("public layout", "float32", [8, 4, 4])
    assert [kind["images"] for kind in given["classes"]] == [8, 8, 8]
    images = write_images(tmp_path / "data", count=20)
    (images / "c0/000.png").write_bytes(b"")
    given = found(images, "--images", "0")
    assert (given["kind"], given["images"], given["shape"], given["sheet"]) == ("image folder", 20, None, None)
    assert given["shorter_side"] == [8, 8, 8]
    assert given["statistics"]["rows"] == 19
    assert [list(channel) for channel in given["statistics"]["channels"]] == [["x_mean", "x_std"]] * 3
    assert found(images, "--images", "0", "--no-checksums")["bytes"] is None
    assert "json: '" in refused(["inspect", images, "--json", tmp_path])


def test_names_that_are_not_utf_8_are_escaped(tmp_path, monkeypatch):
    root = write_images(tmp_path / "data", count=4)
    (root / "c1").rename(root / os.fsdecode(b"caf\xe9"))
    broken = root / "c2" / os.fsdecode(b"\xff.png")
    broken.write_bytes(b"")
    root = root.rename(tmp_path / os.fsdecode(b"d\xe4ta"))
    streams = [io.TextIOWrapper(io.BytesIO(), "utf-8", errors="strict", write_through=True) for _ in range(2)]
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", streams[0])
        patch.setattr(sys, "stderr", streams[1])
        assert cli.main(["inspect", str(root), "--json", str(tmp_path / "found.json")]) == 1
    output, error = (stream.buffer.getvalue().decode() for stream in streams)
    assert re.search(r"\n +caf\\udce9 {11,} 1 #+\n", output)  # as wide as other names
    assert f"wrong: {tmp_path}/d\\udce4ta/c2/\\udcff.png: " in error
    text = (tmp_path / "found.json").read_text()
    assert [kind["name"] for kind in strict_json(text)["classes"]] == ["c0", "c2", "c3", "caf\\udce9"]
    strict_json(text)["wrong"][0]["file"].encode()  # no half of a surrogate pair


@pytest.mark.parametrize("name", ["moments-00001.npy", "moments_flip-00003.npy", "labels-00000.npy"])
def test_a_flipped_bit_is_found_by_its_checksum(inspect, packed, name):
    flip(packed.root / name, -8 if name.startswith("labels") else -5)
    code, output, wrong, _ = inspect(packed.root)
    assert code == 1
    assert len(wrong) == 1
    assert wrong[0].startswith(f"wrong: {packed.root / name}: ")
    assert "files         1 wrong" in output
    if not name.startswith("labels"):
        assert "SHA-256" in wrong[0]
        assert inspect(packed.root, "--no-checksums")[0] == 0


def test_every_wrong_file_is_named(inspect, packed):
    root = packed.root
    os.truncate(root / "moments-00000.npy", 300)
    (root / "moments_flip-00001.npy").unlink()
    np.save(root / "labels-00003.npy", np.full(42, 9))
    flip(root / "moments-00003.npy")
    np.save(root / "moments-00002.npy", np.zeros((1, 8, 4, 4), np.float32))
    code, _, wrong, _ = inspect(root)
    assert code == 1
    names = [Path(line.split(": ")[1]).name for line in wrong]
    assert names == ["labels-00003.npy", *(f"moments-0000{n}.npy" for n in (0, 2, 3)), "moments_flip-00001.npy"]
    assert "label 9 of row 0; must be in [0, 4)" in wrong[0]
    assert "300 bytes long" in wrong[1]
    assert "float32 (1, 8, 4, 4) given; must be float16" in wrong[2]
    assert "cannot be read (No such file" in wrong[4]


@pytest.mark.parametrize(("value", "place"), [(np.nan, 0), (np.inf, 5), (-1.0, 6)])
def test_numbers_that_no_moments_can_be_are_found(inspect, tmp_path, value, place):
    stored = pack(tmp_path / "set")
    path = tmp_path / "set/moments-00003.npy"
    rows = np.load(path)
    rows[2, place, 1, 1] = value
    np.save(path, rows)
    code, output, wrong, _ = inspect(stored.root, "--no-checksums")
    assert code == 1
    assert wrong == [f"wrong: {path}: row 40 of the set is not finite, or deviates by less than 0"]
    assert "of 79 rows" in output


def test_a_class_without_rows_is_found(inspect, packed):
    path = change(packed.root, lambda m: m["classes"].append("zebra"))
    code, _, wrong, _ = inspect(packed.root)
    assert (code, wrong) == (1, [f"wrong: {path}: class 4 (zebra) has no images"])


def test_the_sheet_goes_through_the_vae(inspect, packed, tmp_path, monkeypatch):
    vae, names = stand_in(monkeypatch)
    code, output, _, _ = inspect(packed.root, "--vae", "mine", "--images", "9")
    assert code == 0
    assert names == ["mine"]
    assert "sheet.png (the means decoded by mine)" in output
    means = {row[:4].astype(np.float32).tobytes() for row in packed.rows}
    given = [z.numpy().tobytes() for part in vae.given for z in part]
    assert len(given) == 9
    assert set(given) <= means  # the latents before scaling, as the VAE made them
    assert Image.open(tmp_path / "sheet.png").size == (3 * 32 + 2,) * 2


@pytest.mark.parametrize("channels", [2, 4, 32])
def test_without_a_vae_channels_are_stretched(inspect, tmp_path, channels):
    pack(tmp_path / "set", shape=(channels, 4, 4), posterior=False)
    code, output, _, _ = inspect(tmp_path / "set", "--images", "4")
    assert code == 0
    assert f"(no VAE: {3 if channels > 2 else 1} of the channels, stretched)" in output
    assert "vae: none is named" in output
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert sheet.ndim == (3 if channels > 2 else 2)
    assert (sheet.min(), sheet.max()) == (0, 255)
    assert ("and 16 more" in output) == (channels == 32)


def test_a_vae_that_does_not_fit_is_said(inspect, packed, monkeypatch):
    stand_in(monkeypatch, channels=16)
    code, output, _, _ = inspect(packed.root, "--vae", "mine")
    assert code == 0
    assert "it decodes 16 channels; must decode 4" in output


def test_the_sheet_lies_beside_the_set_unless_told_otherwise(main, packed, tmp_path):
    assert main(["inspect", packed.root])[0] == 0
    assert (tmp_path / "inspect-set.png").is_file()
    before = sorted(tmp_path.iterdir())
    assert main(["inspect", packed.root, "--images", "0", "--out", tmp_path / "none.png"])[0] == 0
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("leading", [False, True])
def test_the_public_layout(inspect, tmp_path, leading):
    stored = publish(tmp_path / "public", leading=leading)
    code, output, wrong, _ = inspect(tmp_path / "public")
    assert (code, wrong) == (0, [])
    assert "24, a file each" in output
    assert "(8, 4, 4) float32: means and deviations" in output
    means = stored.rows[:, 1].astype(np.float64)
    assert np.allclose(figures(output, 1)[:2], [means.mean(), means.std()], rtol=1e-3)
    files = sorted(stored.root.rglob("*.npy"))
    files[3].write_bytes(files[3].read_bytes()[:-1])
    files[20].unlink()
    np.save(files[21], np.zeros((8, 5, 5), np.float32))
    code, output, wrong, _ = inspect(tmp_path / "public/vae-sd")
    assert code == 1
    assert [line.split(": ")[1] for line in wrong] == [str(files[n]) for n in (3, 20, 21)]
    assert "of 21 rows" in output


def test_a_folder_of_images(inspect, tmp_path):
    root = write_images(tmp_path / "data", count=20)
    code, output, wrong, _ = inspect(root)
    assert (code, wrong) == (0, [])
    size = sum(path.stat().st_size for path in root.rglob("*.png"))
    assert f"20 JPEG and PNG files, {size:,} bytes" in output
    assert "8 smallest, 8 median, 8 largest" in output
    assert "4: smallest c0 with 5" in output
    mean = np.mean([np.asarray(Image.open(path)).mean() for path in root.rglob("*.png")]) / 127.5 - 1
    assert float(re.search(r"standard deviation (\S+) and", output)[1]) == pytest.approx(mean, abs=0.01)
    assert Image.open(tmp_path / "sheet.png").size == (5 * 65 - 1, 4 * 65 - 1)
    files = sorted(root.rglob("*.png"))
    files[1].write_bytes(b"")
    files[4].write_bytes(files[4].read_bytes()[:40])
    flip(files[7], 45)  # only decoding finds it
    (root / "loose.gif").touch()
    code, output, wrong, warnings = inspect(root)
    assert len(warnings) == 1
    assert "1 .gif" in warnings[0]
    assert code == 1
    assert [line.split(": ")[1] for line in wrong] == [str(files[n]) for n in (1, 4, 7)]
    assert "of 17 images" in output


def test_what_is_no_set_is_refused(refused, tmp_path):
    pack(tmp_path / "set")
    (tmp_path / "set/manifest.json").unlink()
    assert "unfinished" in refused(["inspect", tmp_path / "set"])
    (tmp_path / "empty").mkdir()
    assert "must hold one folder per class" in refused(["inspect", tmp_path / "empty"])
    assert "data: '" in refused(["inspect", tmp_path / "nowhere"])
    pack(tmp_path / "set", scale=0)
    assert "scale: 0.0 given" in refused(["inspect", tmp_path / "set"])
    pack(tmp_path / "set")
    assert "rows: 0 given" in refused(["inspect", tmp_path / "set", "--rows", "0"])
    assert "images: -1 given" in refused(["inspect", tmp_path / "set", "--images", "-1"])
    assert not list(tmp_path.glob("*.png"))


def test_archives_are_refused_in_words(inspect, refused, tmp_path):
    tars = tmp_path / "tars"
    tars.mkdir()
    (tars / "train-000.tar").write_bytes(bytes(10240))
    for given in (tars, tars / "train-000.tar", tars / "train-{000..003}.tar"):
        assert "archives are not inspected: let `sra-fast prepare`" in refused(["inspect", given])
    write_images(tars, count=8)  # class folders beside them are what training reads
    assert inspect(tars)[0] == 0


def test_how_to_mend_a_packed_set_is_said_once(main, packed, tmp_path):
    def said():
        lines = main(["inspect", packed.root, "--images", "0", "--json", tmp_path / "found.json"])[2].splitlines()
        told = [line for line in lines if "sra-fast prepare" in line]
        assert told in ([], lines[-1:])
        assert strict_json((tmp_path / "found.json").read_text())["advice"] == "".join(told)
        return told

    (packed.root / "prepare.json").write_text("{}")
    assert said() == []
    flip(packed.root / "moments-00001.npy")
    os.truncate(packed.root / "moments-00000.npy", 300)
    assert "makes damaged files again" in said()[0]
    assert "--verify" in said()[0]
    (packed.root / "prepare.json").unlink()  # prepare would refuse the folder
    assert said() == []


def test_a_pipe_gets_no_progress_bars(packed, tmp_path):
    command = [Path(sys.executable).with_name("sra-fast"), "inspect", packed.root, "--out", tmp_path / "sheet.png"]
    ran = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert (ran.returncode, ran.stderr) == (0, "")
