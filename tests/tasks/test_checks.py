"""The checks flag results with one fault, and pass right ones."""

from __future__ import annotations

from dataclasses import replace

import pytest

from paceline.tasks.checks import check, same_syntax_tree
from paceline.tasks.languages import num_errors, suffix_of
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
def test_a_wrong_result_is_flagged(text: str, words: str) -> None:
    assert words in reasons(text)


@pytest.mark.parametrize("text", [AFTER, BEFORE, AFTER.replace("value * 9", "value * 99")])
def test_a_given_candidate_is_used(text: str) -> None:
    candidate = candidate_merge(BEFORE, UPDATE)
    assert check(BEFORE, UPDATE, text, "x.py", candidate) == check(BEFORE, UPDATE, text, "x.py")
    with_warning = replace(candidate, warnings=("a warning",))
    assert check(BEFORE, UPDATE, text, "x.py", with_warning) == ("a warning", *check(BEFORE, UPDATE, text, "x.py"))


def test_a_marker_that_the_file_has_is_no_fault() -> None:
    before = "# ... the rest of the code ...\n" + BEFORE
    assert check(before, snippet_of(before, before.replace("f9", "g9")), before.replace("f9", "g9"), "x.py") == ()


def test_an_edit_without_a_place_is_flagged() -> None:
    assert "could not be placed" in "; ".join(check(BEFORE, "nothing_like_this(1)\n", BEFORE, "x.py"))


def parses(text: str, path: str | None) -> bool | None:
    errors = num_errors(text, suffix_of(path, text))
    return None if errors is None else errors == 0


@pytest.mark.parametrize(
    ("text", "path", "expected"),
    [
        ("x = 1\n", "a.py", True),
        ("x = (\n", "a.py", False),
        ("const x = 1;\n", "a.js", True),
        ("const x = ;\n", "a.js", False),
        ("fn main() {}\n", "a.rs", True),
        ("anything (", "a.unknown", None),
        ("x = 1\n", None, None),
        ("x = (\n", None, None),
        (BEFORE, None, True),
        (BEFORE + "x = (\n", None, False),
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


def test_equality_without_a_grammar_is_of_rows() -> None:
    assert same_syntax_tree("a b  \nc\n\n", "a b\nc", "a.unknown")
    assert not same_syntax_tree("a  b", "a b", "a.unknown")
    assert not same_syntax_tree("a\n  b", "a\nb", "a.unknown")
    assert not same_syntax_tree("a\n\nb", "a\nb", "a.unknown")


def check_reasons(code: str, update: str, path: str | None, text: str | None = None) -> str:
    """The reasons of the checks for the merge by rule, or for another text in its place."""
    merge = candidate_merge(code, update, path)
    return "; ".join(check(code, update, merge.text if text is None else text, path, merge))


@pytest.mark.parametrize("path", [None, "a.txt", "README", "a.unknown"])
def test_text_of_no_known_language_is_not_parsed(path: str | None) -> None:
    code = "Dear all,\n\nthe (new) office is open.\n\nYours\n"
    assert check_reasons(code, code.replace("open.", "open :-)."), path) == ""


@pytest.mark.parametrize(
    ("path", "code", "broken"),
    [
        ("a.yaml", "name: a\nversion: 1\n", "name: a\nversion: [1\n"),
        ("a.yml", "name: a\nsteps:\n  - one\n", "name: a\nsteps:\n  - one\n - two: [\n"),
        ("a.toml", "[a]\nx = 1\ny = 2\n", "[a]\nx = = 1\ny = 2\n"),
        ("a.php", "<?php\n$a = 1;\n$b = 2;\n", "<?php\n$a = (1;\n$b = 2;\n"),
        ("a.json", '{\n  "a": 1,\n  "b": 2\n}\n', '{\n  "a": 1\n  "b": 2\n}\n'),
        ("a.ipynb", '{\n  "cells": [],\n  "nbformat": 4\n}\n', '{\n  "cells": []\n  "nbformat": 4\n}\n'),
        ("a.lua", "local a = 1\nlocal b = 2\n", "local a = (1\nlocal b = 2\n"),
    ],
)
def test_an_edit_that_breaks_the_file_is_flagged(path: str, code: str, broken: str) -> None:
    assert parses(code, path) is True
    assert "the result has a syntax error, and the file has none" in check_reasons(code, broken, path)


def test_an_error_more_than_the_file_has_is_flagged_and_the_files_own_is_not() -> None:
    code = "def f(:\n    return 1\n\n\ndef g():\n    return 2\n"
    assert "syntax error" in check_reasons(code, code.replace("return 2", "return (2"), "a.py")
    assert "syntax error" not in check_reasons(code, code.replace("return 2", "return 3"), "a.py")


@pytest.mark.parametrize("signs", ["()", "[]", "-"])
def test_a_deep_expression_is_checked_like_any_other(signs: str) -> None:
    code = f"x = {signs[0] * 5000}1{signs[1:] * 5000}\ny = 1\nz = 3\n"
    changed = code.replace("y = 1", "y = 2")
    assert check_reasons(code, changed, "a.py") == ""
    assert same_syntax_tree(code, code.replace("y = 1", "y  =  1"), "a.py")
    assert not same_syntax_tree(code, changed, "a.py")
    assert check_reasons(code, changed, "a.py", code) != ""


PAGE = "# Title\n\nRun:\n\n```sh\nmake\n```\n\nThen read it.\n\n```sh\nmake test\n```\n\n## Help\n\nAsk us.\nBye for now.\n"
CONTENT = "<!-- ... existing content ... -->\n"


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("make test\n", "make check\n"),
        ("Then read it.\n", "Then read it all.\n"),
        ("make test\n```\n", "make test\n```\n\n```python\nprint(1)\n```\n"),
    ],
)
def test_markdown_is_not_flagged_for_its_fences(before: str, after: str) -> None:
    changed = PAGE.replace(before, after)
    assert check_reasons(PAGE, snippet_of(PAGE, changed, "a.md"), "a.md") == ""
    assert check_reasons(PAGE, snippet_of(PAGE, changed, "a.md"), "a.md", changed) == ""


