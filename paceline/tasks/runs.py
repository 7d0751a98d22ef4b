"""Runs of lines that two texts have in common."""

from __future__ import annotations

import difflib
from collections import Counter

_PAIRS = (
    300_000  # equal pairs of lines from which difflib, which looks at each, is let pass over the most frequent lines
)


def runs(left: list[str], right: list[str]) -> list[tuple[int, int, int]]:
    """Where lines of both begin and how many are equal, in order: what both begin and end with, and difflib's between."""
    most = min(len(left), len(right))
    head = next((row for row in range(most) if left[row] != right[row]), most)
    tail = next((row for row in range(most - head) if left[-1 - row] != right[-1 - row]), most - head)
    first, second = left[head : len(left) - tail], right[head : len(right) - tail]
    counts = Counter(second)
    many = sum(counts[line] for line in first) > _PAIRS
    blocks = difflib.SequenceMatcher(None, first, second, autojunk=many).get_matching_blocks()[:-1]
    middle = [(head + block.a, head + block.b, block.size) for block in blocks]
    return [(0, 0, head), *middle, (len(left) - tail, len(right) - tail, tail)]
