"""Markers for left-out code, and snippets made by rule."""

from __future__ import annotations

import pytest

from paceline.tasks.snippet import Marker, comment_leader, is_marker, marker_rows, snippet_of


@pytest.mark.parametrize(
    "line",
    [
        "# ... existing code ...",
        "    # ... existing code ...",
        "// ... existing code ...",
        "// ... rest of the code ...",
        "/* ... existing styles unchanged ... */",
        "{/* ... existing code ... */}",
        "<!-- ... existing code ... -->",
        "-- ... existing code ...",
        "# ...",
        "...",
        "…",
        "# … existing code …",
        "# rest of the file remains unchanged",
        "// ... same ...",
        "# (existing code)",
    ],
)
def test_markers(line: str) -> None:
    assert is_marker(line)


@pytest.mark.parametrize(
    "line",
    [
        "",
        "pass",
        "x = ...",
        "# The existing connection is reused.",
        "# wait for the others...",
        "def f(self, *args): ...",
        "# Same as above, but for bytes.",
        "return [*rest]",
        "print('...')",
        "// TODO: existing users see the old page",
    ],
)
def test_what_is_not_a_marker(line: str) -> None:
    assert not is_marker(line)


def test_a_line_that_the_file_has_is_no_marker() -> None:
    line = "# ... existing code ..."
    assert marker_rows([line, "x = 1"], [line, "x = 1"]) == [Marker.NONE, Marker.NONE]
    assert marker_rows([line, "x = 1"], ["x = 1"]) == [Marker.CERTAIN, Marker.NONE]
    assert marker_rows([line, "x = 1"], [line, "y = 2", "x = 1"]) == [Marker.CERTAIN, Marker.NONE]  # not the same place


@pytest.mark.parametrize(
    ("name", "leader"), [("a.py", "# "), ("a.ts", "// "), ("a.html", "<!-- "), ("a.sql", "-- "), (None, "# ")]
)
def test_comment_leaders(name: str | None, leader: str) -> None:
    assert comment_leader(name)[0] == leader


def test_a_snippet_shows_the_change_and_marks_the_rest() -> None:
    before = "".join(f"line{number}\n" for number in range(20))
    after = before.replace("line10\n", "changed\n")
    expected = ["# ... existing code ...", "line8", "line9", "changed", "line11", "line12", "# ... existing code ..."]
    assert snippet_of(before, after, "a.py", 2).splitlines() == expected


def test_a_marker_has_the_indent_of_the_line_after_it() -> None:
    before = "def f():\n" + "".join(f"    x{number} = {number}\n" for number in range(9))
    assert snippet_of(before, before.replace("x8 = 8", "x8 = 9"), "a.py", 1).startswith(
        "    # ... existing code ...\n    x7"
    )


def test_no_marker_where_nothing_is_left_out() -> None:
    assert snippet_of("a\nb\n", "a\nc\n") == "a\nc\n"
