"""Unified diffs: the real `git apply` makes the new text from them byte for byte, for any text and file name."""

from __future__ import annotations

import os
import subprocess
import tempfile
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from paceline.tasks.unified_diff import unified_diff

_ROW = st.text(
    st.sampled_from([*"ab +-@\\", "\t", "\r", "\x0b", "\x0c", "\x1c", "\x85", "\u2028", "\ufeff", "é"]), max_size=4
)
_TEXT = st.builds(
    lambda rows, end: "\n".join(rows) + end, st.lists(_ROW, max_size=14), st.sampled_from(["", "\n", "\r\n", "\r"])
)
_CHANGE = st.tuples(_TEXT, _TEXT) | st.builds(
    lambda rows, place, new, ends: (
        "\n".join(rows) + ends[0],
        "\n".join([*rows[:place], *new, *rows[place + 1 :]]) + ends[1],
    ),
    st.lists(_ROW, min_size=1, max_size=14),
    st.integers(0, 13),
    st.lists(_ROW, max_size=3),
    st.tuples(*[st.sampled_from(["", "\n", "\r\n"])] * 2),
)


def applied(folder: Path, before: str, diff: str, name: str) -> bytes:
    """The file that `git apply`, called in a folder, makes from one there."""
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(before.encode())
    command = ["git", "-c", "core.autocrlf=false", "apply", "--whitespace=nowarn", "-"]
    environment = {**os.environ, "GIT_CEILING_DIRECTORIES": str(folder.parent), "GIT_CONFIG_GLOBAL": os.devnull}
    done = subprocess.run(command, input=diff.encode(), cwd=folder, env=environment, capture_output=True, check=False)
    assert done.returncode == 0, (done.stderr, diff)
    return file.read_bytes()


@settings(max_examples=120, deadline=None)
@given(_CHANGE)
@example(("a\n\x0cb\nc\n", "a\n\x0cb\nd\n"))
@example(("a\rb\rc", "a\rb\rd\n"))
@example(("a\u2028b\n\x85c\n", "a\u2028b\n\x85d\n"))
@example(("a", "a\n"))
@example(("a\n", "a"))
@example(("a", "b"))
@example(("", "a"))
@example(("a\r\n", ""))
@example(("--- a\n+++ b\n", "--- a\n--- b\n@@ -1 +1 @@\n"))
def test_git_makes_the_new_text_of_it(change: tuple[str, str]) -> None:
    before, after = change
    diff = unified_diff(before, after, "src/a.py")
    assert (diff == "") == (before == after)
    if diff:
        with tempfile.TemporaryDirectory() as folder:
            assert applied(Path(folder), before, diff, "src/a.py") == after.encode()


NAMES = [
    ("a.py", "a.py"),
    ("./a.py", "a.py"),
    ("src/./b/../a.py", "src/a.py"),
    ("/srv//app/a.py", "srv/app/a.py"),
    ("../a.py", "a.py"),
    ("with space.py", "with space.py"),
    ("my folder/a b .py ", "my folder/a b .py "),
    ("na\tme.py", "na\tme.py"),
    ("na\nme.py", "na\nme.py"),
    ('"quoted".py', '"quoted".py'),
    ("back\\slash.py", "back\\slash.py"),
    ("bell\a\x01\x7f.py", "bell\a\x01\x7f.py"),
    ("naïve/日本\u2028.py", "naïve/日本\u2028.py"),
    ("latin\udce9.py", "latin\udce9.py"),
    ("both \udce9 é\t.py", "both \udce9 é\t.py"),
    ("a 2024-01-01 10:00:00.py", "a 2024-01-01 10:00:00.py"),
    ("log 2024-01-01 10:00:00 +0000", "log 2024-01-01 10:00:00 +0000"),
    ("b/a", "b/a"),
    ("[id].tsx", "[id].tsx"),
]


@pytest.mark.parametrize(("path", "name"), NAMES, ids=repr)
@pytest.mark.parametrize(("before", "after"), [("old\n", "new\n"), ("", "new"), ("old", "")])
def test_git_finds_the_file(path: str, name: str, before: str, after: str, tmp_path: Path) -> None:
    diff = unified_diff(before, after, path)
    diff.encode()
    assert applied(tmp_path, before, diff, name) == after.encode()


def test_a_plain_diff_reads_as_ever() -> None:
    assert unified_diff("a\nb\n", "a\nc", "x.py") == (
        "--- a/x.py\n+++ b/x.py\n@@ -1,2 +1,2 @@\n a\n-b\n+c\n\\ No newline at end of file\n"
    )
    assert unified_diff("a\n", "b\n", "x y.py").startswith("--- a/x y.py\t\n+++ b/x y.py\t\n")
    assert unified_diff("a\n", "b\n", "x\ty.py").startswith('--- "a/x\\ty.py"\n+++ "b/x\\ty.py"\n')
