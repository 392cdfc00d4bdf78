"""inspect.py, findings.py: the report is true, as text and as JSON, and every damaged file is named."""

from __future__ import annotations

import errno
import io
import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from small_data import change, flip_bit, kill, pack, publish, stand_in
from small_run import complaint, strict_json, write_images

from sra_fast import cli


@pytest.fixture
def inspect(main, tmp_path):
    """(exit code, stdout, lines of what is wrong, warnings) of `sra-fast inspect`. Its PNG is sheet.png; its JSON must
    agree with the text."""

    def call(data, *words):
        code, output, error = main(
            ["inspect", data, "--out", tmp_path / "sheet.png", "--json", tmp_path / "report.json", *words]
        )
        lines = error.replace("\r", "\n").splitlines()
        assert "Traceback" not in error
        wrong, warnings = ([line for line in lines if line.startswith(kind)] for kind in ("wrong: ", "warning: "))
        report = strict_json((tmp_path / "report.json").read_text())
        assert report["exit_code"] == code == bool(wrong)
        assert [f"wrong: {file['file']}: {file['reason']}" for file in report["wrong"]] == wrong
        assert [f"warning: {text}" for text in report["warnings"]] == warnings
        assert (f"{len(wrong)} wrong" if wrong else "nothing wrong found") in output
        return code, output, wrong, warnings

    return call


@pytest.fixture
def report(tmp_path):
    return lambda: strict_json((tmp_path / "report.json").read_text())


def figures(output, channel):
    """Numbers of a channel in the printed statistics."""
    lines = output.partition("statistics")[2].splitlines()
    return [float(word) for word in next(line for line in lines if re.match(rf"\s+{channel}\s", line)).split()[1:]]


@pytest.fixture
def packed(tmp_path):
    skipped = [{"file": f"c0/{n}.jpg", "reason": "cut short"} for n in range(12)]
    return pack(tmp_path / "set", flips=True, skipped=skipped, vae="mine")


def test_a_packed_set(inspect, packed, report, tmp_path):
    code, output, wrong, warnings = inspect(packed.root)
    assert (code, wrong, warnings) == (0, [], [])
    size = sum(path.stat().st_size for path in packed.root.glob("*.npy"))
    for text in (
        "80 of 32 x 32 pixels, crop adm",
        "(8, 4, 4) float16: means and deviations, with mirrored rows",
        f"4, {size:,} bytes",
        "0.9, 0.0: x = (z - shift) * scale",
        "0 c0 20, 1 c1 20, 2 c2 20, 3 c3 20",
        "c0/9.jpg: cut short",
        "statistics    of 80 rows",
    ):
        assert text in output
    assert "c0/10.jpg" not in output  # the first ten
    expected = {
        "kind": "packed set",
        "data": str(packed.root),
        "checksums": True,
        "images": 80,
        "classes": [{"name": f"c{n}", "images": 20} for n in range(4)],
        "resolution": 32,
        "crop": "adm",
        "shape": [8, 4, 4],
        "dtype": "float16",
        "posterior": True,
        "flips": True,
        "scale": 0.9,
        "shift": 0.0,
        "vae": "mine",
        "shards": 4,
        "bytes": size,
        "shorter_side": None,
        "skipped": [{"file": f"c0/{n}.jpg", "reason": "cut short"} for n in range(12)],
        "advice": "",
        "exit_code": 0,
        "wrong": [],
        "warnings": [],
    }
    written = report()
    assert {name: written.pop(name) for name in expected} == expected
    assert sorted(written) == ["sheet", "statistics"]
    assert written["sheet"]["file"] == str(tmp_path / "sheet.png")
    assert written["sheet"]["missing"] in output
    assert not list(tmp_path.rglob("*.tmp"))


