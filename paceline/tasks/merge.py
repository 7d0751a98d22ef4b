"""A candidate merge: file and edit joined by rule, before the model writes a token, so that a draft can follow it.

A snippet's rows are aligned with the file's (align.py). Then: a matched row stays, a snippet row without a match is
inserted, a file row passed over between two matched rows is deleted, one passed over at a marker or beyond the snippet's
ends is kept. A snippet that is nothing but whole definitions, without a marker, replaces those (definitions.py).
SEARCH/REPLACE blocks and diffs name what they replace (blocks.py, diffs.py).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy

from paceline.errors import EditNotFound, EmptyEdit
from paceline.tasks.align import File, Placed, align, bare, weight
from paceline.tasks.blocks import apply_blocks, has_blocks
from paceline.tasks.definitions import (
    Code,
    decorators_start,
    definitions_of,
    indent,
    is_closer,
    new_definitions,
    replace_definitions,
    rewritten_to,
    with_markers_understood,
)
from paceline.tasks.diffs import apply_diff, is_diff
from paceline.tasks.doubts import copied, doubts_of, is_preamble, repeated
from paceline.tasks.lines import BOM, Edited, Lines, Row
from paceline.tasks.readings import insertion, parts_of, second_place, told_apart
from paceline.tasks.shown import named_for_removal, unshown_deletions
from paceline.tasks.snippet import Marker, is_prose, marker_rows

_PASSING = 0.2  # a factor on the cost to pass over a file row that must not matter
_TELLING = 0.5  # what rows must say that speak for a replacement and against an insertion
_SURE = 1.5  # the same, for it to be without doubt
_FEW = 3  # file rows beyond the new ones that a snippet's first rows may replace
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


@dataclass(frozen=True)
class _Gap:
    """What the snippet has between two rows found in the file, and the file rows `first:last` between those.

    `parts` are the inserted rows, cut at markers: one part, no marker. `indents` are the markers' indents.
    """

    first: int
    last: int
    parts: tuple[tuple[str, ...], ...]
    indents: tuple[int, ...]


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
    return replace(merge, doubts=doubts, other=other)


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
        texts = _texts(file, replaced[0])
        doubts = [*replaced[1], *repeated(file, Code(texts)), *copied(file, code, replaced[0], False)]
        doubts += unshown_deletions(file, texts, code, [False] * len(levels), removed)
        return Edited(replaced[0], tuple(doubts))
    while True:
        marked = any(levels)
        markers = [bool(level) for level in levels]
        snippet = code
        if not marked:
            understood, markers = with_markers_understood(file, code)
            snippet = Code(understood)
        placed, otherwise, scores = _place(file, snippet, markers)
        void = {row for row, level in enumerate(levels) if level and _void(placed, levels, row)} if marked else set()
        if not void:
            break
        levels = [Marker.NONE if row in void else level for row, level in enumerate(levels)]
    result = _moved(placed, _build(placed))
    texts = _texts(file, result)
    other = texts if otherwise.matches == placed.matches else _texts(file, _moved(otherwise, _build(otherwise)))
    doubts = doubts_of(placed, scores, result, texts, other, levels if marked else None, removed)
    doubts += unshown_deletions(file, texts, placed.snippet, placed.markers, removed)
    return Edited(result, tuple(doubts), other=_other(placed, otherwise, scores, texts) if doubts else None)


def _other(placed: Placed, otherwise: Placed, scores: numpy.ndarray, texts: list[str]) -> list[Row] | None:
    """The rows of another reading: at other costs, with a part replacing rows or elsewhere, or without the file's end."""
    file, markers = placed.file, placed.markers
    readings = [otherwise]
    for part in parts_of(markers):
        masked = scores.copy()
        for row in part:
            if placed.matches[row] >= 0:
                masked[row, placed.matches[row]] = -numpy.inf
        if placed.plain is not None and placed.plain != placed.matches:
            readings.append(replace(placed, matches=placed.plain))
        if second_place(placed, scores, part) is not None:
            (matches,) = align(masked, markers, blank_rows(placed.snippet), (1.0,))
            readings.append(replace(placed, matches=matches))
    for reading in readings:
        rows = _moved(reading, _build(reading))
        if _texts(file, rows) != texts:
            return rows
    last = max((match for match in placed.matches if match >= 0), default=-1)
    if not any(markers) or markers[-1] or last < 0:
        return None
    rows = [row for row in _build(placed) if not (isinstance(row, int) and row > last)]
    return rows if rows and _texts(file, rows) != texts else None


