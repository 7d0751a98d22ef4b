"""Places a snippet in a file: aligned with it, moved to its indent, and with new parts inserted whole.

Unless a comment says what a constant bounds, its value was tuned on the train split of `python -m benchmarks.merge`.
"""

from __future__ import annotations

from dataclasses import replace

import numpy

from paceline.errors import EditNotFound, InputError
from paceline.tasks.alignment import (
    IndexedFile,
    Placement,
    align,
    line_weight,
    parts_between_markers,
    without_white_space,
)
from paceline.tasks.alternatives import unique_weight_lost, whole_insertion
from paceline.tasks.definitions import Code, indent, new_definitions, whole_definitions

_CHEAP_PASSING = 0.2  # a factor on the cost of passing over a file row; a placement that it changes is ambiguous
_MAX_PAIRS = 1 << 27  # bounds memory: an alignment takes 12 bytes for each pair of a snippet row and a file row
_REPLACEMENT_WEIGHT = 0.5  # weight of unique matches from which a part replaces rows and is not inserted
_SURE_WEIGHT = 1.5  # the same, from which that needs no warning


def place_snippet(file: IndexedFile, snippet: Code, markers: list[bool]) -> tuple[Placement, Placement, numpy.ndarray]:
    """(the best placement, the best at a lower cost of passing over file rows, the match scores of the first).

    Raises EditNotFound if no row with a letter or digit matches, InputError if snippet and file are too long to align.
    """
    if len(file.rows) * len(snippet.rows) > _MAX_PAIRS:
        raise InputError(
            f"an edit of {len(snippet.rows)} lines is too long for a file of {len(file.rows)}; send it as smaller edits"
        )
    scores = file.scores(snippet, markers)
    usual, other = align(scores, markers, blank_rows(snippet), (1.0, _CHEAP_PASSING))
    placement, final_scores = _refined(file, snippet, markers, usual, scores, 1.0)
    return placement, _refined(file, snippet, markers, other, scores, _CHEAP_PASSING)[0], final_scores


def _refined(
    file: IndexedFile, snippet: Code, markers: list[bool], matches: list[int], scores: numpy.ndarray, passing: float
) -> tuple[Placement, numpy.ndarray]:
    """The final placement. Aligns again after re-indenting, after excluding chance matches and after inserting parts whole."""
    found = any(match >= 0 and any(map(str.isalnum, snippet.rows[row])) for row, match in enumerate(matches))
    if not found and not _is_only_definitions(snippet, markers):
        raise EditNotFound(
            "no line of the edit is found in the file, so there is no place to put it; add unchanged lines as context"
        )
    blank = blank_rows(snippet)
    same = [
        match >= 0 and _equal_but_for_white_space(line, file.rows[match])
        for line, match in zip(snippet.rows, matches, strict=True)
    ]
    unmatchable = new_definitions(file, snippet, markers, matches, same)
    shifted = Code(_reindented(file.rows, snippet.rows, markers, unmatchable, matches))
    if shifted.rows != snippet.rows or unmatchable != markers:
        scores = file.scores(shifted, unmatchable)
        (matches,) = align(scores, markers, blank, (passing,))
    placement = Placement(file, shifted, markers, matches)
    if unsupported := _unsupported_matches(placement):
        scores = scores.copy()
        scores[unsupported] = -numpy.inf
        (matches,) = align(scores, markers, blank, (passing,))
        placement = Placement(file, shifted, markers, matches)
    forced_scores, warnings = _insert_whole_parts(placement, scores)
    if forced_scores is not None:
        (matches,) = align(forced_scores, markers, blank, (passing,))
        return Placement(file, shifted, markers, matches, tuple(warnings), placement.matches), scores
    return replace(placement, warnings=tuple(warnings)), scores


def blank_rows(snippet: Code) -> list[bool]:
    """Which rows hold nothing but white space."""
    return [not row.strip() for row in snippet.rows]


