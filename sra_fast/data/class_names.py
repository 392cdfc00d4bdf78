"""Names of classes. A label is a position in the sorted names: of folders 0 to 11, label 2 is folder 10.

A run keeps them in `classes.json`, so that they are known where its data is not.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from pathlib import Path

from sra_fast.errors import Damaged, Refused, printable
from sra_fast.files import read_json, write_json

NAME = "classes.json"
SHOWN = 6


def write(folder: Path, names: Sequence[str]) -> None:
    """Save the names in the folder of a run."""
    write_json(folder / NAME, {"classes": list(names)})


def read(folder: Path) -> tuple[str, ...]:
    """The names that were saved in a folder; empty if none were. Raises Damaged if the file is something else."""
    path = folder / NAME
    if not path.exists():
        return ()
    content = read_json(path)
    return checked(content.get("classes") if isinstance(content, dict) else None, path)


def checked(names: object, path: Path) -> tuple[str, ...]:
    """The names, if they are a list of text. Raises Damaged, naming the file."""
    if not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise Damaged(path, 'must be {"classes": [name, ...]}')
    return tuple(names)


def numbered(names: Sequence[str], labels: Sequence[int] | None = None) -> str:
    """The first few labels with their names: "0 cat, 1 dog, ..."."""
    labels = range(len(names)) if labels is None else labels
    shown = ", ".join(f"{label} {names[label]}" for label in labels[:SHOWN])
    return printable(shown) + (", ..." if len(labels) > SHOWN else "")


def labels_of(words: Sequence[str], names: Sequence[str], classes: int) -> list[int]:
    """The labels that a user means by numbers or names. A word that is a number is a label, whatever classes are
    called.

    Args:
        names: of the classes; empty if unknown.
        classes: number of classes.

    Raises:
        Refused: if a number is not a label, or a name is unknown or that of several classes.
    """
    labels = []
    for word in words:
        if re.fullmatch("-?[0-9]+", word):
            if len(word) > 9 or not 0 <= int(word) < classes:
                raise Refused("classes", word, f"must be in [0, {classes})")
            labels.append(int(word))
        elif names.count(word) == 1:
            labels.append(names.index(word))
        elif word in names:
            raise Refused("classes", word, "is the name of several classes: give the number")
        elif not names:
            raise Refused(
                "classes", word, f"must be a number in [0, {classes}): these weights have no names of classes"
            )
        else:
            near = difflib.get_close_matches(word, names, n=3) or [names[0], "..."]
            raise Refused("classes", word, f"no class has this name; there are {', '.join(near)}")
    return labels
