"""Each op of a training step with inputs as a run has them, its implementations, its bytes and FLOPs, and the check
that an implementation agrees with the reference.

B images of T tokens of width D. Bytes count each input and each output of a pass once and no intermediate: what a
perfect kernel would move. A backward pass reads the gradients of the outputs and the inputs that its formula needs, and
writes the gradients of the inputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sra_fast.config import Config
from sra_fast.kernels import registry
from sra_fast.kernels.adamw_ema import Lists, Scalars, adamw_ema_ref, parameter_ref
from sra_fast.kernels.perturb import Stored
from sra_fast.model.attention import attention, available
from sra_fast.model.backends import REFERENCE
from sra_fast.model.transformer import Transformer
from sra_fast.step.step import TrainingStep
from sra_fast.tuning.timing import GateFailed

MAX_PARAMETERS = 2**26  # 2.4 GB of an update, more than any cache
# Without a reference in fp64: random words agree in every bit, but logarithm and cosine differ between libraries by a
# few units in the last place.
ULPS = 16
# Rows (B, T, D) among the inputs, which of the six modulation vectors of a block, and the rows and vectors of every
# sample that the forward and the backward pass move; a gated op also reads the branch's bias (D,), and in the backward
# pass reads it and writes its gradient.
NORMS = {
    # read x, shift, scale; write h. Backward: read x, dh, scale; write dx, dshift, dscale
    "adaln": (1, slice(0, 2), (2, 2), (3, 3)),
    # read x, branch, gate, shift, scale; write x', h. Backward: read x', branch, dx', dh, gate, scale; write dx,
    # dbranch, dgate, dshift, dscale
    "gated_adaln": (2, slice(2, 5), (4, 3), (6, 5)),
    # read x, branch, gate; write x'. Backward: read dx', branch, gate; write dbranch, dgate; dx is dx' itself
    "gated_residual": (2, slice(5, 6), (3, 1), (3, 2)),
}
UPDATES = ("gradient_norm", "adamw_ema")
OPS = (*NORMS, "linear_gelu", "alignment", "perturb", "attention")

Function = Callable[..., Any]


@dataclass(frozen=True)
class Case:
    """One op at one shape."""

    op: str
    inputs: tuple[Tensor, ...]
    differentiable: tuple[bool, ...]  # which inputs have a gradient; if none has, there is no backward pass
    implementations: dict[str, Function]  # functions of the inputs that return one tensor or several
    forward_bytes: int
    backward_bytes: int = 0
    forward_flops: int = 0  # 2 per multiply-add; the backward pass has twice as many, without recomputation
    reference: str = "eager"  # the implementation that the others must agree with
    in_fp64: bool = True  # compare with the reference in fp64; otherwise with the reference in the case's dtype
    in_place: bool = False  # whether an implementation changes its inputs

    @property
    def passes(self) -> tuple[str, ...]:
        """The passes to time."""
        return ("forward", "forward+backward") if any(self.differentiable) else ("forward",)

    def bytes(self, which: str) -> int:
        """Bytes of one of `passes`."""
        return self.forward_bytes + (self.backward_bytes if which != "forward" else 0)

    def flops(self, which: str) -> int:
        """FLOPs of one of `passes`."""
        return self.forward_flops * (1 if which == "forward" else 3)


def make_case(
    op: str,
    config: Config,
    device: torch.device,
    dtype: torch.dtype,
    stored: Stored | None = None,
    names: Sequence[str] | None = None,
) -> Case:
    """One of `OPS` or `UPDATES` at the shape it has in a run: eager, compiled and, where it can run, fused; for
    attention, every backend that supports the shape on this device.

    Args:
        config: of the run, with the model's sizes filled in. The shapes are those of one micro-batch.
        device, dtype: of the networks.
        stored: what perturb computes x from; None = x itself. It draws in fp32 whatever the dtype.
        names: the implementations to keep besides the reference; None = all.
    """
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        # Random numbers: zeros draw less power and run faster than real data.
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    if op in NORMS:
        case = _norm(op, config, normal)
    elif op in UPDATES:
        case = _update(op, config, device, dtype)
    elif op == "perturb":
        case = _perturb(config, normal, stored)
    else:
        make = {"linear_gelu": _linear_gelu, "alignment": _alignment, "attention": _attention}[op]
        case = make(config, normal)
    kept = case.implementations if names is None else (*names, case.reference)
    return replace(case, implementations={name: call for name, call in case.implementations.items() if name in kept})


def _images(config: Config) -> int:
    return config.train.batch // config.train.micro_batches


def _implementations(
    op: str, device: torch.device, bind: Callable[[Function], Function] = lambda function: function
) -> dict[str, Function]:
    """`bind` adds the arguments that are no tensors."""
    reference, fused, of = registry.OPS[op]
    functions = {"eager": bind(reference), "compiled": torch.compile(bind(reference), dynamic=False)}
    needs_gpu = of != "library" and getattr(fused, "__module__", "").startswith("sra_fast.kernels")
    if fused and (device.type == "cuda" or not needs_gpu):
        functions["fused"] = bind(fused)
    return functions


def _norm(op: str, config: Config, normal: Callable[..., Tensor]) -> Case:
    width, images = config.model.hidden, _images(config)
    row_inputs, which, forward, backward = NORMS[op]
    rows = [normal(images, config.model.tokens, width) for _ in range(row_inputs)]
    biases = [normal(width)] * (row_inputs - 1)
    modulation = normal(images, 6, width)[:, which]  # a view, as in a block
    row_bytes, vector_bytes = rows[0].nbytes, images * width * rows[0].element_size()
    bias_bytes = sum(bias.nbytes for bias in biases)
    inputs = (*rows, *biases, modulation)
    return Case(
        op,
        inputs,
        (True,) * len(inputs),
        _implementations(op, rows[0].device),
        forward_bytes=forward[0] * row_bytes + forward[1] * vector_bytes + bias_bytes,
        backward_bytes=backward[0] * row_bytes + backward[1] * vector_bytes + 2 * bias_bytes,
    )


def _linear_gelu(config: Config, normal: Callable[..., Tensor]) -> Case:
    width, images = config.model.hidden, _images(config)
    x, weight = normal(images, config.model.tokens, width), normal(config.model.mlp_ratio * width, width) / width**0.5
    inputs = (x, weight, normal(len(weight)))
    return Case(
        "linear_gelu",
        inputs,
        (False,) * 3,
        _implementations("linear_gelu", x.device),
        # read all, write (B, T, H)
        forward_bytes=sum(tensor.nbytes for tensor in inputs) + x.nbytes * config.model.mlp_ratio,
        forward_flops=2 * x.numel() * len(weight),
    )


def _alignment(config: Config, normal: Callable[..., Tensor]) -> Case:
    shape, distance = (_images(config), config.model.tokens, config.model.hidden), config.align.distance
    student = normal(*shape)
    teacher = student + normal(*shape)
    return Case(
        "alignment",
        (student, teacher),
        (True, False),
        _implementations("alignment", student.device, lambda function: lambda s, t: function(s, t, distance)),
        forward_bytes=2 * student.nbytes + 4,  # read student, teacher; write one float32
        backward_bytes=3 * student.nbytes + 4,  # read both again and the loss's gradient; write the student's
    )


def _perturb(config: Config, normal: Callable[..., Tensor], stored: Stored | None) -> Case:
    side, images = config.model.input_size, _images(config)
    x = normal(images, config.model.channels, side, side).float()
    labels, number = (torch.arange(images, device=x.device) for _ in range(2))
    settings = TrainingStep(config, REFERENCE, x.device).settings
    data = x if stored is None else x.half()
    if stored and stored.posterior:
        data = torch.cat([x, x.abs()], dim=1).half()

    def bind(function: Function) -> Function:
        return lambda *batch: tuple(function(*batch, settings, stored))[:7]  # the last field of NoisedBatch is DiT's

    return Case(
        "perturb",
        (data, labels % config.model.classes, number),
        (False,) * 3,
        _implementations("perturb", x.device, bind),
        # read the data; write x_t, x_teacher and the target; read labels and numbers (int64), write both times
        # (float32) and the labels
        forward_bytes=data.nbytes + 3 * x.nbytes + images * (2 * 8 + 2 * 4 + 8),
        in_fp64=False,
    )


def _attention(config: Config, normal: Callable[..., Tensor]) -> Case:
    width, heads, tokens, images = config.model.hidden, config.model.heads, config.model.tokens, _images(config)
    qkv = normal(images, tokens, 3, heads, width // heads)
    backends = available(qkv.device, qkv.dtype, width // heads)
    return Case(
        "attention",
        (qkv,),
        (True,),
        {name: lambda qkv, name=name: attention(qkv, name) for name in backends},
        forward_bytes=4 * qkv.nbytes // 3,  # read q, k, v; write the output
        backward_bytes=7 * qkv.nbytes // 3,  # read q, k, v and the output's gradient; write those of q, k, v
        forward_flops=2 * 2 * images * tokens * tokens * width,  # q k^T, and its softmax times v, over all heads
        reference="math",
    )


def _update(op: str, config: Config, device: torch.device, dtype: torch.dtype) -> Case:
    """The update of the first parameters of a model, up to `MAX_PARAMETERS`: the time of each is the same."""
    with torch.device("meta"):
        model = Transformer(config.model)
    shapes, count = [], 0
    for shape in (parameter.shape for parameter in model.parameters()):
        if count + shape.numel() <= MAX_PARAMETERS:
            shapes.append(shape)
            count += shape.numel()
    generator = torch.Generator(device).manual_seed(0)
    compute = dtype if config.train.micro_batches == 1 else torch.float32
    weights = [torch.randn(shape, generator=generator, device=device) for shape in shapes]
    gradients = [(0.01 * weight).to(compute) for weight in weights]
    if op == "gradient_norm":
        size = sum(gradient.nbytes for gradient in gradients)
        functions = _implementations(op, device, lambda function: lambda *tensors: function(list(tensors)))
        return Case(op, tuple(gradients), (False,) * len(shapes), functions, forward_bytes=size + 4, in_fp64=False)
    copies = weights[:0] if dtype == torch.float32 else weights  # fp32 networks share the tensors
    lists = Lists(
        gradients,
        weights,
        m=[0.01 * weight**2 for weight in weights],
        v=[0.0001 * weight**2 for weight in weights],
        ema=[weight.clone() for weight in weights],
        student=[weight.to(dtype) for weight in copies],
        teacher=[weight.to(dtype) for weight in copies],
    )
    one, count = (torch.ones((), dtype=kind, device=device) for kind in (torch.float32, torch.int64))
    scalars = Scalars(
        one, count, count.clone(), lr=1e-4 * one, ema_decay=0.999 * one, clip=one.clone(), loss_scale=one.clone()
    )
    sizes, optim = [len(part) for part in lists], config.optim

    def bind(function: Function) -> Function:
        def call(*tensors: Tensor) -> tuple[Tensor, ...]:
            rest = iter(tensors)
            parts = [[next(rest) for _ in range(size)] for size in sizes]
            function(
                Lists(*parts),
                Scalars(*rest),  # pyright: ignore[reportCallIssue]: seven tensors are left
                betas=(optim.beta1, optim.beta2),
                eps=optim.eps,
                weight_decay=(optim.weight_decay, 0.0),
                group=[int(len(shape) < 2) for shape in shapes],
            )
            return tensors

        return call

    functions = _implementations(op, device, bind)
    parameter = torch.compile(parameter_ref, fullgraph=True, dynamic=True)  # as TrainingStep.compile does
    functions["compiled"] = bind(partial(adamw_ema_ref, parameter=parameter))
    tensors = [tensor for part in lists for tensor in part]
    return Case(
        op,
        (*tensors, *scalars),
        (False,) * (len(tensors) + len(scalars)),
        functions,
        # read all but the copies, write all but the gradients
        forward_bytes=2 * sum(tensor.nbytes for tensor in tensors)
        - sum(tensor.nbytes for part in (lists.gradients, lists.student, lists.teacher) for tensor in part),
        in_fp64=False,
        in_place=True,
    )


def prepared(case: Case, name: str, which: str, dtype: torch.dtype | None = None) -> Callable[[], list[Tensor]]:
    """A call of one pass of an implementation over the case's inputs, as `dtype` if given. It returns the outputs, and
    the gradients after a backward pass from fixed random ones."""
    backward = which != "forward"
    inputs = [x.detach().to(dtype) if dtype else x.detach() for x in case.inputs]
    if case.in_place:
        inputs = [x.clone() for x in inputs]
    for x, differentiable in zip(inputs, case.differentiable, strict=True):
        x.requires_grad_(backward and differentiable)
    leaves = [x for x in inputs if x.requires_grad]
    grad_out = [gradient.to(dtype) if dtype else gradient for gradient in output_gradients(case)] if backward else []

    def call() -> list[Tensor]:
        with torch.set_grad_enabled(backward):
            outputs = case.implementations[name](*inputs)
        outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
        gradients = torch.autograd.grad(outputs, leaves, grad_out) if backward else []
        return [*(out.detach() for out in outputs), *gradients]

    return call


def output_gradients(case: Case) -> list[Tensor]:
    """Random gradients of the outputs, the same in every call."""
    outputs = prepared(case, case.reference, "forward")()
    generator = torch.Generator(outputs[0].device).manual_seed(1)
    return [torch.randn(out.shape, generator=generator, device=out.device).to(out) for out in outputs]


def truth(case: Case, which: str) -> list[Tensor]:
    """The right results: the reference's, in fp64 if the case says so, for the same inputs and output gradients."""
    return prepared(case, case.reference, which, torch.float64 if case.in_fp64 else None)()


