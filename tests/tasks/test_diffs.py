"""Diffs: git's give the file they were made for; models' are applied, give a warning, or are refused with the reason."""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from paceline.errors import EditNotFound, EmptyEdit
from paceline.tasks.diffs import apply_diff, is_diff
from paceline.tasks.lines import Lines

PY = "def a():\n    return 0\n\n\ndef b():\n    return 1\n"
TWO = "class A:\n    def f(self):\n        return 1\n\n\nclass B:\n    def f(self):\n        return 1\n"
HEAD = "--- a/a.py\n+++ b/a.py\n"
BODY = " def b():\n-    return 1\n+    return 2\n"
ONE = f"@@ -5,2 +5,2 @@\n{BODY}"
MAIL = "From 1 Mon Sep 17\nSubject: [PATCH] x\n\nWords.\n---\n a.py | 2 +-\n\ndiff --git a/a.py b/a.py\n"
MOVED = "diff --git a/a.py b/b.py\nold mode 100644\nnew mode 100755\nsimilarity index 90%\nrename from a.py\nrename to b.py\n"
DONE = PY.replace("1", "2")


def codex(text: str, name: str = "a.py") -> str:
    return f"*** Begin Patch\n*** Update File: {name}\n{text}*** End Patch\n"


RIGHT = [  # name, file, edit, result; no warning
    ("plain", PY, HEAD + ONE, DONE),
    ("fenced, with words", PY, f"Here:\n\n```diff\n{HEAD}{ONE}```\n\nDone.\n", DONE),
    ("svn", PY, f"Index: a.py\n{'=' * 67}\n--- a.py\t(revision 1)\n+++ a.py\t(working copy)\n{ONE}", DONE),
    ("mail", PY, MAIL + HEAD + ONE + "-- \n2.39.5\n\n", DONE),
    ("quoted name", PY, '--- "a/t\\303\\274.py"\n+++ "b/t\\303\\274.py"\n' + ONE, DONE),
    ("rename and mode", PY, MOVED + HEAD + ONE, DONE),
    ("counts too low", PY, f"{HEAD}@@ -5,1 +5,1 @@\n{BODY}", DONE),
    ("counts too high", PY, f"{HEAD}@@ -5,9 +5,9 @@\n{BODY}", DONE),
    ("numbers wrong", PY, f"{HEAD}@@ -55,2 +55,2 @@\n{BODY}", DONE),
    ("no numbers", PY, f"{HEAD}@@\n{BODY}", DONE),
    ("dots for numbers", PY, f"{HEAD}@@ ... @@\n{BODY}", DONE),
    ("no hunk header", PY, HEAD + BODY, DONE),
    ("context without its space", PY, f"{HEAD}@@ -5,2 +5,2 @@\n{BODY[1:]}", DONE),
    ("Windows diff", PY, (HEAD + ONE).replace("\n", "\r\n"), DONE),
    ("Windows file", PY.replace("\n", "\r\n"), HEAD + ONE, DONE.replace("\n", "\r\n")),
    ("line end changed", "a\r\nb\r\n", f"{HEAD}@@ -1,2 +1,2 @@\n-a\r\n+a\n b\r\n", "a\nb\r\n"),
    ("several files", PY, f"--- a/z.py\n+++ b/z.py\n@@ -1 +1 @@\n-q\n+r\n{HEAD}{ONE}", DONE),
    (
        "out of order",
        PY,
        f"{HEAD}@@ -6 +6 @@\n-    return 1\n+    return 2\n" + "@@ -1,2 +1,2 @@\n-def a():\n+def c():\n     return 0\n",
        DONE.replace("a()", "c()"),
    ),
    (
        "inserted by number",
        PY,
        f"{HEAD}@@ -5,0 +6,2 @@ def b():\n+    x = 1\n+    y = 1\n",
        PY.replace("():\n    return 1", "():\n    x = 1\n    y = 1\n    return 1"),
    ),
    ("number among equals", "x\ny\nx\ny\n", f"{HEAD}@@ -4 +4 @@\n-y\n+Y\n", "x\ny\nx\nY\n"),
    (
        "spaces for tabs",
        "if a:\n\tb()\n\tc()\n",
        f"{HEAD}@@ -1,3 +1,3 @@\n if a:\n     b()\n-    c()\n+    d()\n+        e()\n",
        "if a:\n\tb()\n\td()\n\t\te()\n",
    ),
    ("row ends of context", "a  \nb\n", f"{HEAD}@@ -1,2 +1,2 @@\n a\n-b\n+c\n", "a  \nc\n"),
    ("fence as context", "```\nx\n```\n", f"{HEAD}@@ -1,3 +1,3 @@\n ```\n-x\n+y\n ```\n", "```\ny\n```\n"),
    ("final end goes", "a\nb\n", f"{HEAD}@@ -1,2 +1,2 @@\n a\n-b\n+b\n\\ No newline at end of file\n", "a\nb"),
    ("mark goes", "\ufeffa\nb\n", f"{HEAD}@@ -1,2 +1,2 @@\n-\ufeffa\n+a\n b\n", "a\nb\n"),
    ("mark stays", "\ufeffa\nb\n", f"{HEAD}@@ -1,2 +1,2 @@\n-\ufeffa\n+\ufeffc\n b\n", "\ufeffc\nb\n"),
    ("new file", "", "--- /dev/null\n+++ b/a.py\n@@ -0,0 +1,2 @@\n+x\n+y\n\\ No newline at end of file\n", "x\ny"),
    ("Codex", PY, codex(f"@@\n{BODY}"), DONE),
    ("Codex without @@", PY, codex(BODY), DONE),
    ("Codex under a class", TWO, codex("@@ class B:\n-        return 1\n+        return 2\n"), TWO[:-2] + "2\n"),
    (
        "Codex under both",
        TWO,
        codex("@@ class B:\n@@ def f(self):\n-        return 1\n+        return 2\n"),
        TWO[:-2] + "2\n",
    ),
    ("Codex at the end", "x\ny\nx\n", codex("@@\n-x\n+z\n*** End of File\n"), "x\ny\nz\n"),
    ("Codex moves", PY, codex(f"*** Move to: b.py\n@@\n{BODY}"), DONE),
    ("Codex adds", "", "*** Begin Patch\n*** Add File: a.py\n+x\n*** End Patch\n", "x\n"),
    ("Codex on another too", PY, codex(f"@@\n-q\n+r\n*** Update File: a.py\n@@\n{BODY}", "z.py"), DONE),
]


