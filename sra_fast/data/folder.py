"""A data set of image files: one folder per class, with JPEG and PNG files below it at any depth."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sra_fast.errors import Damaged, Refused, printable
from sra_fast.files import read_file

EXTENSIONS = (".jpg", ".jpeg", ".png")
# Folders that storage systems and archivers add, with thumbnails or deleted files in them.
OF_THE_STORAGE = {"@eaDir", "#recycle", "#snapshot", "$RECYCLE.BIN", "System Volume Information", "__MACOSX"}
OF_THE_STORAGE |= {"lost+found"}


class Other(NamedTuple):
    """Files of one kind that are passed over."""

    kind: str
    count: int
    example: str


class Others:
    """Counts files that are passed over, by kind."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._examples: dict[str, str] = {}

    def add(self, kind: str, name: str) -> None:
        self._counts[kind] += 1
        self._examples[kind] = min(name, self._examples.get(kind, name))

    def most_common(self) -> tuple[Other, ...]:
        ordered = sorted(self._counts.items(), key=lambda other: (-other[1], other[0]))
        return tuple(Other(kind, count, self._examples[kind]) for kind, count in ordered)


def listed(others: tuple[Other, ...]) -> str:
    """The five most common kinds in words."""
    kinds = printable(", ".join(f"{other.count:,} {other.kind} ({other.example})" for other in others[:5]))
    return kinds + (", ..." if others[5:] else "")


@dataclass(frozen=True, eq=False)
class ImageFolder:
    """Names and labels of a data set; the images stay on disk. A `row` is a position in `files`."""

    root: Path
    classes: tuple[str, ...]
    """Names of the class folders, sorted; a label is a position in this tuple."""
    files: tuple[str, ...]
    """Paths below root with forward slashes, sorted by code point."""
    labels: np.ndarray
    """(len(files),) int64."""
    others: tuple[Other, ...] = ()
    """Files that are not read, the most common kind first."""

    def __len__(self) -> int:
        return len(self.files)

    def read(self, row: int) -> bytes:
        """The undecoded file. Raises OSError if it cannot be read."""
        return read_file(self.path(row))

    def path(self, row: int) -> str:
        """Where the file is."""
        return os.path.join(self.root, self.files[row])

    def take(self, rows: np.ndarray) -> ImageFolder:
        """The images of some rows, (n,) int64 or a mask, in that order."""
        files = tuple(np.array(self.files, dtype=object)[rows])
        return replace(self, files=files, labels=self.labels[rows])

    def ignored(self) -> str:
        """One line about the files that are not read; empty if there are none."""
        kinds = listed(self.others)
        return f"{self.root}: ignored, because not JPEG or PNG files in a class folder: {kinds}" if kinds else ""

    def fingerprint(self) -> str:
        """SHA-256, in hex, of all names and labels, not of the pixels: equal for equal rows, wherever root is."""
        digest = hashlib.sha256()
        for name, label in zip(self.files, self.labels.tolist(), strict=True):
            digest.update(b"%b\0%d\0" % (os.fsencode(name), label))
        return digest.hexdigest()


def scan(root: Path | str) -> ImageFolder:
    """Find the images of a data set.

    Classes are the folders directly under root. Extensions are compared case-insensitively. Files of other kinds,
    hidden ones, and what storage systems add (@eaDir and the like) are counted, and a link to a folder is followed only
    if it is a class. No file is opened or queried for its status, so that 1.28 million files take seconds.

    Raises:
        Damaged: if root is not a folder, has no class folders, or one of them has no images or cannot be listed.
    """
    root = Path(root)
    if not root.is_dir():
        raise Damaged(root, "must be a folder of class folders")
    try:
        others, names = Others(), []
        with os.scandir(root) as entries:
            for entry in entries:
                if entry.is_dir() and _is_of_the_user(entry):
                    names.append(entry.name)
                else:
                    others.add(_kind(entry), entry.name)
        classes = sorted(names)
        if not classes:
            found = f"; it has {listed(others.most_common())}" if others.most_common() else ""
            raise Damaged(root, f"must hold one folder per class{found}")
        images: list[tuple[str, int]] = []
        for label, name in enumerate(classes):
            before = len(images)
            images.extend((file, label) for file in _files(os.path.join(root, name), name, others))
            if len(images) == before:
                raise Damaged(root / name, "every class folder must hold at least one .jpg, .jpeg or .png file")
    except OSError as error:
        raise Damaged(error.filename, f"cannot be listed: {error.strerror}") from error
    images.sort()
    labels = np.array([label for _, label in images], dtype=np.int64)
    return ImageFolder(root, tuple(classes), tuple(file for file, _ in images), labels, others.most_common())


def _is_of_the_user(entry: os.DirEntry) -> bool:
    return not entry.name.startswith(".") and entry.name not in OF_THE_STORAGE


def _kind(entry: os.DirEntry) -> str:
    """The kind of what is not read: ".gif" and the like."""
    if not _is_of_the_user(entry):
        return "hidden" if entry.name.startswith(".") else "folders of the storage system"
    if entry.is_symlink() and entry.is_dir():
        return "linked folders"
    return os.path.splitext(entry.name)[1].lower() or "without extension"


def _files(path: str, name: str, others: Others) -> Iterator[str]:
    """Images in the folder `path`, as names that start with `name`, in no particular order. Others are counted."""
    folders = [(path, name)]  # not by recursion: folders may be nested deeper than calls
    while folders:
        path, name = folders.pop()
        with os.scandir(path) as entries:
            for entry in entries:
                if not _is_of_the_user(entry):
                    others.add(_kind(entry), f"{name}/{entry.name}")
                elif entry.is_dir(follow_symlinks=False):
                    folders.append((entry.path, f"{name}/{entry.name}"))
                elif entry.name.lower().endswith(EXTENSIONS):
                    yield f"{name}/{entry.name}"
                else:
                    others.add(_kind(entry), f"{name}/{entry.name}")


def split(folder: ImageFolder, held_out_share: float) -> tuple[ImageFolder, ImageFolder]:
    """Split a data set into (training, held-out) images, with unchanged classes.

    A file is held out if a hash of its name, read as a number in [0, 1), is below held_out_share. So it stays on its
    side when other files are added or removed and on every machine, and a larger share only adds held-out files.

    Raises:
        Refused: if either side would be empty.
    """
    hashes = (hashlib.blake2b(os.fsencode(name), digest_size=8).digest() for name in folder.files)
    held_out = np.fromiter((int.from_bytes(h, "big") < held_out_share * 2.0**64 for h in hashes), bool, len(folder))
    if not 0 < held_out.sum() < len(folder):
        counts = f"{held_out.sum()} of {len(folder)}"
        raise Refused("data.held-out", held_out_share, f"must leave images on both sides, but holds out {counts}")
    return folder.take(~held_out), folder.take(held_out)
