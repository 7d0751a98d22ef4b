"""A candidate merge: file and snippet joined by rule, before the model writes a token, so that a draft can follow it.

The snippet's lines are aligned with the file's by one dynamic programme over both (Needleman and Wunsch 1970, with free
gaps in the file where the snippet has a marker). Then: a matched line stays, a snippet line without a match is inserted,
a file line passed over between two matched lines is deleted, one passed over at a marker is kept.
"""

from __future__ import annotations

import difflib
import re
from collections import Counter
from dataclasses import dataclass

import numpy

from paceline.errors import EditNotFound, EmptyEdit
from paceline.tasks.blocks import apply_blocks, apply_diff, has_blocks, is_diff
from paceline.tasks.snippet import marker_rows

_LIKE = 0.3
_LIKENESS = 0.7  # similarity (Dice, over parts of words) from which a line can stand in for another
_NAMED = 0.8  # what the header of a definition with the same name is worth
_BARE = 0.6  # what a line that differs in white space is worth, as a share
_BLANK = 0.2
_DELETE = 0.04  # the cost of a file line passed over without a marker
_INSERT = 0.08
_RARITY = 0.7  # how much less a line says that stands in the file often
_EDGE = 2  # the further cost of a line without a match next to a marker: snippets have context there
_OPEN = 1.5  # the cost of leaving a run of matched lines without a marker
_DEFINITION = re.compile(
    r"^\s*(?:export\s+|default\s+|public\s+|private\s+|protected\s+|static\s+|async\s+|pub\s+|abstract\s+|override\s+)*"
    r"(def|class|function|fn|func|interface|struct|enum|impl|trait|type|module|namespace)\s+\*?([A-Za-z_$][\w$]*)"
)
_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+|\d+|[^\w\s]")
_METHOD = re.compile(r"^\s+(?:async\s+|static\s+|get\s+|set\s+|\*)*([A-Za-z_$][\w$]*)\s*\([^;]*\)[^;()]*\{$")
_STATEMENTS = {"if", "for", "while", "switch", "catch", "with", "return", "else"}
_FENCE = re.compile(r"^\s*```[\w+-]*\s*$")


@dataclass(frozen=True)
class Merge:
    """A merged text. `kept[i]` says whether line i of the file is in it; `confidence` is 0 to 1.

    `touched` are the ranges of file lines, first and past the last, that the edit replaces or inserts at.
    """

    text: str
    kept: tuple[bool, ...]
    touched: tuple[tuple[int, int], ...]
    confidence: float


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
    matches = _align(lines, snippet, markers)
    if not any(match >= 0 and _weight(line) >= 0.5 for line, match in zip(snippet, matches, strict=True)):
        raise EditNotFound("no line of the edit is found in the file, so there is no place to put it")
    while matches[-1] < 0 and not snippet[-1].strip():
        matches.pop(), snippet.pop(), markers.pop()
    while matches[0] < 0 and not snippet[0].strip():
        matches, snippet, markers = matches[1:], snippet[1:], markers[1:]
    shifted = _reindented(lines, snippet, markers, matches)
    barred = _new_definitions(lines, shifted, markers, matches)
    if shifted != snippet or barred != markers:
        snippet, matches = shifted, _align(lines, shifted, markers, barred)
    return _build(lines, snippet, markers, matches, file.endswith("\n"), newline)


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


def _defined(line: str) -> tuple[str, str] | None:
    """The kind and the name of what this line begins to define."""
    if found := _DEFINITION.match(line):
        return found[1], found[2]
    method = _METHOD.match(line)
    return ("method", method[1]) if method and method[1] not in _STATEMENTS else None


def _scores(lines: list[str], snippet: list[str], barred: list[bool]) -> numpy.ndarray:
    """[snippet, file]: what matching a snippet line with a file line is worth; negative infinity where they differ."""
    exact: dict[str, list[int]] = {}
    stripped: dict[str, list[int]] = {}
    named: dict[tuple[str, str], list[int]] = {}
    for number, line in enumerate(lines):
        exact.setdefault(line, []).append(number)
        stripped.setdefault("".join(line.split()), []).append(number)
        if definition := _defined(line):
            named.setdefault(definition, []).append(number)
    counts = Counter("".join(line.split()) for line in lines)
    index: tuple[dict[str, list[int]], numpy.ndarray] | None = None
    scores = numpy.full((len(snippet), len(lines)), -numpy.inf, dtype=numpy.float32)
    for row, line in enumerate(snippet):
        if barred[row]:
            continue
        bare = "".join(line.split())
        worth = _weight(line) / max(1, counts[bare]) ** _RARITY
        if definition := _defined(line):
            scores[row, named.get(definition, [])] = _NAMED
        scores[row, stripped.get(bare, [])] = _BARE * worth
        scores[row, exact.get(line, [])] = worth
        if bare and bare not in stripped:
            if index is None:
                index = _words_index(lines)
            numpy.maximum(scores[row], _likeness(line, index) * (_LIKE * _weight(line)), out=scores[row])
    return scores


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


def _align(lines: list[str], snippet: list[str], markers: list[bool], barred: list[bool] | None = None) -> list[int]:
    """For each snippet line the file line it stands for, or -1: the best alignment with affine gaps (Gotoh 1982).

    `met[i, j]`: the best score of snippet lines before i and file lines before j where the last two match;
    `apart[i, j]`: where they do not. Lines that are `barred` match nothing.
    """
    scores = _scores(lines, snippet, barred or markers)
    count, width = scores.shape
    ramp = _DELETE * numpy.arange(width + 1, dtype=numpy.float32)
    met = numpy.full((count + 1, width + 1), -numpy.inf, dtype=numpy.float32)
    apart = numpy.full_like(met, -numpy.inf)
    apart[0] = 0.0
    for row in range(count):
        if markers[row]:
            met[row + 1] = numpy.maximum.accumulate(numpy.maximum(met[row], apart[row] - _EDGE))
            continue
        met[row + 1, 1:] = numpy.maximum(met[row], apart[row])[:-1] + scores[row]
        inserted = numpy.maximum(met[row] - _OPEN, apart[row]) - _INSERT
        best = numpy.maximum(inserted, met[row + 1] - _OPEN)
        apart[row + 1] = numpy.maximum.accumulate(best + ramp) - ramp
    return _trace(met, apart, markers)


