"""Runs of lines that two texts have in common."""

from __future__ import annotations

import difflib
from collections import Counter

_PAIRS = 1_000_000  # pairs of equal lines beyond which difflib, which looks at each, would take seconds


def runs(left: list[str], right: list[str]) -> list[tuple[int, int, int]]:
    """Where lines of both begin and how many are equal, in order, as difflib finds them.

    Of texts with very many equal lines what both begin and end with, and what difflib finds between without those.
    """
    counts = Counter(right)
    if sum(counts[line] for line in left) <= _PAIRS:
        return _compared(left, right, 0, 0, False)
    most = min(len(left), len(right))
    head = next((row for row in range(most) if left[row] != right[row]), most)
    tail = next((row for row in range(most - head) if left[-1 - row] != right[-1 - row]), most - head)
    return [(0, 0, head), *_compared(left, right, head, tail, True), (len(left) - tail, len(right) - tail, tail)]


def _compared(left: list[str], right: list[str], head: int, tail: int, rough: bool) -> list[tuple[int, int, int]]:
    first, second = left[head : len(left) - tail], right[head : len(right) - tail]
    blocks = difflib.SequenceMatcher(None, first, second, autojunk=rough).get_matching_blocks()
    return [(head + block.a, head + block.b, block.size) for block in blocks[:-1]]
