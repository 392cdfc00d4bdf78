"""Kernels in Triton's interpreter on a CPU, in a separate process, because TRITON_INTERPRET=1 must be set before Triton
is imported.

Tests of kernels are decorated with `kernel`. They run on a GPU, and in the process that `run_interpreted` starts.
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
# The files that a copy with a fault needs.
SOURCES = ("language", "rows", "philox", "adaln", "alignment", "perturb")
# Under compute-sanitizer (benchmarks/sanitized.py), which sees reads and writes outside of allocations, and reads of
# memory that nobody wrote, tensors have allocations of exactly their size, and new ones stay as they are.
EXACT = os.environ.get("SRA_FAST_EXACT_ALLOCATIONS") == "1"
GUARD = 0 if EXACT else 1 << 14  # elements before and after each tensor of `surrounded` and `guarded`


def kernel(test):
    """Mark a test that runs kernels."""
    test.runs_kernels = True
    reason = "no GPU; another test of this file runs it in the interpreter"
    test = pytest.mark.skipif(bool(why_unavailable()), reason=reason)(test)
    return test if INTERPRETED else pytest.mark.gpu(test)


def run_interpreted(file: str) -> None:
    """Run the tests of a file that are marked with `kernel`: at least ten, none skipped."""
    pytest.importorskip("triton")
    tests = vars(sys.modules[Path(file).stem]).items()
    names = [f"{file}::{name}" for name, test in tests if getattr(test, "runs_kernels", False)]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--noconftest", *names]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
    assert re.search(r"\d\d passed", result.stdout), result.stdout[-1000:]
    assert "skipped" not in result.stdout, result.stdout[-1000:]


def patch_interpreter() -> None:
    """Work around two defects of Triton's interpreter: it truncates float32 to bfloat16 where a GPU rounds to nearest,
    and its scalars are arrays of one element, which numpy 2.4 no longer accepts as numbers."""
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
    patch_interpreter()


@contextmanager
def guarded() -> Iterator[None]:
    """Fill every torch.empty with NaN (integers: -7), to find elements that a kernel leaves unwritten, and surround it
    with guard zones, which must not change."""
    if EXACT:
        yield
        return
    buffers = []

    def empty(*size, dtype: torch.dtype | None = None, device: torch.device | None = None) -> Tensor:
        shape = torch.Size(size[0] if size and not isinstance(size[0], int) else size)
        dtype = dtype or torch.get_default_dtype()
        buffers.append(torch.full((shape.numel() + 2 * GUARD,), 7, dtype=dtype, device=device))
        inner = buffers[-1][GUARD : GUARD + shape.numel()].view(shape)
        return inner.fill_(torch.nan if dtype.is_floating_point else -7)

    with mock.patch.object(torch, "empty", empty):
        yield
    for number, buffer in enumerate(buffers):
        intact = bool((buffer[:GUARD] == 7).all()) and bool((buffer[-GUARD:] == 7).all())
        assert intact, f"a kernel wrote outside torch.empty number {number}"


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Run a test in `guarded`."""
    with guarded():
        yield


def surrounded(values: Tensor, strides: tuple[int, ...] | None = None) -> Tensor:
    """The values with NaN (integers: 99) before, after and, if the strides leave gaps, between them: reads from there
    show up in the results."""
    strides = strides or values.contiguous().stride()
    span = 1 + sum((size - 1) * stride for size, stride in zip(values.shape, strides, strict=True))
    fill = torch.nan if values.is_floating_point() else 99
    flat = torch.full((span + 2 * GUARD,), fill, dtype=values.dtype, device=values.device)
    return flat.as_strided(values.shape, strides, GUARD).copy_(values)


def inside(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Random numbers in a view with dense rows and odd other strides: (B, D) as the second of six parts, (B, T, D) as a
    transposed part of (T, B, D). Elements outside the view are finite: reading them gives wrong values, not NaN."""
    if EXACT:
        return torch.randn(shape, generator=generator).to(DEVICE, dtype)
    *outer, width = shape
    if len(outer) == 1:
        return torch.randn(outer[0] + 1, 6 * width, generator=generator).to(DEVICE, dtype)[:-1, width : 2 * width]
    batch, tokens = outer
    larger = torch.randn(tokens + 1, batch + 1, width + 3, generator=generator).to(DEVICE, dtype)
    return larger[:-1, :-1, 1:-2].transpose(0, 1)


def assert_as_exact(got: Sequence[Tensor], usual: Sequence[Tensor], truth: Sequence[Tensor], terms: int) -> None:
    """`assert_within_twice` with a floor for sums: one rounding of the largest value to its dtype, and four times the
    sqrt(n) roundings of a float32 sum of n = `terms` numbers in any order."""
    sums = 4 * torch.finfo(torch.float32).eps * math.sqrt(terms)
    floors = [(torch.finfo(value.dtype).eps / 2 + sums) * largest(best) for value, best in zip(got, truth, strict=True)]
    assert_within_twice(got, usual, truth, floors)


def assert_within_twice(
    got: Sequence[Tensor], usual: Sequence[Tensor], truth: Sequence[Tensor], floors: Sequence[float]
) -> None:
    """A kernel's error is at most twice the error of PyTorch with the same dtypes, plus a floor, because PyTorch may be
    exact by luck."""
    for place, (value, own, best, floor) in enumerate(zip(got, usual, truth, floors, strict=True)):
        assert (value.shape, value.dtype) == (own.shape, own.dtype), f"result {place}: {value.dtype} {value.shape}"
        allowed = 2 * largest(own.double() - best) + floor
        error = largest(value.double() - best)
        assert error <= allowed, f"result {place}: error {error:.3g}, allowed {allowed:.3g}"  # also fails for NaN


def assert_same(first: Sequence[Tensor], second: Sequence[Tensor]) -> None:
    """Equal in every bit, without NaN."""
    for place, (one, other) in enumerate(zip(first, second, strict=True)):
        assert torch.equal(one, other), f"result {place} differs"


def largest(x: Tensor) -> float:
    return float(x.abs().max()) if x.numel() else 0.0


def mutant(folder: Path, name: str, file: str, right: str, wrong: str, function: str = "") -> ModuleType:
    """A copy of kernels/`name`.py and the files it needs, with `right` replaced by `wrong` in `file`, or in one of its
    functions. Its ops are registered under another namespace."""
    package = f"mutant_{folder.name}"
    (folder / package).mkdir()
    (folder / package / "__init__.py").touch()
    for stem in SOURCES:
        text = (ROOT / "kernels" / f"{stem}.py").read_text()
        if stem == file:
            before, head, text = text.partition(f"def {function}(") if function else ("", "", text)
            text, end, after = text.partition("\n\n\n") if function else (text, "", "")
            assert text.count(right) == 1, f"{file}.py contains {right!r} {text.count(right)} times"
            text = before + head + text.replace(right, wrong) + end + after
        (folder / package / f"{stem}.py").write_text(text.replace('"sra_fast::', f'"{package}::'))
    sys.path.insert(0, str(folder))
    try:
        return importlib.import_module(f"{package}.{name}")
    finally:
        sys.path.remove(str(folder))
