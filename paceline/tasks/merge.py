"""A candidate merge: file and edit joined by rule, before the model writes a token, so that a draft can follow it.

A snippet's rows are aligned with the file's (placing.py). Then (building.py): a matched row stays, a snippet row without a
match is inserted, a file row passed over between two matched rows is deleted, one passed over at a marker or beyond the
snippet's ends is kept. A snippet that is nothing but whole definitions, without a marker, replaces those
(replacing.py). SEARCH/REPLACE blocks and diffs name what they replace (blocks.py, diffs.py).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy

from paceline.errors import EmptyEdit
from paceline.tasks.align import File, Placed, align, parts_of
from paceline.tasks.blocks import apply_blocks, has_blocks
from paceline.tasks.building import build, texts_of
from paceline.tasks.definitions import Code, with_markers_understood
from paceline.tasks.diffs import apply_diff, is_diff
from paceline.tasks.doubts import doubts_of
from paceline.tasks.languages import num_errors, suffix_of
from paceline.tasks.lines import BOM, Edited, Lines, Row
from paceline.tasks.placing import blank_rows, place
from paceline.tasks.readings import second_place
from paceline.tasks.repeats import copied, left_out, repeated
from paceline.tasks.replacing import replace_definitions
from paceline.tasks.shown import named_for_removal, unshown_deletions
from paceline.tasks.snippet import Marker, in_unit_of, is_prose, marker_rows

_FENCE = re.compile(r"^\s*(`{3,}|~{3,})\s*([\w+-]*)\s*$")


@dataclass(frozen=True)
class Merge:
    """A merged text. `kept[i]` says whether row i of the file is in it.

    `doubts` are reasons, a sentence each, why it may not be what the edit means. `other` is another reading of the edit,
    where there is a doubt and one is known.
    """

    text: str
    kept: tuple[bool, ...]
    doubts: tuple[str, ...] = ()
    other: Merge | None = None


def candidate_merge(code: str, update: str, path: str | None = None, instruction: str = "") -> Merge:
    """Merges by rule. `update` is a lazy snippet, SEARCH/REPLACE blocks or a diff, `path` the file's name.

    Raises EmptyEdit where the update says nothing and EditNotFound where a part of it is not found in the file.
    """
    file = Lines.of(code)
    snippet = strip_fence(update.removeprefix(BOM).replace("\r\n", "\n"), path).removeprefix(BOM)
    if not snippet.strip():
        raise EmptyEdit("the edit is empty")
    if has_blocks(update, file):
        edited = apply_blocks(file, update)
    elif is_diff(update, file):
        edited = apply_diff(file, update, path)
    elif not file.rows:
        edited = Edited(list(snippet.removesuffix("\n").split("\n")), final=snippet.endswith("\n"))
    else:
        edited = _lazy(file.rows, snippet, path, named_for_removal(instruction))
    merge = _merge(file, edited)
    doubts = tuple(dict.fromkeys(edited.doubts if merge.text != code else (*edited.doubts, "the edit changes nothing")))
    other = None
    if doubts and edited.other is not None:
        other = _merge(file, replace(edited, rows=edited.other))
        other = None if other.text == merge.text else replace(other, doubts=doubts)
    merge = replace(merge, doubts=doubts, other=other)
    return _parsing(code, merge, suffix_of(path, code)) if other is not None else merge


def _parsing(code: str, merge: Merge, suffix: str) -> Merge:
    """The merge, or its other reading where the merge alone has a syntax error that the file has not."""
    texts = [code, merge.text, merge.other.text if merge.other else code]
    before, own, others = (num_errors(text, suffix) or 0 for text in texts)
    if merge.other is None or own <= before or others > before:
        return merge
    return replace(merge.other, other=replace(merge, other=None))


def _merge(file: Lines, edited: Edited) -> Merge:
    stays = {row for row in edited.rows if isinstance(row, int)}
    return Merge(file.text(edited), tuple(row in stays for row in range(len(file.rows))))


def strip_fence(text: str, path: str | None = None) -> str:
    """The text inside a Markdown fence that wraps all of it, else the text.

    In a file of prose, a fence may itself be text: there only one that says it holds such a file is taken off.
    """
    lines = text.strip("\n").split("\n")
    opening = _FENCE.match(lines[0])
    if len(lines) < 2 or not opening or lines[-1].strip() != opening[1]:
        return text
    inner = [line.strip() for line in lines[1:-1] if line.strip().startswith(opening[1])]
    if is_prose(path) and opening[2].lower() not in ("md", "markdown", "rst", "text", "diff") and len(opening[1]) < 4:
        return text
    if len(inner) % 2:
        return text
    return "\n".join(lines[1:-1]) + "\n"


def _lazy(rows: list[str], update: str, path: str | None, removed: set[str]) -> Edited:
    """Merges a snippet. Raises EditNotFound where no row of it is found."""
    file = File(rows)
    code, levels = _rows(update, rows, path)
    if not any(levels) and (replaced := replace_definitions(file, code, removed)) is not None:
        texts = texts_of(file, replaced[0])
        doubts = [*replaced[1], *repeated(file, Code(texts)), *copied(file, code, replaced[0], False)]
        doubts += unshown_deletions(file, texts, code, [False] * len(levels), removed)
        doubts += [] if removed else left_out(file, replaced[0])
        return Edited(replaced[0], tuple(doubts))
    while True:
        marked = any(levels)
        markers = [bool(level) for level in levels]
        snippet = code
        if not marked:
            understood, markers = with_markers_understood(file, code)
            snippet = Code(understood)
        placed, otherwise, scores = place(file, snippet, markers)
        void = {row for row, level in enumerate(levels) if level and _void(placed, levels, row)} if marked else set()
        if not void:
            break
        levels = [Marker.NONE if row in void else level for row, level in enumerate(levels)]
    result = build(placed)
    texts = texts_of(file, result)
    other = texts if otherwise.matches == placed.matches else texts_of(file, build(otherwise))
    doubts = doubts_of(placed, scores, result, texts, other, levels if marked else None, removed)
    doubts += unshown_deletions(file, texts, placed.snippet, placed.markers, removed)
    return Edited(result, tuple(doubts), other=_other(placed, otherwise, scores, texts) if doubts else None)


def _rows(update: str, lines: list[str], path: str | None) -> tuple[Code, list[Marker]]:
    """The snippet's rows without the blank ones outside an outermost marker, and which may be markers."""
    snippet = in_unit_of(lines, update.removesuffix("\n").split("\n"))
    levels = marker_rows(snippet, lines, path)
    full = [row for row, line in enumerate(snippet) if line.strip()]
    first = full[0] if levels[full[0]] else 0
    last = full[-1] + 1 if levels[full[-1]] else len(snippet)
    return Code(snippet[first:last]), levels[first:last]


