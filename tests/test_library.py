"""The compiled operators: what is said where there are none, and that the library asks for no CUDA and no Python."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from sra_fast import kernels
from sra_fast.kernels import library

ROOT = Path(__file__).parents[1]
BUILT = ROOT / "sra_fast" / library.NAME
ABSENT = f"the compiled operators are not built ({library.CURE})"
GPU = "sm_90"


def looked_for_in(monkeypatch: pytest.MonkeyPatch, *folders: Path) -> str:
    """What `load` says when the package lies there."""
    package = SimpleNamespace(submodule_search_locations=[str(folder) for folder in folders])
    monkeypatch.setattr(library, "find_spec", {"sra_fast": package}.get)
    return library.load.__wrapped__()


def test_a_library_that_is_not_there_is_said_with_the_cure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    said = looked_for_in(monkeypatch, tmp_path, tmp_path / "nowhere")
    assert said == ABSENT
    assert "cmake" in said
    assert "pip install --no-build-isolation -e ." in said


@pytest.mark.parametrize(
    "content", [b"", b"no library", b"\x7fELF\x02\x01\x01" + bytes(57)], ids=["empty", "text", "cut"]
)
def test_a_library_that_cannot_be_loaded_is_said_in_one_line(monkeypatch, tmp_path: Path, content: bytes) -> None:
    (tmp_path / library.NAME).write_bytes(content)
    said = looked_for_in(monkeypatch, tmp_path)
    assert (
        re.fullmatch(rf"the compiled operators cannot be loaded \(.*{library.NAME}.*; (.*)\)", said)[1] == library.CURE
    )


@pytest.mark.skipif(not BUILT.exists(), reason=ABSENT)
def test_the_library_is_found_in_any_of_the_packages_folders(monkeypatch, tmp_path: Path) -> None:
    loaded = []
    monkeypatch.setattr(library.torch.ops, "load_library", loaded.append)
    assert looked_for_in(monkeypatch, tmp_path, BUILT.parent) == ""
    assert loaded == [BUILT]


@pytest.fixture(
    params=[ABSENT, "the compiled operators cannot be loaded (no such symbol; get another)"], ids=["absent", "broken"]
)
def obstacle(request, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(library, "load", lambda: request.param)
    return request.param


@pytest.mark.parametrize("op", kernels.COMPILED)
@pytest.mark.parametrize("architecture", ["cpu", GPU])
def test_without_the_library_auto_is_the_reference_and_fused_is_refused(
    obstacle, monkeypatch, op, architecture
) -> None:
    monkeypatch.setattr(kernels, "WINS", {op: ("cpu", GPU)})  # wherever it wins
    assert kernels.missing(op, architecture) == obstacle
    for choice in ("auto", "reference"):
        assert kernels.resolve({op: choice}, architecture) == {op: "reference"}
    with pytest.raises(
        ValueError, match=rf"^kernels\.{op}: 'fused' given, but {re.escape(obstacle)}; must be auto or ref"
    ):
        kernels.resolve({op: "fused"}, architecture)
    assert not library.has_gpu_code()


@pytest.mark.parametrize("op", kernels.COMPILED)
def test_with_the_library_fused_is_had_and_auto_takes_it_where_it_wins(monkeypatch, op: str) -> None:
    monkeypatch.setattr(library, "load", lambda: "")
    monkeypatch.setattr(library, "missing_on_a_gpu", lambda: "")
    for architecture, other in (("cpu", GPU), (GPU, "cpu")):
        assert kernels.resolve({op: "fused"}, architecture) == {op: "fused"}
        monkeypatch.setattr(kernels, "WINS", {op: (architecture,)})
        assert kernels.resolve({op: "auto"}, architecture) == {op: "fused"}
        assert kernels.resolve({op: "auto"}, other) == {op: "reference"}


@pytest.mark.parametrize("op", kernels.COMPILED)
def test_a_library_without_gpu_code_serves_the_cpu_and_says_so_for_a_gpu(monkeypatch, op: str) -> None:
    monkeypatch.setattr(library, "load", lambda: "")
    monkeypatch.setattr(library, "has_gpu_code", lambda: False)
    monkeypatch.setattr(kernels, "WINS", {op: ("cpu", GPU)})
    assert kernels.resolve({op: "fused"}, "cpu") == kernels.resolve({op: "auto"}, "cpu") == {op: "fused"}
    assert kernels.resolve({op: "auto"}, GPU) == {op: "reference"}
    with pytest.raises(
        ValueError, match=r"have no GPU code: no nvcc .*cmake.* on the PATH; must be auto or reference$"
    ):
        kernels.resolve({op: "fused"}, GPU)


def test_a_triton_kernel_needs_no_library(obstacle) -> None:
    assert kernels.missing("adaln", GPU) != obstacle


WITHOUT = """
import importlib.util as util, torch
real = util.find_spec
nowhere = type("", (), {"submodule_search_locations": ["nowhere"]})
util.find_spec = lambda name: nowhere if name == "sra_fast" else real(name)
from sra_fast.kernels import adamw_ema as op, gradient_norm as norm
w, m, v, f = torch.ones(3), torch.zeros(3), torch.zeros(3), torch.tensor
g = [torch.full((3,), 2.0)]
given = op.Scalars(norm.gradient_norm_ref(g), f(0), f(0), f(0.5), f(0.9), f(0.0), f(1.0))
op.adamw_ema_ref(op.Lists(g, [w], [m], [v]), given, betas=(0.9, 0.999), eps=1e-8)
assert torch.allclose(w, f(0.5)) and not hasattr(torch.ops.sra_fast, "adamw_ema_")
"""


def test_without_the_library_everything_imports_and_the_references_compute() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


# The file itself


def readelf(*options: str) -> str:
    if not BUILT.exists():
        pytest.skip(ABSENT)
    if not shutil.which("readelf"):
        pytest.skip("needs readelf, of the package binutils")
    return subprocess.run(["readelf", "-W", *options, BUILT], capture_output=True, text=True, check=True).stdout


def test_the_library_needs_torch_and_the_system_alone() -> None:
    dynamic = readelf("-d")
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", dynamic)
    assert {"libtorch_cpu.so", "libc10.so"} <= set(needed)
    system = r"lib(stdc\+\+|gcc_s|c|m|dl|rt|pthread|gomp)\.so\.\d+|ld-linux.*"
    assert [name for name in needed if not re.fullmatch(rf"libtorch_cpu\.so|libc10\.so|{system}", name)] == []
    assert not re.search("RPATH|RUNPATH", dynamic)  # a path of the machine that built it


def test_the_library_asks_torch_for_its_stable_abi_alone() -> None:
    """C++ names change with torch's version, Python's with its own, and CUDA's are missing in a torch without."""
    found = re.findall(r"(GLOBAL|WEAK) +DEFAULT +UND ([^@\s]+)", readelf("--dyn-syms"))
    undefined = {name: binding for binding, name in found}
    assert "aoti_torch_library_def" in undefined
    assert [name for name in undefined if re.match(r"_?Py|_ZN?K?(2at|3c10|5torch|8pybind11)", name)] == []
    strong = [name for name, binding in undefined.items() if binding == "GLOBAL"]
    assert [name for name in strong if re.match(r"cu[A-Z]|cuda|__cuda|nv|aoti_torch_.*cuda_", name)] == []


