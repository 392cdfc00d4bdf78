"""What follows the backward pass: global norm, clip, AdamW, EMA, and bf16 copies of student and teacher.

    python -m benchmarks.bench_optimizer --size xl

One row per way to do the same work on the parameters of a preset. Bytes per parameter, with fp32 gradients:

    AdamW     read w, g, m, v; write w, m, v     28
    EMA       read and write it; w is at hand     8
    copies    write two in bf16                   4
    norm      read g once more                    4     no update can begin before the norm is known

44 in all, 40 with bf16 gradients. GB/s and the share of the roof are of these bytes, whatever a way really moves. The
roof is the same mix of reads and writes with nothing computed, one pass of torch.compile over long flat tensors,
interleaved with the ways. (On a CPU a way can exceed it, by writing copies past the caches.) A way whose weights, EMA
or copies are not those of the formulas in fp64 gets no number.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import options, timing
from sra_fast.config import SIZES, Config, OptimConfig, preset
from sra_fast.kernels import missing
from sra_fast.kernels.adamw_ema import Lists, Scalars, adamw_ema, adamw_ema_ref, parameter_ref
from sra_fast.kernels.gradient_norm import gradient_norm, gradient_norm_ref
from sra_fast.model.transformer import REFERENCE
from sra_fast.step.state import TrainState

RESULTS = ("weight", "EMA", "student", "teacher")
CHUNK = 2**24  # elements compared in fp64 at a time
ROOF = "read, modify, write"
ROOF_ELEMENTS = 2**26  # at most: 1.5 GB of parameters, more than any cache
FIXED_BYTES = 28 + 8 + 4 - 4  # per parameter, without the gradient
GRADIENT_READS = 2
# Large enough that a wrong moment, decay or average shows after two updates.
SETTINGS = OptimConfig(lr=1e-2, weight_decay=0.1, ema_decay=0.9, ema_warmup=False)
Weights = dict[str, Tensor]  # trained parameters in fp32, by name, before any update


@dataclass
class Way:
    """One way, with tensors of its own.

    Attributes:
        call: one whole update, from the gradients to the copies.
        gradients: that it reads, and may scale in place.
        results: weights, EMA and their bf16 copies, each in the order of the gradients.
    """

    call: Callable[[], None]
    gradients: list[Tensor]
    results: tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]


def torch_way(start: Weights, gradients: list[Tensor], fused: bool) -> Way:
    """torch's AdamW: its defaults, with EMA and copies parameter by parameter in a Python loop, as the public code has
    them; or all that PyTorch offers: the fused AdamW, and foreach functions for the rest."""
    weights = [weight.clone().requires_grad_() for weight in start.values()]
    average = [weight.detach().clone() for weight in weights]
    student, teacher = ([weight.detach().bfloat16() for weight in weights] for _ in range(2))
    own = [gradient.float().clone() for gradient in gradients]
    for weight, gradient in zip(weights, own, strict=True):
        weight.grad = gradient
    config = SETTINGS
    optimizer = torch.optim.AdamW(
        _groups(weights),
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=True if fused else None,
    )

    @torch.no_grad()
    def follow() -> None:
        if fused:
            torch._foreach_lerp_(average, weights, 1 - config.ema_decay)
            torch._foreach_copy_(student, weights)
            torch._foreach_copy_(teacher, average)
            return
        for mean, weight, copy, mean_copy in zip(average, weights, student, teacher, strict=True):
            mean.mul_(config.ema_decay).add_(weight, alpha=1 - config.ema_decay)
            copy.copy_(weight)
            mean_copy.copy_(mean)

    def call() -> None:
        torch.nn.utils.clip_grad_norm_(weights, config.clip)
        optimizer.step()
        follow()

    return Way(call, own, (weights, average, student, teacher))


def _groups(weights: list[Tensor]) -> list[dict[str, Any]]:
    """Decay for matrices alone."""
    matrices, vectors = ([weight for weight in weights if (weight.ndim > 1) == decays] for decays in (True, False))
    return [{"params": matrices, "weight_decay": SETTINGS.weight_decay}, {"params": vectors, "weight_decay": 0.0}]


def apex_way(start: Weights, gradients: list[Tensor]) -> Way:
    """NVIDIA apex's multi-tensor norm and FusedAdam, the EMA and copies by foreach functions."""
    from apex.optimizers import FusedAdam

    way, config = torch_way(start, gradients, fused=True), SETTINGS
    weights, average, student, teacher = way.results
    adam = FusedAdam(
        _groups(weights), lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, adam_w_mode=True
    )
    from apex.contrib.clip_grad import clip_grad_norm_

    @torch.no_grad()
    def call() -> None:
        clip_grad_norm_(weights, config.clip)
        adam.step()
        torch._foreach_lerp_(average, weights, 1 - config.ema_decay)
        torch._foreach_copy_(student, weights)
        torch._foreach_copy_(teacher, average)

    return replace(way, call=call)


