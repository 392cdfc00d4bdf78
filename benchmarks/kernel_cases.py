"""What bench_kernels.py times: each op with inputs as the model makes them, its implementations, its bytes and FLOPs.

B images of T tokens of width D; e bytes per element. Bytes count each input and each output of a pass once, and no
intermediate: what a perfect kernel would move. A backward pass reads the gradients of the outputs and the inputs that
its formula needs, and writes the gradients of the inputs.
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
from sra_fast.kernels import IMPLEMENTATIONS
from sra_fast.kernels.perturb import Settings, Stored
from sra_fast.model.attention import attention, available

TOKENS = 256
COMPILED = "compiled"  # torch.compile of the reference: the rival that a fused kernel has to beat
REFERENCE = {"attention": "math"}  # by op; "eager" for the others
# Of values that are not compared in fp64: words are equal in every bit, but logarithm and cosine differ between
# libraries by a few units in the last place.
ULPS = 16


@dataclass(frozen=True)
class Case:
    """One op at one shape.

    Attributes:
        op, width: op and width D.
        inputs: as they are passed.
        learns: which inputs have a gradient; none: there is no backward pass.
        implementations: name -> function of the inputs that returns a tensor or several.
        forward_bytes, backward_bytes, forward_flops: of a pass, see above; FLOPs are 2 per multiply-add, and a backward
            pass has twice those of a forward one, recomputation left out.
        in_fp64: whether the reference in fp64 is the truth; else the reference as it is.
        another_function: implementations that compute something else from the same inputs, moving the same bytes, and
            the reference of that.
    """

    op: str
    width: int
    inputs: tuple[Tensor, ...]
    learns: tuple[bool, ...]
    implementations: dict[str, Callable[..., Tensor | tuple[Tensor, ...]]]
    forward_bytes: int
    backward_bytes: int = 0
    forward_flops: int = 0
    in_fp64: bool = True
    another_function: dict[str, Callable[..., Tensor]] = field(default_factory=dict)

    @property
    def reference(self) -> str:
        """Name of the implementation that says what is right."""
        return REFERENCE.get(self.op, "eager")

    def reference_of(self, name: str) -> Callable[..., Tensor | tuple[Tensor, ...]]:
        """What says what is right of an implementation."""
        return self.another_function.get(name) or self.implementations[self.reference]

    @property
    def passes(self) -> tuple[str, ...]:
        """What is timed."""
        return ("forward", "forward+backward") if any(self.learns) else ("forward",)

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
        names: of implementations to keep, with the reference; None = all.

    Returns:
        The case with "eager", "compiled" and, where there is one and a GPU, "fused" and rivals that are installed; of
        attention, with every backend that this device has for the shape.
    """
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        # Random numbers, not zeros, which draw less power and run faster than any real data will.
        return torch.randn(shape, generator=generator).to(device, dtype)

    case = _MAKERS[op](preset(f"sit-{size}-2"), batch, normal)
    kept = dict(case.implementations)
    fused = IMPLEMENTATIONS.get(op, {}).get("fused")
    if device.type != "cuda" and getattr(fused, "__module__", "").startswith("sra_fast.kernels"):
        kept.pop("fused")  # a Triton kernel
    if names is not None:
        kept = {name: call for name, call in kept.items() if name in (*names, case.reference)}
    return replace(case, implementations=kept)


def _ours(op: str, bind: Callable[[Callable], Callable] = lambda function: function) -> dict[str, Callable]:
    """eager, compiled and fused; `bind` adds the arguments that are no tensors."""
    found = IMPLEMENTATIONS[op]
    reference = bind(found["reference"])
    fused = {name: bind(function) for name, function in found.items() if name != "reference"}
    return {"eager": reference, COMPILED: torch.compile(reference, dynamic=False), **fused}


def _adaln(config: Config, batch: int, normal: Callable[..., Tensor]) -> Case:
    width = config.model.hidden
    x = normal(batch, TOKENS, width)
    shift, scale = normal(batch, 6 * width).chunk(6, dim=-1)[:2]  # views of the modulation, as in a block
    rows, vectors = x.nbytes, shift.numel() * x.element_size()
    return Case(
        "adaln",
        width,
        (x, shift, scale),
        (True, True, True),
        {**_ours("adaln"), **rivals(x.device)},
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
        width,
        (x, branch, gate, shift, scale),
        (True,) * 5,
        _ours("gated_adaln"),
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
        width,
        (x, branch, gate),
        (True,) * 3,
        _ours("gated_residual"),
        forward_bytes=3 * rows + vectors,  # read x, branch, gate; write x'
        backward_bytes=3 * rows + 2 * vectors,  # read dx', branch, gate; write dbranch, dgate; dx is dx' itself
    )


