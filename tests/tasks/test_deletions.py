"""Warnings about deletions that an edit does not show, from the texts of file, edit and result."""

from __future__ import annotations

import pytest

from paceline.tasks.definitions import Code
from paceline.tasks.deletions import named_for_removal, unexplained_deletions, word_similarity
from paceline.tasks.snippet import is_marker

FILE = """\
import os
import sys


def load(path):
    with open(path) as file:
        return file.read()


def save(path, text):
    os.write(path, text)
    sys.exit(1)


@cached
def first():
    return 1


@cached
def second():
    return 2


def last():
    return 9
"""
LOAD = FILE[FILE.index("def load") : FILE.index("def save")]
SAVE = FILE[FILE.index("def save") : FILE.index("@cached")]
LAST = FILE[FILE.index("\n\ndef last") :]


def unexplained(file: str, edit: str, result: str, *removed: str) -> list[str]:
    rows = edit.splitlines()
    markers = [is_marker(row) for row in rows]
    return unexplained_deletions(Code(file.splitlines()), result.splitlines(), Code(rows), markers, removed)


def without(*texts: str) -> str:
    result = FILE
    for text in texts:
        assert result.count(text) == 1
        result = result.replace(text, "")
    return result


@pytest.mark.parametrize(
    ("edit", "result", "removed"),
    [
        ("...\n", FILE, ()),
        # a definition of the same name comes in its place
        (
            "def load(path):\n    return open(path).read()\n",
            FILE.replace("    with open(path) as file:\n        return file.read()\n", "    return open(path).read()\n"),
            (),
        ),
        # the rows around are neighbours in the edit
        ("import os\n\n\ndef load(path):\n...\n", without("import sys\n"), ()),
        ("...\n    os.write(path, text)\n\n\n@cached\ndef first():\n...\n", without("    sys.exit(1)\n"), ()),
        ("...\n        return file.read()\n\n\n@cached\ndef first():\n...\n", without(SAVE), ()),
        # another name comes between neighbours that occur once
        ("import os\nimport sys\n\n\ndef read(path):\n    with open(path) as file:\n...\n", FILE.replace("load", "read"), ()),
        # a row like it comes in its place, beside a row that stays
        (
            "...\n    os.write(path, str(text))\n    sys.exit(1)\n...\n",
            FILE.replace("os.write(path, text)", "os.write(path, str(text))"),
            (),
        ),
        # the instruction names it
        ("...\n@cached\ndef first():\n...\n", without(SAVE), ("save",)),
        # decorators of a definition that the edit shows with others
        ("...\n@kept\ndef second():\n    return 2\n...\n", FILE.replace("@cached\ndef second", "@kept\ndef second"), ()),
        # it moves
        (f"{SAVE}{LOAD}...\n", without(LOAD).replace(SAVE, SAVE + LOAD), ()),
    ],
    ids=["none", "name", "neighbours", "end of a body", "definition", "rename", "like", "named", "decorator", "moved"],
)  # fmt: skip
def test_a_deletion_that_the_edit_shows_gives_no_warning(edit: str, result: str, removed: tuple[str, ...]) -> None:
    assert unexplained(FILE, edit, result, *removed) == []


@pytest.mark.parametrize(
    ("edit", "result", "row"),
    [
        # a new definition in the place of a neighbour
        ("...\ndef put():\n    pass\n...\n", FILE.replace(SAVE, "def put():\n    pass\n\n\n"), 10),
        # one behind a decorator that the next one has too
        ("...\n@cached\ndef second():\n    return 2\n...\n", without("def first():\n    return 1\n\n\n@cached\n"), 16),
        # a new one between decorators that are the same
        (
            "...\n@cached\ndef third():\n    return 3\n\n\n@cached\n...\n",
            FILE.replace("def first():\n    return 1\n", "def third():\n    return 3\n"),
            16,
        ),
        # behind a marker, at the file's end and at its beginning
        ("...\n@cached\ndef second():\n    return 2\n...\n", without(LAST), 25),
        ("...\n    with open(path, 'b') as file:\n...\n", without("import os\n"), 1),
        # a row with another one in its place that is not like it, where a neighbour is not shown
        ("...\n    os.write(path, text)\n    print(2)\n...\n", FILE.replace("sys.exit(1)", "print(2)"), 12),
        # nothing of it is in the edit
        ("import os\nimport sys\n...\n", without(SAVE), 10),
        ("import os\nimport sys\n...\n", without("    os.write(path, text)\n"), 11),
    ],
    ids=["neighbour", "one decorator", "two decorators", "end", "beginning", "unlike", "definition", "row"],
)  # fmt: skip
def test_a_deletion_that_the_edit_does_not_show_gives_a_warning_with_its_line(edit: str, result: str, row: int) -> None:
    (reason,) = unexplained(FILE, edit, result)
    assert reason.startswith((f"line {row} ", f"lines {row} "))
    assert "the edit does not show it" in reason and repr(FILE.splitlines()[row - 1].strip()) in reason


