"""A training run: start or resume, the loop (next batch, step, log, validate, save, preview), and the end."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sra_fast.config import DIGITS_FOLDER, Config, to_dict
from sra_fast.data import class_names
from sra_fast.data.digits import write_digits
from sra_fast.data.source import open_source
from sra_fast.distributed import ALONE, World, join
from sra_fast.errors import Damaged, Refused, is_out_of_memory
from sra_fast.evaluation.evaluate import Report, check_inputs, evaluate
from sra_fast.files import write_json
from sra_fast.hardware import Hardware, set_deterministic
from sra_fast.memory import refuse_training
from sra_fast.model.backends import EXECUTIONS, Backends
from sra_fast.model.initial import initial_weights
from sra_fast.model.layout import from_public, to_public
from sra_fast.model.transformer import Transformer
from sra_fast.objective.alignment import alignment_weight
from sra_fast.progress import Progress, say, silent
from sra_fast.sampling.decoding import latent_space
from sra_fast.step.runner import StepRunner
from sra_fast.step.start import start
from sra_fast.step.state import HEAD, TrainState, learning_rate
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
    """Train as `config` says, together with the other processes of the launcher. Returns the exit code."""
    hardware = Hardware.choose(config.train.device, config.train.precision, "train.device")
    with join(hardware.device) as world:
        return Trainer(config, report if world.is_first else lambda line: None, world).run()


class Trainer:
    """One run, from its first image or its checkpoint to its last image.

    Of several processes, the first one decides, speaks and writes.

    Args:
        config: of the run.
        report: called with lines for the user.
        world: the processes of the run.

    Raises:
        Refused: if the run cannot start; nothing has been written then.
    """

    def __init__(self, config: Config, report: Callable[[str], None] = say, world: World = ALONE) -> None:
        self.report, self.world = report, world
        with silent(not world.is_first):
            world.together(lambda: self._choose_device(config))
            if config.data.images == DIGITS_FOLDER:
                world.first(lambda: write_digits(Path(DIGITS_FOLDER)))
            world.together(lambda: self._open(config))

    def _choose_device(self, config: Config) -> None:
        """Refuse what this machine, or this number of processes, cannot do."""
        self.hardware = Hardware.choose(config.train.device, config.train.precision, "train.device")
        if config.deterministic:
            set_deterministic(True)
        Backends.resolve(config, self.hardware)  # refuses what is not available
        self.split = config.train.on(self.world.size)
        if config.deterministic and self.world.size > 1 and config.train.reduction == "fast":
            rule = "needs --train.reduction ordered, and a --train.micro-batch, on several processes"
            raise Refused("deterministic", True, rule)

    def _open(self, config: Config) -> None:
        """Open the data and check the configuration against it."""
        self.source, self.config = open_source(config, self.hardware.device)
        refuse_training(dataclasses.replace(self.config, train=self.split), self.hardware, self.world.size)
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
        with ExitStack() as stack:
            self.world.first(lambda: stack.enter_context(run_folder.locked(self.folder)))
            self.state, self.progress = self._start()
            for line in self._introduction():
                self.report(line)
            file = self.world.together(self._write_head)
            with closing(file) if file else nullcontext(), StopRequest() as stop:
                last_row, stopped_by = self._train(file, stop)
            if stopped_by:
                images = self.progress.images_seen
                stopped = f"stopped and saved at {images:,} images" if images else "stopped before the first step"
                self.report(f"{stopped}; to continue: the same command with --run.name {self.config.run.name}")
                return 128 + stopped_by
            return self._finish(last_row)

    # Start

    def _write_head(self) -> MetricsFile | None:
        """What a run's folder has from the beginning, and its file of metrics; nothing on other processes."""
        if not self.world.is_first:
            return None
        write_json(self.folder / "config.json", to_dict(self.config))
        class_names.write(self.folder, self.source.train.classes)
        if self.space:
            self.space.write(self.folder)
        (self.folder / "samples").mkdir(exist_ok=True)
        self.summary.unlink(missing_ok=True)  # of a shorter run that this one continues
        return MetricsFile(self.folder, self.progress.images_seen)

    def _start(self) -> tuple[TrainState, RunProgress]:
        """A new state, or the one of the checkpoint to resume from."""
        config = self.config
        path = self.world.first(self._checkpoint_to_resume)
        if path is None:
            state = self._create_state(None)
            if config.init_from:
                weights = self.world.together(lambda: self._weights_to_start_from(state, Path(config.init_from)))
                state.load({"weights": weights, "ema": weights})
            return state, RunProgress(data_fingerprint=self.source.fingerprint)
        tensors, progress = self.world.together(lambda: self._load(path))
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

    def _load(self, path: Path) -> tuple[dict[str, Any], RunProgress]:
        """Tensors and progress of a checkpoint."""
        try:
            return checkpoint.load(path, self.config, self.source.fingerprint, torch.device("cpu"))
        except Damaged as error:
            older = [other for other in run_folder.complete(self.checkpoints) if other < path]
            cure = f"; to go on from {older[-1]}, remove {path}" if older else ""
            raise Refused(f"{error}{cure}") from error

    def _create_state(self, before: Config | None) -> TrainState:
        """Decide what computes each op, by the configuration of the checkpoint to resume from or by measurement; then
        the step and its initial state."""
        split = dataclasses.replace(self.config, train=self.split)
        decided = self.world.first(lambda: decide(split, self.hardware, self.report, self.source.stored, before))
        self.config = dataclasses.replace(decided, train=self.config.train)
        self.backends = Backends.resolve(self.config, self.hardware)
        if self.world.size > 1 and self.backends.execution == "graph":
            note = "step: several processes run the compiled step without a CUDA graph"
            self.backends = dataclasses.replace(self.backends, execution="compiled", notes=(*self.backends.notes, note))
        state, self.step = start(
            self.config, self.backends, self.hardware.device, self.hardware.dtype, self.world, self.source.stored
        )
        self.validation = Validation(self.config, self.source, self.step)
        return state

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

    def _weights_to_start_from(self, state: TrainState, path: Path) -> dict[str, Tensor]:
        """Weights of a file, under the names in memory."""
        if not path.exists():
            rule = "there is no such run, checkpoint or file of weights"
            raise Refused("init-from", self.config.init_from, rule)
        try:
            weights = run_folder.read_weights(path, "ema", self.config.weights_family)
        except Refused as error:
            raise Refused(f"init-from: {error}") from error
        for note in weights.notes:
            self.report(note)
        for name, own in to_public(dict(state.student.named_parameters())).items():
            shape = tuple(weights.tensors[name].shape) if name in weights.tensors else None
            if shape != tuple(own.shape):
                raise Refused(f"init-from: {name}", shape, f"must be {tuple(own.shape)}")
        tensors = from_public(weights.tensors)
        if weights.without_head:
            self.report("the projection head starts from its own initial weights")
            initial = from_public(initial_weights(self.config.model, self.config.run.seed, torch.device("cpu")))
            tensors |= {name: own for name, own in initial.items() if name.startswith(HEAD)}
        return tensors

    def _introduction(self) -> Iterator[str]:
        """What the run is: model, data, device, and what computes each op."""
        model, align, source = self.config.model, self.config.align, self.source
        parameters = sum(parameter.numel() for parameter in self.state.student.parameters())
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
        if self.world.size > 1:
            batch, parts = self.config.train.batch // self.world.size, self.step.parts_per_process
            split = f"{self.world.size} processes of {batch:,} images in {parts:,} micro-batches of {batch // parts:,}"
            held = "each with its share of the state" if self.state.shard else "all with the whole state"
            yield f"batch    {self.config.train.batch:,} images: {split}; {self.config.train.reduction} sums, {held}"

    # The loop

    def _train(self, file: MetricsFile | None, stop: StopRequest) -> tuple[dict[str, Any], int]:
        """Steps until the last image or a signal to any process, then a checkpoint. Returns (the last row of metrics,
        the signal or 0).

        Args:
            file: of metrics, on the first process.
        """
        config, batch_size = self.config, self.config.train.batch
        steps = -(-config.train.images // batch_size)  # the last batch is a full one
        clock = Clock(self.progress.train_s)
        log = StepLog(file, config, self.state, clock, self.world)
        saver = Saver(self.checkpoints, config, self.progress, self.world, self.hardware.device)
        runner = StepRunner(self.step, self.state, log.ring, self.backends.execution)
        replaced_before = self.progress.replaced_images

        def save() -> None:
            # A resumed run then writes the same lines as one that was never stopped.
            log.write(self.progress, **saver.stalls())
            with clock.paused():
                self.progress = self._merged(replaced_before)
                saver.save(self.state, self.progress)

        seen, known = self.progress.images_seen, self.progress.undecodable_files
        stream = self.source.stream(config, seen, known, self.world)
        bar = Progress(steps * batch_size, config.run.name, done=seen, hidden=not self.world.is_first)
        is_resumed = 0 < self.progress.step < steps
        if is_resumed and self.previews.due(self.progress.images_seen) and not self._preview_path.exists():
            self._preview()  # the run was killed between a checkpoint and its preview
        with closing(saver), stream, bar:
            while True:
                stopped_by, has_failed = self.world.largest(stop.signal, saver.has_failed)
                if has_failed:
                    saver.finish()
                if stopped_by or self.progress.step >= steps:
                    break
                with self._saving_on_error(save):
                    batch = next(stream)
                images_seen = self.progress.images_seen
                weight = alignment_weight(config.align, epoch=images_seen // len(self.source.train))
                try:
                    runner(batch, learning_rate(config, images_seen), weight)
                except (MemoryError, RuntimeError) as error:
                    if is_out_of_memory(error) and self._is_between_steps() and self.world.size == 1:
                        save()
                    raise
                log.add_step(len(batch.x))
                self.progress = dataclasses.replace(
                    self.progress,
                    images_seen=images_seen + batch_size,
                    step=self.progress.step + 1,
                    train_s=clock.total_s(),
                    replaced_images=replaced_before + stream.replaced,  # of this process
                    undecodable_files=dict(stream.bad),
                )
                bar.update(batch_size)

                is_last = self.progress.step == steps
                if is_last or self.validation.due(self.progress.images_seen):
                    with clock.paused(), self._saving_on_error(save):
                        loss = self.validation.loss(self._ema_network(), self.world)
                    log.write(self.progress, validation_velocity_loss=loss, **saver.stalls())
                    bar.set_postfix(loss=f"{log.last_row['loss']:.3f}")
                elif log.due(self.progress):
                    log.write(self.progress, **saver.stalls())
                    bar.set_postfix(loss=f"{log.last_row['loss']:.3f}")
                (is_due,) = self.world.largest(saver.due(self.progress))
                if is_due:
                    save()
                if not is_last and self.previews.due(self.progress.images_seen):  # `_finish` writes the last one
                    with clock.paused(), self._saving_on_error(save):
                        self._preview()
            save()
            saver.finish()
        return log.last_row, stopped_by

    def _is_between_steps(self) -> bool:
        """Whether the state is that of the last step counted, untouched by a step that failed."""
        return int(self.state.adam_step) + int(self.state.skipped_steps) == self.progress.step

    @property
    def _preview_path(self) -> Path:
        return self.folder / "samples" / f"{self.progress.images_seen:012d}.png"

    def _preview(self) -> None:
        network = self._ema_network()
        if self.world.is_first:
            self.previews.write(network, self._preview_path)
        self.world.barrier()

    def _ema_network(self) -> Transformer:
        """The EMA as a network that computes as training does, from a copy; or in fp32, sharing the state's tensors. A
        collective."""
        dtype, ema = self.hardware.dtype, self.state.whole("ema")
        if dtype == torch.float32 or self.config.train.validation_precision == "fp32":
            return Transformer.from_tensors(self.config.model, ema, self.backends.for_fp32())
        copies = {name: tensor.to(dtype) for name, tensor in ema.items()}
        return Transformer.from_tensors(self.config.model, copies, self.backends)

    def _merged(self, replaced_before: int) -> RunProgress:
        """The progress with what all processes have met in the data. A collective.

        Args:
            replaced_before: replaced images before this process began.
        """
        if self.world.size == 1:
            return self.progress
        own = self.progress.replaced_images - replaced_before, self.progress.undecodable_files
        everything = self.world.gather(own)
        files: dict[str, str] = {}
        for _, bad in everything:
            files |= bad
        replaced = replaced_before + sum(count for count, _ in everything)
        return dataclasses.replace(self.progress, replaced_images=replaced, undecodable_files=files)

    @contextmanager
    def _saving_on_error(self, save: Callable[[], None]) -> Iterator[None]:
        """For what happens between two steps: if it fails, whatever the reason, save what was learned before stopping.
        With several processes, of which the others do not save, nothing is saved."""
        try:
            yield
        except Exception:
            if self.world.size == 1:
                save()
            raise

    # The end

    def _finish(self, last_row: dict[str, Any]) -> int:
        """Preview, evaluation and summary. Returns the exit code."""
        self._preview()
        network = self._ema_network()
        if not last_row:  # stopped between the last checkpoint and the summary: there was nothing left to train
            loss = self.validation.loss(network, self.world)
            last_row = {"velocity_loss": None, "alignment_loss": None, "validation_velocity_loss": loss}
        if not self.world.is_first:
            return 0
        report = self._evaluate(network) if self.config.evaluate.after_training else None
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

    def _evaluate(self, network: Transformer) -> Report:
        config = self.config
        with Progress(2 * config.evaluate.samples, "evaluating") as bar:
            return evaluate(
                network,
                self.source.pixels(self.source.train),
                self.source.pixels(self.source.held_out),
                model=config.model,
                path=config.objective.path,
                sample=config.sample,
                config=config.evaluate,
                progress=bar.update,
            )
