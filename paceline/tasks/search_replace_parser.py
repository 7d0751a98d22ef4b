"""Parses SEARCH/REPLACE blocks as models write them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from paceline.errors import EditNotFound
from paceline.tasks.lines import Lines
from paceline.tasks.row_finder import RowFinder
from paceline.tasks.snippet import Marker, marker

_OPENING = re.compile(r"([<-])\1{4,8}(?: ?(SEARCH|ORIGINAL)\b.*| \S.*)?$", re.IGNORECASE)
_LINE_NUMBER = re.compile(r":(start|end)_line: ?(\d{1,9})$")
_ESCAPED = re.compile(r"\\([<=>-])\1{4,8}")  # Roo Code escapes a row of text that looks like a delimiter
_FILE_NAME = re.compile(r"[\w.~+@/\\-]*\w\.\w{1,12}$|[\w.~+@-]+(?:[/\\][\w.~+@-]+)+$|(?:Make|Docker|Gem|Rake)file$")
_MAX_ENDS = 50  # bounds time: possible ends of a block that are tried
_MAX_DIVIDERS = 50  # bounds time: possible dividers that are tried for each end


class BlockForm(Enum):
    """The form of a block, by the label in its first row."""

    SEARCH = "SEARCH"  # ends with REPLACE
    ORIGINAL = "ORIGINAL"  # ends with UPDATED
    CONFLICT = ""  # git's conflict markers


@dataclass(frozen=True)
class SearchBlock:
    """A block: its SEARCH rows (`old`), its REPLACE rows (`new`), and its first and last row in the edit.

    `start_line` is the file line that it names, from 1. `name` is the file that it names. `warnings` are a sentence each.
    """

    old: tuple[str, ...]
    new: tuple[str, ...]
    first: int
    last: int
    form: BlockForm
    start_line: int | None = None
    name: str | None = None
    warnings: tuple[str, ...] = ()


class UnclosedBlock(EditNotFound):
    """A block lacks its divider or its end. `first` is the row that opens it."""

    def __init__(self, number: int, first: int, missing: str) -> None:
        super().__init__(f"SEARCH block {number} is not closed: it has no {missing}")
        self.first = first


def parse_opening(row: str) -> tuple[BlockForm, str] | None:
    """(form, delimiter signs) of a row that opens a block; None for another row."""
    found = _OPENING.match(row.rstrip())
    if not found:
        return None
    opening_signs = row[: len(row) - len(row.lstrip(found[1]))]
    label = (found[2] or "").upper()
    if not label and found[1] == "-":
        return None
    return BlockForm(label), opening_signs


def parse_blocks(rows: Sequence[str], finder: RowFinder) -> list[SearchBlock]:
    """The blocks of an edit, in order. If a block has several possible dividers or ends, the file's content decides.

    Raises UnclosedBlock.
    """
    blocks: list[SearchBlock] = []
    place = 0
    while place < len(rows):
        found = parse_opening(rows[place])
        if found and (found[0] is not BlockForm.CONFLICT or _has_end(rows, place)):
            block = _parse_block(rows, place, len(blocks) + 1, finder)
            blocks.append(block)
            place = block.last
        place += 1
    return blocks


def edit_rows(text: str) -> list[str]:
    """The rows of an edit. If all its blocks are indented, their delimiters are moved to the left margin."""
    rows = Lines.of(text).rows
    if any(map(parse_opening, rows)) or not any(
        (found := parse_opening(row.lstrip())) and found[0] is not BlockForm.CONFLICT for row in rows
    ):
        return rows
    return [row.lstrip() if _is_delimiter(row.lstrip(), 7) else row for row in rows]


def rows_outside(rows: Sequence[str], blocks: Sequence[SearchBlock]) -> list[str]:
    """The edit's rows outside its blocks, without blank rows, fences, and file names above a block."""
    inside = {number for block in blocks for number in range(block.first, block.last + 1)}
    tops = {number for block in blocks for number in range(block.first - 3, block.first)}
    return [
        row
        for number, row in enumerate(rows)
        if number not in inside
        and row.strip()
        and not is_fence(row)
        and not (number in tops and file_name(row) is not None)
    ]


def is_quoted(rows: Sequence[str], blocks: Sequence[SearchBlock]) -> bool:
    """Whether the rows outside the blocks hold a fence, a backtick or a triple quote, which may quote a block."""
    inside = {number for block in blocks for number in range(block.first, block.last + 1)}
    quotes = ("`", "~~~", '"""', "'''")
    return any(quote in row for number, row in enumerate(rows) if number not in inside for quote in quotes)


def is_fence(row: str) -> bool:
    """Whether the row opens or closes a Markdown fence."""
    return row.strip().startswith(("```", "~~~"))


def file_name(row: str) -> str | None:
    """The file that a row above a block names, if the row holds nothing else."""
    text = row.strip().strip("`*#: ").removeprefix("File:").removeprefix("file:").strip("`*#: ")
    return text if _FILE_NAME.match(text) else None


def is_certain_marker(row: str) -> bool:
    """Whether the row is certain to be a marker for left-out rows."""
    return marker(row) == Marker.CERTAIN


