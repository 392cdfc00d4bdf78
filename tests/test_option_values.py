"""Command lines with random values of random options, seeded: each ends with exit code 0 or with one line."""

from __future__ import annotations

import dataclasses
import random
import typing
from collections.abc import Iterator

import pytest
from small_data import pack, publish
from small_faults import SCALE, SEED, named
from small_run import arguments, write_images

from sra_fast.config import (
    Config,
    EvaluateCommand,
    ExportCommand,
    InspectCommand,
    PrepareCommand,
    ProfileCommand,
    SampleCommand,
)

pytestmark = pytest.mark.slow

NUMBERS = [
    *(
        "0",
        "1",
        "-1",
        "2",
        "3",
        "7",
        "8",
        "64",
        "1000",
        "65537",
        "1000002",
        "2147483648",
        "9223372036854775808",
        "-0",
        "+3",
    ),
    *(
        "99999999999999999999999",
        "1e3",
        "1e39",
        "1e308",
        "1e-320",
        "0.5",
        "1.0000001",
        "-0.5",
        "nan",
        "inf",
        "-inf",
        "0x10",
    ),
    *("1_000", "1,5", "٣", "1/2", "10**9"),
]
TEXTS = [
    *(
        "",
        " ",
        ".",
        "..",
        "-",
        "--",
        "a/b",
        "../x",
        "/dev/null",
        "/dev/full",
        "/proc/self/mem",
        "/proc/x",
    ),
    *(
        "a\nb",
        "\x1b[31m",
        "\udcff",
        "é",
        "日本",
        "x" * 300,
        "x" * 5000,
        "None",
        "True",
        "auto",
        "{}",
        "[1]",
        "%s",
        "$HOME",
        "*",
    ),
]
WORDS = ["--help", "--", "-x", "--train.batch", "--no-such", "--run.name=a=b", "extra", "--train.images=", "@file"]


def options_of(cls: type, prefix: str = "") -> Iterator[tuple[str, object]]:
    """(option, type) of every field, as on the command line."""
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        name, hint = f"{prefix}{field.name}".replace("_", "-"), hints[field.name]
        if dataclasses.is_dataclass(hint):
            yield from options_of(
                typing.cast(type, hint),
                f"{prefix}{field.name}." if cls is not ProfileCommand or field.name == "profile" else "",
            )
        else:
            yield f"--{name}", hint


def random_words(rng: random.Random, choices: list[tuple[str, object]], places: list[str]) -> list[str]:
    """One to three options with values that are mostly of their type."""
    words = []
    for option, hint in rng.choices(choices, k=rng.choice((1, 1, 2, 3))):
        kind = rng.random()
        if hint is bool and kind < 0.8:
            section, dot, name = option.removeprefix("--").rpartition(".")
            words.append(rng.choice((option, f"--{section}{dot}no-{name}")))
        elif typing.get_origin(hint) is typing.Literal and kind < 0.6:
            words += [option, str(rng.choice(typing.get_args(hint)))]
        elif hint in (int, float) and kind < 0.8:
            words += [option, rng.choice(NUMBERS)]
        elif kind < 0.95:
            words += [option, rng.choice([*TEXTS, *places, *places])]
        else:
            words.append(option)
    if rng.random() < 0.1:
        words.insert(rng.randrange(len(words) + 1), rng.choice(WORDS))
    return words


@pytest.mark.parametrize("command", ["train", "profile", "sample", "evaluate", "export", "prepare", "inspect"])
def test_any_value_of_any_option_is_used_or_refused_in_one_line(server, tmp_path, command):
    root = tmp_path
    write_images(root / "data")
    pack(root / "set")
    publish(root / "public", count=12)
    assert server.run(arguments(root, train__images=16)).check().code == 0
    run = root / "runs/a"
    places = [
        root / "data",
        root / "set",
        root / "public",
        run,
        run / "checkpoints/000000000016",
        root / "set/manifest.json",
    ]
    train = arguments(root, train__images=16, run__name="b")
    commands: dict[str, tuple[type, list[object]]] = {
        "train": (Config, list(train)),
        "profile": (ProfileCommand, ["profile", *train[1:], "--profile.out", root / "profile", "--profile.steps", 1]),
        "sample": (
            SampleCommand,
            ["sample", "--weights", run, "--out", root / "out", "--sample.count", 2, "--overwrite"],
        ),
        "evaluate": (EvaluateCommand, ["evaluate", "--weights", run, "--evaluate.samples", 8]),
        "export": (ExportCommand, ["export", "--weights", run, "--out", root / "weights.safetensors"]),
        "prepare": (
            PrepareCommand,
            ["prepare", "--images", root / "data", "--no-vae", "--resolution", 8, "--out", root / "new"],
        ),
        "inspect": (InspectCommand, ["inspect", root / "set", "--images", 0]),
    }
    cls, base = commands[command]
    choices = [(option, hint) for option, hint in options_of(cls) if option != "--data"]
    for trial in range(round(60 * SCALE)):
        rng = random.Random(f"{SEED} {command} {trial}")
        words = [*map(str, base), *random_words(rng, choices, list(map(str, places)))]
        with named(f"trial {trial}: {words[len(base) :]}"):
            outcome = server.run(words).check()
            assert outcome.code in (0, 1)
