"""Commands in processes of their own, in which a chosen call on a file fails or a signal arrives (faults.c).

Starting Python and importing PyTorch takes seconds, a run of a test less than one. A server process imports everything
once and forks for each command. SOAK_SEED chooses other trials than 0, SOAK_SCALE multiplies their number.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import dataclasses
import errno
import itertools
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

READS, WRITES = 1, 2  # as in faults.c
FOR_GOOD = 2**63 - 1
TIMEOUT_S = 60.0
SEED = int(os.environ.get("SOAK_SEED", "0"))
SCALE = float(os.environ.get("SOAK_SCALE", "1"))
MEMORY = 8 << 30  # address space of a command, bytes
STOPS = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)
EXIT_CODES = {0, 1, *(128 + number for number in STOPS)}


@contextmanager
def named(trial: object) -> Iterator[None]:
    """Say in a failure which trial it was."""
    try:
        yield
    except BaseException as error:
        error.add_note(f"SOAK_SEED={SEED}: {trial}")
        raise


@dataclass(frozen=True)
class Fault:
    """What happens at one call, or at several in a row, on files below a folder."""

    below: str
    kinds: int = READS | WRITES
    call: int = 0
    """Number of the call, from 1; 0 = only count calls."""
    repeats: int = 1
    error: int = 0
    """errno with which it fails."""
    signal: int = 0
    """Signal that is sent instead."""

    def __str__(self) -> str:
        kinds = {READS: "read", WRITES: "write", READS | WRITES: "call"}[self.kinds]
        times = {1: "", FOR_GOOD: " and from then on"}.get(self.repeats, f" and {self.repeats - 1} more")
        what = signal.Signals(self.signal).name if self.signal else errno.errorcode.get(self.error, "none")
        return f"{what} at {kinds} {self.call}{times}"


@dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    code: int | None
    """Exit code; negative for the signal that killed it; None if it was still running after `TIMEOUT_S`."""
    output: str
    error: str
    calls: int
    """Calls that a fault could have struck; 0 if it was killed."""

    def check(self) -> Outcome:
        """Fail unless the command ended as a user may see it: an exit code of docs/options.md, or killed; a refusal in
        one line at the end; no traceback."""
        lines = [line for line in self.error.replace("\r", "\n").splitlines() if line.strip()]
        assert self.code is not None, f"still running\n{self.error}"
        assert self.code in EXIT_CODES | {-number for number in (signal.SIGKILL, *STOPS)}, (self.code, self.error)
        assert "Traceback" not in self.error, self.error
        messages = [line for line in lines if line.startswith("sra-fast:")]
        assert messages in ([], lines[-1:]), self.error
        if self.code == 1:
            findings = "wrong: ", "threshold missed: "  # of inspect and of an evaluation
            assert lines[-1].startswith(("sra-fast: ", *findings)), self.error
        elif self.code == 0:
            assert not messages, self.error
        return self


class Server:
    """Runs commands one after the other.

    Args:
        folder: for the compiled library and for what commands print.
    """

    def __init__(self, folder: Path) -> None:
        compiler, library = shutil.which("cc"), folder / "faults.so"
        if not compiler:
            pytest.skip("needs a C compiler")
        flags = ["-shared", "-fPIC", "-Wall", "-Werror", "-U_FORTIFY_SOURCE"]
        source = Path(__file__).with_name("faults.c")
        subprocess.run([compiler, *flags, "-o", library, source, "-ldl"], check=True)
        environment = {**os.environ, "LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1"}
        words = [sys.executable, __file__, library, folder]
        self._process = subprocess.Popen(
            words, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=folder
        )

    def run(self, words: Sequence[object], fault: Fault | None = None, after_s: float = 0, number: int = 0) -> Outcome:
        """Run `sra-fast` with these words.

        Args:
            fault: what happens at a call.
            after_s: send the signal `number` after this time, unless it is 0.
        """
        request = {"words": [str(word) for word in words], "after_s": after_s, "number": number}
        request["fault"] = dataclasses.asdict(fault) if fault else None
        assert self._process.stdin
        assert self._process.stdout
        print(json.dumps(request), file=self._process.stdin, flush=True)
        return Outcome(**json.loads(self._process.stdout.readline()))

    def close(self) -> None:
        self._process.communicate()


def _serve(library: str, folder: Path) -> None:
    """In the server process: a request in each line of stdin, an outcome in each line of stdout."""
    import torch

    from sra_fast import cli, files
    from sra_fast.packing import prepare
    from sra_fast.tools import inspect, weights
    from sra_fast.training import trainer

    with contextlib.suppress(ImportError):
        from torch.utils import tensorboard

        assert tensorboard
    torch.use_deterministic_algorithms(False)  # imports much
    assert all((prepare, inspect, weights, trainer))
    torch.set_num_threads(1)
    files.PAUSES_S = (0.001,) * len(files.PAUSES_S)
    faults = ctypes.CDLL(library)
    faults.faults_arm.argtypes = [ctypes.c_char_p, ctypes.c_int, *[ctypes.c_long] * 2, ctypes.c_int, ctypes.c_int]
    faults.faults_calls.restype = ctypes.c_long
    paths = [folder / name for name in ("stdout", "stderr", "calls")]
    for line in sys.stdin:
        request = json.loads(line)
        for path in paths:
            path.write_text("")
        child = os.fork()
        if child == 0:
            for descriptor, source in ((0, os.devnull), (1, paths[0]), (2, paths[1])):
                os.dup2(os.open(source, os.O_RDWR), descriptor)
            resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
            if fault := request["fault"]:
                faults.faults_arm(fault.pop("below").encode(), *fault.values())
            sys.argv = ["sra-fast", *request["words"]]
            code = cli.main()
            paths[2].write_text(str(faults.faults_calls()))
            _exit(code)
        code = _wait(child, request["after_s"], request["number"])
        output, error, calls = (path.read_text(errors="replace") for path in paths)
        outcome = Outcome(code, output, error, int(calls or 0))
        print(json.dumps(dataclasses.asdict(outcome)), flush=True)


def _exit(code: int) -> None:
    """End as Python does, but do not free every object of PyTorch's, which takes longer than most commands."""
    threading._shutdown()
    atexit._run_exitfuncs()
    with contextlib.suppress(BrokenPipeError):
        sys.stdout.flush()
    os._exit(code)


def _wait(child: int, after_s: float, number: int) -> int | None:
    start = time.monotonic()
    for count in itertools.count():
        done, status = os.waitpid(child, os.WNOHANG)
        elapsed = time.monotonic() - start
        if done:
            return os.waitstatus_to_exitcode(status)
        if after_s and elapsed > after_s:
            os.kill(child, number)
            after_s = 0
        if elapsed > TIMEOUT_S:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return None
        time.sleep(min(0.002 * (count + 1), 0.02))
    return None


if __name__ == "__main__":
    _serve(sys.argv[1], Path(sys.argv[2]))
