"""Warnings about a snippet's merge by rule: where the snippet does not determine what becomes of a part of the file.

The thresholds were tuned on the train split of `python -m benchmarks.merge`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from itertools import pairwise

import numpy

from paceline.tasks.alignment import Placement, line_weight, parts_between_markers
from paceline.tasks.alternatives import equally_good_row
from paceline.tasks.definitions import indent, whole_definition_ending_at
from paceline.tasks.deletions import word_similarity
from paceline.tasks.duplicates import duplicate_warnings
from paceline.tasks.lines import ResultRow
from paceline.tasks.names import DEFINITION_PREFIXES, assigned_key
from paceline.tasks.snippet import Marker

_MAX_DELETED_ROWS = 60  # deleted file rows in one place above which there is a warning
# rows that only begin a file, which edits further down leave out: a shebang, a doctype, build constraints
_PREAMBLE = re.compile(
    r"#!|# -\*-|# syntax=|# escape=|---$|<\?|//go:build|// \+build|[\"']use \w+[\"']|%YAML|<!doctype", re.IGNORECASE
)
# how a comment begins
_COMMENT = re.compile(r"#|//|/\*|\*|--|<!|;|%")
# a comment which says that something was removed
_REMOVAL_COMMENT = re.compile(
    r"^\W*(?:removed?|deleted?)\b\W*(?:def|class|function|the|this|old)?\b|\b(?:removed|deleted)\W*$", re.IGNORECASE
)
_OPENERS = ("{", "(", "[", ":", ">", "do", "then", "|")  # ends of rows that open a block
_NEARLY_ALL = 0.7  # the share of a file's rows from which an edit counts as showing nearly all of it
_MIN_ROWS_AFTER = 25  # more file rows than this below an edit that ends with a whole definition surely stay
_NEARBY_ROWS = 4  # file rows on either side among which a similar row must be the only one
_SIMILAR = 0.7  # Dice coefficient over words from which two rows are similar
_CONTEXT_WEIGHT = 0.5  # the least weight of unchanged rows beside a marker that fixes its place


def merge_warnings(
    placement: Placement,
    scores: numpy.ndarray,
    result: Sequence[ResultRow],
    texts: list[str],
    other: list[str],
    levels: Sequence[Marker] | None,
    removed: Collection[str] = (),
) -> list[str]:
    """The warnings, a sentence each.

    `scores` are the match scores by which the snippet was placed. `texts` are the texts of `result`, `other` those of the
    result of an alignment at other costs. `levels` says how surely each row of the edit is a marker; None for an edit
    without markers of its own. `removed` are names that the instruction says are removed.
    """
    kept = {row for row in result if isinstance(row, int)}
    warnings = [*placement.warnings, *_ambiguous_placement(texts, other)]
    warnings += _equally_good_places(placement, scores)
    warnings += _changes_at_edges(placement, kept, levels is not None)
    warnings += _unanchored_parts(placement)
    warnings += duplicate_warnings(placement, result, texts, levels is not None)
    warnings += _large_deletions(placement, kept)
    warnings += _kept_trailing_white_space(placement)
    if levels is None:
        warnings += [
            *_skipped_rows(placement, removed),
            *_unshown_edge_rows(placement, kept),
            *_rows_between_neighbours(placement),
        ]
    else:
        warnings += _unchanged_parts(placement)
        warnings += _unmarked_ends(placement, kept)
        warnings += _uncertain_markers(placement, levels)
        warnings += _blank_rows_beside_markers(placement)
    return warnings


def _ambiguous_placement(result: list[str], other: list[str]) -> list[str]:
    """The first line in which the results of two alignments differ."""
    if result == other:
        return []
    pairs = enumerate(zip(result, other, strict=False), 1)
    number = next((number for number, (left, right) in pairs if left != right), min(len(result), len(other)) + 1)
    return [f"line {number}: the edit can be placed in more than one way"]


def _equally_good_places(placement: Placement, scores: numpy.ndarray) -> list[str]:
    """A part that fits another place equally well."""
    warnings = []
    for part in parts_between_markers(placement.markers):
        place = equally_good_row(placement, scores, part)
        own = next((placement.matches[row] for row in part if placement.matches[row] >= 0), None)
        if place is not None and own is not None:
            text = placement.snippet.rows[next(row for row in part if placement.snippet.rows[row].strip())].strip()
            warnings.append(f"{text!r} and on fits line {own + 1} and line {place + 1} of the file equally well")
    return warnings


def _changes_at_edges(placement: Placement, kept: set[int], has_own_markers: bool) -> list[str]:
    """A changed row directly beside a marker, or at a snippet end that is not the file's: the row it replaces is not shown."""
    snippet, markers, lines = placement.snippet.rows, placement.markers, placement.file.rows
    found = [(row, match) for row, match in enumerate(placement.matches) if match >= 0]
    full = [row for row, line in enumerate(snippet) if line.strip()]
    begins = not found or any(line.strip() for line in lines[: found[0][1]])
    ends = not found or any(line.strip() for line in lines[found[-1][1] + 1 :])
    edges = [row for row in full if markers[row] and (has_own_markers or full[0] < row < full[-1])]
    edges += [full[0] if markers[full[0]] else -1] if begins else []
    edges += [full[-1] if markers[full[-1]] else len(snippet)] if ends else []
    for edge in edges:
        for step in (-1, 1):
            row, context_weight = edge + step, 0.0
            while (
                0 <= row < len(snippet)
                and not markers[row]
                and (placement.is_unchanged(row) or not snippet[row].strip())
            ):
                context_weight += line_weight(snippet[row]) if snippet[row].strip() else 0.0
                row += step
            if not 0 <= row < len(snippet) or markers[row] or surely_replaces(placement, row):
                continue
            if _ends_definition(placement, row, kept) if step < 0 else _begins_definition(placement, row):
                continue
            if context_weight == 0.0 and row != edge + step and _ends_paragraph(placement, row, step):
                continue
            if context_weight == 0.0 or (context_weight < _CONTEXT_WEIGHT and _deletes_rows_at(placement, row)):
                return [f"{snippet[row].strip()!r} is new where the edit breaks off: what it replaces is not shown"]
    return []


