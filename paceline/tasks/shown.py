"""Does an edit show that a line of the file goes? Judged by the texts of file, edit and result alone.

A line may go where the edit has a definition or a key of the same name in its place, where the edit has the lines around
it as neighbours, where a line like it comes in its place, or where the instruction names it. How the result was made is
not asked.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import lru_cache

from paceline.tasks.align import bare
from paceline.tasks.definitions import Code
from paceline.tasks.names import LEADS, key_of
from paceline.tasks.runs import runs

_MOST = 3  # reasons worth telling
_SOME = 3  # rows that go with nothing in their place for which any neighbours are enough
_TIMES = 4  # rows that may go for one that comes, where a definition is rewritten
_DECORATORS = 50  # rows that decorators and comments above a definition may take
_NEAR = 4  # file rows on either side among which a row must be the only one of its like
_ALIKE = 0.6  # share of words (Dice) from which a line stands in for another
_TYPOGRAPHIC = str.maketrans(dict.fromkeys("\u200b\u200c\u200d\u2060\ufeff\u00ad", "") | {
    "\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"', "\u2013": "-", "\u2014": "-", "\u2212": "-",
})  # fmt: skip
_WORD = re.compile(r"\w+")
_REMOVAL = re.compile(
    r"\b(?:(?:remov|delet|eliminat|inlin|renam|mov|replac)(?:e[sd]?|ing)|(?:drop|strip)(?:s|ped|ping)?|get(?:ting)? rid"
    r"|(?:convert|turn)(?:s|ed|ing)?)\b([^.;\n]*)",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class _Change:
    """File rows `first:last` that are not in the result, and result rows `start:stop` in their place."""

    first: int
    last: int
    start: int
    stop: int


def unshown_deletions(
    file: Code, result: Sequence[str], snippet: Code, markers: Sequence[bool], removed: Collection[str] = ()
) -> list[str]:
    """A sentence for each run of lines that go without the edit showing it, at most a few.

    `removed` are names that the instruction says go.
    """
    wanted = Code([row.rstrip() for row in result])
    rows = [row.rstrip() for row in file.rows]
    parts = _parts(snippet, markers)
    left = Counter(wanted.rows)
    left.subtract(rows)
    counts = Counter(map(bare, rows))
    reasons = []
    for change in _changes(rows, wanted.rows):
        # a row that stands elsewhere in the result as often as in the file has moved
        lost = [row for row in range(change.first, change.last) if rows[row].strip() and left[rows[row]] < 0]
        if not lost:
            continue
        evidence = _Evidence(file, rows, counts, wanted, change, snippet, parts, removed)
        if gone := [row for row in lost if not evidence.covers(row)]:
            where = f"line {gone[0] + 1}" if len(gone) == 1 else f"lines {gone[0] + 1} to {gone[-1] + 1}"
            verb = "goes" if len(gone) == 1 else "go"
            reasons.append(f"{where} of the file {verb}, and the edit does not show it: {rows[gone[0]].strip()!r}")
        put = {_plain(row): row for row in wanted.rows[change.start : change.stop]}
        for row in lost:
            if (new := put.get(_plain(rows[row]))) is not None and bare(new) != bare(rows[row]):
                reasons.append(
                    f"line {row + 1} of the file changes only in its quotes, spaces or accents: {rows[row].strip()!r}"
                )
    return reasons[:_MOST]


def named_for_removal(instruction: str) -> set[str]:
    """The words of an instruction that follow, in their sentence, one that asks to remove something."""
    return {word for found in _REMOVAL.finditer(instruction) for word in _WORD.findall(found[1])}


def _changes(rows: list[str], result: list[str]) -> list[_Change]:
    changes = []
    reached = put = 0
    for start, other, size in [*runs(rows, result), (len(rows), len(result), 0)]:
        if start > reached:
            changes.append(_Change(reached, start, put, other))
        reached, put = start + size, other + size
    return changes


def _parts(snippet: Code, markers: Sequence[bool]) -> list[list[str]]:
    """The rows of each part between markers that are not blank, without white space."""
    parts: list[list[str]] = [[]]
    for row, marked in zip(snippet.rows, markers, strict=True):
        if marked:
            parts.append([])
        elif row.strip():
            parts[-1].append(bare(row))
    return parts


class _Evidence:
    """What an edit shows about one change."""

    def __init__(
        self,
        file: Code,
        rows: list[str],
        counts: Counter[str],
        result: Code,
        change: _Change,
        snippet: Code,
        parts: list[list[str]],
        removed: Collection[str],
    ) -> None:
        self.file, self.rows, self.change, self.snippet, self.removed = file, rows, change, snippet, removed
        self.put = [row for row in result.rows[change.start : change.stop] if row.strip()]
        self.keys = {key for row in self.put if (key := key_of(row))}
        self.put_names = {name for name in result.names[change.start : change.stop] if name}
        self.named = {name for name in snippet.names if name}
        above = next((row for row in range(change.start - 1, -1, -1) if result.rows[row].strip()), None)
        below = next((row for row in range(change.stop, len(result.rows)) if result.rows[row].strip()), None)
        middle = [bare(row) for row in self.put]
        top = [] if above is None else [bare(result.rows[above])]
        bottom = [] if below is None else [bare(result.rows[below])]
        # the file's beginning, or end, is a neighbour that only the snippet's own can show
        shown = [
            part for number, part in enumerate(parts) if (top or number == 0) and (bottom or number == len(parts) - 1)
        ]
        self.neighbours = any(_holds(part, top + middle + bottom, not top, not bottom) for part in shown)
        self.firm = any(_firm(part, top + middle + bottom, bool(top), bool(bottom), counts) for part in shown)
        ends = [top + middle] * bool(top) + [middle + bottom] * bool(bottom)
        self.beside = self.neighbours or any(_holds(part, end) for part in parts for end in ends)

    def covers(self, row: int) -> bool:
        """Whether the edit shows that a file row goes."""
        name = self.file.names[row]
        if name is not None:
            return name in self.named or self._instructed(row) or (self.firm and self._renamed(row))
        few = bool(self.put) or self.change.last - self.change.first <= _SOME
        if (self.neighbours and (few or self.firm)) or key_of(self.rows[row]) in self.keys:
            return True
        if self._instructed(row) or self._inside_shown(row):
            return True
        return self._decorates(row) or (self.beside and any(self._stands_in(new, row) for new in self.put))

    def _stands_in(self, new: str, row: int) -> bool:
        """Whether a new row is like the file row, and like no other one near."""
        near = [each for each in range(row - _NEAR, row + _NEAR + 1) if each != row and 0 <= each < len(self.rows)]
        return likeness(self.rows[row], new) >= _ALIKE and all(likeness(self.rows[each], new) < _ALIKE for each in near)

    def _decorates(self, row: int) -> bool:
        """Whether `row` is above a definition that the edit shows with other decorators or comments."""
        below = range(row, min(len(self.rows), row + _DECORATORS))
        header = next((each for each in below if self.file.names[each]), None)
        if header is None or self.file.block_start(header) > row or self.file.names[header] not in self.named:
            return False
        places = [each for each, name in enumerate(self.snippet.names) if name == self.file.names[header]]
        return any(self.snippet.block_start(place) < place for place in places)

    def _renamed(self, row: int) -> bool:
        """Whether a definition like that at `row` comes in its place, so that the neighbours show its new name, or none."""
        kind = (self.file.names[row] or ("", ""))[0]
        return any(name[0] == kind for name in self.put_names) or not self.put

    def _inside_shown(self, row: int) -> bool:
        """Whether `row` is in a definition that the edit has, in this place, without a marker."""
        around = self.file.around(row)
        gone = self.change.last - self.change.first
        if gone > _SOME + len(self.put) * _TIMES:
            return False
        return bool(around) and bool(self.put) and self.file.names[around[0]] in self.named and self.beside

    def _instructed(self, row: int) -> bool:
        if not self.removed:
            return False
        return any(
            (self.file.names[header] or ("", ""))[1].split(".")[-1] in self.removed
            for header in ([row] if self.file.names[row] else []) + self.file.around(row)
        )


def _plain(row: str) -> str:
    """A row without what models write otherwise unasked: typographic quotes, dashes and spaces, composed accents."""
    return bare(unicodedata.normalize("NFKC", row).translate(_TYPOGRAPHIC))


@lru_cache(maxsize=1 << 14)
def _words(row: str) -> frozenset[str]:
    return frozenset(_WORD.findall(row))


def _holds(part: list[str], wanted: list[str], first: bool = False, last: bool = False) -> bool:
    """Whether rows follow each other so in a part, and begin with its first row, or end with its last."""
    places = range(len(part) - len(wanted) + 1)
    places = places[:1] if first else places
    places = places[-1:] if last else places
    return any(part[row : row + len(wanted)] == wanted for row in places)


def _firm(part: list[str], wanted: list[str], has_top: bool, has_bottom: bool, counts: Counter[str]) -> bool:
    """Whether a part has rows as neighbours, and near them, above and below, one that the file has once.

    A decorator or a comment above says nothing, since many definitions have the same.
    """

    def tells(rows: list[str]) -> bool:
        return any(counts[row] == 1 and not row.startswith(LEADS) for row in rows)

    size = len(wanted)
    return any(
        part[row : row + size] == wanted
        and (not has_top or tells(part[max(0, row - 2) : row + 1]))
        and (not has_bottom or tells(part[row + size - 1 : row + size + 2]))
        for row in range(len(part) - size + 1)
    )


def likeness(left: str, right: str) -> float:
    """The share of words that two rows have in common, by Dice's measure."""
    one, other = _words(left), _words(right)
    return 2 * len(one & other) / (len(one) + len(other)) if one and other else 0.0
