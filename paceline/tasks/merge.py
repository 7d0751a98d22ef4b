"""The candidate merge: file and edit merged by rule, without a model. The drafter proposes its tokens to the model.

A snippet's rows are aligned with the file's (placement.py). The result's rows follow from that (result_rows.py): a matched
row stays, an unmatched snippet row is inserted, a file row passed over between two matched rows is deleted, and one passed
over at a marker or beyond the snippet's ends stays. A snippet without markers that consists of whole definitions replaces
those of the same names (definition_replacement.py). SEARCH/REPLACE blocks and diffs say themselves what they replace
(search_replace.py, diffs.py).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy

from paceline.errors import EmptyEdit
from paceline.tasks.alignment import IndexedFile, Placement, align, parts_between_markers
from paceline.tasks.alternatives import equally_good_row
from paceline.tasks.definition_replacement import replace_definitions
from paceline.tasks.definitions import Code, with_implied_markers
from paceline.tasks.deletions import named_for_removal, unexplained_deletions
from paceline.tasks.diffs import apply_diff, is_diff
from paceline.tasks.duplicates import copied_rows, defined_twice, unreplaced_deletions
from paceline.tasks.languages import num_errors, suffix_of
from paceline.tasks.lines import BOM, EditResult, Lines, ResultRow
from paceline.tasks.merge_warnings import merge_warnings
from paceline.tasks.placement import blank_rows, place_snippet
from paceline.tasks.result_rows import result_rows, row_texts
from paceline.tasks.search_replace import apply_blocks, has_blocks
from paceline.tasks.snippet import Marker, is_prose, marker_rows, with_file_indent_unit

_FENCE = re.compile(r"^\s*(`{3,}|~{3,})\s*([\w+-]*)\s*$")


@dataclass(frozen=True)
class Merge:
    """A merged text. `kept[i]` says whether row i of the file is in it.

    `warnings` say why the text may not be what the edit means, a sentence each. `alternative` is the merge by another
    interpretation of the edit, if there is a warning and such a one is known.
    """

    text: str
    kept: tuple[bool, ...]
    warnings: tuple[str, ...] = ()
    alternative: Merge | None = None


def candidate_merge(code: str, update: str, path: str | None = None, instruction: str = "") -> Merge:
    """Merges by rule. `update` is a lazy snippet, SEARCH/REPLACE blocks or a diff; `path` is the file's name.

    `instruction` is the edit's description; names that it says are removed may go without a warning. Raises EmptyEdit for an
    update without text or without a change, EditNotFound for one that does not match the file.
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
        edited = EditResult(list(snippet.removesuffix("\n").split("\n")), final_newline=snippet.endswith("\n"))
    else:
        edited = _merge_snippet(file.rows, snippet, path, named_for_removal(instruction))
    merge = _merge_of(file, edited)
    warnings = tuple(
        dict.fromkeys(edited.warnings if merge.text != code else (*edited.warnings, "the edit changes nothing"))
    )
    alternative = None
    if warnings and edited.alternative is not None:
        alternative = _merge_of(file, replace(edited, rows=edited.alternative))
        alternative = None if alternative.text == merge.text else replace(alternative, warnings=warnings)
    merge = replace(merge, warnings=warnings, alternative=alternative)
    return _prefer_parsing(code, merge, suffix_of(path, code)) if alternative is not None else merge


def _prefer_parsing(code: str, merge: Merge, suffix: str) -> Merge:
    """The merge, or its alternative if only the merge has more syntax errors than the file."""
    texts = [code, merge.text, merge.alternative.text if merge.alternative else code]
    before, own, others = (num_errors(text, suffix) or 0 for text in texts)
    if merge.alternative is None or own <= before or others > before:
        return merge
    return replace(merge.alternative, alternative=replace(merge, alternative=None))


def _merge_of(file: Lines, edited: EditResult) -> Merge:
    """The merge that an edit's result makes."""
    kept_rows = {row for row in edited.rows if isinstance(row, int)}
    return Merge(file.text(edited), tuple(row in kept_rows for row in range(len(file.rows))))