def _ends_paragraph(placement: Placement, row: int, step: int) -> bool:
    """Whether new rows from `row` on adjoin a matched row next to which the file has a blank row."""
    rows, last = placement.snippet.rows, row
    while 0 <= last < len(rows) and rows[last].strip() and placement.matches[last] < 0 and not placement.markers[last]:
        last += step
    if (
        not 0 <= last < len(rows)
        or placement.markers[last]
        or not placement.is_unchanged(last)
        or not rows[last].strip()
    ):
        return False
    next_to_match = placement.matches[last] - step
    return 0 <= next_to_match < len(placement.file.rows) and not placement.file.rows[next_to_match].strip()


def surely_replaces(placement: Placement, row: int) -> bool:
    """Whether a changed row surely replaces the file row that it was matched with.

    One of these holds: both define the same name; both assign the same key, and an unchanged row is next to them or no other
    row in the scope assigns it; they are similar, an unchanged row is next to them, and no row nearby is similar too.
    """
    match = placement.matches[row]
    if match < 0:
        return False
    file, line = placement.file, placement.snippet.rows[row]
    if placement.snippet.names[row] is not None or file.names[match] is not None:
        return placement.snippet.names[row] == file.names[match]
    next_to_match = _matches_neighbour(placement, row, -1) or _matches_neighbour(placement, row, 1)
    key = assigned_key(line)
    if key is not None and key == assigned_key(file.rows[match]):
        first, last = placement.scopes[row]
        return next_to_match or sum(assigned_key(each) == key for each in file.rows[first:last]) == 1
    around = range(max(0, match - _NEARBY_ROWS), min(len(file.rows), match + _NEARBY_ROWS + 1))
    nearby = [file.rows[number] for number in around if number != match]
    similar = word_similarity(line, file.rows[match]) >= _SIMILAR and all(
        word_similarity(line, each) < _SIMILAR / 2 for each in nearby
    )
    return next_to_match and similar


