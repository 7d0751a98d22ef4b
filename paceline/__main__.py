"""The process's entry point. Handles interrupts while the command line, which takes a while to import, is imported."""

from __future__ import annotations

import os

from paceline.interrupts import exit_on_interrupt, exiting_on_interrupt


def main() -> None:
    """Runs the command line (`paceline.cli.main`). An interrupt before or after it prints one line, without a traceback."""
    _open_closed_streams()
    with exiting_on_interrupt():
        from paceline.cli import main as run
    try:
        run()
    finally:
        exit_on_interrupt()


def _open_closed_streams() -> None:
    """Opens /dev/null for each closed standard stream, so that no other file gets its descriptor."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)


if __name__ == "__main__":
    main()
