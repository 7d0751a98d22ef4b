"""Which line of the file each line of a snippet stands for: one dynamic programme over both.

The alignment is Needleman and Wunsch's (1970) with Gotoh's gaps (1982), which cost to open and to extend; passing over
file lines is free where the snippet has a marker. The costs below were tuned on the train split (benchmarks/merge.py).
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

import numpy

from paceline.tasks.definitions import block_end, defined

_LIKE = 0.1  # what a line is worth that stands in for a similar one, as a share of finding it
_LIKENESS = 0.7  # similarity (Dice, over parts of words) from which a line can stand in for another
_NAMED = 2.0  # what the header of a definition with the same name is worth
_BARE = 0.6  # what a line that differs in white space is worth, as a share
_BLANK = 0.2  # what a blank line is worth
_RARITY = 0.5  # how much less a line says that stands in the file often
_PASS = 0.02  # the cost of a file line passed over without a marker
_EDGE = 4.0  # the cost of a line without a match next to a marker: snippets have context there
_LEAVE = 2.5  # the cost of leaving a run of matched lines without a marker
_SHORT = 16  # snippet lines below which leaving costs less, in proportion: short ones match little
_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+|\d+|[^\w\s]")


@dataclass(frozen=True)
class Placed:
    """A snippet's lines, which of them are markers, and for each the file line it stands for, or -1."""

    snippet: list[str]
    markers: list[bool]
    matches: list[int]


def weight(line: str) -> float:
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
        worth = weight(line) / max(1, counts[bare]) ** _RARITY
        if definition := defined(line):
            scores[row, named.get(definition, [])] = _NAMED
        scores[row, stripped.get(bare, [])] = _BARE * worth
        scores[row, exact.get(line, [])] = worth
        if bare and bare not in stripped:
            if index is None:
                index = _words_index(lines)
            numpy.maximum(scores[row], _likeness(line, index) * (_LIKE * weight(line)), out=scores[row])
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
        numpy.concatenate([numpy.asarray(lists.get(word, []), dtype=numpy.intp) for word in words]),
        minlength=len(sizes),
    )
    dice = (2 * common / (sizes + len(words))).astype(numpy.float32)
    dice[dice < _LIKENESS] = -numpy.inf
    return numpy.asarray(dice)


def align(
    lines: list[str],
    snippet: list[str],
    markers: list[bool],
    barred: list[bool],
    passing: float = 1.0,
) -> list[int]:
    """For each snippet line the file line it stands for, or -1.

    Lines that are `barred` match nothing. `passing` multiplies what it costs to pass over a file line.

    `met[i, j]`: the best score of snippet lines before i and file lines before j where the last two match;
    `apart[i, j]`: where they do not, as snippet lines are inserted or file lines passed over since two did.
    """
    scores = _scores(lines, snippet, barred)
    count, width = scores.shape
    ramp = passing * _PASS * numpy.arange(width + 1, dtype=numpy.float32)
    leave = _LEAVE * min(1.0, count / _SHORT)
    met = numpy.full((count + 1, width + 1), -numpy.inf, dtype=numpy.float32)
    apart = numpy.full_like(met, -numpy.inf)
    apart[0] = 0.0
    for row in range(count):
        if markers[row]:
            met[row + 1] = numpy.maximum.accumulate(numpy.maximum(met[row], apart[row] - _EDGE))
            continue
        met[row + 1, 1:] = numpy.maximum(met[row], apart[row])[:-1] + scores[row]
        best = numpy.maximum(numpy.maximum(met[row], met[row + 1]) - leave, apart[row])
        apart[row + 1] = numpy.maximum.accumulate(best + ramp) - ramp
    return _trace(met, apart, markers, leave)


def _trace(met: numpy.ndarray, apart: numpy.ndarray, markers: list[bool], leave: float) -> list[int]:
    """Walks back from the best end; of equal ways an insertion is taken before a file line passed over."""
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
        elif _close(met[row, column] - leave, apart[row, column]):
            matched = True
        elif _close(max(met[row - 1, column] - leave, apart[row - 1, column]), apart[row, column]):
            matched = bool(met[row - 1, column] - leave >= apart[row - 1, column])
            row -= 1
        else:
            column -= 1
    return matches


def _close(left: float, right: float) -> bool:
    return abs(left - right) < 1e-3
