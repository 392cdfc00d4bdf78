"""Other people's adaLN, for the rows beside ours where their packages are installed. Neither is needed otherwise.

cudnn         cuDNN's own adaptive LayerNorm, of cuDNN 9.9 and later, through nvidia-cudnn-frontend 1.12 and later.
              Names and arguments as in its python/pygraph/norm.cpp, and as version 1.32 takes them; types and shapes as
              in its C++ sample: scale and bias (B, 1, D) float32, statistics (B, T, 1). It multiplies by a scale where
              adaLN has 1 + scale: making that, in float32, is part of its time.
liger (RMS)   LigerModulatedRMSNormFunction of liger_kernel 0.8.5 (ops/modulated_rms_norm.py), the only fused modulation
              in Liger. It is not adaLN: no mean is subtracted. But a kernel for adaLN moves the same bytes. So it is
              held to a reference of its own, and is never called the fastest adaLN.

Liger's LayerNorm followed by PyTorch's modulation is left out: what is not fused is what "eager" shows. There is no
rival for alignment.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

CUDNN, LIGER = "cudnn", "liger (RMS)"
RIVALS = (CUDNN, LIGER)


def modulated_rms_ref(x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6) -> Tensor:
    """What Liger computes: x / sqrt(mean(x^2) + eps) * (1 + scale) + shift, mean over the last axis.

    Args:
        x: (B, T, D).
        shift, scale: (B, D).
    """
    compute = torch.promote_types(x.dtype, torch.float32)
    wide = x.to(compute)
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (normed * (1 + scale.to(compute)[:, None]) + shift.to(compute)[:, None]).to(x.dtype)


ANOTHER_FUNCTION: dict[str, Callable[..., Tensor]] = {LIGER: modulated_rms_ref}


def rivals(device: torch.device) -> dict[str, Callable[..., Tensor]]:
    """Rivals of adaln that are installed, as functions of (x, shift, scale); none but on a GPU."""
    found = {}
    for name, make in ((CUDNN, _cudnn_adaln), (LIGER, _liger_modulated)) if device.type == "cuda" else ():
        try:
            found[name] = make()
        except (ImportError, OSError):  # not installed, or not the library that it wraps
            continue
    return found


def _liger_modulated(eps: float = 1e-6) -> Callable[..., Tensor]:
    from liger_kernel.ops.modulated_rms_norm import LigerModulatedRMSNormFunction as Function

    # (X, W, scale, shift, eps, offset, casting_mode, in_place): no weight; everything in float32; and no gradient
    # written over that of the output, which here is the same tensor every time.
    return lambda x, shift, scale: Function.apply(x, None, scale, shift, eps, 0.0, "gemma", False)


def _cudnn_adaln(eps: float = 1e-6) -> Callable[..., Tensor]:
    import cudnn

    norm = _CudnnNorm(cudnn, eps)

    def adaln(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        gain, bias = ((value[:, None]).contiguous() for value in (1 + scale.float(), shift.float()))
        return _Cudnn.apply(norm, x, gain, bias)

    return adaln


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
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return None, *ctx.norm.backward(dy.contiguous(), *ctx.saved_tensors)


class _CudnnNorm:
    """Execution plans, one for each shape, dtype and pass.

    Args:
        cudnn: the module.
        eps: added to the variance.
    """

    def __init__(self, cudnn: Any, eps: float) -> None:
        self.cudnn = cudnn
        self.epsilon = torch.full((1, 1, 1), eps)  # on the host: passed by value
        self.handle: Any = None
        self._plans: dict[Any, Any] = {}

    def forward(self, x: Tensor, gain: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(y, mean, 1 / standard deviation): (B, T, D), 2 x (B, T, 1) float32."""
        statistic = (*x.shape[:2], 1)
        outputs = [torch.empty_like(x), *(torch.empty(statistic, device=x.device) for _ in range(2))]

        def build(graph: Any, x: Any, gain: Any, bias: Any, epsilon: Any) -> Any:
            phase = self.cudnn.norm_forward_phase.TRAINING  # which keeps the statistics, as ours always does
            return graph.adalayernorm(
                norm_forward_phase=phase, input=x, scale=gain, bias=bias, epsilon=epsilon, name="forward"
            )

        return tuple(self._run(build, {"x": x, "gain": gain, "bias": bias, "epsilon": self.epsilon}, outputs))

    def backward(self, dy: Tensor, x: Tensor, gain: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, ...]:
        """(dx, dgain, dbias): (B, T, D), 2 x (B, 1, D) float32."""
        outputs = [torch.empty_like(x), torch.empty_like(gain), torch.empty_like(gain)]

        def build(graph: Any, dy: Any, x: Any, gain: Any, mean: Any, rstd: Any) -> Any:
            return graph.adalayernorm_backward(
                grad=dy, input=x, scale=gain, mean=mean, inv_variance=rstd, name="backward"
            )

        return tuple(self._run(build, {"dy": dy, "x": x, "gain": gain, "mean": mean, "rstd": rstd}, outputs))

    def _run(self, build: Callable, inputs: dict[str, Tensor], outputs: list[Tensor]) -> list[Tensor]:
        """Write the outputs, on the current stream."""
        if self.handle is None:
            self.handle = self.cudnn.create_handle()
        x = inputs["x"]
        key = (tuple(inputs), x.shape, x.dtype)
        if key not in self._plans:
            self._plans[key] = self._planned(build, inputs, outputs)
        graph, places, workspace = self._plans[key]
        self.cudnn.set_stream(handle=self.handle, stream=torch.cuda.current_stream().cuda_stream)
        tensors = dict(zip(places, (*inputs.values(), *outputs), strict=True))
        graph.execute(tensors, workspace, handle=self.handle)
        return outputs

    def _planned(self, build: Callable, inputs: dict[str, Tensor], outputs: list[Tensor]) -> tuple[Any, list, Tensor]:
        """(graph, its tensors in the order of inputs and outputs, workspace)."""
        kinds = self.cudnn.data_type
        types = {torch.bfloat16: kinds.BFLOAT16, torch.float16: kinds.HALF, torch.float32: kinds.FLOAT}
        graph = self.cudnn.pygraph(
            io_data_type=types[inputs["x"].dtype],
            intermediate_data_type=kinds.FLOAT,
            compute_data_type=kinds.FLOAT,
            handle=self.handle,
        )
        given = [
            graph.tensor(
                name=name,
                dim=list(value.shape),
                stride=list(value.stride()),
                data_type=types[value.dtype],
                is_pass_by_value=value is self.epsilon,
            )
            for name, value in inputs.items()
        ]
        made = list(build(graph, *given))
        for place, value in zip(made, outputs, strict=True):
            place.set_output(True).set_data_type(types[value.dtype])
        graph.validate()
        graph.build_operation_graph()
        graph.create_execution_plans([self.cudnn.heur_mode.A, self.cudnn.heur_mode.FALLBACK])
        graph.check_support()
        graph.build_plans()
        size = max(1, graph.get_workspace_size())
        return graph, [*given, *made], torch.empty(size, dtype=torch.uint8, device=inputs["x"].device)
