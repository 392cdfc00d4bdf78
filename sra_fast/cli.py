"""The command line: parses options, calls the command and reports.

Options come from the dataclasses in config/, through tyro. torch is imported only after the options are parsed, so that
help and error messages come at once. Wrong input ends with one line and exit code 1.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
import re
import shutil
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import tyro

from sra_fast.config import (
    Config,
    EvaluateCommand,
    ExportCommand,
    InspectCommand,
    PrepareCommand,
    ProfileCommand,
    SampleCommand,
    from_dict,
    preset,
    to_dict,
)
from sra_fast.distributed import ElsewhereRefused, place
from sra_fast.errors import Refused, is_out_of_memory
from sra_fast.files import read_json, to_json

T = TypeVar("T")

NARROWEST = 20  # columns; tyro's help never ends in a terminal of less than 5


def train(arguments: Sequence[str]) -> int:
    """Train a preset: `sra-fast train PRESET [options]`."""
    name, options = _split_preset(arguments)
    config = _parse(Config, options, f"train {name}", preset(name))
    if config.run.dry_run:
        return _print_resolved(config)
    from sra_fast.training import trainer

    return trainer.train(config)


def sample(arguments: Sequence[str]) -> int:
    """Generate images: `sra-fast sample --weights FILE|RUN [options]`."""
    run = _run_of(arguments)
    defaults: dict[str, Any] = {"sample": run.sample} if run else {}
    command = _parse(SampleCommand, arguments, "sample", SampleCommand(weights=tyro.MISSING, **defaults))
    from sra_fast.tools.weights import sample

    sample(command)
    if place().rank == 0:
        print(f"{command.sample.count} {'latents' if command.latents else 'images'} in {command.out}")
    return 0


def evaluate(arguments: Sequence[str]) -> int:
    """Evaluate a run: `sra-fast evaluate --weights RUN [options]`."""
    run = _run_of(arguments)
    defaults = {"sample": run.sample, "evaluate": run.evaluate} if run else {}
    command = _parse(EvaluateCommand, arguments, "evaluate", EvaluateCommand(weights=tyro.MISSING, **defaults))
    if run is None:
        raise Refused("weights", command.weights, "must be a run: its images are needed too")
    from sra_fast.tools.weights import evaluate

    report = evaluate(command, run)
    print(to_json(report.as_dict(), indent=2), end="")
    failures = report.failures(command.evaluate)
    for failure in failures:
        print(f"threshold missed: {failure}", file=sys.stderr)
    return 1 if failures else 0


def export(arguments: Sequence[str]) -> int:
    """Write weights for other programs: `sra-fast export --weights RUN --out FILE`."""
    command = _parse(ExportCommand, arguments, "export")
    from sra_fast.tools.weights import export

    export(command)
    print(f"wrote {command.out}")
    return 0


def prepare(arguments: Sequence[str]) -> int:
    """Encode images into a packed set: `sra-fast prepare --images DIR|TARS --out DIR --vae PATH_OR_ID`."""
    command = _parse(PrepareCommand, arguments, "prepare")
    from sra_fast.packing.prepare import prepare

    prepare(command)
    return 0


def inspect(arguments: Sequence[str]) -> int:
    """Describe a data set and check it for damage: `sra-fast inspect DATA [options]`."""
    command = _parse(InspectCommand, arguments, "inspect")
    from sra_fast.tools.inspect import inspect

    return inspect(command)


def profile(arguments: Sequence[str]) -> int:
    """Report where the time of a training step goes: `sra-fast profile PRESET [options]`."""
    name, options = _split_preset(arguments)
    command = _parse(ProfileCommand, options, f"profile {name}", ProfileCommand(preset(name)))
    if command.config.run.dry_run:
        return _print_resolved(command.config)
    from sra_fast.tools.profile import profile

    return profile(command.config, command.profile)


def doctor(arguments: Sequence[str]) -> int:
    """Report what this machine has and what a run will use."""
    if list(arguments) in (["-h"], ["--help"]):
        print(f"usage: sra-fast doctor\n\n{doctor.__doc__} It takes no options.")
        return 0
    if arguments:
        raise Refused("doctor", " ".join(arguments), "takes no arguments")
    from sra_fast.tools.doctor import lines

    for line in lines():
        print(line)
    return 0


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "train": train,
    "sample": sample,
    "evaluate": evaluate,
    "export": export,
    "prepare": prepare,
    "inspect": inspect,
    "profile": profile,
    "doctor": doctor,
}


_SMALLER_NETWORK = "lower --train.batch, raise --train.accumulate, or choose a smaller preset"
LESS_MEMORY = {  # by command
    "train": _SMALLER_NETWORK,
    "profile": _SMALLER_NETWORK,
    "sample": "lower --sample.batch",
    "evaluate": "lower --sample.batch or --evaluate.samples",
    "export": "close other programs, or use a machine with more memory",
    "prepare": "lower --batch or --max-pixels",
    "inspect": "close other programs, or use a machine with more memory",
    "doctor": "close other programs",
}


def _mend_surroundings() -> None:
    """Open the streams that the parent process has closed, before another file takes their place; and refuse a current
    folder that was removed, for which libraries have no message."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            # It gets the lowest free descriptor, which is that of the stream.
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115
    if shutil.get_terminal_size().columns < NARROWEST:
        os.environ["COLUMNS"] = str(NARROWEST)
    try:
        os.getcwd()
    except OSError as error:
        raise Refused(f"the current folder cannot be used ({error.strerror}); change to another one") from error


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return the exit code.

    Args:
        arguments: the words of the command line; None = those of this process.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a name that the terminal cannot show must not end a command
            stream.reconfigure(errors="backslashreplace")
    name, *rest = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    try:
        if arguments is None:
            _mend_surroundings()
        if name in ("-h", "--help"):
            for command, function in COMMANDS.items():
                print(f"sra-fast {command:<9} {(function.__doc__ or '').strip()}")
            print("\nsra-fast COMMAND --help lists the options of a command.", flush=True)
            return 0
        if name not in COMMANDS:
            raise Refused("command", name, f"must be one of {', '.join(COMMANDS)}")
        return COMMANDS[name](rest)
    except ElsewhereRefused:  # the process that refused has said why
        return 1
    except Refused as error:
        print(f"sra-fast: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # the reader of our output has closed it, as in `sra-fast train --help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except ImportError as error:  # also of a library for which there is not enough memory
        print(f"sra-fast: {error.name or 'a library'} cannot be loaded ({_first_line(error)})", file=sys.stderr)
        return 1
    except (MemoryError, RuntimeError, OSError) as error:
        if is_out_of_memory(error):
            print(f"sra-fast: out of memory: {_first_line(error)}; {LESS_MEMORY[name]}", file=sys.stderr)
        elif isinstance(error, OSError):
            print(f"sra-fast: {error.filename or 'writing'}: {error.strerror or error}", file=sys.stderr)
        else:
            raise
        return 1
    except KeyboardInterrupt as error:
        print("sra-fast: interrupted", file=sys.stderr)
        return 128 + (error.args[0] if error.args else signal.SIGINT)
    finally:
        if arguments is None:  # an interrupt from here on ends the process at once, without a traceback of its exit
            signal.signal(signal.SIGINT, signal.SIG_DFL)


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _split_preset(arguments: Sequence[str]) -> tuple[str, list[str]]:
    """(name of the preset, options) of a command that begins with a preset."""
    name, *options = arguments or ["--help"]
    return ("digits", ["--help"]) if name in ("-h", "--help") else (name, options)


def _print_resolved(config: Config) -> int:
    """Print the configuration and what its automatic choices resolve to on this machine."""
    from sra_fast.hardware import Hardware
    from sra_fast.memory import refuse_training
    from sra_fast.model.backends import Backends

    hardware = Hardware.choose(config.train.device, config.train.precision, "train.device")
    refuse_training(config, hardware)
    backends = Backends.resolve(config, hardware)
    resolved = {
        "student_tap": config.taps[0],
        "teacher_tap": config.taps[1],
        "device": hardware.name,
        "precision": hardware.precision,
        "ops": backends.names,
        "execution": backends.execution,
        "notes": backends.notes,
    }
    print(json.dumps({**to_dict(config), "resolved": resolved}, indent=2))
    return 0


@dataclass(frozen=True)
class _WeightsOption:
    weights: str = ""


def _run_of(arguments: Sequence[str]) -> Config | None:
    """The configuration of the run that --weights names, if any: its settings are the defaults of other options."""
    parsed: Any = _parse(_WeightsOption, arguments, "", return_unknown_args=True, add_help=False)
    known, _ = parsed
    path = Path(known.weights) / "config.json"
    return from_dict(Config, read_json(path), str(path)) if known.weights and path.is_file() else None


def _parse(cls: type[T], arguments: Sequence[str], command: str, default: T | None = None, **options: Any) -> T:
    """Parse options into a dataclass.

    Args:
        default: values of the options that are not given; None = the defaults of the class.
        options: passed on to `tyro.cli`.

    Raises:
        Refused: instead of tyro's framed message.
        SystemExit: on --help.
    """
    if default is not None:
        options["default"] = default
    message = io.StringIO()
    try:
        with contextlib.redirect_stderr(message):
            return tyro.cli(cls, args=list(arguments), prog=f"sra-fast {command}", **options)
    except SystemExit as stop:
        if not stop.code:
            raise
        raise _find_refused(stop) or Refused(_one_line(message.getvalue(), arguments)) from None


def _find_refused(error: BaseException | None) -> Refused | None:
    """The refusal raised by a dataclass that tyro was building, if that is why tyro stopped."""
    while error is not None and not isinstance(error, Refused):
        error = error.__context__
    return error


def _one_line(message: str, arguments: Sequence[str]) -> str:
    """The text inside tyro's frame up to the first horizontal line, worded like our own refusals."""
    lines = []
    for line in message.splitlines()[1:]:
        text = line.strip("│╰╯ ")
        if text.startswith("─"):
            break
        lines.append(text)
    text = " ".join(lines).removeprefix("Error parsing --")
    unrecognized = text.removeprefix("Unrecognized options: ")
    for option, value in itertools.pairwise(arguments):
        if value == unrecognized != text and option.startswith("--"):  # a flag was given a value
            name = option.removeprefix("--")
            section, dot, last = name.rpartition(".")
            return f"{name}: {value!r} given; takes no value, only --{name} or --{section}{dot}no-{last}"
    choice = re.fullmatch(r"invalid choice (.+) for argument '--(.+)'\. Expected one of \((.+?),?\)\.", text)
    return f"{choice[2]}: {choice[1]} given; must be one of {choice[3]}" if choice else text


if __name__ == "__main__":
    sys.exit(main())
