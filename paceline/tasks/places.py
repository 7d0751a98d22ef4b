"""Where rows of an edit stand in a file: exactly, or with white space, indents or signs off; and how they are indented.

Each looseness is tried over the whole file before the next, and none is taken for a tighter one.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property
from itertools import pairwise

_TABS = (4, 2, 8)  # how many columns a tab may stand for, the likeliest first
_SIGNS = str.maketrans(
    {
        **dict.fromkeys("‘’‚‛′`", "'"),
        **dict.fromkeys("“”„‟″", '"'),
        **dict.fromkeys("‐‑‒–—―−", "-"),
        **dict.fromkeys("\u200b\u200c\u200d\u2060\ufeff\u00ad", None),
    }
)


class Looseness(IntEnum):
    """How an edit's rows equal a file's, the tightest first."""

    EXACT = 0
    ENDS = 1  # but for white space at row ends
    INDENT = 2  # all shifted by one indent
    FIRST = 3  # and the first has lost its indent
    SIGNS = 4  # but for typographic variants and white space within
    RELATIVE = 5  # but for indents that differ from row to row


Pairs = tuple[tuple[str, str], ...]  # margins of the edit's rows and of the file's, of rows that are not blank


@dataclass(frozen=True)
class Match:
    """A place: file rows `start` up to `stop`, how loosely they match, and the margins of both."""

    start: int
    stop: int
    looseness: Looseness
    pairs: Pairs = ()

    def reindented(self, rows: Sequence[str]) -> tuple[list[str], bool]:
        """New rows of the edit at the file's indents, and whether each has but one reading."""
        if self.looseness <= Looseness.ENDS:
            return list(rows), True
        if self.looseness == Looseness.FIRST:
            return _first_restored(self.pairs, rows)
        if len(self.pairs) == 1 and _only_first_bare(self.pairs[0], rows):
            return [self.pairs[0][1] + rows[0].lstrip(" \t"), *rows[1:]], False
        return _shifted(self.pairs, rows)


class Places:
    """A file's rows, in which rows of edits are looked for through a dict of positions."""

    def __init__(self, rows: Sequence[str]) -> None:
        self.rows = list(rows)
        self._known: dict[tuple[str, ...], list[Match]] = {}
        self._known_exactly: dict[tuple[str, ...], list[int]] = {}

    def exact(self, wanted: Sequence[str]) -> list[int]:
        """Where the rows stand exactly, the first row of each place."""
        key = tuple(wanted)
        if key not in self._known_exactly:
            self._known_exactly[key] = _starts(self.rows, self._exactly, list(wanted))
        return self._known_exactly[key]

    def find(self, wanted: Sequence[str]) -> list[Match]:
        """All places of the tightest looseness that has any, in order."""
        key = tuple(wanted)
        if key not in self._known:
            self._known[key] = next(filter(None, (self._found(list(key), looseness) for looseness in Looseness)), [])
        return self._known[key]

    def at(self, wanted: Sequence[str], start: int, loosest: Looseness = Looseness.INDENT) -> Match | None:
        """The match at that row, as tight as can be."""
        stop = start + len(wanted)
        if start < 0 or stop > len(self.rows):
            return None
        found = Places(self.rows[start:stop]).find(wanted)
        if not found or found[0].looseness > loosest:
            return None
        return Match(start, stop, found[0].looseness, found[0].pairs)

    def nearest(self, wanted: Sequence[str]) -> tuple[int, int] | None:
        """A place at which most rows are alike: the file row and the wanted row that differ there first."""
        votes: dict[int, int] = {}
        stripped, index = self._stripped
        for number, row in enumerate(wanted):
            places = index.get(row.strip(), ()) if row.strip() else ()
            for place in places if len(places) <= 50 else ():
                votes[place - number] = votes.get(place - number, 0) + 1
        for start in sorted(votes, key=lambda each: (-votes[each], each)):
            for number, row in enumerate(wanted):
                place = start + number
                if 0 <= place < len(stripped) and stripped[place] != row.strip():
                    return place, number
        return None

    def within_row(self, wanted: Sequence[str]) -> int | None:
        """The one file row that holds the only wanted row as a part."""
        if len(wanted) != 1 or len(wanted[0].strip()) < 2:
            return None
        found = [number for number, row in enumerate(self.rows) if wanted[0].strip() in row]
        return found[0] if len(found) == 1 else None

    def _found(self, wanted: list[str], looseness: Looseness) -> list[Match]:
        if not wanted:
            return []
        size = len(wanted)
        if looseness == Looseness.EXACT:
            return [Match(start, start + size, looseness) for start in self.exact(wanted)]
        if looseness == Looseness.ENDS:
            trimmed, index = self._trimmed
            starts = _starts(trimmed, index, [_trim(row) for row in wanted])
            return [Match(start, start + size, looseness) for start in starts]
        if looseness == Looseness.SIGNS:
            keys, index = self._plain
            starts = _starts(keys, index, [_plain(row) for row in wanted])
        else:
            keys, index = self._stripped
            starts = _starts(keys, index, [row.strip(" \t\r") for row in wanted])
        margins = [margin(row) if row.strip() else None for row in wanted]
        verdicts: dict[tuple[object, ...], bool] = {}
        result = []
        for start in starts:
            there = self._margins[start : start + size]
            first = (margins[0], there[0]) if looseness == Looseness.FIRST else None
            kind = (frozenset(zip(margins, there, strict=True)), first)
            if verdicts.get(kind) is False:
                continue
            pairs = tuple((one, two) for one, two in zip(margins, there, strict=True) if one is not None)
            if kind not in verdicts:
                verdicts[kind] = _fits(pairs, looseness)
            if verdicts[kind]:
                result.append(Match(start, start + size, looseness, pairs))
        return result

    @cached_property
    def _exactly(self) -> dict[str, list[int]]:
        return _index(self.rows)

    @cached_property
    def _trimmed(self) -> tuple[list[str], dict[str, list[int]]]:
        return _keyed(_trim(row) for row in self.rows)

    @cached_property
    def _stripped(self) -> tuple[list[str], dict[str, list[int]]]:
        return _keyed(row.strip(" \t\r") for row in self.rows)

    @cached_property
    def _plain(self) -> tuple[list[str], dict[str, list[int]]]:
        return _keyed(_plain(row) for row in self.rows)

    @cached_property
    def _margins(self) -> list[str]:
        return [margin(row) for row in self.rows]


