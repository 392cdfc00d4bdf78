"""Whole training steps: the public recipe, the rungs above it, and ours, interleaved in one process.

    python -m benchmarks.bench_step --size xl --batch 32
    python -m benchmarks.bench_step --size s --batch 8 --rungs public ours "ours fp32"      (a CPU)

Images/s, ms/step and TFLOP/s by the formula of sra_fast/flops.py (2 per multiply-add; student three forwards, teacher
to its tap, whatever a rung really computes), and the share of the matrix roof measured in the same run. No number is
printed from a step whose losses disagree with the reference.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from benchmarks import timing
from benchmarks.baseline import RUNGS, PublicStep
from sra_fast.config import SIZES, Config, preset
from sra_fast.flops import dense_peak_flops, training_flops
from sra_fast.kernels.philox import Draw, normals
from sra_fast.model.initial import ZERO
from sra_fast.model.transformer import Ops
from sra_fast.optim import TrainState
from sra_fast.step import TrainingStep

OURS = {"ours fp32": torch.float32, "ours": torch.bfloat16, "ours, plain SiT": torch.bfloat16}
NAMES = (*(rung.name for rung in RUNGS), *OURS)
# Relative error of a batch's losses against fp32. fp32 differs by the order of additions (TF32 by its 10 bits), bf16 by
# its 8 bits in every product, nearly all of which a mean over the batch takes away (4e-4 seen).
GATE = {None: 1e-3, torch.float32: 1e-3, torch.float16: 2e-3, torch.bfloat16: 2e-3}


def make_config(size: str, tokens: int, batch: int) -> Config:
    """A SiT with patch 2 on 4-channel latents of that many tokens."""
    base = preset(f"sit-{size}-2")
    side = 2 * round(tokens**0.5)
    model = replace(base.model, input_size=side, channels=4, classes=1000)
    return replace(base, model=model, train=replace(base.train, batch=batch))


def make_batch(config: Config, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """(x, labels, numbers): random latents of unit variance, as scaled SD latents have."""
    generator = torch.Generator().manual_seed(0)
    batch, side = config.train.batch, config.model.input_size
    x = torch.randn(batch, config.model.channels, side, side, generator=generator)
    labels = torch.randint(config.model.classes, (batch,), generator=generator)
    return x.to(device), labels.to(device), torch.arange(batch, device=device)


class OurStep:
    """The project's own step with the state it needs."""

    def __init__(self, config: Config, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype = dtype
        resolved = config.kernels.resolve()
        self.state = TrainState.create(config, Ops.select(resolved), device, dtype)
        self.step = TrainingStep(config, resolved, device)
        self.lr, self.weight = (torch.full((), v, device=device) for v in (config.optim.lr, config.align.weight))

    def losses(self, x: Tensor, labels: Tensor, number: Tensor) -> tuple[Tensor, Tensor]:
        """(velocity loss, alignment loss)."""
        return self.step.losses(self.state, x, labels, number, self.weight)[1:]

    def __call__(self, x: Tensor, labels: Tensor, number: Tensor) -> None:
        self.step(self.state, x, labels, number, self.lr, self.weight)


@contextmanager
def awake(step: PublicStep | OurStep) -> Iterator[None]:
    """The step with noise where initial weights are zero: there its blocks are the identity and its prediction is zero,
    whatever the times."""
    ours = isinstance(step, OurStep)
    student, average = (step.state.weights, step.state.ema) if ours else (step.model, step.ema)
    asleep = []
    for owner in (student, average):
        named = owner if ours else dict(owner.named_parameters())
        for position, (name, tensor) in enumerate(named.items()):
            if name.endswith(ZERO):
                asleep.append(tensor)
                number = torch.tensor([position], device=tensor.device)
                tensor.data.copy_(0.1 * normals(1, number, Draw.WEIGHT, tensor.numel()).view_as(tensor))
    if ours:
        step.state.refresh()
    yield
    for tensor in asleep:
        tensor.data.zero_()
    if ours:
        step.state.refresh()


def gate(config: Config, steps: dict[str, PublicStep | OurStep], batch: tuple[Tensor, Tensor, Tensor]) -> None:
    """Every step's losses from the same draws as the fp32 reference's, at the same weights."""
    reference = OurStep(config, torch.float32, batch[0].device)
    with awake(reference):
        expected = [float(loss.detach()) for loss in reference.losses(*batch)]
    noised, labels, _ = reference.step.perturb(*batch)
    for name, step in steps.items():
        with awake(step):
            if isinstance(step, PublicStep):
                got = step.losses(batch[0], noised.noise, noised.t, noised.t_teacher, labels)
            else:
                got = step.losses(*batch)
        tolerance = GATE[step.dtype]
        wanted = expected if step_aligns(step) else expected[:1]
        for value, right in zip([float(loss.detach()) for loss in got], wanted, strict=False):
            if not abs(value - right) <= tolerance * abs(right):
                raise timing.GateFailed(f"{name}: loss {value:.5f}, reference {right:.5f}, tolerance {tolerance:.1%}")


def step_aligns(step: PublicStep | OurStep) -> bool:
    """Whether it trains with alignment."""
    config = step.config if isinstance(step, PublicStep) else step.step.config
    return config.align.method != "none"


def build(name: str, config: Config, device: torch.device) -> PublicStep | OurStep:
    """The step of that name."""
    if name not in OURS:
        return PublicStep(config, next(rung for rung in RUNGS if rung.name == name), device)
    if name == "ours, plain SiT":
        config = replace(config, align=replace(config.align, method="none"))
    return OurStep(config, OURS[name], device)


def call(step: PublicStep | OurStep, batch: tuple[Tensor, Tensor, Tensor]) -> Callable[[], None]:
    """One step on the batch."""
    return (lambda: step(*batch[:2])) if isinstance(step, PublicStep) else (lambda: step(*batch))


def rows(
    config: Config, size: str, names: list[str], device: torch.device, repeats: int, warmup: int
) -> list[timing.Row]:
    """A row per step; ours and the rivals on the same batch."""
    batch = make_batch(config, device)
    steps = {name: build(name, config, device) for name in names}
    torch.set_float32_matmul_precision("high")  # TF32 for fp32 products on a GPU, as the public code sets it
    taken = timing.measure(
        {name: call(step, batch) for name, step in steps.items()},
        device=device,
        repeats=repeats,
        warmup=warmup,
        gate=lambda: gate(config, steps, batch),
    )
    stamp, roofs = timing.stamp(), timing.roofs(device)
    images = config.train.batch
    made = []
    for name, samples in taken.items():
        flops = images * training_flops(config.model, config.taps[1] if step_aligns(steps[name]) else None)
        params = {"size": size, "tokens": config.model.tokens, "batch": images, "rung": name}
        row = timing.row("step", params, samples, stamp=stamp, flops=flops, roofs=roofs)
        peak = dense_peak_flops(stamp["device"], "bf16")
        if samples.median_ms:
            row["images_per_s"] = 1e3 * images / samples.median_ms
            row["peak_share"] = flops / samples.median_ms * 1e3 / peak if peak else None
        made.append(row)
    return made


def main(arguments: list[str] | None = None) -> int:
    """The program. Returns its exit code: 1 if the gate fails."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_step", description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=list(SIZES), default="xl")
    parser.add_argument("--tokens", type=int, choices=(256, 1024), default=256)
    parser.add_argument("--batch", type=int, default=32, help="local batch")
    parser.add_argument("--rungs", nargs="+", choices=NAMES, default=list(NAMES), metavar="RUNG", help=", ".join(NAMES))
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--depth", type=int, default=0, help="other than the size's, for a quick look; 0 = the size's")
    options = parser.parse_args(arguments)
    config = make_config(options.size, options.tokens, options.batch)
    if options.depth:
        config = replace(config, model=replace(config.model, depth=options.depth))
    device = torch.device(options.device)
    try:
        made = rows(config, options.size, options.rungs, device, options.repeats, options.warmup)
    except timing.GateFailed as failure:
        print(f"no number: {failure}")
        return 1
    stamp = timing.stamp()
    name = f"step-{options.size}-{options.tokens}-{options.batch}" + (f"-depth{options.depth}" if options.depth else "")
    path = timing.write(timing.folder(stamp), name, made, stamp)
    print(timing.table(made))
    for row in made:
        if "images_per_s" in row:
            print(f"{row['params']['rung']:>28}  {row['images_per_s']:10.2f} images/s")
    print(f"raw samples in {path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
