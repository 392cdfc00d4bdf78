"""Captured on a stand-in for CUDA, whose kernels run when launched and are only recorded while a graph is captured;
test_gpu_step.py has the real one."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch

from sra_fast.step.graph import WARM_UP, Captured


class FakeCuda:
    """The functions of torch.cuda that Captured calls."""

    def __init__(self) -> None:
        self.launch = self.run
        self.done: list[str] = []
        self.log: list[str] = []
        self.error = ""  # of the capture
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

    def CUDAGraph(self) -> object:
        kernels: list[str] = []
        return SimpleNamespace(kernels=kernels, replay=lambda: self.done.extend(kernels))

    @contextmanager
    def graph(self, graph, pool: object, stream: object, capture_error_mode: str):
        assert capture_error_mode == "thread_local"
        self.log.append("capture")
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
    for name in ("current_stream", "stream", "set_stream", "synchronize", "CUDAGraph", "graph"):
        monkeypatch.setattr(torch.cuda, name, getattr(fake, name))
    return fake


def test_every_call_works_once(cuda) -> None:
    calls = []
    captured = Captured(lambda: (calls.append(0), cuda.launch("k")), cuda.the_stream, (1, 2))
    for k in range(1, 8):
        captured()
        assert cuda.done == ["k"] * k
        assert captured.captured == (k > WARM_UP)
    assert len(calls) == WARM_UP + 1  # replays run no Python
    assert cuda.log == ["wait", "wait"] * WARM_UP + ["capture"]
    assert captured.failure is None


def test_a_failed_capture_is_reported_once_and_calls_go_on(cuda) -> None:
    cuda.error, lines = "operation not permitted when stream is capturing\nmore", []
    captured = Captured(lambda: cuda.launch("k"), cuda.the_stream, (1, 2), warm_up=1, report=lines.append)
    for k in range(1, 6):
        captured()
        assert cuda.done == ["k"] * k
    assert captured.failure == "operation not permitted when stream is capturing"
    assert len(lines) == 1
    assert captured.failure in lines[0]
    assert cuda.log.count("capture") == cuda.log.count("set_stream") == cuda.log.count("synchronize") == 1