@pytest.mark.parametrize(("file", "edit", "expected"), [case[1:] for case in RIGHT], ids=[case[0] for case in RIGHT])
def test_a_clear_diff_is_applied_without_a_warning(file: str, edit: str, expected: str) -> None:
    lines = Lines.of(file)
    assert is_diff(edit, lines)
    edited = apply_diff(lines, edit, "src/a.py")
    assert lines.text(edited) == expected
    assert edited.warnings == ()


AMBIGUOUS = [  # name, file, edit, words of the warning
    ("bare rows", PY, "-    return 1\n+    return 2\n", "no hunk header"),
    ("bare rows in groups", PY, "-    return 0\n+    return 3\n\n-    return 1\n+    return 2\n", "no hunk header"),
    ("bare rows and context", PY, "def b():\n-    return 1\n+    return 2\n", "no hunk header"),
    ("wrong number among equals", TWO, f"{HEAD}@@ -90 +90 @@\n-        return 1\n+        return 2\n", "lines 3 and 8"),
    ("no number among equals", TWO, f"{HEAD}@@\n-        return 1\n+        return 2\n", "lines 3 and 8"),
    ("heading of two", TWO, codex("@@ def f(self):\n-        return 1\n+        return 2\n"), "lines 3 and 8"),
    ("heading not there", PY, codex(f"@@ def zzz():\n{BODY}"), "not under"),
    ("rows under a heading", PY, codex("@@ def b():\n+    x = 1\n"), "shows no row"),
    (
        "inserted, then moved",
        "#\n" + PY,
        f"{HEAD}@@ -2 +2 @@\n-    return 0\n+    return 5\n@@ -5,0 +6 @@\n+    x = 1\n",
        "number only",
    ),
    ("heading elsewhere", PY, f"{HEAD}@@ -2,0 +3 @@ def b():\n+    x = 1\n", "stands under"),
    ("chance", "x\ny\nx\ny\nx\ny\nq\n", f"{HEAD}@@ -2 +2 @@\n-y\n+Y\n@@ -5 +5 @@\n-q\n+Q\n", "other places"),
    (
        "end of another row",
        PY,
        f"{HEAD}@@ -2 +2 @@\n-    return 0\n+    return 8\n\\ No newline at end of file\n",
        "no line end",
    ),
    ("added already", "a\nb\nc\n", f"{HEAD}@@ -1 +1,2 @@\n a\n+b\n", "has already"),
    (
        "a marker put in",
        PY,
        f"{HEAD}@@ -5,2 +5,3 @@\n def b():\n+    # ... existing code ...\n     return 1\n",
        "left out",
    ),
    (
        "another file's rows fit",
        "a\nb\n",
        f"{HEAD}@@ -1 +1 @@\n-a\n+c\n--- a/z.py\n+++ b/z.py\n@@ -2 +2 @@\n-b\n+d\n",
        "z.py",
    ),
    (
        "none of its names",
        PY,
        f"--- a/y.py\n+++ b/y.py\n{ONE}--- a/z.py\n+++ b/z.py\n@@ -1 +1 @@\n-q\n+r\n",
        "several files",
    ),
    ("blank row without sign", PY, f"{HEAD}@@\n     return 1\n+\n\n+x = 1\n", "blank row"),
]


