"""Files are written completely or not at all, and JSON is strict."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from small_run import full_disk, strict_json

from sra_fast.errors import Damaged, Refused
from sra_fast.files import read_json, replacing, write_json, write_text


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_becomes_null(tmp_path: Path, value: float) -> None:
    write_json(tmp_path / "a.json", {"a": [1.5, {"b": value}], "c": (value,)})
    assert strict_json((tmp_path / "a.json").read_text()) == {"a": [1.5, {"b": None}], "c": [None]}


def interrupt(path: Path) -> None:
    with replacing(path) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt


def overfill(path: Path) -> None:
    with full_disk(100):
        write_text(path, "x" * 200)


@pytest.mark.parametrize(
    ("write", "error"),
    [
        (lambda path: write_json(path, {"a": object()}), TypeError),
        (interrupt, KeyboardInterrupt),
        (overfill, Refused),
    ],
)
def test_a_file_is_replaced_completely_or_not_at_all(tmp_path: Path, write, error: type[BaseException]) -> None:
    path = tmp_path / "new folder/a.json"
    write_json(path, {"a": 1})
    with pytest.raises(error) as raised:
        write(path)
    assert error is not Refused or str(path) in str(raised.value)
    assert read_json(path) == {"a": 1}
    assert [path.name for path in path.parent.iterdir()] == ["a.json"]


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100_000, None])
def test_an_unreadable_json_file_is_refused_by_name(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "a.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(Damaged, match=r"a\.json: not a readable JSON file") as refusal:
        read_json(path)
    assert "\n" not in str(refusal.value)
    assert refusal.value.path == path