def is_part_of_snippet(outside: Sequence[str], rows: Sequence[str], found: bool) -> bool:
    """Whether blocks or hunks are only text inside a lazy snippet, judged by the edit's other rows (`outside`).

    They are if some of these are rows of the file or markers. If `found` (the file has what the blocks show), it takes half of
    these rows, or some and a marker.
    """
    known = set(map(str.rstrip, rows))
    shown = sum(row.rstrip() in known and sum(map(str.isalnum, row)) >= 3 for row in outside)
    if any(map(is_certain_marker, outside)) and (shown or not found):
        return True
    return shown > 0 and (not found or shown * 2 >= len(outside))


def _has_end(rows: Sequence[str], place: int) -> bool:
    """Whether a conflict's opening is followed by a divider and an end with the same number of signs."""
    count = len(rows[place]) - len(rows[place].lstrip("<"))
    divider = False
    for row in rows[place + 1 :]:
        if parse_opening(row):
            return False
        divider |= row.rstrip() == "=" * count
        if divider and re.match(rf">{{{count}}}(?!>)", row):
            return True
    return False


def _parse_block(rows: Sequence[str], first: int, number: int, finder: RowFinder) -> SearchBlock:
    """Parses the block that opens at row `first`, number `number` of the edit. Raises UnclosedBlock."""
    form, opening_signs = parse_opening(rows[first]) or (BlockForm.SEARCH, "")
    top, start_line = _line_number(rows, first + 1)
    ends, unusual = _possible_ends(rows, top, form, len(opening_signs))
    if not ends:
        raise UnclosedBlock(number, first, "row that ends it, as '>>>>>>> REPLACE'")
    dividers = _dividers(rows, top, ends[0], len(opening_signs))
    if not dividers:
        raise UnclosedBlock(number, first, "row of '=======' between its parts")
    division = _choose_division(rows, top, ends, len(opening_signs), finder)
    divider, end, ambiguous = division or (dividers[0], ends[0], False)
    old, new = list(rows[top:divider]), tuple(rows[divider + 1 : end])
    warnings = [f"the end of SEARCH block {number} is not marked REPLACE"] if unusual else []
    if ambiguous:
        warnings.append(f"SEARCH block {number} has several rows of '=' at which it may be divided")
    if any(map(_ESCAPED.match, (*old, *new))) and not finder.find_exact(old):
        old, new = [_unescaped(row) for row in old], tuple(map(_unescaped, new))
    if form is BlockForm.CONFLICT:
        old, warnings = _conflict_side(old, len(opening_signs), number, finder, warnings)
    stray = [row for row in new if row not in old and _is_delimiter(row, len(opening_signs))]
    if any((found := parse_opening(row)) and found[0] is form for row in stray):
        raise UnclosedBlock(number, first, "end before the next block begins")
    if any(not set(row.rstrip()) <= {"="} for row in stray):
        warnings.append(f"SEARCH block {number} puts {stray[0]!r} into the file")
    warnings += [f"SEARCH block {number} is divided twice"] * _divided_twice(new, old, len(opening_signs))
    return SearchBlock(tuple(old), new, first, end, form, start_line, _file_name_above(rows, first), tuple(warnings))


def _divided_twice(new: Sequence[str], old: Sequence[str], count: int) -> bool:
    """Whether the REPLACE part holds a divider that is hardly text: it is the last row, or underlines no title."""
    return any(
        row.rstrip() == "=" * count and row not in old and (number + 1 == len(new) or not _underlines(new, number))
        for number, row in enumerate(new)
    )


def _underlines(rows: Sequence[str], number: int) -> bool:
    """Whether a row of "=" may underline a title: the row above has a letter or digit."""
    return number > 0 and any(map(str.isalnum, rows[number - 1]))


def _unescaped(row: str) -> str:
    return row[1:] if _ESCAPED.match(row) else row


def _line_number(rows: Sequence[str], top: int) -> tuple[int, int | None]:
    """(first row of the block's text, the start line) after Roo Code's line number rows, if there are any."""
    numbers: dict[str, int] = {}
    place = top
    while place < len(rows) and (found := _LINE_NUMBER.match(rows[place].strip())):
        numbers[found[1]] = int(found[2])
        place += 1
    if numbers and place < len(rows) and re.match(r"-{5,9}\s*$", rows[place]):
        place += 1
    return place, numbers.get("start")


def _possible_ends(rows: Sequence[str], top: int, form: BlockForm, count: int) -> tuple[list[int], bool]:
    """(rows that may end the block, whether they lack the label that its form requires)."""
    labels = {BlockForm.SEARCH: ("REPLACE",), BlockForm.ORIGINAL: ("UPDATE", "REPLACE"), BlockForm.CONFLICT: ("",)}[
        form
    ]
    labelled, others = [], []
    for place in range(top, len(rows)):
        row = rows[place].rstrip()
        bare = row.lstrip(">+")
        size = len(row) - len(bare)
        if not 5 <= size <= 9 or len(set(row[:size])) != 1 or (bare and not bare.startswith(" ") and row[0] == "+"):
            continue
        if bare.strip().upper().startswith(labels) and (
            form is not BlockForm.CONFLICT or (row[0] == ">" and size == count)
        ):
            labelled.append(place)
        elif row[0] == ">":
            others.append(place)
    if labelled:
        return labelled[:_MAX_ENDS], False
    following = next((place for place in range(top, len(rows)) if _is_opening_of(rows[place], form)), len(rows))
    return [place for place in others if place < following][-1:], True