def _texts(file: Code, rows: Sequence[Row]) -> list[str]:
    return [file.rows[row] if isinstance(row, int) else row for row in rows]


def _void(placed: Placed, levels: Sequence[Marker], row: int) -> bool:
    """Whether a row that may be a marker leaves nothing out, and so is text; not one that is certain, or at an end."""
    rows, matches = placed.snippet.rows, placed.matches
    inside = any(line.strip() for line in rows[:row]) and any(line.strip() for line in rows[row + 1 :])
    if levels[row] is Marker.CERTAIN or not inside:
        return False
    above = max((match for match in matches[:row] if match >= 0), default=None)
    below = min((match for match in matches[row:] if match >= 0), default=None)
    return above is not None and below is not None and not any(line.strip() for line in placed.file.rows[above + 1 : below])


def _place(file: File, snippet: Code, markers: list[bool]) -> tuple[Placed, Placed, numpy.ndarray]:
    """The best alignment, the best at the other cost to pass over rows, and the scores of the first.

    Raises EditNotFound where no row with a letter or a digit is found.
    """
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
        if runs and not _between(snippet.rows, runs[-1][-1][0], row) and not _between(file.rows, runs[-1][-1][1], match):
            runs[-1].append((row, match))
        else:
            runs.append([(row, match)])
    weak = []
    for number, run in enumerate(runs):
        if any(placed.kept(row) or (snippet.names[row] and snippet.names[row] == file.names[match]) for row, match in run):
            continue
        around = [(runs[number - 1][-1], run[0])] if number else []
        around += [(run[-1], runs[number + 1][0])] if number + 1 < len(runs) else []
        if any(
            _between(file.rows, first[1], last[1]) and not any(placed.markers[first[0] : last[0]]) for first, last in around
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
    doubts = []
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
            doubts.append(f"{text!r} and on may be put in as new, or replace what stands at line {line} of the file and on")
        if told >= _TELLING:
            continue
        forced = scores.copy() if forced is None else forced
        for row in part:
            if row in other.matches or row in other.new:
                forced[row] = -numpy.inf
            if row in other.matches:
                forced[row, other.matches[row]] = max(1.0, weight(placed.snippet.rows[row]))
    return forced, doubts


def _rows(update: str, lines: list[str], path: str | None) -> tuple[Code, list[Marker]]:
    """The snippet's rows without the blank ones outside an outermost marker, and which may be markers."""
    snippet = update.removesuffix("\n").split("\n")
    levels = marker_rows(snippet, lines, path)
    full = [row for row, line in enumerate(snippet) if line.strip()]
    first = full[0] if levels[full[0]] else 0
    last = full[-1] + 1 if levels[full[-1]] else len(snippet)
    return Code(snippet[first:last]), levels[first:last]


def _build(placed: Placed) -> list[Row]:
    """The rows of the result."""
    file, snippet = placed.file, placed.snippet
    result: list[Row] = []
    whole = any(placed.markers) and all(
        placed.kept(row) or placed.markers[row] or not line.strip() for row, line in enumerate(snippet.rows)
    )
    for gap, anchor in _gaps(placed):
        first, last = _kept_part(file, gap, anchor)
        if len(gap.parts) == 1 and whole and (gap.first == 0 or anchor < 0):
            first = last  # an edit that else changes nothing shows that the file begins, or ends, with it
        if len(gap.parts) > 1 and anchor >= 0 and snippet.names[anchor] and any(map(_is_decorator, gap.parts[-1])):
            last = max(first, decorators_start(file.rows, gap.last))
        result += _filled(file, gap, range(first, last), anchor < 0)
        if anchor >= 0:
            result.append(placed.matches[anchor] if placed.kept(anchor) else snippet.rows[anchor])
    return result


def _moved(placed: Placed, result: list[Row]) -> list[Row]:
    """The result without a definition's old place where the snippet shows all of it in another one."""
    file, snippet = placed.file, placed.snippet
    for header, name in enumerate(snippet.names):
        places = file.headers.get(name or ("", ""), [])
        stop = snippet.block_end(header) if len(places) == 1 else header
        if stop - header < 2 or any(placed.matches[row] >= 0 for row in range(header, stop)):
            continue
        if any(placed.markers[header:stop]) or sum(each == name for each in snippet.names) > 1:
            continue
        if indent(snippet.rows[header]) or indent(file.rows[places[0]]):
            continue  # only outermost ones: what is deeper may be of another block, or a part of a text
        last = file.block_end(places[0])
        while last < len(file.rows) and not file.rows[last].strip():
            last += 1
        gone = range(file.block_start(places[0]), last)
        if all(row in result for row in gone):
            result = [row for row in result if not (isinstance(row, int) and row in gone)]
    return result


def _filled(file: File, gap: _Gap, kept: range, ends: bool) -> list[Row]:
    """The gap's rows: what is inserted before its first marker, what is kept, what is inserted after.

    Blank rows that both have where they meet stand once. A definition put between markers comes inside the last block
    of what is kept that it is deep enough for, as far from the one before it as those are from each other.
    """
    if not kept and len(gap.parts) == 1:
        return list(gap.parts[0])
    before, *after = gap.parts
    if len(gap.parts) == 1 and gap.first == 0:
        before, after = (), [before]
    overlap = min(_blanks(before[::-1]), _blanks([file.rows[row] for row in kept]))
    result: list[Row] = [*before[: len(before) - overlap], *kept]
    tail: list[Row] = []
    for part in after:
        if not result and gap.first == 0:
            part = part[_blanks(part) :]
        full = [line for line in part if line.strip()]
        if ends and full and Code(full).names[0] is not None and result:
            tail = _closing(file, result, indent(full[0]))
            result = result[: len(result) - len(tail)]
            apart = max(_blanks(part), _apart(file, kept, full[0]))
            result += [""] * (apart - _blanks(_texts(file, result)[::-1]))
            result += part[_blanks(part) : len(part) - _blanks(part[::-1])]
            continue
        result += part[min(_blanks(_texts(file, result)[::-1]), _blanks(part)) :]
    return result + tail


def _closing(file: File, result: list[Row], depth: int) -> list[Row]:
    """The last rows that close blocks which a row at `depth` is inside of."""
    start = len(result)
    for place in range(len(result) - 1, -1, -1):
        text = file.rows[row] if isinstance(row := result[place], int) else row
        if text.strip() and (indent(text) >= depth or not is_closer(text)):
            break
        start = place if text.strip() else start
    return result[start:]


def _apart(file: File, kept: range, header: str) -> int:
    """How many blank rows stand before the definitions of the file that are as deep as `header`."""
    counts = Counter(
        _blanks(file.rows[: file.block_start(row)][::-1])
        for row in kept
        if file.names[row] and indent(file.rows[row]) == indent(header) and not _opens(file, file.block_start(row))
    )
    if counts:
        return counts.most_common(1)[0][0]
    return 2 if indent(header) == 0 and header.endswith(":") else 1


def _opens(file: File, row: int) -> bool:
    """Whether a row is the first of its block."""
    above = next((line for line in file.rows[:row][::-1] if line.strip()), "")
    return not above or indent(above) < indent(file.rows[row])


def _is_decorator(line: str) -> bool:
    return line.strip().startswith("@")


def _blanks(lines: Sequence[str]) -> int:
    """How many blank lines come first."""
    return next((number for number, line in enumerate(lines) if line.strip()), len(lines))


def _gaps(placed: Placed) -> list[tuple[_Gap, int]]:
    """The gaps in order, each with the index of the snippet row that ends it, -1 for the last."""
    gaps: list[tuple[_Gap, int]] = []
    parts: list[list[str]] = [[]]
    indents: list[int] = []
    reached = 0
    full = [row for row, line in enumerate(placed.snippet.rows) if line.strip() or placed.matches[row] >= 0]
    for index in range(full[0], full[-1] + 1):
        line = placed.snippet.rows[index]
        if placed.markers[index]:
            parts.append([])
            indents.append(indent(line))
        elif placed.matches[index] < 0:
            parts[-1].append(line)
        else:
            gap = _Gap(reached, placed.matches[index], tuple(tuple(part) for part in parts), tuple(indents))
            gaps.append((gap, index))
            reached, parts, indents = placed.matches[index] + 1, [[]], []
    gaps.append((_Gap(reached, len(placed.file.rows), tuple(tuple(part) for part in parts), tuple(indents)), -1))
    return gaps


def _kept_part(file: File, gap: _Gap, anchor: int) -> tuple[int, int]:
    """Which of the gap's file rows stay: a range, empty where all are replaced.

    Between two found rows without a marker none do. Beyond the snippet's ends, and at a marker, all do but those of a
    definition that the snippet rewrites to its end.
    """
    put = [line for line in gap.parts[0] if line.strip()]
    if len(gap.parts) == 1 and anchor >= 0:
        if gap.first > 0:
            return gap.last, gap.last
        if not put and not any(line.strip() for line in file.rows[: gap.last]):
            return gap.last, gap.last  # blank rows at the file's beginning, where the snippet has none
        last = gap.last
        while put and last > max(0, gap.last - len(put) - _FEW) and file.rows[last - 1].strip():
            if is_preamble(file.rows[last - 1]):
                break
            last -= 1  # rows right above, at the snippet's beginning, are what its first rows replace
        return gap.first, last
    first = rewritten_to(file, gap.first, gap.last, put, gap.indents[0] if gap.indents else None)
    if len(gap.parts) == 1 and put:
        while first < gap.last and file.rows[first].strip() and indent(file.rows[first]) >= indent(put[-1]):
            first += 1  # rows right below, at the snippet's end, are what its last rows replace
    return first, gap.last


def _reindented(
    lines: list[str], snippet: list[str], markers: list[bool], barred: list[bool], matches: list[int]
) -> list[str]:
    """The snippet at the file's indent, in its unit: each part is moved by what its rows that are found are off.

    Rows that are `barred` do not tell.
    """
    shifted = snippet[:]
    for part in parts_of(markers):
        pairs = [
            (margin_of(snippet[row]), margin_of(lines[matches[row]]))
            for row in part
            if matches[row] >= 0 and not barred[row] and snippet[row].strip() and _same(snippet[row], lines[matches[row]])
        ]
        if not pairs or all(own == theirs for own, theirs in pairs):
            continue
        full = [row for row in part if snippet[row].strip()]
        unit = _unit(pairs) if len(pairs) < len(full) else None  # where nothing else changes, the indent is the edit
        if unit is not None:
            for row in part:
                margin = margin_of(snippet[row])
                shifted[row] = unit(margin) + snippet[row][len(margin) :] if snippet[row].strip() else snippet[row]
            continue
        amounts = [len(theirs) - len(own) for own, theirs in pairs]
        amount = amounts[0]
        if amount <= 0 or min(indent(snippet[row]) for row in full) > 0:
            continue  # the part is not written at the left margin, so its indent is part of the edit
        if amounts[-1] == amount and amounts.count(amount) * 2 > len(amounts):
            sign = next((theirs[0] for _, theirs in pairs if theirs), " ")
            for row in full:
                shifted[row] = sign * amount + snippet[row]
    return shifted


def _unit(pairs: list[tuple[str, str]]) -> Callable[[str], str] | None:
    """How margins of spaces become the file's of tabs, or the other way, where all pairs agree; else None."""
    for tabbed, spaced, turned in ((1, 0, False), (0, 1, True)):
        if not all(set(pair[tabbed]) <= {"\t"} and set(pair[spaced]) <= {" "} for pair in pairs):
            continue
        sizes = {len(pair[spaced]) / len(pair[tabbed]) for pair in pairs if pair[tabbed]}
        if len(sizes) == 1 and (size := sizes.pop()) in (2, 3, 4, 8):
            width = int(size)
            if turned:
                return lambda margin: margin.replace("\t", " " * width)
            return lambda margin: "\t" * (len(margin) // width) + " " * (len(margin) % width)
    return None


def margin_of(line: str) -> str:
    """The white space that a line begins with."""
    return line[: len(line) - len(line.lstrip())]


def _same(left: str, right: str) -> bool:
    return left == right or bare(left) == bare(right)