class Held:
    """The tensors that all ways of our own work on, one set for them all: as a rule memory is short, and after the gate
    values do not matter. The teacher has copies of everything, though in training it stops at its tap."""

    def __init__(self, start: Weights) -> None:
        self.start = start
        self.weights, self.m, self.v, self.average = ([torch.empty_like(w) for w in start.values()] for _ in range(4))
        self.student, self.teacher = ([w.bfloat16() for w in start.values()] for _ in range(2))
        device = self.weights[0].device
        self.step, self.skipped = (torch.zeros((), dtype=torch.int64, device=device) for _ in range(2))

    def begin(self) -> None:
        """As before any update."""
        for group in (self.weights, self.average, self.student, self.teacher):
            torch._foreach_copy_(group, list(self.start.values()))
        torch._foreach_zero_([*self.m, *self.v, self.step, self.skipped])


def our_way(held: Held, gradients: list[Tensor], norm_of: Callable[..., Tensor], of_all: Callable[..., None]) -> Way:
    """The project's own update, by those implementations of its two ops."""
    held.begin()
    config, device = SETTINGS, gradients[0].device
    scalars = [torch.full((), value, device=device) for value in (config.lr, config.ema_decay, config.clip, 1.0)]
    group = [int(weight.ndim < 2) for weight in held.weights]

    def call() -> None:
        of_all(
            Lists(gradients, held.weights, held.m, held.v, held.average, held.student, held.teacher),
            Scalars(norm_of(gradients), held.step, held.skipped, *scalars),
            betas=(config.beta1, config.beta2),
            eps=config.eps,
            weight_decay=(config.weight_decay, 0.0),
            group=group,
        )

    return Way(call, gradients, (held.weights, held.average, held.student, held.teacher))


def compiled() -> Callable[..., None]:
    """The reference with one parameter's update under torch.compile."""
    return partial(adamw_ema_ref, parameter=torch.compile(parameter_ref, fullgraph=True, dynamic=True))


Maker = Callable[[Held, dict[torch.dtype, list[Tensor]]], Way]


def _ours(dtype: torch.dtype, norm_of: Callable[..., Tensor], of_all: Callable[[], Callable[..., None]]) -> Maker:
    return lambda held, given: our_way(held, given[dtype], norm_of, of_all())


# In the order of their weight: where memory runs out, the last ones go without.
WAYS: dict[str, Maker] = {
    "ours": _ours(torch.float32, gradient_norm, lambda: adamw_ema),
    "ours, bf16 gradients": _ours(torch.bfloat16, gradient_norm, lambda: adamw_ema),
    "reference, compiled": _ours(torch.float32, gradient_norm_ref, compiled),
    "torch, fused and foreach": lambda held, given: torch_way(held.start, given[torch.float32], fused=True),
    "apex": lambda held, given: apex_way(held.start, given[torch.float32]),
    "reference, compiled, bf16 gradients": _ours(torch.bfloat16, gradient_norm_ref, compiled),
    "torch, defaults": lambda held, given: torch_way(held.start, given[torch.float32], fused=False),
    "reference, eager": _ours(torch.float32, gradient_norm_ref, lambda: adamw_ema_ref),
}


