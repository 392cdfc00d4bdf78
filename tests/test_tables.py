"""Tables of what delivers data: ratios are by either clock, to the best rival of the same kind."""

from __future__ import annotations

import pytest

from benchmarks.harness.tables import DATA_HEAD, data_table, is_data


def row(name, loader, speed, cpu_speed):
    figures = {"images_per_s": speed, "images_per_cpu_s": cpu_speed, "median_ms": 2.0, "p20_ms": 1.0, "p80_ms": 6.0}
    return {"name": name, "params": {"loader": loader}, "ours": loader.startswith("ours"), **figures}


def cells(table):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]


def test_ratios_are_to_the_best_rival_of_the_kind_by_each_clock():
    """Not to the rival that is the best by the other clock, nor to one of our own."""
    made = [
        row("latents", "ours, a", 900, 300),
        row("latents", "ours, b", 800, 9000),
        row("latents", "rival, 0", 50, 100),
        row("latents", "rival, 2", 60, 80),
        row("decode", "ours, a", 5, 12),
        row("decode", "rival, 0", 7, 16),
    ]
    head, _, *lines = cells(data_table(made))
    assert head == list(DATA_HEAD)
    assert head[2:6] == ["images/s", "x rival", "images/CPU-s", "x rival"]
    assert [line[3] for line in lines] == ["15.00", "13.33", "0.83", "1.00", "0.71", "1.00"]
    assert [line[5] for line in lines] == ["3.00", "90.00", "1.00", "0.80", "0.75", "1.00"]
    assert lines[0] == ["latents", "ours, a", "900", "15.00", "300", "3.00", "2", "1 ... 6"]


@pytest.mark.parametrize(
    ("params", "cell"),
    [
        ({"files": 5, "made_up": False}, "decode, 5 JPEGs"),
        ({"files": 5, "made_up": True}, "decode, 5 made-up JPEGs"),
        ({"files": 5}, "decode, 5 JPEGs"),
        ({}, "decode"),
    ],
)
def test_jpegs_are_counted_and_said_to_be_made_up(params, cell):
    made = row("decode", "ours", 1, 1)
    made["params"] |= params
    _, _, line = cells(data_table([made]))
    assert line[:2] == [cell, "ours"]


def test_a_kind_without_rivals_has_no_ratio():
    made = [row("encode", "AutoencoderKL", 3.5, 2.5) | {"ours": True}, row("latents", "rival", 5, 4)]
    _, _, encode, latents = cells(data_table(made))
    assert encode == ["encode", "AutoencoderKL", "3.5", "", "2.5", "", "2", "1 ... 6"]
    assert (latents[3], latents[5]) == ("1.00", "1.00")


def test_rows_of_other_programs_are_left_out():
    others = [{"name": "step", "params": {"rung": "ours"}}, {"name": "adaln", "params": {"implementation": "fused"}}]
    assert not any(map(is_data, others))
    made = row("latents", "ours", 1, 1)
    assert data_table([others[0], made, others[1]]) == data_table([made])
