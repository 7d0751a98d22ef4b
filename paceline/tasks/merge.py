"""A candidate merge: file and snippet joined by rule, before the model writes a token, so that a draft can follow it.

The snippet's lines are aligned with the file's by one dynamic programme over both (Needleman and Wunsch 1970, with free
gaps in the file where the snippet has a marker). Then: a matched line stays, a snippet line without a match is inserted,
a file line passed over between two matched lines is deleted, one passed over at a marker is kept.
"""

from __future__ import annotations

import difflib
import re
from collections import Counter
from dataclasses import dataclass, replace

import numpy

from paceline.errors import EditNotFound, EmptyEdit
from paceline.tasks.blocks import apply_blocks, apply_diff, has_blocks, is_diff
from paceline.tasks.definitions import block_end, defined, indent, new_definitions, replace_definitions, rewritten_to
from paceline.tasks.snippet import marker_rows

_LIKE = 0.3
_LIKENESS = 0.7  # similarity (Dice, over parts of words) from which a line can stand in for another
_NAMED = 1.2  # what the header of a definition with the same name is worth
_BARE = 0.6  # what a line that differs in white space is worth, as a share
_BLANK = 0.2
_DELETE = 0.02  # the cost of a file line passed over without a marker
_HEADER = 0.3  # the further cost when it is the header of a definition
_INSERT = 0.0
_RARITY = 0.3  # how much less a line says that stands in the file often
_EDGE = 4  # the further cost of a line without a match next to a marker: snippets have context there
_LEAVE = 1  # the cost of leaving a run of matched lines without a marker, to insert
_PASS = 0.5  # the further cost of passing over file lines there
_STRICT = 2  # how much more these cost in the second alignment, which says whether the first is in doubt
_FEW = 3  # file lines at an end that a snippet may leave out without a marker
_MUCH = 60  # file lines in one place that an edit removes without showing them, from which that is doubtful
_MET, _ADDED, _PASSED = 0, 1, 2
_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+|\d+|[^\w\s]")
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
    newline = "\r\n" if code.count("\r\n") * 2 > code.count("\n") else "\n"
    file = code.replace("\r\n", "\n")
    update = update.replace("\r\n", "\n")
    if has_blocks(update):
        return _whole(file, apply_blocks(file, update), newline)
    if is_diff(update):
        return _whole(file, apply_diff(file, update), newline)
    lines = file.splitlines()
    if not lines:
        return Merge(update.replace("\n", newline), (), ((0, 0),), 1.0)
    snippet, markers = _rows(update, lines)
    if not any(markers) and (replaced := replace_definitions(lines, snippet)) is not None:
        return _whole(file, "\n".join(replaced) + ("\n" if file.endswith("\n") else ""), newline)
    merge = _place(lines, snippet, markers, file.endswith("\n"), newline, 1)
    return replace(merge, doubts=_doubts(merge, _place(lines, snippet, markers, file.endswith("\n"), newline, _STRICT)))


def _place(
    lines: list[str], snippet: list[str], markers: list[bool], ends: bool, newline: str, strictness: float
) -> Merge:
    """The merge by the best alignment. Raises EditNotFound where that finds no line."""
    matches = _align(lines, snippet, markers, markers, strictness)
    if not any(_is_found(line, lines[match]) for line, match in zip(snippet, matches, strict=True) if match >= 0):
        raise EditNotFound("no line of the edit is found in the file, so there is no place to put it")
    found = [row for row, line in enumerate(snippet) if matches[row] >= 0 or line.strip()]
    rows = slice(found[0], found[-1] + 1)
    snippet, markers, matches = snippet[rows], markers[rows], matches[rows]
    shifted = _reindented(lines, snippet, markers, matches)
    same = [match >= 0 and _same(line, lines[match]) for line, match in zip(shifted, matches, strict=True)]
    barred = new_definitions(lines, shifted, markers, matches, same)
    if shifted != snippet or barred != markers:
        matches = _align(lines, shifted, markers, barred, strictness)
    return _build(lines, shifted, markers, matches, ends, newline)


def _is_found(line: str, other: str) -> bool:
    """Whether a line that stands for another says where the edit goes."""
    return _weight(line) >= 0.5 and (_same(line, other) or defined(line) == defined(other) is not None)


def _doubts(merge: Merge, other: Merge) -> tuple[str, ...]:
    """What speaks against a merge: that a stricter alignment gives another, or that much goes which no marker keeps."""
    doubts = []
    if merge.text != other.text:
        pairs = enumerate(zip(merge.text.splitlines(), other.text.splitlines(), strict=False), 1)
        number = next((number for number, (left, right) in pairs if left != right), 1)
        doubts.append(f"line {number}: the edit can be placed in more than one way")
    for first, last in merge.touched:
        if last - first > _MUCH:
            doubts.append(f"line {first + 1} of the file: {last - first} lines would go that the edit does not show")
    return tuple(doubts)


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