def _unsupported_matches(placement: Placement) -> list[int]:
    """Snippet rows whose matches are mere similarities, whose run has no exact match, and that would delete file rows.

    Matches that follow each other in both snippet and file form a run. One exact match confirms its whole run.
    """
    file, snippet = placement.file, placement.snippet
    pairs = [(row, match) for row, match in enumerate(placement.matches) if match >= 0 and snippet.rows[row].strip()]
    runs: list[list[tuple[int, int]]] = []
    for row, match in pairs:
        if (
            runs
            and not _has_text_between(snippet.rows, runs[-1][-1][0], row)
            and not _has_text_between(file.rows, runs[-1][-1][1], match)
        ):
            runs[-1].append((row, match))
        else:
            runs.append([(row, match)])
    unsupported = []
    for number, run in enumerate(runs):
        if any(
            placement.is_unchanged(row) or (snippet.names[row] and snippet.names[row] == file.names[match])
            for row, match in run
        ):
            continue
        around = [(runs[number - 1][-1], run[0])] if number else []
        around += [(run[-1], runs[number + 1][0])] if number + 1 < len(runs) else []
        if any(
            _has_text_between(file.rows, first[1], last[1]) and not any(placement.markers[first[0] : last[0]])
            for first, last in around
        ):
            unsupported += [row for row, _ in run]
    return unsupported


def _has_text_between(rows: list[str], first: int, last: int) -> bool:
    """Whether a row that is not blank is between two rows."""
    return any(row.strip() for row in rows[first + 1 : last])


def _is_only_definitions(snippet: Code, markers: list[bool]) -> bool:
    """Whether a snippet with a marker consists of whole definitions only."""
    parts = [[row for row in part if snippet.rows[row].strip()] for part in parts_between_markers(markers)]
    exact_rows = [whole_definitions(Code([snippet.rows[row] for row in part])) is not None for part in parts if part]
    return any(markers) and bool(exact_rows) and all(exact_rows)


def _insert_whole_parts(placement: Placement, scores: numpy.ndarray) -> tuple[numpy.ndarray | None, list[str]]:
    """Scores that force each part to be inserted whole that can be and that would otherwise delete file rows.

    None where no part is. With them come warnings, a sentence each.
    """
    forced_scores = None
    warnings: list[str] = []
    if not any(placement.markers):
        return None, warnings  # the whole file
    for part in parts_between_markers(placement.markers):
        found = [placement.matches[row] for row in part if placement.matches[row] >= 0]
        exact_rows = [row for row in part if placement.matches[row] >= 0 and placement.is_unchanged(row)]
        if not found or len(exact_rows) == found[-1] + 1 - found[0]:
            continue
        other = whole_insertion(placement, part)
        if other is None:
            continue
        lost_weight = unique_weight_lost(placement, other, part)
        if lost_weight < _SURE_WEIGHT and any(
            row not in other.matches and placement.has_word_character(row) for row in exact_rows
        ):
            row = next(row for row in part if placement.matches[row] >= 0)
            text, line = placement.snippet.rows[other.new[0]].strip(), placement.matches[row] + 1
            warnings.append(
                f"{text!r} and on may be put in as new, or replace what stands at line {line} of the file and on"
            )
        if lost_weight >= _REPLACEMENT_WEIGHT:
            continue
        forced_scores = scores.copy() if forced_scores is None else forced_scores
        for row in part:
            if row in other.matches or row in other.new:
                forced_scores[row] = -numpy.inf
            if row in other.matches:
                forced_scores[row, other.matches[row]] = max(1.0, line_weight(placement.snippet.rows[row]))
    return forced_scores, warnings


def _reindented(
    lines: list[str], snippet: list[str], markers: list[bool], unmatchable: list[bool], matches: list[int]
) -> list[str]:
    """The snippet at the file's indent: each part is shifted by the difference between its matched rows and the file's.

    Rows that are `unmatchable` are not considered.
    """
    shifted = snippet[:]
    for part in parts_between_markers(markers):
        pairs = [
            (_indentation(snippet[row]), _indentation(lines[matches[row]]))
            for row in part
            if matches[row] >= 0
            and not unmatchable[row]
            and snippet[row].strip()
            and _equal_but_for_white_space(snippet[row], lines[matches[row]])
        ]
        if not pairs or all(own == theirs for own, theirs in pairs):
            continue
        full = [row for row in part if snippet[row].strip()]
        amounts = [len(theirs) - len(own) for own, theirs in pairs]
        amount = amounts[0]
        if amount <= 0 or min(indent(snippet[row]) for row in full) > 0:
            continue  # a part that is not written at the left margin has its own indent as part of the edit
        if amounts[-1] == amount and amounts.count(amount) * 2 > len(amounts):
            sign = next((theirs[0] for _, theirs in pairs if theirs), " ")
            for row in full:
                shifted[row] = sign * amount + snippet[row]
    return shifted


def _indentation(line: str) -> str:
    """The leading white space of a line."""
    return line[: len(line) - len(line.lstrip())]


def _equal_but_for_white_space(left: str, right: str) -> bool:
    return without_white_space(left) == without_white_space(right)
