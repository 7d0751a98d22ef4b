"""Sequence alignment of a snippet with a file: which file row each snippet row stands for.

The algorithm is Needleman and Wunsch's global alignment (1970) with Gotoh's affine gaps (1982): opening a gap and extending
it have costs of their own. Passing over file rows is free where the snippet has a marker. Scores and costs share one
arbitrary unit: an exact match of a line of 40 letters that the file has once is worth 1.5. Unless a comment says what a
constant bounds, its value was tuned on the train split of `python -m benchmarks.merge`.
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
from paceline.tasks.names import Name, assigned_key

_SIMILAR_SHARE = 0.1  # score of matching a merely similar row, as a share of the score of an exact match
_MIN_SIMILARITY = 0.7  # Dice coefficient over word parts from which two rows count as similar
_SAME_NAME_WEIGHT = 2.0  # score of matching two headers that define the same name
_WHITE_SPACE_SHARE = 0.6  # score of a row that differs in white space only, as a share of an exact match
_BLANK_WEIGHT = 0.2  # score of matching a blank row
_FREQUENCY_POWER = 0.5  # the score of a row that the file has n times is divided by n to this power
_PASS_COST = 0.02  # cost of each file row passed over without a marker
# cost of an unmatched row beside a marker or at a snippet's end, where a snippet normally shows context
_EDGE_COST = 4.0
_BLANK_COST = 0.05  # cost of an unmatched blank row among matched ones
_LEAVE_COST = 2.5  # gap-opening cost: leaving a run of matched rows without a marker
_MAX_ROWS_OF_A_WORD = 2000  # bounds time: a word part that more rows hold than this is not used to find similar rows
# snippet rows below which the gap-opening cost shrinks in proportion, as short snippets match little
_SHORT_SNIPPET = 16
_MAX_SCORES_AT_ONCE = 1 << 20  # bounds memory: with more scores, alignments at several costs run one after the other
_WHITE_SPACE = str.maketrans("", "", " \t\r\n\x0b\x0c")
_WORD_PART = re.compile(r"[A-Z]?[a-z]+|[A-Z]+|\d+|[^\w\s]")


def line_weight(line: str) -> float:
    """The evidence that a match of this line gives for its place: 0.15 for a bracket, 1.0 to 1.5 for ordinary code."""
    text = line.strip()
    if not text:
        return _BLANK_WEIGHT
    letters = len(list(islice(filter(str.isalnum, text), 40)))
    if letters <= 2:
        return 0.15
    if letters <= 6:
        return 0.5
    return 1.0 + letters / 80


class IndexedFile(Code):
    """A file's rows, with the indexes by which snippet rows are matched with them."""

    def __init__(self, rows: list[str]) -> None:
        super().__init__(rows)
        self._rows_by_text: dict[str, list[int]] = {}  # row numbers by the row's text without white space
        self._rows_by_key: dict[str, list[int]] = {}  # row numbers by the key that the row assigns
        for number, row in enumerate(rows):
            self._rows_by_text.setdefault(without_white_space(row), []).append(number)
            if key := assigned_key(row):
                self._rows_by_key.setdefault(key, []).append(number)
        self._match_cache: dict[tuple[str, Name | None], tuple[numpy.ndarray, numpy.ndarray]] = {}
        self._rows_with_part: defaultdict[str, list[int]] = defaultdict(list)  # row numbers by word part
        self._parts: list[set[str]] = []  # the distinct word parts of each row

    def scores(self, snippet: Code, unmatchable: list[bool]) -> numpy.ndarray:
        """Match scores, [snippet rows, file rows]; negative infinity where two rows cannot match.

        Snippet rows that are `unmatchable` match no file row.
        """
        scores = numpy.full((len(snippet.rows), len(self.rows)), -numpy.inf, dtype=numpy.float32)
        for row, line in enumerate(snippet.rows):
            if not unmatchable[row]:
                rows, worth = self._matches(line, snippet.names[row])
                scores[row, rows] = worth
        for row, (first, last) in enumerate(self.scopes(snippet, unmatchable)):
            scores[row, :first] = -numpy.inf
            scores[row, last:] = -numpy.inf
        return scores

    def scopes(self, snippet: Code, unmatchable: list[bool]) -> list[tuple[int, int]]:
        """For each snippet row the range of file rows that it may match: the block of the definition around it.

        A definition limits the rows inside it only where its name is unique in the file, or in the definition around it.
        After a marker inside a definition, which may stand for the definition's end too, only headers of definitions that
        the file has in that block are limited to it.
        """
        everywhere = 0, len(self.rows)
        around: list[
            tuple[int, int, int]
        ] = []  # for each open definition: its header's indent, and its block in the file
        cut = 0  # how many of `around` began before the last marker
        scopes: list[tuple[int, int]] = []
        for row, line in enumerate(snippet.rows):
            depth = indent(line)
            closes = is_closer(line) and not unmatchable[row]
            while line.strip() and around and depth < around[-1][0] + (not closes):
                around.pop()
            cut = len(around) if unmatchable[row] else min(cut, len(around))
            first, last = around[-1][1:] if len(around) > cut else everywhere
            name = None if unmatchable[row] else snippet.names[row]
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
        """The file rows that a snippet row may match, and the scores: exactly, but for white space, or as a row it replaces."""
        if (line, name) not in self._match_cache:
            found = dict.fromkeys(self.headers.get(name or ("", ""), []), _SAME_NAME_WEIGHT)
            text = without_white_space(line)
            if rows := self._rows_by_text.get(text):
                worth = line_weight(line) / len(rows) ** _FREQUENCY_POWER
                found |= {row: worth if self.rows[row] == line else _WHITE_SPACE_SHARE * worth for row in rows}
            elif text:
                worth = _SIMILAR_SHARE * line_weight(line)
                for row, similarity in self._similar_rows(line).items():
                    if name is None and self.names[row] is None:
                        found[row] = max(found.get(row, 0.0), float(numpy.float32(similarity) * numpy.float32(worth)))
                rows = self._rows_by_key.get(assigned_key(line) or "", [])
                for row in rows if name is None else ():
                    found[row] = max(
                        found.get(row, 0.0), _SIMILAR_SHARE * line_weight(line) / len(rows) ** _FREQUENCY_POWER
                    )
            self._match_cache[line, name] = numpy.array(list(found), numpy.intp), numpy.array(list(found.values()))
        return self._match_cache[line, name]

    def _similar_rows(self, line: str) -> dict[int, float]:
        """Similar file rows and their similarity (Dice). Word parts that very many rows hold are not looked up."""
        if not self._parts:
            self._index_word_parts()
        words = _word_parts(line)
        rows_of_rare_words = [
            rows for word in words if len(rows := self._rows_with_part.get(word, ())) <= _MAX_ROWS_OF_A_WORD
        ]
        found = {}
        for row in set(chain.from_iterable(rows_of_rare_words)):
            similarity = 2 * len(words & self._parts[row]) / (len(self._parts[row]) + len(words))
            if similarity >= _MIN_SIMILARITY:
                found[row] = similarity
        return found

    def _index_word_parts(self) -> None:
        """Fills the index of word parts, on first use."""
        for line in self.rows:
            words = _word_parts(line)
            for word in words:
                self._rows_with_part[word].append(len(self._parts))
            self._parts.append(words)


