"""Errors that a user can act on. The command line prints them as one line and exits with 1; anything else is a bug."""

from __future__ import annotations

import unicodedata
from pathlib import Path

# Unicode's categories of control, format (such as marks of direction) and surrogate characters, and of separators.
_ESCAPED = ("Cc", "Cf", "Cs", "Zl", "Zp")


def printable(text: str) -> str:
    r"""The text with escapes (\x1b, \udcff) in place of characters that a terminal would obey, and of bytes of file
    names that are not UTF-8, which neither a terminal nor JSON can represent."""
    if text.isprintable():
        return text
    escapes = {c: c.encode("unicode_escape").decode() for c in set(text) if unicodedata.category(c) in _ESCAPED}
    return text.translate(str.maketrans(escapes))


class Refused(ValueError):
    """Input that cannot be used, or an output that cannot be written.

    Either a complete line, or three facts that read "field: value given; rule":

    >>> str(Refused("train.batch", 0, "must be positive"))
    'train.batch: 0 given; must be positive'

    Args:
        field: the option, file or field, as the user would type it; alone: the complete line.
        value: what it is.
        rule: what it must be.
    """

    def __init__(self, field: str, *value_and_rule: object) -> None:
        if value_and_rule:
            value, rule = value_and_rule
            field = f"{field}: {value!r} given; {rule}"
        super().__init__(printable(field))


class Damaged(Refused):
    """A file, or a data set, that cannot be read or does not hold what it should.

    Whoever knows which option named it adds that name: ``raise Refused(f"data.latents: {error}") from error``.

    Attributes:
        path: the file or folder.
        reason: what is wrong with it.
    """

    def __init__(self, path: Path | str, reason: object) -> None:
        super().__init__(f"{path}: {reason}")
        self.path, self.reason = path, str(reason)


_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "cannot allocate memory", "bad_alloc", "unable to allocate")


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether this error, or one that led to it, is a lack of memory on any device, or of a thread's stack."""
    while error is not None:
        text = str(error).lower()
        if isinstance(error, MemoryError) or "can't start new thread" in text:
            return True
        if isinstance(error, RuntimeError | OSError) and any(words in text for words in _OUT_OF_MEMORY):
            return True
        error = error.__cause__ or error.__context__
    return False
