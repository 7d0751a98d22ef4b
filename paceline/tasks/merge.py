"""A candidate merge: file and snippet joined by rule, before the model writes a token, so that a draft can follow it.

The snippet's lines are aligned with the file's (align.py). Then: a matched line stays, a snippet line without a match
is inserted, a file line passed over between two matched lines is deleted, one passed over at a marker is kept. A
snippet that is nothing but whole definitions, without a marker, replaces those (definitions.py).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from paceline.errors import EditNotFound, EmptyEdit
from paceline.tasks.align import File, Placed, align, weight
from paceline.tasks.blocks import apply_blocks, apply_diff, has_blocks, is_diff
from paceline.tasks.definitions import (
    decorators_start,
    defined,
    indent,
    new_definitions,
    replace_definitions,
    rewritten_to,
    with_markers_understood,
)
from paceline.tasks.doubts import doubts_of, repeated
from paceline.tasks.runs import runs
from paceline.tasks.snippet import has_windows_ends, lines_of, marker_rows, unix

_PASSING = 0.2  # a factor on the cost to pass over a file line that must not matter
_FEW = 3  # file lines at an end that a snippet may leave out without a marker
_FENCE = re.compile(r"^\s*```[\w+-]*\s*$")


@dataclass(frozen=True)
class Merge:
    """A merged text. `kept[i]` says whether line i of the file is in it; `confidence` is 0 to 1.

    `touched` are the ranges of file lines, first and past the last, that the edit replaces or inserts at.
    `doubts` are reasons, a sentence each, to have a person look at it.
    """

    text: str
    kept: tuple[bool, ...]
    touched: tuple[tuple[int, int], ...]
    confidence: float
    doubts: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Gap:
    """What the snippet has between two lines found in the file, and the file lines `first:last` between those.

    `parts` are the inserted lines, cut at markers: one part, no marker. `indents` are the markers' indents.
    """

    first: int
    last: int
    parts: tuple[tuple[str, ...], ...]
    indents: tuple[int, ...]


def candidate_merge(code: str, update: str) -> Merge:
    """Merges by rule. `update` is a lazy snippet, SEARCH/REPLACE blocks or a unified diff.

    Raises EmptyEdit where the update says nothing and EditNotFound where none of it is found in the file.
    """
    update = strip_fence(update)
    if not update.strip():
        raise EmptyEdit("the edit is empty")
    newline = "\r\n" if has_windows_ends(code) else "\n"
    file, update = unix(code), unix(update)
    if has_blocks(update):
        return _whole(file, apply_blocks(file, update), newline)
    if is_diff(update):
        return _whole(file, apply_diff(file, update), newline)
    lines = lines_of(file)
    if not lines:
        return Merge(update.replace("\n", newline), (), ((0, 0),), 1.0)
    snippet, markers = _rows(update, lines)
    marked = any(markers)
    known = File(lines)
    if not marked and (replaced := replace_definitions(lines, known.headers, snippet)) is not None:
        text = "\n".join(replaced[0]) + ("\n" if file.endswith("\n") else "")
        return replace(_whole(file, text, newline), doubts=replaced[1] + tuple(repeated(known, replaced[0])))
    if not marked:
        snippet, markers = with_markers_understood(lines, known.headers, snippet)
    placed, otherwise = _place(known, snippet, markers)
    merge = _build(lines, placed, file.endswith("\n"), newline)
    other = merge if otherwise == placed else _build(lines, otherwise, file.endswith("\n"), newline)
    doubts = doubts_of(known, placed, merge.kept, lines_of(merge.text), lines_of(other.text), marked)
    return replace(merge, doubts=doubts)


def _place(file: File, snippet: list[str], markers: list[bool]) -> tuple[Placed, Placed]:
    """The best alignment, and the best at the other cost to pass over lines. Raises EditNotFound where one has no line."""
    scores = file.scores(snippet, markers)
    usual, other = align(scores, markers, (1.0, _PASSING))
    placed, final = _settled(file, snippet, markers, usual, 1.0)
    if other == usual and final:
        return placed, placed
    return placed, _settled(file, snippet, markers, other, _PASSING)[0]


def _settled(
    file: File, snippet: list[str], markers: list[bool], matches: list[int], passing: float
) -> tuple[Placed, bool]:
    """The snippet at the file's indent, aligned anew where that or new definitions ask for it; and whether none did."""
    if not any(match >= 0 and weight(line) >= 0.5 for line, match in zip(snippet, matches, strict=True)):
        raise EditNotFound("no line of the edit is found in the file, so there is no place to put it")
    found = [row for row, line in enumerate(snippet) if matches[row] >= 0 or line.strip()]
    rows = slice(found[0], found[-1] + 1)
    snippet, markers, matches = snippet[rows], markers[rows], matches[rows]
    shifted = _reindented(file.lines, snippet, markers, matches)
    same = [match >= 0 and _same(line, file.lines[match]) for line, match in zip(shifted, matches, strict=True)]
    barred = new_definitions(file.headers, shifted, markers, matches, same)
    final = shifted == snippet and barred == markers
    if not final:
        (matches,) = align(file.scores(shifted, barred), markers, (passing,))
    return Placed(shifted, markers, matches), final