def obstacle(name: str, device: torch.device) -> str:
    """Why a way cannot be had here; empty: it can."""
    if name == "apex":
        return "" if find_spec("apex") and device.type == "cuda" else "apex is not installed"
    if not name.startswith("ours"):
        return ""
    architecture = "cpu" if device.type == "cpu" else "sm_{}{}".format(*torch.cuda.get_device_capability(device))
    return missing("adamw_ema", architecture)


def roof(count: int, device: torch.device) -> tuple[Callable[[], Tensor], int]:
    """(call, bytes) of the same mix of reads and writes, on at most `count` parameters."""
    count = min(count, ROOF_ELEMENTS)
    generator = torch.Generator(device).manual_seed(0)
    g, w, m, v, ema = (torch.randn(count, generator=generator, device=device) for _ in range(5))
    student, teacher = w.bfloat16(), ema.bfloat16()

    def move() -> None:
        for tensor in (w, m, v, ema):
            tensor.add_(g)
        student.copy_(w)
        teacher.copy_(ema)

    read, write = torch.compile(lambda: g.sum()), torch.compile(move, fullgraph=True)

    def call() -> Tensor:
        total = read()
        write()
        return total

    return call, count * (FIXED_BYTES + GRADIENT_READS * 4)


def make_config(size: str, depth: int = 0) -> Config:
    """SiT with patch 2 on 4-channel latents of 256 tokens."""
    base = preset(f"sit-{size}-2")
    model = replace(base.model, input_size=32, channels=4, classes=1000, depth=depth or base.model.depth)
    return replace(base, model=model, optim=SETTINGS)


def make_start(config: Config, device: torch.device) -> Weights:
    """The project's own initial weights, of what is trained."""
    state = TrainState.create(config, REFERENCE, device, torch.float32)
    return {name: state.weights[name] for name in state.adam_m}


def make_gradients(start: Weights) -> dict[torch.dtype, list[Tensor]]:
    """The same random gradients in fp32 and bf16; exact in both."""
    device = next(iter(start.values())).device
    generator = torch.Generator(device).manual_seed(0)
    half = [
        (1e-2 * torch.randn(weight.shape, generator=generator, device=device)).bfloat16() for weight in start.values()
    ]
    return {torch.bfloat16: half, torch.float32: [gradient.float() for gradient in half]}


def expected(weight: Tensor, gradients: Sequence[Tensor], weight_decay: float) -> tuple[Tensor, Tensor]:
    """(weight, EMA) in fp64 after updates with these gradients, clipping done: Loshchilov and Hutter, "Decoupled Weight
    Decay Regularization", 2019, algorithm 2."""
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


def norm_of(gradients: Sequence[Tensor]) -> float:
    """Global 2-norm, added up in fp64."""
    parts = (part for gradient in gradients for part in gradient.view(-1).split(CHUNK))
    return sum(float(part.double().square().sum()) for part in parts) ** 0.5


@torch.no_grad()
def gate(name: str, way: Way, start: Weights) -> None:
    """Two updates of a fresh way against fp64, part by part: the first with gradients that are clipped, the second with
    others of half the largest norm and the other sign.

    Raises:
        timing.GateFailed: naming the way and the tensor.
    """
    norm = norm_of(way.gradients)
    clipped, other = min(1.0, SETTINGS.clip / norm), -0.5 * SETTINGS.clip / norm
    first = [gradient.clone() for gradient in way.gradients]
    way.call()
    for gradient, original in zip(way.gradients, first, strict=True):
        gradient.copy_(original * other)
    way.call()
    for place, (parameter, before) in enumerate(start.items()):
        decay = SETTINGS.weight_decay if before.ndim > 1 else 0.0
        tensors = [before, first[place], *(held[place] for held in way.results)]
        for parts in zip(*(tensor.view(-1).split(CHUNK) for tensor in tensors), strict=True):
            weight, gradient, *made = parts
            right = expected(weight, [clipped * gradient.double(), gradient * other], decay)
            for what, value, best in zip(RESULTS, made, (*right, *right), strict=True):
                off = float(((value.double() - best).abs() - _allowed(name, best, value.dtype)).max())
                if not off <= 0:
                    raise timing.GateFailed(f"{name}: {what} of {parameter} is {off:.2g} further off than allowed")
    torch._foreach_copy_(way.gradients, first)


