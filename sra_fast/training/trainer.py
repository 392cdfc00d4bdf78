"""The loop: next batch, step, log, validate, preview, save; and the end of a run."""

from __future__ import annotations

import dataclasses
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from sra_fast.config import Config, refuse_unless, to_dict
from sra_fast.data.source import open_source
from sra_fast.distributed import refuse_several_processes
from sra_fast.errors import Refused
from sra_fast.evaluation import evaluate as evaluation
from sra_fast.evaluation.evaluate import Report, prediction_only
from sra_fast.files import write_json
from sra_fast.hardware import Hardware, set_deterministic
from sra_fast.model.backends import resolve
from sra_fast.model.layout import apart, joined
from sra_fast.model.transformer import Ops, Transformer, around
from sra_fast.objective.alignment import alignment_weight
from sra_fast.sampling.decoding import image_decoder, latent_space
from sra_fast.sampling.generate import balanced_labels, generate
from sra_fast.sampling.images import grid_columns, save_grid, to_uint8
from sra_fast.step.runner import StepRunner, choose_execution
from sra_fast.step.state import HEAD, MOST_SKIPPED_IN_A_ROW, TrainState, learning_rate
from sra_fast.step.step import MetricRing, Metrics, TrainingStep
from sra_fast.training import checkpoint
from sra_fast.training.checkpoint import Progress
from sra_fast.training.introduction import introduction
from sra_fast.training.metrics import MetricsLog
from sra_fast.training.signals import StopRequest

VALIDATION_NUMBERS = 1 << 62  # image numbers of held-out images begin here, out of training's reach


