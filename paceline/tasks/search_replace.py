"""Applies an edit of SEARCH/REPLACE blocks: each shows rows of the file and the rows to put in their place."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

from paceline.errors import EditNotFound, EmptyEdit
from paceline.tasks.lines import EditResult, Lines, ResultRow
from paceline.tasks.matching_blocks import matching_blocks
from paceline.tasks.row_finder import RowFinder, RowMatch, Tolerance, format_lines
from paceline.tasks.search_replace_parser import (
    BlockForm,
    SearchBlock,
    UnclosedBlock,
    edit_rows,
    is_certain_marker,
    is_part_of_snippet,
    is_quoted,
    parse_blocks,
    parse_opening,
    rows_outside,
)

_NUMBERED = re.compile(r"\s*(\d+)(?: *[|:→]|\t)")


@dataclass(frozen=True)
class _BlockChange:
    """Rows `start:stop` are replaced by `rows`."""

    start: int
    stop: int
    rows: tuple[str, ...]


def has_blocks(text: str, file: Lines) -> bool:
    """Whether the edit is a list of SEARCH/REPLACE blocks, and not a text that contains some.

    Prose, fences and file names around blocks are ignored. Rows of the file around them make the edit a lazy snippet.
    """
    rows = edit_rows(text)
    if not any(map(parse_opening, rows)):
        return False
    finder = RowFinder(file.rows)
    try:
        blocks = parse_blocks(rows, finder)
    except UnclosedBlock as error:
        outside = rows_outside(rows[: error.first], [])
        return not is_part_of_snippet(outside, file.rows, False)
    if all(block.form is BlockForm.CONFLICT for block in blocks):
        known = set(file.rows)
        blocks = [block for block in blocks if rows[block.first] not in known and _matches_of(block, finder)]
    if not blocks:
        return False
    openings = {rows[block.first] for block in blocks}
    found = openings.isdisjoint(file.rows) and all(_matches_of(block, finder) for block in blocks)
    outside = rows_outside(rows, blocks)
    if found and not is_quoted(rows, blocks) and not any(map(is_certain_marker, outside)):
        return True
    return not is_part_of_snippet(outside, file.rows, found)


def apply_blocks(file: Lines, text: str) -> EditResult:
    """Replaces each block's SEARCH part by its REPLACE part. Looks for the exact text first, then with growing tolerance.

    All blocks are searched for in the unchanged file. Rows that both parts of a block have stay the file's own. Raises
    EditNotFound, which names the block that cannot be applied and why, and EmptyEdit if nothing changes.
    """
    rows = edit_rows(text)
    finder = RowFinder(file.rows)
    blocks = parse_blocks(rows, finder)
    if not blocks:
        raise EditNotFound("the edit has no SEARCH/REPLACE block")
    applier = _BlockApplier(finder)
    for number, block in enumerate(blocks, 1):
        applier.apply(block, number, blocks)
    applier.warn_of_chained_blocks(blocks)
    names = sorted({block.name for block in blocks if block.name})
    if len(names) > 1:
        applier.warnings.append(f"the blocks name several files: {', '.join(names)}")
    known = set(file.rows)
    if any(row in known and sum(map(str.isalnum, row)) >= 3 for row in rows_outside(rows, blocks)):
        applier.warnings.append("the edit has rows of the file around its blocks; they were left out")
    if applier.rows == list(range(len(file.rows))):
        raise EmptyEdit("the edit changes nothing: what its blocks put in is what they take out")
    return EditResult(applier.rows, tuple(dict.fromkeys(applier.warnings)))


def _matches_of(block: SearchBlock, finder: RowFinder) -> list[RowMatch]:
    """Where the file has the block's SEARCH part; for one with markers, where it has the rows before the first marker."""
    if not any(row.strip() for row in block.old):
        return [] if finder.rows else [RowMatch(0, 0, Tolerance.EXACT)]
    found = finder.find(block.old)
    if not found and any(map(is_certain_marker, block.old)):
        found = finder.find(_parts(block.old)[0])
    return found


