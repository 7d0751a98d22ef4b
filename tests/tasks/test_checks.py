"""The checks flag results that are changed in one way, and let true ones pass."""

from __future__ import annotations

from dataclasses import replace

import pytest

from paceline.tasks.checks import check, parses, same_syntax_tree
from paceline.tasks.merge import candidate_merge
from paceline.tasks.snippet import snippet_of

BEFORE = "".join(
    f"def f{number}(value):\n    total = value * {number}\n    return total + {number}\n\n\n" for number in range(12)
)
AFTER = BEFORE.replace("    total = value * 6\n", "    total = value // 6\n    print(total)\n").replace(
    "    return total + 3\n", "    return 3\n"
)
UPDATE = snippet_of(BEFORE, AFTER, "x.py")


def reasons(text: str, path: str = "x.py") -> str:
    return "; ".join(check(BEFORE, UPDATE, text, path))


def test_a_true_merge_passes() -> None:
    assert check(BEFORE, UPDATE, AFTER, "x.py") == ()


def test_blank_lines_at_the_end_do_not_matter() -> None:
    assert reasons(AFTER.rstrip("\n") + "\n") == ""


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "empty"),
        (BEFORE, "line"),
        (AFTER.replace("    total = value * 9\n", ""), "is missing"),
        (AFTER.replace("value * 9", "value * 99"), "differs"),
        (AFTER.replace("    print(total)\n", ""), "of the edit is missing"),
        (AFTER.replace("    print(total)\n", "    print(total)\n    total = value * 6\n"), "removes"),
        (AFTER[: AFTER.index("def f9")], "cut off"),
        (AFTER[: AFTER.index("def f9") + 10], "syntax error"),
        (AFTER.replace("def f2", "# ... existing code ...\ndef f2"), "marker"),
        ("```python\n" + AFTER + "```\n", "fence"),
        (AFTER.replace("    return total + 9\n", "    return total + 9\n    return total + 9\n"), "more often"),
        (AFTER.replace("    return total + 9\n", "    return total + 9\n    sys.exit('unheard of')\n"), "neither"),
        (
            AFTER.replace("    total = value // 6\n    print(total)\n", "    print(total)\n    total = value // 6\n"),
            "line",
        ),
        (AFTER.replace("    return total + 9", "return total + 9"), "line"),
    ],
)
def test_what_is_wrong_is_said(text: str, words: str) -> None:
    assert words in reasons(text)


@pytest.mark.parametrize("text", [AFTER, BEFORE, AFTER.replace("value * 9", "value * 99")])
def test_a_candidate_that_is_given_is_not_made_anew(text: str) -> None:
    candidate = candidate_merge(BEFORE, UPDATE)
    assert check(BEFORE, UPDATE, text, "x.py", candidate) == check(BEFORE, UPDATE, text, "x.py")
    doubted = replace(candidate, doubts=("a doubt",))
    assert check(BEFORE, UPDATE, text, "x.py", doubted) == ("a doubt", *check(BEFORE, UPDATE, text, "x.py"))


def test_a_marker_that_the_file_has_is_no_fault() -> None:
    before = "# ... the rest of the code ...\n" + BEFORE
    assert check(before, snippet_of(before, before.replace("f9", "g9")), before.replace("f9", "g9"), "x.py") == ()


def test_an_edit_without_a_place_is_flagged() -> None:
    assert "could not be placed" in "; ".join(check(BEFORE, "nothing_like_this(1)\n", BEFORE, "x.py"))


@pytest.mark.parametrize(
    ("text", "path", "expected"),
    [
        ("x = 1\n", "a.py", True),
        ("x = (\n", "a.py", False),
        ("const x = 1;\n", "a.js", True),
        ("const x = ;\n", "a.js", False),
        ("fn main() {}\n", "a.rs", True),
        ("anything (", "a.unknown", None),
        ("x = 1\n", None, True),
    ],
)
def test_parsing_by_file_name(text: str, path: str | None, expected: bool | None) -> None:
    assert parses(text, path) is expected


@pytest.mark.parametrize(
    ("left", "right", "equal"),
    [
        ("x = 1\n", "x  =  1\n\n", True),
        ("f(a,\n  b)\n", "f(a, b)\n", True),
        ("x = 1  # one\n", "x = 1\n", False),
        ("x = 'a b'\n", "x = 'a  b'\n", False),
        ("if a:\n    b\nc\n", "if a:\n    b\n    c\n", False),
        ("x = 1\n", "x = 2\n", False),
    ],
)
def test_equality_of_trees(left: str, right: str, equal: bool) -> None:
    assert same_syntax_tree(left, right, "a.py") is equal


def test_equality_without_a_grammar_is_of_words() -> None:
    assert same_syntax_tree("a  b\n", "a b", "a.unknown")
    assert not same_syntax_tree("a b", "ab", "a.unknown")
