"""Edits of SEARCH/REPLACE blocks: each names rows of the file and what stands in their place."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

from paceline.errors import EditNotFound, EmptyEdit
from paceline.tasks.lines import Edited, Lines, Row
from paceline.tasks.places import Looseness, Match, Places, named
from paceline.tasks.runs import runs
from paceline.tasks.searches import (
    Block,
    Form,
    NotClosed,
    around,
    blocks_of,
    is_document,
    is_left_out,
    is_quoted,
    opening,
    rows_of,
)

_NUMBERED = re.compile(r"\s*(\d+)(?: *[|:→]|\t)")


@dataclass(frozen=True)
class _Change:
    """Rows `start` up to `stop` give way to `rows`."""

    start: int
    stop: int
    rows: tuple[str, ...]


def has_blocks(text: str, file: Lines) -> bool:
    """Whether the edit is a list of SEARCH/REPLACE blocks, and not a text that has some in it.

    Prose, fences and file names around blocks do not matter. Rows of the file around them make it a lazy edit.
    """
    rows = rows_of(text)
    if not any(map(opening, rows)):
        return False
    places = Places(file.rows)
    try:
        blocks = blocks_of(rows, places)
    except NotClosed as error:
        outside = around(rows[: error.first], [])
        return not is_document(outside, file.rows, False)
    if all(block.form is Form.CONFLICT for block in blocks):
        known = set(file.rows)
        blocks = [block for block in blocks if rows[block.first] not in known and _where(block, places)]
    if not blocks:
        return False
    openings = {rows[block.first] for block in blocks}
    found = openings.isdisjoint(file.rows) and all(_where(block, places) for block in blocks)
    outside = around(rows, blocks)
    if found and not is_quoted(rows, blocks) and not any(map(is_left_out, outside)):
        return True
    return not is_document(outside, file.rows, found)


def apply_blocks(file: Lines, text: str) -> Edited:
    """Puts each REPLACE part where its SEARCH part stands: exactly, else but for row ends, else at another indent.

    All blocks are looked for in the file as it is. Rows that both parts show stay the file's own.
    Raises EditNotFound naming the block that cannot be applied and why, EmptyEdit where nothing changes.
    """
    rows = rows_of(text)
    places = Places(file.rows)
    blocks = blocks_of(rows, places)
    if not blocks:
        raise EditNotFound("the edit has no SEARCH/REPLACE block")
    draft = _Draft(places)
    for number, block in enumerate(blocks, 1):
        draft.apply(block, number, blocks)
    draft.look_for_blocks_in_others(blocks)
    names = sorted({block.name for block in blocks if block.name})
    if len(names) > 1:
        draft.doubts.append(f"the blocks name several files: {', '.join(names)}")
    known = set(file.rows)
    if any(row in known and sum(map(str.isalnum, row)) >= 3 for row in around(rows, blocks)):
        draft.doubts.append("the edit has rows of the file around its blocks; they were left out")
    if draft.items == list(range(len(file.rows))):
        raise EmptyEdit("the edit changes nothing: what its blocks put in is what they take out")
    return Edited(draft.items, tuple(dict.fromkeys(draft.doubts)))


def _where(block: Block, places: Places) -> list[Match]:
    """Where the file has what the block shows, marked rows and blank ones at its ends off where it has to be."""
    if not any(row.strip() for row in block.old):
        return [] if places.rows else [Match(0, 0, Looseness.EXACT)]
    found = places.find(block.old)
    if not found and any(map(is_left_out, block.old)):
        found = places.find(_parts(block.old)[0])
    return found


class _Draft:
    """The file's rows while blocks are applied: `items` as a result has them, `makers` by which block (0: the file)."""

    def __init__(self, places: Places) -> None:
        self.places = places
        self.items: list[Row] = list(range(len(places.rows)))
        self.makers = [0] * len(places.rows)
        self.doubts: list[str] = []
        self.index: dict[int, int] | None = None  # where file rows stand in the draft; None once that has changed

    def apply(self, block: Block, number: int, blocks: Sequence[Block]) -> None:
        name = f"SEARCH block {number}"
        self.doubts += block.doubts
        if not any(row.strip() for row in block.old):
            if self.places.rows:
                raise EditNotFound(f"{name} shows no row of the file, so there is no place for what it puts in")
            self._put([_Change(len(self.items), len(self.items), block.new)], number)
            return
        if block.old == block.new:
            self.doubts.append(f"{name} changes nothing")
        found = self.places.find(block.old)
        if not found and (cut := _without_blank_ends(block)) != block and self.places.find(cut.old):
            self.doubts.append(f"{name} is found only without the blank rows at its ends")
            block, found = cut, self.places.find(cut.old)
        if not found:
            self._apply_unfound(block, number)
            return
        self._look_for_markers(block, name)
        match = self._one_of(found, block, number, blocks)
        self._place(match, block, number)

    def _one_of(self, found: list[Match], block: Block, number: int, blocks: Sequence[Block]) -> Match:
        """The place that is meant, with a doubt where nothing tells which one is."""
        name = f"SEARCH block {number}"
        if block.starts is not None:
            return self._at_line(found, block, block.starts - 1, name)
        if len(found) == 1:
            return found[0]
        alike = [each for each, other in enumerate(blocks, 1) if (other.old, other.new) == (block.old, block.new)]
        if len(alike) == len(found) and all(one.stop <= two.start for one, two in pairwise(found)):
            return found[alike.index(number)]
        starts = [match.start for match in found]
        self.doubts.append(f"{name} is found at {named(starts)}: which one is meant?")
        return next((match for match in found if self._span(match.start, match.stop) is not None), found[0])

    def _at_line(self, found: list[Match], block: Block, line: int, name: str) -> Match:
        match = min(found, key=lambda each: abs(each.start - line))
        looser = self.places.at(block.old, line) if match.start != line else None
        if looser:
            self.doubts.append(f"{name} is found at {named([line])} but for white space, and at {named([match.start])}")
            return looser
        if match.start != line and len(found) > 1:
            starts = [each.start for each in found]
            self.doubts.append(f"{name} is not at {named([line])}, but at {named(starts)}: which one is meant?")
        return match

    def _place(self, match: Match, block: Block, number: int) -> None:
        name = f"SEARCH block {number}"
        new, clear = match.reindented(block.new)
        if match.looseness == Looseness.SIGNS:
            self.doubts.append(
                f"{name} is found at {named([match.start])} only with spaces, quotes or other signs alike"
            )
        elif match.looseness == Looseness.RELATIVE:
            self.doubts.append(f"{name} is found at {named([match.start])} only with its indents off")
        elif not clear:
            self.doubts.append(f"the indent of what {name} puts in is not certain")
        if _already_there(self.places.rows, match, block):
            self.doubts.append(f"the file has already what {name} puts in at {named([match.start])}")
        changes = _changes(block.old, block.new, new, match.start)
        if self._span(match.start, match.stop) is None:
            self.doubts.append(f"{name} shows rows that an earlier block changes")
        moved = [self._moved(change) for change in changes]
        if any(change is None for change in moved):
            raise EditNotFound(f"{name} changes rows at {named([match.start])} that an earlier block changes too")
        self._put([change for change in moved if change is not None], number)

    def _apply_unfound(self, block: Block, number: int) -> None:
        """A block that the file as it is does not have: with left-out rows, or in what earlier blocks put in."""
        name = f"SEARCH block {number}"
        left_out = [sum(map(is_left_out, rows)) for rows in (block.old, block.new)]
        if any(left_out):
            if left_out[0] != left_out[1]:
                raise EditNotFound(
                    f"{name} leaves out rows {left_out[0]} times where it shows the file and {left_out[1]} times in their place"
                )
            self._apply_parts(block, number)
            return
        texts = [self._text(item) for item in self.items]
        found = Places(texts).find(block.old) if number > 1 else []
        if not found:
            raise EditNotFound(f"{name} {_why_not(self.places, block)}")
        self.doubts.append(f"{name} is found only in what an earlier block puts in")
        if len(found) > 1:
            self.doubts.append(f"{name} is found there in {len(found)} places")
        new, _ = found[0].reindented(block.new)
        self._put(_changes(block.old, block.new, new, found[0].start), number)

    def _apply_parts(self, block: Block, number: int) -> None:
        """Applies what stands between left-out rows, part by part, each behind the one before."""
        name = f"SEARCH block {number}"
        reached = 0
        for old, new in zip(_parts(block.old), _parts(block.new), strict=True):
            if not any(row.strip() for row in old):
                if any(row.strip() for row in new):
                    raise EditNotFound(f"{name} puts rows beside left-out ones and shows no row of the file there")
                continue
            part = replace(block, old=tuple(old), new=tuple(new), starts=None)
            found = [match for match in self.places.find(old) if match.start >= reached]
            if not found:
                raise EditNotFound(f"{name} {_why_not(self.places, part)}")
            if len(found) > 1:
                starts = [match.start for match in found]
                self.doubts.append(f"a part of {name} is found at {named(starts)}: which one is meant?")
            self._place(found[0], part, number)
            reached = found[0].stop

    def _look_for_markers(self, block: Block, name: str) -> None:
        shown = {row.strip() for row in block.old}
        for number, row in enumerate(block.new):
            stub = row.strip() == "..." and number > 0 and block.new[number - 1].rstrip().endswith(":")
            if is_left_out(row) and row.strip() not in shown and not stub:
                raise EditNotFound(
                    f"{name} leaves out rows in what it puts in ({row.strip()!r}), but not in what it shows"
                )

    def look_for_blocks_in_others(self, blocks: Sequence[Block]) -> None:
        """Doubts blocks that, each applied to what the ones before it made, would be found in what those put in."""
        if len(blocks) < 2:
            return
        after = Places([self._text(item) for item in self.items])
        changed = list(accumulate((maker > 0 for maker in self.makers), initial=0))
        for number, block in enumerate(blocks, 1):
            for start in after.exact(block.old):
                stop = start + len(block.old)
                if changed[start] == changed[stop]:
                    continue
                makers = set(self.makers[start:stop])
                if any(0 < maker < number for maker in makers) and number not in makers:
                    self.doubts.append(
                        f"what SEARCH block {number} shows is found in what an earlier block puts in, too"
                    )
                    break

    def _text(self, item: Row) -> str:
        return self.places.rows[item] if isinstance(item, int) else item

    def _index(self) -> dict[int, int]:
        if self.index is None:
            self.index = {item: place for place, item in enumerate(self.items) if isinstance(item, int)}
        return self.index

    def _span(self, start: int, stop: int) -> int | None:
        """Where in the draft these file rows begin, if all stand there as they were, side by side."""
        place = self._index().get(start)
        if place is None or self.items[place : place + stop - start] != list(range(start, stop)):
            return None
        return place

    def _moved(self, change: _Change) -> _Change | None:
        """A change of the file's rows as one of the draft's; None where an earlier block changed these."""
        if change.start < change.stop:
            place = self._span(change.start, change.stop)
            return None if place is None else replace(change, start=place, stop=place + change.stop - change.start)
        index = self._index()
        place = index.get(change.start)
        if place is None:
            before = index.get(change.start - 1)
            place = None if before is None else before + 1
        return None if place is None else replace(change, start=place, stop=place)

    def _put(self, changes: Sequence[_Change], maker: int) -> None:
        self.index = None
        for change in sorted(changes, key=lambda each: each.start, reverse=True):
            self.items[change.start : change.stop] = change.rows
            self.makers[change.start : change.stop] = [maker] * len(change.rows)


