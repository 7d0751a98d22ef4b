"""Warnings about deleted lines that the edit does not account for, from the texts of file, edit and result alone.

A deletion is explained if the edit has a definition or an assigned key of the same name in its place, has the lines around it
as neighbours, puts a similar line in its place, or if the instruction names it. The check does not depend on how the result
was made. The thresholds were tuned on the train split of `python -m benchmarks.merge`.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import lru_cache

from paceline.tasks.alignment import without_white_space
from paceline.tasks.definitions import Code
from paceline.tasks.matching_blocks import matching_blocks
from paceline.tasks.names import DEFINITION_PREFIXES, assigned_key

_MAX_WARNINGS = 3  # bounds the output: warnings of one call
# so many rows may be deleted without a replacement where the edit shows their neighbours, unique or not
_MAX_UNREPLACED = 3
_MAX_RATIO = 4  # deleted rows for each inserted one that a rewritten definition may have
_MAX_DECORATOR_ROWS = 50  # bounds time: rows of decorators and comments above a definition that are looked through
_NEARBY_ROWS = 4  # file rows on either side among which a similar row must be the only one
_SIMILAR = 0.6  # Dice coefficient over words from which a line replaces another
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
class _ReplacedRange:
    """File rows `first:last` that the result lacks, and the result rows `start:stop` in their place."""

    first: int
    last: int
    start: int
    stop: int


def unexplained_deletions(
    file: Code, result: Sequence[str], snippet: Code, markers: Sequence[bool], removed: Collection[str] = ()
) -> list[str]:
    """The first few warnings, a sentence for each run of deleted lines that the edit does not account for.

    `removed` are names that the instruction says are removed.
    """
    merged = Code([row.rstrip() for row in result])
    rows = [row.rstrip() for row in file.rows]
    parts = _compared_parts(snippet, markers)
    left = Counter(merged.rows)
    left.subtract(rows)
    texts = _Texts(file, rows, Counter(map(without_white_space, rows)), merged, snippet, parts, removed)
    warnings = []
    for change in _replaced_ranges(rows, merged.rows):
        # a row that the result has as often as the file was moved, not deleted
        deleted = [row for row in range(change.first, change.last) if rows[row].strip() and left[rows[row]] < 0]
        if not deleted:
            continue
        evidence = _ChangeEvidence(texts, change)
        if unexplained := [row for row in deleted if not evidence.explains(row)]:
            first, last = unexplained[0], unexplained[-1]
            where = f"line {first + 1} of the file goes"
            if first < last:
                where = f"lines {first + 1} to {last + 1} of the file go"
            warnings.append(f"{where}, and the edit does not show it: {rows[first].strip()!r}")
        inserted = {_normalized(row): row for row in merged.rows[change.start : change.stop]}
        for row in deleted:
            new = inserted.get(_normalized(rows[row]))
            if new is not None and without_white_space(new) != without_white_space(rows[row]):
                warnings.append(
                    f"line {row + 1} of the file changes only in its quotes, spaces or accents: {rows[row].strip()!r}"
                )
    return warnings[:_MAX_WARNINGS]


def named_for_removal(instruction: str) -> set[str]:
    """The words of an instruction that follow a verb of removal in the same sentence."""
    return {word for found in _REMOVAL.finditer(instruction) for word in _WORD.findall(found[1])}


def _replaced_ranges(rows: list[str], result: list[str]) -> list[_ReplacedRange]:
    """Where the result lacks rows of the file."""
    changes = []
    reached = inserted = 0
    for start, other, size in [*matching_blocks(rows, result), (len(rows), len(result), 0)]:
        if start > reached:
            changes.append(_ReplacedRange(reached, start, inserted, other))
        reached, inserted = start + size, other + size
    return changes


def _compared_parts(snippet: Code, markers: Sequence[bool]) -> list[list[str]]:
    """The non-blank rows of each part between markers, without white space."""
    parts: list[list[str]] = [[]]
    for row, marked in zip(snippet.rows, markers, strict=True):
        if marked:
            parts.append([])
        elif row.strip():
            parts[-1].append(without_white_space(row))
    return parts


@dataclass(frozen=True)
class _Texts:
    """What the evidence is read from, the same for every change.

    `rows` are the file's without trailing white space, `counts` how often the file has each row (without white space), `parts`
    the snippet's parts as `_compared_parts` gives them.
    """

    file: Code
    rows: list[str]
    counts: Counter[str]
    merged: Code
    snippet: Code
    parts: list[list[str]]
    removed: Collection[str]


class _ChangeEvidence:
    """What an edit shows about one range of deleted rows."""

    def __init__(self, texts: _Texts, change: _ReplacedRange) -> None:
        self.file, self.rows, self.snippet, self.removed = texts.file, texts.rows, texts.snippet, texts.removed
        self.change = change
        result, parts = texts.merged, texts.parts
        self.inserted = [row for row in result.rows[change.start : change.stop] if row.strip()]
        self.keys = {key for row in self.inserted if (key := assigned_key(row))}
        self.inserted_names = {name for name in result.names[change.start : change.stop] if name}
        self.named = {name for name in texts.snippet.names if name}
        above = next((row for row in range(change.start - 1, -1, -1) if result.rows[row].strip()), None)
        below = next((row for row in range(change.stop, len(result.rows)) if result.rows[row].strip()), None)
        middle = [without_white_space(row) for row in self.inserted]
        top = [] if above is None else [without_white_space(result.rows[above])]
        bottom = [] if below is None else [without_white_space(result.rows[below])]
        # where the file's beginning or end is the neighbour, only the snippet's first or last part can show it
        shown = [
            part for number, part in enumerate(parts) if (top or number == 0) and (bottom or number == len(parts) - 1)
        ]
        self.shows_neighbours = any(_contains_run(part, top + middle + bottom, not top, not bottom) for part in shown)
        self.unique_neighbours = any(
            _has_unique_neighbours(part, top + middle + bottom, bool(top), bool(bottom), texts.counts) for part in shown
        )
        ends = [top + middle] * bool(top) + [middle + bottom] * bool(bottom)
        self.next_to_neighbour = self.shows_neighbours or any(
            _contains_run(part, end) for part in parts for end in ends
        )

    def explains(self, row: int) -> bool:
        """Whether the edit accounts for the deletion of a file row."""
        name = self.file.names[row]
        if name is not None:
            return (
                name in self.named
                or self._is_named_for_removal(row)
                or (self.unique_neighbours and self._may_be_renamed(row))
            )
        few = bool(self.inserted) or self.change.last - self.change.first <= _MAX_UNREPLACED
        if (self.shows_neighbours and (few or self.unique_neighbours)) or assigned_key(self.rows[row]) in self.keys:
            return True
        if self._is_named_for_removal(row) or self._is_inside_shown_definition(row):
            return True
        return self._decorates(row) or (
            self.next_to_neighbour and any(self._is_replaced_by(new, row) for new in self.inserted)
        )

    def _is_replaced_by(self, new: str, row: int) -> bool:
        """Whether a new row is similar to the file row and to no other one nearby."""
        near = [
            each
            for each in range(row - _NEARBY_ROWS, row + _NEARBY_ROWS + 1)
            if each != row and 0 <= each < len(self.rows)
        ]
        return word_similarity(self.rows[row], new) >= _SIMILAR and all(
            word_similarity(self.rows[each], new) < _SIMILAR for each in near
        )

    def _decorates(self, row: int) -> bool:
        """Whether `row` is a decorator or comment of a definition that the edit shows with others."""
        below = range(row, min(len(self.rows), row + _MAX_DECORATOR_ROWS))
        header = next((each for each in below if self.file.names[each]), None)
        if header is None or self.file.block_start(header) > row or self.file.names[header] not in self.named:
            return False
        places = [each for each, name in enumerate(self.snippet.names) if name == self.file.names[header]]
        return any(self.snippet.block_start(place) < place for place in places)

    def _may_be_renamed(self, row: int) -> bool:
        """Whether the definition at `row` is replaced by one of the same kind, or by nothing."""
        kind = (self.file.names[row] or ("", ""))[0]
        return any(name[0] == kind for name in self.inserted_names) or not self.inserted

    def _is_inside_shown_definition(self, row: int) -> bool:
        """Whether `row` is inside a definition that the edit rewrites in this place."""
        around = self.file.enclosing_definitions(row)
        num_deleted = self.change.last - self.change.first
        if num_deleted > _MAX_UNREPLACED + len(self.inserted) * _MAX_RATIO:
            return False
        return (
            bool(around) and bool(self.inserted) and self.file.names[around[0]] in self.named and self.next_to_neighbour
        )

    def _is_named_for_removal(self, row: int) -> bool:
        """Whether the instruction names the definition at `row`, or one around it, for removal."""
        if not self.removed:
            return False
        return any(
            (self.file.names[header] or ("", ""))[1].split(".")[-1] in self.removed
            for header in ([row] if self.file.names[row] else []) + self.file.enclosing_definitions(row)
        )


def _normalized(row: str) -> str:
    """A row without what models change without being asked to: typographic quotes, dashes and spaces, composed accents."""
    return without_white_space(unicodedata.normalize("NFKC", row).translate(_TYPOGRAPHIC))


@lru_cache(maxsize=1 << 14)
def _words(row: str) -> frozenset[str]:
    return frozenset(_WORD.findall(row))


def _contains_run(part: list[str], wanted: list[str], first: bool = False, last: bool = False) -> bool:
    """Whether a part contains the wanted rows consecutively; with `first` from its first row on, with `last` up to its last."""
    places = range(len(part) - len(wanted) + 1)
    places = places[:1] if first else places
    places = places[-1:] if last else places
    return any(part[row : row + len(wanted)] == wanted for row in places)


def _has_unique_neighbours(
    part: list[str], wanted: list[str], has_top: bool, has_bottom: bool, counts: Counter[str]
) -> bool:
    """Whether a part contains the wanted rows consecutively, with a row nearby, above and below, that the file has once.

    Decorators and comments do not count, since many definitions share them.
    """

    def tells(rows: list[str]) -> bool:
        return any(counts[row] == 1 and not row.startswith(DEFINITION_PREFIXES) for row in rows)

    size = len(wanted)
    return any(
        part[row : row + size] == wanted
        and (not has_top or tells(part[max(0, row - 2) : row + 1]))
        and (not has_bottom or tells(part[row + size - 1 : row + size + 2]))
        for row in range(len(part) - size + 1)
    )


def word_similarity(left: str, right: str) -> float:
    """The similarity of two rows, 0 to 1: the Dice coefficient over their distinct words."""
    one, other = _words(left), _words(right)
    return 2 * len(one & other) / (len(one) + len(other)) if one and other else 0.0