def _allowed(name: str, right: Tensor, dtype: torch.dtype) -> Tensor:
    """A gradient's relative error is that of the norm and of its scaling, some 1e-5 where a norm is added up in fp32,
    and half a percent where torch adds up 59 million gradients on a CPU; AdamW turns it into as much of a step of the
    learning rate. Then the weight is rounded, and a copy of it once more."""
    norm = 1e-2 if name.startswith("torch") else 1e-4
    eps = 8 * torch.finfo(torch.float32).eps + (0.5 * torch.finfo(dtype).eps if dtype != torch.float32 else 0)
    return norm * SETTINGS.lr + eps * right.abs()


def rows(
    config: Config, size: str, names: Sequence[str], device: torch.device, repeats: int, warmup: int
) -> list[timing.Row]:
    """A row per way, interleaved. One that does not fit into memory, or fails the gate, says so instead."""
    start = make_start(config, device)
    given, held = make_gradients(start), Held(start)
    count = sum(gradient.numel() for gradient in given[torch.float32])
    ways: dict[str, Way] = {}
    refused: dict[str, timing.Samples] = {}
    for name in names:
        if reason := obstacle(name, device):
            refused[name] = timing.Samples(error=reason)
            continue
        try:
            ways[name] = WAYS[name](held, given)
            gate(name, ways[name], start)
        except timing.GateFailed as failure:
            refused[name] = timing.Samples(error=f"disagrees with fp64: {failure}")
        except torch.OutOfMemoryError as failure:
            refused[name] = timing.Samples(error=f"out of memory ({str(failure).splitlines()[0]})")
        except Exception as failure:  # a package of others may break in any way, and must not take our rows along
            if name != "apex":
                raise
            refused[name] = timing.Samples(error=f"failed ({' '.join(str(failure).split())[:200]})")
        if name in refused:
            ways.pop(name, None)
    del start
    touch, touched = roof(count, device)
    calls = {ROOF: touch} | {name: way.call for name, way in ways.items()}
    taken = timing.measure(calls, device=device, repeats=repeats, warmup=warmup)
    stamp = timing.stamp(device)
    roofs = timing.roofs(device) | {"copy_gb_per_s": touched / taken[ROOF].median_ms / 1e6, "copy_bytes": touched}
    params = {"size": size, "parameters": min(count, ROOF_ELEMENTS), "way": ROOF}
    made = [timing.row("optimizer", params, taken[ROOF], stamp=stamp, bytes=touched)]
    for name in names:
        gradient = 2 if name.endswith("bf16 gradients") else 4
        params = {"size": size, "parameters": count, "way": name}
        moved = count * (FIXED_BYTES + GRADIENT_READS * gradient)
        samples = taken.get(name) or refused[name]
        made.append(timing.row("optimizer", params, samples, stamp=stamp, bytes=moved, roofs=roofs))
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """The program. Returns its exit code: 1 if a way fails the gate."""
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_optimizer", description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=list(SIZES), default="xl" if gpu else "s")
    parser.add_argument(
        "--depth", type=options.depth, default=0, help="other than the size's, for a quick look; 0 = the size's"
    )
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS), metavar="WAY")
    parser.add_argument("--repeats", type=options.positive, default=20)
    parser.add_argument("--warmup", type=options.positive, default=2)
    parser.add_argument("--device", type=options.device, default=torch.device("cuda" if gpu else "cpu"))
    chosen = parser.parse_args(arguments)
    config = make_config(chosen.size, chosen.depth)
    made = rows(config, chosen.size, chosen.ways, chosen.device, chosen.repeats, chosen.warmup)
    stamp: dict[str, Any] = timing.stamp(chosen.device)
    name = f"optimizer-{chosen.size}" + (f"-depth{chosen.depth}" if chosen.depth else "")
    path = timing.write(timing.folder(stamp), name, made, stamp)
    print(timing.table(made))
    print(f"raw samples in {path}")
    off = [row["error"] for row in made if row.get("error", "").startswith("disagrees")]
    for error in off:
        print(f"no number: {error}")
    return 1 if off else 0


if __name__ == "__main__":
    raise SystemExit(main())
