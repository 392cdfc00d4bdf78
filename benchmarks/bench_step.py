"""Whole training steps: the public recipe, its variants, and ours, interleaved in one process.

    python -m benchmarks.bench_step --size xl --batch 32
    python -m benchmarks.bench_step --size xl --batch 256 --interleave none             steps too large to live together
    python -m benchmarks.bench_step --size xl --batch auto-check --rungs ours public    which batches fit
    python -m benchmarks.bench_step --size s --batch 8 --rungs public ours "ours fp32"  a CPU

FLOPs are those of sra_fast/flops.py (2 per multiply-add; student three forwards, teacher to its tap), whatever a step
really computes. A step has no number if its losses disagree with the reference, or if it should be a CUDA graph and is
not.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from benchmarks.harness import options
from benchmarks.harness.roofs import roofs
from benchmarks.harness.rows import Row, folder, row, stamp, write
from benchmarks.harness.tables import finish
from benchmarks.rivals.recipe import RUNGS, PublicStep
from sra_fast.config import SIZES, Config
from sra_fast.data.stream import Batch
from sra_fast.errors import Refused
from sra_fast.flops import dense_peak_flops, training_flops
from sra_fast.hardware import Hardware, set_deterministic
from sra_fast.kernels.philox import Draw, normals
from sra_fast.model.backends import Backends
from sra_fast.model.initial import ZERO
from sra_fast.model.layout import to_public
from sra_fast.step.ring import MetricRing
from sra_fast.step.runner import StepRunner
from sra_fast.step.state import TrainState
from sra_fast.step.step import TrainingStep
from sra_fast.tuning.choice import decide
from sra_fast.tuning.timing import GateFailed, Samples, measure


@dataclass(frozen=True)
class Ours:
    """A way to execute the project's own step."""

    name: str
    execution: str = ""  # '' = the fastest: a graph on a GPU, compiled on a CPU
    dtype: torch.dtype = torch.bfloat16
    aligned: bool = True
    deterministic: bool = False
    fused: bool = False  # use every kernel of the network and the loss; else what `auto` chooses


OURS = (
    Ours("ours"),
    Ours("ours, fused ops", fused=True),
    Ours("ours compiled", execution="compiled"),
    Ours("ours eager", execution="eager"),
    Ours("ours fp32", dtype=torch.float32),
    Ours("ours deterministic", deterministic=True),
    Ours("ours, plain SiT", aligned=False),
)
NAMES = (*(rung.name for rung in RUNGS), *(variant.name for variant in OURS))
GPU_ONLY = (*(rung.name for rung in RUNGS if rung.cudnn or rung.graph), *(v.name for v in OURS if v.fused))
CHECKED_BATCHES = (32, 64, 128, 256)
# Relative error of a batch's losses against fp32. fp32 differs by the order of additions (TF32 by its 10 bits), bf16 by
# its 8 bits in every product, nearly all of which averages out over the batch (4e-4 seen).
TOLERANCE = {None: 1e-3, torch.float32: 1e-3, torch.float16: 2e-3, torch.bfloat16: 2e-3}


def make_batch(config: Config) -> Batch:
    """Random latents of unit variance, as scaled SD latents have, on the host."""
    generator = torch.Generator().manual_seed(0)
    batch, side = config.train.batch, config.model.input_size
    x = torch.randn(batch, config.model.channels, side, side, generator=generator)
    return Batch(x, torch.randint(config.model.classes, (batch,), generator=generator), torch.arange(batch))


