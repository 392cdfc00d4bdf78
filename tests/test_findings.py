"""data/findings.py: tables that can be read, bars that are true, and values that JSON has."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_sets import pack

from sra_fast.data.packed import PackedSet
from sra_fast.tools.findings import BINS, FEW, Findings, Statistics, Sums, class_lines, printable, size_bins, table


@given(st.lists(st.integers(1, 2000), min_size=1, max_size=200))
def test_bins_hold_every_class_once(sizes):
    bins = size_bins(np.array(sizes))
    assert 1 <= len(bins) <= BINS
    assert (bins[0][0], bins[-1][1]) == (min(sizes), max(sizes))
    assert all(before[1] + 1 == after[0] for before, after in pairwise(bins))
    assert [count for *_, count in bins] == [sum(low <= n <= high for n in sizes) for low, high, _ in bins]


def test_many_classes():
    counts = np.r_[1300 - np.arange(90), np.full(10, 732)]
    names = [f"n{label:08d}" for label in range(100)]
    lines = list(class_lines(names, counts))
    assert lines[0] == ("classes", "100: 10%, half and 90% of them have up to 1,163 1,250 1,290")
    bars = [re.fullmatch(r" *([\d,]+) to ([\d,]+) images +(\d+) (#*)", text).groups() for _, text in lines[1:-2]]
    assert (bars[0][0], bars[-1][1]) == ("732", "1,300")
    assert [int(count) for _, _, count, _ in bars] == [10, 0, 0, 0, 0, 0, 25, 65]
    assert [len(bar) for *_, bar in bars] == [7, 0, 0, 0, 0, 0, 16, 40]
    assert len({text.index("images") for _, text in lines[1:-2]}) == 1
    assert lines[-2] == ("smallest", ", ".join(f"n{label:08d} with 732" for label in range(90, 95)))
    assert lines[-1] == ("largest", ", ".join(f"n{n:08d} with {1300 - n:,}" for n in range(5)))


def test_classes_of_one_size_are_one_bar():
    lines = list(class_lines([str(label) for label in range(1000)], np.full(1000, 50)))
    assert [text for _, text in lines[1:-2]] == [f"50 images     1,000 {'#' * 40}"]


@pytest.mark.parametrize("posterior", [True, False])
def test_columns_never_run_together(posterior):
    numbers = [-0.009711, 5.466e-05, -1.234e-05, 0.596, -1.2345e-10, 123456.0]
    names = ["mean", "std", "deviation_mean", "deviation_std", "x_mean", "x_std"]
    chosen = names if posterior else [name for name in names if "dev" not in name]
    channels = [dict(zip(chosen, np.roll(numbers, turn).tolist(), strict=False)) for turn in range(FEW + 2)]
    lines = [text for title, text in table(Statistics(7, channels)) if not title]
    titles = [
        "channel",
        "means: mean" if posterior else "values: mean",
        "std",
        *["deviations: mean", "std"] * posterior,
        "x: mean",
        "std",
    ]
    assert re.split(r" {2,}", lines[0]) == titles
    for row, channel in enumerate(channels[:FEW]):
        assert re.split(r" {2,}", lines[1 + row].strip()) == [str(row), *(f"{n:.4g}" for n in channel.values())]
    assert len({len(line) for line in lines[: 1 + FEW]}) == 1
    assert lines[1 + FEW :] == ["and 2 more; of x, std from -0.009711 to 1.235e+05"]


def test_statistics_of_what_is_stored_and_of_x(tmp_path):
    stored = pack(tmp_path / "set", scale=[1.0, -2.0, 1.0, 1.0], shift=[0.0, 0.5, 0.0, 0.0])
    sums = Sums()
    for row in torch.from_numpy(stored.rows).double():
        sums.add(*row.chunk(2))
    made = sums.statistics(PackedSet(stored.root))
    means, deviations = (part[:, 1] for part in np.split(stored.rows.astype(np.float64), 2, axis=1))
    assert made.rows == len(stored.rows)
    assert len(made.channels) == 4
    expected = {
        "mean": means.mean(),
        "std": means.std(),
        "deviation_mean": deviations.mean(),
        "deviation_std": deviations.std(),
        "x_mean": -2 * (means.mean() - 0.5),
        "x_std": 2 * np.sqrt(means.var() + (deviations**2).mean()),
    }
    assert made.channels[1] == pytest.approx(expected)
    assert all(type(number) is float for number in made.channels[1].values())


def test_json_and_lines_say_the_same_of_names():
    found = Findings("image folder", Path("d\udce4ta"), True, 3, ("a", "a", "\udcff"), np.array([1, 1, 1]), bytes=7)
    found.wrong[Path("d\udce4ta/\udcff/1.png")] = "empty"
    made = json.loads(json.dumps(found.as_json()))
    assert made["data"] == printable("d\udce4ta") == "d\\udce4ta"
    assert made["classes"] == [{"name": name, "images": 1} for name in ("a", "a", "\\udcff")]  # two of one name
    assert made["wrong"] == [{"file": "d\\udce4ta/\\udcff/1.png", "reason": "empty"}]
    assert made["exit_code"] == 1
    assert printable("ä 日本") == "ä 日本"
    assert ("images", "3 JPEG and PNG files, 7 bytes") in list(found.lines())


def test_factors_of_many_channels_are_cut_short(tmp_path):
    found = Findings("packed set", tmp_path, True, 1, ("a",), np.array([1]), shape=(32, 2, 2), vae="")
    found.scale, found.shift = tuple(1 / (3 + n) for n in range(32)), (1.0, -2.5)
    line = dict(found.lines())["scale, shift"]
    assert line == "[0.3333 0.25 0.2 0.1667 ...], [1 -2.5]: x = (z - shift) * scale"