def test_a_whole_markdown_file_is_not_flagged_for_its_fences() -> None:
    page = PAGE[: PAGE.index("\n## Help")]
    assert check_reasons(page, page.replace("make test", "make check"), "a.md") == ""


def test_a_fence_that_neither_file_nor_edit_has_is_flagged() -> None:
    changed = PAGE.replace("Ask us.", "Ask them.")
    assert "is a fence" in check_reasons(
        PAGE, snippet_of(PAGE, changed, "a.md"), "a.md", f"```markdown\n{changed}```\n"
    )


@pytest.mark.parametrize("lost", ["Run:\n", "make\n", "Then read it.\n", "## Help\n"])
def test_a_line_that_a_model_dropped_from_markdown_is_found(lost: str) -> None:
    changed = PAGE.replace("Ask us.", "Ask them.")
    update = snippet_of(PAGE, changed, "a.md", 2)
    assert check_reasons(PAGE, update, "a.md") == ""
    assert "is missing" in check_reasons(PAGE, update, "a.md", changed.replace(lost, "", 1))


SETTINGS = "name: a\nlist:\n  - one\n  - two\nversion: 1\nsize: 3\n"


@pytest.mark.parametrize("lost", ["name: a\n", "  - one\n", "  - two\n", "version: 1\n"])
def test_a_line_that_a_model_dropped_from_yaml_is_found(lost: str) -> None:
    update = "# ... existing code ...\nversion: 1\nsize: 4\n"
    changed = SETTINGS.replace("size: 3", "size: 4")
    assert check_reasons(SETTINGS, update, "a.yaml", changed) == ""
    assert parses(changed.replace(lost, ""), "a.yaml")
    assert "is missing" in check_reasons(SETTINGS, update, "a.yaml", changed.replace(lost, ""))


def test_rows_that_a_model_swapped_in_a_text_without_grammar_are_found() -> None:
    code = "one two\nthree four\nfive six\nseven eight\n"
    update = code.replace("five six", "five nine")
    swapped = "three four\none two\nfive nine\nseven eight\n"
    assert check_reasons(code, update, "a.txt") == ""
    assert check_reasons(code, update, "a.txt", swapped) != ""


@pytest.mark.parametrize("line", ["# ... existing code ...", "    # ...", "..."])
def test_a_marker_that_is_left_in_the_result_is_flagged(line: str) -> None:
    assert "is a marker" in reasons(AFTER.replace("def f2", f"{line}\ndef f2"))


def test_an_edit_that_changes_nothing_is_flagged() -> None:
    assert "the edit changes nothing" in check_reasons(BEFORE, BEFORE, "x.py")
