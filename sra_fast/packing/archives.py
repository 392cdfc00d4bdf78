"""Images in webdataset archives: .tar files whose members of one stem are one sample.

    000017.jpg (or .jpeg, .png)     the image
    000017.cls                      its label, a number in text; or 000017.json with a field "label" or "cls"

The headers are walked once; then an image is read by its offset. DALI's webdataset reader would save the walk, but
it can neither begin at image n nor name the sample that failed, and prepare needs both: which rows a shard has, and
which file was left out, must not depend on who reads.
"""

from __future__ import annotations

import errno
import glob
import hashlib
import json
import os
import re
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from sra_fast.config import refuse_unless
from sra_fast.data.folder import EXTENSIONS, ImageFolder, scan
from sra_fast.errors import Refused

MOST_CLASSES = 1 << 20  # what is counted by class must fit into memory, whatever a label says


class ImageArchives:
    """Names, labels and places of the images in some archives, in the order of the archives' names and, in each, of
    its samples. `row` below is a position in `files`.

    Attributes:
        root: the folder that all archives are below.
        classes: "0", "1", ..., as labels are numbers.
        files: name of the archive below root, a slash, name of the member.
        labels: (len(files),) int64.

    Raises:
        Refused: if an archive is compressed, damaged or cut short, or a sample lacks its image or its label: naming it.
    """

    def __init__(self, paths: list[Path]) -> None:
        self.root = Path(os.path.commonpath([path.absolute().parent for path in paths]))
        self._paths = paths
        self._lock = threading.Lock()
        self._open: tuple[int, int] | None = None  # (archive, descriptor), kept for the kernel's read-ahead
        files, labels, places = [], [], []
        for index, path in enumerate(paths):
            name = path.absolute().relative_to(self.root).as_posix()
            for member, label, offset, size in _samples(path):
                files.append(f"{name}/{member}")
                labels.append(label)
                places.append((index, offset, size))
        refuse_unless(bool(files), "images", str(self.root), "its .tar files must hold images")
        self.files = tuple(files)
        self.labels = np.array(labels, dtype=np.int64)
        self._places = np.array(places, dtype=np.int64)
        rows = np.bincount(self.labels)
        refuse_unless(
            bool(rows.all()), "images", str(self.root), f"class {rows.argmin()} of {len(rows)} has no image in any .tar"
        )
        self.classes = tuple(str(label) for label in range(len(rows)))

    def __len__(self) -> int:
        return len(self.files)

    def read(self, row: int) -> bytes:
        """The undecoded file. Raises OSError if it cannot be read."""
        archive, offset, size = self._places[row].tolist()
        with self._lock:
            if self._open is None or self._open[0] != archive:
                self.close()
                self._open = archive, os.open(self._paths[archive], os.O_RDONLY)
            file = os.pread(self._open[1], size, offset)
        if len(file) != size:
            raise OSError(errno.EIO, "cut short since it was indexed", str(self._paths[archive]))
        return file

    def close(self) -> None:
        """Close the archive that is open."""
        if self._open is not None:
            os.close(self._open[1])
            self._open = None

    def fingerprint(self) -> str:
        """SHA-256, in hex, of all names, labels and places (not of the pixels), wherever root lies."""
        digest = hashlib.sha256()
        for name, label in zip(self.files, self.labels.tolist(), strict=True):
            digest.update(b"%b\0%d\0" % (os.fsencode(name), label))
        digest.update(self._places.tobytes())
        return digest.hexdigest()


def open_images(given: str) -> ImageFolder | ImageArchives:
    """A data set of class folders, or of archives.

    Args:
        given: a folder of either, one archive, or a pattern of archives: a glob, or numbers as train-{000..146}.tar.

    Raises:
        Refused: if there are no images, or they cannot serve.
    """
    path = Path(given)
    if path.is_dir():
        archives = [entry for entry in path.glob("*.tar") if not entry.name.startswith(".")]
        if not archives:
            return scan(path)
        folders = sorted(entry.name for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))
        refuse_unless(
            not folders, "images", given, f"holds .tar files and folders ({', '.join(folders[:1])}): must be either"
        )
    else:
        archives = []
        for pattern in _numbered(given):
            found = glob.glob(pattern, recursive=True)
            refuse_unless(bool(found), "images", pattern, "there is no such folder, and no file that fits it as a glob")
            archives += map(Path, found)
    for archive in archives:
        refuse_unless(archive.suffix == ".tar", "images", str(archive), "must be an uncompressed .tar, or a folder")
    return ImageArchives(sorted(archives))


