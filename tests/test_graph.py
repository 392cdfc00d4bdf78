"""Captured: one ordinary call after the other, then a capture, then replays, each doing its work exactly once. On a
stand-in for CUDA, whose kernels run when launched, and are only recorded while a graph is captured; test_gpu_step.py
has the real one."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch

from sra_fast.step.graph import WARM_UP, Captured


class Machine:
    """What torch.cuda does for Captured, in a few lines."""

    def __init__(self) -> None:
        self.recording: list | None = None
        self.done: list[str] = []
        self.log: list[str] = []
        self.refuses = ""

    def launch(self, kernel: str) -> None:
        (self.done if self.recording is None else self.recording).append(kernel)

    def Stream(self, device):
        machine = self

        class Stream:
            def __init__(self) -> None:
                self.device = torch.device(device)

            def wait_stream(self, other) -> None:
                machine.log.append("wait")

        return Stream()

    def current_stream(self, device):
        return self.Stream(device)

    @contextmanager
    def stream(self, stream):
        yield

    def set_stream(self, stream) -> None:
        self.log.append("current stream as before")

    def synchronize(self, device) -> None:
        self.log.append("synchronize")

    def CUDAGraph(self):
        machine = self

        class Graph:
            def __init__(self) -> None:
                self.kernels: list[str] = []

            def replay(self) -> None:
                machine.done += self.kernels

        return Graph()

    @contextmanager
    def graph(self, graph, pool, stream, capture_error_mode):
        assert capture_error_mode == "thread_local"
        self.log.append(f"capture in {pool}")
        self.recording = graph.kernels
        try:
            yield
            if self.refuses:
                raise RuntimeError(self.refuses)
        except RuntimeError:  # as torch's does: what it says of the end hides why it came to that
            raise RuntimeError("operation failed due to a previous error during capture")  # noqa: B904
        finally:
            self.recording = None


@pytest.fixture
def machine(monkeypatch) -> Machine:
    made = Machine()
    for name in ("Stream", "current_stream", "stream", "set_stream", "synchronize", "CUDAGraph", "graph"):
        monkeypatch.setattr(torch.cuda, name, getattr(made, name))
    return made


def test_every_call_does_its_work_once(machine) -> None:
    calls = []
    captured = Captured(lambda: (calls.append(0), machine.launch("k")), machine.Stream("cuda"), (1, 2))
    for k in range(1, 8):
        captured()
        assert machine.done == ["k"] * k
        assert captured.captured == (k > WARM_UP)
    assert len(calls) == WARM_UP + 1  # replays need no Python
    assert machine.log.count("capture in (1, 2)") == 1
    assert captured.failure is None


def test_a_failed_capture_is_said_once_and_steps_go_on(machine) -> None:
    said = []
    machine.refuses = "operation not permitted when stream is capturing\nmore"
    captured = Captured(lambda: machine.launch("k"), machine.Stream("cuda"), (1, 2), warm_up=1, say=said.append)
    for k in range(1, 6):
        captured()
        assert machine.done == ["k"] * k
    assert said == [
        "no CUDA graph: operation not permitted when stream is capturing; steps are launched kernel by kernel, "
        "which is slower"
    ]
    assert captured.failure == "operation not permitted when stream is capturing"
    assert not captured.captured
    assert machine.log.count("capture in (1, 2)") == 1
    assert "current stream as before" in machine.log
    assert "synchronize" in machine.log


def test_ordinary_calls_are_in_order_with_the_current_stream(machine) -> None:
    Captured(lambda: machine.log.append("work"), machine.Stream("cuda"), (1, 2))()
    assert machine.log == ["wait", "work", "wait"]