def test_the_statistics_are_numpys(inspect, tmp_path, report):
    """x is a sample of the posterior, so the deviations are part of its variance."""
    stored = pack(tmp_path / "set", scale=[1.0, -2.0, 1.0, 1.0], shift=[0.0, 0.5, 0.0, 0.0])
    output = inspect(stored.root)[1]
    assert report()["statistics"]["rows"] == 80
    means, deviations = np.split(stored.rows.astype(np.float64), 2, axis=1)
    for channel, numbers in enumerate(report()["statistics"]["channels"]):
        z, std = means[:, channel], deviations[:, channel]
        scale, shift = (-2, 0.5) if channel == 1 else (1, 0)
        expected = {
            "mean": z.mean(),
            "std": z.std(),
            "deviation_mean": std.mean(),
            "deviation_std": std.std(),
            "x_mean": scale * (z.mean() - shift),
            "x_std": abs(scale) * np.sqrt(z.var() + (std**2).mean()),
        }
        assert numbers == pytest.approx(expected)
        assert figures(output, channel) == [float(f"{number:.4g}") for number in numbers.values()]
    inspect(stored.root, "--rows", 5)  # spread over the set
    sample = means[[0, 19, 39, 59, 79], 0]
    assert report()["statistics"]["rows"] == 5
    assert report()["statistics"]["channels"][0]["std"] == pytest.approx(sample.std())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"scale": 5.0}, "x of channel 0 has a standard deviation of 5"),
        ({"scale": [1.0, 1.0, 0.1, 1.0]}, "x of channel 2 has a standard deviation of 0.1"),
        ({"shift": [0.0, 4.0, 0.0, 0.0]}, "x of channel 1 has a mean of -3"),
        ({"dtype": "uint8", "shape": (3, 4, 4), "scale": 1.0}, "x of channel 0 has a standard deviation of"),
    ],
)
def test_a_wrong_factor_is_a_warning(inspect, tmp_path, fields, message):
    pack(tmp_path / "set", **fields)
    code, _, _, warnings = inspect(tmp_path / "set")
    assert code == 0
    assert message in warnings[0]


def test_the_sheet_of_packed_pixels_shows_every_class(inspect, tmp_path):
    stored = pack(tmp_path / "set", dtype="uint8", shape=(3, 8, 8))
    code, output, _, warnings = inspect(tmp_path / "set", "--images", 4)
    assert (code, warnings) == (0, [])
    assert "the pixels as they are stored" in output
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert sheet.shape == (65, 65, 3)  # 8 x 8, magnified by four, two in a row
    shown = {sheet[top : top + 32 : 4, left : left + 32 : 4].tobytes() for top in (0, 33) for left in (0, 33)}
    labels = {row.transpose(1, 2, 0).tobytes(): label for row, label in zip(stored.rows, stored.labels, strict=True)}
    assert sorted(labels[image] for image in shown) == [0, 1, 2, 3]


def test_the_sheet_of_latents_shows_decoded_means(inspect, packed, tmp_path, monkeypatch):
    vae, names = stand_in(monkeypatch)
    assert "sheet.png (the means decoded by other)" in inspect(packed.root, "--vae", "other", "--images", "9")[1]
    assert names == ["other"]
    means = {row[:4].astype(np.float32).tobytes() for row in packed.rows}
    decoded = [z.numpy().tobytes() for part in vae.given for z in part]
    assert len(decoded) == 9
    assert set(decoded) <= means  # before scaling
    assert Image.open(tmp_path / "sheet.png").size == (3 * 32 + 2,) * 2
    stand_in(monkeypatch, channels=16)
    assert "it decodes 16 channels; must decode 4" in inspect(packed.root, "--vae", "other")[1]


@pytest.mark.parametrize("channels", [2, 32])
def test_without_a_vae_the_sheet_shows_channels(inspect, tmp_path, channels):
    pack(tmp_path / "set", shape=(channels, 4, 4), posterior=False, scale=[1.0] * channels)
    output = inspect(tmp_path / "set", "--images", "4")[1]
    assert f"(no VAE: {3 if channels > 2 else 1} of the channels, stretched)" in output
    assert "vae: " in output
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert (sheet.ndim, sheet.min(), sheet.max()) == (3 if channels > 2 else 2, 0, 255)
    assert ("and 16 more" in output) == (channels == 32)


def test_many_classes_are_summarised(inspect, tmp_path, report):
    pack(tmp_path / "set", classes=30)
    line = "30: smallest c20 with 2 images, largest c0 with 3; 10 / 50 / 90 % quantiles 2 / 3 / 3\n"
    assert line in inspect(tmp_path / "set")[1]
    assert report()["classes"] == [{"name": f"c{n}", "images": 3 if n < 20 else 2} for n in range(30)]


def test_names_that_are_not_utf_8_are_escaped(tmp_path, monkeypatch):
    root = write_images(tmp_path / "data", count=4)
    (root / "c1").rename(root / os.fsdecode(b"caf\xe9"))
    (root / "c2" / os.fsdecode(b"\xff.png")).write_bytes(b"")
    root = root.rename(tmp_path / os.fsdecode(b"d\xe4ta"))
    streams = [io.TextIOWrapper(io.BytesIO(), "utf-8", errors="strict", write_through=True) for _ in range(2)]
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", streams[0])
        patch.setattr(sys, "stderr", streams[1])
        assert cli.main(["inspect", str(root), "--json", str(tmp_path / "report.json")]) == 1
    output, error = (stream.buffer.getvalue().decode() for stream in streams)
    assert "caf\\udce9 1" in output
    assert f"wrong: {tmp_path}/d\\udce4ta/c2/\\udcff.png: empty file" in error
    report = strict_json((tmp_path / "report.json").read_text())
    assert [kind["name"] for kind in report["classes"]] == ["c0", "c2", "c3", "caf\\udce9"]
    report["wrong"][0]["file"].encode()  # no lone surrogate