def margin(row: str) -> str:
    """The tabs and spaces that the row begins with."""
    return row[: len(row) - len(row.lstrip(" \t"))]


def named(starts: Sequence[int]) -> str:
    """Rows as a user counts them: "line 3", "lines 3 and 17", "lines 1, 2, 3 and 9 others"."""
    lines = [str(start + 1) for start in starts[:5]]
    if len(lines) == 1:
        return f"line {lines[0]}"
    if len(starts) > 5:
        return f"lines {', '.join(lines[:4])} and {len(starts) - 4} others"
    return f"lines {', '.join(lines[:-1])} and {lines[-1]}"


def _trim(row: str) -> str:
    return row.rstrip(" \t\r")


def _plain(row: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", row).translate(_SIGNS).split())


def _index(keys: Sequence[str]) -> dict[str, list[int]]:
    index: dict[str, list[int]] = {}
    for number, key in enumerate(keys):
        index.setdefault(key, []).append(number)
    return index


def _keyed(keys: Iterable[str]) -> tuple[list[str], dict[str, list[int]]]:
    listed = list(keys)
    return listed, _index(listed)


def _starts(keys: list[str], index: dict[str, list[int]], wanted: list[str]) -> list[int]:
    """Where `wanted` stands among `keys`: the places of its rarest row are compared."""
    if not wanted or any(key not in index for key in wanted):
        return []
    rarest = min(range(len(wanted)), key=lambda number: len(index[wanted[number]]))
    starts = (place - rarest for place in index[wanted[rarest]])
    return [start for start in starts if start >= 0 and keys[start : start + len(wanted)] == wanted]


def _fits(pairs: Pairs, looseness: Looseness) -> bool:
    distinct = tuple(dict.fromkeys(pairs))
    if not pairs:
        return looseness == Looseness.SIGNS
    if looseness == Looseness.RELATIVE:
        mapping = dict(distinct)
        widths = sorted((_columns(old, 4), _columns(new, 4)) for old, new in distinct)
        return len(mapping) == len(distinct) and all(before[1] < after[1] for before, after in pairwise(widths))
    if looseness == Looseness.FIRST:
        old, new = pairs[0]
        return len(pairs) > 1 and _columns(old, 4) < _columns(new, 4) and bool(_shifts(tuple(dict.fromkeys(pairs[1:]))))
    return bool(_shifts(distinct))


@dataclass(frozen=True)
class _Shift:
    """One indent put before all rows, taken from all, or counted in columns with tabs of `tab` columns."""

    added: str = ""
    removed: str = ""
    tab: int = 0
    columns: int = 0
    tabs: bool = False

    def of(self, text: str) -> str | None:
        """The margin in the file of a row with this margin in the edit; None where it has less than is taken away."""
        if not self.tab:
            return self.added + text[len(self.removed) :] if text.startswith(self.removed) else None
        width = _columns(text, self.tab) + self.columns
        if width < 0:
            return None
        return "\t" * (width // self.tab) + " " * (width % self.tab) if self.tabs else " " * width


def _shifts(pairs: Pairs) -> list[_Shift]:
    """The shifts that bring each margin of the edit to the file's, the likeliest first."""
    old, new = pairs[0]
    if new.endswith(old) and all(there == new[: len(new) - len(old)] + here for here, there in pairs):
        return [_Shift(added=new[: len(new) - len(old)])]
    if old.endswith(new) and all(here == old[: len(old) - len(new)] + there for here, there in pairs):
        return [_Shift(removed=old[: len(old) - len(new)])]
    tabs = any("\t" in there for _, there in pairs)
    found = []
    for tab in _TABS:
        offsets = {_columns(there, tab) - _columns(here, tab) for here, there in pairs}
        shift = _Shift(tab=tab, columns=offsets.pop(), tabs=tabs)
        if not offsets and all(shift.of(here) == there for here, there in pairs):
            found.append(shift)
    return sorted(found, key=lambda shift: shift.columns != 0)


def _columns(text: str, tab: int) -> int:
    return sum(tab if sign == "\t" else 1 for sign in text)


def _shifted(pairs: Pairs, rows: Sequence[str]) -> tuple[list[str], bool]:
    distinct = tuple(dict.fromkeys(pairs))
    shifts = _shifts(distinct) if distinct else [_Shift()]
    if not shifts:
        return [_mapped(dict(distinct), row) for row in rows], False
    shift = shifts[0]
    if shift.added and "\t" in shift.added and not shift.added.strip("\t") and (step := _step(rows)):
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


def _first_restored(pairs: Pairs, rows: Sequence[str]) -> tuple[list[str], bool]:
    """Rows of an edit whose first row has lost its indent: a row indented as that one stands where that one does."""
    (lost, there), rest = pairs[0], pairs[1:]
    others, clear = _shifted(rest, rows)
    result = []
    for number, (row, other) in enumerate(zip(rows, others, strict=True)):
        bare = bool(row.strip()) and _columns(margin(row), 4) <= _columns(lost, 4) and margin(row) not in dict(rest)
        result.append(there + row.lstrip(" \t") if bare else other)
        clear &= not bare or number == 0
    return result, clear


def _only_first_bare(pair: tuple[str, str], rows: Sequence[str]) -> bool:
    """Whether of new rows for one row that lost its indent all but the first seem to have kept theirs."""
    here, there = pair
    others = [margin(row) for row in rows[1:] if row.strip()]
    return bool(
        others
        and rows[0].strip()
        and len(here) < len(there)
        and margin(rows[0]) == here
        and all(other.startswith(there) for other in others)
    )


def _mapped(mapping: dict[str, str], row: str) -> str:
    here = margin(row)
    if not row.strip() or here in mapping:
        return mapping.get(here, here) + row[len(here) :]
    below = [known for known in mapping if here.startswith(known)]
    known = max(below, key=len) if below else here
    return mapping.get(known, "") + row[len(known) if below else len(here) :]


def _step(rows: Sequence[str]) -> int:
    """How many spaces an indent of these rows has; 0 where they have none, or tabs."""
    margins = [margin(row) for row in rows if row.strip() and margin(row)]
    if not margins or any("\t" in text for text in margins):
        return 0
    step = min(len(text) for text in margins)
    return step if all(len(text) % step == 0 for text in margins) else 0
