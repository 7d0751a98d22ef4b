"""Where a snippet stands in a file: aligned, at the file's indent, with what is new put in whole."""

from __future__ import annotations

from dataclasses import replace

import numpy

from paceline.errors import EditNotFound, InputError
from paceline.tasks.align import File, Placed, align, bare, parts_of, weight
from paceline.tasks.definitions import Code, definitions_of, indent, new_definitions
from paceline.tasks.readings import insertion, told_apart

_PASSING = 0.2  # a factor on the cost to pass over a file row that must not matter
_LARGEST = 1 << 27  # pairs of rows that are compared: an alignment takes 12 bytes for each
_TELLING = 0.5  # what rows must say that speak for a replacement and against an insertion
_SURE = 1.5  # the same, for it to be without doubt


def place(file: File, snippet: Code, markers: list[bool]) -> tuple[Placed, Placed, numpy.ndarray]:
    """The best alignment, the best at the other cost to pass over rows, and the scores of the first.

    Raises EditNotFound where no row with a letter or a digit is found, and InputError where both are very long.
    """
    if len(file.rows) * len(snippet.rows) > _LARGEST:
        raise InputError(f"an edit of {len(snippet.rows)} lines is too long for a file of {len(file.rows)}")
    scores = file.scores(snippet, markers)
    usual, other = align(scores, markers, blank_rows(snippet), (1.0, _PASSING))
    placed, final = _settled(file, snippet, markers, usual, scores, 1.0)
    return placed, _settled(file, snippet, markers, other, scores, _PASSING)[0], final


def _settled(
    file: File, snippet: Code, markers: list[bool], matches: list[int], scores: numpy.ndarray, passing: float
) -> tuple[Placed, numpy.ndarray]:
    """The snippet at the file's indent, aligned anew where that, new definitions or parts put in whole ask for it."""
    found = any(match >= 0 and any(map(str.isalnum, snippet.rows[row])) for row, match in enumerate(matches))
    if not found and not _all_new(snippet, markers):
        raise EditNotFound("no line of the edit is found in the file, so there is no place to put it")
    blank = blank_rows(snippet)
    same = [match >= 0 and _same(line, file.rows[match]) for line, match in zip(snippet.rows, matches, strict=True)]
    barred = new_definitions(file, snippet, markers, matches, same)
    shifted = Code(_reindented(file.rows, snippet.rows, markers, barred, matches))
    if shifted.rows != snippet.rows or barred != markers:
        scores = file.scores(shifted, barred)
        (matches,) = align(scores, markers, blank, (passing,))
    placed = Placed(file, shifted, markers, matches)
    if weak := _weak(placed):
        scores = scores.copy()
        scores[weak] = -numpy.inf
        (matches,) = align(scores, markers, blank, (passing,))
        placed = Placed(file, shifted, markers, matches)
    forced, doubts = _put_in_whole(placed, scores)
    if forced is not None:
        (matches,) = align(forced, markers, blank, (passing,))
        return Placed(file, shifted, markers, matches, tuple(doubts), placed.matches), scores
    return replace(placed, doubts=tuple(doubts)), scores


def blank_rows(snippet: Code) -> list[bool]:
    return [not row.strip() for row in snippet.rows]


def _weak(placed: Placed) -> list[int]:
    """Rows that only resemble those they were matched with, and for which others would go, with no row found beside them.

    Rows that follow each other in both are one run, which any row found as it is makes sure.
    """
    file, snippet = placed.file, placed.snippet
    pairs = [(row, match) for row, match in enumerate(placed.matches) if match >= 0 and snippet.rows[row].strip()]
    runs: list[list[tuple[int, int]]] = []
    for row, match in pairs:
        if (
            runs
            and not _between(snippet.rows, runs[-1][-1][0], row)
            and not _between(file.rows, runs[-1][-1][1], match)
        ):
            runs[-1].append((row, match))
        else:
            runs.append([(row, match)])
    weak = []
    for number, run in enumerate(runs):
        if any(
            placed.kept(row) or (snippet.names[row] and snippet.names[row] == file.names[match]) for row, match in run
        ):
            continue
        around = [(runs[number - 1][-1], run[0])] if number else []
        around += [(run[-1], runs[number + 1][0])] if number + 1 < len(runs) else []
        if any(
            _between(file.rows, first[1], last[1]) and not any(placed.markers[first[0] : last[0]])
            for first, last in around
        ):
            weak += [row for row, _ in run]
    return weak


