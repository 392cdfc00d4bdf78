"""The perturb kernel against its formulas in float64 on the same uniforms, in Triton's interpreter or on a GPU."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import NamedTuple

import pytest
import torch
from kernel_checks import GUARD, broken, found_in_the_interpreter, poisoned, tell
from torch import Tensor

from sra_fast.kernels import perturb as ours
from sra_fast.kernels.perturb import Perturbed, path_coefficients, perturb_ref
from sra_fast.kernels.philox import Draw, uniforms

EPS = torch.finfo(torch.float32).eps
NUMBERS = (0, 2**32 - 1, 2**32, 2**40 + 3, 2**63 - 1, 7, 8)  # of images: both words of the counter, to their limits
LIMIT = 2**64 - 1


class Case(NamedTuple):
    shape: tuple[int, ...]
    path: str = "linear"
    times: str = "uniform"
    shared: bool = True
    seed: int = 3
    dropout: float = 0.3
    t_max: float = 0.2

    @property
    def settings(self) -> dict[str, object]:
        return {
            "seed": self.seed,
            "path": self.path,
            "times": self.times,
            "t_max": self.t_max,
            "null_label": 10,
            "label_dropout": self.dropout,
            "shared_label_dropout": self.shared,
        }


# One element, one image, primes, whole programs of 1,024 elements, several of them, and one element more.
CASES = (
    Case((1, 1, 1, 1)),
    Case((7, 1, 8, 8), "cosine", "lognormal", seed=1),
    Case((5, 3, 7, 11), "linear", "lognormal", shared=False, seed=LIMIT),
    Case((3, 4, 32, 32), "cosine", seed=0x9E3779B97F4A7C15, t_max=1.0),
    Case((2, 3, 1025), shared=False, dropout=0.0),
    Case((2, 1024), "linear", "lognormal", dropout=1.0),
)


def inputs(case: Case, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    """Images with NaN before and after, labels and image numbers with others after."""
    x = torch.randn(case.shape, generator=torch.Generator().manual_seed(0)).to(device)
    flat = torch.full((x.numel() + 2 * GUARD,), torch.nan, device=device)
    number = torch.tensor((*NUMBERS, 99), device=device)
    labels = torch.arange(len(number), device=device)
    return flat[GUARD : GUARD + x.numel()].view_as(x).copy_(x), labels[: len(x)], number[: len(x)]


def normals_in_float64(seed: int, number: Tensor, draw: Draw, count: int) -> Tensor:
    even = count + count % 2
    u = uniforms(seed, number, draw, even).double()
    radius, angle = (-2 * u[:, 0::2].log()).sqrt(), 2 * math.pi * u[:, 1::2]
    return torch.stack([radius * angle.cos(), radius * angle.sin()], dim=-1).flatten(1)[:, :count]


def truth(case: Case, x: Tensor, labels: Tensor, number: Tensor) -> Perturbed:
    """The formulas of perturb.py in float64."""
    x, seed, column = x.double(), case.seed, (-1, *[1] * (x.ndim - 1))
    noise = normals_in_float64(seed, number, Draw.NOISE, x[0].numel()).view_as(x)
    t = uniforms(seed, number, Draw.TIME)[:, 0].double()
    if case.times == "lognormal":
        s = normals_in_float64(seed, number, Draw.TIME, 1)[:, 0].exp()
        t = s / (1 + s) if case.path == "linear" else s.atan() * (2 / math.pi)
    t_teacher = (t - case.t_max * uniforms(seed, number, Draw.TEACHER_TIME)[:, 0].double()).clamp(0, 1)
    alpha, sigma, d_alpha, d_sigma = (c.view(column) for c in path_coefficients(case.path, t))
    a, b, _, _ = (c.view(column) for c in path_coefficients(case.path, t_teacher))
    x_t, x_teacher, target = alpha * x + sigma * noise, a * x + b * noise, d_alpha * x + d_sigma * noise
    rate = torch.tensor(case.dropout)

    def dropped(draw: Draw) -> Tensor:
        return torch.where(uniforms(seed, number, draw)[:, 0] < rate, 10, labels)

    student = dropped(Draw.LABEL_DROPOUT)
    teacher = student if case.shared else dropped(Draw.TEACHER_LABEL_DROPOUT)
    return Perturbed(noise, t, t_teacher, x_t, x_teacher, target, student, teacher)


def compare(module: ModuleType, cases: tuple[Case, ...] = CASES, device: str = "cpu") -> list[str]:
    """What is wrong with a kernel: empty if nothing.

    Labels and uniform times are equal in every bit. Other errors may be twice the reference's own, as logarithm, sine
    and cosine differ between libraries, and because it may hit the truth by luck, four units in the last place of the
    largest value: a rounding for each factor, each product and the sum. On a GPU exp adds as many.
    """
    wrong = []
    for case in cases:
        batch = inputs(case, device)
        with poisoned() as whole:
            got, again = (module.perturb(*batch, **case.settings) for _ in range(2))
            if not whole():
                wrong.append(f"{case}: wrote outside its output")
        own, right = perturb_ref(*batch, **case.settings), truth(case, *batch)
        exact = {"labels", "teacher_labels"} | ({"t"} if case.times == "uniform" else set())
        for name, value, repeated, theirs, best in zip(Perturbed._fields, got, again, own, right, strict=True):
            if (value.dtype, value.shape) != (theirs.dtype, theirs.shape):
                wrong.append(f"{case}: {name} is {value.dtype} {tuple(value.shape)}")
                continue
            if not torch.equal(value, repeated):
                wrong.append(f"{case}: {name} of two runs differs")
            if name in exact:
                if not (torch.equal(value, theirs) and torch.equal(value.double(), best.double())):
                    wrong.append(f"{case}: {name} is {value.tolist()}, not {best.tolist()}")
                continue
            error, floor = float((value.double() - best).abs().max()), 4 * EPS * float(best.abs().max())
            floor *= 2 if device == "cuda" and case.times == "lognormal" else 1
            limit = 2 * float((theirs.double() - best).abs().max()) + floor
            if not error <= limit:  # also of NaN
                wrong.append(f"{case}: {name} is off by {error:.3g}, {limit:.3g} allowed")
    return wrong


def independent() -> list[str]:
    """An image draws the same in any batch, in every bit."""
    case = Case((6, 3, 7, 11), "cosine", "lognormal", shared=False)
    x, labels, number = inputs(case)
    whole = ours.perturb(x, labels, number, **case.settings)
    wrong = []
    for rows in ([3], [4, 0], [2, 1, 5]):
        part = ours.perturb(x[rows], labels[rows], number[rows], **case.settings)
        wrong += [
            f"{name} of images {rows}"
            for name, value, of_all in zip(Perturbed._fields, part, whole, strict=True)
            if not torch.equal(value, of_all[rows])
        ]
    return wrong


def registered() -> list[str]:
    """torch.library's own checks."""
    batch = torch.randn(2, 1, 3, 3), torch.arange(2), torch.arange(2)
    for shared in (True, False):
        settings = (3, "linear", "uniform", 0.2, 10, 0.1, shared)
        torch.library.opcheck(torch.ops.sra_fast.perturb.default, (*batch, *settings))
    return []