def _is_opening_of(row: str, form: BlockForm) -> bool:
    found = parse_opening(row)
    return found is not None and found[0] is form


def _dividers(rows: Sequence[str], top: int, end: int, count: int) -> list[int]:
    """Rows that may divide the block: those with as many signs as its opening, or else with any number."""
    bars = [place for place in range(top, end) if re.match(r"={5,9}\s*$", rows[place])]
    return ([place for place in bars if len(rows[place].rstrip()) == count] or bars)[:_MAX_DIVIDERS]


def _choose_division(
    rows: Sequence[str], top: int, ends: list[int], count: int, finder: RowFinder
) -> tuple[int, int, bool] | None:
    """(divider, end, whether the choice is ambiguous) such that the file has the SEARCH part; None if none fits.

    A later end is tried only if stray delimiters follow the earlier one, or if the file itself holds such rows.
    """
    first: tuple[int, int, bool] | None = None
    for number, end in enumerate(ends):
        left = _has_stray_markers(rows, end + 1, count)
        if divided := _choose_divider(rows, top, end, count, finder, number > 0):
            division = (divided[0], end, divided[1])
            if not left:
                return division
            first = first or division
        if not left and number == 0 and not any(_is_delimiter(row, count) for row in finder.rows):
            return None
    return first


def _choose_divider(
    rows: Sequence[str], top: int, end: int, count: int, finder: RowFinder, exactly: bool
) -> tuple[int, bool] | None:
    """(divider, whether it is ambiguous) such that the file has the SEARCH part; None if none fits.

    If the text itself holds rows like a divider, several dividers may fit; the one with the longest SEARCH part is chosen. It
    is certain if the REPLACE part begins with a row of the SEARCH part, or if every shorter choice would insert delimiters.
    """
    dividers = _dividers(rows, top, end, count)
    found = [
        divider
        for divider in dividers
        if finder.find_exact(rows[top:divider])
        or (divider == top and not finder.rows)
        or (not exactly and len(dividers) > 1 and finder.find(rows[top:divider]))
    ]
    if not found:
        return None
    longest = found[-1]
    first = next((row for row in rows[longest + 1 : end] if row.strip()), None)
    sure = first is not None and first in rows[top:longest]
    broken = [_has_conflict_marks(rows[divider + 1 : end], count) for divider in found]
    sure |= all(broken[:-1]) and not broken[-1]
    if len(found) > 1:
        return longest, not sure
    after = {match.stop for match in finder.find(rows[top:longest])}
    runs_on = any(stop < len(finder.rows) and finder.rows[stop] == rows[longest] for stop in after)
    return longest, runs_on and longest != dividers[-1]


def _has_conflict_marks(rows: Sequence[str], count: int) -> bool:
    """Whether REPLACE rows hold conflict markers, or a row of "=" that underlines no title."""
    return any(
        re.match(r"[<>]{5,9}(?: |$)", row) or (row.rstrip() == "=" * count and not _underlines(rows, number))
        for number, row in enumerate(rows)
    )


def _has_stray_markers(rows: Sequence[str], place: int, count: int) -> bool:
    """Whether a divider or an end follows a block before the next one opens."""
    for row in rows[place:]:
        if parse_opening(row):
            return False
        if _is_delimiter(row, count) and (row[0] != "=" or len(row.rstrip()) == count):
            return True
    return False


def _is_delimiter(row: str, count: int) -> bool:
    """Whether the row looks like a delimiter: one that opens, divides or ends a block."""
    if row[:1] not in ("<", ">", "=", "-", "+"):
        return False
    bare = row.rstrip()
    return parse_opening(row) is not None or bare == "=" * count or bool(re.match(r"[>+]{5,9} ?REPLACE\b", bare))


def _conflict_side(
    old: list[str], count: int, number: int, finder: RowFinder, warnings: list[str]
) -> tuple[list[str], list[str]]:
    """The side of a conflict that the file has: "ours", or the base of a diff3 conflict. Adds a warning for diff3."""
    bars = [place for place, row in enumerate(old) if re.match(rf"\|{{{count}}}(?!\|)", row)]
    if not bars:
        return old, warnings
    ours, base = old[: bars[0]], old[bars[0] + 1 :]
    warnings = [*warnings, f"block {number} has three parts; the last was put in"]
    return (ours if finder.find(ours) or not finder.find(base) else base), warnings


def _file_name_above(rows: Sequence[str], first: int) -> str | None:
    """The file named above a block, with at most a fence and blank rows between."""
    for row in reversed(rows[max(0, first - 3) : first]):
        if row.strip() and not is_fence(row):
            return file_name(row)
    return None
