"""What every part of the configuration shares: type and value checks, and conversion to and from JSON values."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
import unicodedata
from functools import cache
from typing import Any, ClassVar, Literal, TypeVar

from tyro import MISSING

from sra_fast.errors import Refused

# Of numbers: beyond the images of any run, and exact as a float and as int64, even in sums and products of a few.
LARGEST = 10**15
LONGEST = 4096  # characters of a text: the longest path of Linux

T = TypeVar("T")


class Section:
    """Base class of the configuration's dataclasses. Creating one checks the type of every field, then calls
    `check`."""

    section: ClassVar[str]
    """Prefix of its options on the command line."""
    limits: ClassVar[dict[str, float]] = {}
    """The largest value of a number, where it is not `LARGEST`."""

    def __post_init__(self) -> None:
        if any(getattr(self, name) is MISSING for name in _hints(type(self))):
            return  # tyro's mark for an option that must be given: this object only holds defaults
        for name, hint in _hints(type(self)).items():
            value = getattr(self, name)
            _check_type(hint, value, self.option(name))
            if hint in (int, float):
                limit = self.limits.get(name, LARGEST)
                self.need(value <= limit, name, f"must be at most {limit:,}")
            if hint is float:  # a whole number stands for a float
                object.__setattr__(self, name, float(value))
        self.check()

    def check(self) -> None:
        """Validate field values."""

    def option(self, name: str) -> str:
        """The option of a field, without the leading hyphens: "align.t-max" for `t_max` of the section `align`."""
        return f"{self.section}.{name}".removeprefix(".").replace("_", "-")

    def need(self, condition: bool, name: str, rule: str) -> None:
        """Refuse the field `name` unless `condition` holds."""
        if not condition:
            raise Refused(self.option(name), getattr(self, name), rule)

    def need_positive(self, *names: str) -> None:
        for name in names:
            self.need(getattr(self, name) > 0, name, "must be positive")

    def need_not_negative(self, *names: str) -> None:
        for name in names:
            self.need(getattr(self, name) >= 0, name, "must not be negative")


@cache
def _hints(cls: type) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def _check_type(hint: Any, value: Any, name: str) -> None:
    origin, choices = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):  # X | None
        if value is not None:
            _check_type(choices[0], value, name)
    elif origin is Literal:
        # By type too: True equals 1.
        if not any(value == choice and type(value) is type(choice) for choice in choices):
            raise Refused(name, value, f"must be one of {', '.join(map(str, choices))}")
    elif hint is float:
        if type(value) not in (int, float) or (type(value) is float and not math.isfinite(value)):
            raise Refused(name, value, "must be a finite number")
    elif origin is tuple:
        if type(value) is not tuple:
            raise Refused(name, value, "must be a tuple")
        for item in value:
            _check_type(choices[0], item, name)
    elif hint is str:
        _check_text(value, name)
    elif type(value) is not hint:
        raise Refused(name, value, f"must be of type {hint.__name__}")


def _check_text(value: Any, name: str) -> None:
    if type(value) is not str:
        raise Refused(name, value, "must be of type str")
    if len(value) > LONGEST:
        raise Refused(name, f"{value[:20]}...", f"has {len(value):,} characters; must have at most {LONGEST:,}")
    if any(unicodedata.category(character) == "Cc" for character in value):
        raise Refused(name, value, "must not hold control characters")


def to_dict(config: Any) -> dict[str, Any]:
    """Convert a dataclass to nested dictionaries of JSON values."""
    return dataclasses.asdict(config)


def from_dict(cls: type[T], values: Any, source: str) -> T:
    """Build the dataclass `cls` from the output of `to_dict`. Missing fields take their defaults.

    Args:
        source: where the values come from; error messages begin with it.

    Raises:
        Refused: on an unknown field, or a value of the wrong type or out of range.
    """
    try:
        return _build(cls, values, getattr(cls, "section", "") or "config")
    except Refused as error:
        raise Refused(f"{source}: {error}") from error


def _build(cls: type[T], values: Any, name: str) -> T:
    if not isinstance(values, dict):
        raise Refused(name, values, "must be an object")
    hints = _hints(cls)
    if unknown := sorted(set(values) - set(hints)):
        raise Refused(name, ", ".join(unknown), f"must be among {', '.join(hints)}")
    sections: dict[str, Any] = {field: hint for field, hint in hints.items() if dataclasses.is_dataclass(hint)}
    return cls(**{k: _build(sections[k], v, k) if k in sections else v for k, v in values.items()})
