"""Images in webdataset archives: .tar files in which the members with the same stem form a sample.

    000017.jpg (or .jpeg, .png)     the image
    000017.cls                      its label, a number in text; or 000017.json, a number or an object that has one
                                    as "label", "cls", "class" or "class_id"

Members of other kinds are counted.

The headers are read once; then an image is read by its offset. DALI's webdataset reader would not need that pass, but
it can neither start at image n nor name the sample that failed. `prepare` needs both: which rows a shard has, and which
files were skipped, must not depend on the reader.
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

from sra_fast.data.folder import EXTENSIONS, ImageFolder, Others, listed, scan
from sra_fast.errors import Damaged, Refused
from sra_fast.files import open_regular, retried

LABEL_KEYS = ("label", "cls", "class", "class_id")  # of a sample's .json
MAX_LABEL = 1 << 20  # bytes of a .cls or .json
MAX_CLASSES = 1 << 20  # per-class counts must fit into memory, whatever a label says


class ImageArchives:
    """Images of some archives: ordered by the archives' names and, within each, as the archive has them. A `row` is a
    position in `files`.

    Attributes:
        root: the folder that all archives are below.
        classes: "0", "1", ..., because labels are numbers.
        files: name of the archive below root, a slash, name of the member.
        labels: (len(files),) int64.

    Raises:
        Damaged: if an archive is compressed, damaged or cut short, or a sample lacks its image or its label.
    """

    def __init__(self, paths: list[Path]) -> None:
        self.root = Path(os.path.commonpath([path.absolute().parent for path in paths]))
        self._paths = paths
        self._lock = threading.Lock()
        self._open: tuple[int, int] | None = None  # (archive, descriptor), kept open for the kernel's read-ahead
        self._others = Others()
        files, labels, places = [], [], []
        for index, path in enumerate(paths):
            name = path.absolute().relative_to(self.root).as_posix()
            for member, label, offset, size in _samples(path, self._others):
                files.append(f"{name}/{member}")
                labels.append(label)
                places.append((index, offset, size))
        if not files:
            raise Damaged(self.root, "its .tar files must hold images")
        self.files = tuple(files)
        self.labels = np.array(labels, dtype=np.int64)
        self._places = np.array(places, dtype=np.int64)
        counts = np.bincount(self.labels)
        if not counts.all():
            raise Damaged(self.root, f"class {counts.argmin()} of {len(counts)} has no image in any .tar")
        self.classes = tuple(str(label) for label in range(len(counts)))

    def __len__(self) -> int:
        return len(self.files)

    def read(self, row: int) -> bytes:
        """The undecoded file. Raises OSError if it cannot be read."""
        archive, offset, size = self._places[row].tolist()
        with self._lock:
            if self._open is None or self._open[0] != archive:
                self.close()
                self._open = archive, open_regular(self._paths[archive])
            descriptor = self._open[1]
            file = retried(lambda: os.pread(descriptor, size, offset))
        if len(file) != size:
            raise OSError(errno.EIO, "cut short since it was indexed", str(self._paths[archive]))
        return file

    def path(self, row: int) -> str:
        """Where the file is."""
        return f"{self.root}/{self.files[row]}"

    def ignored(self) -> str:
        """One line about the members that are not read; empty if there are none."""
        kinds = listed(self._others.most_common())
        return f"{self.root}: ignored, because not an image or a label of a sample: {kinds}" if kinds else ""

    def close(self) -> None:
        """Close the open archive."""
        if self._open is not None:
            os.close(self._open[1])
            self._open = None

    def fingerprint(self) -> str:
        """SHA-256, in hex, of all names, labels and offsets, not of the pixels: the same wherever root is."""
        digest = hashlib.sha256()
        for name, label in zip(self.files, self.labels.tolist(), strict=True):
            digest.update(b"%b\0%d\0" % (os.fsencode(name), label))
        digest.update(self._places.tobytes())
        return digest.hexdigest()


def open_images(images: str) -> ImageFolder | ImageArchives:
    """Open a data set of class folders, or of archives.

    Args:
        images: a folder of either, one archive, or a pattern of archives: a glob, or numbers as in
            train-{000..146}.tar.

    Raises:
        Refused: if there are no images, or they cannot be used.
    """
    path = Path(images)
    if path.is_dir():
        archives = [entry for entry in path.glob("*.tar") if not entry.name.startswith(".")]
        if not archives:
            return scan(path)
        folders = sorted(entry.name for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))
        if folders:
            raise Damaged(path, f"holds .tar files and folders ({folders[0]}): must be one or the other")
    else:
        archives = []
        for pattern in _expand(images):
            matches = glob.glob(pattern, recursive=True)
            if not matches:
                raise Refused("images", pattern, "there is no such folder, and no file matches it as a pattern")
            archives += map(Path, matches)
    for archive in archives:
        if archive.suffix != ".tar":
            raise Damaged(archive, "must be an uncompressed .tar, or a folder")
    return ImageArchives(sorted({archive.resolve(): archive for archive in archives}.values()))  # patterns may overlap


def _expand(pattern: str) -> Iterator[str]:
    """Expand {first..last} to all numbers, with as many digits as the first."""
    braces = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if not braces:
        yield pattern
        return
    first, last = braces.groups()
    if int(first) > int(last):
        raise Refused("images", pattern, "the numbers in braces must increase")
    for number in range(int(first), int(last) + 1):
        yield from _expand(f"{pattern[: braces.start()]}{number:0{len(first)}}{pattern[braces.end() :]}")


def _samples(path: Path, others: Others) -> list[tuple[str, int, int, int]]:
    """(name of the image, label, offset and size of the image) of each sample, in the order of the images. Counts other
    members."""
    images: dict[str, tuple[str, int, int]] = {}
    labels: dict[str, int] = {}
    json_files: dict[str, tuple[int, int]] = {}  # read only where there is no .cls
    try:
        with os.fdopen(open_regular(path), "rb") as file, tarfile.open(fileobj=file, mode="r:") as archive:
            size = os.fstat(file.fileno()).st_size
            while (member := archive.next()) is not None:
                # tarfile keeps a kilobyte for each of millions of members.
                archive.members.clear()  # pyright: ignore[reportAttributeAccessIssue]
                folder, _, base = member.name.rpartition("/")
                stem, _, extension = base.partition(".")  # at the first dot, like webdataset
                if member.isdir():
                    continue
                if not member.isfile() or member.sparse is not None or not stem:
                    others.add("hidden" if member.isfile() and not stem else "links and other special members", base)
                    continue
                if member.size < 0 or member.offset_data + member.size > size:
                    raise Damaged(path, f"{member.name}: cut short, or its header has a wrong size")
                sample, extension = f"{folder}/{stem}", f".{extension.lower()}"
                if extension in EXTENSIONS:
                    if sample in images:
                        raise Damaged(path, f"{member.name}: a second image of the same sample")
                    images[sample] = member.name, member.offset_data, member.size
                elif extension == ".cls":
                    labels[sample] = _label(_content(archive, member.offset_data, member.size), path, member.name)
                elif extension == ".json":
                    json_files[sample] = member.offset_data, member.size
                else:
                    others.add(extension, f"{path.name}/{member.name}")
            for sample in images.keys() - labels.keys():
                if sample in json_files:
                    labels[sample] = _json_label(_content(archive, *json_files[sample]), path, images[sample][0])
            _check_end(archive, path)
    except (tarfile.TarError, OSError, EOFError, ValueError, OverflowError, RecursionError) as error:
        if isinstance(error, Damaged):
            raise
        raise Damaged(path, f"cannot be read as an uncompressed tar ({error})") from error
    for sample in sorted(images.keys() ^ labels.keys()):
        lacks = "no .cls and no .json with a label" if sample in images else "a label, but no .jpg, .jpeg or .png"
        raise Damaged(path, f"sample {sample.strip('/')!r} has {lacks}")
    return [(name, labels[sample], offset, size) for sample, (name, offset, size) in images.items()]


def _content(archive: tarfile.TarFile, offset: int, size: int) -> bytes:
    """A label's content. A label longer than `MAX_LABEL` is cut, and then refused."""
    archive.fileobj.seek(offset)
    size = min(size, MAX_LABEL)
    return archive.fileobj.read(size)


