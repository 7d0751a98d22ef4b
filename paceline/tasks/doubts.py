"""What speaks against a merge by rule: where the snippet does not say what becomes of a part of the file."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from itertools import pairwise

import numpy

from paceline.tasks.align import Placed, parts_of, weight
from paceline.tasks.definitions import indent, shown_whole
from paceline.tasks.lines import Row
from paceline.tasks.names import LEADS, key_of
from paceline.tasks.readings import second_place
from paceline.tasks.repeats import repeats_of
from paceline.tasks.shown import likeness
from paceline.tasks.snippet import Marker

_MUCH = 60  # file rows in one place that an edit removes without showing them, from which that is doubtful
# rows that a file begins with and that an edit of what follows leaves out, and how comments begin
_PREAMBLE = re.compile(
    r"#!|# -\*-|# syntax=|# escape=|---$|<\?|//go:build|// \+build|[\"']use \w+[\"']|%YAML|<!doctype", re.IGNORECASE
)
_COMMENT = re.compile(r"#|//|/\*|\*|--|<!|;|%")
# a comment that says that something went
_GONE = re.compile(
    r"^\W*(?:removed?|deleted?)\b\W*(?:def|class|function|the|this|old)?\b|\b(?:removed|deleted)\W*$", re.IGNORECASE
)
_OPENERS = ("{", "(", "[", ":", ">", "do", "then", "|")  # ends of rows that open a block
_NEARLY = 0.7  # the share of a file's rows from which an edit shows nearly all of it
_LONG = 25  # file rows after an edit that ends with a whole definition, which it surely leaves out
_NEAR = 4  # file rows on either side among which a row must be the only one of its like
_ALIKE = 0.7  # share of words (Dice) from which a row is like another
_CONTEXT = 0.5  # what the rows beside a marker must weigh that say where it is


def doubts_of(
    placed: Placed,
    scores: numpy.ndarray,
    result: Sequence[Row],
    texts: list[str],
    other: list[str],
    levels: Sequence[Marker] | None,
    removed: Collection[str] = (),
) -> list[str]:
    """Reasons, a sentence each. `texts` are the rows of `result`, `other` those of an alignment at other costs.

    `scores` are those by which the snippet was placed. `levels` says which rows of an edit may be markers, None where it
    has none of its own, `removed` what the instruction names that goes.
    """
    kept = {row for row in result if isinstance(row, int)}
    doubts = [*placed.doubts, *_difference(texts, other)]
    doubts += _second_places(placed, scores)
    doubts += _open_edges(placed, kept, levels is not None)
    doubts += _unplaced(placed)
    doubts += repeats_of(placed, result, texts, levels is not None)
    doubts += _removed(placed, kept)
    doubts += _trailing(placed)
    if levels is None:
        doubts += [*_skipped(placed, removed), *_left_over(placed, kept), *_shown_together(placed)]
    else:
        doubts += _unchanged_parts(placed)
        doubts += _ends(placed, kept)
        doubts += _markers(placed, levels)
        doubts += _beside_blanks(placed)
    return doubts


def _difference(result: list[str], other: list[str]) -> list[str]:
    if result == other:
        return []
    pairs = enumerate(zip(result, other, strict=False), 1)
    number = next((number for number, (left, right) in pairs if left != right), min(len(result), len(other)) + 1)
    return [f"line {number}: the edit can be placed in more than one way"]


def _second_places(placed: Placed, scores: numpy.ndarray) -> list[str]:
    """A part that would stand as well somewhere else."""
    doubts = []
    for part in parts_of(placed.markers):
        place = second_place(placed, scores, part)
        own = next((placed.matches[row] for row in part if placed.matches[row] >= 0), None)
        if place is not None and own is not None:
            text = placed.snippet.rows[next(row for row in part if placed.snippet.rows[row].strip())].strip()
            doubts.append(f"{text!r} and on fits line {own + 1} and line {place + 1} of the file equally well")
    return doubts


def _open_edges(placed: Placed, kept: set[int], marked: bool) -> list[str]:
    """A changed row beside a marker, or at an end that is not the file's: what it replaces is not shown."""
    snippet, markers, lines = placed.snippet.rows, placed.markers, placed.file.rows
    found = [(row, match) for row, match in enumerate(placed.matches) if match >= 0]
    full = [row for row, line in enumerate(snippet) if line.strip()]
    begins = not found or any(line.strip() for line in lines[: found[0][1]])
    ends = not found or any(line.strip() for line in lines[found[-1][1] + 1 :])
    edges = [row for row in full if markers[row] and (marked or full[0] < row < full[-1])]
    edges += [full[0] if markers[full[0]] else -1] if begins else []
    edges += [full[-1] if markers[full[-1]] else len(snippet)] if ends else []
    for edge in edges:
        for step in (-1, 1):
            row, told = edge + step, 0.0
            while 0 <= row < len(snippet) and not markers[row] and (placed.kept(row) or not snippet[row].strip()):
                told += weight(snippet[row]) if snippet[row].strip() else 0.0
                row += step
            if not 0 <= row < len(snippet) or markers[row] or replaces(placed, row):
                continue
            if _ends_definition(placed, row, kept) if step < 0 else _begins_definition(placed, row):
                continue
            if told == 0.0 and row != edge + step and _ends_paragraph(placed, row, step):
                continue
            if told == 0.0 or (told < _CONTEXT and _passed_over(placed, row)):
                return [f"{snippet[row].strip()!r} is new where the edit breaks off: what it replaces is not shown"]
    return []


