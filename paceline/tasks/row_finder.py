"""Finds an edit's rows in a file: exactly, or with differences in white space, indent or typography; and re-indents rows.

Each tolerance is tried over the whole file before the next larger one.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property
from itertools import pairwise

_TAB_WIDTHS = (4, 2, 8)  # columns that a tab may stand for, the likeliest first
_PLAIN_SIGNS = str.maketrans(
    {
        **dict.fromkeys("‘’‚‛′`", "'"),
        **dict.fromkeys("“”„‟″", '"'),
        **dict.fromkeys("‐‑‒–—―−", "-"),
        **dict.fromkeys("\u200b\u200c\u200d\u2060\ufeff\u00ad", None),
    }
)


class Tolerance(IntEnum):
    """How an edit's rows may differ from the file's, from none to the most."""

    EXACT = 0
    ROW_ENDS = 1  # trailing white space differs
    INDENT = 2  # all rows are shifted by the same indent
    FIRST_ROW = 3  # the same, and the first row has lost its indent
    TYPOGRAPHY = 4  # typographic variants of signs, and white space within rows, differ
    RELATIVE = 5  # indents differ from row to row, in the same order of depth


MarginPairs = tuple[tuple[str, str], ...]  # (edit's margin, file's margin) of rows that are not blank


@dataclass(frozen=True)
class RowMatch:
    """File rows `start:stop` that match an edit's rows, the tolerance it took, and the margins of both."""

    start: int
    stop: int
    tolerance: Tolerance
    pairs: MarginPairs = ()

    def reindented(self, rows: Sequence[str]) -> tuple[list[str], bool]:
        """(new rows of the edit at the file's indent, whether the indent of each is unambiguous)."""
        if self.tolerance <= Tolerance.ROW_ENDS:
            return list(rows), True
        if self.tolerance == Tolerance.FIRST_ROW:
            return _with_first_restored(self.pairs, rows)
        if len(self.pairs) == 1 and _only_first_lost_indent(self.pairs[0], rows):
            return [self.pairs[0][1] + rows[0].lstrip(" \t"), *rows[1:]], False
        return _reindented(self.pairs, rows)


class RowFinder:
    """Searches a file's rows for an edit's, by an index of the rows. Results are cached."""

    def __init__(self, rows: Sequence[str]) -> None:
        self.rows = list(rows)
        self._matches: dict[tuple[str, ...], list[RowMatch]] = {}
        self._exact_starts: dict[tuple[str, ...], list[int]] = {}

    def find_exact(self, wanted: Sequence[str]) -> list[int]:
        """The first rows of all exact matches."""
        key = tuple(wanted)
        if key not in self._exact_starts:
            self._exact_starts[key] = _starts(self.rows, self._by_text, list(wanted))
        return self._exact_starts[key]

    def find(self, wanted: Sequence[str]) -> list[RowMatch]:
        """All matches at the smallest tolerance that gives any, in order."""
        key = tuple(wanted)
        if key not in self._matches:
            self._matches[key] = next(
                filter(None, (self._find_within(list(key), tolerance) for tolerance in Tolerance)), []
            )
        return self._matches[key]

    def match_at(self, wanted: Sequence[str], start: int, loosest: Tolerance = Tolerance.INDENT) -> RowMatch | None:
        """The match that begins at row `start`, at the smallest tolerance up to `loosest`; None if there is none."""
        stop = start + len(wanted)
        if start < 0 or stop > len(self.rows):
            return None
        found = RowFinder(self.rows[start:stop]).find(wanted)
        if not found or found[0].tolerance > loosest:
            return None
        return RowMatch(start, stop, found[0].tolerance, found[0].pairs)

    def nearest_difference(self, wanted: Sequence[str]) -> tuple[int, int] | None:
        """At the place with most equal rows, the first difference: (file row, wanted row); None if no row is found."""
        votes: dict[int, int] = {}
        stripped, index = self._by_stripped
        for number, row in enumerate(wanted):
            places = index.get(row.strip(), ()) if row.strip() else ()
            for place in (
                places if len(places) <= 50 else ()
            ):  # bounds time: a row with more places does not identify one
                votes[place - number] = votes.get(place - number, 0) + 1
        for start in sorted(votes, key=lambda each: (-votes[each], each)):
            for number, row in enumerate(wanted):
                place = start + number
                if 0 <= place < len(stripped) and stripped[place] != row.strip():
                    return place, number
        return None

    def within_row(self, wanted: Sequence[str]) -> int | None:
        """For a single wanted row, the only file row that contains it; else None."""
        if len(wanted) != 1 or len(wanted[0].strip()) < 2:
            return None
        found = [number for number, row in enumerate(self.rows) if wanted[0].strip() in row]
        return found[0] if len(found) == 1 else None

    def _find_within(self, wanted: list[str], tolerance: Tolerance) -> list[RowMatch]:
        """All matches at exactly this tolerance."""
        if not wanted:
            return []
        size = len(wanted)
        if tolerance == Tolerance.EXACT:
            return [RowMatch(start, start + size, tolerance) for start in self.find_exact(wanted)]
        if tolerance == Tolerance.ROW_ENDS:
            trimmed, index = self._by_trimmed
            starts = _starts(trimmed, index, [_trim(row) for row in wanted])
            return [RowMatch(start, start + size, tolerance) for start in starts]
        if tolerance == Tolerance.TYPOGRAPHY:
            keys, index = self._by_plain_text
            starts = _starts(keys, index, [_plain_text(row) for row in wanted])
        else:
            keys, index = self._by_stripped
            starts = _starts(keys, index, [row.strip(" \t\r") for row in wanted])
        margins = [margin(row) if row.strip() else None for row in wanted]
        verdicts: dict[tuple[object, ...], bool] = {}
        result = []
        for start in starts:
            there = self._margins[start : start + size]
            first = (margins[0], there[0]) if tolerance == Tolerance.FIRST_ROW else None
            kind = (frozenset(zip(margins, there, strict=True)), first)
            if verdicts.get(kind) is False:
                continue
            pairs = tuple((one, two) for one, two in zip(margins, there, strict=True) if one is not None)
            if kind not in verdicts:
                verdicts[kind] = _margins_fit(pairs, tolerance)
            if verdicts[kind]:
                result.append(RowMatch(start, start + size, tolerance, pairs))
        return result

    @cached_property
    def _by_text(self) -> dict[str, list[int]]:
        return _index(self.rows)

    @cached_property
    def _by_trimmed(self) -> tuple[list[str], dict[str, list[int]]]:
        return _keyed(_trim(row) for row in self.rows)

    @cached_property
    def _by_stripped(self) -> tuple[list[str], dict[str, list[int]]]:
        return _keyed(row.strip(" \t\r") for row in self.rows)

    @cached_property
    def _by_plain_text(self) -> tuple[list[str], dict[str, list[int]]]:
        return _keyed(_plain_text(row) for row in self.rows)

    @cached_property
    def _margins(self) -> list[str]:
        return [margin(row) for row in self.rows]


