"""Read and check the header of an .npy file before its numbers are used.

Format: numpy.lib.format, versions 1.0 to 3.0.
"""

from __future__ import annotations

import math
import warnings
from typing import BinaryIO, NamedTuple

import numpy as np


class Header(NamedTuple):
    """Header of an .npy file."""

    shape: tuple[int, ...]
    dtype: np.dtype
    begin: int
    """Offset of the numbers in bytes."""


def read_header(file: BinaryIO, size: int) -> Header:
    """Read the header of a file of `size` bytes that holds numbers in C order and nothing after them.

    Raises:
        ValueError: with the reason, if the file is anything else.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about headers written by Python 2
            version = np.lib.format.read_magic(file)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, fortran, dtype = read(file)
    except Exception as error:  # NumPy parses a header as Python source; a damaged one raises nearly anything.
        raise ValueError("empty file" if not size else " ".join(str(error).split()) or type(error).__name__) from error
    if fortran or dtype.hasobject:
        raise ValueError("must hold numbers in C order, no Python objects")
    expected = file.tell() + dtype.itemsize * math.prod(shape)
    if size != expected:
        raise ValueError(f"{size:,} bytes long; must be {expected:,}")
    return Header(shape, dtype, file.tell())
