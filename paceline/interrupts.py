"""Ctrl-C while modules are imported: an exception raised in an import may be taken for another, or be lost."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator


def end_at_once() -> None:
    """From here on an interrupt ends the process with one line on standard error and exit status 130.

    Not where something else handles interrupts, or ignores them, as a shell has it for a job with &.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupted)


@contextlib.contextmanager
def ending_at_once() -> Iterator[None]:
    """`end_at_once` for a while."""
    handler = signal.getsignal(signal.SIGINT)
    end_at_once()
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)


def _interrupted(*_: object) -> None:
    os.write(2, b"interrupted\n")
    os._exit(130)
