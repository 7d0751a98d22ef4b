"""Which line of the file each line of a snippet stands for: one dynamic programme over both.

The alignment is Needleman and Wunsch's (1970) with Gotoh's gaps (1982), which cost to open and to extend; passing over
file lines is free where the snippet has a marker. The costs below were tuned on the train split (benchmarks/merge.py).
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, islice, pairwise

import numpy

from paceline.tasks.definitions import Code, indent, is_closer
from paceline.tasks.names import Name, key_of

_LIKE = 0.1  # what a line is worth that stands in for a similar one, as a share of finding it
_LIKENESS = 0.7  # similarity (Dice, over parts of words) from which a line can stand in for another
_NAMED = 2.0  # what the header of a definition with the same name is worth
_BARE = 0.6  # what a line that differs in white space is worth, as a share
_BLANK = 0.2  # what a blank line is worth
_RARITY = 0.5  # how much less a line says that stands in the file often
_PASS = 0.02  # the cost of a file line passed over without a marker
_EDGE = 4.0  # the cost of a line without a match next to a marker, or at an end of the snippet: it has context there
_SKIP = 0.05  # the cost of a blank line without a match among matched ones
_LEAVE = 2.5  # the cost of leaving a run of matched lines without a marker
_COMMON = 2000  # lines that hold a word, beyond which it does not tell which line is meant
_SHORT = 16  # snippet lines below which leaving costs less, in proportion: short ones match little
_TOGETHER = 1 << 20  # scores from which alignments at several costs are made one after the other, to take less memory
_WHITE = str.maketrans("", "", " \t\r\n\x0b\x0c")
_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+|\d+|[^\w\s]")


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


class File(Code):
    """A file's rows, with what snippets are matched by."""

    def __init__(self, rows: list[str]) -> None:
        super().__init__(rows)
        self._bare: dict[str, list[int]] = {}  # where rows stand, by what they are without white space
        self._keys: dict[str, list[int]] = {}  # where keys are set
        for number, row in enumerate(rows):
            self._bare.setdefault(bare(row), []).append(number)
            if key := key_of(row):
                self._keys.setdefault(key, []).append(number)
        self._matched: dict[tuple[str, Name | None], tuple[numpy.ndarray, numpy.ndarray]] = {}
        self._holding: defaultdict[str, list[int]] = defaultdict(list)  # the rows that hold a part of a word
        self._parts: list[set[str]] = []  # the different parts of words in each row

    def scores(self, snippet: Code, barred: list[bool]) -> numpy.ndarray:
        """[snippet, file]: what matching a snippet row with a file row is worth; negative infinity where they differ.

        Rows that are `barred` match nothing.
        """
        scores = numpy.full((len(snippet.rows), len(self.rows)), -numpy.inf, dtype=numpy.float32)
        for row, line in enumerate(snippet.rows):
            if not barred[row]:
                rows, worth = self._matches(line, snippet.names[row])
                scores[row, rows] = worth
        for row, (first, last) in enumerate(self.scopes(snippet, barred)):
            scores[row, :first] = -numpy.inf
            scores[row, last:] = -numpy.inf
        return scores

    def scopes(self, snippet: Code, barred: list[bool]) -> list[tuple[int, int]]:
        """For each snippet row the file rows that it can stand for: those of the definition that the snippet shows it in.

        Only a definition of which the file, or the one around it, has one of that name confines what is in it. Beyond a
        marker inside it, which may also leave out its end, it confines only definitions that it has.
        """
        everywhere = 0, len(self.rows)
        around: list[tuple[int, int, int]] = []  # indents of headers, and their blocks in the file
        cut = 0  # how many of `around` began before the last marker
        scopes: list[tuple[int, int]] = []
        for row, line in enumerate(snippet.rows):
            depth = indent(line)
            closes = is_closer(line) and not barred[row]
            while line.strip() and around and depth < around[-1][0] + (not closes):
                around.pop()
            cut = len(around) if barred[row] else min(cut, len(around))
            first, last = around[-1][1:] if len(around) > cut else everywhere
            name = None if barred[row] else snippet.names[row]
            places = self.headers.get(name or ("", ""), [])
            inside = [place for place in places if not around or around[-1][1] < place < around[-1][2]]
            if len(around) <= cut:
                inside = inside or places
            if len(inside) == 1:
                first, last = inside[0], self.block_end(inside[0])
                around.append((depth, first, last))
                for above in range(snippet.block_start(row), row):
                    scopes[above] = (self.block_start(first), first)
            elif inside and around:
                first, last = around[-1][1:]
            scopes.append((first, last))
        return scopes

    def _matches(self, line: str, name: Name | None) -> tuple[numpy.ndarray, numpy.ndarray]:
        """Where a row is found as it is, with other white space, or as one that it replaces, and what that is worth."""
        if (line, name) not in self._matched:
            found = dict.fromkeys(self.headers.get(name or ("", ""), []), _NAMED)
            text = bare(line)
            if rows := self._bare.get(text):
                worth = weight(line) / len(rows) ** _RARITY
                found |= {row: worth if self.rows[row] == line else _BARE * worth for row in rows}
            elif text:
                worth = _LIKE * weight(line)
                for row, likeness in self._like(line).items():
                    if name is None and self.names[row] is None:
                        found[row] = max(found.get(row, 0.0), float(numpy.float32(likeness) * numpy.float32(worth)))
                rows = self._keys.get(key_of(line) or "", [])
                for row in rows if name is None else ():
                    found[row] = max(found.get(row, 0.0), _LIKE * weight(line) / len(rows) ** _RARITY)
            self._matched[line, name] = numpy.array(list(found), numpy.intp), numpy.array(list(found.values()))
        return self._matched[line, name]

    def _like(self, line: str) -> dict[int, float]:
        """How like a line those of the file are that are like it. A word that very many lines hold finds none of them."""
        if not self._parts:
            self._index()
        words = _words(line)
        telling = [rows for word in words if len(rows := self._holding.get(word, ())) <= _COMMON]
        found = {}
        for row in set(chain.from_iterable(telling)):
            likeness = 2 * len(words & self._parts[row]) / (len(self._parts[row]) + len(words))
            if likeness >= _LIKENESS:
                found[row] = likeness
        return found

    def _index(self) -> None:
        for line in self.rows:
            words = _words(line)
            for word in words:
                self._holding[word].append(len(self._parts))
            self._parts.append(words)


