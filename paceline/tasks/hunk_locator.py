"""Locates a diff's hunks in a file: at their line numbers, or where the file has the rows that they show."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from paceline.errors import EditNotFound
from paceline.tasks.diff_parser import Hunk, HunkRow
from paceline.tasks.lines import Lines
from paceline.tasks.row_finder import RowFinder, RowMatch, Tolerance, format_lines, margin
from paceline.tasks.search_replace_parser import is_certain_marker


@dataclass(frozen=True)
class LocatedHunk:
    """A hunk and its match in the file. `ambiguous`: the file has other equal matches."""

    hunk: Hunk
    match: RowMatch
    ambiguous: bool = False


class HunkLocator:
    """Locates hunks. `same_file`: the diff was made from this very content; `other_version`: it was made from another."""

    def __init__(self, file: Lines, same_file: bool, other_version: bool) -> None:
        self.finder = RowFinder(file.rows)
        self.same_file = same_file
        self.other_version = other_version
        self.warnings: list[str] = []

    def locate(self, hunks: Sequence[Hunk]) -> list[LocatedHunk]:
        """The hunks with their matches. Adds to `warnings`. Raises EditNotFound for a hunk that matches nowhere."""
        located = [self._at_line_number(hunk) for hunk in hunks]
        if all(located) and all(one.match.stop <= two.match.start for one, two in pairwise(filter(None, located))):
            found = [each for each in located if each]
            self._warn_at_line_numbers(found)
            return found
        return self._search_all(hunks)

    def _at_line_number(self, hunk: Hunk) -> LocatedHunk | None:
        """The hunk at its line number, if its header is consistent and the file has exactly its rows there."""
        old, size = hunk.old, len(self.finder.rows)
        if hunk.start is None or not hunk.counts_match:
            return None
        start = hunk.start - 1 if old else hunk.start
        if not 0 <= start <= size or self.finder.rows[start : start + len(old)] != old:
            return None
        if lacks_final_newline(hunk, "-") and start + len(old) != size:
            return None
        return LocatedHunk(hunk, RowMatch(start, start + len(old), Tolerance.EXACT))

    def _warn_at_line_numbers(self, located: Sequence[LocatedHunk]) -> None:
        """Warnings about hunks that were all located at their line numbers."""
        if self.same_file:
            return
        shown = any(each.hunk.old for each in located)
        for number, each in enumerate(located, 1):
            where = each.match.start
            if not each.hunk.old and not self._is_under_heading(each.hunk, where):
                self.warnings.append(
                    f"hunk {number} stands under {each.hunk.headings[0]!r}, the line it names does not"
                )
            elif not shown and self.other_version:
                self.warnings.append(f"hunk {number} shows no row of the file, and was made from another state of it")
            elif each.hunk.old and self._is_already_applied(each):
                self.warnings.append(f"the file has already what hunk {number} puts in at {format_lines([where])}")

    def _is_already_applied(self, located: LocatedHunk) -> bool:
        """Whether the file already has the rows that the hunk inserts, at its place."""
        start, new = located.match.start, located.hunk.new
        added = any(row.sign == "+" and row.text.strip() for row in located.hunk.rows)
        return added and len(new) > len(located.hunk.old) and self.finder.rows[start : start + len(new)] == new

    def _is_under_heading(self, hunk: Hunk, where: int) -> bool:
        """Whether a row above `where` begins with the hunk's heading, which git truncates."""
        if not hunk.headings:
            return True
        heading = hunk.headings[0].rstrip("\ufffd").rstrip()
        return any(row.startswith(heading) for row in reversed(self.finder.rows[:where]))

    def _search_all(self, hunks: Sequence[Hunk]) -> list[LocatedHunk]:
        """Searches for every hunk. `drift` is the distance of the last match from its line number."""
        located: list[LocatedHunk] = []
        drift = reached = 0
        for number, hunk in enumerate(hunks, 1):
            found = self._search(hunk, number, drift, reached) if hunk.old else self._locate_added(hunk, number, drift)
            located.append(found)
            reached = max(reached, found.match.stop)
            if hunk.start is not None and hunk.old:
                drift = found.match.start - (hunk.start - 1)
            if hunk.old and self._is_already_applied(found):
                self.warnings.append(
                    f"the file has already what hunk {number} puts in at {format_lines([found.match.start])}"
                )
        self._warn_of_offsets(located)
        return located

    def _locate_added(self, hunk: Hunk, number: int, drift: int) -> LocatedHunk:
        """Locates a hunk that shows no row of the file, by its line number or its heading."""
        size = len(self.finder.rows)
        if hunk.start is not None:
            where = hunk.start + drift if hunk.count == 0 else hunk.start - 1 + drift
            if not 0 <= where <= size:
                raise EditNotFound(f"hunk {number} adds rows behind line {hunk.start}, but the file has {size} lines")
            if size:
                self.warnings.append(f"hunk {number} shows no row of the file, so its place is told by a number only")
        elif hunk.at_end or not size:
            where = size
        elif hunk.headings:
            inside = self._heading_ranges(hunk.headings)
            if not inside:
                raise EditNotFound(f"hunk {number} adds rows under {hunk.headings[-1]!r}, which is not in the file")
            where = inside[0][0] + 1
            self.warnings.append(
                f"hunk {number} shows no row of the file; what it adds was put under {hunk.headings[-1]!r}"
            )
        else:
            raise EditNotFound(f"hunk {number} adds rows, but shows neither a row of the file nor a line number")
        return LocatedHunk(hunk, RowMatch(where, where, Tolerance.EXACT))

    def _search(self, hunk: Hunk, number: int, drift: int, reached: int) -> LocatedHunk:
        """Locates a hunk by the rows it shows. Of equal matches those at or after row `reached` are preferred."""
        hunk, found = self._candidates(hunk, number)
        name, size = f"hunk {number}", len(self.finder.rows)
        if hunk.at_end or lacks_final_newline(hunk, "-"):
            last = [match for match in found if match.stop == size]
            if not last:
                self.warnings.append(f"{name} is at the end of its file, but not of this one")
            found = last or found
        match = found[0]
        if hunk.start is not None:
            match, found = self._match_by_line_number(hunk, found, hunk.start - 1 + drift, name)
        elif len(found) > 1:
            inside = self._matches_under_headings(hunk, found, name)
            later = [each for each in inside if each.start >= reached] or inside
            match = later[0]
            if len(inside) > 1:
                starts = [each.start for each in inside]
                self.warnings.append(f"{name} is found at {format_lines(starts)}: which one is meant?")
        elif hunk.headings:
            self._matches_under_headings(hunk, found, name)
        if match.tolerance == Tolerance.TYPOGRAPHY:
            self.warnings.append(
                f"{name} is found at {format_lines([match.start])} only with spaces, quotes or other signs alike"
            )
        elif match.tolerance == Tolerance.RELATIVE:
            self.warnings.append(f"{name} is found at {format_lines([match.start])} only with its indents off")
        return LocatedHunk(self._with_file_indent(hunk, match, name), match, len(found) > 1)

    def _candidates(self, hunk: Hunk, number: int) -> tuple[Hunk, list[RowMatch]]:
        """(hunk, its matches), with the hunk as it is, without blank context rows at its ends, or with a lost "+" restored."""
        found = self.finder.find(hunk.old)
        if found and any(row.strip() for row in hunk.old):
            return hunk, found
        rows = list(hunk.rows)
        for end in (0, -1):
            while rows and rows[end].sign == " " and not rows[end].text.strip():
                rows.pop(end)
        cut = replace(hunk, rows=tuple(rows))
        if not found and any(row.strip() for row in cut.old) and cut.rows != hunk.rows:
            found = self.finder.find(cut.old)
            if found:
                return cut, found
        if found:
            return hunk, found
        lost = replace(hunk, rows=tuple(_with_signs(hunk)))
        if lost.rows != hunk.rows and lost.old and (found := self.finder.find(lost.old)):
            self.warnings.append(f"hunk {number} is found only if a blank row of it, which has no sign, is a new one")
            return lost, found
        raise EditNotFound(f"hunk {number} {self._why_not(hunk)}")

    def _match_by_line_number(
        self, hunk: Hunk, found: list[RowMatch], expected: int, name: str
    ) -> tuple[RowMatch, list[RowMatch]]:
        """(the match at or nearest to the line number, all matches). Warns if the number does not decide."""
        starts = [match.start for match in found]
        if expected in starts:
            if len(found) > 1 and not hunk.counts_match:
                self.warnings.append(f"{name} is found at {format_lines(starts)}, and its header's counts are wrong")
            return found[starts.index(expected)], found
        looser = self.finder.match_at(hunk.old, expected)
        if looser:
            self.warnings.append(
                f"{name} is at {format_lines([expected])} but for white space, and at {format_lines(starts)}"
            )
            return looser, found
        if len(found) > 1:
            inside = self._matches_under_headings(hunk, found, name) if hunk.headings else found
            match = min(inside, key=lambda each: abs(each.start - expected))
            self.warnings.append(
                f"{name} is not at the line it names, but at {format_lines(starts)}: which one is meant?"
            )
            return match, found
        return found[0], found

    def _matches_under_headings(self, hunk: Hunk, found: list[RowMatch], name: str) -> list[RowMatch]:
        """The matches in the scope of the hunk's headings, else those after the first heading, else all, with a warning."""
        if not hunk.headings:
            return found
        inside = self._heading_ranges(hunk.headings)
        covered = bytearray(len(self.finder.rows))
        for first, stop in inside:
            covered[first:stop] = b"\1" * (stop - first)
        within = [match for match in found if covered[match.start]]
        if within:
            return within
        after = [match for match in found if inside and match.start >= inside[0][0]]
        if not after and hunk.start is None:
            self.warnings.append(f"{name} is not under a row {hunk.headings[-1]!r}")
        return after or found

    def _heading_ranges(self, headings: Sequence[str]) -> list[tuple[int, int]]:
        """The scopes of the innermost heading, within those of the outer ones. Each range begins with its heading."""
        ranges = [(0, len(self.finder.rows))]
        for heading in headings:
            text = heading.strip()
            for same in (str.__eq__, str.startswith):
                rows = [
                    row
                    for first, stop in ranges
                    for row in range(first, stop)
                    if same(self.finder.rows[row].strip(), text)
                ]
                if rows:
                    break
            ranges = [(row, self._scope_end(row)) for row in dict.fromkeys(rows)]
        return ranges

    def _scope_end(self, row: int) -> int:
        """The end (exclusive) of the scope of a heading: the next row indented no deeper, except for closing brackets."""
        rows = self.finder.rows
        depth = len(margin(rows[row]).expandtabs(4))
        for number in range(row + 1, len(rows)):
            text = rows[number].strip()
            if text and len(margin(rows[number]).expandtabs(4)) <= depth and text[0] not in ")]}{":
                return number
        return len(rows)

    def _with_file_indent(self, hunk: Hunk, match: RowMatch, name: str) -> Hunk:
        """The hunk with its inserted rows at the file's indent."""
        added = [row.text for row in hunk.rows if row.sign == "+"]
        shifted, clear = match.reindented(added)
        if not clear and match.tolerance < Tolerance.TYPOGRAPHY:
            self.warnings.append(f"the indent of what {name} puts in is not certain")
        texts = iter(shifted)
        return replace(
            hunk, rows=tuple(replace(row, text=next(texts)) if row.sign == "+" else row for row in hunk.rows)
        )

    def _warn_of_offsets(self, located: Sequence[LocatedHunk]) -> None:
        """Warns of an ambiguous hunk whose offset from its line number differs from the unambiguous ones beside it."""
        sure = [
            each.match.start - each.hunk.start + 1 if each.hunk.start is not None and not each.ambiguous else None
            for each in located
        ]
        for number, each in enumerate(located):
            if not each.ambiguous or each.hunk.start is None:
                continue
            before = next((off for off in reversed(sure[:number]) if off is not None), None)
            after = next((off for off in sure[number + 1 :] if off is not None), None)
            offset = each.match.start - each.hunk.start + 1
            if any(other not in (None, offset) for other in (before, after)):
                self.warnings.append(f"hunk {number + 1} has other places as good, and its line number is off")

    def _why_not(self, hunk: Hunk) -> str:
        """The reason why a hunk does not match, as the end of a sentence."""
        new, old = hunk.new, hunk.old
        if any(row.strip() for row in new) and (found := self.finder.find(new)):
            return f"is applied already: what it makes is at {format_lines([found[0].start])}"
        if left_out := next((row.strip() for row in old if is_certain_marker(row)), None):
            return f"leaves out rows ({left_out!r}); a hunk shows all rows from its first to its last"
        nearest = self.finder.nearest_difference(old)
        if nearest:
            file_row, row = nearest
            text = self.finder.rows[file_row].strip()
            return (
                f"does not match: it has {old[row].strip()!r} where {format_lines([file_row])} of the file has {text!r}"
            )
        first = next((row.strip() for row in old if row.strip()), "")
        return f"does not match: the file has no rows as it shows them, from {first!r} on"


def _with_signs(hunk: Hunk) -> list[HunkRow]:
    """The hunk's rows. Blank rows without a sign after an inserted row count as inserted."""
    rows = list(hunk.rows)
    for number in range(1, len(rows)):
        if rows[number].unsigned and not rows[number].text.strip() and rows[number - 1].sign == "+":
            rows[number] = replace(rows[number], sign="+")
    return rows


def lacks_final_newline(hunk: Hunk, sign: str) -> bool:
    """Whether the hunk says that its last row has no line end, in the old file ("-") or in the new one ("+")."""
    return any(not row.end and row.sign in (" ", sign) for row in hunk.rows)
