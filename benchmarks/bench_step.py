"""Whole training steps: the public recipe, the rungs above it, and ours, interleaved in one process.

    python -m benchmarks.bench_step --size xl --batch 32
    python -m benchmarks.bench_step --size xl --batch 256 --interleave none             steps too large to live together
    python -m benchmarks.bench_step --size xl --batch auto-check --rungs ours public    which batches fit
    python -m benchmarks.bench_step --size s --batch 8 --rungs public ours "ours fp32"  a CPU

Images/s, ms/step and TFLOP/s by the formula of sra_fast/flops.py (2 per multiply-add; student three forwards, teacher
to its tap, whatever a rung really computes), and the share of the matrix roof measured in the same run. No number is
printed from a step whose losses disagree with the reference, nor from one that was to be a CUDA graph and is not.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from benchmarks.harness import options, timing
from benchmarks.rivals.recipe import RUNGS, PublicStep
from sra_fast.config import SIZES, Config, preset
from sra_fast.data.stream import Batch
from sra_fast.flops import dense_peak_flops, training_flops
from sra_fast.hardware import Hardware, set_deterministic
from sra_fast.kernels.perturb import draw_ref
from sra_fast.kernels.philox import Draw, normals
from sra_fast.model.backends import resolve
from sra_fast.model.initial import ZERO
from sra_fast.model.layout import apart
from sra_fast.model.transformer import Ops
from sra_fast.objective.ddpm import DIFFUSION_STEPS
from sra_fast.step.runner import StepRunner, choose_execution
from sra_fast.step.state import TrainState
from sra_fast.step.step import MetricRing, TrainingStep


@dataclass(frozen=True)
class Ours:
    """A way to take the project's own step."""

    name: str
    execution: str = ""  # empty = the fastest there is: a graph on a GPU, compiled on a CPU
    dtype: torch.dtype = torch.bfloat16
    aligned: bool = True
    deterministic: bool = False
    fused: bool = False  # every op of the network and the loss that has a kernel by it, else as `auto` has it


OURS = (
    Ours("ours"),
    Ours("ours, fused ops", fused=True),
    Ours("ours compiled", execution="compiled"),
    Ours("ours eager", execution="eager"),
    Ours("ours fp32", dtype=torch.float32),
    Ours("ours deterministic", deterministic=True),
    Ours("ours, plain SiT", aligned=False),
)
NAMES = (*(rung.name for rung in RUNGS), *(way.name for way in OURS))
CHECKED_BATCHES = (32, 64, 128, 256)
# Relative error of a batch's losses against fp32. fp32 differs by the order of additions (TF32 by its 10 bits), bf16 by
# its 8 bits in every product, nearly all of which a mean over the batch takes away (4e-4 seen).
GATE = {None: 1e-3, torch.float32: 1e-3, torch.float16: 2e-3, torch.bfloat16: 2e-3}


def make_config(size: str, tokens: int, batch: int) -> Config:
    """A SiT with patch 2 on 4-channel latents of that many tokens."""
    base = preset(f"sit-{size}-2")
    side = 2 * round(tokens**0.5)
    model = replace(base.model, input_size=side, channels=4, classes=1000)
    return replace(base, model=model, train=replace(base.train, batch=batch))


def make_batch(config: Config) -> Batch:
    """Random latents of unit variance, as scaled SD latents have, on the host."""
    generator = torch.Generator().manual_seed(0)
    batch, side = config.train.batch, config.model.input_size
    x = torch.randn(batch, config.model.channels, side, side, generator=generator)
    return Batch(x, torch.randint(config.model.classes, (batch,), generator=generator), torch.arange(batch))


