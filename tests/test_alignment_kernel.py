"""The alignment kernel against its reference in float64, in Triton's interpreter or on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any, NamedTuple
from unittest.mock import patch

import pytest
import torch
from kernel_checks import GUARD, broken, found_in_the_interpreter, poisoned, tell
from torch import Tensor

from sra_fast.kernels import alignment as ours
from sra_fast.kernels.alignment import DISTANCES, alignment_ref

EPS = torch.finfo(torch.float32).eps
HALF, BRAIN, FULL = torch.float16, torch.bfloat16, torch.float32


class Case(NamedTuple):
    shape: tuple[int, int, int]  # (B, T, D)
    student: torch.dtype = FULL
    teacher: torch.dtype = FULL
    layout: str = "contiguous"
    partials: int = 4096  # partial sums that are added at a time


# Primes, one sample, one token, one channel; widths of 16 and fewer tiles, and 1153 = 9 tiles and one channel. Tiles of
# tokens are 8 rows and more, so (2, 37, 29) is two programs with a tail, and channels there are two steps of 64 tokens.
CASES = (
    Case((1, 1, 1)),
    Case((1, 1, 384)),
    Case((7, 1, 13), layout="padded"),
    Case((1, 67, 1), layout="padded"),
    Case((2, 37, 29), layout="padded"),
    Case((3, 11, 72), BRAIN, BRAIN, "transposed", partials=2),
    Case((2, 35, 384), HALF, HALF, "padded", partials=4),
    Case((2, 5, 1152), BRAIN, BRAIN),
    Case((2, 5, 1152), BRAIN, FULL, "padded"),
    Case((2, 5, 1153), layout="transposed"),
    Case((2, 5, 1153), FULL, BRAIN, "padded"),
    Case((1, 3, 8192), HALF, BRAIN),
)


def laid_out(values: Tensor, layout: str) -> Tensor:
    """The values (B, T, D) with NaN all around them, and where they are padded between rows and samples too."""
    batch, tokens, width = values.shape
    token = width + (21 if layout == "padded" else 0)
    strides = ((tokens + (layout == "padded")) * token, token, 1)
    if layout == "transposed":
        strides = (token, batch * token, 1)
    room = (batch + 1) * (tokens + 1) * token
    flat = torch.full((room + 2 * GUARD,), torch.nan, dtype=values.dtype, device=values.device)
    return flat[GUARD:].as_strided(values.shape, strides, GUARD).copy_(values)


def inputs(case: Case, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """A student, and a teacher that resembles it: differences on both sides of beta = 0.05."""
    generator = torch.Generator().manual_seed(0)
    student, noise = torch.randn(2, *case.shape, generator=generator).to(device)
    teacher = (student + 0.2 * noise).to(case.teacher)
    return laid_out(student.to(case.student), case.layout), laid_out(teacher, case.layout)


def both(function: Callable[[Tensor, Tensor], Tensor], student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """(loss, the student's gradient) under a gradient of the loss of 2.5."""
    student = student.detach().requires_grad_()
    loss = function(student, teacher)
    return loss.detach(), torch.autograd.grad(2.5 * loss, student)[0]


def allowed(distance: str, case: Case, right: tuple[Tensor, Tensor], own: tuple[Tensor, Tensor]) -> tuple[float, float]:
    """Largest errors of (loss, gradient): twice PyTorch's own, as another order of additions makes it, and because it
    may hit the truth by luck: of the gradient one unit in the last place of its dtype, and eight roundings in float32
    of the largest values on the way. Those are 1 where a cosine is taken from it, and where a cosine's gradient is the
    difference of two terms, 2.5 / n * max |t / (S T)|, each of them."""
    (loss, gradient), dims = right, {"cosine": -1, "cosine_channel": -2}
    in_loss, in_gradient = abs(float(loss)), float(gradient.abs().max())
    unit = torch.finfo(own[1].dtype).eps * in_gradient
    if distance in dims:
        student, teacher = (x.double() for x in inputs(case, str(gradient.device)))
        n = student.numel() / student.shape[dims[distance]]
        norms = student.norm(dim=dims[distance], keepdim=True) * teacher.norm(dim=dims[distance], keepdim=True)
        in_loss, in_gradient = 1.0, 2.5 / n * float((teacher / norms).abs().max())
    floors = 8 * EPS * in_loss, 8 * EPS * in_gradient + unit
    errors = (float((mine.double() - best).abs().max()) for mine, best in zip(own, right, strict=True))
    return tuple(2 * error + floor for error, floor in zip(errors, floors, strict=True))


def compare(module: ModuleType, distance: str, cases: tuple[Case, ...] = CASES, device: str = "cpu") -> list[str]:
    """What is wrong with a kernel: empty if nothing."""
    wrong = []
    for case in cases:
        student, teacher = inputs(case, device)
        with poisoned() as whole, patch.object(module, "_PARTIALS", case.partials):
            got = both(partial(module.alignment, distance=distance), student, teacher)
            again = both(partial(module.alignment, distance=distance), student, teacher)
            if not whole():
                wrong.append(f"{case}: wrote outside its output")
        own = both(partial(alignment_ref, distance=distance), student, teacher)
        right = both(partial(alignment_ref, distance=distance), student.double(), teacher.double())
        for place, limit in enumerate(allowed(distance, case, right, own)):
            name = ("loss", "gradient")[place]
            if (got[place].dtype, got[place].shape) != (own[place].dtype, own[place].shape):
                wrong.append(f"{case}: {name} is {got[place].dtype} {tuple(got[place].shape)}")
            error = float((got[place].double() - right[place]).abs().max())
            if not error <= limit:  # also of NaN
                wrong.append(f"{case}: {name} is off by {error:.3g}, {limit:.3g} allowed")
            if not torch.equal(got[place], again[place]):
                wrong.append(f"{case}: {name} of two runs differs")
    return wrong


def clamped(distance: str, device: str = "cpu") -> list[str]:
    """Vectors of zeros and shorter than PyTorch's eps = 1e-8, and NaN: what PyTorch makes of them, in the loss and in
    each gradient."""
    wrong = []
    for scale in (0.0, 1e-12, 1e-9, 1e-7, torch.nan, torch.inf):
        for place in range(4):
            student, teacher = inputs(Case((2, 6, 5)), device)
            vector = (slice(None), slice(None), 2) if distance == "cosine_channel" else (slice(None), 2)
            for changed, bit in ((student, 1), (teacher, 2)):
                if place & bit:
                    changed[vector] *= scale
            got = both(partial(ours.alignment, distance=distance), student, teacher)
            own = both(partial(alignment_ref, distance=distance), student, teacher)
            for name, mine, theirs in zip(("loss", "gradient"), got, own, strict=True):
                if not torch.allclose(mine, theirs, rtol=1e-4, atol=1e-5, equal_nan=True):
                    wrong.append(f"vectors times {scale}, place {place}: {name} {mine}, PyTorch {theirs}")
    return wrong


def registered(distance: str) -> list[str]:
    """torch.library's own checks of both ops."""
    student, teacher = inputs(Case((2, 3, 5), layout="padded"))
    op = torch.ops.sra_fast
    torch.library.opcheck(op.alignment.default, (student.detach().requires_grad_(), teacher, distance))
    _, coefficients = op.alignment(student, teacher, distance)
    torch.library.opcheck(op.alignment_backward.default, (torch.tensor(2.5), student, teacher, coefficients, distance))
    return []


def traced(distance: str) -> list[str]:
    """Under torch.compile without a graph break, the same bits."""
    student, teacher = inputs(Case((2, 3, 5)))
    compiled = torch.compile(partial(ours.alignment, distance=distance), fullgraph=True, backend="aot_eager")
    plain = partial(ours.alignment, distance=distance)
    pairs = zip(both(compiled, student, teacher), both(plain, student, teacher), strict=True)
    return [] if all(torch.equal(*pair) for pair in pairs) else ["compiled, the result is another"]


def refused() -> list[str]:
    """Input that the kernel cannot serve, and what must be said of it."""
    x = torch.zeros(2, 3, 4)
    tries = {
        r"distance: 'cos' given; must be one of cosine, ": (x, x, "cos"),
        r"student: shape (3, 4) given; must be (B, T, D)": (x[0], x[0], "l1"),
        r"student: shape (2, 0, 4) given; must have an element": (x[:, :0], x[:, :0], "l1"),
        r"student: shape (1, 1, 8193) given": (torch.zeros(1, 1, 8193), torch.zeros(1, 1, 8193), "l1"),
        r"teacher: shape (2, 2, 4) given; must be (2, 3, 4), as student has it": (x, x[:, :2], "cosine"),
        r"student: dtype torch.float64 given; must be one of torch.float32, ": (x.double(), x, "l2"),
        r"teacher: dtype torch.int64 given": (x, x.long(), "l2"),
        r"teacher: strides (12, 1, 3) given; the last must be 1": (x, torch.zeros(2, 4, 3).mT, "cosine_channel"),
        r"teacher: device meta given": (x, x.to("meta"), "cosine"),
    }
    wrong = []
    for message, arguments in tries.items():
        try:
            ours._check(*arguments)
            wrong.append(f"not refused: {message}")
        except ValueError as error:
            if message not in str(error):
                wrong.append(f"{error}, not {message}")
    try:
        ours.alignment(x.double(), x, "l1")
        wrong.append("the op does not check")
    except ValueError:
        pass
    return wrong


class Fault(NamedTuple):
    """A change of one kernel's source."""

    distance: str
    function: str
    old: str
    new: str


SAMPLE = "sample, token = row // TOKENS", "sample, token = (row + 1) // TOKENS"
OF_PROGRAM = "(tl.program_id(0) // blocks)", "(tl.program_id(0) // blocks + 1)"
CHANNELS, ROWS = "there[:, None] & (column < WIDTH)", "there[:, None]"
LAST_TOKEN = "(token < TOKENS) & there[None, :]", "there[None, :]"
FAULTS = {
    "tokens forward, wrong axis": Fault(
        "cosine", "_tokens_forward", "tl.sum(s_square, axis=1)", "tl.sum(tl.sum(s_square, axis=1), axis=0)"
    ),
    "tokens forward, no tail": Fault("cosine", "_tokens_forward", CHANNELS, ROWS),
    "tokens forward, no last row": Fault("cosine", "_tokens_forward", "tl.where(there, distance, 0.0)", "distance"),
    "tokens forward, next sample": Fault("cosine", "_tokens_forward", *SAMPLE),
    "tokens backward, wrong axis": Fault(
        "cosine", "_tokens_backward", "coefficients + rows + row", "coefficients + row"
    ),
    "tokens backward, no tail": Fault("cosine", "_tokens_backward", CHANNELS, ROWS),
    "tokens backward, next sample": Fault("cosine", "_tokens_backward", *SAMPLE),
    "elements forward, wrong axis": Fault(
        "smooth_l1", "_tokens_forward", "distance = tl.sum(total, axis=1)", "distance = tl.max(total, axis=1)"
    ),
    "elements forward, no tail": Fault("smooth_l1", "_tokens_forward", CHANNELS, ROWS),
    "elements forward, next sample": Fault("l1", "_tokens_forward", *SAMPLE),
    "elements backward, no tail": Fault("l2", "_tokens_backward", CHANNELS, ROWS),
    "elements backward, next sample": Fault("l2", "_tokens_backward", *SAMPLE),
    "channels forward, wrong axis": Fault(
        "cosine_channel", "_channels_forward", "tl.sum(t_square, axis=0)", "tl.sum(tl.sum(t_square, axis=0), axis=0)"
    ),
    "channels forward, no last token": Fault("cosine_channel", "_channels_forward", *LAST_TOKEN),
    "channels forward, no tail": Fault(
        "cosine_channel", "_channels_forward", "there = channel < WIDTH", "there = channel >= 0"
    ),
    "channels forward, next sample": Fault("cosine_channel", "_channels_forward", *OF_PROGRAM),
    "channels backward, no last token": Fault("cosine_channel", "_channels_backward", *LAST_TOKEN),
    "channels backward, next sample": Fault("cosine_channel", "_channels_backward", *OF_PROGRAM),
    "mean, no tail": Fault("l2", "_mean", "mask=at < COUNT, ", "mask=at >= 0, "),
}
# Small ones: a tail in tokens, rows and channels, two samples and more than one program.
FAULTY_CASES = (Case((2, 37, 29), layout="padded"), Case((3, 5, 13)))


def fault_seen(name: str) -> list[str]:
    """The comparison has to complain."""
    distance, *change = FAULTS[name]
    with TemporaryDirectory() as folder:
        found = compare(broken(ours, *change, Path(folder)), distance, FAULTY_CASES)
    return [] if found else ["the comparison found nothing"]


CHECKS: dict[str, Callable[[], list[str]]] = {
    **{f"{d} is the reference": partial(compare, ours, d) for d in DISTANCES},
    **{f"{d} clamps as PyTorch": partial(clamped, d) for d in DISTANCES if d.startswith("cosine")},
    **{f"{d} is an op": partial(registered, d) for d in DISTANCES if d in ("cosine", "cosine_channel", "l1")},
    **{f"{d} compiles": partial(traced, d) for d in ("cosine", "smooth_l1")},
    "wrong input": refused,
    **{f"fault: {name}": partial(fault_seen, name) for name in FAULTS},
}


@pytest.fixture(scope="module")
def complaints() -> dict[str, list[str]]:
    """Those of every check."""
    return found_in_the_interpreter(__file__)


@pytest.mark.parametrize("check", CHECKS)
def test_in_the_interpreter(complaints: dict[str, list[str]], check: str) -> None:
    assert complaints[check] == []


# The shapes at which the features of S and XL are trained, and those above.
REAL_CASES = tuple(Case((32, 256, width), BRAIN, BRAIN) for width in (384, 1152)) + CASES


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("distance", DISTANCES)
def test_on_a_gpu(distance: str) -> None:
    assert compare(ours, distance, REAL_CASES, "cuda") == []
    assert not distance.startswith("cosine") or clamped(distance, "cuda") == []


def specialised(distance: str, shape: tuple[int, int, int]) -> Iterator[tuple[Any, dict]]:
    """(kernel, its constexpr arguments) of every launch."""
    inputs = 2 * [torch.empty(shape, device="meta", dtype=torch.bfloat16)]
    for name in ("forward", "backward"):
        by_channel, programs, sizes = ours._launch(*inputs, distance, sums=name == "forward")
        if not by_channel:
            sizes |= {"DISTANCE": distance, "BETA": ours.SMOOTH_L1_BETA}
        yield getattr(ours, f"_{'channels' if by_channel else 'tokens'}_{name}"), sizes
    yield ours._mean, {"COUNT": programs, "BLOCK": ours._PARTIALS}


TYPES = {"student": "*bf16", "teacher": "*bf16", "gradient": "*bf16", "share": "fp32"}
TYPES |= dict.fromkeys(("above", "coefficients", "partials", "loss"), "*fp32")


@pytest.mark.parametrize("compute_capability", [80, 90, 100])
def test_compiles_ahead_of_time_with_full_loads(compute_capability: int) -> None:
    """At the width of XL, with no GPU: 16 bytes a load, wherever rows are read."""
    pytest.importorskip("triton", reason="Triton is not installed")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    for distance in ("cosine", "smooth_l1", "cosine_channel"):
        for kernel, sizes in specialised(distance, (32, 256, 1152)):
            names = kernel.arg_names
            signature = {n: "constexpr" if n in sizes else TYPES.get(n, "i32") for n in names}
            aligned = {
                (i,): [["tt.divisibility", 16]]
                for i, n in enumerate(names)
                if signature[n] not in ("constexpr", "fp32")
            }
            fixed = {(names.index(name),): value for name, value in sizes.items()}
            made = compile(
                ASTSource(kernel, signature, fixed, aligned), target=GPUTarget("cuda", compute_capability, 32)
            )
            assert len(made.asm["cubin"]) > 0
            assert "ld.global.v4.b32" in made.asm["ptx"], kernel
            assert "atom" not in made.asm["ptx"], kernel


if __name__ == "__main__":
    tell(CHECKS)
