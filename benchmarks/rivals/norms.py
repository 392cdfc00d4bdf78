"""The rival of our adaLN, timed if it is installed: cuDNN's own adaptive LayerNorm, of cuDNN 9.9 and later, through
nvidia-cudnn-frontend 1.12 and later.

Names and arguments as in the frontend's python/pygraph/norm.cpp, and as version 1.32 takes them; types and shapes as in
its C++ sample: scale and bias (B, 1, D) float32, statistics (B, T, 1). It multiplies by a scale where adaLN has 1 +
scale: computing that, in float32, is part of its time.

Liger has no rival: its only fused modulation (ops/modulated_rms_norm.py of 0.8.5) subtracts no mean.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

CUDNN = "cudnn"


def rivals(device: torch.device) -> dict[str, Callable[..., Tensor]]:
    """Rivals of adaln that are installed, as functions of (x, shift, scale); GPU only."""
    if device.type != "cuda":
        return {}
    try:
        import cudnn
    except (ImportError, OSError):  # not installed, or without the library that it wraps
        return {}
    norm = _CudnnNorm(cudnn)

    def adaln(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        gain, bias = (value[:, None].contiguous() for value in (1 + scale.float(), shift.float()))
        return _Cudnn.apply(norm, x, gain, bias)

    return {CUDNN: adaln}


class _Cudnn(torch.autograd.Function):
    """cuDNN's forward and backward pass under autograd."""

    @staticmethod
    def forward(ctx: Any, norm: _CudnnNorm, x: Tensor, gain: Tensor, bias: Tensor) -> Tensor:
        x = x.contiguous()
        y, mean, rstd = norm.forward(x, gain, bias)
        ctx.norm = norm
        ctx.save_for_backward(x, gain, mean, rstd)
        return y

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        return None, *ctx.norm.backward(grad_out.contiguous(), *ctx.saved_tensors)


class _CudnnNorm:
    """Execution plans, one for each shape, dtype and pass. `cudnn` is the module, `eps` is added to the variance."""

    def __init__(self, cudnn: Any, eps: float = 1e-6) -> None:
        self.cudnn = cudnn
        self.epsilon = torch.full((1, 1, 1), eps)  # on the host: passed by value
        self.handle: Any = None
        self._plans: dict[Any, Any] = {}

    def forward(self, x: Tensor, gain: Tensor, bias: Tensor) -> list[Tensor]:
        """[y, mean, 1 / standard deviation]: (B, T, D), 2 x (B, T, 1) float32."""
        outputs = [torch.empty_like(x), *(torch.empty((*x.shape[:2], 1), device=x.device) for _ in range(2))]
        inputs = {"input": x, "scale": gain, "bias": bias, "epsilon": self.epsilon}
        phase = self.cudnn.norm_forward_phase.TRAINING  # which returns the statistics
        return self._run("adalayernorm", inputs, outputs, norm_forward_phase=phase)

    def backward(self, grad_out: Tensor, x: Tensor, gain: Tensor, mean: Tensor, rstd: Tensor) -> list[Tensor]:
        """Gradients of [x, gain, bias]."""
        outputs = [torch.empty_like(tensor) for tensor in (x, gain, gain)]
        inputs = {"grad": grad_out, "input": x, "scale": gain, "mean": mean, "inv_variance": rstd}
        return self._run("adalayernorm_backward", inputs, outputs)

    def _run(self, node: str, inputs: dict[str, Tensor], outputs: list[Tensor], **options: Any) -> list[Tensor]:
        self.handle = self.handle or self.cudnn.create_handle()
        x = inputs["input"]
        key = (node, x.shape, x.dtype)
        if key not in self._plans:
            self._plans[key] = self._plan(node, inputs, outputs, options)
        graph, places, workspace = self._plans[key]
        self.cudnn.set_stream(handle=self.handle, stream=torch.cuda.current_stream().cuda_stream)
        tensors = dict(zip(places, (*inputs.values(), *outputs), strict=True))
        graph.execute(tensors, workspace, handle=self.handle)
        return outputs

    def _plan(
        self, node: str, inputs: dict[str, Tensor], outputs: list[Tensor], options: dict[str, Any]
    ) -> tuple[Any, list, Tensor]:
        """(graph, its tensors in the order of inputs and outputs, workspace)."""
        kinds = self.cudnn.data_type
        types = {torch.bfloat16: kinds.BFLOAT16, torch.float16: kinds.HALF, torch.float32: kinds.FLOAT}
        graph = self.cudnn.pygraph(
            io_data_type=types[inputs["input"].dtype],
            intermediate_data_type=kinds.FLOAT,
            compute_data_type=kinds.FLOAT,
            handle=self.handle,
        )
        arguments = {
            name: graph.tensor(
                name=name,
                dim=list(tensor.shape),
                stride=list(tensor.stride()),
                data_type=types[tensor.dtype],
                is_pass_by_value=tensor is self.epsilon,
            )
            for name, tensor in inputs.items()
        }
        results = list(getattr(graph, node)(**arguments, **options, name=node))
        for result, tensor in zip(results, outputs, strict=True):
            result.set_output(True).set_data_type(types[tensor.dtype])
        graph.validate()
        graph.build_operation_graph()
        graph.create_execution_plans([self.cudnn.heur_mode.A, self.cudnn.heur_mode.FALLBACK])
        graph.check_support()
        graph.build_plans()
        workspace = torch.empty(max(1, graph.get_workspace_size()), dtype=torch.uint8, device=inputs["input"].device)
        return graph, [*arguments.values(), *results], workspace
