"""Handling of Ctrl-C during imports, where a KeyboardInterrupt may be swallowed or turned into another exception."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator


def exit_on_interrupt() -> None:
    """From now on an interrupt ends the process at once, with one line on standard error and exit status 130.

    Does nothing if another handler is installed or interrupts are ignored (as for a shell's background job).
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _exit_interrupted)


@contextlib.contextmanager
def exiting_on_interrupt() -> Iterator[None]:
    """`exit_on_interrupt` within a `with` block."""
    handler = signal.getsignal(signal.SIGINT)
    exit_on_interrupt()
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)


def _exit_interrupted(*_: object) -> None:
    os.write(2, b"interrupted\n")
    os._exit(130)