def margin(row: str) -> str:
    """The tabs and spaces at the beginning of a row."""
    return row[: len(row) - len(row.lstrip(" \t"))]


def format_lines(starts: Sequence[int]) -> str:
    """Row numbers as text, counted from 1: "line 3", "lines 3 and 17", "lines 1, 2, 3, 4 and 9 others"."""
    lines = [str(start + 1) for start in starts[:5]]
    if len(lines) == 1:
        return f"line {lines[0]}"
    if len(starts) > 5:
        return f"lines {', '.join(lines[:4])} and {len(starts) - 4} others"
    return f"lines {', '.join(lines[:-1])} and {lines[-1]}"


def _trim(row: str) -> str:
    """A row without trailing white space."""
    return row.rstrip(" \t\r")


def _plain_text(row: str) -> str:
    """A row with ASCII signs for typographic ones and single spaces."""
    return " ".join(unicodedata.normalize("NFKC", row).translate(_PLAIN_SIGNS).split())


def _index(keys: Sequence[str]) -> dict[str, list[int]]:
    index: dict[str, list[int]] = {}
    for number, key in enumerate(keys):
        index.setdefault(key, []).append(number)
    return index


def _keyed(keys: Iterable[str]) -> tuple[list[str], dict[str, list[int]]]:
    listed = list(keys)
    return listed, _index(listed)


def _starts(keys: list[str], index: dict[str, list[int]], wanted: list[str]) -> list[int]:
    """The starts of `wanted` in `keys`. Only the places of its rarest key are compared."""
    if not wanted or any(key not in index for key in wanted):
        return []
    rarest = min(range(len(wanted)), key=lambda number: len(index[wanted[number]]))
    starts = (place - rarest for place in index[wanted[rarest]])
    return [start for start in starts if start >= 0 and keys[start : start + len(wanted)] == wanted]


def _margins_fit(pairs: MarginPairs, tolerance: Tolerance) -> bool:
    """Whether the margins of matching rows differ only as the tolerance allows."""
    distinct = tuple(dict.fromkeys(pairs))
    if not pairs:
        return tolerance == Tolerance.TYPOGRAPHY
    if tolerance == Tolerance.RELATIVE:
        mapping = dict(distinct)
        widths = sorted((_columns(old, 4), _columns(new, 4)) for old, new in distinct)
        return len(mapping) == len(distinct) and all(before[1] < after[1] for before, after in pairwise(widths))
    if tolerance == Tolerance.FIRST_ROW:
        old, new = pairs[0]
        return len(pairs) > 1 and _columns(old, 4) < _columns(new, 4) and bool(_shifts(tuple(dict.fromkeys(pairs[1:]))))
    return bool(_shifts(distinct))


