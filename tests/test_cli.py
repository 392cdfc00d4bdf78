"""The command line: one line and exit code 1 for every wrong input, help for every field."""

from __future__ import annotations

import dataclasses
import os
import re
import signal
import subprocess
import sys
import typing
from unittest import mock

import pytest
import torch
from small_run import arguments, metrics, strict_json, summary, write_images

from sra_fast import cli, config
from sra_fast.config import PRESETS, Config, from_dict
from sra_fast.data.folder import scan, split


def files(root):
    return sorted(str(path.relative_to(root)) for path in root.rglob("*"))


DRY = ["train", "digits", "--run.dry-run"]  # if a refusal is missing, nothing is trained
WRONG = [
    (["tran", "digits"], "command: 'tran' given; must be one of train, sample"),
    (["train", "sit-s-3"], "preset: 'sit-s-3' given"),
    (["train", "--train.images", "9"], "preset: '--train.images' given"),
    ([*DRY, "--optim.schedule", "step"], "optim.schedule: 'step' given; must be one of"),
    ([*DRY, "--data.channels", "2"], "data.channels: '2' given; must be one of"),
    ([*DRY, "--train.batches", "8"], "Unrecognized options: --train.batches, 8"),
    ([*DRY, "more"], "run.dry-run: 'more' given; takes no value"),
    ([*DRY, "--train.batch"], "Missing value for argument '--train.batch'"),
    ([*DRY, "--train.images", "many"], "train.images: invalid literal for int() with base 10: 'many'"),
    ([*DRY, "--optim.lr", "fast"], "optim.lr: could not convert string to float: 'fast'"),
    ([*DRY, "--optim.lr", "nan"], "optim.lr: nan given; must be a finite number"),
    ([*DRY, "--optim.lr", "-1"], "optim.lr: -1.0 given; must be positive"),
    ([*DRY, "--train.batch", "10", "--train.accumulate", "3"], "train.batch: 10 given; must be a multiple"),
    ([*DRY, "--align.student-tap", "5"], "align.student-tap: 5 given; must be below align.teacher-tap = 4"),
    ([*DRY, "--sample.sampler", "ddim"], "sample.sampler: 'ddim' given; must be one of auto, euler, heun, sde for"),
    (["profile", "sit-s-3"], "preset: 'sit-s-3' given"),
    (["profile", "digits", "--profile.steps", "-1"], "profile.steps: -1 given; must be positive"),
    (["sample"], "Missing from sra-fast sample: --weights"),
    (["sample", "--weights"], "Missing value for argument '--weights'. Expected 1 values."),
    (["sample", "--weights", "nowhere"], "weights: 'nowhere' given"),
    (["sample", "--weights", "nowhere", "--weights-key", "raw"], "weights-key: 'raw' given; must be one of"),
    (["sample", "--weights", "nowhere", "--sample.count", "0"], "sample.count: 0 given; must be positive"),
    (["sample", "--weights", "nowhere", "--grid", "-1"], "grid: -1 given; must not be negative"),
    (["evaluate", "--weights", "nowhere"], "weights: 'nowhere' given; must be a run"),
    (["export", "--weights", "nowhere"], "Missing from sra-fast export: --out"),
    (["export", "--weights", "nowhere", "--out", "a.bin"], "out: 'a.bin' given; must end in .safetensors or .pt"),
    (["export", "--weights", "nowhere", "--out", "b/a.pt"], "out: 'b/a.pt' given; the folder b does not exist"),
    (["export", "--weights", "nowhere", "--out", "a.pt"], "weights: 'nowhere' given"),
    (["export", "--weights", "nowhere", "--out", "a.safetensors"], "weights: 'nowhere' given"),
    (["doctor", "me"], "doctor: 'me' given; takes no arguments"),
]


@pytest.mark.parametrize(
    ("words", "expected"), WRONG, ids=[" ".join(word for word in words if word not in DRY) for words, _ in WRONG]
)
def test_wrong_input_is_refused_in_one_line_that_names_the_option(words, expected, refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = refused(words)
    assert line.startswith(f"sra-fast: {expected}")
    assert not set("│╭╮╰╯─") & set(line)
    assert files(tmp_path) == []


@pytest.mark.parametrize("dry_run", [[], ["--run.dry-run"]])
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        pytest.param(
            ["--train.device", "cuda"],
            "train.device: 'cuda' given",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
        (["--kernels.gated-residual", "fused"], "kernels.gated_residual: 'fused' given"),
    ],
)
def test_what_this_machine_lacks_is_refused(words, expected, dry_run, refused, root):
    assert expected in refused(arguments(root, *words, *dry_run))
    assert not (root / "runs").exists()


