"""What follows the backward pass: global norm, clip, AdamW, EMA, and bf16 copies of student and teacher.

    python -m benchmarks.bench_optimizer --size xl

One row per way to do the same work on the parameters of a preset. Bytes per parameter, with fp32 gradients:

    AdamW     read w, g, m, v; write w, m, v     28
    EMA       read and write it; w is at hand     8
    copies    write two in bf16                   4
    norm      read g once more                    4     no update can begin before the norm is known

44 in all, 40 with bf16 gradients, whatever a way really moves. The roof is the same mix of reads and writes without
computation, one pass of torch.compile over long flat tensors. (On a CPU a way can exceed it, by writing copies past the
caches.) A way whose weights, EMA or copies are not those of the formulas in fp64 gets no number.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from benchmarks.harness import options
from benchmarks.harness.roofs import roofs
from benchmarks.harness.rows import Row, folder, row, stamp, write
from benchmarks.harness.tables import finish
from benchmarks.rivals.optimizers import Way, apex_way, rival_way
from sra_fast.config import SIZES, Config, OptimConfig
from sra_fast.errors import Refused
from sra_fast.hardware import Hardware
from sra_fast.kernels.adamw_ema import Lists, Scalars, adamw_ema, adamw_ema_ref, parameter_ref
from sra_fast.kernels.gradient_norm import gradient_norm, gradient_norm_ref
from sra_fast.kernels.registry import why_unavailable
from sra_fast.model.backends import REFERENCE
from sra_fast.step.state import TrainState
from sra_fast.tuning.timing import GateFailed, Samples, measure

RESULTS = ("weight", "EMA", "student", "teacher")
CHUNK = 2**24  # elements compared in fp64 at a time
ROOF = "read, modify, write"
MAX_ROOF_ELEMENTS = 2**26  # 1.5 GB of parameters, more than any cache
FIXED_BYTES = 28 + 8 + 4 - 4  # per parameter, without the gradient
GRADIENT_READS = 2
# Large enough that a wrong moment, decay or average shows after two updates.
SETTINGS = OptimConfig(lr=1e-2, weight_decay=0.1, ema_decay=0.9, ema_warmup=False)

Weights = dict[str, Tensor]  # trained parameters in fp32, by name, before any update
Gradients = dict[torch.dtype, list[Tensor]]


class SharedState:
    """The tensors that all of our own ways work on, because memory is short and values do not matter after the gate.
    The teacher has copies of everything, though in training it stops at its tap."""

    def __init__(self, start: Weights) -> None:
        self.start = start
        self.weights, self.m, self.v, self.ema = ([w.clone() for w in start.values()] for _ in range(4))
        self.student, self.teacher = ([w.bfloat16() for w in start.values()] for _ in range(2))
        self.step, self.skipped = (self.m[0].new_zeros((), dtype=torch.int64) for _ in range(2))

    def reset(self) -> None:
        """Undo all updates."""
        for group in (self.weights, self.ema, self.student, self.teacher):
            torch._foreach_copy_(group, list(self.start.values()))
        torch._foreach_zero_([*self.m, *self.v, self.step, self.skipped])


def our_way(
    state: SharedState, gradients: list[Tensor], norm: Callable[..., Tensor], update: Callable[..., None]
) -> Way:
    """The project's own update by these implementations of its two ops."""
    state.reset()
    config, device = SETTINGS, gradients[0].device
    scalars = [torch.full((), value, device=device) for value in (config.lr, config.ema_decay, config.clip, 1.0)]
    group = [int(weight.ndim < 2) for weight in state.weights]

    def call() -> None:
        update(
            Lists(gradients, state.weights, state.m, state.v, state.ema, state.student, state.teacher),
            Scalars(norm(gradients), state.step, state.skipped, *scalars),
            betas=(config.beta1, config.beta2),
            eps=config.eps,
            weight_decay=(config.weight_decay, 0.0),
            group=group,
        )

    return Way(call, gradients, (state.weights, state.ema, state.student, state.teacher))


def _compiled() -> Callable[..., None]:
    return partial(adamw_ema_ref, parameter=torch.compile(parameter_ref, fullgraph=True, dynamic=True))