def traced() -> list[str]:
    """Under torch.compile without a graph break, the same bits."""
    case = Case((2, 1, 3, 3), seed=LIMIT)
    compiled = torch.compile(partial(ours.perturb, **case.settings), fullgraph=True, backend="aot_eager")
    batch = inputs(case)
    pairs = zip(compiled(*batch), ours.perturb(*batch, **case.settings), strict=True)
    return [] if all(torch.equal(*pair) for pair in pairs) else ["compiled, the result is another"]


def refused() -> list[str]:
    """Input that the kernel cannot serve, and what must be said of it."""
    case = Case((2, 1, 4, 5))
    x, labels, number = inputs(case)
    tries = [
        (r"path: 'spiral' given; must be one of linear, cosine", (x, labels, number), {"path": "spiral"}),
        (r"times: 'never' given; must be one of uniform, lognormal", (x, labels, number), {"times": "never"}),
        (r"x: torch.float64 given; must be torch.float32", (x.double(), labels, number), {}),
        (r"x: shape (0, 1, 4, 5) given", (x[:0], labels[:0], number[:0]), {}),
        (r"x: strides (20, 20, 1, 4) given; must be contiguous", (torch.zeros(2, 1, 5, 4).mT, labels, number), {}),
        (r"labels: shape (1,) given; must be one per image, (2,)", (x, labels[:1], number), {}),
        (r"number: torch.int32 given; must be torch.int64", (x, labels, number.int()), {}),
        (r"number: device meta given; must be that of x, cpu", (x, labels, number.to("meta")), {}),
    ]
    wrong = []
    for message, batch, changes in tries:
        settings = case.settings | changes
        try:
            ours._check(*batch, settings["path"], settings["times"])
            wrong.append(f"not refused: {message}")
        except ValueError as error:
            if message not in str(error):
                wrong.append(f"{error}, not {message}")
    try:
        ours.perturb(x.double(), labels, number, **case.settings)
        wrong.append("the op does not check")
    except ValueError:
        pass
    return wrong