class OurStep:
    """The project's own step with the state it needs."""

    def __init__(self, config: Config, variant: Ours, device: torch.device) -> None:
        fastest = "graph" if device.type == "cuda" else "compiled"
        execution = variant.execution or fastest
        config = replace(config, deterministic=variant.deterministic, train=replace(config.train, execution=execution))
        if not variant.aligned:
            config = replace(config, align=replace(config.align, method="none"))
        if variant.fused:
            perturb = config.kernels.perturb or config.kernels.default
            config = replace(config, kernels=replace(config.kernels, default="fused", perturb=perturb))
        hardware = Hardware(device, variant.dtype)
        config = decide(config, hardware, print)
        self.config, self.variant, self.dtype, self.device = config, variant, variant.dtype, device
        backends = Backends.resolve(config, hardware)
        self.state = TrainState.create(config, backends, device, variant.dtype)
        self.step = TrainingStep(config, backends, device)
        self._run = StepRunner(self.step, self.state, MetricRing(8, device), backends.execution)

    @property
    def failure(self) -> str | None:
        """Why the step is not a CUDA graph although it should be."""
        return self._run.failure

    def losses(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(velocity loss, alignment loss)."""
        weight = torch.full((), self.config.align.weight, device=self.device)
        _, generative, alignment = self.step.losses(self.state, on_device(batch, self.device), weight)
        return generative, alignment

    def __call__(self, batch: Batch) -> None:
        set_deterministic(self.variant.deterministic)
        try:
            self._run(batch, self.config.optim.lr, self.config.align.weight)
        finally:
            set_deterministic(False)


def on_device(batch: Batch, device: torch.device) -> Batch:
    """The batch on a device."""
    return Batch(*(tensor.to(device) for tensor in batch))


Step = PublicStep | OurStep


def add_noise(step: Step) -> None:
    """Put noise in place of initial weights that are zero: with them blocks are the identity and the prediction is zero
    whatever the times, and the gate would see no difference."""
    if isinstance(step, OurStep):
        networks = [to_public(step.state.weights), to_public(step.state.ema)]
    else:
        networks = [{name: tensor.data for name, tensor in net.named_parameters()} for net in (step.model, step.ema)]
    for tensors in networks:  # both in the public order
        for position, (name, tensor) in enumerate(tensors.items()):
            if name.endswith(ZERO):
                number = torch.tensor([position], device=tensor.device)
                tensor.copy_(0.1 * normals(1, number, Draw.WEIGHT, tensor.numel()).view_as(tensor))
    if isinstance(step, OurStep):
        step.state.refresh_copies()


class Gate:
    """The fp32 reference's losses on a batch, which every step must reproduce for the same draws and weights."""

    def __init__(self, config: Config, batch: Batch, device: torch.device) -> None:
        reference = OurStep(config, Ours("reference", execution="eager", dtype=torch.float32), device)
        add_noise(reference)
        self.batch, self.noised = batch, reference.step.perturb(on_device(batch, device))
        with torch.no_grad():
            self.expected = [float(loss) for loss in reference.losses(batch)]

    def __call__(self, name: str, step: Step) -> None:
        """Raise `GateFailed` if the step's losses differ."""
        losses = step.losses(self.batch) if isinstance(step, OurStep) else step.losses(self.noised)
        tolerance = TOLERANCE[step.dtype]
        compared = 2 if step.config.align.method != "none" else 1
        for loss, right in list(zip(losses, self.expected, strict=True))[:compared]:
            value = float(loss.detach())
            if not abs(value - right) <= tolerance * abs(right):  # NaN fails too
                raise GateFailed(f"{name}: loss {value:.5f}, reference {right:.5f}, tolerance {tolerance:.1%}")


def build(name: str, config: Config, device: torch.device) -> Step:
    """The step of that name."""
    variant = next(variant for variant in (*RUNGS, *OURS) if variant.name == name)
    step = OurStep(config, variant, device) if isinstance(variant, Ours) else PublicStep(config, variant, device)
    add_noise(step)
    return step


def groups(names: Sequence[str], interleave: str) -> list[list[str]]:
    """Which steps live at the same time and take turns: all; pairs, each with the first of ours; or none."""
    if interleave == "all" or len(names) == 1:
        return [list(names)]
    if interleave == "none":
        return [[name] for name in names]
    ours = [name for name in names if name.startswith("ours")]
    first = "ours" if "ours" in names else (ours or names)[0]
    return [[first, name] for name in names if name != first]


def measure_steps(
    config: Config, names: Sequence[str], device: torch.device, *, repeats: int, warmup: int, interleave: str
) -> Iterator[dict[str, Samples]]:
    """Samples of all steps so far, after each group that lived together. A step that is unavailable, fails the gate or
    in any other way, or does not fit has an error instead."""
    taken = {name: Samples(error="needs a GPU") for name in names if device.type != "cuda" and name in GPU_ONLY}
    available = [name for name in names if name not in taken]
    batch = make_batch(config)
    gate = Gate(config, batch, device)
    for group in groups(available, interleave) if available else [[]]:
        for name, samples in _measure_group(group, config, batch, gate, device, repeats, warmup).items():
            taken[name] = taken[name].joined(samples) if name in taken and taken[name].ms else samples
        gc.collect()
        torch.compiler.reset()  # compiled code keeps networks alive, and a function may be compiled only so often
        if device.type == "cuda":
            torch.cuda.empty_cache()
        yield {name: taken[name] for name in names if name in taken}


def _measure_group(
    group: Sequence[str], config: Config, batch: Batch, gate: Gate, device: torch.device, repeats: int, warmup: int
) -> dict[str, Samples]:
    steps: dict[str, Step] = {}
    taken: dict[str, Samples] = {}
    for name in group:
        try:
            step = build(name, config, device)
            gate(name, step)
        except Refused as error:  # a kernel that this machine lacks
            taken[name] = Samples(error=str(error))
        except GateFailed as error:
            taken[name] = Samples(error=f"disagrees with the reference: {error}")
        except torch.OutOfMemoryError as error:
            taken[name] = Samples(error=f"out of memory ({str(error).splitlines()[0]})")
        except RuntimeError as error:
            taken[name] = Samples(error=_failed(error))
        else:
            steps[name] = step
    # Ours copies the batch from the host every time, as in training; rivals find it on the device.
    there = on_device(batch, device)
    calls = {name: partial(step, batch if isinstance(step, OurStep) else there) for name, step in steps.items()}
    try:
        taken |= measure(calls, device=device, repeats=repeats, warmup=warmup) if calls else {}
    except RuntimeError as error:  # ends this group only
        taken |= {name: Samples(error=_failed(error)) for name in steps}
    failures = {name: step.failure for name, step in steps.items() if step.failure}
    return taken | {name: Samples(error=f"no CUDA graph: {failure}") for name, failure in failures.items()}


def _failed(error: RuntimeError) -> str:
    return f"failed ({(str(error) or type(error).__name__).splitlines()[0]})"


def make_rows(config: Config, size: str, taken: dict[str, Samples], device: torch.device) -> list[Row]:
    """Rows of measured steps, with roofs and circumstances of this moment."""
    now = stamp(device)
    dtypes = {name: products_of(name, device) for name in taken}
    limits = {dtype: roofs(device, dtype) for dtype in set(dtypes.values())}
    images = config.train.batch
    plain = [variant.name for variant in OURS if not variant.aligned]
    rows = []
    for name, samples in taken.items():
        dtype = dtypes[name]
        peak = dense_peak_flops(now["device"], "bf16" if dtype == torch.bfloat16 else "tf32")
        flops = images * training_flops(config.model, None if name in plain else config.taps[1])
        params = {"size": size, "tokens": config.model.tokens, "batch": images, "rung": name}
        if config.model.depth != SIZES[size][0]:
            params["depth"] = config.model.depth
        rows.append(row("step", params, samples, stamp=now, flops=flops, roofs=limits[dtype]))
        if samples.median_ms:
            rows[-1]["images_per_s"] = 1e3 * images / samples.median_ms
            rows[-1]["peak_share"] = flops / samples.median_ms * 1e3 / peak if peak else None
    return rows


def products_of(name: str, device: torch.device) -> torch.dtype:
    """The dtype of a step's matrix products, whose roof is its own. The roofs of fp16 are those of bf16; on a GPU the
    public recipe computes the student in fp16, three quarters of all products."""
    if variant := next((variant for variant in OURS if variant.name == name), None):
        return variant.dtype
    (rung,) = (rung for rung in RUNGS if rung.name == name)
    return torch.bfloat16 if rung.bf16_teacher or device.type == "cuda" else torch.float32


def choose_interleave(args: argparse.Namespace, batch: int) -> str:
    """--interleave auto: all steps on a CPU; on a GPU pairs if two such steps fit into memory."""
    if args.interleave != "auto":
        return args.interleave
    if args.device.type == "cpu":
        return "all"
    is_large = args.size in ("l", "xl") and batch * args.tokens > 64 * 256
    return "none" if is_large or args.batch == "auto-check" else "pairs"


def main(arguments: Sequence[str] | None = None) -> int:
    """The program. Returns its exit code: 1 if a step fails the gate."""
    parser = options.parser("bench_step", __doc__, needs_device=True)
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
    parser.add_argument("--depth", type=options.depth, default=0, help="blocks, for a quick look; 0 = the size's")
    args = parser.parse_args(arguments)
    torch.set_float32_matmul_precision("high")  # TF32 for fp32 products on a GPU, as the public code sets it
    set_deterministic(False)  # cuBLAS reads its workspace setting at start-up, before a deterministic step asks for it
    name = f"step-{args.size}-{args.tokens}-{args.batch}" + (f"-depth{args.depth}" if args.depth else "")
    rows: list[Row] = []
    rungs = args.rungs
    for batch in CHECKED_BATCHES if args.batch == "auto-check" else (args.batch,):
        config = options.sit(args.size, args.tokens, batch, args.depth)
        how = {"repeats": args.repeats, "warmup": args.warmup, "interleave": choose_interleave(args, batch)}
        latest: list[Row] = []
        for taken in measure_steps(config, rungs, args.device, **how):
            latest, now = make_rows(config, args.size, taken, args.device), stamp(args.device)
            path = write(folder(now), name, rows + latest, now)  # after each group: a kill costs only one
        rows += latest
        rungs = [row["params"]["rung"] for row in latest if not row.get("error")]
        if not rungs:
            break
    return finish(rows, path)


if __name__ == "__main__":
    raise SystemExit(main())
