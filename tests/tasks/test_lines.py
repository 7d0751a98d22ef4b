"""Rows of a text and their line ends: rows that are not new keep their bytes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paceline.tasks.lines import Lines

TEXTS = st.lists(st.sampled_from(["\ufeff", "a", "b ", "\t", "\r", "\n", "\r\n", "\x0c", "\u2028"]), max_size=20).map(
    "".join
)


@given(TEXTS)
def test_all_rows_of_a_text_are_the_text(text: str) -> None:
    lines = Lines.of(text)
    assert lines.join(range(len(lines.rows))) == text
    assert lines.join(lines.matched_rows(lines.rows)) == text


@pytest.mark.parametrize(
    ("text", "rows", "expected"),
    [
        ("a\r\nb\nc\r\nd\r\n", [0, 1, 2, "x"], "a\r\nb\nc\r\nx\r\n"),
        ("a\nb\r\nc\nd\n", [0, "x", 2, 3], "a\nx\r\nc\nd\n"),
        ("a\r\nb", [0, "x", "y"], "a\r\nx\r\ny"),
        ("a\r\nb", [0, 1, "y"], "a\r\nb\r\ny"),
        ("a\nb", [0], "a\n"),
        ("a\nb\n", ["x", 0, 1], "x\na\nb\n"),
        ("\ufeffa\n", ["x"], "\ufeffx\n"),
        ("", ["x"], "x\n"),
        ("a", [], ""),
    ],
)
def test_new_rows_take_the_ends_of_those_they_replace(text: str, rows: list[int | str], expected: str) -> None:
    assert Lines.of(text).join(rows) == expected


def test_the_end_of_the_last_row_can_be_said() -> None:
    lines = Lines.of("a\nb")
    assert lines.join([0, 1], final_newline=True) == "a\nb\n"
    assert lines.join([0], final_newline=False) == "a"