def _void(placed: Placed, levels: Sequence[Marker], row: int) -> bool:
    """Whether a row that may be a marker leaves nothing out, and so is text; not one that is certain, or at an end."""
    rows, matches = placed.snippet.rows, placed.matches
    inside = any(line.strip() for line in rows[:row]) and any(line.strip() for line in rows[row + 1 :])
    if levels[row] is Marker.CERTAIN or not inside:
        return False
    above = max((match for match in matches[:row] if match >= 0), default=None)
    below = min((match for match in matches[row:] if match >= 0), default=None)
    return (
        above is not None
        and below is not None
        and not any(line.strip() for line in placed.file.rows[above + 1 : below])
    )


def _other(placed: Placed, otherwise: Placed, scores: numpy.ndarray, texts: list[str]) -> list[Row] | None:
    """The rows of another reading: at other costs, with a part replacing rows or elsewhere, or without the file's end."""
    file, markers = placed.file, placed.markers
    readings = [otherwise]
    if placed.unforced is not None and placed.unforced != placed.matches:
        readings.append(replace(placed, matches=placed.unforced))
    for part in parts_of(markers):
        if second_place(placed, scores, part) is not None:
            masked = scores.copy()
            for row in part:
                if placed.matches[row] >= 0:
                    masked[row, placed.matches[row]] = -numpy.inf
            (matches,) = align(masked, markers, blank_rows(placed.snippet), (1.0,))
            readings.append(replace(placed, matches=matches))
    for reading in readings:
        rows = build(reading)
        if texts_of(file, rows) != texts:
            return rows
    last = max((match for match in placed.matches if match >= 0), default=-1)
    if not any(markers) or markers[-1] or last < 0:
        return None
    rows = [row for row in build(placed) if not (isinstance(row, int) and row > last)]
    return rows if rows and texts_of(file, rows) != texts else None
