"""What every part of the configuration shares: checked types, refusals in one voice, JSON and back."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from functools import cache
from typing import Any, ClassVar, Literal, TypeVar

from sra_fast.errors import Refused

T = TypeVar("T")


def refuse_unless(condition: bool, name: str, given: object, allowed: str) -> None:
    """Raise `Refused` with the house's message unless `condition`."""
    if not condition:
        raise Refused(name, given, allowed)


class Section:
    """A part of the configuration. However it is made, every field's type is checked, then `check` looks at values."""

    section: ClassVar[str]
    """Its name on the command line."""

    def __post_init__(self) -> None:
        for name, hint in _hints(type(self)).items():
            _check_type(hint, getattr(self, name), self.option(name))
            if hint is float:  # a whole number stands for a float
                object.__setattr__(self, name, float(getattr(self, name)))
        self.check()

    def check(self) -> None:
        """Refuse values that cannot be."""

    def option(self, name: str) -> str:
        """A field as it is typed, without the leading hyphens."""
        return f"{self.section}.{name}".removeprefix(".").replace("_", "-")

    def need(self, condition: bool, name: str, allowed: str) -> None:
        """Refuse the field `name` unless `condition`."""
        refuse_unless(condition, self.option(name), getattr(self, name), allowed)

    def need_positive(self, *names: str) -> None:
        """Refuse fields that are not above zero."""
        for name in names:
            self.need(getattr(self, name) > 0, name, "must be positive")

    def need_not_negative(self, *names: str) -> None:
        """Refuse fields below zero."""
        for name in names:
            self.need(getattr(self, name) >= 0, name, "must not be negative")


@cache
def _hints(cls: type) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def _check_type(hint: Any, value: Any, name: str) -> None:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):  # X | None
        if value is not None:
            _check_type(arguments[0], value, name)
    elif origin is Literal:
        allowed = any(value == choice and type(value) is type(choice) for choice in arguments)
        refuse_unless(allowed, name, value, f"must be one of {', '.join(map(str, arguments))}")
    elif hint is float:
        refuse_unless(type(value) in (int, float) and math.isfinite(value), name, value, "must be a finite number")
    else:
        refuse_unless(type(value) is hint, name, value, f"must be of type {hint.__name__}")


def to_dict(config: object) -> dict[str, Any]:
    """A dataclass as nested dictionaries of JSON values."""
    return dataclasses.asdict(config)


def from_dict(cls: type[T], values: Any, source: str) -> T:
    """The dataclass `cls` from `to_dict`'s output. Unknown fields and values that cannot be are refused by name, after
    `source`, which says where they come from."""
    try:
        return _build(cls, values, getattr(cls, "section", "") or "config")
    except Refused as error:
        raise Refused(f"{source}: {error}") from error


def _build(cls: type[T], values: Any, name: str) -> T:
    refuse_unless(isinstance(values, dict), name, values, "must be an object")
    hints = _hints(cls)
    unknown = sorted(set(values) - set(hints))
    refuse_unless(not unknown, name, ", ".join(unknown), f"must be among {', '.join(hints)}")
    sections = {field: hint for field, hint in hints.items() if dataclasses.is_dataclass(hint)}
    return cls(**{k: _build(sections[k], v, k) if k in sections else v for k, v in values.items()})
