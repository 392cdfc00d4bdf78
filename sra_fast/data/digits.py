"""The embedded data set: 1,797 scanned handwritten digits of 8 x 8 pixels, from scikit-learn.

Source: E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning Repository, 1998
(its test set).
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sra_fast.errors import Damaged

COUNT = 1797


def write_digits(root: Path | str) -> None:
    """Write the digits as class folders of 8 x 8 grey PNG files, root/<digit>/<index>.png, unless root already exists.

    A grey level of 0 .. 16 becomes round(255 level / 16). The folder gets its name only when it is complete, so an
    interrupted write leaves nothing behind. A root that exists belongs to the user and is not touched.

    Raises:
        Damaged: if scikit-learn, which contains the data, is not installed.
    """
    root = Path(root)
    if root.exists():
        return
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise Damaged(root, "does not exist; writing the digits needs `pip install scikit-learn`") from error
    digits: Any = load_digits()
    pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)  # (1797, 8, 8)
    root.parent.mkdir(parents=True, exist_ok=True)
    # A rename must not cross file systems.
    with tempfile.TemporaryDirectory(dir=root.parent, prefix=f".{root.name}-") as temporary:
        unfinished = Path(temporary) / root.name
        for digit in range(10):
            (unfinished / str(digit)).mkdir(parents=True)
        for index, (image, digit) in enumerate(zip(pixels, digits.target.tolist(), strict=True)):
            Image.fromarray(image).save(unfinished / str(digit) / f"{index:04d}.png")
        try:
            os.rename(unfinished, root)
        except OSError:
            if not root.exists():  # otherwise another process has written the same files
                raise
