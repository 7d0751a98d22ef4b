"""Where the process begins. What the command line needs takes a while to import, and an interrupt may come meanwhile."""

from __future__ import annotations

import os

from paceline.interrupts import end_at_once, ending_at_once


def main() -> None:
    """Runs the command line (`paceline.cli.main`). An interrupt while it is imported, or after it ended, is one line."""
    _open_closed()
    with ending_at_once():
        from paceline.cli import main as run
    try:
        run()
    finally:
        end_at_once()


def _open_closed() -> None:
    """Opens /dev/null for each standard stream that is closed, lest a file of the user's takes its number."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)


if __name__ == "__main__":
    main()
