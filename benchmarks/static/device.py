"""PyTorch's CPU build, told that there is one H200: steps compile for it and run on fake tensors. Nothing is computed.

It replaces private functions of one version of PyTorch, for the rest of the process: use a process of its own.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch._inductor.config as inductor
import torch._subclasses.fake_tensor as fake_tensor
import triton
from torch import Tensor
from torch._inductor.fx_passes.joint_graph import UniformValueConstantFolder
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.backends.compiler import GPUTarget
from triton.backends.driver import GPUDriver
from triton.backends.nvidia.driver import CudaDriver

from benchmarks.static.guard import CAPABILITY, H200
from sra_fast.kernels import library
from sra_fast.model import attention
from sra_fast.model.transformer import Transformer

DEVICE = torch.device("cuda", 0)


def pretend() -> FakeTensorMode:
    """Make this process believe in the GPU. Returns the mode in which tensors on `DEVICE` can be created.

    guard.py must have been imported first.
    """
    _answer_for_triton_and_the_library()
    _replace_what_needs_memory()
    inductor.force_disable_caches, inductor.compile_threads = True, 1
    warnings.filterwarnings("ignore", "dynamo_pgo force disabled")
    inductor.profile_bandwidth = True  # code generation then notes each kernel's bytes
    return FakeTensorMode(allow_non_fake_inputs=False)


def _answer_for_triton_and_the_library() -> None:
    library.has_gpu_code = lambda: True
    library.why_unavailable = lambda on_gpu=False: ""

    class Driver(CudaDriver):
        def __init__(self) -> None:
            GPUDriver.__init__(self)

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", 10 * CAPABILITY[0] + CAPABILITY[1], H200.warp_size)

        def get_active_torch_device(self) -> torch.device:
            return DEVICE

    triton.runtime.driver.set_active(Driver())


def _replace_what_needs_memory() -> None:
    fake_tensor.init_gpu_context = lambda _: None  # allocates a tensor
    FakeTensorMode.avoid_device_init = True  # pyright: ignore[reportAttributeAccessIssue]
    # Generated code calls these two past the dispatcher, where fake tensors live.
    guards: Any = torch._C._dynamo.guards  # pyright: ignore[reportAttributeAccessIssue]

    def empty_strided(size: Any, stride: Any, dtype: torch.dtype) -> Tensor:
        return torch.empty_strided(size, stride, dtype=dtype, device=DEVICE)

    def reinterpret(tensor: Tensor, size: Any, stride: Any, offset: int = 0) -> Tensor:
        return torch.as_strided(tensor, size, stride, tensor.storage_offset() + offset)

    guards._empty_strided_cuda, guards._reinterpret_tensor = empty_strided, reinterpret
    deduce = UniformValueConstantFolder._deduce_value

    def deduce_on_cpu(self: Any, node: Any) -> Any:
        """It evaluates an element of a constant tensor on the tensor's device."""
        before = node.kwargs
        if node.op == "call_function" and getattr(before.get("device"), "type", "") == "cuda":
            node.kwargs = {**before, "device": torch.device("cpu")}
        try:
            return deduce(self, node)
        finally:
            if node.kwargs is not before:
                node.kwargs = before

    UniformValueConstantFolder._deduce_value = deduce_on_cpu

    def to(self: Transformer, dtype: torch.dtype) -> Transformer:
        """Module.to swaps tensors of a subclass, which fake ones refuse."""
        for module in self.modules():
            for name, own in list(module._parameters.items()):
                if own is not None:
                    copy = torch.nn.Parameter(own.detach().to(dtype), requires_grad=own.requires_grad)
                    module._parameters[name] = copy
        return self

    Transformer.to = to  # pyright: ignore[reportAttributeAccessIssue]

    def cudnn(qkv: Tensor) -> Tensor:
        """PyTorch's choice of attention is made in C++ that a CPU build has not got: the operator by its name."""
        q, k, v = attention.split_heads(qkv)
        operator = torch.ops.aten._scaled_dot_product_cudnn_attention
        return operator(q, k, v, None, torch.is_grad_enabled(), 0.0, False, False)[0].transpose(1, 2).flatten(2)

    attention._BACKENDS["cudnn"] = cudnn
