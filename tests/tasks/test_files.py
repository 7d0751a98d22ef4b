"""Reading and writing the edited file: what is refused, and which attributes a write preserves."""

from __future__ import annotations

import os
import resource
import signal
import stat
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from paceline.errors import InputError, NotText
from paceline.tasks.files import check_writable, read_text, write_text

NOBODY = 65534
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root may give files to others")


def written_by(user: int, target: Path, text: str, limit: int | None = None) -> str:
    """The error of a process of that user, whose files may have `limit` bytes, when it writes a text; empty for none."""
    reader, writer = os.pipe()
    child = os.fork()  # not a program of its own: that user may lack access to this user's Python
    if child == 0:
        message = ""
        try:
            if limit is not None:
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            if user != os.geteuid():
                os.setgroups([])
                os.setgid(user)
                os.setuid(user)
            check_writable(target)
            write_text(target, text)
        except BaseException as error:
            message = str(error) if isinstance(error, InputError) else repr(error)
        finally:
            os.write(writer, message.encode())
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as said:
        message = said.read()
    os.waitpid(child, 0)
    return message


@pytest.fixture
def shared() -> Iterator[Path]:
    """A folder that every user may enter, and write into."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o777)
        yield Path(folder)


def test_reading_keeps_line_ends_and_a_byte_order_mark(tmp_path: Path) -> None:
    text = "\ufeffa\r\nb\rc\x0c\u2028d\n"
    (tmp_path / "a").write_bytes(text.encode("utf-8"))
    assert read_text(str(tmp_path / "a")) == text
    write_text(tmp_path / "a", read_text(str(tmp_path / "a")))
    assert (tmp_path / "a").read_bytes() == text.encode("utf-8")


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ("é\n".encode("utf-16"), "is UTF-16; only UTF-8 files can be edited"),
        (b"\xfe\xff" + "é\n".encode("utf-16-be"), "is UTF-16; only UTF-8"),
        (b"\xff\xfe", "is UTF-16"),
        ("日本\n".encode("utf-16"), "is UTF-16"),
        ("a\n".encode("utf-32"), "is UTF-32; only UTF-8"),
        (b"\0\0\xfe\xff" + "a\n".encode("utf-32-be"), "is UTF-32; only UTF-8"),
        (b"\x7fELF\0\0", "is a binary file"),
        ("é = 1".encode("latin-1"), "is not UTF-8: byte 0 is 0xe9"),
    ],
)
def test_what_is_no_utf_8_is_named(data: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / "a.cs").write_bytes(data)
    with pytest.raises(NotText, match=words):
        read_text(str(tmp_path / "a.cs"))


def test_a_closed_standard_input_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(InputError, match="standard input is closed"):
        read_text("-")


def test_writing_keeps_mode_and_links_and_is_whole(tmp_path: Path) -> None:
    target, link = tmp_path / "a.py", tmp_path / "link.py"
    target.write_text("old")
    target.chmod(0o750)
    link.symlink_to(target)
    write_text(link, "new\r\n")
    assert target.read_bytes() == b"new\r\n" and link.is_symlink()
    assert stat.S_IMODE(target.stat().st_mode) == 0o750
    assert sorted(os.listdir(tmp_path)) == ["a.py", "link.py"]


def test_a_write_that_fails_leaves_the_old_text(tmp_path: Path) -> None:
    target = tmp_path / "folder"
    target.mkdir()
    with pytest.raises(InputError, match="cannot write"):
        write_text(target, "text")
    assert os.listdir(tmp_path) == ["folder"]


def test_a_new_file_is_its_owners_alone(tmp_path: Path) -> None:
    write_text(tmp_path / "a", "text", expected=None)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o600


@pytest.mark.parametrize("linked", [False, True])
@pytest.mark.parametrize("now", [b"other\n", b"old", b"old\r\n", None])
def test_a_file_that_was_changed_meanwhile_is_not_written(linked: bool, now: bytes | None, tmp_path: Path) -> None:
    target = tmp_path / "a.py"
    target.write_bytes(b"old\n")
    if linked:
        os.link(target, tmp_path / "b.py")
    if now is None:
        target.unlink()
    else:
        target.write_bytes(now)
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(InputError, match=r"changed meanwhile; nothing is written|No such file"):
        write_text(target, "new\n", expected="old\n")
    assert sorted(os.listdir(tmp_path)) == before and (now is None or target.read_bytes() == now)


def test_a_file_that_is_as_it_was_is_written(tmp_path: Path) -> None:
    target = tmp_path / "a.py"
    target.write_bytes(b"old\r\n")
    write_text(target, "new\r\n", expected="old\r\n")
    assert target.read_bytes() == b"new\r\n"


def test_a_hard_link_stays_one(tmp_path: Path) -> None:
    target, other = tmp_path / "a.py", tmp_path / "b.py"
    target.write_text("a longer old text")
    os.link(target, other)
    write_text(target, "new", expected="a longer old text")
    assert other.read_text() == "new" and target.samefile(other) and len(os.listdir(tmp_path)) == 2


@pytest.mark.parametrize("linked", [False, True])
def test_extended_attributes_stay(linked: bool, tmp_path: Path) -> None:
    target = tmp_path / "a.py"
    target.write_text("old")
    try:
        os.setxattr(target, "user.note", b"mine")
    except OSError:
        pytest.skip("this file system has no extended attributes")
    if linked:
        os.link(target, tmp_path / "b.py")
    write_text(target, "new")
    assert os.getxattr(target, "user.note") == b"mine" and os.listxattr(target) == ["user.note"]


ACL = b"\2\0\0\0" + b"".join(
    tag.to_bytes(2, "little") + rights.to_bytes(2, "little") + who.to_bytes(4, "little")
    for tag, rights, who in [
        (1, 6, 2**32 - 1),
        (2, 6, NOBODY),
        (4, 4, 2**32 - 1),
        (16, 6, 2**32 - 1),
        (32, 0, 2**32 - 1),
    ]
)  # its own user may write, nobody may, its group may read


@pytest.mark.parametrize("folders", [False, True])
def test_an_acl_stays_and_a_folders_own_is_not_taken(folders: bool, tmp_path: Path) -> None:
    target = tmp_path / "a.py"
    target.write_text("old")
    target.chmod(0o644)
    place, name = (tmp_path, "system.posix_acl_default") if folders else (target, "system.posix_acl_access")
    try:
        os.setxattr(place, name, ACL)
    except OSError:
        pytest.skip("this file system has no ACLs")
    before = target.stat()
    write_text(target, "new")
    after = target.stat()
    assert target.read_text() == "new" and after.st_mode == before.st_mode
    assert os.listxattr(target) == ([] if folders else [name])
    assert folders or os.getxattr(target, name) == ACL


@as_root
@pytest.mark.parametrize("mode", [0o640, 0o4755, 0o664])
def test_owner_and_group_stay(mode: int, tmp_path: Path) -> None:
    target = tmp_path / "a.py"
    target.write_text("old")
    os.chown(target, 1234, 2345)
    target.chmod(mode)
    write_text(target, "new")
    after = target.stat()
    assert (after.st_uid, after.st_gid, stat.S_IMODE(after.st_mode)) == (1234, 2345, mode)


@as_root
@pytest.mark.parametrize("folder_mode", [0o777, 0o755, 0o1777])
def test_anothers_file_that_one_may_write_stays_the_others(folder_mode: int, shared: Path) -> None:
    """The user nobody may write root's file but not create one owned by root, so the file is overwritten in place."""
    target = shared / "a.py"
    target.write_text("old")
    target.chmod(0o666)
    shared.chmod(folder_mode)
    place = target.stat().st_ino
    assert written_by(NOBODY, target, "new") == ""
    after = target.stat()
    assert target.read_text() == "new" and (after.st_ino, after.st_uid) == (place, 0)
    assert os.listdir(shared) == ["a.py"]


