"""Checks of kernels that a test file makes by running itself in a process of its own, because Triton's interpreter has
to be chosen before Triton is imported; memory that shows what was not written or should not have been; and faults."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

GUARD = 1 << 14  # elements before and after every tensor that a kernel reads (NaN) or writes (7)
ROOT = Path(__file__).parents[1]

Checks = Mapping[str, Callable[[], list[str]]]  # name -> complaints, none if all is well


def found_in_the_interpreter(file: str) -> dict[str, list[str]]:
    """Complaints of every check that a file's main tells of."""
    pytest.importorskip("triton", reason="Triton is not installed")
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    ran = subprocess.run([sys.executable, file], env=environment, capture_output=True, text=True, cwd=ROOT)
    assert ran.returncode == 0, ran.stderr[-2000:]
    return json.loads(ran.stdout.splitlines()[-1])


def tell(checks: Checks) -> None:
    """Make all checks and print {name: complaints} as one line of JSON."""
    torch.set_num_threads(1)
    found = {}
    for name, check in checks.items():
        try:
            found[name] = check()
        except Exception as error:  # told to the test that asked for this check, which fails by it
            found[name] = [repr(error)[:1000]]
    print(json.dumps(found))


@contextmanager
def poisoned() -> Iterator[Callable[[], bool]]:
    """Every torch.empty full of NaN, or of -7 where there is none, between guards of 7. Yields whether all guards are
    still whole."""
    made = []

    def empty(*size, dtype: torch.dtype, device: torch.device) -> Tensor:
        shape = torch.Size(size[0] if size and not isinstance(size[0], int) else size)
        made.append(torch.full((shape.numel() + 2 * GUARD,), 7, dtype=dtype, device=device))
        inner = made[-1][GUARD : GUARD + shape.numel()].view(shape)
        return inner.fill_(torch.nan if dtype.is_floating_point else -7)

    with patch.object(torch, "empty", empty):
        yield lambda: all(bool((x[:GUARD] == 7).all()) and bool((x[-GUARD:] == 7).all()) for x in made)


def broken(module: ModuleType, function: str, old: str, new: str, folder: Path) -> ModuleType:
    """A module of sra_fast.kernels with a fault in one function's source, its ops under another name."""
    text = Path(module.__file__).read_text()
    before, head, rest = text.partition(f"def {function}(")
    body, end, after = rest.partition("\n\n\n")
    assert body.count(old) == 1, f"{old} is {body.count(old)} times in {function}"
    text = before + head + body.replace(old, new) + end + after
    name = f"faulty_{abs(hash((function, old, new)))}"
    path = folder / f"{name}.py"  # Triton reads a kernel's source from its file
    path.write_text(text.replace("from .", "from sra_fast.kernels.").replace("sra_fast::", f"{name}::"))
    spec = importlib.util.spec_from_file_location(name, path)
    faulty = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(faulty)
    return faulty