class Trainer:
    """One run from its first image, or its checkpoint, to its last.

    Args:
        config: of the run.
        report: where lines for people go.

    Raises:
        Refused: on anything that keeps the run from starting; nothing has been written then.
    """

    def __init__(self, config: Config, report: Callable[[str], None] = print) -> None:
        self.report = report
        self.hardware = Hardware.choose(config.train.device, config.train.precision)
        if config.deterministic:
            set_deterministic(True)
        self.resolved = resolve(config, self.hardware)
        self.execution = choose_execution(config.train.execution, self.hardware.device)
        self.ops = Ops.select(self.resolved)
        self.source, self.config = open_source(config, self.hardware.device)
        self.step = TrainingStep(self.config, self.resolved, self.hardware.device, self.source.stored)
        self.folder = self.config.path
        self.checkpoints, self.summary = self.folder / "checkpoints", self.folder / "summary.json"
        self.space = latent_space(self.config, self.source)
        if config.evaluate.after_training:
            refuse_unless(
                self.source.holds_pixels, "evaluate.after-training", True, "must be False: latents cannot be judged"
            )
            model = self.config.model
            values = model.channels * model.input_size**2
            evaluation.check_inputs(values, model.classes, self.source.train, self.source.held_out)

    def run(self) -> int:
        """Train, evaluate, write the summary. Returns the exit code: 0, 1 below a bar, 128 + signal when stopped."""
        with checkpoint.locked(self.folder):
            self.state, self.progress = self._begin()
            count = sum(weight.numel() for weight in self.state.weights.values())
            for line in introduction(self.config, self.source, count, self.hardware, self.resolved, self.execution):
                self.report(line)
            write_json(self.folder / "config.json", to_dict(self.config))
            if self.space:
                self.space.write(self.folder)
            (self.folder / "samples").mkdir(exist_ok=True)
            self.summary.unlink(missing_ok=True)  # of a shorter run that goes on
            with closing(MetricsLog(self.folder, self.progress.images_seen)) as log, StopRequest() as stop:
                last = self._train(log, stop)
            if stop.signal:
                seen = f"{self.progress.images_seen:,} images"
                self.report(f"stopped and saved at {seen}; --run.name {self.config.run.name} goes on from here")
                return 128 + stop.signal
            return self._finish(last)

    # Beginning

    def _begin(self) -> tuple[TrainState, Progress]:
        config, device = self.config, self.hardware.device
        path = self._checkpoint_to_resume()
        state = TrainState.create(config, self.ops, device, self.hardware.dtype)
        if path is None:
            if config.init_from:
                self._initialise_from(state, Path(config.init_from))
            return state, Progress(data_fingerprint=self.source.fingerprint)
        tensors, progress = checkpoint.load(path, config, self.source.fingerprint, torch.device("cpu"))
        finished = progress.images_seen >= config.train.images and self.summary.exists()
        seen = f"{progress.images_seen:,} images"
        refuse_unless(
            not finished, "run.name", config.run.name, f"is finished ({seen}); choose another, or raise --train.images"
        )
        self.report(f"resuming from {path}")
        before = checkpoint.describe(path)[1].train.images
        if config.optim.schedule == "cosine" and config.train.images != before:
            self.report(
                f"train.images: {before:,} before, {config.train.images:,} now; the cosine schedule jumps there"
            )
        state.load(tensors)
        return state, progress

    def _checkpoint_to_resume(self) -> Path | None:
        resume, newest = self.config.resume, checkpoint.newest(self.checkpoints)
        if resume == "auto":
            return newest
        if resume == "never":
            refuse_unless(
                newest is None, "resume", resume, f"but {self.folder} has checkpoints; choose another --run.name"
            )
            return None
        chosen = Path(resume)
        refuse_unless(
            newest is None or newest.resolve() == chosen.resolve(),
            "resume",
            resume,
            f"but {self.folder} has newer or other checkpoints; choose another --run.name",
        )
        return chosen

    @torch.no_grad()
    def _initialise_from(self, state: TrainState, path: Path) -> None:
        weights = checkpoint.read_weights(path, "ema")
        for note in weights.notes:
            self.report(note)
        if weights.without_head:
            self.report("the projection head starts from its own initial weights")
        for name, own in apart(state.weights).items():
            given = weights.tensors.get(name)
            shape = None if given is None else tuple(given.shape)
            refuse_unless(shape == tuple(own.shape), f"init-from: {name}", shape, f"must be {tuple(own.shape)}")
        given = joined(weights.tensors)
        if weights.without_head:
            given |= {name: own for name, own in state.weights.items() if name.startswith(HEAD)}
        state.load({"weights": given, "ema": given})

    # The loop

    def _train(self, log: MetricsLog, stop: StopRequest) -> dict[str, Any]:
        """Steps until the last image or a signal, ending with a checkpoint. Returns the last line logged."""
        settings, batch = self.config.train, self.config.train.batch
        steps = -(-settings.images // batch)  # the last batch is a whole one
        ring, pending = MetricRing(settings.log_every_steps, self.hardware.device), 0
        runner = StepRunner(self.step, self.state, ring, self.execution, self.resolved["attention"])
        clock, last_save, row = _Clock(self.progress.train_s), time.monotonic(), {}
        replaced, saved_step = self.progress.replaced_images, self.progress.step

        def write_line(**more: float) -> None:
            nonlocal pending, row
            row = {**self._row(ring.last(pending), pending * batch / clock.lap_s()), **more}
            pending = 0
            log.write(row)
            bar.set_postfix(loss=f"{row['loss']:.3f}", refresh=False)
            self._refuse_divergence()

        def save() -> None:
            nonlocal last_save, saved_step
            if saved_step == self.progress.step:
                return
            if pending:  # a checkpoint ends a line, so that a resumed run writes the same ones
                write_line()
            with clock.aside():
                self._save()
            last_save, saved_step = time.monotonic(), self.progress.step

        stream = self.source.stream(self.config, self.progress.images_seen, self.progress.undecodable_files)
        with stream, self._progress_bar(steps * batch) as bar:
            while self.progress.step < steps and not stop.signal:
                try:
                    data = next(stream)
                except Refused:  # the data has given out; what was learned until then is worth keeping
                    save()
                    raise
                seen = self.progress.images_seen
                weight = alignment_weight(self.config.align, seen // len(self.source.train))
                runner(data, learning_rate(self.config, seen), weight)
                pending += 1
                self._advance(batch, clock.total_s(), replaced + stream.replaced, dict(stream.bad))
                bar.update(batch)
                if self.progress.step == steps or self._due(settings.validate_every_images):
                    with clock.aside():
                        loss = self._validation_loss()
                    write_line(validation_velocity_loss=loss)
                elif self.progress.step % settings.log_every_steps == 0:
                    write_line()
                minutes = (time.monotonic() - last_save) / 60
                if self._due(settings.save_every_images) or minutes > settings.save_every_minutes:
                    save()
                if self.progress.step < steps and self._due(settings.preview_every_images):  # the last is _finish's
                    with clock.aside():
                        self._preview()
            save()
        return row

    def _progress_bar(self, images: int) -> tqdm:
        # A terminal gets a live bar, a log file a line every ten seconds.
        return tqdm(
            total=images,
            initial=self.progress.images_seen,
            desc=self.config.run.name,
            unit="img",
            unit_scale=True,
            mininterval=0.2 if sys.stderr.isatty() else 10.0,
        )

    def _advance(self, images: int, train_s: float, replaced: int, bad: dict[str, str]) -> None:
        self.progress = replace(
            self.progress,
            images_seen=self.progress.images_seen + images,
            step=self.progress.step + 1,
            train_s=train_s,
            replaced_images=replaced,
            undecodable_files=bad,
        )

    def _due(self, every_images: int) -> bool:
        """Whether the step just made crossed a multiple of `every_images`; 0 = never."""
        seen, batch = self.progress.images_seen, self.config.train.batch
        return every_images > 0 and seen // every_images > (seen - batch) // every_images

    def _row(self, metrics: list[Metrics], images_per_s: float) -> dict[str, Any]:
        """One line of metrics.jsonl: losses and norm averaged over the finite steps since the last line."""
        finite = [row for row in metrics if math.isfinite(row.grad_norm)]
        names = ("loss", "velocity_loss", "alignment_loss", "grad_norm")
        means = {
            name: sum(getattr(row, name) for row in finite) / len(finite) if finite else math.nan for name in names
        }
        return {
            "step": self.progress.step,
            "images_seen": self.progress.images_seen,
            **means,
            "lr": metrics[-1].lr,
            "ema_decay": metrics[-1].ema_decay,
            "images_per_s": images_per_s,
            "skipped_steps": int(self.state.skipped_steps),
        }

    def _refuse_divergence(self) -> None:
        skipped = int(self.state.skipped_in_a_row)
        if skipped >= MOST_SKIPPED_IN_A_ROW:
            raise Refused(
                f"training: {skipped} steps in a row had a gradient norm that is not finite; the run has diverged"
            )

    def _save(self) -> None:
        checkpoint.save(self.checkpoints, self.state, self.config, self.progress)
        checkpoint.prune(self.checkpoints, self.config.train.keep_checkpoints, self.config.train.keep_every_images)

    # Looking at the EMA

    def _average(self) -> Transformer:
        """The EMA as an fp32 network, sharing the state's tensors."""
        ops = Ops.select({**self.resolved, "attention": "sdpa"})  # the training's backend may not know fp32
        return around(self.config.model, self.state.ema, ops)

    @cached_property
    def _validation_images(self) -> tuple[Tensor, Tensor]:
        """Held-out images and labels, spread evenly over the classes' order."""
        count = min(self.config.train.validation_images, len(self.source.held_out))
        rows = np.linspace(0, len(self.source.held_out) - 1, count).astype(np.int64)
        return self.source.load(self.source.held_out.take(rows))

    @torch.no_grad()
    def _validation_loss(self) -> float:
        """Generative loss of the EMA on held-out images with their labels, at the same noise and times every time."""
        x, labels = self._validation_images
        number = torch.arange(len(x), device=x.device) + VALIDATION_NUMBERS
        model, total = self._average(), 0.0
        for part in zip(x.split(64), labels.split(64), number.split(64), strict=True):
            noised, _, _ = self.step.perturb(*part)
            prediction, _ = model(noised.x_t, noised.t, part[1])
            total += float(self.step.objective.loss(prediction, noised)) * len(part[0])
        return total / len(x)

    @cached_property
    def _image_maker(self) -> Callable[[Tensor], Tensor]:
        return image_decoder(self.space, self.hardware.device)

    def _preview(self) -> None:
        """A PNG grid of samples, a column per class where there are few."""
        c, device = self.config, self.hardware.device
        labels = balanced_labels(c.sample.count, c.model.classes).to(device)
        indices = torch.arange(c.sample.count, device=device)
        predict = prediction_only(self._average())
        path = self.folder / "samples" / f"{self.progress.images_seen:012d}.png"
        try:
            make_images = self._image_maker
            samples = generate(predict, labels, indices, config=c.sample, model=c.model, path=c.objective.path)
            save_grid(path, to_uint8(make_images(samples)), grid_columns(c.sample.count, c.model.classes))
        # Samples of a young network may overflow, a VAE may be missing or too large: no reason to end the training.
        except (Refused, torch.OutOfMemoryError) as error:
            print(f"no preview: {(str(error) or 'out of memory').splitlines()[0]}", file=sys.stderr)

    # The end

    def _finish(self, last: dict[str, Any]) -> int:
        """Preview, evaluation and summary. Returns the exit code."""
        self._preview()
        if not last:  # nothing was left to train: stopped between the last checkpoint and the summary
            last = {"velocity_loss": None, "alignment_loss": None, "validation_velocity_loss": self._validation_loss()}
        report = self._evaluate() if self.config.evaluate.after_training else None
        figures = report.as_dict() if report else dict.fromkeys(field.name for field in dataclasses.fields(Report))
        summary: dict[str, Any] = {
            "images_seen": self.progress.images_seen,
            "train_s": self.progress.train_s,
            "images_per_s": self.progress.images_seen / self.progress.train_s,
            **{name: last[name] for name in ("velocity_loss", "alignment_loss", "validation_velocity_loss")},
            **figures,
            "evaluated_samples": self.config.evaluate.samples if report else None,
            "frechet_features": "pixels in [0, 1]" if report else None,
            "device": self.hardware.name,
            "resolved": {**self.resolved, "step": self.execution},
            "skipped_steps": int(self.state.skipped_steps),
            "replaced_images": self.progress.replaced_images,
            "undecodable_files": self.progress.undecodable_files,
        }
        write_json(self.summary, summary)
        for name, value in summary.items():
            if isinstance(value, int | float):
                self.report(f"{name:>26}  {value:,.4f}" if isinstance(value, float) else f"{name:>26}  {value:,}")
        self.report(f"samples, metrics and checkpoints are in {self.folder}")
        failures = report.failures(self.config.evaluate) if report else []
        for failure in failures:
            print(f"below the bar: {failure}", file=sys.stderr)
        return 1 if failures else 0

    def _evaluate(self) -> Report:
        c = self.config
        with tqdm(total=2 * c.evaluate.samples, desc="evaluating", unit="img", disable=None) as bar:
            return evaluation.evaluate(
                self._average(),
                self.source.pixels(self.source.train),
                self.source.pixels(self.source.held_out),
                model=c.model,
                path=c.objective.path,
                sample=c.sample,
                config=c.evaluate,
                progress=bar.update,
            )


class _Clock:
    """Time spent training: in all, and since the last lap without what was set aside (validation, previews, saving)."""

    def __init__(self, before_s: float) -> None:
        self._begun = time.monotonic() - before_s
        self._lap = time.monotonic()

    def total_s(self) -> float:
        return time.monotonic() - self._begun

    def lap_s(self) -> float:
        """Seconds since the last call."""
        now = time.monotonic()
        elapsed, self._lap = now - self._lap, now
        return elapsed

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Time in here does not count towards the lap."""
        begun = time.monotonic()
        yield
        self._lap += time.monotonic() - begun


def train(config: Config, report: Callable[[str], None] = print) -> int:
    """Train as `config` says. Returns the exit code."""
    refuse_several_processes()
    return Trainer(config, report).run()