def _ends_paragraph(placed: Placed, row: int, step: int) -> bool:
    """Whether new rows from `row` on come right beside found ones, where the file has a blank row beside those."""
    rows, last = placed.snippet.rows, row
    while 0 <= last < len(rows) and rows[last].strip() and placed.matches[last] < 0 and not placed.markers[last]:
        last += step
    if not 0 <= last < len(rows) or placed.markers[last] or not placed.kept(last) or not rows[last].strip():
        return False
    beside = placed.matches[last] - step
    return 0 <= beside < len(placed.file.rows) and not placed.file.rows[beside].strip()


def replaces(placed: Placed, row: int) -> bool:
    """Whether a changed row surely stands in for the file row it was matched with.

    It has its name or sets its key, and no other row where the edit may stand does, or it is right beside a found row; or
    it is like it, beside a found row, and like no other one near.
    """
    match = placed.matches[row]
    if match < 0:
        return False
    file, line = placed.file, placed.snippet.rows[row]
    if placed.snippet.names[row] is not None or file.names[match] is not None:
        return placed.snippet.names[row] == file.names[match]
    beside = _beside(placed, row, -1) or _beside(placed, row, 1)
    key = key_of(line)
    if key is not None and key == key_of(file.rows[match]):
        first, last = placed.scopes[row]
        return beside or sum(key_of(each) == key for each in file.rows[first:last]) == 1
    around = range(max(0, match - _NEAR), min(len(file.rows), match + _NEAR + 1))
    near = [file.rows[number] for number in around if number != match]
    alike = likeness(line, file.rows[match]) >= _ALIKE and all(likeness(line, each) < _ALIKE / 2 for each in near)
    return beside and alike


def _beside(placed: Placed, row: int, step: int) -> bool:
    """Whether the next row that is not blank is found, as it is, next to what `row` was matched with."""
    rows, lines = placed.snippet.rows, placed.file.rows
    match = placed.matches[row] + step
    row += step
    while 0 <= row < len(rows) and not rows[row].strip():
        row += step
    while 0 <= match < len(lines) and not lines[match].strip():
        match += step
    return 0 <= row < len(rows) and placed.matches[row] == match and placed.kept(row)


def _passed_over(placed: Placed, row: int) -> bool:
    """Whether file rows go where the new row `row` comes."""
    rows = range(len(placed.markers))
    above = next((each for each in rows[row::-1] if placed.matches[each] >= 0 or placed.markers[each]), 0)
    below = next((each for each in rows[row + 1 :] if placed.matches[each] >= 0 or placed.markers[each]), 0)
    return 0 <= placed.matches[above] < placed.matches[below] - 1


def _ends_definition(placed: Placed, row: int, kept: set[int]) -> bool:
    """Whether `row` is the last row of a definition that is shown whole, and nothing of the file's stays after it."""
    header = shown_whole(placed.snippet, placed.markers, row)
    if header is None:
        return False
    last = max((match for match in placed.matches[header : row + 1] if match >= 0), default=None)
    if last is None:
        return True
    lines = placed.file.rows
    after = next((lines[each] for each in range(last + 1, len(lines)) if lines[each].strip() and each in kept), "")
    return indent(after) <= indent(placed.snippet.rows[header])


def _begins_definition(placed: Placed, row: int) -> bool:
    """Whether decorators or comments from `row` on, or none, lead to a definition."""
    for each in range(row, len(placed.markers)):
        if placed.snippet.names[each]:
            return True
        if placed.markers[each] or not placed.snippet.rows[each].strip().startswith(LEADS):
            return False
    return False


