"""Reads and writes the files being edited. A write never loses text nor leaves it half written."""

from __future__ import annotations

import contextlib
import io
import os
import stat
import sys
import tempfile
from pathlib import Path
from typing import cast

from paceline.errors import InputError, NotText

# byte order marks; one that begins with another one comes before it
_ENCODING_MARKS = {b"\xff\xfe\0\0": "UTF-32", b"\0\0\xfe\xff": "UTF-32", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}


def _standard_input() -> bytes:
    """All of standard input, read in pieces so that an interrupt takes effect between two of them."""
    stdin = cast(io.BufferedReader, sys.stdin.buffer)
    return b"".join(iter(lambda: stdin.read1(1 << 20), b""))


def read_text(name: str) -> str:
    """The text of a file, or of standard input for "-", with line ends and byte order mark. Raises InputError, NotText."""
    if name == "-" and sys.stdin is None:
        raise InputError("standard input is closed")
    try:
        data = _standard_input() if name == "-" else Path(name).read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {name}: {error.strerror}") from error
    encoding = next((encoding for mark, encoding in _ENCODING_MARKS.items() if data.startswith(mark)), None)
    if encoding is not None:
        raise NotText(f"{name} is {encoding}; only UTF-8 files can be edited")
    if b"\0" in data:
        raise NotText(f"{name} is a binary file")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise NotText(f"{name} is not UTF-8: byte {error.start} is 0x{data[error.start]:02x}") from error


def check_writable(path: Path) -> None:
    """Raises InputError if `write_text` would refuse: the path is no regular file, or may not be written.

    A file whose mode lets nobody write is refused to root too, although the system would allow it.
    """
    target = os.path.realpath(path)
    try:
        mode = os.stat(target).st_mode
    except FileNotFoundError:
        return
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from error
    if not stat.S_ISREG(mode):
        raise InputError(f"cannot write {path}: it is not a regular file")
    if not mode & 0o222:
        raise InputError(f"cannot write {path}: its mode is read-only (chmod u+w lets it be written)")
    if not os.access(target, os.W_OK):
        raise InputError(f"cannot write {path}: no permission to write it")


def write_text(path: Path, text: str, expected: str | None = None) -> None:
    """Replaces a file's content. Symbolic and hard links, owner, group, mode, ACL and extended attributes stay.

    The write is atomic: a new file is renamed over the old one, so a reader, or an interruption, sees the old text or the new.
    If that would lose a hard link, the owner or an attribute, or if the folder does not allow a new file, the file is
    overwritten in place, and a reader may see a part of the text. A copy of the old text then lies beside the file (or in the
    folder for temporary files) until the write is done, and the old text is restored if the write fails.

    With `expected` the file must still hold that text. A new file gets mode 0600. Raises InputError; then nothing has changed,
    or the message names the copy.
    """
    check_writable(path)
    target = Path(os.path.realpath(path))
    data = text.encode("utf-8")
    before = expected.encode("utf-8") if expected is not None else None
    try:
        if not _replace(target, data, before):
            _overwrite(target, data, before)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from error


def _require_unchanged(target: Path, current: bytes, before: bytes | None) -> None:
    """Raises InputError if the file no longer holds the expected text."""
    if before is not None and current != before:
        raise InputError(f"{target} was changed meanwhile; nothing is written")


def _replace(target: Path, data: bytes, before: bytes | None) -> bool:
    """Renames a new file over the old one. False, with nothing changed, if an attribute of the old one would be lost."""
    if target.exists() and target.stat().st_nlink > 1:
        return False
    try:
        handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=".paceline.")
    except PermissionError:
        return False
    except OSError:
        if os.access(target.parent, os.W_OK):
            raise
        return False  # the file system is read-only, the file itself mounted writable
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            same = not target.exists() or _copy_attributes(target, file.fileno())
            os.fsync(file.fileno())
        _require_unchanged(target, target.read_bytes() if before is not None else b"", before)
        if same:
            same = _rename(temporary, target)
    except BaseException:
        os.unlink(temporary)
        raise
    if not same:
        os.unlink(temporary)
    return same


def _rename(temporary: str, target: Path) -> bool:
    """Renames over the target. False if it is a mount point, or another user's file in a sticky folder."""
    try:
        os.replace(temporary, target)
    except OSError:
        if target.is_file():
            return False
        raise
    return True


def _copy_attributes(source: Path, handle: int) -> bool:
    """Copies owner, group, mode and extended attributes to an open file. False if the system refuses one of them."""
    wanted = source.stat()
    own = os.fstat(handle)
    try:
        if (own.st_uid, own.st_gid) != (wanted.st_uid, wanted.st_gid):
            os.fchown(handle, wanted.st_uid, wanted.st_gid)
        os.fchmod(handle, stat.S_IMODE(wanted.st_mode))
        there, here = _attributes(source), _attributes(handle)
        for name in here.keys() - there.keys():
            os.removexattr(handle, name)  # from the folder's default ACL; the old file lacks it
        for name, value in there.items():
            if here.get(name) != value:
                os.setxattr(handle, name, value)
        same = _attributes(handle) == there
    except OSError:
        return False
    own = os.fstat(handle)
    return same and (own.st_uid, own.st_gid, own.st_mode) == (wanted.st_uid, wanted.st_gid, wanted.st_mode)


def _attributes(file: Path | int) -> dict[str, bytes]:
    """A file's extended attributes, including its ACL; empty if the system or the file system has none."""
    if sys.platform != "linux":
        return {}
    try:
        names = os.listxattr(file)
    except OSError:
        return {}
    return {name: os.getxattr(file, name) for name in names}


def _overwrite(target: Path, data: bytes, before: bytes | None) -> None:
    """Overwrites a file in place. Keeps a copy of the old text until that is done."""
    with open(target, "r+b", buffering=0) as file:
        mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
        old = file.read()
        _require_unchanged(target, old, before)
        copy = _write_copy(target, old)
        try:
            _write_all(file.fileno(), data)
        except BaseException:
            try:
                _write_all(file.fileno(), old)
            except OSError as error:
                raise InputError(f"cannot write {target}: {error.strerror}; its old text is in {copy}") from error
            os.unlink(copy)
            raise
        if stat.S_IMODE(os.fstat(file.fileno()).st_mode) != mode:
            with contextlib.suppress(PermissionError):  # writing cleared the set-user-ID bit
                os.fchmod(file.fileno(), mode)
    os.unlink(copy)


def _write_all(handle: int, data: bytes) -> None:
    """Makes `data` the whole content of an open file, and syncs it to disk."""
    done = 0
    while done < len(data):
        done += os.pwrite(handle, data[done : done + (1 << 20)], done)
    os.ftruncate(handle, len(data))
    os.fsync(handle)


def _write_copy(target: Path, data: bytes) -> str:
    """Writes a copy of the old text beside the target, or in the folder for temporary files; returns its path."""
    try:
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name[:40]}.", suffix=".old")
    except OSError:
        handle, name = tempfile.mkstemp(prefix=f"{target.name[:40]}.", suffix=".old")
    try:
        _write_all(handle, data)
    except BaseException:
        os.unlink(name)
        raise
    finally:
        os.close(handle)
    return name