@pytest.mark.parametrize(
    ("file", "edit", "words"), [case[1:] for case in AMBIGUOUS], ids=[case[0] for case in AMBIGUOUS]
)
def test_an_ambiguous_diff_gives_a_warning(file: str, edit: str, words: str) -> None:
    lines = Lines.of(file)
    assert is_diff(edit, lines)
    assert words in " ".join(apply_diff(lines, edit, "a.py").warnings)


REFUSED = [  # name, file, edit, words of the reason
    (
        "another context",
        PY,
        f"{HEAD}@@ -1,2 +1,2 @@\n def a(x):\n-    return 0\n+    return 2\n",
        "hunk 1 does not match: it has 'def a",
    ),
    ("applied", DONE, HEAD + ONE, "applied already"),
    ("nothing new", PY, f"{HEAD}@@ -1,2 +1,2 @@\n def a():\n     return 0\n", "changes nothing"),
    ("new over a file", PY, "--- /dev/null\n+++ b/a.py\n@@ -0,0 +1 @@\n+x\n", "makes a new file"),
    ("deletion", "x\n", "--- a/a.py\n+++ /dev/null\n@@ -1 +0,0 @@\n-x\n", "deletes the file"),
    ("Codex deletes", "x\n", "*** Begin Patch\n*** Delete File: a.py\n*** End Patch\n", "deletes the file"),
    (
        "binary",
        PY,
        "diff --git a/a.py b/a.py\nindex 1234567..7654321 100644\nBinary files a/a.py and b/a.py differ\n",
        "binary",
    ),
    (
        "rename only",
        PY,
        "diff --git a/a.py b/c.py\nsimilarity index 100%\nrename from a.py\nrename to c.py\n",
        "changes nothing",
    ),
    (
        "combined",
        PY,
        "diff --cc a.py\n@@@ -1,3 -1,3 +1,4 @@@\n  def b():\n--    return 1\n++    return 9\n",
        "combined",
    ),
    ("old form", PY, "6c6\n<     return 1\n---\n>     return 9\n", "old form"),
    ("behind the end", PY, f"{HEAD}@@ -50,0 +51 @@\n+x\n", "has 6 lines"),
    ("no place", PY, f"{HEAD}@@ @@\n+x\n", "neither a row"),
    ("same rows twice", PY, f"{HEAD}{ONE}@@ -6 +6 @@\n-    return 1\n+    return 9\n", "change the same rows"),
    ("no file fits", PY, "--- a/y\n+++ b/y\n@@ -1 +1 @@\n-q\n+r\n--- a/z\n+++ b/z\n@@ -1 +1 @@\n-s\n+t\n", "y, z"),
    ("left-out rows", PY, f"{HEAD}@@ -1,6 +1,6 @@\n def a():\n ...\n{BODY}", "leaves out rows"),
]


@pytest.mark.parametrize(("file", "edit", "words"), [case[1:] for case in REFUSED], ids=[case[0] for case in REFUSED])
def test_a_diff_that_cannot_be_applied_is_refused_with_the_reason(file: str, edit: str, words: str) -> None:
    lines = Lines.of(file)
    assert is_diff(edit, lines)
    with pytest.raises((EditNotFound, EmptyEdit), match=words):
        apply_diff(lines, edit, "a.py")


