"""What follows the backward pass: global norm, clip, AdamW, EMA, and bf16 copies of student and teacher.

    python -m benchmarks.bench_optimizer --size xl

One row per way to do the same work on the parameters of a preset. Bytes per parameter, with fp32 gradients:

    AdamW     read w, g, m, v; write w, m, v     28
    EMA       read and write it; w is at hand     8
    copies    write two in bf16                   4
    norm      read g once more                    4     no update can begin before the norm is known

44 in all, 40 with bf16 gradients. GB/s and the share of the roof are of these bytes, whatever a way really moves. A
way whose weights, EMA or copies are not those of the formulas in fp64 gets no number.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from benchmarks import options, timing
from sra_fast.config import SIZES, Config, OptimConfig, preset
from sra_fast.model.transformer import REFERENCE
from sra_fast.optim import TrainState, adamw_ema_ref, update

RESULTS = ("weight", "EMA", "student", "teacher")
CHUNK = 2**24  # elements compared in fp64 at a time
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
    groups = [
        {"params": [weight for weight in weights if weight.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [weight for weight in weights if weight.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(
        groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=True if fused else None
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


def our_way(config: Config, gradients: list[Tensor], device: torch.device, adamw_ema: Callable[..., None]) -> Way:
    """The project's own update, with that function for one parameter."""
    state = TrainState.create(config, REFERENCE, device, torch.bfloat16)
    lr = torch.full((), SETTINGS.lr, device=device)
    copies = [[dict(net.named_parameters())[name] for name in state.adam_m] for net in (state.student, state.teacher)]
    held = [[tensors[name] for name in state.adam_m] for tensors in (state.weights, state.ema)]
    return Way(lambda: update(state, gradients, lr, SETTINGS, adamw_ema)[0], gradients, (*held, *copies))


def compiled() -> Callable[..., None]:
    """One parameter's update under torch.compile."""
    return torch.compile(adamw_ema_ref, fullgraph=True, dynamic=True)


# In the order of their weight: where memory runs out, the last ones go without.
WAYS: dict[str, Callable[[Config, Weights, dict[torch.dtype, list[Tensor]], torch.device], Way]] = {
    "torch, defaults": lambda config, start, given, device: torch_way(start, given[torch.float32], fused=False),
    "torch, fused and foreach": lambda config, start, given, device: torch_way(start, given[torch.float32], fused=True),
    "ours, compiled": lambda config, start, given, device: our_way(config, given[torch.float32], device, compiled()),
    "ours, compiled, bf16 gradients": lambda config, start, given, device: our_way(
        config, given[torch.bfloat16], device, compiled()
    ),
    "ours, eager": lambda config, start, given, device: our_way(config, given[torch.float32], device, adamw_ema_ref),
}


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
                off = float(((value.double() - best).abs() - _allowed(best, value.dtype)).max())
                if not off <= 0:
                    raise timing.GateFailed(f"{name}: {what} of {parameter} is {off:.2g} further off than allowed")
    torch._foreach_copy_(way.gradients, first)


def _allowed(right: Tensor, dtype: torch.dtype) -> Tensor:
    """A gradient's relative error is that of the norm and of its scaling, some 1e-5 where the norm of a large tensor is
    added up in fp32; AdamW turns it into as much of a step of the learning rate. Then the weight is rounded, and a copy
    of it once more."""
    eps = 8 * torch.finfo(torch.float32).eps + (0.5 * torch.finfo(dtype).eps if dtype != torch.float32 else 0)
    return 1e-4 * SETTINGS.lr + eps * right.abs()


def rows(
    config: Config, size: str, names: Sequence[str], device: torch.device, repeats: int, warmup: int
) -> list[timing.Row]:
    """A row per way, interleaved. One that does not fit into memory, or fails the gate, says so instead."""
    start = make_start(config, device)
    given = make_gradients(start)
    count = sum(gradient.numel() for gradient in given[torch.float32])
    ways: dict[str, Way] = {}
    refused: dict[str, timing.Samples] = {}
    for name in names:
        try:
            ways[name] = WAYS[name](config, start, given, device)
            gate(name, ways[name], start)
        except timing.GateFailed as failure:
            refused[name] = timing.Samples(error=f"disagrees with fp64: {failure}")
        except torch.OutOfMemoryError as failure:
            refused[name] = timing.Samples(error=f"out of memory ({str(failure).splitlines()[0]})")
        if name in refused:
            ways.pop(name, None)
    del start
    taken = timing.measure(
        {name: way.call for name, way in ways.items()}, device=device, repeats=repeats, warmup=warmup
    )
    stamp, roofs = timing.stamp(device), timing.roofs(device)
    made = []
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