def strip_fence(text: str, path: str | None = None) -> str:
    """The text inside a Markdown fence that wraps all of it, else the text.

    In a file of prose a fence may be content. There a fence is removed only if its info string names a prose format or it has
    four signs or more.
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


def _merge_snippet(rows: list[str], update: str, path: str | None, removed: set[str]) -> EditResult:
    """Merges a snippet. `removed` are names that may go. Raises EditNotFound if no row of the snippet is in the file."""
    file = IndexedFile(rows)
    code, levels = _snippet_rows(update, rows, path)
    if not any(levels) and (replacement := replace_definitions(file, code, removed)) is not None:
        texts = row_texts(file, replacement[0])
        warnings = [*replacement[1], *defined_twice(file, Code(texts)), *copied_rows(file, code, replacement[0], False)]
        warnings += unexplained_deletions(file, texts, code, [False] * len(levels), removed)
        warnings += [] if removed else unreplaced_deletions(file, replacement[0])
        return EditResult(replacement[0], tuple(warnings))
    while True:
        marked = any(levels)
        markers = [bool(level) for level in levels]
        snippet = code
        if not marked:
            implied_rows, markers = with_implied_markers(file, code)
            snippet = Code(implied_rows)
        placement, alternative_placement, scores = place_snippet(file, snippet, markers)
        possible = [row for row, level in enumerate(levels) if level]  # none without markers of the edit's own
        empty = {row for row in possible if _leaves_nothing_out(placement, levels, row)}
        if not empty:
            break
        levels = [Marker.NONE if row in empty else level for row, level in enumerate(levels)]
    result = result_rows(placement)
    texts = row_texts(file, result)
    alternative = texts
    if alternative_placement.matches != placement.matches:
        alternative = row_texts(file, result_rows(alternative_placement))
    warnings = merge_warnings(placement, scores, result, texts, alternative, levels if marked else None, removed)
    warnings += unexplained_deletions(file, texts, placement.snippet, placement.markers, removed)
    return EditResult(
        result,
        tuple(warnings),
        alternative=_alternative_rows(placement, alternative_placement, scores, texts) if warnings else None,
    )


def _snippet_rows(update: str, lines: list[str], path: str | None) -> tuple[Code, list[Marker]]:
    """The snippet's rows, without blank ones before a first or after a last marker, and how surely each is a marker."""
    snippet = with_file_indent_unit(lines, update.removesuffix("\n").split("\n"))
    levels = marker_rows(snippet, lines, path)
    full = [row for row, line in enumerate(snippet) if line.strip()]
    first = full[0] if levels[full[0]] else 0
    last = full[-1] + 1 if levels[full[-1]] else len(snippet)
    return Code(snippet[first:last]), levels[first:last]


def _leaves_nothing_out(placement: Placement, levels: Sequence[Marker], row: int) -> bool:
    """Whether a possible marker leaves out no row and is therefore text. Never for a certain marker or one at an end."""
    rows, matches = placement.snippet.rows, placement.matches
    inside = any(line.strip() for line in rows[:row]) and any(line.strip() for line in rows[row + 1 :])
    if levels[row] is Marker.CERTAIN or not inside:
        return False
    above = max((match for match in matches[:row] if match >= 0), default=None)
    below = min((match for match in matches[row:] if match >= 0), default=None)
    return (
        above is not None
        and below is not None
        and not any(line.strip() for line in placement.file.rows[above + 1 : below])
    )


def _alternative_rows(
    placement: Placement, alternative_placement: Placement, scores: numpy.ndarray, texts: list[str]
) -> list[ResultRow] | None:
    """The result rows by another interpretation, None where there is none that differs.

    Tried in this order: the placement at a lower cost, the one before parts were inserted whole, a part at its equally good
    place, the file ending where the snippet ends.
    """
    file, markers = placement.file, placement.markers
    candidates = [alternative_placement]
    if placement.matches_before_insertion is not None and placement.matches_before_insertion != placement.matches:
        candidates.append(replace(placement, matches=placement.matches_before_insertion))
    for part in parts_between_markers(markers):
        if equally_good_row(placement, scores, part) is not None:
            masked_scores = scores.copy()
            for row in part:
                if placement.matches[row] >= 0:
                    masked_scores[row, placement.matches[row]] = -numpy.inf
            (matches,) = align(masked_scores, markers, blank_rows(placement.snippet), (1.0,))
            candidates.append(replace(placement, matches=matches))
    for candidate in candidates:
        rows = result_rows(candidate)
        if row_texts(file, rows) != texts:
            return rows
    last = max((match for match in placement.matches if match >= 0), default=-1)
    if not any(markers) or markers[-1] or last < 0:
        return None
    rows = [row for row in result_rows(placement) if not (isinstance(row, int) and row > last)]
    return rows if rows and row_texts(file, rows) != texts else None
