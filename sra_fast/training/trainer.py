"""A training run: start or resume, the loop (next batch, step, log, validate, save, preview), and the end."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import torch

from sra_fast.config import Config, to_dict
from sra_fast.data import class_names
from sra_fast.data.source import open_source
from sra_fast.distributed import refuse_several_processes
from sra_fast.errors import Damaged, Refused, is_out_of_memory
from sra_fast.evaluation.evaluate import Report, check_inputs, evaluate
from sra_fast.files import write_json
from sra_fast.hardware import Hardware, set_deterministic
from sra_fast.memory import refuse_training
from sra_fast.model.backends import EXECUTIONS, Backends
from sra_fast.model.layout import from_public, to_public
from sra_fast.model.transformer import Transformer
from sra_fast.objective.alignment import alignment_weight
from sra_fast.progress import Progress, say
from sra_fast.sampling.decoding import latent_space
from sra_fast.step.runner import StepRunner
from sra_fast.step.state import HEAD, TrainState, learning_rate
from sra_fast.step.step import TrainingStep
from sra_fast.training import checkpoint, run_folder
from sra_fast.training.checkpoint import RunProgress
from sra_fast.training.metrics import MetricsFile, StepLog
from sra_fast.training.rhythm import Clock
from sra_fast.training.run_folder import Saver
from sra_fast.training.signals import StopRequest
from sra_fast.training.validation import Previews, Validation
from sra_fast.tuning.choice import decide
from sra_fast.tuning.precision import advice


def train(config: Config, report: Callable[[str], None] = say) -> int:
    """Train as `config` says. Returns the exit code."""
    refuse_several_processes()
    return Trainer(config, report).run()


class Trainer:
    """One run, from its first image or its checkpoint to its last image.

    Args:
        config: of the run.
        report: called with lines for the user.

    Raises:
        Refused: if the run cannot start; nothing has been written then.
    """

    def __init__(self, config: Config, report: Callable[[str], None] = say) -> None:
        self.report = report
        self.hardware = Hardware.choose(config.train.device, config.train.precision, "train.device")
        if config.deterministic:
            set_deterministic(True)
        Backends.resolve(config, self.hardware)  # refuses what is not available
        self.source, self.config = open_source(config, self.hardware.device)
        refuse_training(self.config, self.hardware)
        self.space = latent_space(self.config, self.source)
        self.previews = Previews(self.config, self.space, self.hardware.device)
        self.folder = self.config.path
        images = Path(config.data.images)
        if config.data.images and self.folder.resolve().is_relative_to(images.resolve()):
            raise Refused("run.dir", config.run.dir, f"must not be inside {images}, where it would look like a class")
        self.checkpoints, self.summary = self.folder / "checkpoints", self.folder / "summary.json"
        if config.evaluate.after_training:
            if not self.source.holds_pixels:
                raise Refused("evaluate.after-training", True, "must be False: latents cannot be judged")
            model = self.config.model
            values = model.channels * model.input_size**2
            check_inputs(values, model.classes, self.source.train, self.source.held_out)

    def run(self) -> int:
        """Train, evaluate, write the summary. Returns the exit code: 0, 1 below a threshold, 128 + a signal."""
        with run_folder.locked(self.folder):
            self.state, self.progress = self._start()
            for line in self._introduction():
                self.report(line)
            write_json(self.folder / "config.json", to_dict(self.config))
            class_names.write(self.folder, self.source.train.classes)
            if self.space:
                self.space.write(self.folder)
            (self.folder / "samples").mkdir(exist_ok=True)
            self.summary.unlink(missing_ok=True)  # of a shorter run that this one continues
            with closing(MetricsFile(self.folder, self.progress.images_seen)) as file, StopRequest() as stop:
                last_row = self._train(file, stop)
            if stop.signal:
                images = self.progress.images_seen
                stopped = f"stopped and saved at {images:,} images" if images else "stopped before the first step"
                self.report(f"{stopped}; to continue: the same command with --run.name {self.config.run.name}")
                return 128 + stop.signal
            return self._finish(last_row)

    # Start

    def _start(self) -> tuple[TrainState, RunProgress]:
        """A new state, or the one of the checkpoint to resume from."""
        config = self.config
        path = self._checkpoint_to_resume()
        if path is None:
            state = self._create_state(None)
            if config.init_from:
                self._initialise_from(state, Path(config.init_from))
            return state, RunProgress(data_fingerprint=self.source.fingerprint)
        try:
            tensors, progress = checkpoint.load(path, config, self.source.fingerprint, torch.device("cpu"))
        except Damaged as error:
            older = [other for other in run_folder.complete(self.checkpoints) if other < path]
            cure = f"; to go on from {older[-1]}, remove {path}" if older else ""
            raise Refused(f"{error}{cure}") from error
        if config.init_from:
            self.report(f"init-from: {config.init_from} is not read, because the run resumes")
        if progress.images_seen >= config.train.images and self.summary.exists():
            seen = f"{progress.images_seen:,} images"
            raise Refused("run.name", config.run.name, f"is finished ({seen}); choose another, or raise --train.images")
        self.report(f"resuming from {path}")
        before = checkpoint.describe(path)[1]
        if config.optim.schedule == "cosine" and config.train.images != before.train.images:
            lengths = f"{before.train.images:,} before, {config.train.images:,} now"
            self.report(f"train.images: {lengths}; the learning rate of the cosine schedule jumps here")
        state = self._create_state(before)
        state.load(tensors)
        return state, progress

    def _create_state(self, before: Config | None) -> TrainState:
        """Decide what computes each op, by the configuration of the checkpoint to resume from or by measurement; then
        the step and its initial state."""
        self.config = decide(self.config, self.hardware, self.report, self.source.stored, before)
        self.backends = Backends.resolve(self.config, self.hardware)
        self.step = TrainingStep(self.config, self.backends, self.hardware.device, self.source.stored)
        self.validation = Validation(self.config, self.source, self.step)
        return TrainState.create(self.config, self.backends, self.hardware.device, self.hardware.dtype)

    def _checkpoint_to_resume(self) -> Path | None:
        resume, newest = self.config.resume, run_folder.newest(self.checkpoints)
        if resume == "auto":
            return newest
        if resume == "never":
            if newest:
                raise Refused("resume", resume, f"but {self.folder} has checkpoints; choose another --run.name")
            return None
        if newest and newest.resolve() != Path(resume).resolve():
            rule = f"but {self.folder} has newer or other checkpoints; choose another --run.name"
            raise Refused("resume", resume, rule)
        if not (Path(resume) / "state.json").is_file():
            raise Refused("resume", resume, "must be auto, never, or the folder of a checkpoint")
        return Path(resume)

    def _initialise_from(self, state: TrainState, path: Path) -> None:
        """Load weights and EMA from a file of weights."""
        if not path.exists():
            rule = "there is no such run, checkpoint or file of weights"
            raise Refused("init-from", self.config.init_from, rule)
        try:
            weights = run_folder.read_weights(path, "ema", self.config.weights_family)
        except Refused as error:
            raise Refused(f"init-from: {error}") from error
        for note in weights.notes:
            self.report(note)
        for name, own in to_public(state.weights).items():
            shape = tuple(weights.tensors[name].shape) if name in weights.tensors else None
            if shape != tuple(own.shape):
                raise Refused(f"init-from: {name}", shape, f"must be {tuple(own.shape)}")
        tensors = from_public(weights.tensors)
        if weights.without_head:
            self.report("the projection head starts from its own initial weights")
            tensors |= {name: own for name, own in state.weights.items() if name.startswith(HEAD)}
        state.load({"weights": tensors, "ema": tensors})

    def _introduction(self) -> Iterator[str]:
        """What the run is: model, data, device, and what computes each op."""
        model, align, source = self.config.model, self.config.align, self.source
        parameters = sum(weight.numel() for weight in self.state.weights.values())
        aligned = "without alignment"
        if align.method != "none":
            student, teacher = self.config.taps
            aligned = f"{align.method} from block {student} to block {teacher}, {align.distance} distance"
        yield f"model    {model.family}, {parameters / 1e6:.2f} M parameters, {model.tokens} tokens; {aligned}"
        images = f"{len(source.train):,} training and {len(source.held_out):,} held-out images"
        yield f"data     {images}, {model.classes} classes; {source.reader}"
        yield f"classes  {class_names.numbered(source.train.classes)}"
        hint = advice(self.hardware.precision) if self.hardware.device.type == "cpu" else ""
        hint = f" ({hint})" if hint else ""
        yield f"device   {self.hardware.name}, {self.hardware.precision}{hint}"
        yield f"ops      {', '.join(f'{op}: {name}' for op, name in self.backends.names.items())}"
        for note in self.backends.notes:
            yield f"         {note}"
        yield f"step     {EXECUTIONS[self.backends.execution]}"

    # The loop

    def _train(self, file: MetricsFile, stop: StopRequest) -> dict[str, Any]:
        """Steps until the last image or a signal, then a checkpoint. Returns the last row of metrics."""
        config, batch_size = self.config, self.config.train.batch
        steps = -(-config.train.images // batch_size)  # the last batch is a full one
        clock = Clock(self.progress.train_s)
        log = StepLog(file, config, self.state, clock)
        saver = Saver(self.checkpoints, config, self.progress)
        runner = StepRunner(self.step, self.state, log.ring, self.backends.execution)
        replaced_before = self.progress.replaced_images

        def save() -> None:
            log.write(self.progress)  # a resumed run then writes the same lines as one that was never stopped
            with clock.paused():
                saver.save(self.state, self.progress)

        stream = self.source.stream(config, self.progress.images_seen, self.progress.undecodable_files)
        bar = Progress(steps * batch_size, config.run.name, done=self.progress.images_seen)
        is_resumed = 0 < self.progress.step < steps
        if is_resumed and self.previews.due(self.progress.images_seen) and not self._preview_path.exists():
            self._preview()  # the run was killed between a checkpoint and its preview
        with stream, bar:
            while self.progress.step < steps and not stop.signal:
                with _saving_on_error(save):
                    batch = next(stream)
                images_seen = self.progress.images_seen
                weight = alignment_weight(config.align, epoch=images_seen // len(self.source.train))
                try:
                    runner(batch, learning_rate(config, images_seen), weight)
                except (MemoryError, RuntimeError) as error:
                    if is_out_of_memory(error) and self._is_between_steps():
                        save()
                    raise
                log.add_step()
                self.progress = dataclasses.replace(
                    self.progress,
                    images_seen=images_seen + batch_size,
                    step=self.progress.step + 1,
                    train_s=clock.total_s(),
                    replaced_images=replaced_before + stream.replaced,
                    undecodable_files=dict(stream.bad),
                )
                bar.update(batch_size)

                is_last = self.progress.step == steps
                if is_last or self.validation.due(self.progress.images_seen):
                    with clock.paused(), _saving_on_error(save):
                        loss = self.validation.loss(self._ema_network())
                    log.write(self.progress, validation_velocity_loss=loss)
                    bar.set_postfix(loss=f"{log.last_row['loss']:.3f}")
                elif log.due(self.progress):
                    log.write(self.progress)
                    bar.set_postfix(loss=f"{log.last_row['loss']:.3f}")
                if saver.due(self.progress):
                    save()
                if not is_last and self.previews.due(self.progress.images_seen):  # `_finish` writes the last one
                    with clock.paused(), _saving_on_error(save):
                        self._preview()
            save()
        return log.last_row

    def _is_between_steps(self) -> bool:
        """Whether the state is that of the last step counted, untouched by a step that failed."""
        return int(self.state.adam_step) + int(self.state.skipped_steps) == self.progress.step

    @property
    def _preview_path(self) -> Path:
        return self.folder / "samples" / f"{self.progress.images_seen:012d}.png"

    def _preview(self) -> None:
        self.previews.write(self._ema_network(), self._preview_path)

    def _ema_network(self) -> Transformer:
        """The EMA as a network that computes as training does, from a copy; or in fp32, sharing the state's tensors."""
        dtype, ema = self.hardware.dtype, self.state.ema
        if dtype == torch.float32 or self.config.train.validation_precision == "fp32":
            return Transformer.from_tensors(self.config.model, ema, self.backends.for_fp32())
        copies = {name: tensor.to(dtype) for name, tensor in ema.items()}
        return Transformer.from_tensors(self.config.model, copies, self.backends)

    # The end

    def _finish(self, last_row: dict[str, Any]) -> int:
        """Preview, evaluation and summary. Returns the exit code."""
        self._preview()
        if not last_row:  # stopped between the last checkpoint and the summary: there was nothing left to train
            last_row = {
                "velocity_loss": None,
                "alignment_loss": None,
                "validation_velocity_loss": self.validation.loss(self._ema_network()),
            }
        report = self._evaluate() if self.config.evaluate.after_training else None
        figures = report.as_dict() if report else dict.fromkeys(field.name for field in dataclasses.fields(Report))
        summary: dict[str, Any] = {
            "images_seen": self.progress.images_seen,
            "train_s": self.progress.train_s,
            "images_per_s": self.progress.images_seen / (self.progress.train_s or math.inf),
            **{name: last_row[name] for name in ("velocity_loss", "alignment_loss", "validation_velocity_loss")},
            **figures,
            "evaluated_samples": self.config.evaluate.samples if report else None,
            "frechet_features": "pixels in [0, 1]" if report else None,
            "device": self.hardware.name,
            "resolved": self.backends.summary(),
            "skipped_steps": int(self.state.skipped_steps),
            "replaced_images": self.progress.replaced_images,
            "undecodable_files": self.progress.undecodable_files,
        }
        write_json(self.summary, summary)
        for name, value in summary.items():
            if isinstance(value, int | float):
                self.report(f"{name:>26}  {value:,.4f}" if isinstance(value, float) else f"{name:>26}  {value:,}")
        self.report(f"samples, metrics and checkpoints are in {self.folder}")
        if not int(self.state.adam_step):
            raise Refused("training: no step had a finite gradient norm, and the weights are the initial ones")
        failures = report.failures(self.config.evaluate) if report else []
        for failure in failures:
            print(f"threshold missed: {failure}", file=sys.stderr)
        return 1 if failures else 0

    def _evaluate(self) -> Report:
        config = self.config
        with Progress(2 * config.evaluate.samples, "evaluating") as bar:
            return evaluate(
                self._ema_network(),
                self.source.pixels(self.source.train),
                self.source.pixels(self.source.held_out),
                model=config.model,
                path=config.objective.path,
                sample=config.sample,
                config=config.evaluate,
                progress=bar.update,
            )


@contextmanager
def _saving_on_error(save: Callable[[], None]) -> Iterator[None]:
    """For what happens between two steps: if it fails, whatever the reason, save what was learned before stopping."""
    try:
        yield
    except Exception:
        save()
        raise