def parts_between_markers(markers: Sequence[bool]) -> list[range]:
    """The ranges of rows between markers, without empty ones."""
    edges = [-1, *(row for row, marked in enumerate(markers) if marked), len(markers)]
    return [range(first + 1, last) for first, last in pairwise(edges) if last > first + 1]


@dataclass(frozen=True)
class Placement:
    """A snippet placed in a file: which snippet rows are markers, and for each the file row that it matches, or -1.

    `warnings` say why the placement may be wrong, a sentence each. `matches_before_insertion` is the alignment before parts
    were forced to be inserted whole: there such a part replaces rows of the file.
    """

    file: IndexedFile
    snippet: Code
    markers: list[bool]
    matches: list[int]
    warnings: tuple[str, ...] = ()
    matches_before_insertion: list[int] | None = None

    def is_unchanged(self, row: int) -> bool:
        """Whether a snippet row equals the file row that it matches.

        Trailing white space is ignored, unless nothing else changes between the markers around the row: it then is the edit.
        """
        match = self.matches[row]
        if match < 0 or self.snippet.rows[row].rstrip() != self.file.rows[match].rstrip():
            return False
        return self.snippet.rows[row] == self.file.rows[match] or row not in self._trailing_space_rows

    def has_word_character(self, row: int) -> bool:
        """Whether a snippet row has a letter or a digit."""
        return any(map(str.isalnum, self.snippet.rows[row]))

    @cached_property
    def _trailing_space_rows(self) -> set[int]:
        """The rows of parts that change nothing but trailing white space."""
        rows: set[int] = set()
        for part in parts_between_markers(self.markers):
            found = [self.matches[row] for row in part]
            together = bool(found) and -1 not in found and found[-1] - found[0] + 1 == len(found)
            if together and all(
                self.snippet.rows[row].rstrip() == self.file.rows[self.matches[row]].rstrip() for row in part
            ):
                rows |= set(part)
        return rows

    @cached_property
    def scopes(self) -> list[tuple[int, int]]:
        """`IndexedFile.scopes` of the snippet."""
        return self.file.scopes(self.snippet, self.markers)

    def bounds(self, part: range) -> tuple[int, int]:
        """The range of file rows where a part may stand: between the matches before and after it, and in its scope."""
        first = max((match for match in self.matches[: part.start] if match >= 0), default=-1) + 1
        last = min((match for match in self.matches[part.stop :] if match >= 0), default=len(self.file.rows))
        start, stop = next((self.scopes[row] for row in part if self.snippet.rows[row].strip()), (first, last))
        if max(first, start) < min(last, stop):
            first, last = max(first, start), min(last, stop)
        return first, max(first, last)


