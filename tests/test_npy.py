"""npy.py: headers written by NumPy are read, and anything else is refused with a reason."""

from __future__ import annotations

import io

import numpy as np
import pytest

from sra_fast.data.npy import read_header


def saved(array, version=(1, 0)):
    file = io.BytesIO()
    np.lib.format.write_array(file, array, version)
    return file.getvalue()


@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
@pytest.mark.parametrize("array", [np.zeros((3, 2), np.float16), np.arange(5), np.float32(1), np.zeros((0, 4), ">i2")])
def test_the_offset_of_the_numbers(array, version):
    file = saved(np.asarray(array), version)
    header = read_header(io.BytesIO(file), len(file))
    assert (header.shape, header.dtype) == (np.shape(array), array.dtype)
    assert np.array_equal(np.frombuffer(file, header.dtype, offset=header.begin).reshape(header.shape), array)


WHOLE = saved(np.zeros((3, 2)))


@pytest.mark.parametrize(
    ("file", "message"),
    [
        (b"", "empty file"),
        (b"PK\3\4 and more of a zip", "magic"),
        (WHOLE[:40], "expected"),
        (WHOLE[:-1], "175 bytes long; must be 176"),
        (WHOLE + b"x", "177 bytes long; must be 176"),
        (WHOLE.replace(b"(3, 2)", b"(3, -)"), ""),
        (saved(np.asfortranarray(np.zeros((3, 2)))), "C order"),
        (saved(np.array([None])), "no Python objects"),
    ],
)
def test_anything_else_is_refused_with_a_reason(file, message):
    with pytest.raises(ValueError, match=r"\S") as caught:
        read_header(io.BytesIO(file), len(file))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