def test_every_wrong_file_is_named(inspect, packed, report):
    root = packed.root
    flip_bit(root / "moments-00003.npy")
    flip_bit(root / "labels-00000.npy", -8)
    assert len(inspect(root)[2]) == 2
    assert "SHA-256" in inspect(root)[2][1]
    assert len(inspect(root, "--no-checksums")[2]) == 1  # the label is out of range
    os.truncate(root / "moments-00000.npy", 300)
    (root / "moments_flip-00001.npy").unlink()
    np.save(root / "labels-00003.npy", np.full(42, 9))
    np.save(root / "moments-00002.npy", np.zeros((1, 8, 4, 4), np.float32))
    wrong = inspect(root)[2]
    names = [Path(line.split(": ")[1]).name for line in wrong[1:]]
    assert names == ["labels-00003.npy", *(f"moments-0000{n}.npy" for n in (0, 2, 3)), "moments_flip-00001.npy"]
    assert "label 9 of row 0; must be in [0, 4)" in wrong[1]
    assert "300 bytes long" in wrong[2]
    assert "float32 (1, 8, 4, 4); must be float16" in wrong[3]
    assert "cannot be read (No such file" in wrong[5]
    assert report()["classes"][0] == {"name": "c0", "images": None}  # the set cannot be opened
    assert (report()["statistics"], report()["sheet"]) == (None, None)


@pytest.mark.parametrize(("value", "channel"), [(np.nan, 0), (np.inf, 5), (-1.0, 6)])
def test_invalid_moments_are_found(inspect, tmp_path, value, channel):
    stored = pack(tmp_path / "set")
    path = stored.root / "moments-00003.npy"
    rows = np.load(path)
    rows[2, channel, 1, 1] = value
    np.save(path, rows)
    _, output, wrong, _ = inspect(stored.root, "--no-checksums")
    assert wrong == [f"wrong: {path}: row 40 of the set has a number that is not finite, or a deviation below 0"]
    assert "of 79 rows" in output


def test_a_class_without_rows_is_found(inspect, packed):
    path = change(packed.root, lambda m: m["classes"].append("zebra"))
    assert inspect(packed.root)[2] == [f"wrong: {path}: class 4 (zebra) has no images"]


def test_results_are_printed_although_the_sheet_or_the_json_cannot_be_written(main, packed, tmp_path, monkeypatch):
    replace = Path.replace

    def fail(self, target):
        if self.name in unwritable:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", fail)
    unwritable = ["inspect-set.png.tmp"]
    code, output, error = main(["inspect", packed.root, "--json", tmp_path / "report.json"])
    assert (code, "nothing wrong found" in output) == (0, True)
    assert (
        f"warning: no sample images: {tmp_path / 'inspect-set.png'}: could not be written (Read-only file system)"
        in error
    )
    unwritable = ["report.json.tmp"]
    code, output, error = main(["inspect", packed.root, "--json", tmp_path / "report.json"])
    assert (code, "nothing wrong found" in output) == (1, True)
    assert complaint((output, error)).endswith("report.json: could not be written (Read-only file system)")


def test_a_place_that_cannot_be_written_is_refused_before_the_set_is_read(main, packed, tmp_path, monkeypatch):
    monkeypatch.setattr("sra_fast.tools.inspect.read_manifest", kill)
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    for option in ("json", "out"):
        code, _, error = main(["inspect", packed.root, f"--{option}", tmp_path / "new/result"])
        assert (code, f"{option}: " in error, f"{tmp_path} cannot be written" in error) == (1, True, True)
        assert not (tmp_path / "new").exists()


def test_the_sheet_is_beside_the_set_unless_told_otherwise(main, packed, tmp_path):
    assert main(["inspect", packed.root])[0] == 0
    assert (tmp_path / "inspect-set.png").is_file()
    before = sorted(tmp_path.iterdir())
    assert main(["inspect", packed.root, "--images", "0", "--out", tmp_path / "none.png"])[0] == 0
    assert sorted(tmp_path.iterdir()) == before


