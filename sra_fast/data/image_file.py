"""What a JPEG or PNG file says about itself, without decoding it.

Formats: ITU-T T.81 (JPEG), Annex B; W3C, "Portable Network Graphics (PNG) Specification", third edition, section 5.
"""

from __future__ import annotations

from typing import NamedTuple

TEXT = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")
# Orientation may be in these.
ORIENTATION = (b"Raw profile type exif\0", b"Raw profile type APP1\0", b"XML:com.adobe.xmp\0")
LONGEST_ORIENTATION = 1 << 16


class Header(NamedTuple):
    """What a file's header says about its image."""

    width: int
    height: int
    bits: int
    """Per channel."""

    @property
    def pixels(self) -> int:
        return self.width * self.height


def read_header(file: bytes) -> Header:
    """Read the header of a JPEG or PNG, and check that the file reaches to the end of its image.

    Raises:
        ValueError: with the reason, if the file is empty, of another kind, or truncated, or its image has no pixels.
    """
    header = _read_header(file)
    if not header.pixels:
        raise ValueError(f"{header.width} x {header.height} pixels")
    return header


def _read_header(file: bytes) -> Header:
    if not file:
        raise ValueError("empty file")
    if file.startswith(b"\x89PNG\r\n\x1a\n"):
        if file[12:16] != b"IHDR" or file.rfind(b"IEND\xaeB`\x82") < 0:  # name and checksum of the last chunk
            raise ValueError("PNG cut short")
        return Header(int.from_bytes(file[16:20], "big"), int.from_bytes(file[20:24], "big"), file[24])
    if file.startswith(b"\xff\xd8\xff"):
        return _read_jpeg_header(file)
    raise ValueError("neither JPEG nor PNG")


def _read_jpeg_header(file: bytes) -> Header:
    """Walk the segments (0xFF, marker, length, content) to the compressed data, which must be followed by 0xFF 0xD9.

    Decoders fill a missing rest with grey, some of them silently. Searching the whole file for the end marker would not
    do: an embedded thumbnail has its own.
    """
    header, at = None, 2
    while 0 <= at < len(file) - 9:
        marker = file[at + 1]
        if marker == 0xDA:  # start of scan
            if header is None or file.rfind(b"\xff\xd9", at) < 0:
                break
            return header
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # start of frame: length, bits, height, width
            header = Header(int.from_bytes(file[at + 7 : at + 9]), int.from_bytes(file[at + 5 : at + 7]), file[at + 4])
        # 0xFF may be repeated before a marker, and restart markers have no content.
        bare = marker == 0xFF or marker == 0x01 or 0xD0 <= marker <= 0xD8
        step = (1 if marker == 0xFF else 2) if bare else 2 + int.from_bytes(file[at + 2 : at + 4])
        at = file.find(b"\xff", at + step)
    raise ValueError("JPEG cut short")


def without_text(file: bytes, exif: bool) -> bytes:
    """A PNG without its texts and colour profile, which Pillow would unpack, and refuse where they are long (as the
    prompts that image generators write are). Other files are returned as they are.

    Args:
        exif: keep texts that may hold the orientation.
    """
    if not file.startswith(b"\x89PNG") or not any(kind in file for kind in TEXT):
        return file
    kept, at = [file[:8]], 8
    while at + 8 <= len(file):
        length, kind = int.from_bytes(file[at : at + 4], "big"), file[at + 4 : at + 8]
        turns = exif and length <= LONGEST_ORIENTATION and file.startswith(ORIENTATION, at + 8)
        if kind not in TEXT or turns:
            kept.append(file[at : at + 12 + length])
        at += 12 + length
    return b"".join(kept)