def _matches_neighbour(placement: Placement, row: int, step: int) -> bool:
    """Whether the next row that is not blank is unchanged and matches the file row next to the match of `row`."""
    rows, lines = placement.snippet.rows, placement.file.rows
    match = placement.matches[row] + step
    row += step
    while 0 <= row < len(rows) and not rows[row].strip():
        row += step
    while 0 <= match < len(lines) and not lines[match].strip():
        match += step
    return 0 <= row < len(rows) and placement.matches[row] == match and placement.is_unchanged(row)


def _deletes_rows_at(placement: Placement, row: int) -> bool:
    """Whether file rows are deleted where the new row `row` is inserted."""
    rows = range(len(placement.markers))
    above = next((each for each in rows[row::-1] if placement.matches[each] >= 0 or placement.markers[each]), 0)
    below = next((each for each in rows[row + 1 :] if placement.matches[each] >= 0 or placement.markers[each]), 0)
    return 0 <= placement.matches[above] < placement.matches[below] - 1


def _ends_definition(placement: Placement, row: int, kept: set[int]) -> bool:
    """Whether `row` ends a definition that is shown whole, and no row of the file's definition stays after it."""
    header = whole_definition_ending_at(placement.snippet, placement.markers, row)
    if header is None:
        return False
    last = max((match for match in placement.matches[header : row + 1] if match >= 0), default=None)
    if last is None:
        return True
    lines = placement.file.rows
    after = next((lines[each] for each in range(last + 1, len(lines)) if lines[each].strip() and each in kept), "")
    return indent(after) <= indent(placement.snippet.rows[header])


def _begins_definition(placement: Placement, row: int) -> bool:
    """Whether a definition begins at `row`, or after decorators and comments from there."""
    for each in range(row, len(placement.markers)):
        if placement.snippet.names[each]:
            return True
        if placement.markers[each] or not placement.snippet.rows[each].strip().startswith(DEFINITION_PREFIXES):
            return False
    return False


def _unanchored_parts(placement: Placement) -> list[str]:
    """A part of new rows only, between two markers: its place between them is not shown."""
    warnings = []
    for part in parts_between_markers(placement.markers):
        full = [row for row in part if placement.snippet.rows[row].strip()]
        if not full or any(placement.matches[row] >= 0 for row in full):
            continue
        if part.start > 0 and part.stop < len(placement.markers) and _rows_between(placement, part):
            warnings.append(
                f"{placement.snippet.rows[full[0]].strip()!r} is new, and the edit does not show after which line"
            )
    return warnings


def _rows_between(placement: Placement, part: range) -> bool:
    """Whether the file has more than closing rows between the matches before and after a part."""
    first = max((match for match in placement.matches[: part.start] if match >= 0), default=-1)
    last = min((match for match in placement.matches[part.stop :] if match >= 0), default=len(placement.file.rows))
    return any(any(map(str.isalnum, line)) for line in placement.file.rows[first + 1 : last])


def _unchanged_parts(placement: Placement) -> list[str]:
    """A part between markers that changes nothing and is not the header of what follows: it may mean something else."""
    edges = [row for row, marker in enumerate(placement.markers) if marker]
    for start, stop in pairwise(edges):
        rows = [row for row in range(start + 1, stop) if placement.snippet.rows[row].strip()]
        found = [placement.matches[row] for row in rows]
        if not rows or -1 in found:
            continue
        last = placement.snippet.rows[rows[-1]]
        opens = last.rstrip().endswith(_OPENERS) and indent(last) < indent(placement.snippet.rows[stop])
        if rows[-1] == stop - 1 and (opens or placement.snippet.names[rows[-1]]):
            continue
        if placement.file.rows[found[0] : found[-1] + 1] == placement.snippet.rows[rows[0] : rows[-1] + 1]:
            return [f"{placement.snippet.rows[rows[0]].strip()!r} and on changes nothing where it was found"]
    return []