FAULTS = {  # a change of the kernel's source
    "no tail": ("inside, at = element < COUNT", "inside, at = element >= 0"),
    "next sample": ("tl.load(number + sample)", "tl.load(number + sample + 1)"),
    "next sample's pixels": ("sample * COUNT + element", "(sample + 1) * COUNT + element"),
    "wrong axis": ("tl.join(tl.join(z0, z2), tl.join(z1, z3))", "tl.join(tl.join(z0, z1), tl.join(z2, z3))"),
    "wide counter": (
        "tl.philox(seed, call.to(tl.uint32), zeros + low, zeros + high, zeros + NOISE)",
        "tl.philox(seed, call.to(tl.uint64), (zeros + low).to(tl.uint64), (zeros + high).to(tl.uint64), "
        "(zeros + NOISE).to(tl.uint64))",
    ),
    "high word lost": ("(image >> 32).to(tl.uint32)", "(image >> 63).to(tl.uint32)"),
    "every program the first": ("part * BLOCK + tl.arange(0, BLOCK)", "tl.arange(0, BLOCK)"),
    "teacher at the student's time": ("_coefficients(t_teacher, PATH)", "_coefficients(t, PATH)"),
    "teacher's labels are the student's": ("nothing + TEACHER_LABEL)", "nothing + LABEL)"),
}
FAULTY_CASES = (Case((7, 3, 7, 11), shared=False, seed=5, dropout=0.5), Case((2, 1025)))


def fault_seen(name: str) -> list[str]:
    """The comparison has to complain."""
    with TemporaryDirectory() as folder:
        found = compare(broken(ours, "_perturb_kernel", *FAULTS[name], Path(folder)), FAULTY_CASES)
    return [] if found else ["the comparison found nothing"]


CHECKS: dict[str, Callable[[], list[str]]] = {
    "is the reference": partial(compare, ours),
    "does not depend on the batch": independent,
    "is an op": registered,
    "compiles": traced,
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


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_on_a_gpu() -> None:
    assert compare(ours, CASES, "cuda") == []


INTEGERS = {"labels": "*i64", "number": "*i64", "labels_out": "*i64", "teacher_labels_out": "*i64", "seed": "i64"}
SCALARS = {"t_max": "fp32", "null_label": "i32", "label_dropout": "fp32"}


@pytest.mark.parametrize("compute_capability", [80, 90, 100])
def test_compiles_ahead_of_time(compute_capability: int) -> None:
    """With no GPU: 16 bytes a load, nothing on the stack, and no fast logarithm, sine or cosine, whose absolute error
    would make some normal a NaN."""
    pytest.importorskip("triton", reason="Triton is not installed")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    kernel, draws = ours._perturb_kernel, {"NOISE": 1, "TIME": 2, "TEACHER_TIME": 3, "LABEL": 4, "TEACHER_LABEL": 7}
    names = kernel.arg_names
    for path, times in (("linear", "uniform"), ("cosine", "lognormal")):
        sizes = {"PATH": path, "TIMES": times, "SHARED": False, "COUNT": 4096, "BLOCK": ours._CALLS} | draws
        types = dict.fromkeys(names, "*fp32") | INTEGERS | SCALARS | dict.fromkeys(sizes, "constexpr")
        aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if types[name].startswith("*")}
        fixed = {(names.index(name),): value for name, value in sizes.items()}
        made = compile(ASTSource(kernel, types, fixed, aligned), target=GPUTarget("cuda", compute_capability, 32))
        assert len(made.asm["cubin"]) > 0
        assert "ld.global.v4.b32" in made.asm["ptx"]
        for name in (".local", "lg2.approx", "sin.approx", "cos.approx"):
            assert name not in made.asm["ptx"], name


if __name__ == "__main__":
    tell(CHECKS)