def _unplaced(placed: Placed) -> list[str]:
    """A part of new rows between two markers: where between them it goes is not shown."""
    doubts = []
    for part in parts_of(placed.markers):
        full = [row for row in part if placed.snippet.rows[row].strip()]
        if not full or any(placed.matches[row] >= 0 for row in full):
            continue
        if part.start > 0 and part.stop < len(placed.markers) and _rows_between(placed, part):
            doubts.append(
                f"{placed.snippet.rows[full[0]].strip()!r} is new, and the edit does not show after which line"
            )
    return doubts


def _rows_between(placed: Placed, part: range) -> bool:
    """Whether the file has more than closing rows between what is found before a part and after it."""
    first = max((match for match in placed.matches[: part.start] if match >= 0), default=-1)
    last = min((match for match in placed.matches[part.stop :] if match >= 0), default=len(placed.file.rows))
    return any(any(map(str.isalnum, line)) for line in placed.file.rows[first + 1 : last])


def _unchanged_parts(placed: Placed) -> list[str]:
    """A part between markers that changes nothing, and is not the header of what follows it: why is it shown?"""
    edges = [row for row, marker in enumerate(placed.markers) if marker]
    for start, stop in pairwise(edges):
        rows = [row for row in range(start + 1, stop) if placed.snippet.rows[row].strip()]
        found = [placed.matches[row] for row in rows]
        if not rows or -1 in found:
            continue
        last = placed.snippet.rows[rows[-1]]
        opens = last.rstrip().endswith(_OPENERS) and indent(last) < indent(placed.snippet.rows[stop])
        if rows[-1] == stop - 1 and (opens or placed.snippet.names[rows[-1]]):
            continue
        if placed.file.rows[found[0] : found[-1] + 1] == placed.snippet.rows[rows[0] : rows[-1] + 1]:
            return [f"{placed.snippet.rows[rows[0]].strip()!r} and on changes nothing where it was found"]
    return []


def _beside_blanks(placed: Placed) -> list[str]:
    """A found row with a blank one between it and a marker, where the edit else shows one row around its changes.

    What stood between the two may be meant to go.
    """
    rows = placed.snippet.rows
    edges = []  # how many rows come before the first that is new, and the first two of them
    for part in parts_of(placed.markers):
        for order, inner in ((part, part.start > 0), (part[::-1], part.stop < len(rows))):
            if inner and len(order) > 1:
                new = (number for number, row in enumerate(order) if rows[row].strip() and not placed.kept(row))
                edges.append((next(new, len(order)), rows[order[0]].strip(), rows[order[1]].strip()))
    if not any(size == 1 and first for size, first, _ in edges):
        return []
    return [
        f"{second!r} stands beside a blank line: what was between the two may be meant to go"
        for size, first, second in edges
        if size > 1 and second and not first
    ][:1]


def _is_head(lines: list[str], above: list[int], first: int) -> bool:
    """Whether the rows above the first one found are the comments that a file begins with, and that one is none."""
    return all(_COMMENT.match(lines[row].lstrip()) for row in above) and not _COMMENT.match(lines[first].lstrip())


def is_preamble(row: str) -> bool:
    """Whether a row is of those that a file begins with and that an edit of what follows leaves out."""
    return bool(_PREAMBLE.match(row.lstrip()))


def _ends(placed: Placed, kept: set[int]) -> list[str]:
    """File rows beyond an end at which an edit with markers has none: it may show that the file begins or ends there."""
    lines, markers = placed.file.rows, placed.markers
    found = [match for match in placed.matches if match >= 0]
    doubts: list[str] = []
    above = [row for row in range(found[0]) if lines[row].strip()] if found else []
    if found and (all(is_preamble(lines[row]) for row in above) or _is_head(lines, above, found[0])):
        above = []
    below = [row for row in range(found[-1] + 1, len(lines)) if lines[row].strip()] if found else []
    if any(
        row.strip()
        for row in placed.snippet.rows[max(range(len(placed.matches)), key=placed.matches.__getitem__) + 1 :]
    ):
        below = [row for row in below if row in kept]  # those that the edit's last rows replace are another matter
    first = next((row for row, match in enumerate(placed.matches) if match >= 0), 0)
    last = max((row for row, match in enumerate(placed.matches) if match >= 0), default=0)
    if above and below and not any(markers[:first]) and not any(markers[last:]):
        return []  # an excerpt
    if above and not any(markers[:first]):
        doubts.append(
            f"no marker stands for line {above[0] + 1} of the file, before the edit's first: it may stay or go"
        )
    whole = len(below) > _LONG and below[0] in kept and _ends_with_definition(placed)
    if below and not any(markers[last:]) and not whole:
        doubts.append(
            f"no marker stands for line {below[0] + 1} of the file and on, after the edit's last: it may end there"
        )
    return doubts