@pytest.mark.parametrize(
    ("file", "edit"),
    [
        ("# T\n\nText here.\n\nMore text.\n", f"# T\n\nText here.\n\n```diff\n{HEAD}{ONE}```\n\nMore text.\n"),
        (HEAD + ONE, HEAD + ONE.replace("2\n", "3\n")),
        ("class A\n  @@n = 0\nend\n", "class A\n  @@n = 1\nend\n"),
        ("# A\n- a\n- b\n", "# A\n- a\n- b\n- c\n"),
        ("a\nb\n", "- a\n- b\n"),
        ("- a\n", "- a\n+ b\n"),
        ("a: 1\n", "---\na: 2\n"),
    ],
)
def test_a_text_with_a_diff_in_it_is_text(file: str, edit: str) -> None:
    assert not is_diff(edit, Lines.of(file))


def git_diff(before: str, after: str, around: int) -> str:
    with tempfile.TemporaryDirectory() as folder:
        for name, text in (("a.txt", before), ("b.txt", after)):
            (Path(folder) / name).write_bytes(text.encode())
        command = ["git", "diff", "--no-index", "--text", f"-U{around}", "a.txt", "b.txt"]
        return subprocess.run(command, cwd=folder, capture_output=True).stdout.decode()


ROWS = ["a", "b", "", "    x", "\tx", "-- sql", "++ inc", "-", "+", "@@ -1,3 +1,3 @@", "--- a", "+++ b", "\\ No", "x  "]
ODD = [
    "f\x0c",
    "u\u2028v",
    "m\rn",
    "é",
    "*** Begin Patch",
    "*** End of File",
    "-- ",
    "a\r",
    "```",
    "diff --git a/x b/x",
]
PIECES = st.tuples(st.sampled_from([*ROWS, *ODD]), st.sampled_from(["\n", "\n", "\r\n"]))
EDITS = st.lists(st.tuples(st.integers(0, 12), st.integers(0, 2), st.lists(PIECES, max_size=3)), min_size=1, max_size=3)


@settings(max_examples=60, deadline=None)
@given(st.lists(PIECES, min_size=1, max_size=12), EDITS, st.booleans(), st.booleans(), st.sampled_from([0, 1, 3]))
@example([("a", "\n")] * 9, [(8, 1, [("b", "\n")]), (2, 0, [("a", "\n")])], True, False, 0)
def test_a_diff_of_git_gives_the_file_it_was_made_for(
    rows: list[tuple[str, str]],
    edits: list[tuple[int, int, list[tuple[str, str]]]],
    ended: bool,
    ends: bool,
    around: int,
) -> None:
    new = list(rows)
    for place, size, pieces in edits:
        new[place : place + size] = pieces
    before, after = ("".join(row + end for row, end in each) for each in (rows, new))
    before = before if ended else before.removesuffix("\n").removesuffix("\r")
    after = after if ends else after.removesuffix("\n")
    if before in ("", after):
        return
    diff = git_diff(before, after, around)
    lines = Lines.of(before)
    assert is_diff(diff, lines)
    edited = apply_diff(lines, diff, "a.txt")
    assert lines.text(edited) == after
    assert edited.warnings == ()
    if around:
        anonymous = "".join(row + "\n" for row in diff.split("\n")[:-1] if not row.startswith("index "))
        assert lines.text(apply_diff(lines, anonymous, "a.txt")) == after


@given(st.lists(PIECES, max_size=9), st.integers(0, 9), st.sampled_from(["", "\ufeff"]))
def test_what_a_diff_does_not_touch_keeps_its_bytes(rows: list[tuple[str, str]], place: int, mark: str) -> None:
    pieces = [row + end for row, end in rows]
    before, after = mark + "".join(pieces[:place]), "".join(pieces[place:])
    lines = Lines.of(f"{before}ONE  \r\nTWO\r\n{after}")
    edited = apply_diff(lines, f"{HEAD}@@ @@\n ONE\n-TWO\n+OTHER\n", None)
    assert lines.text(edited) == f"{before}ONE  \r\nOTHER\r\n{after}"