def _between(rows: list[str], first: int, last: int) -> bool:
    """Whether a row that is not blank stands between two."""
    return any(row.strip() for row in rows[first + 1 : last])


def _all_new(snippet: Code, markers: list[bool]) -> bool:
    """Whether an edit with a marker is nothing but definitions."""
    parts = [[row for row in part if snippet.rows[row].strip()] for part in parts_of(markers)]
    whole = [definitions_of(Code([snippet.rows[row] for row in part])) is not None for part in parts if part]
    return any(markers) and bool(whole) and all(whole)


def _put_in_whole(placed: Placed, scores: numpy.ndarray) -> tuple[numpy.ndarray | None, list[str]]:
    """Scores by which each part is put in whole that deletes rows where it can be put in whole, None where none is.

    With them what is doubtful in it, a sentence each.
    """
    forced = None
    doubts: list[str] = []
    if not any(placed.markers):
        return None, doubts  # the whole file
    for part in parts_of(placed.markers):
        found = [placed.matches[row] for row in part if placed.matches[row] >= 0]
        whole = [row for row in part if placed.matches[row] >= 0 and placed.kept(row)]
        if not found or len(whole) == found[-1] + 1 - found[0]:
            continue
        other = insertion(placed, part)
        if other is None:
            continue
        told = told_apart(placed, other, part)
        if told < _SURE and any(row not in other.matches and placed.tells(row) for row in whole):
            row = next(row for row in part if placed.matches[row] >= 0)
            text, line = placed.snippet.rows[other.new[0]].strip(), placed.matches[row] + 1
            doubts.append(
                f"{text!r} and on may be put in as new, or replace what stands at line {line} of the file and on"
            )
        if told >= _TELLING:
            continue
        forced = scores.copy() if forced is None else forced
        for row in part:
            if row in other.matches or row in other.new:
                forced[row] = -numpy.inf
            if row in other.matches:
                forced[row, other.matches[row]] = max(1.0, weight(placed.snippet.rows[row]))
    return forced, doubts


def _reindented(
    lines: list[str], snippet: list[str], markers: list[bool], barred: list[bool], matches: list[int]
) -> list[str]:
    """The snippet at the file's indent: each part is moved by what its rows that are found are off.

    Rows that are `barred` do not tell.
    """
    shifted = snippet[:]
    for part in parts_of(markers):
        pairs = [
            (_margin(snippet[row]), _margin(lines[matches[row]]))
            for row in part
            if matches[row] >= 0
            and not barred[row]
            and snippet[row].strip()
            and _same(snippet[row], lines[matches[row]])
        ]
        if not pairs or all(own == theirs for own, theirs in pairs):
            continue
        full = [row for row in part if snippet[row].strip()]
        amounts = [len(theirs) - len(own) for own, theirs in pairs]
        amount = amounts[0]
        if amount <= 0 or min(indent(snippet[row]) for row in full) > 0:
            continue  # the part is not written at the left margin, so its indent is part of the edit
        if amounts[-1] == amount and amounts.count(amount) * 2 > len(amounts):
            sign = next((theirs[0] for _, theirs in pairs if theirs), " ")
            for row in full:
                shifted[row] = sign * amount + snippet[row]
    return shifted


def _margin(line: str) -> str:
    """The white space that a line begins with."""
    return line[: len(line) - len(line.lstrip())]


def _same(left: str, right: str) -> bool:
    return bare(left) == bare(right)