def _check_end(archive: tarfile.TarFile, path: Path) -> None:
    """Raise Damaged unless the rest of the archive is zeros: tarfile takes a damaged header, or the end of a file that
    was cut between two members, for the end of the archive."""
    archive.fileobj.seek(archive.offset)
    zeros = False
    while block := archive.fileobj.read(1 << 20):
        if block.strip(b"\0"):
            raise Damaged(path, f"damaged at byte {archive.offset:,}, where a header or the end should be")
        zeros = True
    if not zeros:
        raise Damaged(path, "cut short; it lacks the zeros that end a tar")


def _label(text: bytes, path: Path, member: str) -> int:
    digits = text.strip()
    label = int(digits) if digits.isdigit() and len(digits) < 10 else -1
    if not 0 <= label < MAX_CLASSES:
        rule = f"must be a number from 0 to {MAX_CLASSES - 1:,}"
        raise Damaged(path, f"{member}: has the label {text[:40]!r}; {rule}")
    return label


def _json_label(text: bytes, path: Path, member: str) -> int:
    try:
        fields = json.loads(text)
        label = next(fields[key] for key in LABEL_KEYS if key in fields) if isinstance(fields, dict) else fields
    except (ValueError, RecursionError, StopIteration):
        label = ""
    return _label(str(label).encode(), path, f"the .json of {member}")
