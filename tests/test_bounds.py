"""Every number and every text of every option ends in acceptance or in one line, whatever it is."""

from __future__ import annotations

import dataclasses
import os
import typing
from collections.abc import Iterator

import pytest
from small_run import arguments

from sra_fast.config import (
    Config,
    EvaluateCommand,
    ExportCommand,
    InspectCommand,
    PrepareCommand,
    ProfileConfig,
    SampleCommand,
    preset,
)
from sra_fast.errors import Refused, printable

NUMBERS = [0, 1, 2, -1, 10**5, 10**9, 2**31, 2**63, 10**23, 10**400, 0.5, 1e39, 1e308, float("nan"), float("inf")]
TEXTS = ["", ".", "..", "/", "a\0b", "a\nb", "\x1b[31m", "\udcff", "x" * 10_000, "\u202e", "été", "-1", "--x"]


def commands(folder: str) -> list[tuple[str, object]]:
    """(prefix of the options, an object of defaults), with all sections of a run."""
    config = preset("digits")
    sections = [(f.name, getattr(config, f.name)) for f in dataclasses.fields(Config)]
    return [
        *((name, section) for name, section in sections if dataclasses.is_dataclass(section)),
        ("", config),
        ("sample", SampleCommand(weights="w")),
        ("evaluate", EvaluateCommand(weights="w")),
        ("export", ExportCommand(weights="w", out=f"{folder}/w.pt")),
        ("inspect", InspectCommand(data="d")),
        ("prepare", PrepareCommand(out="o", images="i", no_vae=True)),
        ("profile", ProfileConfig()),
    ]


def fields(folder: str, kinds: tuple[type, ...]) -> Iterator[tuple[object, str]]:
    for _, defaults in commands(folder):
        hints = typing.get_type_hints(type(defaults))
        for field in dataclasses.fields(defaults):
            if hints[field.name] in kinds:
                yield defaults, field.name


def outcome(defaults: object, name: str, value: object) -> str:
    """ "" if the value is accepted, else the line with which it is refused. Any other exception is the failure."""
    try:
        dataclasses.replace(defaults, **{name: value})
        line = ""
    except Refused as error:
        line = str(error)
    assert "\n" not in line
    return line


def test_numbers(tmp_path):
    seen = 0
    for defaults, name in fields(str(tmp_path), (int, float)):
        for value in NUMBERS:
            line = outcome(defaults, name, value)
            assert line or abs(value) <= 2**63, (name, value)
            assert not line or "must" in line
        assert outcome(defaults, name, 10**23), f"{name} has no upper bound"
        seen += 1
    assert seen > 60


def test_texts(tmp_path):
    seen = 0
    for defaults, name in fields(str(tmp_path), (str,)):
        for value in TEXTS:
            line = outcome(defaults, name, value)
            assert line == printable(line)
        for value in ("a\0b", "a\nb", "\x1b[31m", "x" * 10_000):
            assert outcome(defaults, name, value), (name, value)
        seen += 1
    assert seen > 12


LIMITS = [
    (f"{prefix}.{name}".replace("_", "-"), limit)
    for prefix, defaults in commands(os.curdir)
    if prefix in {field.name for field in dataclasses.fields(Config)}
    for name, limit in type(defaults).limits.items()
]


def test_numbers_at_their_limits_end_in_one_line_too(root, main):
    """Where a run would begin: what is accepted must fit, or be refused with the arithmetic."""
    for option, limit in LIMITS:
        value = str(int(limit)) if limit == int(limit) and "weight" not in option else str(limit)
        code, _, error = main([*arguments(root, run__dry_run=True), f"--{option}", value])
        assert (code, error.count("\n")) in ((0, 0), (1, 1)), (option, error)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain é 名", "plain é 名"),
        ("\x1b[2J", "\\x1b[2J"),
        ("a\udcffb", "a\\udcffb"),
        ("\u202egpj", "\\u202egpj"),
        ("a\nb", "a\\nb"),
    ],
)
def test_a_terminal_obeys_no_name(text, shown):
    assert printable(text) == shown
    assert str(Refused("a", text, "must not")).isprintable()