def check(case: Case, name: str, which: str, right: list[Tensor]) -> None:
    """Compare an implementation with the truth.

    Its largest error may be twice the reference's own at the same dtype, as another order of additions makes it, plus a
    floor, because the reference may hit the truth by luck: one unit in the last place of the largest value, and for a
    sum of n terms sqrt(n) such units of fp32, in which sums are taken. Integers must be equal.

    Raises:
        GateFailed: naming the result that is wrong.
    """
    results, reference = prepared(case, name, which)(), prepared(case, case.reference, which)()
    for index, (result, usual, best) in enumerate(zip(results, reference, right, strict=True)):
        label = f"{case.op} {name}, {which}, result {index}"
        if result.shape != best.shape or result.dtype != usual.dtype:
            raise GateFailed(
                f"{label}: {result.dtype} of shape {tuple(result.shape)} is not what the reference returns"
            )
        error = _largest(result.double() - best)
        allowed = 0.0
        if usual.is_floating_point():
            terms = max(x.numel() for x in case.inputs) / max(1, best.numel())
            units = torch.finfo(usual.dtype).eps * (1 if case.in_fp64 else ULPS)
            units += torch.finfo(torch.float32).eps * math.sqrt(terms) if terms > 1 else 0
            allowed = 2 * _largest(usual.double() - best) + units * _largest(best)
        if not error <= allowed:  # NaN fails too
            raise GateFailed(f"{label}: error {error:.3g}, allowed {allowed:.3g}")


def _largest(x: Tensor) -> float:
    return float(x.abs().max()) if x.numel() else 0.0
