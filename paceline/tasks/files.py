"""Reading and writing the files that edits concern, so that no text is lost or half written."""

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

# a mark that begins with another one stands before it
_MARKS = {b"\xff\xfe\0\0": "UTF-32", b"\0\0\xfe\xff": "UTF-32", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}


def _standard_input() -> bytes:
    """All of it, a piece at a time, since an interrupt between two reads of one `read` would wait for its end."""
    stdin = cast(io.BufferedReader, sys.stdin.buffer)
    return b"".join(iter(lambda: stdin.read1(1 << 20), b""))


def read_text(name: str) -> str:
    """A file's text, or standard input's for "-", newlines and a byte order mark as they are. Raises InputError, NotText."""
    if name == "-" and sys.stdin is None:
        raise InputError("standard input is closed")
    try:
        data = _standard_input() if name == "-" else Path(name).read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {name}: {error.strerror}") from error
    coding = next((coding for mark, coding in _MARKS.items() if data.startswith(mark)), None)
    if coding is not None:
        raise NotText(f"{name} is {coding}; only UTF-8 files can be edited")
    if b"\0" in data:
        raise NotText(f"{name} is a binary file")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise NotText(f"{name} is not UTF-8: byte {error.start} is 0x{data[error.start]:02x}") from error


def check_writable(path: Path) -> None:
    """Raises InputError for what `write_text` would refuse now: no regular file, or one that is not to be written.

    A file whose mode lets nobody write is refused to root as well, whom the system would let.
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
    """Replaces a file's content. Links of both kinds, owner, group, mode, ACL and extended attributes stay.

    Whoever reads the file, or stops this, sees the old text or the new, never a part: a new file takes the old one's
    place. Where that would lose a hard link, an owner or an attribute, or the folder takes no new file, the file is
    written where it is. A reader may then see a part of the text. The old text is put back when the writing fails, and
    a copy of it lies beside the file (or in the folder for temporary files) until the writing is done.

    With `expected` the file must still hold that text. A file that is new gets mode 0600. Raises InputError, and then
    nothing is changed, or the message names the copy.
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


def _compare(target: Path, now: bytes, before: bytes | None) -> None:
    if before is not None and now != before:
        raise InputError(f"{target} was changed meanwhile; nothing is written")


def _replace(target: Path, data: bytes, before: bytes | None) -> bool:
    """Puts a new file in the old one's place. False, with nothing changed, where something of the old would be lost."""
    if target.exists() and target.stat().st_nlink > 1:
        return False
    try:
        handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=".paceline.")
    except PermissionError:
        return False
    except OSError:
        if os.access(target.parent, os.W_OK):
            raise
        return False  # a file system that is mounted read-only but for the file
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            same = not target.exists() or _copy_attributes(target, file.fileno())
            os.fsync(file.fileno())
        _compare(target, target.read_bytes() if before is not None else b"", before)
        if same:
            same = _rename(temporary, target)
    except BaseException:
        os.unlink(temporary)
        raise
    if not same:
        os.unlink(temporary)
    return same


def _rename(temporary: str, target: Path) -> bool:
    """False where the target is another's in a sticky folder, or mounted by itself."""
    try:
        os.replace(temporary, target)
    except OSError:
        if target.is_file():
            return False
        raise
    return True


def _copy_attributes(source: Path, handle: int) -> bool:
    """Gives an open file the owner, group, mode and extended attributes of another. False where one of them is refused."""
    wanted = source.stat()
    own = os.fstat(handle)
    try:
        if (own.st_uid, own.st_gid) != (wanted.st_uid, wanted.st_gid):
            os.fchown(handle, wanted.st_uid, wanted.st_gid)
        os.fchmod(handle, stat.S_IMODE(wanted.st_mode))
        there, here = _attributes(source), _attributes(handle)
        for name in here.keys() - there.keys():
            os.removexattr(handle, name)  # a folder's default ACL, which the old file does not have
        for name, value in there.items():
            if here.get(name) != value:
                os.setxattr(handle, name, value)
        same = _attributes(handle) == there
    except OSError:
        return False
    own = os.fstat(handle)
    return same and (own.st_uid, own.st_gid, own.st_mode) == (wanted.st_uid, wanted.st_gid, wanted.st_mode)


def _attributes(file: Path | int) -> dict[str, bytes]:
    """Extended attributes, the ACL among them; none where the system or the file system knows none."""
    if sys.platform != "linux":
        return {}
    try:
        names = os.listxattr(file)
    except OSError:
        return {}
    return {name: os.getxattr(file, name) for name in names}


def _overwrite(target: Path, data: bytes, before: bytes | None) -> None:
    """Writes a file where it is, with a copy of the old text kept until that is done."""
    with open(target, "r+b", buffering=0) as file:
        mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
        old = file.read()
        _compare(target, old, before)
        copy = _keep(target, old)
        try:
            _put(file.fileno(), data)
        except BaseException:
            try:
                _put(file.fileno(), old)
            except OSError as error:
                raise InputError(f"cannot write {target}: {error.strerror}; its old text is in {copy}") from error
            os.unlink(copy)
            raise
        if stat.S_IMODE(os.fstat(file.fileno()).st_mode) != mode:
            with contextlib.suppress(PermissionError):  # the system took the set-user-ID bit away
                os.fchmod(file.fileno(), mode)
    os.unlink(copy)


def _put(handle: int, data: bytes) -> None:
    """Makes `data` the whole content of an open file, on the disk."""
    done = 0
    while done < len(data):
        done += os.pwrite(handle, data[done : done + (1 << 20)], done)
    os.ftruncate(handle, len(data))
    os.fsync(handle)


def _keep(target: Path, data: bytes) -> str:
    """A file with a copy of the old text, beside the target where the folder takes it."""
    try:
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name[:40]}.", suffix=".old")
    except OSError:
        handle, name = tempfile.mkstemp(prefix=f"{target.name[:40]}.", suffix=".old")
    try:
        _put(handle, data)
    except BaseException:
        os.unlink(name)
        raise
    finally:
        os.close(handle)
    return name
