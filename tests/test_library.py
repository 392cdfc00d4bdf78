"""The compiled operators: why they are missing is reported, and the library needs neither CUDA nor Python."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from sra_fast.kernels import library

ROOT = Path(__file__).parents[1]
BUILT = ROOT / "sra_fast" / library.NAME
ABSENT = f"the compiled operators are not built ({library.FIX})"
built = pytest.mark.skipif(not BUILT.exists(), reason=ABSENT)


@pytest.fixture
def load_from(monkeypatch: pytest.MonkeyPatch):
    """What `_load` returns for a package that lies in these folders."""

    def load(*folders: Path) -> str:
        package = SimpleNamespace(submodule_search_locations=[str(folder) for folder in folders])
        monkeypatch.setattr(library, "find_spec", {"sra_fast": package}.get)
        return library._load.__wrapped__()

    return load


def test_a_missing_library_is_reported_with_the_fix(load_from, tmp_path: Path) -> None:
    assert load_from(tmp_path, tmp_path / "nowhere") == ABSENT
    assert "cmake" in ABSENT
    assert "pip install --no-build-isolation -e ." in ABSENT


@pytest.mark.parametrize(
    "content", [b"", b"no library", b"\x7fELF\x02\x01\x01" + bytes(57)], ids=["empty", "text", "cut"]
)
def test_a_broken_library_is_reported_in_one_line(load_from, tmp_path: Path, content: bytes) -> None:
    (tmp_path / library.NAME).write_bytes(content)
    message = rf"the compiled operators cannot be loaded \(.*{library.NAME}.*; {re.escape(library.FIX)}\)"
    assert re.fullmatch(message, load_from(tmp_path))


@built
def test_the_library_is_found_in_any_of_the_packages_folders(load_from, monkeypatch, tmp_path: Path) -> None:
    loaded = []
    monkeypatch.setattr(library.torch.ops, "load_library", loaded.append)
    assert load_from(tmp_path, BUILT.parent) == ""
    assert loaded == [BUILT]


@pytest.mark.parametrize("on_gpu", [False, True])
def test_without_the_library_nothing_is_available(monkeypatch, on_gpu: bool) -> None:
    monkeypatch.setattr(library, "_load", lambda: ABSENT)
    assert library.why_unavailable(on_gpu) == ABSENT
    assert not library.has_gpu_code()


def test_a_library_without_gpu_code_serves_the_cpu_alone(monkeypatch) -> None:
    monkeypatch.setattr(library, "_load", lambda: "")
    monkeypatch.setattr(library, "has_gpu_code", lambda: False)
    assert library.why_unavailable() == ""
    assert re.search(r"have no GPU code: nvcc .*cmake.* on the PATH$", library.why_unavailable(on_gpu=True))


WITHOUT = """
import importlib.util as util, torch
real = util.find_spec
nowhere = type("", (), {"submodule_search_locations": ["nowhere"]})
util.find_spec = lambda name: nowhere if name == "sra_fast" else real(name)
from sra_fast.kernels import adamw_ema as op, gradient_norm as norm
w, m, v, f = torch.ones(3), torch.zeros(3), torch.zeros(3), torch.tensor
g = [torch.full((3,), 2.0)]
scalars = op.Scalars(norm.gradient_norm_ref(g), f(0), f(0), f(0.5), f(0.9), f(0.0), f(1.0))
op.adamw_ema_ref(op.Lists(g, [w], [m], [v]), scalars, betas=(0.9, 0.999), eps=1e-8)
assert torch.allclose(w, f(0.5)) and not hasattr(torch.ops.sra_fast, "adamw_ema_")
"""


def test_without_the_library_the_references_compute() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


def readelf(*options: str) -> str:
    if not shutil.which("readelf"):
        pytest.skip("needs readelf, of the package binutils")
    return subprocess.run(["readelf", "-W", *options, BUILT], capture_output=True, text=True, check=True).stdout


@built
def test_the_library_needs_torch_and_the_system_alone() -> None:
    dynamic = readelf("-d")
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", dynamic)
    assert {"libtorch_cpu.so", "libc10.so"} <= set(needed)
    system = r"lib(stdc\+\+|gcc_s|c|m|dl|rt|pthread|gomp)\.so\.\d+|ld-linux.*"
    assert [name for name in needed if not re.fullmatch(rf"libtorch_cpu\.so|libc10\.so|{system}", name)] == []
    assert not re.search("RPATH|RUNPATH", dynamic)  # a path of the machine that built it


@built
def test_the_library_uses_torchs_stable_abi_alone() -> None:
    """C++ symbols depend on the version of torch, Python's on that of Python; CUDA's are missing in a CPU build."""
    symbols = re.findall(r"(GLOBAL|WEAK) +DEFAULT +UND ([^@\s]+)", readelf("--dyn-syms"))
    undefined = {name: binding for binding, name in symbols}
    assert "aoti_torch_library_def" in undefined
    assert [name for name in undefined if re.match(r"_?Py|_ZN?K?(2at|3c10|5torch|8pybind11)", name)] == []
    strong = [name for name, binding in undefined.items() if binding == "GLOBAL"]
    assert [name for name in strong if re.match(r"cu[A-Z]|cuda|__cuda|nv|aoti_torch_.*cuda_", name)] == []


@built
def test_the_library_exports_no_symbols_of_its_own() -> None:
    """Or two libraries in one process could call each other's functions."""
    exported = re.findall(r"(?:GLOBAL|WEAK) +DEFAULT +\d+ (\S*sra\S*)", readelf("--dyn-syms"))
    assert exported == []


STREAM = """
import ctypes, sys, torch
if len(sys.argv) > 2:
    ctypes.CDLL(sys.argv[2], mode=0)  # RTLD_LOCAL, as Python loads torch's own
torch.ops.load_library(sys.argv[1])
print(torch.ops.sra_fast.cuda_is_ready())
"""


@pytest.mark.slow
def test_torchs_stream_function_is_found_in_a_library_loaded_with_rtld_local(tmp_path: Path) -> None:
    if not BUILT.exists() or not library.has_gpu_code() or torch.version.cuda:
        pytest.skip("needs a library with GPU code, and a torch without")
    if not shutil.which("g++"):
        pytest.skip("needs g++")
    function = 'extern "C" int aoti_torch_get_current_cuda_stream(int, void**) { return 0; }'
    (tmp_path / "stream.cpp").write_text(function)
    stub = tmp_path / "libtorch_cuda.so"
    named = ["-shared", "-fPIC", "-Wl,-soname,libtorch_cuda.so", tmp_path / "stream.cpp", "-o", stub]
    subprocess.run(["g++", *named], check=True)
    for arguments, ready in (([stub], "True"), ([], "False")):
        command = [sys.executable, "-c", STREAM, BUILT, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == ready


def test_gpu_code_for_every_architecture_and_ptx_for_later_ones() -> None:
    triton = pytest.importorskip("triton")
    program = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if not program.exists() or not BUILT.exists() or not library.has_gpu_code():
        pytest.skip("needs a library with GPU code, and cuobjdump of Triton's wheel")

    def listed(what: str) -> str:
        return subprocess.run([program, what, BUILT], capture_output=True, text=True, check=True).stdout

    assert set(re.findall(r"sm_\d+", listed("--list-elf"))) == {"sm_80", "sm_90", "sm_100"}
    assert re.findall(r"sm_\d+", listed("--list-ptx")) == ["sm_100"]