def parts_of(markers: Sequence[bool]) -> list[range]:
    """The runs of rows between markers."""
    edges = [-1, *(row for row, marked in enumerate(markers) if marked), len(markers)]
    return [range(first + 1, last) for first, last in pairwise(edges) if last > first + 1]


@dataclass(frozen=True)
class Placed:
    """A snippet in a file: which of its rows are markers, and for each row the file row it stands for, or -1.

    `doubts` are what speaks against it, a sentence each, `unforced` the matches where a part that is put in whole replaces
    rows of the file.
    """

    file: File
    snippet: Code
    markers: list[bool]
    matches: list[int]
    doubts: tuple[str, ...] = ()
    unforced: list[int] | None = None

    def kept(self, row: int) -> bool:
        """Whether a snippet row is the file's as it is.

        White space at its end counts only where nothing else changes between the markers around it: it then is the edit.
        """
        match = self.matches[row]
        if match < 0 or self.snippet.rows[row].rstrip() != self.file.rows[match].rstrip():
            return False
        return self.snippet.rows[row] == self.file.rows[match] or row not in self._trimmed

    def tells(self, row: int) -> bool:
        """Whether a snippet row has a letter or a digit."""
        return any(map(str.isalnum, self.snippet.rows[row]))

    @cached_property
    def _trimmed(self) -> set[int]:
        """The rows of parts that change nothing but white space at ends of rows."""
        rows: set[int] = set()
        for part in parts_of(self.markers):
            found = [self.matches[row] for row in part]
            together = bool(found) and -1 not in found and found[-1] - found[0] + 1 == len(found)
            if together and all(
                self.snippet.rows[row].rstrip() == self.file.rows[self.matches[row]].rstrip() for row in part
            ):
                rows |= set(part)
        return rows

    @cached_property
    def scopes(self) -> list[tuple[int, int]]:
        """For each snippet row the file rows that it can stand for."""
        return self.file.scopes(self.snippet, self.markers)

    def bounds(self, part: range) -> tuple[int, int]:
        """The file rows among which a part may stand: between the rows found before and after it, and in its scope."""
        first = max((match for match in self.matches[: part.start] if match >= 0), default=-1) + 1
        last = min((match for match in self.matches[part.stop :] if match >= 0), default=len(self.file.rows))
        start, stop = next((self.scopes[row] for row in part if self.snippet.rows[row].strip()), (first, last))
        if max(first, start) < min(last, stop):
            first, last = max(first, start), min(last, stop)
        return first, max(first, last)