def _weight(line: str) -> float:
    """How much finding this line says about where one is."""
    text = line.strip()
    letters = sum(character.isalnum() for character in text)
    if not text:
        return _BLANK
    if letters <= 2:
        return 0.15
    if letters <= 6:
        return 0.5
    return 1.0 + min(letters, 40) / 80


def _scores(lines: list[str], snippet: list[str], barred: list[bool]) -> numpy.ndarray:
    """[snippet, file]: what matching a snippet line with a file line is worth; negative infinity where they differ."""
    exact: dict[str, list[int]] = {}
    stripped: dict[str, list[int]] = {}
    named: dict[tuple[str, str], list[int]] = {}
    for number, line in enumerate(lines):
        exact.setdefault(line, []).append(number)
        stripped.setdefault("".join(line.split()), []).append(number)
        if definition := defined(line):
            named.setdefault(definition, []).append(number)
    counts = Counter("".join(line.split()) for line in lines)
    index: tuple[dict[str, list[int]], numpy.ndarray] | None = None
    scores = numpy.full((len(snippet), len(lines)), -numpy.inf, dtype=numpy.float32)
    for row, line in enumerate(snippet):
        if barred[row]:
            continue
        bare = "".join(line.split())
        worth = _weight(line) / max(1, counts[bare]) ** _RARITY
        if definition := defined(line):
            scores[row, named.get(definition, [])] = _NAMED
        scores[row, stripped.get(bare, [])] = _BARE * worth
        scores[row, exact.get(line, [])] = worth
        if bare and bare not in stripped:
            if index is None:
                index = _words_index(lines)
            numpy.maximum(scores[row], _likeness(line, index) * (_LIKE * _weight(line)), out=scores[row])
    _confine(scores, lines, snippet, barred, named)
    return scores


def _confine(
    scores: numpy.ndarray,
    lines: list[str],
    snippet: list[str],
    barred: list[bool],
    named: dict[tuple[str, str], list[int]],
) -> None:
    """A definition, up to a marker in it, of which the file has one of that name is matched with that one only."""
    for row, line in enumerate(snippet):
        places = named.get(defined(line) or ("", ""), [])
        if len(places) == 1:
            stop = block_end(snippet, row)
            stop = next((each for each in range(row, stop) if barred[each]), stop)
            scores[row:stop, : places[0]] = -numpy.inf
            scores[row:stop, block_end(lines, places[0]) :] = -numpy.inf


def _words(line: str) -> set[str]:
    """The parts of words, and the signs, in a line."""
    return set(_WORD.findall(line))


def _words_index(lines: list[str]) -> tuple[dict[str, list[int]], numpy.ndarray]:
    """Which lines hold a part of a word, and how many parts each line has."""
    index: dict[str, list[int]] = {}
    sizes = numpy.zeros(len(lines), dtype=numpy.float32)
    for number, line in enumerate(lines):
        words = _words(line)
        sizes[number] = len(words)
        for word in words:
            index.setdefault(word, []).append(number)
    return index, sizes


def _likeness(line: str, index: tuple[dict[str, list[int]], numpy.ndarray]) -> numpy.ndarray:
    """How like each file line is to this one, 0 to 1; negative infinity where it is below `_LIKENESS`."""
    lists, sizes = index
    words = _words(line) or {""}
    common = numpy.bincount(
        numpy.concatenate([numpy.asarray(lists.get(word, []), dtype=numpy.intp) for word in words]), minlength=len(sizes)
    )
    dice = (2 * common / (sizes + len(words))).astype(numpy.float32)
    dice[dice < _LIKENESS] = -numpy.inf
    return dice


def _align(
    lines: list[str], snippet: list[str], markers: list[bool], barred: list[bool], strictness: float
) -> list[int]:
    """For each snippet line the file line it stands for, or -1: the best alignment with affine gaps (Gotoh 1982).

    `paths[state][i, j]` is the best score of snippet lines before i and file lines before j. The states: the last two
    match; or else snippet lines are inserted since two did; or else file lines are passed over, too. Lines that are
    `barred` match nothing. `strictness` multiplies what it costs to leave a run of matched lines.
    """
    scores = _scores(lines, snippet, barred)
    count, width = scores.shape
    costs = [0.0, *(_DELETE + _HEADER * (defined(line) is not None) for line in lines)]
    ramp = numpy.cumsum(costs, dtype=numpy.float32)
    insert, more = _LEAVE * strictness, _PASS * strictness
    paths = numpy.full((3, count + 1, width + 1), -numpy.inf, dtype=numpy.float32)
    paths[_PASSED, 0] = 0.0
    for row in range(count):
        met, added, passed = paths[:, row]
        next_met, next_added, next_passed = paths[:, row + 1]
        if markers[row]:
            next_met[:] = numpy.maximum.accumulate(numpy.maximum(met, numpy.maximum(added, passed) - _EDGE))
            continue
        next_met[1:] = numpy.maximum(met, numpy.maximum(added, passed))[:-1] + scores[row]
        next_added[:] = numpy.maximum(met - insert, added) - _INSERT
        left = numpy.maximum(next_met - insert, next_added) - more
        next_passed[:] = numpy.maximum.accumulate(numpy.maximum(left, passed - _INSERT) + ramp) - ramp
    return _trace(paths, markers, insert, more)


