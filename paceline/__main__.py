"""Where the process begins. What the command line needs takes seconds to import, and an interrupt may come meanwhile."""

from __future__ import annotations

import os
import signal


def main() -> None:
    """Runs the command line (`paceline.cli.main`). An interrupt while it is imported, or after it ended, is one line."""
    _open_closed()
    handler = signal.getsignal(signal.SIGINT)
    guarded = handler is signal.default_int_handler  # else the parent has it ignored, as a shell does for a job with &
    if guarded:
        signal.signal(signal.SIGINT, _interrupted)
    from paceline.cli import main as run

    if guarded:
        signal.signal(signal.SIGINT, handler)
    try:
        run()
    finally:
        if guarded:
            signal.signal(signal.SIGINT, _interrupted)


def _open_closed() -> None:
    """Opens /dev/null for each standard stream that is closed, lest a file of the user's takes its number."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)


def _interrupted(*_: object) -> None:
    """Ends the process at once: an exception raised in an import may be taken for another, or be lost."""
    os.write(2, b"interrupted\n")
    os._exit(130)


if __name__ == "__main__":
    main()
