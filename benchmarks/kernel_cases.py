"""What bench_kernels.py times: each op with inputs as the model makes them, its implementations, its bytes and FLOPs.

B images of T tokens of width D. Bytes count each input and each output of a pass once and no intermediate: what a
perfect kernel would move. A backward pass reads the gradients of the outputs and the inputs that its formula needs, and
writes the gradients of the inputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from benchmarks.harness.timing import GateFailed
from benchmarks.rivals.norms import ANOTHER_FUNCTION, rivals
from sra_fast.config import Config, preset
from sra_fast.kernels import registry
from sra_fast.kernels.perturb import Settings, Stored
from sra_fast.model.attention import attention, available

TOKENS = 256
COMPILED = "compiled"  # torch.compile of the reference: the rival that a fused kernel has to beat
REFERENCE = {"attention": "math"}  # by op; "eager" for the others
# Without a reference in fp64: random words agree in every bit, but logarithm and cosine differ between libraries by a
# few units in the last place.
ULPS = 16

Function = Callable[..., Tensor | tuple[Tensor, ...]]


@dataclass(frozen=True)
class Case:
    """One op at one shape.

    Attributes:
        op: its name.
        inputs: as they are passed.
        differentiable: which inputs have a gradient; if none has, there is no backward pass.
        implementations: name -> function of the inputs that returns one tensor or several.
        forward_bytes, backward_bytes: of each pass, see above.
        forward_flops: 2 per multiply-add; the backward pass has twice as many, without recomputation.
        in_fp64: whether the truth is the reference in fp64; else it is the reference as it stands.
        another_function: implementations that compute something else with the same memory traffic -> its reference.
    """

    op: str
    inputs: tuple[Tensor, ...]
    differentiable: tuple[bool, ...]
    implementations: dict[str, Function]
    forward_bytes: int
    backward_bytes: int = 0
    forward_flops: int = 0
    in_fp64: bool = True
    another_function: dict[str, Function] = field(default_factory=dict)

    @property
    def reference(self) -> str:
        """Name of the implementation that the others must agree with."""
        return REFERENCE.get(self.op, "eager")

    def reference_of(self, name: str) -> Function:
        """The function that an implementation must agree with."""
        return self.another_function.get(name) or self.implementations[self.reference]

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
    op: str, size: str, batch: int, device: torch.device, dtype: torch.dtype, names: Sequence[str] | None = None
) -> Case:
    """An op at the shape it has in a preset of that size on 256 tokens.

    Args:
        op: one of `OPS`.
        size: s, b, l or xl.
        batch: B.
        device, dtype: of the inputs; perturb draws in fp32 whatever the dtype.
        names: implementations to keep besides the reference; None = all.

    Returns:
        The case with "eager", "compiled" and, on a GPU, "fused" and the rivals that are installed; for attention, with
        every backend that this device has for the shape.
    """
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        # Random numbers: zeros draw less power and run faster than real data.
        return torch.randn(shape, generator=generator).to(device, dtype)

    case = _MAKERS[op](preset(f"sit-{size}-2"), batch, normal)
    kept = dict(case.implementations)
    fused = registry.OPS[op].fused if op in registry.OPS else None
    if device.type != "cuda" and getattr(fused, "__module__", "").startswith("sra_fast.kernels"):
        kept.pop("fused")  # a Triton kernel
    if names is not None:
        kept = {name: function for name, function in kept.items() if name in (*names, case.reference)}
    return replace(case, implementations=kept)


def _implementations(op: str, bind: Callable[[Function], Function] = lambda function: function) -> dict[str, Function]:
    """eager, compiled and, if there is a kernel, fused; `bind` adds the arguments that are no tensors."""
    reference, fused = registry.OPS[op][:2]
    functions = {"eager": bind(reference), COMPILED: torch.compile(bind(reference), dynamic=False)}
    return functions | ({"fused": bind(fused)} if fused else {})


def _adaln(config: Config, batch: int, normal: Callable[..., Tensor]) -> Case:
    width = config.model.hidden
    x = normal(batch, TOKENS, width)
    shift, scale = normal(batch, 6 * width).chunk(6, dim=-1)[:2]  # views of the modulation, as in a block
    rows, vectors = x.nbytes, shift.numel() * x.element_size()
    return Case(
        "adaln",
        (x, shift, scale),
        (True, True, True),
        {**_implementations("adaln"), **rivals(x.device)},
        forward_bytes=2 * rows + 2 * vectors,  # read x, shift, scale; write h
        backward_bytes=3 * rows + 3 * vectors,  # read x, dh, scale; write dx, dshift, dscale
        another_function=ANOTHER_FUNCTION,
    )


def _gated_adaln(config: Config, batch: int, normal: Callable[..., Tensor]) -> Case:
    width = config.model.hidden
    x, branch = normal(batch, TOKENS, width), normal(batch, TOKENS, width)
    gate, shift, scale = normal(batch, 6 * width).chunk(6, dim=-1)[2:5]
    rows, vectors = x.nbytes, gate.numel() * x.element_size()
    return Case(
        "gated_adaln",
        (x, branch, gate, shift, scale),
        (True,) * 5,
        _implementations("gated_adaln"),
        forward_bytes=4 * rows + 3 * vectors,  # read x, branch, gate, shift, scale; write x', h
        # read x', branch, dx', dh, gate, scale; write dx, dbranch, dgate, dshift, dscale
        backward_bytes=6 * rows + 5 * vectors,
    )


def _gated_residual(config: Config, batch: int, normal: Callable[..., Tensor]) -> Case:
    width = config.model.hidden
    x, branch = normal(batch, TOKENS, width), normal(batch, TOKENS, width)
    gate = normal(batch, 6 * width).chunk(6, dim=-1)[5]
    rows, vectors = x.nbytes, gate.numel() * x.element_size()
    return Case(
        "gated_residual",
        (x, branch, gate),
        (True,) * 3,
        _implementations("gated_residual"),
        forward_bytes=3 * rows + vectors,  # read x, branch, gate; write x'
        backward_bytes=3 * rows + 2 * vectors,  # read dx', branch, gate; write dbranch, dgate; dx is dx' itself
    )


def _alignment(config: Config, batch: int, normal: Callable[..., Tensor]) -> Case:
    student = normal(batch, TOKENS, config.model.hidden)
    teacher = student + normal(batch, TOKENS, config.model.hidden)
    return Case(
        "alignment",
        (student, teacher),
        (True, False),
        _implementations("alignment", lambda function: lambda s, t: function(s, t, "cosine")),
        forward_bytes=2 * student.nbytes + 4,  # read student, teacher; write one float32
        backward_bytes=3 * student.nbytes + 4,  # read both again and the loss's gradient; write the student's
    )


def _perturb(config: Config, batch: int, normal: Callable[..., Tensor]) -> Case:
    side = 2 * round(TOKENS**0.5)  # latents of 4 channels in patches of 2
    x = normal(batch, 4, side, side).float()
    labels, number = (torch.arange(batch, device=x.device) for _ in range(2))
    settings = Settings(
        seed=0,
        path=config.objective.path,
        times=config.objective.times,
        t_max=config.align.t_max,
        null_label=1000,
        label_dropout=config.objective.label_dropout,
        shared_label_dropout=config.align.shared_label_dropout,
    )
    stored = Stored(True, torch.zeros(4, device=x.device), torch.full((4,), 0.18215, device=x.device))
    moments = torch.cat([x, x.abs()], dim=1).half()

    def bind(function: Function) -> Function:
        # The last field of NoisedBatch is DiT's.
        return lambda *batch: tuple(function(*batch, settings, stored))[:7]

    return Case(
        "perturb",
        (moments, labels, number),
        (False,) * 3,
        _implementations("perturb", bind),
        # read the moments; write x_t, x_teacher and the target; read labels and numbers (int64); write both times
        # (float32) and the labels
        forward_bytes=moments.nbytes + 3 * x.nbytes + batch * (2 * 8 + 2 * 4 + 8),
        in_fp64=False,
    )


def _attention(config: Config, batch: int, normal: Callable[..., Tensor]) -> Case:
    width, heads = config.model.hidden, config.model.heads
    qkv = normal(batch, TOKENS, 3, heads, width // heads)
    rows = qkv.nbytes // 3
    return Case(
        "attention",
        (qkv,),
        (True,),
        {
            name: lambda qkv, name=name: attention(qkv, name)
            for name in available(qkv.device, qkv.dtype, width // heads)
        },
        forward_bytes=4 * rows,  # read q, k, v; write the output
        backward_bytes=7 * rows,  # read q, k, v and the output's gradient; write those of q, k, v
        forward_flops=2 * 2 * batch * TOKENS * TOKENS * width,  # q k^T, and its softmax times v, over all heads
    )


_MAKERS: dict[str, Callable[[Config, int, Callable[..., Tensor]], Case]] = {
    "adaln": _adaln,
    "gated_adaln": _gated_adaln,
    "gated_residual": _gated_residual,
    "alignment": _alignment,
    "perturb": _perturb,
    "attention": _attention,
}
OPS = tuple(_MAKERS)


def prepared(case: Case, name: str, which: str) -> Callable[[], list[Tensor]]:
    """A call of one pass of an implementation over the case's inputs, which returns the outputs followed by the
    gradients of a backward pass. Gradients of the outputs are fixed random numbers."""
    return _prepared(case, case.implementations[name], which)


def _prepared(case: Case, function: Function, which: str, dtype: torch.dtype | None = None) -> Callable[[], list]:
    """As `prepared`; with `dtype`, inputs are converted to it."""
    inputs = [x.detach().to(dtype) if dtype else x.detach() for x in case.inputs]
    if which == "forward":

        def forward() -> list[Tensor]:
            with torch.no_grad():
                return _as_list(function(*inputs))

        return forward
    leaves = [x.requires_grad_(wanted) for x, wanted in zip(inputs, case.differentiable, strict=True)]
    trained = [leaf for leaf in leaves if leaf.requires_grad]
    grad_out = [gradient.to(dtype) if dtype else gradient for gradient in output_gradients(case)]

    def forward_and_backward() -> list[Tensor]:
        outputs = _as_list(function(*leaves))
        return [out.detach() for out in outputs] + list(torch.autograd.grad(outputs, trained, grad_out))

    return forward_and_backward


def output_gradients(case: Case) -> list[Tensor]:
    """Random gradients of the outputs, the same in every call."""
    with torch.no_grad():
        outputs = _as_list(case.implementations[case.reference](*case.inputs))
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(out.shape, generator=generator).to(out) for out in outputs]


def _as_list(outputs: Tensor | Sequence[Tensor]) -> list[Tensor]:
    return [outputs] if isinstance(outputs, Tensor) else list(outputs)


def truth(case: Case, which: str, name: str = "") -> list[Tensor]:
    """The right results for an implementation: those of its reference, in fp64 if the case says so, for the same inputs
    and output gradients."""
    return _prepared(case, case.reference_of(name), which, torch.float64 if case.in_fp64 else None)()


def check(case: Case, name: str, which: str, right: list[Tensor]) -> None:
    """Compare an implementation with the truth.

    Its largest error may be twice the reference's own at the same dtype, as another order of additions makes it, plus a
    floor, because the reference may hit the truth by luck: one unit in the last place of the largest value, and for a
    sum of n terms sqrt(n) such units of fp32, in which sums are taken. Integers must be equal.

    Raises:
        GateFailed: naming the result that is wrong.
    """
    results, reference = prepared(case, name, which)(), _prepared(case, case.reference_of(name), which)()
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
