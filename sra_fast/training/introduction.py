"""What a run is, said before it begins: model, data, device, and what computes each op."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from sra_fast.config import Config
from sra_fast.data.source import Source
from sra_fast.hardware import Hardware
from sra_fast.kernels import missing
from sra_fast.step.runner import EXECUTIONS


def introduction(
    config: Config, source: Source, parameters: int, hardware: Hardware, resolved: Mapping[str, str], execution: str
) -> Iterator[str]:
    """The lines.

    Args:
        config: of the run, with the model's sizes filled in.
        source: of its images.
        parameters: of the model.
        resolved: what computes each op, see model/choices.py.
        execution: one of `EXECUTIONS`.
    """
    model, align = config.model, config.align
    aligned = "without alignment"
    if align.method != "none":
        student, teacher = config.taps
        aligned = f"{align.method} from block {student} to block {teacher}, {align.distance} distance"
    yield f"model    {model.family}, {parameters / 1e6:.2f} M parameters, {model.tokens} tokens; {aligned}"
    images = f"{len(source.train):,} training and {len(source.held_out):,} held-out images"
    yield f"data     {images}, {model.classes} classes; {source.reader}"
    yield f"device   {hardware.name}, {hardware.precision}"
    yield f"ops      {', '.join(f'{op}: {choice}' for op, choice in resolved.items())}"
    if obstacle := missing("adamw_ema", hardware.architecture):
        yield f"         the optimizer runs as PyTorch operators: {obstacle}"
    yield f"step     {EXECUTIONS[execution]}"