def test_a_launcher_that_counts_machines_is_refused_with_the_cure(refused, root, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "torchrun --nnodes WORLD_SIZE --node-rank RANK" in refused(arguments(root))
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert "there is no MASTER_ADDR and MASTER_PORT; start with torchrun or srun" in refused(arguments(root))
    assert not (root / "runs").exists()


PROGRAM = """
import sys
from sra_fast.cli import main
code = main(["train", "digits", "--optim.lr", "x"])
assert not {"torch", "numpy"} & set(sys.modules), "help and refusals must come at once"
sys.exit(code)
"""


def test_the_program_exits_with_1_before_torch_is_imported(tmp_path):
    result = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert (result.returncode, result.stderr.count("\n")) == (1, 1), result.stderr
    assert result.stderr.startswith("sra-fast: optim.lr: ")


@pytest.mark.parametrize("folder", ["", "missing"])
def test_a_folder_without_images_is_refused(root, refused, folder):
    line = refused(arguments(root, data__images=folder and str(root / folder)))
    assert "data.images: " in line
    assert folder in line
    assert not (root / "runs").exists()


def test_an_undecodable_image_is_named_and_counted(root, main):
    name = split(scan(root / "data"), 0.2)[0].files[0]
    (root / "data" / name).write_bytes(b"no image")
    code, _, error = main(arguments(root, data__max_bad_share=0.05, train__images=160))
    assert code == 0
    assert error.count(f"{name}: undecodable") == 1
    written = summary(root / "runs/a")
    assert list(written["undecodable_files"]) == [name]
    assert written["replaced_images"] >= 2  # once in each of the first two epochs


def test_a_model_that_does_not_fit_the_images_is_refused(root, refused):
    assert "model.classes: 7 given; must be 4" in refused(arguments(root, model__classes=7))


@pytest.mark.parametrize(
    ("command", "name", "taps"),
    [("train", "digits", (1, 4)), ("train", "dit-b-4-paper", (3, 7)), ("profile", "sit-xl-2", (8, 20))],
)
def test_a_dry_run_prints_what_would_run_and_writes_nothing(main, tmp_path, monkeypatch, command, name, taps):
    monkeypatch.chdir(tmp_path)
    code, output, error = main([command, name, "--run.dry-run", "--train.batch", "64", "--train.device", "cpu"])
    assert (code, error) == (0, "")
    printed = strict_json(output)
    resolved = printed.pop("resolved")
    base = PRESETS[name]
    assert from_dict(Config, printed, "dry run") == dataclasses.replace(
        base,
        run=dataclasses.replace(base.run, dry_run=True),
        train=dataclasses.replace(base.train, batch=64, device="cpu"),
    )
    assert (resolved["student_tap"], resolved["teacher_tap"]) == taps
    ops = resolved["ops"]
    assert (ops.pop("attention"), resolved["execution"], resolved["device"]) == ("sdpa", "eager", "cpu")
    assert set(ops) == {field.name for field in dataclasses.fields(config.KernelsConfig)} - {"default", "retune"}
    assert set(ops.values()) <= {"fused", "reference"}
    assert files(tmp_path) == []


def options(cls, prefix=""):
    """The options of all fields below a dataclass, without hyphens."""
    hints = typing.get_type_hints(cls)
    for name in (field.name for field in dataclasses.fields(cls)):
        if dataclasses.is_dataclass(hints[name]):
            yield from options(hints[name], "" if hints[name] is Config else f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}".replace("_", "-")


@pytest.mark.parametrize(
    ("words", "cls"),
    [
        ("train", Config),
        ("train digits", Config),
        ("sample", config.SampleCommand),
        ("evaluate", config.EvaluateCommand),
        ("export", config.ExportCommand),
        ("prepare", config.PrepareCommand),
        ("inspect", config.InspectCommand),
        ("profile digits", config.ProfileCommand),
    ],
)
def test_help_lists_every_option(words, cls, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as stop:
        cli.main([*words.split(), "--help"])
    assert not stop.value.code
    words = set(re.split(r"[\s,|]+", capsys.readouterr().out))
    for option in options(cls):
        section, _, name = option.rpartition(".")
        flag = f"--{section}.no-{name}" if section else f"--no-{name}"
        assert {f"--{option}", flag, option.upper()} & words, option  # in capitals: a positional argument


def test_help_lists_the_commands(main):
    code, output, _ = main([])
    assert code == 0
    assert all(f"sra-fast {name}" in output for name in cli.COMMANDS)


def test_doctor_has_a_help(main):
    code, output, _ = main(["doctor", "--help"])
    assert (code, output.startswith("usage: sra-fast doctor")) == (0, True)


LACKS = [
    MemoryError(),
    RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    torch.OutOfMemoryError("CUDA out of memory."),
]


@pytest.mark.parametrize("lack", LACKS, ids=lambda lack: type(lack).__name__)
@pytest.mark.parametrize(("command", "cure"), [("sample", "--sample.batch"), ("prepare", "--batch")])
def test_a_lack_of_memory_is_one_line_that_says_what_to_lower(refused, monkeypatch, command, cure, lack):
    monkeypatch.setitem(cli.COMMANDS, command, mock.Mock(side_effect=lack))
    line = refused([command])
    assert line.startswith("sra-fast: out of memory: ")
    assert f"lower {cure}" in line


INTERRUPTED = """
import os, signal, sys, threading, time
from sra_fast import cli

def command(arguments):
    threading.Thread(target=time.sleep, args=(30,)).start()  # what a process waits for when it ends
    raise KeyboardInterrupt

cli.COMMANDS["doctor"] = command
sys.argv = ["sra-fast", "doctor"]
threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGINT)).start()
sys.exit(cli.main())
"""


def test_a_second_interrupt_ends_the_process_without_a_traceback():
    result = subprocess.run([sys.executable, "-c", INTERRUPTED], capture_output=True, text=True, timeout=20)
    assert (result.returncode, result.stderr) == (-signal.SIGINT, "sra-fast: interrupted\n")


def test_names_that_a_terminal_cannot_show_end_no_command(tmp_path):
    """After the work is done, its report must not fail."""
    write_images(tmp_path / "été", count=40)
    (tmp_path / "été/c0").rename(tmp_path / "été/c\udcff")
    environment = {"PYTHONIOENCODING": "ascii:strict", "PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1"}
    words = arguments(tmp_path, data__images=str(tmp_path / "été"), train__images=8)
    command = [sys.executable, "-m", "sra_fast.cli", *words]
    result = subprocess.run(command, capture_output=True, env=environment, cwd=tmp_path)
    assert (result.returncode, result.stderr.count(b"Traceback")) == (0, 0), result.stderr
    assert b"3 c\\udcff" in result.stdout


@pytest.mark.parametrize("redirection", ["2>&-", ">&- 2>&- <&-"])
def test_closed_streams_end_no_command_and_no_file_takes_their_place(root, redirection):
    command = f"{sys.executable} -m sra_fast.cli {' '.join(arguments(root))} {redirection}"
    assert (
        subprocess.run(
            command, shell=True, stdout=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"}
        ).returncode
        == 0
    )
    assert summary(root / "runs/a")["images_seen"] == 80
    assert len(metrics(root / "runs/a")) == 10


def test_a_current_folder_that_is_gone_is_refused(tmp_path):
    (tmp_path / "gone").mkdir()
    command = f"cd {tmp_path}/gone && rmdir {tmp_path}/gone && {sys.executable} -m sra_fast.cli train digits"
    result = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert (result.returncode, result.stderr.count("\n")) == (1, 1)
    assert "the current folder cannot be used" in result.stderr


def test_help_ends_in_the_narrowest_terminal():
    command = [sys.executable, "-m", "sra_fast.cli", "train", "--help"]
    result = subprocess.run(command, capture_output=True, env={**os.environ, "COLUMNS": "1"}, timeout=60)
    assert result.returncode == 0


def test_training_goes_on_when_nobody_reads_what_it_prints(root):
    command = f"{sys.executable} -m sra_fast.cli {' '.join(arguments(root))} | true"
    result = subprocess.run(command, shell=True, stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert result.stderr == b""
    assert summary(root / "runs/a")["images_seen"] == 80


def test_help_on_a_full_disk_is_one_line():
    result = subprocess.run(f"{sys.executable} -m sra_fast.cli > /dev/full", shell=True, stderr=subprocess.PIPE)
    assert (result.returncode, result.stderr) == (1, b"sra-fast: writing: No space left on device\n")


def test_a_library_that_cannot_be_loaded_is_one_line(refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "sra_fast.tools.doctor", None)
    assert "sra_fast.tools.doctor cannot be loaded" in refused(["doctor"])


def test_an_interrupt_during_the_start_is_silent():
    code = "import signal, sys; from sra_fast import start; sys.modules['tyro'] = None; sys.meta_path.insert(0, sys)\n"
    code += "sys.find_spec = lambda name, *_: signal.raise_signal(signal.SIGINT) if name == 'sra_fast.cli' else None\n"
    result = subprocess.run([sys.executable, "-c", f"{code}start.main()"], capture_output=True)
    assert (result.returncode, result.stderr) == (-signal.SIGINT, b"")
