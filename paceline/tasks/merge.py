"""A candidate merge: file and snippet joined by rule, before the model writes a token, so that a draft can follow it.

The snippet's lines are aligned with the file's by one dynamic programme over both (Needleman and Wunsch 1970, with free
gaps in the file where the snippet has a marker). Then: a matched line stays, a snippet line without a match is inserted,
a file line passed over between two matched lines is deleted, one passed over at a marker is kept.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

import numpy

from paceline.errors import EditNotFound, EmptyEdit
from paceline.tasks.blocks import apply_blocks, apply_diff, has_blocks, is_diff
from paceline.tasks.snippet import is_marker

_DELETE = 0.04  # the cost of a file line passed over without a marker
_INSERT = 0.02
_DEFINITION = re.compile(
    r"^\s*(?:export\s+|default\s+|public\s+|private\s+|protected\s+|static\s+|async\s+|pub\s+|abstract\s+|override\s+)*"
    r"(def|class|function|fn|func|interface|struct|enum|impl|trait|type|module|namespace)\s+\*?([A-Za-z_$][\w$]*)"
)
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


@dataclass
class _Alignment:
    """For each snippet line the file line it matches or -1; `free[i]` says that the gap before line i is a marker's."""

    lines: list[str]
    matches: list[int]
    free: list[bool]


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
    snippet = update.strip("\n").split("\n")
    known = set(lines)
    markers = [is_marker(line) and line not in known for line in snippet]
    alignment = _align(lines, snippet, markers)
    found = [line for line, match in zip(alignment.lines, alignment.matches, strict=True) if match >= 0]
    if not any(_weight(line) >= 0.5 for line in found):
        raise EditNotFound("no line of the edit is found in the file, so there is no place to put it")
    return _build(lines, alignment, markers, file.endswith("\n"), newline)


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
        return 0.03
    if letters <= 2:
        return 0.15
    if letters <= 6:
        return 0.5
    return 1.0 + min(letters, 40) / 80


def _scores(lines: list[str], snippet: list[str], markers: list[bool]) -> numpy.ndarray:
    """[snippet, file]: what matching a snippet line with a file line is worth; negative infinity where they differ."""
    exact: dict[str, list[int]] = {}
    stripped: dict[str, list[int]] = {}
    named: dict[tuple[str, ...], list[int]] = {}
    for index, line in enumerate(lines):
        exact.setdefault(line, []).append(index)
        stripped.setdefault("".join(line.split()), []).append(index)
        if definition := _DEFINITION.match(line):
            named.setdefault(definition.groups(), []).append(index)
    counts = Counter("".join(line.split()) for line in lines)
    scores = numpy.full((len(snippet), len(lines)), -numpy.inf, dtype=numpy.float32)
    for row, line in enumerate(snippet):
        if markers[row]:
            continue
        bare = "".join(line.split())
        worth = _weight(line) / max(1, counts[bare]) ** 0.25
        if definition := _DEFINITION.match(line):
            scores[row, named.get(definition.groups(), [])] = 0.8
        scores[row, stripped.get(bare, [])] = 0.8 * worth
        scores[row, exact.get(line, [])] = worth
    return scores


def _align(lines: list[str], snippet: list[str], markers: list[bool]) -> _Alignment:
    scores = _scores(lines, snippet, markers)
    count, width = scores.shape
    ramp = _DELETE * numpy.arange(width + 1, dtype=numpy.float32)
    table = numpy.zeros((count + 1, width + 1), dtype=numpy.float32)
    for row in range(count):
        above = table[row]
        if markers[row]:
            table[row + 1] = numpy.maximum.accumulate(above)
            continue
        best = above - _INSERT
        best[1:] = numpy.maximum(best[1:], above[:-1] + scores[row])
        table[row + 1] = numpy.maximum.accumulate(best + ramp) - ramp
    return _trace(table, scores, snippet, markers)


def _trace(
    table: numpy.ndarray, scores: numpy.ndarray, snippet: list[str], markers: list[bool]
) -> _Alignment:
    """Walks back from the best end; of equal ways a match is taken before an insertion, an insertion before a skip."""
    row = len(snippet)
    column = int(table[row].argmax())
    matches = [-1] * len(snippet)
    while row > 0:
        here = table[row, column]
        if markers[row - 1]:
            column = int(table[row - 1, : column + 1].argmax())
            row -= 1
        elif column and abs(table[row - 1, column - 1] + scores[row - 1, column - 1] - here) < 1e-4:
            row, column = row - 1, column - 1
            matches[row] = column
        elif abs(table[row - 1, column] - _INSERT - here) < 1e-4:
            row -= 1
        else:
            column -= 1
    kept = [index for index in range(len(snippet)) if not markers[index]]
    free = [index > 0 and markers[index - 1] for index in kept]
    return _Alignment([snippet[index] for index in kept], [matches[index] for index in kept], free)


def _build(lines: list[str], alignment: _Alignment, markers: list[bool], ends: bool, newline: str) -> Merge:
    shifts = _shifts(lines, alignment)
    result: list[str] = []
    kept = [False] * len(lines)
    touched: list[tuple[int, int]] = []
    cursor = 0

    def keep(until: int) -> None:
        nonlocal cursor
        result.extend(lines[cursor:until])
        kept[cursor:until] = [True] * (until - cursor)
        cursor = until

    waiting: list[str] = []
    waiting_free = bool(markers and markers[0])
    for index, (line, match) in enumerate(zip(alignment.lines, alignment.matches, strict=True)):
        opens = alignment.free[index] if index else waiting_free
        if opens and index:
            cursor = _flush(result, waiting, lines, kept, touched, cursor, None, keep)
            waiting, waiting_free = [], True
        if match < 0:
            waiting.append(shifts[index] + line if shifts[index] is not None and line.strip() else line)
            continue
        first = not any(each >= 0 for each in alignment.matches[:index])
        if waiting_free or (first and not (waiting and match <= len(waiting) + 3)):
            # what comes before the inserted lines is kept; they stand right before their anchor
            keep(match)
        if waiting or match > cursor:
            touched.append((cursor, match))
        result += waiting
        waiting, waiting_free = [], False
        cursor = match
        same = "".join(line.split()) == "".join(lines[match].split())
        result.append(lines[match] if same and shifts[index] is not None else line)
        kept[match] = result[-1] == lines[match]
        if not kept[match]:
            touched.append((match, match + 1))
        cursor = match + 1
    rest = len(lines) - cursor
    if waiting:
        replaced = not markers[-1] and (rest <= len(waiting) + 3)
        end = cursor + (rest if replaced else _definition_rest(lines, alignment, cursor, markers))
        touched.append((cursor, end))
        result += waiting
        cursor = end
    elif rest and not markers[-1] and markers[0] and rest <= 10 and any(markers):
        touched.append((cursor, len(lines)))
        cursor = len(lines)
    keep(len(lines))
    text = newline.join(result) + (newline if ends and result else "")
    matched = sum(_weight(line) for line, match in zip(alignment.lines, alignment.matches, strict=True) if match >= 0)
    return Merge(text, tuple(kept), tuple(touched), min(1.0, matched / max(1.0, 2.0 * (1 + sum(markers)))))
