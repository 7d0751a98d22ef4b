"""SEARCH/REPLACE blocks as models write them, read from an edit."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from paceline.errors import EditNotFound
from paceline.tasks.lines import Lines
from paceline.tasks.places import Places
from paceline.tasks.snippet import Marker, marker

_OPENING = re.compile(r"([<-])\1{4,8}(?: ?(SEARCH|ORIGINAL)\b.*| \S.*)?$", re.IGNORECASE)
_LINE_NUMBER = re.compile(r":(start|end)_line: ?(\d{1,9})$")
_ESCAPED = re.compile(r"\\([<=>-])\1{4,8}")  # as Roo writes a row that looks like a marker
_NAME = re.compile(r"[\w.~+@/\\-]*\w\.\w{1,12}$|[\w.~+@-]+(?:[/\\][\w.~+@-]+)+$|(?:Make|Docker|Gem|Rake)file$")
_CLOSINGS = 50  # how many ends of a block are tried
_SPLITS = 50  # and how many dividers


class Form(Enum):
    """What a block's first row calls it."""

    SEARCH = "SEARCH"  # closed by REPLACE
    ORIGINAL = "ORIGINAL"  # closed by UPDATED
    CONFLICT = ""  # as git marks a conflict


@dataclass(frozen=True)
class Block:
    """A block: the rows it shows and those in their place, and where it stands in the edit, first and last row.

    `starts` is the line number it names, from 1. `name` is the file it names. `doubts` are a sentence each.
    """

    old: tuple[str, ...]
    new: tuple[str, ...]
    first: int
    last: int
    form: Form
    starts: int | None = None
    name: str | None = None
    doubts: tuple[str, ...] = ()


class NotClosed(EditNotFound):
    """A block has no divider or no end. `first` is the row that opens it."""

    def __init__(self, number: int, first: int, lacks: str) -> None:
        super().__init__(f"SEARCH block {number} is not closed: it has no {lacks}")
        self.first = first


def opening(row: str) -> tuple[Form, str] | None:
    """The form and the signs of a row that opens a block."""
    found = _OPENING.match(row.rstrip())
    if not found:
        return None
    signs = row[: len(row) - len(row.lstrip(found[1]))]
    label = (found[2] or "").upper()
    if not label and found[1] == "-":
        return None
    return Form(label), signs


def blocks_of(rows: Sequence[str], places: Places) -> list[Block]:
    """The blocks of an edit, in order. Which divider and end are meant is told by what the file has.

    Raises NotClosed.
    """
    blocks: list[Block] = []
    place = 0
    while place < len(rows):
        found = opening(rows[place])
        if found and (found[0] is not Form.CONFLICT or _has_end(rows, place)):
            block = _block(rows, place, len(blocks) + 1, places)
            blocks.append(block)
            place = block.last
        place += 1
    return blocks


def rows_of(text: str) -> list[str]:
    """The rows of an edit, and where none of its blocks begins at the margin the markers of those that do not there."""
    rows = Lines.of(text).rows
    if any(map(opening, rows)) or not any(
        (found := opening(row.lstrip())) and found[0] is not Form.CONFLICT for row in rows
    ):
        return rows
    return [row.lstrip() if _is_border(row.lstrip(), 7) else row for row in rows]


def around(rows: Sequence[str], blocks: Sequence[Block]) -> list[str]:
    """The edit's rows outside its blocks that say something: no blank ones, no fences, no file names above a block."""
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


def is_quoted(rows: Sequence[str], blocks: Sequence[Block]) -> bool:
    """Whether a fence or a quote stands around a block."""
    inside = {number for block in blocks for number in range(block.first, block.last + 1)}
    quotes = ("`", "~~~", '"""', "'''")
    return any(quote in row for number, row in enumerate(rows) if number not in inside for quote in quotes)


def is_fence(row: str) -> bool:
    """Whether the row opens or closes a Markdown fence."""
    return row.strip().startswith(("```", "~~~"))


def file_name(row: str) -> str | None:
    """The file that a row over a block names, if it does nothing else."""
    text = row.strip().strip("`*#: ").removeprefix("File:").removeprefix("file:").strip("`*#: ")
    return text if _NAME.match(text) else None


def is_left_out(row: str) -> bool:
    """Whether the row stands for rows that are left out."""
    return marker(row) == Marker.CERTAIN