FUSED = partial(torch.optim.AdamW, fused=True)
# The most important first: if memory runs out, the last ones have no row.
WAYS: dict[str, Callable[[SharedState, Gradients], Way]] = {
    "ours": lambda state, g: our_way(state, g[torch.float32], gradient_norm, adamw_ema),
    "ours, bf16 gradients": lambda state, g: our_way(state, g[torch.bfloat16], gradient_norm, adamw_ema),
    "reference, compiled": lambda state, g: our_way(state, g[torch.float32], gradient_norm_ref, _compiled()),
    "torch, fused and foreach": lambda state, g: rival_way(state.start, g[torch.float32], SETTINGS, FUSED),
    "apex": lambda state, g: apex_way(state.start, g[torch.float32], SETTINGS),
    "reference, compiled, bf16 gradients": lambda state, g: our_way(
        state, g[torch.bfloat16], gradient_norm_ref, _compiled()
    ),
    "torch, defaults": lambda state, g: rival_way(state.start, g[torch.float32], SETTINGS, foreach=False),
    "reference, eager": lambda state, g: our_way(state, g[torch.float32], gradient_norm_ref, adamw_ema_ref),
}


def roof(count: int, device: torch.device) -> tuple[Callable[[], object], int]:
    """(call, bytes) of the same mix of reads and writes, on at most `count` parameters."""
    count = min(count, MAX_ROOF_ELEMENTS)
    g, w, m, v, ema = (torch.randn(count, device=device) for _ in range(5))
    student, teacher = w.bfloat16(), ema.bfloat16()

    def move() -> None:
        for tensor in (w, m, v, ema):
            tensor.add_(g)
        student.copy_(w)
        teacher.copy_(ema)

    read, write = torch.compile(lambda: g.sum()), torch.compile(move, fullgraph=True)
    return lambda: (read(), write()), count * (FIXED_BYTES + GRADIENT_READS * 4)


def make_start(config: Config, device: torch.device) -> Weights:
    """The project's own initial weights of all trained parameters."""
    state = TrainState.create(config, REFERENCE, device, torch.float32)
    return {name: state.weights[name] for name in state.adam_m}


def make_gradients(start: Weights) -> Gradients:
    """The same random gradients in fp32 and bf16; exact in both."""
    torch.manual_seed(0)
    half = [(1e-2 * torch.randn_like(weight)).bfloat16() for weight in start.values()]
    return {torch.bfloat16: half, torch.float32: [gradient.float() for gradient in half]}


def expected(weight: Tensor, gradients: Sequence[Tensor], weight_decay: float) -> tuple[Tensor, Tensor]:
    """(weight, EMA) in fp64 after updates with these clipped gradients: Loshchilov and Hutter, "Decoupled Weight Decay
    Regularization", 2019, algorithm 2."""
    config = SETTINGS
    w = weight.double()
    ema, m, v = w.clone(), torch.zeros_like(w), torch.zeros_like(w)
    for step, gradient in enumerate(gradients, start=1):
        g = gradient.double()
        m = config.beta1 * m + (1 - config.beta1) * g
        v = config.beta2 * v + (1 - config.beta2) * g**2
        corrected = (m / (1 - config.beta1**step)) / ((v / (1 - config.beta2**step)).sqrt() + config.eps)
        w = (1 - config.lr * weight_decay) * w - config.lr * corrected
        ema = config.ema_decay * ema + (1 - config.ema_decay) * w
    return w, ema