def _alignment(config: Config, batch: int, normal: Callable[..., Tensor]) -> Case:
    width = config.model.hidden
    student = normal(batch, TOKENS, width)
    teacher = student + normal(batch, TOKENS, width)
    return Case(
        "alignment",
        width,
        (student, teacher),
        (True, False),
        _ours("alignment", lambda function: lambda s, t: function(s, t, "cosine")),
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
    return Case(
        "perturb",
        config.model.hidden,
        (moments, labels, number),
        (False,) * 3,
        _ours("perturb", lambda function: lambda *batch: tuple(function(*batch, settings, stored))),
        # read the moments; write x_t, the teacher's and the target; read labels and numbers (int64), write both times
        # (float32) and the labels
        forward_bytes=moments.nbytes + 3 * x.nbytes + batch * (2 * 8 + 2 * 4 + 8),
        in_fp64=False,
    )


def _attention(config: Config, batch: int, normal: Callable[..., Tensor]) -> Case:
    width, heads = config.model.hidden, config.model.heads
    qkv = normal(batch, TOKENS, 3, heads, width // heads)
    backends = available(qkv.device, qkv.dtype, width // heads)
    rows = qkv.nbytes // 3
    return Case(
        "attention",
        width,
        (qkv,),
        (True,),
        {name: lambda qkv, name=name: attention(qkv, name) for name in backends},
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
    """One pass of one implementation over the case's inputs: a call that returns the outputs, and with a backward pass
    the gradients after them. Gradients of the outputs are fixed random numbers."""
    return _prepared(case, case.implementations[name], which)


def _prepared(case: Case, function: Callable[..., Tensor | tuple[Tensor, ...]], which: str) -> Callable[[], list]:
    if which == "forward":

        def forward() -> list[Tensor]:
            with torch.no_grad():
                return _listed(function(*case.inputs))

        return forward
    leaves = [x.detach().requires_grad_(learns) for x, learns in zip(case.inputs, case.learns, strict=True)]
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    above = upstream(case)

    def both() -> list[Tensor]:
        outputs = _listed(function(*leaves))
        return [out.detach() for out in outputs] + list(torch.autograd.grad(outputs, wanted, above))

    return both


def upstream(case: Case) -> list[Tensor]:
    """Gradients of the outputs."""
    with torch.no_grad():
        outputs = _listed(case.implementations[case.reference](*case.inputs))
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(out.shape, generator=generator).to(out) for out in outputs]


def _listed(outputs: Tensor | Sequence[Tensor]) -> list[Tensor]:
    return [outputs] if isinstance(outputs, Tensor) else list(outputs)


def truth(case: Case, which: str, name: str = "") -> list[Tensor]:
    """What is right, of an implementation that computes another function too: the reference in fp64 on the same inputs
    and output gradients, or as it is."""
    function = case.reference_of(name)
    if not case.in_fp64:
        return _prepared(case, function, which)()
    leaves = [x.detach().double().requires_grad_(learns) for x, learns in zip(case.inputs, case.learns, strict=True)]
    outputs = _listed(function(*leaves))
    right = [out.detach() for out in outputs]
    if which == "forward":
        return right
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    return right + list(torch.autograd.grad(outputs, wanted, [above.double() for above in upstream(case)]))


def check(case: Case, name: str, which: str, right: list[Tensor]) -> None:
    """Compare an implementation with the truth.

    Its largest error may be twice the reference's own at the same dtype, as another order of additions makes it, plus a
    floor, because the reference may hit the truth by luck: one unit in the last place of the largest value, and of a
    sum of n terms sqrt(n) such units of fp32, in which sums are taken. Integers are equal.

    Raises:
        GateFailed: naming the result that is off.
    """
    got, usual = prepared(case, name, which)(), _prepared(case, case.reference_of(name), which)()
    for place, (value, own, best) in enumerate(zip(got, usual, right, strict=True)):
        if value.shape != best.shape or value.dtype != own.dtype:
            raise GateFailed(f"{case.op} {name}, {which}, result {place}: {value.shape} {value.dtype} made")
        error = _largest(value.double() - best)
        allowed = 0.0
        if own.is_floating_point():
            terms = max(x.numel() for x in case.inputs) / max(1, best.numel())
            units = torch.finfo(own.dtype).eps * (1 if case.in_fp64 else ULPS)
            units += torch.finfo(torch.float32).eps * math.sqrt(terms) if terms > 1 else 0
            allowed = 2 * _largest(own.double() - best) + units * _largest(best)
        if not error <= allowed:  # also of NaN
            raise GateFailed(f"{case.op} {name}, {which}, result {place}: error {error:.3g}, allowed {allowed:.3g}")


def _largest(x: Tensor) -> float:
    return float(x.abs().max()) if x.numel() else 0.0