@as_root
@pytest.mark.parametrize(("mode", "words"), [(0o644, "no permission"), (0o444, "read-only")])
def test_a_file_without_permission_is_refused(mode: int, words: str, shared: Path) -> None:
    target = shared / "a.py"
    target.write_text("old")
    target.chmod(mode)
    assert words in written_by(NOBODY, target, "new") and target.read_text() == "old"


def test_a_read_only_file_is_refused_to_root_too(tmp_path: Path) -> None:
    target, link = tmp_path / "a.py", tmp_path / "link.py"
    target.write_text("old")
    link.symlink_to(target)
    target.chmod(0o444)
    for each in (target, link):
        with pytest.raises(InputError, match="read-only"):
            check_writable(each)
        with pytest.raises(InputError, match="read-only"):
            write_text(each, "new")
    assert target.read_text() == "old"


def test_what_is_no_regular_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for place in (tmp_path, tmp_path / "pipe", Path("/dev/null")):
        with pytest.raises(InputError, match="not a regular file"):
            check_writable(place)


@pytest.mark.parametrize("linked", [False, True])
def test_a_full_disk_leaves_the_old_text(linked: bool, shared: Path) -> None:
    """A process with a file size limit of 64 KiB simulates a full disk."""
    target = shared / "a.py"
    target.write_text("old text\n" * 100)
    if linked:
        os.link(target, shared / "b.py")
    before = sorted(os.listdir(shared))
    said = written_by(os.geteuid(), target, "new text\n" * 10_000, limit=1 << 16)
    assert said.startswith(f"cannot write {target}: ") and len(said.splitlines()) == 1
    assert target.read_text() == "old text\n" * 100 and sorted(os.listdir(shared)) == before


def test_an_interrupt_while_a_linked_file_is_written_puts_the_old_text_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "a.py"
    target.write_text("the old text")
    os.link(target, tmp_path / "b.py")
    sync = os.fsync
    syncs: list[int] = []

    def interrupted(handle: int) -> None:
        sync(handle)
        syncs.append(handle)
        if len(syncs) == 2:  # the copy is the first
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_text(target, "new")
    assert target.read_text() == "the old text" and len(os.listdir(tmp_path)) == 2