@torch.no_grad()
def gate(name: str, way: Way, start: Weights) -> None:
    """Two updates of a fresh way against fp64, chunk by chunk: the first with gradients that are clipped, the second
    with others of half the largest norm and the opposite sign. Raises `GateFailed` naming the way and the tensor.

    A gradient's relative error is that of the norm and of its scaling: about 1e-5 if the norm is summed in fp32, and
    half a percent if torch sums 59 million gradients on a CPU. AdamW turns it into the same share of a step of the
    learning rate. Then the weight is rounded, and its copy once more.
    """
    parts = (part for gradient in way.gradients for part in gradient.view(-1).split(CHUNK))
    norm = sum(float(part.double().square().sum()) for part in parts) ** 0.5
    clipped, other = min(1.0, SETTINGS.clip / norm), -0.5 * SETTINGS.clip / norm
    originals = [gradient.clone() for gradient in way.gradients]
    way.call()
    for gradient, original in zip(way.gradients, originals, strict=True):
        gradient.copy_(original * other)
    way.call()
    step_error = (1e-2 if name.startswith("torch") else 1e-4) * SETTINGS.lr
    for index, (parameter, before) in enumerate(start.items()):
        decay = SETTINGS.weight_decay if before.ndim > 1 else 0.0
        tensors = [before, originals[index], *(result[index] for result in way.results)]
        for weight, gradient, *results in zip(*(tensor.view(-1).split(CHUNK) for tensor in tensors), strict=True):
            right = expected(weight, [clipped * gradient.double(), gradient * other], decay)
            for kind, value, best in zip(RESULTS, results, (*right, *right), strict=True):
                eps = 8 * torch.finfo(torch.float32).eps
                eps += 0.5 * torch.finfo(value.dtype).eps if value.dtype != torch.float32 else 0
                excess = float(((value.double() - best).abs() - step_error - eps * best.abs()).max())
                if not excess <= 0:  # NaN fails too
                    raise GateFailed(f"{name}: {kind} of {parameter} exceeds the allowed error by {excess:.2g}")
    torch._foreach_copy_(way.gradients, originals)


def measure_rows(
    config: Config, size: str, names: Sequence[str], device: torch.device, repeats: int, warmup: int
) -> list[Row]:
    """The roof's row and one per way, interleaved; with an error where a way does not fit or fails the gate."""
    start = make_start(config, device)
    gradients, state = make_gradients(start), SharedState(start)
    count = sum(gradient.numel() for gradient in gradients[torch.float32])
    architecture = Hardware(device, torch.float32).architecture
    calls: dict[str, Callable[[], object]] = {}
    errors: dict[str, str] = {}
    for name in names:
        try:
            if name.startswith("ours") and (reason := why_unavailable("adamw_ema", architecture)):
                raise Refused(reason)
            if name == "apex" and device.type != "cuda":
                raise Refused("needs a GPU")
            way = WAYS[name](state, gradients)
            gate(name, way, start)
            calls[name] = way.call
        except Refused as error:
            errors[name] = str(error)
        except GateFailed as error:
            errors[name] = f"disagrees with fp64: {error}"
        except torch.OutOfMemoryError as error:
            errors[name] = f"out of memory ({str(error).splitlines()[0]})"
    del start
    touch, touched = roof(count, device)
    taken = measure({ROOF: touch} | calls, device=device, repeats=repeats, warmup=warmup)
    now = stamp(device)
    limits = roofs(device) | {"copy_gb_per_s": touched / (taken[ROOF].median_ms or math.inf) / 1e6}
    params = {"size": size, "parameters": min(count, MAX_ROOF_ELEMENTS), "way": ROOF}
    rows = [row("optimizer", params, taken[ROOF], stamp=now, bytes=touched)]
    for name in names:
        moved = count * (FIXED_BYTES + GRADIENT_READS * (2 if name.endswith("bf16 gradients") else 4))
        samples = Samples(error=errors[name]) if name in errors else taken[name]
        params = {"size": size, "parameters": count, "way": name}
        rows.append(row("optimizer", params, samples, stamp=now, bytes=moved, roofs=limits))
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """The program. Returns its exit code: 1 if a way fails the gate."""
    parser = options.parser("bench_optimizer", __doc__, needs_device=True)
    parser.add_argument("--size", choices=list(SIZES), default="xl" if torch.cuda.is_available() else "s")
    parser.add_argument("--depth", type=options.depth, default=0, help="blocks, for a quick look; 0 = the size's")
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS), metavar="WAY")
    parser.add_argument("--repeats", type=options.positive, default=20)
    parser.add_argument("--warmup", type=options.positive, default=2)
    args = parser.parse_args(arguments)
    config = replace(options.sit(args.size, depth=args.depth), optim=SETTINGS)
    rows = measure_rows(config, args.size, args.ways, args.device, args.repeats, args.warmup)
    now = stamp(args.device)
    name = f"optimizer-{args.size}" + (f"-depth{args.depth}" if args.depth else "")
    return finish(rows, write(folder(now), name, rows, now))


if __name__ == "__main__":
    raise SystemExit(main())