def _blank_rows_beside_markers(placement: Placement) -> list[str]:
    """A context row that a blank row separates from its marker, in an edit that otherwise shows one context row.

    The edit may mean to delete what stood between the two rows.
    """
    rows = placement.snippet.rows
    edges = []  # (number of rows before the first new one, the first two of them)
    for part in parts_between_markers(placement.markers):
        for order, inner in ((part, part.start > 0), (part[::-1], part.stop < len(rows))):
            if inner and len(order) > 1:
                changed = (rows[row].strip() and not placement.is_unchanged(row) for row in order)
                new = (number for number, is_changed in enumerate(changed) if is_changed)
                edges.append((next(new, len(order)), rows[order[0]].strip(), rows[order[1]].strip()))
    if not any(size == 1 and first for size, first, _ in edges):
        return []
    return [
        f"{second!r} stands beside a blank line: what was between the two may be meant to go"
        for size, first, second in edges
        if size > 1 and second and not first
    ][:1]


def _is_leading_comment(lines: list[str], above: list[int], first: int) -> bool:
    """Whether all rows above the first match are comments and the match is not: they are the file's leading comment."""
    return all(_COMMENT.match(lines[row].lstrip()) for row in above) and not _COMMENT.match(lines[first].lstrip())


def is_preamble(row: str) -> bool:
    """Whether a row is of a kind that only begins a file, which edits further down leave out."""
    return bool(_PREAMBLE.match(row.lstrip()))


def _unmarked_ends(placement: Placement, kept: set[int]) -> list[str]:
    """File rows beyond an end where an edit with markers has none: it may mean that the file begins or ends there."""
    lines, markers = placement.file.rows, placement.markers
    found = [match for match in placement.matches if match >= 0]
    warnings: list[str] = []
    above = [row for row in range(found[0]) if lines[row].strip()] if found else []
    if found and (all(is_preamble(lines[row]) for row in above) or _is_leading_comment(lines, above, found[0])):
        above = []
    below = [row for row in range(found[-1] + 1, len(lines)) if lines[row].strip()] if found else []
    if any(
        row.strip()
        for row in placement.snippet.rows[max(range(len(placement.matches)), key=placement.matches.__getitem__) + 1 :]
    ):
        below = [row for row in below if row in kept]  # the edit's last rows replace the others
    first = next((row for row, match in enumerate(placement.matches) if match >= 0), 0)
    last = max((row for row, match in enumerate(placement.matches) if match >= 0), default=0)
    if above and below and not any(markers[:first]) and not any(markers[last:]):
        return []  # no marker at either end: the edit is an excerpt
    if above and not any(markers[:first]):
        warnings.append(
            f"no marker stands for line {above[0] + 1} of the file, before the edit's first: it may stay or go"
        )
    ends_with_definition = len(below) > _MIN_ROWS_AFTER and below[0] in kept and _ends_with_definition(placement)
    if below and not any(markers[last:]) and not ends_with_definition:
        warnings.append(
            f"no marker stands for line {below[0] + 1} of the file and on, after the edit's last: it may end there"
        )
    return warnings


def _ends_with_definition(placement: Placement) -> bool:
    """Whether the edit ends with a whole definition of the file. The rows after it then stay."""
    last = max(row for row, line in enumerate(placement.snippet.rows) if line.strip())
    header = whole_definition_ending_at(placement.snippet, placement.markers, last)
    return header is not None and len(placement.file.headers.get(placement.snippet.names[header] or ("", ""), [])) == 1


