"""Reading and writing the files that edits concern, so that no text is lost or half written."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

from paceline.errors import InputError, NotText


def read_text(name: str) -> str:
    """A file's text, or standard input's for "-", newlines as they are. Raises InputError, NotText."""
    try:
        data = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {name}: {error.strerror}") from error
    if b"\0" in data:
        raise NotText(f"{name} is a binary file")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise NotText(f"{name} is not UTF-8: byte {error.start} is 0x{data[error.start]:02x}") from error


def write_text(path: Path, text: str) -> None:
    """Replaces a file's content at once: whoever reads it, or stops this, sees the old text or the new, never a part.

    The mode is kept, and a symbolic link stays one: its target is replaced.
    """
    target = path.resolve()
    try:
        handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(text.encode("utf-8"))
                file.flush()
                os.fsync(file.fileno())
            if target.exists():
                os.chmod(temporary, target.stat().st_mode & 0o7777)
            os.replace(temporary, target)
        except BaseException:
            os.unlink(temporary)
            raise
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from error