def without_white_space(line: str) -> str:
    """A line without spaces, tabs and line ends. Other invisible characters stay."""
    return line.translate(_WHITE_SPACE)


def _word_parts(line: str) -> set[str]:
    """The distinct parts of words (as in camelCase) and signs of a line."""
    return set(_WORD_PART.findall(line))


def align(
    scores: numpy.ndarray, markers: Sequence[bool], blank: Sequence[bool], passing: Sequence[float]
) -> list[list[int]]:
    """The best alignment for each factor of `passing`: for each snippet row the file row that it matches, or -1.

    `passing` holds factors on the cost of passing over a file row. `blank` rows may go unmatched without opening a gap.
    `matched[i, k, j]` is, at factor k, the best score of the first i snippet rows and the first j file rows whose last two
    rows match; `unmatched[i, k, j]` is the best score inside a gap, where snippet rows have been inserted or file rows
    passed over since the last match.
    """
    if len(passing) > 1 and scores.size > _MAX_SCORES_AT_ONCE:
        return [align(scores, markers, blank, (factor,))[0] for factor in passing]
    count, width = scores.shape
    costs = numpy.array([[factor * _PASS_COST] for factor in passing], dtype=numpy.float32)
    ramp = costs * numpy.arange(width + 1, dtype=numpy.float32)
    leave = _LEAVE_COST * min(1.0, count / _SHORT_SNIPPET)
    matched = numpy.full((count + 1, *ramp.shape), -numpy.inf, dtype=numpy.float32)
    unmatched = numpy.full_like(matched, -numpy.inf)
    unmatched[0] = -_EDGE_COST
    matched[0] = 0.0
    for row, (above, beside, below) in enumerate(zip(matched, unmatched, matched[1:], strict=False)):
        if markers[row]:
            numpy.maximum.accumulate(numpy.maximum(above, beside - _EDGE_COST), axis=1, out=below)
            continue
        numpy.add(numpy.maximum(above, beside)[:, :-1], scores[row], out=below[:, 1:])
        if blank[row]:
            numpy.maximum(below, above - _BLANK_COST, out=below)
        best = numpy.maximum(above, below)
        best -= leave
        numpy.maximum(best, beside, out=best)
        best += ramp
        numpy.maximum.accumulate(best, axis=1, out=best)
        numpy.subtract(best, ramp, out=unmatched[row + 1])
    return [_trace(matched[:, factor], unmatched[:, factor], markers, blank, leave) for factor in range(len(passing))]


def _trace(
    matched: numpy.ndarray, unmatched: numpy.ndarray, markers: Sequence[bool], blank: Sequence[bool], leave: float
) -> list[int]:
    """Traces the best alignment back from its end. Of equal ways it takes an insertion before a file row passed over."""
    row = len(markers)
    last = numpy.maximum(matched[row], unmatched[row] - _EDGE_COST)
    column = int(last.argmax())
    if not markers[-1]:  # of equally good ends, a snippet without a marker at its end takes the file's
        column = int(numpy.flatnonzero(last >= last[column] - 1e-3)[-1])
    matches = [-1] * row
    in_match = bool(matched[row, column] >= unmatched[row, column] - _EDGE_COST)
    while row > 0:
        if markers[row - 1]:
            row -= 1
            column = int(numpy.maximum(matched[row], unmatched[row] - _EDGE_COST)[: column + 1].argmax())
            in_match = bool(matched[row, column] >= unmatched[row, column] - _EDGE_COST)
        elif (
            in_match and blank[row - 1] and _nearly_equal(matched[row - 1, column] - _BLANK_COST, matched[row, column])
        ):
            row -= 1
        elif in_match:
            row, column = row - 1, column - 1
            matches[row] = column
            in_match = bool(matched[row, column] >= unmatched[row, column])
        elif _nearly_equal(matched[row, column] - leave, unmatched[row, column]):
            in_match = True
        elif _nearly_equal(max(matched[row - 1, column] - leave, unmatched[row - 1, column]), unmatched[row, column]):
            in_match = bool(matched[row - 1, column] - leave >= unmatched[row - 1, column])
            row -= 1
        else:
            column -= 1
    return matches


def _nearly_equal(left: float, right: float) -> bool:
    return abs(left - right) < 1e-3
