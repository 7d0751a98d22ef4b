"""Other readings of a part of a snippet: the same rows put in whole, or put in another place that fits as well."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from itertools import accumulate

import numpy

from paceline.tasks.align import Placed, align, weight
from paceline.tasks.definitions import indent

_EQUAL = 0.25  # a share of a reading's worth, within which another one is as good
_GAPS = 8  # places where rows go that are looked at
_FEW = 3  # more file rows that another reading may delete


@dataclass(frozen=True)
class Insertion:
    """A part put in whole: for its rows, by number in the snippet, the file rows that they are; the others are new.

    `shown` says whether the rows above it are found, so that its place is shown.
    """

    matches: dict[int, int]
    new: tuple[int, ...]
    shown: bool


def insertion(placed: Placed, part: range) -> Insertion | None:
    """How a part is put in whole between two neighbouring rows of the file; None where it is not.

    Its first rows are then those above, its last rows those below, and what is between is new and closes what it opens.
    Where the snippet ends with the part, the file's end may stand for the rows below. After a marker a block may have no
    rows above. Of several places the one that says most is taken.
    """
    snippet, rows, bounds = placed.snippet.rows, placed.file.rows, placed.bounds(part)
    own = [row for row in part if snippet[row].strip()]
    full = [row for row in range(*bounds) if rows[row].strip()]
    text, found = [snippet[row].rstrip() for row in own], [rows[row].rstrip() for row in full]
    above, below = _run_lengths(text, found), _run_lengths(text[::-1], found[::-1])[::-1]
    at_end = part.stop == len(snippet) and bounds[1] == len(rows)
    said = list(accumulate(map(weight, text), initial=0.0))
    net = list(accumulate((sum((sign in "([{") - (sign in ")]}") for sign in row) for row in text), initial=0))
    best: tuple[float, int, int, int] | None = None
    for split in range(1, len(full) + 1):
        head = above[split]
        for tail in range(below[split], -1, -1):
            if head + tail >= len(own) or (tail == 0 and not (at_end and split == len(full))):
                continue
            stop = len(own) - tail
            if net[head] != net[stop] or (best is not None and said[head] + said[-1] - said[stop] <= best[0]):
                continue
            new = text[head:stop]
            if not _closed(new) or (head == 0 and not (part.start and _is_block(new))):
                continue
            best = said[head] + said[-1] - said[stop], split, head, tail
            break
    if best is None:
        return None
    _, split, head, tail = best
    pairs = [*zip(own[:head], full[split - head : split], strict=True)]
    pairs += zip(own[len(own) - tail :], full[split : split + tail], strict=True)
    return Insertion(dict(pairs), tuple(own[head : len(own) - tail]), head > 0)


def _is_block(rows: list[str]) -> bool:
    """Whether rows begin with one that opens a bracket, and all between it and their last are deeper."""
    return (
        len(rows) > 2 and rows[0].endswith(("{", "(", "[")) and all(indent(row) > indent(rows[0]) for row in rows[1:-1])
    )


def _run_lengths(text: list[str], rows: list[str]) -> list[int]:
    """For each place between rows how many of the first of `text` stand right before it."""
    lengths = [0] * (len(rows) + 1)
    reached = 0
    for start, size in enumerate(_common(text, rows)):
        for place in range(max(reached, start) + 1, start + size + 1):
            lengths[place] = place - start
        reached = max(reached, start + size)
    return lengths


def _common(text: list[str], rows: list[str]) -> list[int]:
    """For each of `rows` how many rows from it on are those that `text` begins with (the Z algorithm)."""
    joined: list[str | None] = [*text, None, *rows]
    sizes = [0] * len(joined)
    first = last = 0
    for place in range(1, len(joined)):
        size = min(sizes[place - first], last - place) if place < last else 0
        while place + size < len(joined) and joined[size] == joined[place + size]:
            size += 1
        sizes[place] = size
        if place + size > last:
            first, last = place, place + size
    return sizes[len(text) + 1 :]


def _closed(rows: list[str]) -> bool:
    """Whether the brackets that rows open are closed in them, and no others."""
    depth = 0
    for row in rows:
        for sign in row:
            depth += (sign in "([{") - (sign in ")]}")
        if depth < 0:
            return False
    return depth == 0


def told_apart(placed: Placed, other: Insertion, part: range) -> float:
    """What a part's rows say that are found as they are, once in the file, and that `other` does not find."""
    said = 0.0
    counts = Counter(row.strip() for row in placed.file.rows)
    for row in part:
        match = placed.matches[row]
        text = placed.snippet.rows[row]
        if match >= 0 and other.matches.get(row) != match and placed.kept(row) and counts[text.strip()] == 1:
            said += weight(text) if row != other.new[0] or other.shown else 0.0
    return said


def second_place(placed: Placed, scores: numpy.ndarray, part: range) -> int | None:
    """Another file row where rows of the part would stand as well; None where there is none.

    `scores` are those of the whole snippet with the file.
    """
    rows, bounds = placed.snippet.rows, placed.bounds(part)
    found = [(row, match) for row in part if (match := placed.matches[row]) >= 0 and rows[row].strip()]
    found = [pair for pair in found if scores[pair] > -numpy.inf]  # the others are where a part put in whole has them
    own = sum(float(scores[pair]) for pair in found)
    if own <= 0.0:
        return None
    lines = placed.file.rows
    ends = part.stop == len(rows) and not any(line.strip() for line in lines[found[-1][1] + 1 :])
    below = [number for number in range(1, len(found)) if found[number][1] - found[number - 1][1] > 1]
    for pairs in (found, *(found[number:] for number in below[:_GAPS])):
        masked = scores[part.start : part.stop, bounds[0] : bounds[1]].copy()
        for row, match in pairs:
            if bounds[0] <= match < bounds[1]:
                masked[row - part.start, match - bounds[0]] = -numpy.inf
        matches = _alone(masked, [not rows[row].strip() for row in part])
        worth = sum(float(masked[row, match]) for row, match in enumerate(matches) if match >= 0)
        if worth < own - _EQUAL * own or _passed(matches) > 2 * _passed([match for _, match in found]) + _FEW:
            continue
        last = max((match for match in matches if match >= 0), default=-1) + bounds[0]
        if ends and any(line.strip() for line in lines[last + 1 :]):
            continue  # the snippet ends where the file does, and not there
        moved = [matches[row - part.start] for row, _ in pairs if matches[row - part.start] >= 0]
        if moved:
            return bounds[0] + moved[0]
    return None


def _passed(matches: list[int]) -> int:
    """How many file rows are passed over between matches."""
    found = [match for match in matches if match >= 0]
    return found[-1] - found[0] + 1 - len(found) if found else 0


def _alone(scores: numpy.ndarray, blank: list[bool]) -> list[int]:
    """The best alignment of a part by itself, between two markers."""
    framed = numpy.full((len(scores) + 2, scores.shape[1]), -numpy.inf, dtype=numpy.float32)
    framed[1:-1] = scores
    (matches,) = align(framed, [True, *[False] * len(scores), True], [False, *blank, False], (1.0,))
    return matches[1:-1]