def is_document(outside: Sequence[str], rows: Sequence[str], found: bool) -> bool:
    """Whether the rows around blocks or hunks show that these are text of a lazy edit.

    They do where they are rows of the file, or stand for some. `found` says that the file has what the blocks show:
    then only most of them, or some beside a marker, do.
    """
    known = set(map(str.rstrip, rows))
    shown = sum(row.rstrip() in known and sum(map(str.isalnum, row)) >= 3 for row in outside)
    if any(map(is_left_out, outside)) and (shown or not found):
        return True
    return shown > 0 and (not found or shown * 2 >= len(outside))


def _has_end(rows: Sequence[str], place: int) -> bool:
    """Whether a conflict's opening is followed by a divider and an end with as many signs."""
    count = len(rows[place]) - len(rows[place].lstrip("<"))
    divider = False
    for row in rows[place + 1 :]:
        if opening(row):
            return False
        divider |= row.rstrip() == "=" * count
        if divider and re.match(rf">{{{count}}}(?!>)", row):
            return True
    return False


def _block(rows: Sequence[str], first: int, number: int, places: Places) -> Block:
    form, signs = opening(rows[first]) or (Form.SEARCH, "")
    top, starts = _line_number(rows, first + 1)
    ends, unusual = _ends(rows, top, form, len(signs))
    if not ends:
        raise NotClosed(number, first, "row that ends it, as '>>>>>>> REPLACE'")
    splits = _splits(rows, top, ends[0], len(signs))
    if not splits:
        raise NotClosed(number, first, "row of '=======' between its parts")
    chosen = _chosen(rows, top, ends, len(signs), places)
    divider, end, several = chosen or (splits[0], ends[0], False)
    old, new = list(rows[top:divider]), tuple(rows[divider + 1 : end])
    doubts = [f"the end of SEARCH block {number} is not marked REPLACE"] if unusual else []
    if several:
        doubts.append(f"SEARCH block {number} has several rows of '=' at which it may be divided")
    if any(map(_ESCAPED.match, (*old, *new))) and not places.exact(old):
        old, new = [_unescaped(row) for row in old], tuple(map(_unescaped, new))
    if form is Form.CONFLICT:
        old, doubts = _ours(old, len(signs), number, places, doubts)
    stray = [row for row in new if row not in old and _is_border(row, len(signs))]
    if any((found := opening(row)) and found[0] is form for row in stray):
        raise NotClosed(number, first, "end before the next block begins")
    if any(not set(row.rstrip()) <= {"="} for row in stray):
        doubts.append(f"SEARCH block {number} puts {stray[0]!r} into the file")
    doubts += [f"SEARCH block {number} is divided twice"] * _divided_twice(new, old, len(signs))
    return Block(tuple(old), new, first, end, form, starts, _name_over(rows, first), tuple(doubts))


def _divided_twice(new: Sequence[str], old: Sequence[str], count: int) -> bool:
    """Whether a divider in what is put in looks like one that was not meant as text: it underlines nothing, or is last."""
    return any(
        row.rstrip() == "=" * count and row not in old and (number + 1 == len(new) or not _underlines(new, number))
        for number, row in enumerate(new)
    )


def _underlines(rows: Sequence[str], number: int) -> bool:
    return number > 0 and any(map(str.isalnum, rows[number - 1]))


def _unescaped(row: str) -> str:
    return row[1:] if _ESCAPED.match(row) else row


def _line_number(rows: Sequence[str], top: int) -> tuple[int, int | None]:
    """Where a block's text begins after Roo's line numbers, and the first of these."""
    numbers: dict[str, int] = {}
    place = top
    while place < len(rows) and (found := _LINE_NUMBER.match(rows[place].strip())):
        numbers[found[1]] = int(found[2])
        place += 1
    if numbers and place < len(rows) and re.match(r"-{5,9}\s*$", rows[place]):
        place += 1
    return place, numbers.get("start")


def _ends(rows: Sequence[str], top: int, form: Form, count: int) -> tuple[list[int], bool]:
    """Rows that may end the block, and whether none has the label that its form asks for."""
    labels = {Form.SEARCH: ("REPLACE",), Form.ORIGINAL: ("UPDATE", "REPLACE"), Form.CONFLICT: ("",)}[form]
    labelled, others = [], []
    for place in range(top, len(rows)):
        row = rows[place].rstrip()
        bare = row.lstrip(">+")
        size = len(row) - len(bare)
        if not 5 <= size <= 9 or len(set(row[:size])) != 1 or (bare and not bare.startswith(" ") and row[0] == "+"):
            continue
        if bare.strip().upper().startswith(labels) and (form is not Form.CONFLICT or (row[0] == ">" and size == count)):
            labelled.append(place)
        elif row[0] == ">":
            others.append(place)
    if labelled:
        return labelled[:_CLOSINGS], False
    following = next((place for place in range(top, len(rows)) if _opens(rows[place], form)), len(rows))
    return [place for place in others if place < following][-1:], True


