"""Matching blocks of two texts."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from paceline.tasks.matching_blocks import matching_blocks

LINES = st.lists(st.sampled_from("abc"), max_size=12)


@given(LINES, LINES)
def test_blocks_are_equal_and_in_order(left: list[str], right: list[str]) -> None:
    found = matching_blocks(left, right)
    ends = (0, 0)
    for start, other, size in found:
        assert start >= ends[0] and other >= ends[1]
        assert left[start : start + size] == right[other : other + size]
        ends = start + size, other + size
    assert (sum(size for _, _, size in found) == len(left) == len(right)) == (left == right)


def test_a_change_among_lines_that_are_all_equal() -> None:
    left = ["x"] * 5000
    right = [*left[:2000], "y", *left[2001:]]
    assert sum(size for _, _, size in matching_blocks(left, right)) == 4999