class _BlockApplier:
    """Applies blocks one after the other to a draft. `rows` are the draft's result rows.

    `made_by` says for each of them the number of the block that inserted it, 0 for a row of the file.
    """

    def __init__(self, finder: RowFinder) -> None:
        self.finder = finder
        self.rows: list[ResultRow] = list(range(len(finder.rows)))
        self.made_by = [0] * len(finder.rows)
        self.warnings: list[str] = []
        self.index: dict[int, int] | None = None  # draft position of each file row; None: outdated

    def apply(self, block: SearchBlock, number: int, blocks: Sequence[SearchBlock]) -> None:
        """Applies one of `blocks`, the one with this number (from 1). Raises EditNotFound."""
        name = f"SEARCH block {number}"
        self.warnings += block.warnings
        if not any(row.strip() for row in block.old):
            if self.finder.rows:
                raise EditNotFound(f"{name} shows no row of the file, so there is no place for what it puts in")
            self._apply_changes([_BlockChange(len(self.rows), len(self.rows), block.new)], number)
            return
        if block.old == block.new:
            self.warnings.append(f"{name} changes nothing")
        found = self.finder.find(block.old)
        if not found and (cut := _without_blank_ends(block)) != block and self.finder.find(cut.old):
            self.warnings.append(f"{name} is found only without the blank rows at its ends")
            block, found = cut, self.finder.find(cut.old)
        if not found:
            self._apply_unfound(block, number)
            return
        self._refuse_markers(block, name)
        match = self._choose_match(found, block, number, blocks)
        self._apply_at(match, block, number)

    def _choose_match(
        self, found: list[RowMatch], block: SearchBlock, number: int, blocks: Sequence[SearchBlock]
    ) -> RowMatch:
        """The match to use, with a warning if several are equally good."""
        name = f"SEARCH block {number}"
        if block.start_line is not None:
            return self._match_nearest_line(found, block, block.start_line - 1, name)
        if len(found) == 1:
            return found[0]
        alike = [each for each, other in enumerate(blocks, 1) if (other.old, other.new) == (block.old, block.new)]
        if len(alike) == len(found) and all(one.stop <= two.start for one, two in pairwise(found)):
            return found[alike.index(number)]
        starts = [match.start for match in found]
        self.warnings.append(f"{name} is found at {format_lines(starts)}: which one is meant?")
        return next((match for match in found if self._draft_position(match.start, match.stop) is not None), found[0])

    def _match_nearest_line(self, found: list[RowMatch], block: SearchBlock, line: int, name: str) -> RowMatch:
        """The match at the line that the block names, or else the nearest one, with a warning."""
        match = min(found, key=lambda each: abs(each.start - line))
        looser = self.finder.match_at(block.old, line) if match.start != line else None
        if looser:
            self.warnings.append(
                f"{name} is found at {format_lines([line])} but for white space, and at {format_lines([match.start])}"
            )
            return looser
        if match.start != line and len(found) > 1:
            starts = [each.start for each in found]
            self.warnings.append(
                f"{name} is not at {format_lines([line])}, but at {format_lines(starts)}: which one is meant?"
            )
        return match

    def _apply_at(self, match: RowMatch, block: SearchBlock, number: int) -> None:
        """Applies the block at a match, with warnings. Raises EditNotFound if an earlier block changed the same rows."""
        name = f"SEARCH block {number}"
        new, clear = match.reindented(block.new)
        if match.tolerance == Tolerance.TYPOGRAPHY:
            self.warnings.append(
                f"{name} is found at {format_lines([match.start])} only with spaces, quotes or other signs alike"
            )
        elif match.tolerance == Tolerance.RELATIVE:
            self.warnings.append(f"{name} is found at {format_lines([match.start])} only with its indents off")
        elif not clear:
            self.warnings.append(f"the indent of what {name} puts in is not certain")
        if _is_already_applied(self.finder.rows, match, block):
            self.warnings.append(f"the file has already what {name} puts in at {format_lines([match.start])}")
        changes = _changes(block.old, block.new, new, match.start)
        if self._draft_position(match.start, match.stop) is None:
            self.warnings.append(f"{name} shows rows that an earlier block changes")
        moved = [self._in_draft(change) for change in changes]
        if any(change is None for change in moved):
            raise EditNotFound(
                f"{name} changes rows at {format_lines([match.start])} that an earlier block changes too"
            )
        self._apply_changes([change for change in moved if change is not None], number)

    def _apply_unfound(self, block: SearchBlock, number: int) -> None:
        """Applies a block that the unchanged file does not have: one with markers, or one found in rows of earlier blocks."""
        name = f"SEARCH block {number}"
        left_out = [sum(map(is_certain_marker, rows)) for rows in (block.old, block.new)]
        if any(left_out):
            if left_out[0] != left_out[1]:
                raise EditNotFound(
                    f"{name} leaves out rows {left_out[0]} times where it shows the file and {left_out[1]} times in their place"
                )
            self._apply_marked_parts(block, number)
            return
        texts = [self._text_of(item) for item in self.rows]
        found = RowFinder(texts).find(block.old) if number > 1 else []
        if not found:
            raise EditNotFound(f"{name} {_why_not(self.finder, block)}")
        self.warnings.append(f"{name} is found only in what an earlier block puts in")
        if len(found) > 1:
            self.warnings.append(f"{name} is found there in {len(found)} places")
        new, _ = found[0].reindented(block.new)
        self._apply_changes(_changes(block.old, block.new, new, found[0].start), number)

    def _apply_marked_parts(self, block: SearchBlock, number: int) -> None:
        """Applies a block with markers part by part. Each part must match after the one before."""
        name = f"SEARCH block {number}"
        reached = 0
        for old, new in zip(_parts(block.old), _parts(block.new), strict=True):
            if not any(row.strip() for row in old):
                if any(row.strip() for row in new):
                    raise EditNotFound(f"{name} puts rows beside left-out ones and shows no row of the file there")
                continue
            part = replace(block, old=tuple(old), new=tuple(new), start_line=None)
            found = [match for match in self.finder.find(old) if match.start >= reached]
            if not found:
                raise EditNotFound(f"{name} {_why_not(self.finder, part)}")
            if len(found) > 1:
                starts = [match.start for match in found]
                self.warnings.append(f"a part of {name} is found at {format_lines(starts)}: which one is meant?")
            self._apply_at(found[0], part, number)
            reached = found[0].stop

    def _refuse_markers(self, block: SearchBlock, name: str) -> None:
        """Raises EditNotFound for a marker in the REPLACE part that the SEARCH part does not have."""
        shown = {row.strip() for row in block.old}
        for number, row in enumerate(block.new):
            stub = row.strip() == "..." and number > 0 and block.new[number - 1].rstrip().endswith(":")
            if is_certain_marker(row) and row.strip() not in shown and not stub:
                raise EditNotFound(
                    f"{name} leaves out rows in what it puts in ({row.strip()!r}), but not in what it shows"
                )

    def warn_of_chained_blocks(self, blocks: Sequence[SearchBlock]) -> None:
        """Warns of each block that would match rows inserted by an earlier block, if blocks were applied in sequence."""
        if len(blocks) < 2:
            return
        after = RowFinder([self._text_of(item) for item in self.rows])
        changed = list(accumulate((block_number > 0 for block_number in self.made_by), initial=0))
        for number, block in enumerate(blocks, 1):
            for start in after.find_exact(block.old):
                stop = start + len(block.old)
                if changed[start] == changed[stop]:
                    continue
                made_by = set(self.made_by[start:stop])
                if any(0 < block_number < number for block_number in made_by) and number not in made_by:
                    self.warnings.append(
                        f"what SEARCH block {number} shows is found in what an earlier block puts in, too"
                    )
                    break

    def _text_of(self, item: ResultRow) -> str:
        return self.finder.rows[item] if isinstance(item, int) else item

    def _draft_positions(self) -> dict[int, int]:
        """The draft position of every file row that is still in the draft."""
        if self.index is None:
            self.index = {item: place for place, item in enumerate(self.rows) if isinstance(item, int)}
        return self.index

    def _draft_position(self, start: int, stop: int) -> int | None:
        """The draft position of file rows `start:stop`; None if an earlier block changed or separated them."""
        place = self._draft_positions().get(start)
        if place is None or self.rows[place : place + stop - start] != list(range(start, stop)):
            return None
        return place

    def _in_draft(self, change: _BlockChange) -> _BlockChange | None:
        """A change of file rows as one of draft rows; None if an earlier block changed those rows."""
        if change.start < change.stop:
            place = self._draft_position(change.start, change.stop)
            return None if place is None else replace(change, start=place, stop=place + change.stop - change.start)
        index = self._draft_positions()
        place = index.get(change.start)
        if place is None:
            before = index.get(change.start - 1)
            place = None if before is None else before + 1
        return None if place is None else replace(change, start=place, stop=place)

    def _apply_changes(self, changes: Sequence[_BlockChange], block_number: int) -> None:
        """Applies changes of draft rows on behalf of a block."""
        self.index = None
        for change in sorted(changes, key=lambda each: each.start, reverse=True):
            self.rows[change.start : change.stop] = change.rows
            self.made_by[change.start : change.stop] = [block_number] * len(change.rows)