@dataclass(frozen=True)
class _Shift:
    """A shift of margins: an added prefix, a removed prefix, or `columns` more columns with tabs of `tab` columns.

    With `tabs` the shifted margin is written with tabs.
    """

    added: str = ""
    removed: str = ""
    tab: int = 0
    columns: int = 0
    tabs: bool = False

    def of(self, text: str) -> str | None:
        """The shifted margin; None if it is narrower than what is to be removed."""
        if not self.tab:
            return self.added + text[len(self.removed) :] if text.startswith(self.removed) else None
        width = _columns(text, self.tab) + self.columns
        if width < 0:
            return None
        return "\t" * (width // self.tab) + " " * (width % self.tab) if self.tabs else " " * width


def _shifts(pairs: MarginPairs) -> list[_Shift]:
    """The shifts that turn every margin of the edit into the file's, the likeliest first."""
    old, new = pairs[0]
    if new.endswith(old) and all(there == new[: len(new) - len(old)] + here for here, there in pairs):
        return [_Shift(added=new[: len(new) - len(old)])]
    if old.endswith(new) and all(here == old[: len(old) - len(new)] + there for here, there in pairs):
        return [_Shift(removed=old[: len(old) - len(new)])]
    tabs = any("\t" in there for _, there in pairs)
    found = []
    for tab in _TAB_WIDTHS:
        offsets = {_columns(there, tab) - _columns(here, tab) for here, there in pairs}
        shift = _Shift(tab=tab, columns=offsets.pop(), tabs=tabs)
        if not offsets and all(shift.of(here) == there for here, there in pairs):
            found.append(shift)
    return sorted(found, key=lambda shift: shift.columns != 0)


def _columns(text: str, tab: int) -> int:
    """The width of a margin with tabs of `tab` columns."""
    return sum(tab if sign == "\t" else 1 for sign in text)


def _reindented(pairs: MarginPairs, rows: Sequence[str]) -> tuple[list[str], bool]:
    """(rows with their margins shifted as in `pairs`, whether each shift is unambiguous)."""
    distinct = tuple(dict.fromkeys(pairs))
    shifts = _shifts(distinct) if distinct else [_Shift()]
    if not shifts:
        return [_mapped_margin(dict(distinct), row) for row in rows], False
    shift = shifts[0]
    if shift.added and "\t" in shift.added and not shift.added.strip("\t") and (step := _indent_step(rows)):
        shift = _Shift(tab=step, columns=len(shift.added) * step, tabs=True)
    result, clear = [], True
    for row in rows:
        here = margin(row)
        if not row.strip():
            result.append(row)
            continue
        there = shift.of(here)
        known = shift.columns == 0 and shift.tab > 0
        clear &= there is not None and (known or len({other.of(here) for other in shifts}) == 1 or here in dict(pairs))
        result.append((there if there is not None else "") + row[len(here) :])
    return result, clear


def _with_first_restored(pairs: MarginPairs, rows: Sequence[str]) -> tuple[list[str], bool]:
    """Re-indents new rows for an edit whose first row lost its indent. New rows at its margin get the first row's indent."""
    (lost, there), rest = pairs[0], pairs[1:]
    others, clear = _reindented(rest, rows)
    result = []
    for number, (row, other) in enumerate(zip(rows, others, strict=True)):
        bare = bool(row.strip()) and _columns(margin(row), 4) <= _columns(lost, 4) and margin(row) not in dict(rest)
        result.append(there + row.lstrip(" \t") if bare else other)
        clear &= not bare or number == 0
    return result, clear


def _only_first_lost_indent(pair: tuple[str, str], rows: Sequence[str]) -> bool:
    """Whether, of the new rows for a single row that lost its indent, only the first seems to have lost it too."""
    here, there = pair
    others = [margin(row) for row in rows[1:] if row.strip()]
    return bool(
        others
        and rows[0].strip()
        and len(here) < len(there)
        and margin(rows[0]) == here
        and all(other.startswith(there) for other in others)
    )


def _mapped_margin(mapping: dict[str, str], row: str) -> str:
    """A row with the margin that `mapping` gives for its own, or for the longest one that its own begins with."""
    here = margin(row)
    if not row.strip() or here in mapping:
        return mapping.get(here, here) + row[len(here) :]
    below = [known for known in mapping if here.startswith(known)]
    known = max(below, key=len) if below else here
    return mapping.get(known, "") + row[len(known) if below else len(here) :]


def _indent_step(rows: Sequence[str]) -> int:
    """The number of spaces of one indent level; 0 for rows without an indent or with tabs."""
    margins = [margin(row) for row in rows if row.strip() and margin(row)]
    if not margins or any("\t" in text for text in margins):
        return 0
    step = min(len(text) for text in margins)
    return step if all(len(text) % step == 0 for text in margins) else 0