def _trace(paths: numpy.ndarray, markers: list[bool], insert: float, more: float) -> list[int]:
    """Walks back from the best end; of equal ways an insertion is taken before a file line passed over."""
    met, added, passed = paths
    row = len(markers)
    column = int(paths[:, row].max(axis=0).argmax())
    matches = [-1] * row
    state = int(paths[:, row, column].argmax())
    while row > 0:
        if markers[row - 1]:
            row -= 1
            before = paths[:, row] - numpy.array([[0.0], [_EDGE], [_EDGE]], dtype=numpy.float32)
            column = int(before.max(axis=0)[: column + 1].argmax())
            state = int(before[:, column].argmax())
        elif state == _MET:
            row, column = row - 1, column - 1
            matches[row] = column
            state = int(paths[:, row, column].argmax())
        elif state == _ADDED:
            row -= 1
            state = _MET if met[row, column] - insert >= added[row, column] else _ADDED
        elif _close(max(met[row, column] - insert, added[row, column]) - more, passed[row, column]):
            state = _MET if met[row, column] - insert >= added[row, column] else _ADDED
        elif _close(passed[row - 1, column] - _INSERT, passed[row, column]):
            row -= 1
        else:
            column -= 1
    return matches


def _close(left: float, right: float) -> bool:
    return abs(left - right) < 1e-3


def _build(
    lines: list[str], snippet: list[str], markers: list[bool], matches: list[int], ends: bool, newline: str
) -> Merge:
    result: list[str] = []
    kept = [False] * len(lines)
    touched: list[tuple[int, int]] = []
    for gap, anchor in _gaps(snippet, markers, matches, len(lines)):
        keep_from, keep_to = _kept_part(gap, lines, any(markers))
        result += gap.parts[0] if keep_from > gap.first or len(gap.parts) > 1 or keep_to == keep_from else ()
        if keep_from < keep_to or len(gap.parts) > 1:
            result += lines[keep_from:keep_to]
            kept[keep_from:keep_to] = [True] * (keep_to - keep_from)
            if keep_from == gap.first and len(gap.parts) == 1:
                result += gap.parts[0]
            for part in gap.parts[1:]:
                result += part
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
    weight = sum(_weight(line) for line, match in zip(snippet, matches, strict=True) if match >= 0)
    return Merge(text, tuple(kept), tuple(touched), min(1.0, weight / (2.0 + 2.0 * sum(markers))))


def _gaps(
    snippet: list[str], markers: list[bool], matches: list[int], count: int
) -> list[tuple[_Gap, int]]:
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


def _kept_part(gap: _Gap, lines: list[str], has_markers: bool) -> tuple[int, int]:
    """Which of the gap's file lines stay: a range, empty where all are replaced.

    Where the snippet has markers, none at an end of it means that it reaches the file's end there. Where it has none, and
    at the file's top, that is believed only of as many lines as are put in their place, and `_FEW`.
    """
    size, inserted = gap.last - gap.first, len(gap.parts[0])
    starts, stops = gap.first == 0, gap.last == len(lines)
    shown = size <= _FEW + inserted if has_markers or inserted else False
    if len(gap.parts) > 1 or stops:
        if len(gap.parts) == 1 and stops and (has_markers or shown):
            return gap.last, gap.last
        put = [line for line in gap.parts[0] if line.strip()]
        return rewritten_to(lines, gap.first, gap.last, put, gap.indents[0] if gap.indents else None), gap.last
    return (gap.first, gap.last) if starts and not shown else (gap.last, gap.last)


def _reindented(lines: list[str], snippet: list[str], markers: list[bool], matches: list[int]) -> list[str]:
    """The snippet at the file's indent: a segment is shifted by what its first and last found lines, and most, are off."""
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
    return "".join(left.split()) == "".join(right.split())


def _whole(code: str, text: str, newline: str) -> Merge:
    """A merge whose text is known: what it keeps of the file is found by comparing."""
    lines = code.splitlines()
    kept = [False] * len(lines)
    touched = []
    matcher = difflib.SequenceMatcher(None, lines, text.splitlines(), autojunk=False)
    for tag, first, last, _, _ in matcher.get_opcodes():
        if tag == "equal":
            kept[first:last] = [True] * (last - first)
        else:
            touched.append((first, last))
    return Merge(text.replace("\n", newline), tuple(kept), tuple(touched), 1.0)
