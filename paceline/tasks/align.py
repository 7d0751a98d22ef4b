"""Which line of the file each line of a snippet stands for: one dynamic programme over both.

The alignment is Needleman and Wunsch's (1970) with Gotoh's gaps (1982), which cost to open and to extend; passing over
file lines is free where the snippet has a marker. The costs below were tuned on the train split (benchmarks/merge.py).
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, islice

import numpy

from paceline.tasks.definitions import Name, block_end, defined, may_define

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
_TOGETHER = 1 << 20  # scores from which alignments at several costs are made one after the other, to take less memory
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
    if not text:
        return _BLANK
    letters = len(list(islice(filter(str.isalnum, text), 40)))
    if letters <= 2:
        return 0.15
    if letters <= 6:
        return 0.5
    return 1.0 + letters / 80


class File:
    """A file's lines, with what snippets are matched by.

    `names` says of each line what it begins to define, `headers` where each definition begins.
    """

    def __init__(self, lines: list[str]) -> None:
        self.lines = lines
        self.names: dict[str, Name | None] = dict.fromkeys(lines)
        self.headers: dict[Name, list[int]] = {}
        self._bare: dict[str, list[int]] = {}  # where lines stand, by what they are without white space
        for row, line in enumerate(lines):
            words = line.split()
            self._bare.setdefault("".join(words), []).append(row)
            if may_define(words) and (name := defined(line)):
                self.names[line] = name
                self.headers.setdefault(name, []).append(row)
        self._matched: dict[str, tuple[numpy.ndarray, numpy.ndarray]] = {}
        self._holding: defaultdict[str, list[int]] = defaultdict(list)  # the rows that hold a part of a word
        self._sizes: list[int] = []  # how many different parts each line has

    def scores(self, snippet: list[str], barred: list[bool]) -> numpy.ndarray:
        """[snippet, file]: what matching a snippet line with a file line is worth; negative infinity where they differ.

        Lines that are `barred` match nothing.
        """
        scores = numpy.full((len(snippet), len(self.lines)), -numpy.inf, dtype=numpy.float32)
        for row, line in enumerate(snippet):
            if not barred[row]:
                rows, worth = self._matches(line)
                scores[row, rows] = worth
        self._confine(scores, snippet, barred)
        return scores

    def _confine(self, scores: numpy.ndarray, snippet: list[str], barred: list[bool]) -> None:
        """A definition, up to a marker in it, of which the file has one of that name is matched with that one only."""
        for row, line in enumerate(snippet):
            places = self.headers.get(defined(line) or ("", ""), [])
            if len(places) == 1:
                stop = block_end(snippet, row)
                stop = next((each for each in range(row, stop) if barred[each]), stop)
                scores[row:stop, : places[0]] = -numpy.inf
                scores[row:stop, block_end(self.lines, places[0]) :] = -numpy.inf

    def _matches(self, line: str) -> tuple[numpy.ndarray, numpy.ndarray]:
        """Where a line is found as it is, with other white space, or as one that it replaces, and what that is worth."""
        if line not in self._matched:
            found = dict.fromkeys(self.headers.get(defined(line) or ("", ""), []), _NAMED)
            bare = "".join(line.split())
            if rows := self._bare.get(bare):
                worth = weight(line) / len(rows) ** _RARITY
                found |= {row: worth if self.lines[row] == line else _BARE * worth for row in rows}
            elif bare:
                worth = _LIKE * weight(line)
                for row, likeness in self._like(line).items():
                    found[row] = max(found.get(row, 0.0), float(numpy.float32(likeness) * numpy.float32(worth)))
            self._matched[line] = numpy.array(list(found), numpy.intp), numpy.array(list(found.values()))
        return self._matched[line]

    def _like(self, line: str) -> dict[int, float]:
        """How like a line those of the file are that are like it."""
        if not self._sizes:
            self._index()
        words = _words(line)
        found = {}
        for row, common in Counter(chain.from_iterable(self._holding.get(word, ()) for word in words)).items():
            likeness = 2 * common / (self._sizes[row] + len(words))
            if likeness >= _LIKENESS:
                found[row] = likeness
        return found

    def _index(self) -> None:
        for line in self.lines:
            words = _words(line)
            for word in words:
                self._holding[word].append(len(self._sizes))
            self._sizes.append(len(words))


def _words(line: str) -> set[str]:
    """The parts of words, and the signs, in a line."""
    return set(_WORD.findall(line))


def align(scores: numpy.ndarray, markers: list[bool], passing: Sequence[float]) -> list[list[int]]:
    """For each snippet line the file line it stands for, or -1; so for each factor on the cost to pass over a file line.

    `met[i, k, j]`: at factor k the best score of snippet lines before i and file lines before j where the last two
    match; `apart[i, k, j]`: where they do not, as snippet lines are inserted or file lines passed over since two did.
    """
    if len(passing) > 1 and scores.size > _TOGETHER:
        return [align(scores, markers, (factor,))[0] for factor in passing]
    count, width = scores.shape
    costs = numpy.array([[factor * _PASS] for factor in passing], dtype=numpy.float32)
    ramp = costs * numpy.arange(width + 1, dtype=numpy.float32)
    leave = _LEAVE * min(1.0, count / _SHORT)
    met = numpy.full((count + 1, *ramp.shape), -numpy.inf, dtype=numpy.float32)
    apart = numpy.full_like(met, -numpy.inf)
    apart[0] = 0.0
    for row, (above, beside, below) in enumerate(zip(met, apart, met[1:], strict=False)):
        if markers[row]:
            numpy.maximum.accumulate(numpy.maximum(above, beside - _EDGE), axis=1, out=below)
            continue
        numpy.add(numpy.maximum(above, beside)[:, :-1], scores[row], out=below[:, 1:])
        best = numpy.maximum(above, below)
        best -= leave
        numpy.maximum(best, beside, out=best)
        best += ramp
        numpy.maximum.accumulate(best, axis=1, out=best)
        numpy.subtract(best, ramp, out=apart[row + 1])
    return [_trace(met[:, factor], apart[:, factor], markers, leave) for factor in range(len(passing))]


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