class OurStep:
    """The project's own step with the state it needs.

    Args:
        config: with the model's sizes filled in.
        way: how to take it.
        device: where.
    """

    def __init__(self, config: Config, way: Ours, device: torch.device) -> None:
        if not way.aligned:
            config = replace(config, align=replace(config.align, method="none"))
        if way.fused:
            kernels = replace(config.kernels, default="fused", perturb=config.kernels.perturb or config.kernels.default)
            config = replace(config, kernels=kernels)
        config = replace(config, deterministic=way.deterministic)
        self.config, self.way, self.dtype, self.device = config, way, way.dtype, device
        self.resolved = resolve(config, Hardware(device, way.dtype))
        fastest = "graph" if device.type == "cuda" else "compiled"
        self.execution = choose_execution(way.execution or fastest, device)
        self.state = TrainState.create(config, Ops.select(self.resolved), device, way.dtype)
        self.step = TrainingStep(config, self.resolved, device)
        ring = MetricRing(8, device)
        self._run = StepRunner(self.step, self.state, ring, self.execution, self.resolved["attention"])

    @property
    def failure(self) -> str | None:
        """Why there is no CUDA graph although there should be one."""
        return self._run.failure

    def losses(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(velocity loss, alignment loss)."""
        weight = torch.full((), self.config.align.weight, device=self.device)
        with _deterministic(self.way.deterministic):
            return self.step.losses(self.state, *(tensor.to(self.device) for tensor in batch), weight)[1:]

    def __call__(self, batch: Batch) -> None:
        with _deterministic(self.way.deterministic):
            self._run(batch, self.config.optim.lr, self.config.align.weight)


@contextmanager
def _deterministic(wanted: bool) -> Iterator[None]:
    set_deterministic(wanted)
    try:
        yield
    finally:
        set_deterministic(False)


Step = PublicStep | OurStep


@contextmanager
def awake(step: Step) -> Iterator[None]:
    """The step with noise where initial weights are zero: there its blocks are the identity and its prediction is zero,
    whatever the times."""
    asleep = []
    for held in _public_tensors(step):
        for position, (name, tensor) in enumerate(held.items()):
            if name.endswith(ZERO):
                asleep.append(tensor)
                number = torch.tensor([position], device=tensor.device)
                tensor.copy_(0.1 * normals(1, number, Draw.WEIGHT, tensor.numel()).view_as(tensor))
    if isinstance(step, OurStep):
        step.state.refresh()
    try:
        yield
    finally:
        torch._foreach_zero_(asleep)
        if isinstance(step, OurStep):
            step.state.refresh()


def _public_tensors(step: Step) -> list[dict[str, Tensor]]:
    """Weights and EMA in place, by public name and in the public order."""
    if isinstance(step, OurStep):
        return [apart(step.state.weights), apart(step.state.ema)]
    return [{name: tensor.data for name, tensor in net.named_parameters()} for net in (step.model, step.ema)]


class Gate:
    """The fp32 reference's losses on a batch, to hold every step to."""

    def __init__(self, config: Config, batch: Batch, device: torch.device) -> None:
        self.batch = batch
        reference = OurStep(config, Ours("reference", execution="eager", dtype=torch.float32), device)
        with awake(reference), torch.no_grad():
            self.expected = [float(loss.detach()) for loss in reference.losses(batch)]
        x, labels, number = (tensor.to(device) for tensor in batch)
        diffusion_steps = DIFFUSION_STEPS if config.model.family == "dit" else None
        self.drawn = draw_ref(x, labels, number, reference.step.settings, diffusion_steps=diffusion_steps)

    def __call__(self, steps: dict[str, Step]) -> None:
        """Every step's losses from the same draws at the same weights.

        Raises:
            GateFailed: if one is not the reference's.
        """
        d = self.drawn
        for name, step in steps.items():
            with awake(step):
                ours = isinstance(step, OurStep)
                got = step.losses(self.batch) if ours else step.losses(d.x, d.noise, d.t, d.t_teacher, d.labels)
            tolerance = GATE[step.dtype]
            wanted = self.expected if step.config.align.method != "none" else self.expected[:1]
            for value, right in zip([float(loss.detach()) for loss in got], wanted, strict=False):
                if not abs(value - right) <= tolerance * abs(right):
                    said = f"loss {value:.5f}, reference {right:.5f}, tolerance {tolerance:.1%}"
                    raise timing.GateFailed(f"{name}: {said}")


def build(name: str, config: Config, device: torch.device) -> Step:
    """The step of that name."""
    for rung in RUNGS:
        if rung.name == name:
            return PublicStep(config, rung, device)
    return OurStep(config, next(way for way in OURS if way.name == name), device)


def call(step: Step, batch: Batch, device: torch.device) -> Callable[[], None]:
    """One step on the batch. Ours fetches it from the host every time, as in training; rivals find it on the device."""
    if isinstance(step, OurStep):
        return lambda: step(batch)
    x, labels = batch.x.to(device), batch.labels.to(device)
    return lambda: step(x, labels)


def groups(names: Sequence[str], interleave: str) -> list[list[str]]:
    """Which steps live at the same time and take turns: all; pairs, each with the first of ours; or none."""
    if interleave == "all" or len(names) == 1:
        return [list(names)]
    if interleave == "none":
        return [[name] for name in names]
    first = next((name for name in names if name.startswith("ours")), names[0])
    first = "ours" if "ours" in names else first
    return [[first, name] for name in names if name != first]


def possible(name: str, device: torch.device) -> bool:
    """Whether this device can take such a step at all."""
    needs_gpu = [rung.name for rung in RUNGS if rung.cudnn or rung.graph] + [way.name for way in OURS if way.fused]
    return device.type == "cuda" or name not in needs_gpu


def measure(
    config: Config, names: list[str], device: torch.device, *, repeats: int, warmup: int, interleave: str
) -> Iterator[dict[str, timing.Samples]]:
    """Samples of the steps so far, after each group that lived together. What cannot be had here, or does not fit, has
    an error instead."""
    taken = {name: timing.Samples(error="needs a GPU") for name in names if not possible(name, device)}
    batch = make_batch(config)
    gate = Gate(config, batch, device)
    here = [name for name in names if possible(name, device)]
    if not here:
        yield taken
        return
    for group in groups(here, interleave):
        steps: dict[str, Step] = {}
        for name in group:
            try:
                steps[name] = build(name, config, device)
            except torch.OutOfMemoryError as error:
                taken[name] = timing.Samples(error=f"out of memory ({str(error).splitlines()[0]})")
        try:
            found = timing.measure(
                {name: call(step, batch, device) for name, step in steps.items()},
                device=device,
                repeats=repeats,
                warmup=warmup,
                gate=lambda steps=steps: gate(steps),
            )
        except RuntimeError as error:  # of one of the group; the other groups go on
            found = {name: timing.Samples(error=f"failed ({str(error).splitlines()[0]})") for name in steps}
        for name, samples in found.items():
            if steps[name].failure:
                samples = timing.Samples(error=f"no CUDA graph: {steps[name].failure}")
            before = taken.get(name, timing.Samples())
            taken[name] = samples if not before.ms else before.joined(samples)
        steps.clear()
        found.clear()
        gc.collect()
        torch.compiler.reset()  # compiled code keeps networks alive, and a function may be compiled only so often
        if device.type == "cuda":
            torch.cuda.empty_cache()
        yield {name: taken[name] for name in names if name in taken}


def rows(
    config: Config, size: str, names: list[str], device: torch.device, *, repeats: int, warmup: int, interleave: str
) -> Iterator[list[timing.Row]]:
    """A row per step so far, again and again; ours and the rivals on the same batch."""
    torch.set_float32_matmul_precision("high")  # TF32 for fp32 products on a GPU, as the public code sets it
    for taken in measure(config, names, device, repeats=repeats, warmup=warmup, interleave=interleave):
        yield _rows(config, size, taken, device)


def _rows(config: Config, size: str, taken: dict[str, timing.Samples], device: torch.device) -> list[timing.Row]:
    stamp, roofs = timing.stamp(device), timing.roofs(device)
    images = config.train.batch
    plain = {way.name for way in OURS if not way.aligned}
    made = []
    for name, samples in taken.items():
        flops = images * training_flops(config.model, None if name in plain else config.taps[1])
        params = {"size": size, "tokens": config.model.tokens, "batch": images, "rung": name}
        if config.model.depth != SIZES[size][0]:
            params["depth"] = config.model.depth
        row = timing.row("step", params, samples, stamp=stamp, flops=flops, roofs=roofs)
        peak = dense_peak_flops(stamp["device"], "bf16")
        if samples.median_ms:
            row["images_per_s"] = 1e3 * images / samples.median_ms
            row["peak_share"] = flops / samples.median_ms * 1e3 / peak if peak else None
        made.append(row)
    return made


def interleave(chosen: argparse.Namespace, batch: int) -> str:
    """Which steps take turns, unless said: all on a CPU; on a GPU pairs, as long as two large steps fit into it."""
    if chosen.interleave != "auto":
        return chosen.interleave
    if chosen.device.type == "cpu":
        return "all"
    large = chosen.size in ("l", "xl") and batch * chosen.tokens > 64 * 256
    return "none" if large or chosen.batch == "auto-check" else "pairs"


def main(arguments: list[str] | None = None) -> int:
    """The program. Returns its exit code: 1 if the gate fails."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_step", description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=list(SIZES), default="xl")
    parser.add_argument("--tokens", type=int, choices=(256, 1024), default=256)
    parser.add_argument(
        "--batch", type=options.batch, default=32, help="local batch, or auto-check: which of 32 ... 256 fit"
    )
    parser.add_argument("--rungs", nargs="+", choices=NAMES, default=list(NAMES), metavar="RUNG", help=", ".join(NAMES))
    parser.add_argument("--interleave", choices=("auto", "all", "pairs", "none"), default="auto")
    parser.add_argument("--repeats", type=options.positive, default=20)
    parser.add_argument(
        "--warmup", type=options.positive, default=5, help="a CUDA graph is captured in the fourth step"
    )
    parser.add_argument("--device", type=options.device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--depth", type=options.depth, default=0, help="other than the size's, for a quick look; 0 = the size's"
    )
    chosen = parser.parse_args(arguments)
    set_deterministic(False)  # one of the steps will ask for more, too late for cuBLAS
    check = chosen.batch == "auto-check"
    device = chosen.device
    batches = CHECKED_BATCHES if check else (chosen.batch,)
    made: list[timing.Row] = []
    names = chosen.rungs
    results = f"step-{chosen.size}-{chosen.tokens}-{chosen.batch}"
    results += f"-depth{chosen.depth}" if chosen.depth else ""
    for batch in batches:
        config = make_config(chosen.size, chosen.tokens, batch)
        if chosen.depth:
            config = replace(config, model=replace(config.model, depth=chosen.depth))
        settings = {"repeats": chosen.repeats, "warmup": chosen.warmup}
        new: list[timing.Row] = []
        try:
            for new in rows(config, chosen.size, names, device, interleave=interleave(chosen, batch), **settings):
                stamp = timing.stamp(device)  # written again and again: whoever is short of time may stop it
                path = timing.write(timing.folder(stamp), results, made + new, stamp)
        except timing.GateFailed as failure:
            print(f"no number: {failure}")
            return 1
        made += new
        names = [row["params"]["rung"] for row in new if not row.get("error")]
        if not names:
            break
    print(timing.table(made))
    for row in made:
        if "images_per_s" in row:
            print(f"{row['params']['rung']:>28}  {row['params']['batch']:>4}  {row['images_per_s']:10.2f} images/s")
    print(f"raw samples in {path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