def _trace(met: numpy.ndarray, apart: numpy.ndarray, markers: list[bool]) -> list[int]:
    """Walks back from the best end; of equal ways an insertion is taken before a skipped file line."""
    row = len(markers)
    column = int(numpy.maximum(met, apart)[row].argmax())
    matches = [-1] * row
    matched = bool(met[row, column] >= apart[row, column])
    while row > 0:
        if markers[row - 1]:
            row -= 1
            column = int(numpy.maximum(met[row], apart[row] - _EDGE)[: column + 1].argmax())
            matched = bool(met[row, column] >= apart[row, column] - _EDGE)
        elif matched:
            row, column = row - 1, column - 1
            matches[row] = column
            matched = bool(met[row, column] >= apart[row, column])
        elif _close(met[row, column] - _OPEN, apart[row, column]):
            matched = True
        elif _close(max(met[row - 1, column] - _OPEN, apart[row - 1, column]) - _INSERT, apart[row, column]):
            matched = bool(met[row - 1, column] - _OPEN >= apart[row - 1, column])
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
            indents.append(_indent(line))
        elif matches[index] < 0:
            parts[-1].append(line)
        else:
            gap = _Gap(reached, matches[index], tuple(tuple(part) for part in parts), tuple(indents))
            gaps.append((gap, index))
            reached, parts, indents = matches[index] + 1, [[]], []
    gaps.append((_Gap(reached, count, tuple(tuple(part) for part in parts), tuple(indents)), -1))
    return gaps


def _kept_part(gap: _Gap, lines: list[str], marks_ends: bool) -> tuple[int, int]:
    """Which of the gap's file lines stay: a range, empty where all are replaced.

    `marks_ends`: the snippet has a marker at one end of the file, so that none at the other end means it reaches it.
    """
    size, inserted = gap.last - gap.first, len(gap.parts[0])
    starts, stops = gap.first == 0, gap.last == len(lines)
    if len(gap.parts) > 1 or stops:
        if len(gap.parts) == 1 and stops and (marks_ends or (inserted and size <= inserted + 3)):
            return gap.last, gap.last
        return _after_definition(gap, lines), gap.last
    if starts and not marks_ends and not (inserted and size <= inserted + 3):
        return gap.first, gap.last
    return gap.last, gap.last


def _after_definition(gap: _Gap, lines: list[str]) -> int:
    """Where a definition that the snippet rewrites to its end ends in the file; the gap's start where it rewrites none.

    It does when its inserted lines follow inside a block, and no marker stands inside that block.
    """
    inserted = [line for line in gap.parts[0] if line.strip()]
    if not inserted or gap.first == 0:
        return gap.first
    header = gap.first - 1
    depth = _indent(inserted[-1])
    if gap.indents and gap.indents[0] >= depth:
        return gap.first
    while header >= 0 and not (lines[header].strip() and _indent(lines[header]) < depth):
        header -= 1
    if header < 0 or not _defined(lines[header]):
        return gap.first
    last = gap.first
    for index in range(gap.first, gap.last):
        if lines[index].strip():
            if _indent(lines[index]) <= _indent(lines[header]):
                break
            last = index + 1
    return last


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
                amounts.append(len(margin) - _indent(snippet[row]))
                unit = margin[:1] or unit
        amount = amounts[0] if amounts else 0
        if amount and amounts[-1] == amount and amounts.count(amount) * 2 > len(amounts):
            for row in range(start, stop):
                text = snippet[row]
                shifted[row] = unit * amount + text if amount > 0 else text[min(-amount, _indent(text)) :]
                shifted[row] = shifted[row] if text.strip() else text
        start = stop + 1
    return shifted


def _new_definitions(lines: list[str], snippet: list[str], markers: list[bool], matches: list[int]) -> list[bool]:
    """Markers, and the lines of definitions that are new: what they have in common with the file is a coincidence.

    A definition is new where the file has none of its name and little of its body was found, or found scattered.
    """
    names = {_defined(line) for line in lines}
    barred = markers[:]
    for row, line in enumerate(snippet):
        name = _defined(line)
        if name is None or name in names or barred[row]:
            continue
        stop = row + 1
        while stop < len(snippet) and (not snippet[stop].strip() or _indent(snippet[stop]) > _indent(line)):
            stop += 1
        stop += stop < len(snippet) and snippet[stop].strip()[:1] in ("}", ")")
        full = [each for each in range(row, stop) if len(snippet[each].strip()) > 2]
        found = [matches[each] for each in full if matches[each] >= 0 and _same(snippet[each], lines[matches[each]])]
        if any(markers[row:stop]):
            continue
        if len(found) * 2 < len(full) or found[-1] - found[0] > 2 * (stop - row) + 2:
            while stop < len(snippet) and not snippet[stop].strip():
                stop += 1
            while row > 0 and not snippet[row - 1].strip():
                row -= 1
            barred[row:stop] = [True] * (stop - row)
    return barred


def _margin(line: str) -> str:
    return line[: len(line) - len(line.lstrip())]


def _indent(line: str) -> int:
    return len(_margin(line))


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
