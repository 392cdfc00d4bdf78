"""What the head of an .npy file says, before its numbers are trusted.

Format: numpy.lib.format, versions 1.0 to 3.0.
"""

from __future__ import annotations

import math
import warnings
from typing import BinaryIO, NamedTuple

import numpy as np


class Header(NamedTuple):
    """Of an .npy file."""

    shape: tuple[int, ...]
    dtype: np.dtype
    begin: int
    """Bytes before the numbers."""


def read_header(file: BinaryIO, size: int) -> Header:
    """The header of a file of `size` bytes, which holds numbers in C order and nothing after them.

    Raises:
        ValueError: if it is anything else: with the reason.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of headers that Python 2 wrote
            version = np.lib.format.read_magic(file)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, fortran, dtype = read(file)
    except Exception as error:  # NumPy parses a damaged header as Python and raises nearly anything
        raise ValueError("empty file" if not size else " ".join(str(error).split()) or type(error).__name__) from error
    if fortran or dtype.hasobject:
        raise ValueError("must hold numbers in C order, no Python objects")
    wanted = file.tell() + dtype.itemsize * math.prod(shape)
    if size != wanted:
        raise ValueError(f"{size:,} bytes long; must be {wanted:,}")
    return Header(shape, dtype, file.tell())