def _numbered(pattern: str) -> Iterator[str]:
    """The patterns that one with {first..last} stands for, with as many digits as the first."""
    found = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if not found:
        yield pattern
        return
    first, last = found.groups()
    refuse_unless(int(first) <= int(last), "images", pattern, "must count upwards in its braces")
    for number in range(int(first), int(last) + 1):
        yield from _numbered(f"{pattern[: found.start()]}{number:0{len(first)}}{pattern[found.end() :]}")


def _samples(path: Path) -> list[tuple[str, int, int, int]]:
    """(name of the image, label, offset and size of the image) of each sample, in the order of the images."""
    images: dict[str, tuple[str, int, int]] = {}
    labels: dict[str, int] = {}
    notes: dict[str, tuple[int, int]] = {}  # of .json members, opened only where there is no .cls
    try:
        with tarfile.open(path, "r:") as archive:
            while (member := archive.next()) is not None:
                archive.members.clear()  # it would keep a kilobyte for each of millions
                folder, _, base = member.name.rpartition("/")
                stem, _, extension = base.partition(".")  # at the first dot, as webdataset does it
                if not member.isfile() or not stem:
                    continue
                sample, extension = f"{folder}/{stem}", f".{extension.lower()}"
                if extension in EXTENSIONS:
                    refuse_unless(sample not in images, "images", f"{path}: {member.name}", "is there twice")
                    images[sample] = member.name, member.offset_data, member.size
                elif extension == ".cls":
                    labels[sample] = _label(_content(archive, member.offset_data, member.size), path, member.name)
                elif extension == ".json":
                    notes[sample] = member.offset_data, member.size
            for sample in images.keys() - labels.keys():
                if sample in notes:
                    labels[sample] = _noted(_content(archive, *notes[sample]), path, images[sample][0])
            _refuse_unfinished(archive, path)
    except (tarfile.TarError, OSError, EOFError) as error:
        raise Refused(f"images: {path}: cannot be read as an uncompressed tar ({error})") from error
    for sample in sorted(images.keys() ^ labels.keys()):
        lacks = "no .cls and no .json with a label" if sample in images else "a label, but no .jpg, .jpeg or .png"
        raise Refused(f"images: {path}: sample {sample.strip('/')!r} has {lacks}")
    return [(name, labels[sample], offset, size) for sample, (name, offset, size) in images.items()]


def _content(archive: tarfile.TarFile, offset: int, size: int) -> bytes:
    archive.fileobj.seek(offset)
    return archive.fileobj.read(size)


def _refuse_unfinished(archive: tarfile.TarFile, path: Path) -> None:
    """tarfile takes a damaged header within an archive, or its being cut off between two members, for the end. A whole
    archive ends in zeros."""
    archive.fileobj.seek(archive.offset)
    found = False
    while block := archive.fileobj.read(1 << 20):
        if block.strip(b"\0"):
            raise Refused(f"images: {path}: damaged at byte {archive.offset:,}, where a header or the end should be")
        found = True
    if not found:
        raise Refused(f"images: {path}: cut short; it lacks the zeros that end a tar")


def _label(text: bytes, path: Path, member: str) -> int:
    try:
        label = int(text.decode("ascii"))
    except ValueError:
        label = -1
    refuse_unless(
        0 <= label < MOST_CLASSES,
        "images",
        f"{path}: {member}",
        f"has the label {text[:40]!r}; must be a number from 0 to {MOST_CLASSES - 1:,}",
    )
    return label


def _noted(text: bytes, path: Path, member: str) -> int:
    try:
        fields = json.loads(text)
        label = fields["label"] if "label" in fields else fields["cls"]
    except (ValueError, KeyError, TypeError):
        label = ""
    return _label(str(label).encode(), path, f"the .json of {member}")
