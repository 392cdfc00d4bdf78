"""The entry of `sra-fast`: an interrupt while it imports its libraries ends it without a traceback."""

from __future__ import annotations

import signal


def main() -> int:
    """`cli.main` of this process's command line."""
    before = signal.getsignal(signal.SIGINT)  # may be ignored, as in the background of a script
    if before is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from sra_fast import cli

    signal.signal(signal.SIGINT, before)
    return cli.main()