def _uncertain_markers(placement: Placement, levels: Sequence[Marker]) -> list[str]:
    """A comment that may be a marker, a comment that says what is removed, and a marker that stands for no row."""
    warnings = [
        f"{line.strip()!r} may say that lines go, which stay"
        for row, line in enumerate(placement.snippet.rows)
        if placement.matches[row] < 0
        and line.lstrip().startswith(DEFINITION_PREFIXES)
        and _REMOVAL_COMMENT.search(line)
    ]
    full = [row for row, line in enumerate(placement.snippet.rows) if line.strip()]
    for row, level in enumerate(levels):
        text = placement.snippet.rows[row].strip()
        if level is Marker.POSSIBLE:
            warnings.append(f"{text!r} is taken for a marker of left-out code; it may be a comment")
        elif level is Marker.CERTAIN and full[0] < row < full[-1]:
            above = max((match for match in placement.matches[:row] if match >= 0), default=-1)
            below = min((match for match in placement.matches[row:] if match >= 0), default=len(placement.file.rows))
            if above + 1 >= below:
                warnings.append(f"{text!r} stands for no line of the file")
    return warnings


def _skipped_rows(placement: Placement, removed: Collection[str]) -> list[str]:
    """In an edit without markers, more rows deleted than inserted between two matches: the edit may have left them out."""
    found = [(row, match) for row, match in enumerate(placement.matches) if match >= 0]
    for (above, first), (below, last) in pairwise(found):
        if any(placement.markers[above:below]):
            continue
        put = sum(bool(line.strip()) for line in placement.snippet.rows[above + 1 : below])
        if any(name and name[1] in removed for name in placement.file.names[first + 1 : last]):
            continue
        if sum(bool(line.strip()) for line in placement.file.rows[first + 1 : last]) > put:
            return [f"line {first + 2} of the file and on would go, and the edit has no marker for what it leaves out"]
    return []


def _rows_between_neighbours(placement: Placement) -> list[str]:
    """File rows that stay between two rows which an edit without markers shows as neighbours."""
    rows, lines = placement.snippet.rows, placement.file.rows
    full = [row for row, line in enumerate(rows) if line.strip() and not placement.markers[row]]
    for above, below in pairwise(full):
        first, last = placement.matches[above], placement.matches[below]
        if (
            any(placement.markers[above:below])
            and 0 <= first < last
            and any(line.strip() for line in lines[first + 1 : last])
        ):
            return [f"line {first + 2} of the file and on stay, between two that the edit shows together"]
    return []


def _kept_trailing_white_space(placement: Placement) -> list[str]:
    """Rows that keep trailing white space which the edit shows without."""
    rows = [
        placement.matches[row] + 1
        for row, line in enumerate(placement.snippet.rows)
        if placement.is_unchanged(row) and line != placement.file.rows[placement.matches[row]]
    ]
    return (
        [f"line {rows[0]} of the file keeps the white space at its end, which the edit does not have"] if rows else []
    )


def _unshown_edge_rows(placement: Placement, kept: set[int]) -> list[str]:
    """File rows beside an edit without markers that shows nearly all others: it may be the whole new file."""
    lines = placement.file.rows
    found = [match for match in placement.matches if match >= 0 and lines[match].strip()]
    full = [row for row, line in enumerate(lines) if line.strip()]
    outside = [row for row in full if row in kept and found and row in (found[0] - 1, found[-1] + 1)]
    if not outside or len(found) < _NEARLY_ALL * len(full):
        return []
    return [f"line {outside[0] + 1} of the file stays, and the edit shows nearly all others"]


def _large_deletions(placement: Placement, kept: set[int]) -> list[str]:
    """Many rows deleted in one place."""
    num_deleted = 0
    for number in range(len(placement.file.rows) + 1):
        stays = number == len(placement.file.rows) or number in kept
        if stays and num_deleted > _MAX_DELETED_ROWS:
            return [f"line {number - num_deleted + 1} of the file: {num_deleted} lines go in one place"]
        num_deleted = 0 if stays else num_deleted + 1
    return []
