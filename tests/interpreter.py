"""Kernels in Triton's interpreter: on a CPU, in a process of its own, because TRITON_INTERPRET=1 must be there before
Triton is imported.

Tests of kernels have "kernel" in their names and the mark `kernel`. They run where kernels do: on a GPU, and in the
process that `run_interpreted` starts for a file.
"""

from __future__ import annotations

import importlib
import math
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor

from sra_fast.kernels.language import INTERPRETED, missing

ROOT = Path(__file__).parents[1]
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
# Files that import each other and nothing else: what a copy with a fault needs.
SOURCES = ("language", "rows", "adaln", "gated_adaln")


def kernel(test):
    """Marks a test that runs kernels."""
    test = pytest.mark.skipif(bool(missing()), reason="no GPU; run in the interpreter by another test of this file")(
        test
    )
    return test if INTERPRETED else pytest.mark.gpu(test)


def run_interpreted(file: str) -> None:
    """The tests of a file whose names have "kernel" in them."""
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "kernel and not interpreter", file]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout[-8000:] + ran.stderr[-2000:]
    assert re.search(r"\d\d passed", ran.stdout), ran.stdout[-1000:]
    assert "skipped" not in ran.stdout, ran.stdout[-1000:]


def mend() -> None:
    """Two defects of the interpreter of Triton 3.6: it cuts float32 off to bfloat16 where a GPU rounds to nearest, and
    its scalars, arrays of one element, are no longer numbers to numpy 2.4."""
    from triton.runtime import interpreter

    convert, patch = interpreter._convert_float, interpreter._patch_lang_tensor

    def rounded(data, source, target, mode):
        if source.is_fp32() and target.is_bf16():
            values = torch.from_numpy(np.array(data, dtype=np.float32, ndmin=1))
            return values.bfloat16().view(torch.uint16).numpy().reshape(data.shape)
        return convert(data, source, target, mode)

    def patched(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._convert_float, interpreter._patch_lang_tensor = rounded, patched


if INTERPRETED:
    mend()


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """New memory is NaN, so that what a kernel leaves unwritten is found."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, **options: empty(*shape, **options).fill_(float("nan")))


def inside(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Random numbers in a tensor whose rows are dense and whose other strides are odd: (B, D) as the second of six
    parts, (B, T, D) as the transpose of a part of (T, B, D). The rest is finite: a read of it is no NaN but wrong."""
    *outer, width = shape
    if len(outer) == 1:
        return torch.randn(outer[0] + 1, 6 * width, generator=generator).to(DEVICE, dtype)[:-1, width : 2 * width]
    batch, tokens = outer
    around = torch.randn(tokens + 1, batch + 1, width + 3, generator=generator).to(DEVICE, dtype)
    return around[:-1, :-1, 1:-2].transpose(0, 1)


def assert_as_exact(got: Sequence[Tensor], usual: Sequence[Tensor], truth: Sequence[Tensor], terms: int) -> None:
    """The error of a kernel's results is at most twice PyTorch's own at the same dtypes, and a floor, because PyTorch
    may hit the truth by luck: one rounding of the largest value to its dtype, and four times the sqrt(n) roundings of a
    float32 sum of n = `terms` numbers in any order."""
    for place, (value, own, best) in enumerate(zip(got, usual, truth, strict=True)):
        assert (value.shape, value.dtype) == (own.shape, own.dtype)
        units = torch.finfo(value.dtype).eps / 2 + 4 * torch.finfo(torch.float32).eps * math.sqrt(terms)
        allowed = 2 * largest(own.double() - best) + units * largest(best)
        error = largest(value.double() - best)
        assert error <= allowed, f"result {place}: error {error:.3g}, allowed {allowed:.3g}"  # also of NaN


def largest(x: Tensor) -> float:
    return float(x.abs().max()) if x.numel() else 0.0


def mutant(folder: Path, name: str, file: str, right: str, wrong: str) -> ModuleType:
    """A copy of the module `name` of kernels, with `wrong` for `right` in `file`; its ops have names of their own."""
    package = f"mutant_{folder.name}"
    (folder / package).mkdir()
    (folder / package / "__init__.py").touch()
    for stem in SOURCES:
        text = (ROOT / "kernels" / f"{stem}.py").read_text()
        if stem == file:
            assert text.count(right) == 1, f"{file}.py has {text.count(right)} times {right!r}"
            text = text.replace(right, wrong)
        (folder / package / f"{stem}.py").write_text(text.replace('"sra_fast::', f'"{package}::'))
    sys.path.insert(0, str(folder))
    try:
        return importlib.import_module(f"{package}.{name}")
    finally:
        sys.path.remove(str(folder))