def _opens(row: str, form: Form) -> bool:
    found = opening(row)
    return found is not None and found[0] is form


def _splits(rows: Sequence[str], top: int, end: int, count: int) -> list[int]:
    """Rows that may divide the block: of as many signs as opened it, or else of any number."""
    bars = [place for place in range(top, end) if re.match(r"={5,9}\s*$", rows[place])]
    return ([place for place in bars if len(rows[place].rstrip()) == count] or bars)[:_SPLITS]


def _chosen(rows: Sequence[str], top: int, ends: list[int], count: int, places: Places) -> tuple[int, int, bool] | None:
    """The divider and the end between which the file has what the block shows, and whether another may be meant.

    A later end is taken only where markers are left over behind an earlier one, or the file has such rows itself.
    """
    first: tuple[int, int, bool] | None = None
    for number, end in enumerate(ends):
        left = _left_over(rows, end + 1, count)
        if divided := _divided(rows, top, end, count, places, number > 0):
            chosen = (divided[0], end, divided[1])
            if not left:
                return chosen
            first = first or chosen
        if not left and number == 0 and not any(_is_border(row, count) for row in places.rows):
            return None
    return first


def _divided(
    rows: Sequence[str], top: int, end: int, count: int, places: Places, exactly: bool
) -> tuple[int, bool] | None:
    """The divider at which the file has what the block shows, and whether that leaves a doubt.

    A row of the text that looks like a divider makes a shorter part be found as well: the longest is meant. That is sure
    where what is put in begins with a row of it, or where the shorter reading would put such marks in as text.
    """
    splits = _splits(rows, top, end, count)
    found = [
        divider
        for divider in splits
        if places.exact(rows[top:divider])
        or (divider == top and not places.rows)
        or (not exactly and len(splits) > 1 and places.find(rows[top:divider]))
    ]
    if not found:
        return None
    longest = found[-1]
    first = next((row for row in rows[longest + 1 : end] if row.strip()), None)
    sure = first is not None and first in rows[top:longest]
    broken = [_is_broken(rows[divider + 1 : end], count) for divider in found]
    sure |= all(broken[:-1]) and not broken[-1]
    if len(found) > 1:
        return longest, not sure
    after = {match.stop for match in places.find(rows[top:longest])}
    runs_on = any(stop < len(places.rows) and places.rows[stop] == rows[longest] for stop in after)
    return longest, runs_on and longest != splits[-1]


def _is_broken(rows: Sequence[str], count: int) -> bool:
    """Whether what would be put in has marks of a conflict, or a row of "=" that underlines nothing."""
    return any(
        re.match(r"[<>]{5,9}(?: |$)", row) or (row.rstrip() == "=" * count and not _underlines(rows, number))
        for number, row in enumerate(rows)
    )


def _left_over(rows: Sequence[str], place: int, count: int) -> bool:
    """Whether a divider or an end stands behind a block before the next one opens."""
    for row in rows[place:]:
        if opening(row):
            return False
        if _is_border(row, count) and (row[0] != "=" or len(row.rstrip()) == count):
            return True
    return False


def _is_border(row: str, count: int) -> bool:
    """Whether the row looks like a marker of a block: opens it, divides it or ends it."""
    if row[:1] not in ("<", ">", "=", "-", "+"):
        return False
    bare = row.rstrip()
    return opening(row) is not None or bare == "=" * count or bool(re.match(r"[>+]{5,9} ?REPLACE\b", bare))


def _ours(old: list[str], count: int, number: int, places: Places, doubts: list[str]) -> tuple[list[str], list[str]]:
    """The part of a conflict that the file has: the first, or with diff3's third part that one."""
    bars = [place for place, row in enumerate(old) if re.match(rf"\|{{{count}}}(?!\|)", row)]
    if not bars:
        return old, doubts
    ours, base = old[: bars[0]], old[bars[0] + 1 :]
    doubts = [*doubts, f"block {number} has three parts; the last was put in"]
    return (ours if places.find(ours) or not places.find(base) else base), doubts


def _name_over(rows: Sequence[str], first: int) -> str | None:
    """The file named over a block, beyond a fence and a blank row."""
    for row in reversed(rows[max(0, first - 3) : first]):
        if row.strip() and not is_fence(row):
            return file_name(row)
    return None