def _rows(update: str, lines: list[str]) -> tuple[list[str], list[bool]]:
    """The snippet's lines without the blank ones outside an outermost marker, and which are markers."""
    snippet = update.removesuffix("\n").split("\n")
    markers = marker_rows(snippet, lines)
    full = [row for row, line in enumerate(snippet) if line.strip()]
    first = full[0] if markers[full[0]] else 0
    last = full[-1] + 1 if markers[full[-1]] else len(snippet)
    return snippet[first:last], markers[first:last]


def strip_fence(text: str) -> str:
    """The text inside a Markdown fence that wraps all of it, else the text."""
    lines = text.strip("\n").split("\n")
    if len(lines) >= 2 and _FENCE.match(lines[0]) and lines[-1].strip() == "```":
        return "\n".join(lines[1:-1]) + "\n"
    return text


def _build(lines: list[str], placed: Placed, ends: bool, newline: str) -> Merge:
    snippet, markers, matches = placed.snippet, placed.markers, placed.matches
    result: list[str] = []
    kept = [False] * len(lines)
    touched: list[tuple[int, int]] = []
    top = next((match - row for row, match in enumerate(matches) if match >= 0), 0)
    reaches = any(markers) and (markers[0] or top <= _FEW)
    for gap, anchor in _gaps(snippet, markers, matches, len(lines)):
        keep_from, keep_to = _kept_part(gap, lines, any(markers), reaches)
        if len(gap.parts) > 1 and anchor >= 0 and defined(snippet[anchor]) and any(map(_is_decorator, gap.parts[-1])):
            keep_to = max(keep_from, decorators_start(lines, gap.last))
        result += _filled(gap, lines[keep_from:keep_to])
        kept[keep_from:keep_to] = [True] * (keep_to - keep_from)
        if any(gap.parts) or keep_to - keep_from < gap.last - gap.first:
            touched += [(gap.first, keep_from), (keep_to, gap.last)]
        if anchor >= 0:
            found = matches[anchor]
            line = snippet[anchor]
            result.append(line)
            kept[found] = line == lines[found]
            if not kept[found]:
                touched.append((found, found + 1))
    text = newline.join(result) + (newline if ends and result else "")
    told = sum(weight(line) for line, match in zip(snippet, matches, strict=True) if match >= 0)
    return Merge(text, tuple(kept), tuple(touched), min(1.0, told / (2.0 + 2.0 * sum(markers))))


def _filled(gap: _Gap, kept: list[str]) -> list[str]:
    """The gap's text: what is inserted before its first marker, what is kept, what is inserted after.

    Blank lines that both have where they meet stand once.
    """
    if not kept and len(gap.parts) == 1:
        return list(gap.parts[0])
    before, *after = gap.parts
    if len(gap.parts) == 1 and gap.first == 0:
        before, after = (), [before]
    overlap = min(_blanks(before[::-1]), _blanks(kept))
    result = [*before[: len(before) - overlap], *kept]
    for part in after:
        result += part[min(_blanks(result[::-1]), _blanks(part)) :]
    return result


