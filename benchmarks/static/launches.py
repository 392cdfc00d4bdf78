"""What a step launches: kernels that Inductor generated, kernels of this project, and operators of PyTorch."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import ceil
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.codecache import PyCodeCache
from torch._inductor.output_code import CompiledFxGraph
from torch._inductor.virtualized import V
from torch._library.custom_ops import OPDEFS
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.profiler import record_function
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from triton.runtime.jit import JITFunction

PREFIX = "sra_fast::"
# Operators that launch nothing, besides views.
FREE = {
    *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"),
    *("lift_fresh", "_unsafe_view", "detach", "alias", "is_same_size"),
    *("device", "layout", "sym_size", "sym_numel", "sym_stride"),
}
# Of csrc/: parameters per launch, and launches besides.
PER_LAUNCH = 46
COMPILED = {"adamw_ema_": 1, "gradient_norm": 1}
OF_PYTORCH = ("linear_gelu",)  # calls operators of PyTorch


@dataclass(frozen=True)
class Launch:
    """One kernel, or one operator of PyTorch, which may be several kernels.

    Attributes:
        phase: innermost `record_function` of the step, such as "student" or "backward".
        kind: "product", "attention", "inductor" (generated), "ours" (kernels/ and csrc/) or "operator".
        compiled: whether a compiled graph launched it.
        bytes: of its inputs and outputs, each once.
        flops: of products and attention.
        is_mixed: whether it has tensors of CPU and GPU.
    """

    phase: str
    kind: str
    name: str
    shape: str
    compiled: bool
    bytes: float
    flops: float = 0.0
    is_mixed: bool = False


class _Generated:
    """Stands for a Triton kernel in generated code."""

    def __init__(self, recorder: Recorder, name: str, source: str) -> None:
        self._recorder, self._name = recorder, name
        self._tuner = getattr(PyCodeCache.load(source), name)
        inputs = V.graph.graph_inputs.values()
        is_dynamic = any(not hasattr(value, "get_size") for value in inputs)  # sizes are inputs: bytes are a guess
        gigabytes = self._tuner.inductor_meta.get("kernel_num_gb")
        self._bytes = None if is_dynamic or gigabytes is None else 1e9 * gigabytes

    def run(self, *arguments: Any, **_: Any) -> None:
        names = self._tuner.triton_meta["signature"]
        tensors = [(name, a) for name, a in zip(names, arguments, strict=False) if isinstance(a, Tensor)]
        spans = sum(a.nbytes * (2 if name.startswith("in_out") else 1) for name, a in tensors)
        shape = "x".join(map(str, tensors[-1][1].shape)) if tensors else ""
        self._recorder.add("inductor", self._name, shape, spans if self._bytes is None else self._bytes)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tuner, name)


class Recorder:
    """Notes launches while it is `active`."""

    def __init__(self) -> None:
        self.launches: list[Launch] = []
        self._phases, self._compiled, self._is_on = ["step"], 0, False
        self._nested = threading.local()

    def add(self, kind: str, name: str, shape: str, size: float, flops: float = 0.0, is_mixed: bool = False) -> None:
        if self._is_on:
            launch = Launch(self._phases[-1], kind, name, shape, self._compiled > 0, size, flops, is_mixed)
            self.launches.append(launch)

    @contextmanager
    def active(self) -> Iterator[None]:
        """Note what is launched in this block."""
        self._is_on = True
        try:
            yield
        finally:
            self._is_on = False

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Stand where launches are made; compile in this block too."""
        dispatch, call = FakeTensorMode.dispatch, CompiledFxGraph.__call__
        enter, leave = record_function.__enter__, record_function.__exit__
        recorder = self

        def generated(_: Any, name: str, source: str, device_str: str = "cuda") -> _Generated:
            return _Generated(recorder, name, source)

        def noting(mode: Any, function: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
            return recorder._note(dispatch, mode, function, types, arguments, named or {})

        def called(graph: Any, inputs: Any) -> Any:
            recorder._compiled += 1
            try:
                return call(graph, inputs)
            finally:
                recorder._compiled -= 1

        def entered(self: record_function) -> record_function:
            recorder._phases.append(self.name.removeprefix(PREFIX))
            return enter(self)

        def left(self: record_function, *error: Any) -> None:
            recorder._phases.pop()
            leave(self, *error)

        with (
            patch.object(AsyncCompile, "triton", generated),
            patch.object(FakeTensorMode, "dispatch", noting),
            patch.object(CompiledFxGraph, "__call__", called),
            patch.object(record_function, "__enter__", entered),
            patch.object(record_function, "__exit__", left),
        ):
            yield

    def _note(self, dispatch: Any, mode: Any, function: Any, types: Any, arguments: Any, named: Any) -> Any:
        is_outer = not getattr(self._nested, "depth", 0)
        self._nested.depth = getattr(self._nested, "depth", 0) + 1
        try:
            result = dispatch(mode, function, types, arguments, named)
        finally:
            self._nested.depth -= 1
        if self._is_on and is_outer and isinstance(function, torch._ops.OpOverload):
            self._note_operator(mode, function, arguments, named, result)
        return result

    def _note_operator(self, mode: Any, function: Any, arguments: Any, named: Any, result: Any) -> None:
        name = function._opname
        tensors = [leaf for leaf in tree_leaves((arguments, named, result)) if isinstance(leaf, Tensor)]
        devices = {tensor.device.type for tensor in tensors}
        if "cuda" not in devices or function.is_view or name in FREE:
            return
        if function.namespace == "sra_fast":
            self._note_ours(mode, function, arguments, named)
            return
        distinct = {id(tensor): tensor.nbytes for tensor in tensors}
        size = sum(distinct.values())
        if function._schema.is_mutable and "out" not in named:  # written in place: read before
            size += sum(tensor.nbytes for tensor in tree_leaves(arguments[0]) if isinstance(tensor, Tensor))
        count = flop_registry.get(function._overloadpacket)
        if name == "_addmm_activation":
            count = flop_registry[torch.ops.aten.addmm]
        flops = count(*arguments, **named, out_val=result) if count else 0.0
        kind = "attention" if "attention" in name else "product" if flops else "operator"
        shape = ", ".join("x".join(map(str, tensor.shape)) for tensor in tensors[: 3 if flops else 1])
        self.add(kind, name, shape, size, flops, len(devices) > 1)

    def _note_ours(self, mode: Any, function: Any, arguments: Any, named: Any) -> None:
        """The launches of an operator of this project: its launcher runs, with a kernel that notes its arguments."""
        name, recorder = function._opname, self
        if name in OF_PYTORCH:
            with mode:
                OPDEFS[f"{PREFIX}{name}"]._init_fn(*arguments, **named)
            return
        if name in COMPILED:
            lists = [part for part in arguments if isinstance(part, list) and part and isinstance(part[0], Tensor)]
            parameters = max(map(len, lists))
            launches = ceil(parameters / PER_LAUNCH) + COMPILED[name]
            # The update reads and writes all lists but two: gradients are read, copies are written.
            once = {id(tensor) for part in (lists[0], *lists[5:]) for tensor in part} if len(lists) > 1 else set()
            size = sum(t.nbytes * (1 if not once or id(t) in once else 2) for part in lists for t in part)
            for _ in range(launches):
                self.add("ours", name, f"{parameters} parameters", size / launches)
            return

        def run(kernel: Any, *values: Any, **options: Any) -> None:
            sizes = [value.nbytes for value in (*values, *options.values()) if isinstance(value, Tensor)]
            shape = next("x".join(map(str, value.shape)) for value in values if isinstance(value, Tensor))
            recorder.add("ours", kernel.fn.__name__, shape, sum(sizes))

        self._nested.depth = 1  # what the launcher allocates is no launch
        try:
            with mode, patch.object(JITFunction, "run", run):
                OPDEFS[f"{PREFIX}{name}"]._init_fn(*arguments, **named)
        finally:
            self._nested.depth = 0