def bare(line: str) -> str:
    """A line without spaces, tabs and line ends; other characters that show nothing stay."""
    return line.translate(_WHITE)


def _words(line: str) -> set[str]:
    """The parts of words, and the signs, in a line."""
    return set(_WORD.findall(line))


def align(
    scores: numpy.ndarray, markers: Sequence[bool], blank: Sequence[bool], passing: Sequence[float]
) -> list[list[int]]:
    """For each snippet line the file line it stands for, or -1; so for each factor on the cost to pass over a file line.

    `met[i, k, j]`: at factor k the best score of snippet lines before i and file lines before j where the last two
    match; `apart[i, k, j]`: where they do not, as snippet lines are inserted or file lines passed over since two did.
    `blank` lines of the snippet may go unmatched without leaving a run.
    """
    if len(passing) > 1 and scores.size > _TOGETHER:
        return [align(scores, markers, blank, (factor,))[0] for factor in passing]
    count, width = scores.shape
    costs = numpy.array([[factor * _PASS] for factor in passing], dtype=numpy.float32)
    ramp = costs * numpy.arange(width + 1, dtype=numpy.float32)
    leave = _LEAVE * min(1.0, count / _SHORT)
    met = numpy.full((count + 1, *ramp.shape), -numpy.inf, dtype=numpy.float32)
    apart = numpy.full_like(met, -numpy.inf)
    apart[0] = -_EDGE
    met[0] = 0.0
    for row, (above, beside, below) in enumerate(zip(met, apart, met[1:], strict=False)):
        if markers[row]:
            numpy.maximum.accumulate(numpy.maximum(above, beside - _EDGE), axis=1, out=below)
            continue
        numpy.add(numpy.maximum(above, beside)[:, :-1], scores[row], out=below[:, 1:])
        if blank[row]:
            numpy.maximum(below, above - _SKIP, out=below)
        best = numpy.maximum(above, below)
        best -= leave
        numpy.maximum(best, beside, out=best)
        best += ramp
        numpy.maximum.accumulate(best, axis=1, out=best)
        numpy.subtract(best, ramp, out=apart[row + 1])
    return [_trace(met[:, factor], apart[:, factor], markers, blank, leave) for factor in range(len(passing))]


def _trace(
    met: numpy.ndarray, apart: numpy.ndarray, markers: Sequence[bool], blank: Sequence[bool], leave: float
) -> list[int]:
    """Walks back from the best end; of equal ways an insertion is taken before a file line passed over."""
    row = len(markers)
    last = numpy.maximum(met[row], apart[row] - _EDGE)
    column = int(last.argmax())
    if not markers[-1]:  # a snippet that ends without a marker ends, of equal places, where the file does
        column = int(numpy.flatnonzero(last >= last[column] - 1e-3)[-1])
    matches = [-1] * row
    matched = bool(met[row, column] >= apart[row, column] - _EDGE)
    while row > 0:
        if markers[row - 1]:
            row -= 1
            column = int(numpy.maximum(met[row], apart[row] - _EDGE)[: column + 1].argmax())
            matched = bool(met[row, column] >= apart[row, column] - _EDGE)
        elif matched and blank[row - 1] and _close(met[row - 1, column] - _SKIP, met[row, column]):
            row -= 1
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