def _is_decorator(line: str) -> bool:
    return line.strip().startswith("@")


def _blanks(lines: Sequence[str]) -> int:
    """How many blank lines come first."""
    return next((number for number, line in enumerate(lines) if line.strip()), len(lines))


def _gaps(snippet: list[str], markers: list[bool], matches: list[int], count: int) -> list[tuple[_Gap, int]]:
    """The gaps in order, each with the index of the snippet line that ends it, -1 for the last."""
    gaps: list[tuple[_Gap, int]] = []
    parts: list[list[str]] = [[]]
    indents: list[int] = []
    reached = 0
    for index, line in enumerate(snippet):
        if markers[index]:
            parts.append([])
            indents.append(indent(line))
        elif matches[index] < 0:
            parts[-1].append(line)
        else:
            gap = _Gap(reached, matches[index], tuple(tuple(part) for part in parts), tuple(indents))
            gaps.append((gap, index))
            reached, parts, indents = matches[index] + 1, [[]], []
    gaps.append((_Gap(reached, count, tuple(tuple(part) for part in parts), tuple(indents)), -1))
    return gaps


def _kept_part(gap: _Gap, lines: list[str], has_markers: bool, reaches: bool) -> tuple[int, int]:
    """Which of the gap's file lines stay: a range, empty where all are replaced.

    A snippet that has markers but none at its end reaches the file's, if it has one at its top or begins the file.
    Otherwise, and at the file's top, that is believed only of as many lines as are put in their place, and `_FEW`.
    """
    size, inserted = gap.last - gap.first, len(gap.parts[0])
    starts, stops = gap.first == 0, gap.last == len(lines)
    shown = size <= _FEW + inserted if has_markers or inserted else False
    if len(gap.parts) > 1 or stops:
        if len(gap.parts) == 1 and stops and (reaches or shown):
            return gap.last, gap.last
        put = [line for line in gap.parts[0] if line.strip()]
        return rewritten_to(lines, gap.first, gap.last, put, gap.indents[0] if gap.indents else None), gap.last
    return (gap.first, gap.last) if starts and not shown else (gap.last, gap.last)


def _reindented(lines: list[str], snippet: list[str], markers: list[bool], matches: list[int]) -> list[str]:
    """The snippet at the file's indent: a segment is shifted by what its first, last and most found lines are off."""
    shifted = snippet[:]
    start = 0
    for stop in [index for index, marker in enumerate(markers) if marker] + [len(snippet)]:
        amounts: list[int] = []
        unit = " "
        for row in range(start, stop):
            if matches[row] >= 0 and snippet[row].strip() and _same(snippet[row], lines[matches[row]]):
                margin = _margin(lines[matches[row]])
                amounts.append(len(margin) - indent(snippet[row]))
                unit = margin[:1] or unit
        amount = amounts[0] if amounts else 0
        if amount and amounts[-1] == amount and amounts.count(amount) * 2 > len(amounts):
            for row in range(start, stop):
                text = snippet[row]
                shifted[row] = unit * amount + text if amount > 0 else text[min(-amount, indent(text)) :]
                shifted[row] = shifted[row] if text.strip() else text
        start = stop + 1
    return shifted


def _margin(line: str) -> str:
    return line[: len(line) - len(line.lstrip())]


def _same(left: str, right: str) -> bool:
    return left == right or "".join(left.split()) == "".join(right.split())


def _whole(code: str, text: str, newline: str) -> Merge:
    """A merge whose text is known: what it keeps of the file is found by comparing."""
    lines, result = lines_of(code), lines_of(text)
    kept = [False] * len(lines)
    touched = []
    reached = put = 0
    for start, other, size in [*runs(lines, result), (len(lines), len(result), 0)]:
        if (start, other) != (reached, put):
            touched.append((reached, start))
        reached, put = start + size, other + size
        kept[start:reached] = [True] * size
    return Merge(text.replace("\n", newline), tuple(kept), tuple(touched), 1.0)