def _changes(old: Sequence[str], new: Sequence[str], reindented: Sequence[str], start: int) -> list[_BlockChange]:
    """The changes between a block's parts, which match at file row `start`. `reindented` is `new` at the file's indent."""
    found = []
    reached = put = 0
    for here, there, size in [*matching_blocks(list(old), list(new)), (len(old), len(new), 0)]:
        if here > reached or there > put:
            found.append(_BlockChange(start + reached, start + here, tuple(reindented[put:there])))
        reached, put = here + size, there + size
    return found


def _parts(rows: Sequence[str]) -> list[list[str]]:
    """The runs of rows between markers."""
    parts: list[list[str]] = [[]]
    for row in rows:
        if is_certain_marker(row):
            parts.append([])
        else:
            parts[-1].append(row)
    return parts


def _without_blank_ends(block: SearchBlock) -> SearchBlock:
    """The block without the blank rows at the ends of its SEARCH part, and without as many in its REPLACE part."""
    old, new = list(block.old), list(block.new)
    for place in (0, -1):
        while old and not old[place].strip():
            old.pop(place)
            if new and not new[place].strip():
                new.pop(place)
    return replace(block, old=tuple(old), new=tuple(new))


def _is_already_applied(rows: Sequence[str], match: RowMatch, block: SearchBlock) -> bool:
    """Whether the file already has the rows that a purely inserting block adds, beside the rows it shows."""
    old, new = list(block.old), list(block.new)
    if len(new) <= len(old) or not any(row.strip() for row in new):
        return False
    if new[: len(old)] == old and list(rows[match.start : match.start + len(new)]) == new:
        return True
    start = match.stop - len(new)
    return start >= 0 and new[-len(old) :] == old and list(rows[start : match.stop]) == new


def _why_not(finder: RowFinder, block: SearchBlock) -> str:
    """The reason why a block does not match, as the end of a sentence."""
    first = next((row.strip() for row in block.old if row.strip()), "")
    numbers = [_NUMBERED.match(row) for row in block.old if row.strip()]
    if numbers and all(numbers):
        return f"has line numbers before its rows ({first!r}); send the rows without them"
    if any(row.strip() for row in block.new) and (found := finder.find(block.new)):
        line = format_lines([found[0].start])
        return f"is applied already, it seems: what it puts in is at {line}, what it shows is not there"
    row = finder.within_row(block.old)
    if row is not None:
        return f"is only a part of {format_lines([row])}; a block must show whole lines"
    nearest = finder.nearest_difference(block.old)
    if nearest and len(block.old) > 1:
        place, number = nearest
        return (
            f"is not in the file: it has {block.old[number].strip()!r} where {format_lines([place])} of the file "
            f"has {finder.rows[place].strip()!r}"
        )
    return f"is not in the file; it begins {first!r}"
