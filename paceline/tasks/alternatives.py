"""Alternative interpretations of a part of a snippet: inserted whole, or at another place that fits equally well."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from itertools import accumulate

import numpy

from paceline.tasks.alignment import Placement, align, line_weight
from paceline.tasks.definitions import indent

_EQUAL_SHARE = 0.25  # share by which an equally good place may score less; tuned with python -m benchmarks.merge
_MAX_GAPS = 8  # bounds time: gaps inside a part at which its rest is tried elsewhere
_MAX_EXTRA_ROWS = 3  # bounds how many more file rows an equally good place may pass over; not tuned


@dataclass(frozen=True)
class WholeInsertion:
    """A part inserted whole. `matches` maps its context rows to file rows, `new` are its inserted rows, both by snippet row.

    `anchored` says whether the part has matched rows above the new ones, which fix its place.
    """

    matches: dict[int, int]
    new: tuple[int, ...]
    anchored: bool


def whole_insertion(placement: Placement, part: range) -> WholeInsertion | None:
    """The insertion of a part between two neighbouring rows of the file; None where the part does not allow it.

    Its first rows match those above, its last rows those below, and the new rows between have balanced brackets. If the
    snippet ends with the part, the file's end may stand for the rows below. After a marker a block may lack rows above.
    Of several places the one with the greatest weight of matched rows is taken.
    """
    snippet, rows, bounds = placement.snippet.rows, placement.file.rows, placement.bounds(part)
    own = [row for row in part if snippet[row].strip()]
    full = [row for row in range(*bounds) if rows[row].strip()]
    text, found = [snippet[row].rstrip() for row in own], [rows[row].rstrip() for row in full]
    above, below = _run_lengths(text, found), _run_lengths(text[::-1], found[::-1])[::-1]
    at_end = part.stop == len(snippet) and bounds[1] == len(rows)
    weight_before = list(accumulate(map(line_weight, text), initial=0.0))
    net = list(accumulate((sum((sign in "([{") - (sign in ")]}") for sign in row) for row in text), initial=0))
    best: tuple[float, int, int, int] | None = None
    for split in range(1, len(full) + 1):
        head = above[split]
        for tail in range(below[split], -1, -1):
            if head + tail >= len(own) or (tail == 0 and not (at_end and split == len(full))):
                continue
            stop = len(own) - tail
            if net[head] != net[stop] or (
                best is not None and weight_before[head] + weight_before[-1] - weight_before[stop] <= best[0]
            ):
                continue
            new = text[head:stop]
            if not _is_balanced(new) or (head == 0 and not (part.start and _is_block(new))):
                continue
            best = weight_before[head] + weight_before[-1] - weight_before[stop], split, head, tail
            break
    if best is None:
        return None
    _, split, head, tail = best
    pairs = [*zip(own[:head], full[split - head : split], strict=True)]
    pairs += zip(own[len(own) - tail :], full[split : split + tail], strict=True)
    return WholeInsertion(dict(pairs), tuple(own[head : len(own) - tail]), head > 0)


def _is_block(rows: list[str]) -> bool:
    """Whether the first row opens a bracket and all rows between it and the last are indented deeper."""
    return (
        len(rows) > 2 and rows[0].endswith(("{", "(", "[")) and all(indent(row) > indent(rows[0]) for row in rows[1:-1])
    )


def _run_lengths(text: list[str], rows: list[str]) -> list[int]:
    """For each position between rows, how many of the first rows of `text` come directly before it."""
    lengths = [0] * (len(rows) + 1)
    reached = 0
    for start, size in enumerate(_prefix_lengths(text, rows)):
        for place in range(max(reached, start) + 1, start + size + 1):
            lengths[place] = place - start
        reached = max(reached, start + size)
    return lengths


def _prefix_lengths(text: list[str], rows: list[str]) -> list[int]:
    """For each of `rows`, the length of the common prefix of `text` and the rows from there on (the Z algorithm)."""
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


def _is_balanced(rows: list[str]) -> bool:
    """Whether the brackets in the rows are balanced. Strings and comments count as code."""
    depth = 0
    for row in rows:
        for sign in row:
            depth += (sign in "([{") - (sign in ")]}")
        if depth < 0:
            return False
    return depth == 0


def unique_weight_lost(placement: Placement, other: WholeInsertion, part: range) -> float:
    """The weight of a part's exact matches with rows that the file has once and that `other` does not match."""
    weight = 0.0
    counts = Counter(row.strip() for row in placement.file.rows)
    for row in part:
        match = placement.matches[row]
        text = placement.snippet.rows[row]
        if match >= 0 and other.matches.get(row) != match and placement.is_unchanged(row) and counts[text.strip()] == 1:
            weight += line_weight(text) if row != other.new[0] or other.anchored else 0.0
    return weight


def equally_good_row(placement: Placement, scores: numpy.ndarray, part: range) -> int | None:
    """Another file row that a row of the part could match equally well; None where there is none.

    `scores` are the match scores of the whole snippet, [snippet rows, file rows].
    """
    rows, bounds = placement.snippet.rows, placement.bounds(part)
    found = [(row, match) for row in part if (match := placement.matches[row]) >= 0 and rows[row].strip()]
    found = [pair for pair in found if scores[pair] > -numpy.inf]  # the others were forced by a whole insertion
    own = sum(float(scores[pair]) for pair in found)
    if own <= 0.0:
        return None
    lines = placement.file.rows
    ends = part.stop == len(rows) and not any(line.strip() for line in lines[found[-1][1] + 1 :])
    below = [number for number in range(1, len(found)) if found[number][1] - found[number - 1][1] > 1]
    for pairs in (found, *(found[number:] for number in below[:_MAX_GAPS])):
        masked = scores[part.start : part.stop, bounds[0] : bounds[1]].copy()
        for row, match in pairs:
            if bounds[0] <= match < bounds[1]:
                masked[row - part.start, match - bounds[0]] = -numpy.inf
        matches = _align_part(masked, [not rows[row].strip() for row in part])
        worth = sum(float(masked[row, match]) for row, match in enumerate(matches) if match >= 0)
        if (
            worth < own - _EQUAL_SHARE * own
            or _num_passed_over(matches) > 2 * _num_passed_over([match for _, match in found]) + _MAX_EXTRA_ROWS
        ):
            continue
        last = max((match for match in matches if match >= 0), default=-1) + bounds[0]
        if ends and any(line.strip() for line in lines[last + 1 :]):
            continue  # the snippet ends where the file does, and this place is not there
        moved = [matches[row - part.start] for row, _ in pairs if matches[row - part.start] >= 0]
        if moved:
            return bounds[0] + moved[0]
    return None


def _num_passed_over(matches: list[int]) -> int:
    """The number of file rows passed over between matches."""
    found = [match for match in matches if match >= 0]
    return found[-1] - found[0] + 1 - len(found) if found else 0


def _align_part(scores: numpy.ndarray, blank: list[bool]) -> list[int]:
    """The best alignment of a part alone, as between two markers."""
    framed = numpy.full((len(scores) + 2, scores.shape[1]), -numpy.inf, dtype=numpy.float32)
    framed[1:-1] = scores
    (matches,) = align(framed, [True, *[False] * len(scores), True], [False, *blank, False], (1.0,))
    return matches[1:-1]