def _changes(old: Sequence[str], new: Sequence[str], shown: Sequence[str], start: int) -> list[_Change]:
    """What differs between the parts of a block at file row `start`; `shown` is `new` as it is to be written."""
    found = []
    reached = put = 0
    for here, there, size in [*runs(list(old), list(new)), (len(old), len(new), 0)]:
        if here > reached or there > put:
            found.append(_Change(start + reached, start + here, tuple(shown[put:there])))
        reached, put = here + size, there + size
    return found


def _parts(rows: Sequence[str]) -> list[list[str]]:
    """What stands between rows that mark left-out ones."""
    parts: list[list[str]] = [[]]
    for row in rows:
        if is_left_out(row):
            parts.append([])
        else:
            parts[-1].append(row)
    return parts


def _without_blank_ends(block: Block) -> Block:
    """The block without the blank rows that both of its parts begin and end with, and what only SEARCH has of them."""
    old, new = list(block.old), list(block.new)
    for place in (0, -1):
        while old and not old[place].strip():
            old.pop(place)
            if new and not new[place].strip():
                new.pop(place)
    return replace(block, old=tuple(old), new=tuple(new))


def _already_there(rows: Sequence[str], match: Match, block: Block) -> bool:
    """Whether a block that only adds rows finds these beside the ones it shows."""
    old, new = list(block.old), list(block.new)
    if len(new) <= len(old) or not any(row.strip() for row in new):
        return False
    if new[: len(old)] == old and list(rows[match.start : match.start + len(new)]) == new:
        return True
    start = match.stop - len(new)
    return start >= 0 and new[-len(old) :] == old and list(rows[start : match.stop]) == new


def _why_not(places: Places, block: Block) -> str:
    """Why a block does not match, as the end of a sentence."""
    first = next((row.strip() for row in block.old if row.strip()), "")
    numbers = [_NUMBERED.match(row) for row in block.old if row.strip()]
    if numbers and all(numbers):
        return f"has line numbers before its rows ({first!r}); leave them out"
    if any(row.strip() for row in block.new) and (found := places.find(block.new)):
        return (
            f"is applied already, it seems: what it puts in is at {named([found[0].start])}, what it shows is not there"
        )
    row = places.within_row(block.old)
    if row is not None:
        return f"is only a part of {named([row])}; a block shows whole lines"
    nearest = places.nearest(block.old)
    if nearest and len(block.old) > 1:
        place, number = nearest
        return (
            f"is not in the file: it has {block.old[number].strip()!r} where {named([place])} of the file "
            f"has {places.rows[place].strip()!r}"
        )
    return f"is not in the file; it begins {first!r}"