def test_the_public_layout(inspect, tmp_path, report):
    stored = publish(tmp_path / "public")
    _, output, wrong, _ = inspect(tmp_path / "public")
    assert wrong == []
    assert "24, one file each" in output
    assert "(8, 4, 4) float32: means and deviations" in output
    assert (report()["kind"], [kind["images"] for kind in report()["classes"]]) == ("public layout", [8, 8, 8])
    means = stored.rows[:, 1].astype(np.float64)
    assert np.allclose(figures(output, 1)[:2], [means.mean(), means.std()], rtol=1e-3)
    files = sorted(stored.root.rglob("*.npy"))
    files[3].write_bytes(files[3].read_bytes()[:-1])
    files[20].unlink()
    np.save(files[21], np.zeros((8, 5, 5), np.float32))
    _, output, wrong, _ = inspect(tmp_path / "public/vae-sd")
    assert [line.split(": ")[1] for line in wrong] == [str(files[n]) for n in (3, 20, 21)]
    assert "of 21 rows" in output


def test_a_folder_of_images(inspect, tmp_path, report):
    root = write_images(tmp_path / "data", count=20)
    _, output, wrong, _ = inspect(root)
    assert wrong == []
    size = sum(path.stat().st_size for path in root.rglob("*.png"))
    assert f"20 JPEG and PNG files, {size:,} bytes" in output
    assert (report()["kind"], report()["shape"], report()["shorter_side"]) == ("image folder", None, [8, 8, 8])
    mean = np.mean([np.asarray(Image.open(path)).mean() for path in root.rglob("*.png")]) / 127.5 - 1
    assert report()["statistics"]["channels"][1]["x_mean"] == pytest.approx(mean, abs=0.01)
    assert [list(channel) for channel in report()["statistics"]["channels"]] == [["x_mean", "x_std"]] * 3
    assert Image.open(tmp_path / "sheet.png").size == (5 * 65 - 1, 4 * 65 - 1)
    files = sorted(root.rglob("*.png"))
    files[1].write_bytes(b"")
    files[4].write_bytes(files[4].read_bytes()[:40])
    flip_bit(files[7], 45)  # only decoding finds it
    (root / "loose.gif").touch()
    _, output, wrong, warnings = inspect(root)
    assert "1 .gif" in warnings[0]
    assert [line.split(": ")[1] for line in wrong] == [str(files[n]) for n in (1, 4, 7)]
    assert "of 17 images" in output
    inspect(root, "--images", "0", "--no-checksums")
    assert (report()["bytes"], report()["sheet"]) == (None, None)


def test_what_is_no_set_is_refused(inspect, refused, tmp_path):
    pack(tmp_path / "set")
    (tmp_path / "set/manifest.json").unlink()
    assert f"data: {tmp_path / 'set'}: has no manifest.json; the set is unfinished" in refused(
        ["inspect", tmp_path / "set"]
    )
    (tmp_path / "empty").mkdir()
    assert "must hold one folder per class" in refused(["inspect", tmp_path / "empty"])
    assert "data: '" in refused(["inspect", tmp_path / "nowhere"])
    pack(tmp_path / "set", scale=0)
    assert "scale: 0.0 given" in refused(["inspect", tmp_path / "set"])
    pack(tmp_path / "set")
    assert "rows: 0 given" in refused(["inspect", tmp_path / "set", "--rows", "0"])
    assert "images: -1 given" in refused(["inspect", tmp_path / "set", "--images", "-1"])
    assert "json: '" in refused(["inspect", tmp_path / "set", "--json", tmp_path])
    assert not list(tmp_path.glob("*.png"))
    tars = tmp_path / "tars"
    tars.mkdir()
    (tars / "train-000.tar").write_bytes(bytes(10240))
    for data in (tars, tars / "train-000.tar", tars / "train-{000..003}.tar"):
        assert "archives are not inspected: let `sra-fast prepare`" in refused(["inspect", data])
    write_images(tars, count=8)  # beside class folders they are ignored, as in training
    assert inspect(tars)[0] == 0


def test_advice_is_given_for_damaged_sets_that_prepare_made(inspect, packed, report):
    (packed.root / "prepare.json").write_text("{}")
    inspect(packed.root)
    assert report()["advice"] == ""
    flip_bit(packed.root / "moments-00001.npy")
    inspect(packed.root)
    assert "makes damaged files again; with --verify" in report()["advice"]
    (packed.root / "prepare.json").unlink()
    inspect(packed.root)
    assert report()["advice"] == ""


def test_by_products_do_not_replace_files_of_the_set(main, packed):
    before = {path: path.read_bytes() for path in packed.root.iterdir()}
    for option, name in (("json", "manifest.json"), ("out", "moments-00000.npy")):
        code, _, error = main(["inspect", packed.root, f"--{option}", packed.root / name])
        assert (code, f"{option}: " in error, "must not replace a file of the data set" in error) == (1, True, True)
    assert {path: path.read_bytes() for path in packed.root.iterdir()} == before
