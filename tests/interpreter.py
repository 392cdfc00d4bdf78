"""Kernels in Triton's interpreter: on a CPU, in a process of its own, because TRITON_INTERPRET=1 must be there before
Triton is imported.

Tests of kernels have the mark `kernel`. They run where kernels do: on a GPU, and in the process that `run_interpreted`
starts for a file.
"""

from __future__ import annotations

import importlib
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor

from sra_fast.kernels.language import INTERPRETED, why_unavailable

ROOT = Path(__file__).parents[1]
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
# Files that import each other and nothing else: what a copy with a fault needs.
SOURCES = ("language", "rows", "philox", "adaln", "alignment", "perturb")
GUARD = 1 << 14  # elements before and after each tensor that is `surrounded` or made in `guarded`


def kernel(test):
    """Marks a test that runs kernels."""
    test.runs_kernels = True
    test = pytest.mark.skipif(bool(why_unavailable()), reason="no GPU; run in the interpreter by another test of this file")(
        test
    )
    return test if INTERPRETED else pytest.mark.gpu(test)


def run_interpreted(file: str) -> None:
    """The tests of a file that have the mark `kernel`; there must be ten, and none may skip."""
    pytest.importorskip("triton")
    tests = vars(sys.modules[Path(file).stem]).items()
    names = [f"{file}::{name}" for name, test in tests if getattr(test, "runs_kernels", False)]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *names]
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


@contextmanager
def guarded() -> Iterator[None]:
    """Every torch.empty is full of NaN, or of -7 where there is none, so that what a kernel leaves unwritten is found;
    and between guards of 7, so that what it writes outside is found at the end."""
    made = []

    def empty(*size, dtype: torch.dtype | None = None, device: torch.device | None = None) -> Tensor:
        shape = torch.Size(size[0] if size and not isinstance(size[0], int) else size)
        dtype = dtype or torch.get_default_dtype()
        made.append(torch.full((shape.numel() + 2 * GUARD,), 7, dtype=dtype, device=device))
        inner = made[-1][GUARD : GUARD + shape.numel()].view(shape)
        return inner.fill_(torch.nan if dtype.is_floating_point else -7)

    with mock.patch.object(torch, "empty", empty):
        yield
    for place, room in enumerate(made):
        whole = bool((room[:GUARD] == 7).all()) and bool((room[-GUARD:] == 7).all())
        assert whole, f"a kernel wrote outside torch.empty number {place}"


@pytest.fixture
def poisoned() -> Iterator[None]:
    """A test in `guarded`."""
    with guarded():
        yield


def surrounded(values: Tensor, strides: tuple[int, ...] | None = None) -> Tensor:
    """The values with NaN, or 99 where there is none, before and after them, and between them where the strides leave
    room: what a kernel reads from there is seen in its results."""
    strides = strides or values.contiguous().stride()
    room = 1 + sum((size - 1) * stride for size, stride in zip(values.shape, strides, strict=True))
    fill = torch.nan if values.is_floating_point() else 99
    flat = torch.full((room + 2 * GUARD,), fill, dtype=values.dtype, device=values.device)
    return flat.as_strided(values.shape, strides, GUARD).copy_(values)


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
    """`assert_within_twice` with a floor for sums: one rounding of the largest value to its dtype, and four times the
    sqrt(n) roundings of a float32 sum of n = `terms` numbers in any order."""
    sums = 4 * torch.finfo(torch.float32).eps * math.sqrt(terms)
    floors = [(torch.finfo(value.dtype).eps / 2 + sums) * largest(best) for value, best in zip(got, truth, strict=True)]
    assert_within_twice(got, usual, truth, floors)


def assert_within_twice(
    got: Sequence[Tensor], usual: Sequence[Tensor], truth: Sequence[Tensor], floors: Sequence[float]
) -> None:
    """The error of a kernel's results is at most twice PyTorch's own at the same dtypes, and a floor, because PyTorch
    may hit the truth by luck."""
    for place, (value, own, best, floor) in enumerate(zip(got, usual, truth, floors, strict=True)):
        assert (value.shape, value.dtype) == (own.shape, own.dtype), f"result {place}: {value.dtype} {value.shape}"
        allowed = 2 * largest(own.double() - best) + floor
        error = largest(value.double() - best)
        assert error <= allowed, f"result {place}: error {error:.3g}, allowed {allowed:.3g}"  # also of NaN


def assert_same(first: Sequence[Tensor], second: Sequence[Tensor]) -> None:
    """Equal in every bit; no NaN."""
    for place, (one, other) in enumerate(zip(first, second, strict=True)):
        assert torch.equal(one, other), f"result {place} differs"


def largest(x: Tensor) -> float:
    return float(x.abs().max()) if x.numel() else 0.0


def mutant(folder: Path, name: str, file: str, right: str, wrong: str, function: str = "") -> ModuleType:
    """A copy of the module `name` of kernels, with `wrong` for `right` in `file`, or in one function of it; its ops
    have names of their own."""
    package = f"mutant_{folder.name}"
    (folder / package).mkdir()
    (folder / package / "__init__.py").touch()
    for stem in SOURCES:
        text = (ROOT / "kernels" / f"{stem}.py").read_text()
        if stem == file:
            before, head, text = text.partition(f"def {function}(") if function else ("", "", text)
            text, end, after = text.partition("\n\n\n") if function else (text, "", "")
            assert text.count(right) == 1, f"{file}.py has {text.count(right)} times {right!r}"
            text = before + head + text.replace(right, wrong) + end + after
        (folder / package / f"{stem}.py").write_text(text.replace('"sra_fast::', f'"{package}::'))
    sys.path.insert(0, str(folder))
    try:
        return importlib.import_module(f"{package}.{name}")
    finally:
        sys.path.remove(str(folder))