def test_another_name_in_the_instruction_explains_nothing() -> None:
    assert len(unexplained(FILE, "...\n@cached\ndef first():\n...\n", without(SAVE), "load")) == 1


def test_a_snippet_that_ends_without_a_marker_shows_the_end_of_the_file() -> None:
    """The merge then warns that it may be an excerpt: tests/tasks/test_merge.py."""
    assert unexplained(FILE, "...\n@cached\ndef second():\n    return 2\n", without(LAST)) == []


SETTINGS = "name: one\nversion: 1\nsize: 3\nowner: me\n"


@pytest.mark.parametrize(
    ("edit", "result", "shown"),
    [
        ("...\nversion: 2\n...\n", SETTINGS.replace("version: 1", "version: 2"), True),
        ("name: one\nsize: 3\n...\n", SETTINGS.replace("version: 1\n", ""), True),
        ("...\nsize: 3\n...\n", SETTINGS.replace("version: 1\n", ""), False),
        ("...\ncolour: red\n...\n", SETTINGS.replace("version: 1", "colour: red"), False),
        ("name: one\ncolour: red\n...\n", SETTINGS.replace("version: 1", "colour: red"), False),
        ("name: one\ncolour: red\nsize: 3\n...\n", SETTINGS.replace("version: 1", "colour: red"), True),
    ],
)
def test_a_key_goes_where_it_is_set_anew_or_its_neighbours_stand_together(edit: str, result: str, shown: bool) -> None:
    assert (unexplained(SETTINGS, edit, result) == []) is shown


def test_only_the_first_warnings_are_returned() -> None:
    file = "".join(f"value_{number} = {number}\n" for number in range(40))
    result = "".join(f"value_{number} = {number}\n" for number in range(40) if number % 3)
    assert 1 < len(unexplained(file, "...\n", result)) < 5


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ("text = “a”", 'text = "a"', True),
        ("it’s = 1", "it's = 1", True),
        ("a – b", "a - b", True),
        ("cafe\u0301 = 1", "caf\u00e9 = 1", True),
        ("a\u00a0= 'b c'", "a = 'b c'", True),
        ("zero\u200bwidth = 1", "zerowidth = 1", True),
        ("a  =  1", "a = 1", False),
        ("\ta = 1", "    a = 1", False),
        ("text = “a”", 'text = "b"', False),
    ],
)  # fmt: skip
def test_a_change_of_typography_only_gives_a_warning(before: str, after: str, said: bool) -> None:
    """Models change typography without being asked to. The edit shows the change, but rarely means it."""
    file, result = (f"one_row(1)\n{row}\nother_row(2)\n" for row in (before, after))
    reasons = unexplained(file, result, result)
    assert ["only in its quotes, spaces or accents" in reason for reason in reasons] == ([True] if said else [])


@pytest.mark.parametrize(
    ("instruction", "words"),
    [
        ("", set()),
        ("Add save.", set()),
        ("remove save", {"save"}),
        ("Deletes load and save.", {"load", "and", "save"}),
        ("rename load to read", {"load", "to", "read"}),
        ("Save the file. Remove load; add read.", {"load"}),
        ("Add Stripe payments and a dropdown to Checkout", set()),
    ],
)
def test_names_for_removal_follow_a_verb_of_removal(instruction: str, words: set[str]) -> None:
    assert named_for_removal(instruction) == words


def test_similarity_is_the_share_of_common_words() -> None:
    assert word_similarity("a b c d", "a b c d") == 1.0
    assert word_similarity("a b c d", "a b x y") == 0.5
    assert word_similarity("a", "b") == word_similarity("", "a") == word_similarity("()", "()") == 0.0