def test_the_library_offers_no_names_of_its_own() -> None:
    """Two libraries in a process must not take each other's functions."""
    offered = re.findall(r"(?:GLOBAL|WEAK) +DEFAULT +\d+ (\S*sra\S*)", readelf("--dyn-syms"))
    assert offered == []


STREAM = """
import ctypes, sys, torch
if len(sys.argv) > 2:
    ctypes.CDLL(sys.argv[2], mode=0)  # RTLD_LOCAL, as Python loads torch's own
torch.ops.load_library(sys.argv[1])
print(torch.ops.sra_fast.cuda_is_ready())
"""


def test_torchs_stream_is_found_in_a_library_that_is_loaded_for_python_alone(tmp_path: Path) -> None:
    if not BUILT.exists() or not library.has_gpu_code() or torch.version.cuda:
        pytest.skip("needs a library with GPU code, and a torch without")
    if not shutil.which("g++"):
        pytest.skip("needs g++")
    function = 'extern "C" int aoti_torch_get_current_cuda_stream(int, void**) { return 0; }'
    (tmp_path / "stream.cpp").write_text(function)
    stub = tmp_path / "libtorch_cuda.so"
    named = ["-shared", "-fPIC", "-Wl,-soname,libtorch_cuda.so", tmp_path / "stream.cpp", "-o", stub]
    subprocess.run(["g++", *named], check=True)
    for given, ready in (([stub], "True"), ([], "False")):
        command = [sys.executable, "-c", STREAM, BUILT, *given]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == ready


def test_gpu_code_is_for_every_architecture_and_for_those_to_come() -> None:
    triton = pytest.importorskip("triton")
    program = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if not program.exists() or not BUILT.exists() or not library.has_gpu_code():
        pytest.skip("needs a library with GPU code, and cuobjdump of Triton's wheel")

    def listed(what: str) -> str:
        return subprocess.run([program, what, BUILT], capture_output=True, text=True, check=True).stdout

    assert set(re.findall(r"sm_\d+", listed("--list-elf"))) == {"sm_80", "sm_90", "sm_100"}
    assert re.findall(r"sm_\d+", listed("--list-ptx")) == ["sm_100"]