def _ends_with_definition(placed: Placed) -> bool:
    """Whether the edit ends with a definition of the file, whole: the file then goes on as it did."""
    last = max(row for row, line in enumerate(placed.snippet.rows) if line.strip())
    header = shown_whole(placed.snippet, placed.markers, last)
    return header is not None and len(placed.file.headers.get(placed.snippet.names[header] or ("", ""), [])) == 1


def _markers(placed: Placed, levels: Sequence[Marker]) -> list[str]:
    """A comment that may be a marker or a comment, or that says what goes, and a marker that stands for nothing."""
    doubts = [
        f"{line.strip()!r} may say that lines go, which stay"
        for row, line in enumerate(placed.snippet.rows)
        if placed.matches[row] < 0 and line.lstrip().startswith(LEADS) and _GONE.search(line)
    ]
    full = [row for row, line in enumerate(placed.snippet.rows) if line.strip()]
    for row, level in enumerate(levels):
        text = placed.snippet.rows[row].strip()
        if level is Marker.POSSIBLE:
            doubts.append(f"{text!r} is taken for a marker of left-out code; it may be a comment")
        elif level is Marker.CERTAIN and full[0] < row < full[-1]:
            above = max((match for match in placed.matches[:row] if match >= 0), default=-1)
            below = min((match for match in placed.matches[row:] if match >= 0), default=len(placed.file.rows))
            if above + 1 >= below:
                doubts.append(f"{text!r} stands for no line of the file")
    return doubts


def _skipped(placed: Placed, removed: Collection[str]) -> list[str]:
    """More file rows than come that go between two found ones, in an edit without markers: it may leave them out."""
    found = [(row, match) for row, match in enumerate(placed.matches) if match >= 0]
    for (above, first), (below, last) in pairwise(found):
        if any(placed.markers[above:below]):
            continue
        put = sum(bool(line.strip()) for line in placed.snippet.rows[above + 1 : below])
        if any(name and name[1] in removed for name in placed.file.names[first + 1 : last]):
            continue
        if sum(bool(line.strip()) for line in placed.file.rows[first + 1 : last]) > put:
            return [f"line {first + 2} of the file and on would go, and the edit has no marker for what it leaves out"]
    return []


def _shown_together(placed: Placed) -> list[str]:
    """File rows that stay between two rows that an edit without markers has as neighbours."""
    rows, lines = placed.snippet.rows, placed.file.rows
    full = [row for row, line in enumerate(rows) if line.strip() and not placed.markers[row]]
    for above, below in pairwise(full):
        first, last = placed.matches[above], placed.matches[below]
        if (
            any(placed.markers[above:below])
            and 0 <= first < last
            and any(line.strip() for line in lines[first + 1 : last])
        ):
            return [f"line {first + 2} of the file and on stay, between two that the edit shows together"]
    return []


def _trailing(placed: Placed) -> list[str]:
    """Rows that keep white space at their end which the edit shows without."""
    rows = [
        placed.matches[row] + 1
        for row, line in enumerate(placed.snippet.rows)
        if placed.kept(row) and line != placed.file.rows[placed.matches[row]]
    ]
    return (
        [f"line {rows[0]} of the file keeps the white space at its end, which the edit does not have"] if rows else []
    )


def _left_over(placed: Placed, kept: set[int]) -> list[str]:
    """File rows right before or after an edit without markers that shows nearly all of the file, and may be all of it."""
    lines = placed.file.rows
    found = [match for match in placed.matches if match >= 0 and lines[match].strip()]
    full = [row for row, line in enumerate(lines) if line.strip()]
    outside = [row for row in full if row in kept and found and row in (found[0] - 1, found[-1] + 1)]
    if not outside or len(found) < _NEARLY * len(full):
        return []
    return [f"line {outside[0] + 1} of the file stays, and the edit shows nearly all others"]


def _removed(placed: Placed, kept: set[int]) -> list[str]:
    """Many rows in one place that go."""
    gone = 0
    for number in range(len(placed.file.rows) + 1):
        stays = number == len(placed.file.rows) or number in kept
        if stays and gone > _MUCH:
            return [f"line {number - gone + 1} of the file: {gone} lines go in one place"]
        gone = 0 if stays else gone + 1
    return []
