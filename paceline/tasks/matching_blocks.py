"""Matching blocks: runs of equal lines of two texts, as difflib finds them, in bounded time."""

from __future__ import annotations

import difflib
from collections import Counter

_MAX_PAIRS = 1_000_000  # bounds time: with more pairs of equal lines difflib, which looks at each, takes seconds


def matching_blocks(left: list[str], right: list[str]) -> list[tuple[int, int, int]]:
    """(start in left, start in right, number of equal lines) of each block, in order.

    For texts with very many equal lines: the common beginning, what difflib finds between without popular lines, and the
    common end.
    """
    counts = Counter(right)
    if sum(counts[line] for line in left) <= _MAX_PAIRS:
        return _matching_between(left, right, 0, 0, False)
    most = min(len(left), len(right))
    head = next((row for row in range(most) if left[row] != right[row]), most)
    tail = next((row for row in range(most - head) if left[-1 - row] != right[-1 - row]), most - head)
    return [
        (0, 0, head),
        *_matching_between(left, right, head, tail, True),
        (len(left) - tail, len(right) - tail, tail),
    ]


def _matching_between(
    left: list[str], right: list[str], head: int, tail: int, rough: bool
) -> list[tuple[int, int, int]]:
    """The matching blocks between a common beginning of `head` lines and a common end of `tail` lines."""
    first, second = left[head : len(left) - tail], right[head : len(right) - tail]
    blocks = difflib.SequenceMatcher(None, first, second, autojunk=rough).get_matching_blocks()
    return [(head + block.a, head + block.b, block.size) for block in blocks[:-1]]
