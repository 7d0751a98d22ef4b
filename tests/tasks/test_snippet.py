"""Markers for left-out code, and snippets made from changes."""

from __future__ import annotations

import pytest

from paceline.tasks.snippet import Marker, comment_leader, is_marker, marker, marker_rows, snippet_of


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


COMMENTS = [  # a file of each language, and how a comment of it begins and ends
    ("a.py", "# ", ""),
    ("a.py", "#", ""),
    ("a.js", "// ", ""),
    ("a.js", "/* ", " */"),
    ("a.css", "/*", "*/"),
    ("a.tsx", "{/* ", " */}"),
    ("a.html", "<!-- ", " -->"),
    ("a.html", "<!--", "-->"),
    ("a.jinja", "{# ", " #}"),
    ("a.erb", "<%# ", " %>"),
    ("a.jsp", "<%-- ", " --%>"),
    ("a.hbs", "{{!-- ", " --}}"),
    ("a.hbs", "{{! ", " }}"),
    ("a.tmpl", "{{/* ", " */}}"),
    ("a.cshtml", "@* ", " *@"),
    ("a.ml", "(* ", " *)"),
    ("a.hs", "{- ", " -}"),
    ("a.sql", "-- ", ""),
    ("a.lua", "-- ", ""),
    ("a.ini", "; ", ""),
    ("a.tex", "% ", ""),
    ("a.bat", "REM ", ""),
    ("a.py", '""" ', ' """'),
    (None, "# ", ""),
]


@pytest.mark.parametrize(("path", "opening", "closing"), COMMENTS)
@pytest.mark.parametrize(
    ("words", "level"),
    [
        ("...", Marker.CERTAIN),
        ("…", Marker.CERTAIN),
        ("... existing code ...", Marker.CERTAIN),
        ("... rest of the file ...", Marker.CERTAIN),
        ("... (rest unchanged)", Marker.CERTAIN),
        ("... other methods", Marker.CERTAIN),
        ("existing code", Marker.LIKELY),
        ("rest of the file", Marker.LIKELY),
        ("unchanged", Marker.LIKELY),
        ("[existing code]", Marker.LIKELY),
        ("other methods", Marker.POSSIBLE),
        ("... and so on", Marker.POSSIBLE),
        ("wait for the others ...", Marker.NONE),
        ("a plain comment", Marker.NONE),
        ("TODO: existing users see the old page", Marker.NONE),
    ],
)
def test_how_surely_a_comment_of_any_syntax_is_a_marker(
    path: str | None, opening: str, closing: str, words: str, level: Marker
) -> None:
    for margin in ("", "    ", "\t"):
        assert marker(f"{margin}{opening}{words}{closing}", path) is level


@pytest.mark.parametrize(
    ("line", "level"),
    [
        ("pass  # ... existing code ...", Marker.CERTAIN),
        ("' ...", Marker.CERTAIN),
        ("' unchanged'", Marker.NONE),
        (" * ... existing code ...", Marker.CERTAIN),
        (" * existing code", Marker.NONE),
        ("# the rest is read later", Marker.POSSIBLE),
        ("# unchanged since 2019", Marker.POSSIBLE),
        ("/* Rest API */", Marker.POSSIBLE),
        ("// skip blank lines", Marker.POSSIBLE),
        ("# the rest of the line is the value", Marker.NONE),
        ("# Other tests are in test_b.py and the ones below.", Marker.NONE),
        ("// keep in sync with api.ts", Marker.NONE),
        ("---", Marker.NONE),
        ("-----", Marker.NONE),
        ("--option ...", Marker.NONE),
        (";;", Marker.NONE),
        ("# " + "existing code " * 20, Marker.NONE),
    ],
)
def test_comments_that_mean_something_are_at_most_possible(line: str, level: Marker) -> None:
    assert marker(line) is level


@pytest.mark.parametrize(
    ("line", "level"),
    [
        ("...", Marker.CERTAIN),
        ("<!-- ... existing content ... -->", Marker.CERTAIN),
        ("{/* ... */}", Marker.CERTAIN),
        ("# ... existing code ...", Marker.CERTAIN),
        ("<!-- existing content -->", Marker.LIKELY),
        ("# Existing code", Marker.NONE),
        ("# Rest of the file", Marker.NONE),
        ("## Unchanged", Marker.NONE),
        ("* existing items", Marker.NONE),
        ("- existing items", Marker.NONE),
        ("-- existing code", Marker.NONE),
        ("; unchanged", Marker.NONE),
        ("[//]: # (... existing content ...)", Marker.CERTAIN),
    ],
)
@pytest.mark.parametrize("path", ["a.md", "docs/a.MARKDOWN", "a.rst", "a.txt", "a.adoc"])
def test_in_prose_headings_and_items_are_text(path: str, line: str, level: Marker) -> None:
    assert marker(line, path) is level


@pytest.mark.parametrize(("path", "line"), [("a.lisp", ";; ..."), ("a.rs", "/// ..."), ("a.sh", "## ...")])
def test_comment_signs_may_be_doubled(path: str, line: str) -> None:
    assert marker(line, path) is Marker.CERTAIN


def test_a_heading_is_a_marker_only_outside_prose() -> None:
    assert is_marker("# Existing code", "a.py") and not is_marker("# Existing code", "a.md")


def test_an_ellipsis_that_is_a_new_body_is_text() -> None:
    snippet = ["class Missing(Exception):", "    ...", "", "class Store:", "    ..."]
    levels = marker_rows(snippet, ["class Store:", "    size = 1"], "a.py")
    assert levels == [Marker.NONE, Marker.NONE, Marker.NONE, Marker.NONE, Marker.CERTAIN]


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
