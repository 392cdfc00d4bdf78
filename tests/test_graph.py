"""Captured on a stand-in for CUDA, whose kernels run when launched and are only recorded while a graph is captured;
test_gpu_step.py has the real one."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch

from sra_fast.step.graph import WARM_UP, Captured


class FakePool:
    """Counts its users, and is one of them."""

    id = (0, 1)

    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda = cuda
        cuda.pool_users += 1

    def use_count(self) -> int:
        return self.cuda.pool_users

    def __del__(self) -> None:
        self.cuda.pool_users -= 1


class FakeCuda:
    """The functions of torch.cuda that Captured calls."""

    def __init__(self) -> None:
        self.launch = self.run
        self.done: list[str] = []
        self.log: list[str] = []
        self.error = ""  # of the capture
        self.pool_users = 0
        self.the_stream = SimpleNamespace(device=torch.device("cuda"), wait_stream=lambda _: self.log.append("wait"))

    def run(self, kernel: str) -> None:
        self.done.append(kernel)

    def current_stream(self, device: torch.device) -> object:
        return self.the_stream

    def stream(self, stream: object):
        return nullcontext()

    def set_stream(self, stream: object) -> None:
        self.log.append("set_stream")

    def synchronize(self, device: torch.device) -> None:
        self.log.append("synchronize")

    def empty_cache(self) -> None:
        self.log.append(f"empty_cache with {self.pool_users}")

    def release(self, index: int | None, pool: object) -> None:
        assert pool == FakePool.id
        self.pool_users -= 1

    def CUDAGraph(self) -> object:
        kernels: list[str] = []
        return SimpleNamespace(kernels=kernels, replay=lambda: self.done.extend(kernels))

    @contextmanager
    def graph(self, graph, pool: object, stream: object, capture_error_mode: str):
        assert capture_error_mode == "thread_local"
        self.log.append("capture")
        assert pool == FakePool.id
        self.pool_users += 1  # the graph's reference; a capture that fails keeps it
        self.launch = graph.kernels.append
        try:
            yield
            if self.error:
                raise RuntimeError(self.error)
        except RuntimeError:  # like torch's, the last error hides the first
            raise RuntimeError("operation failed due to a previous error during capture")  # noqa: B904
        finally:
            self.launch = self.run


@pytest.fixture
def cuda(monkeypatch) -> FakeCuda:
    fake = FakeCuda()
    for name in ("current_stream", "stream", "set_stream", "synchronize", "empty_cache", "CUDAGraph", "graph"):
        monkeypatch.setattr(torch.cuda, name, getattr(fake, name))
    monkeypatch.setattr(torch._C, "_cuda_releasePool", fake.release, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", lambda index, pool: fake.log.append("end"), raising=False)
    return fake


def test_every_call_works_once(cuda) -> None:
    calls = []
    captured = Captured(lambda: (calls.append(0), cuda.launch("k")), cuda.the_stream, FakePool(cuda))
    for k in range(1, 8):
        captured()
        assert cuda.done == ["k"] * k
        assert captured.captured == (k > WARM_UP)
    assert len(calls) == WARM_UP + 1  # replays run no Python
    assert cuda.log == ["wait", "wait"] * WARM_UP + ["capture"]
    assert captured.failure is None
    assert cuda.pool_users == 2  # the pool itself and the graph


def test_a_failed_capture_is_reported_once_and_calls_go_on(cuda) -> None:
    cuda.error, lines = "operation not permitted when stream is capturing\nmore", []
    captured = Captured(lambda: cuda.launch("k"), cuda.the_stream, FakePool(cuda), warm_up=1, report=lines.append)
    for k in range(1, 6):
        captured()
        assert cuda.done == ["k"] * k
    assert captured.failure == "operation not permitted when stream is capturing"
    assert len(lines) == 1
    assert captured.failure in lines[0]
    assert cuda.log.count("capture") == cuda.log.count("set_stream") == cuda.log.count("synchronize") == 1
    # Nobody uses the pool any more when the cache is emptied, else its memory would be lost.
    assert [line for line in cuda.log if line.startswith("e")] == ["end", "empty_cache with 0"]
