"""Where the hunks of a diff stand in a file: at their line numbers, or where the file has what they show."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from paceline.errors import EditNotFound
from paceline.tasks.hunks import Hunk, HunkRow
from paceline.tasks.lines import Lines
from paceline.tasks.places import Looseness, Match, Places, margin, named
from paceline.tasks.searches import is_left_out


@dataclass(frozen=True)
class PlacedHunk:
    """A hunk and where it stands; `several` says that the file has other such places."""

    hunk: Hunk
    match: Match
    several: bool = False


class Placer:
    """Finds where hunks stand. `known` says that the diff was made from this very file, `changed` that from another."""

    def __init__(self, file: Lines, known: bool, changed: bool) -> None:
        self.places = Places(file.rows)
        self.known = known
        self.changed = changed
        self.doubts: list[str] = []

    def place(self, hunks: Sequence[Hunk]) -> list[PlacedHunk]:
        placed = [self._as_said(hunk) for hunk in hunks]
        if all(placed) and all(one.match.stop <= two.match.start for one, two in pairwise(filter(None, placed))):
            found = [each for each in placed if each]
            self._doubt_as_said(found)
            return found
        return self._searched(hunks)

    def _as_said(self, hunk: Hunk) -> PlacedHunk | None:
        """The hunk at its line number, if its header is right in all and the file has there exactly what it shows."""
        old, size = hunk.old, len(self.places.rows)
        if hunk.start is None or not hunk.counted:
            return None
        start = hunk.start - 1 if old else hunk.start
        if not 0 <= start <= size or self.places.rows[start : start + len(old)] != old:
            return None
        if is_open(hunk, "-") and start + len(old) != size:
            return None
        return PlacedHunk(hunk, Match(start, start + len(old), Looseness.EXACT))

    def _doubt_as_said(self, placed: Sequence[PlacedHunk]) -> None:
        if self.known:
            return
        shown = any(each.hunk.old for each in placed)
        for number, each in enumerate(placed, 1):
            where = each.match.start
            if not each.hunk.old and not self._headed(each.hunk, where):
                self.doubts.append(f"hunk {number} stands under {each.hunk.headings[0]!r}, the line it names does not")
            elif not shown and self.changed:
                self.doubts.append(f"hunk {number} shows no row of the file, and was made from another state of it")
            elif each.hunk.old and self._has_already(each):
                self.doubts.append(f"the file has already what hunk {number} puts in at {named([where])}")

    def _has_already(self, placed: PlacedHunk) -> bool:
        start, new = placed.match.start, placed.hunk.new
        added = any(row.sign == "+" and row.text.strip() for row in placed.hunk.rows)
        return added and len(new) > len(placed.hunk.old) and self.places.rows[start : start + len(new)] == new

    def _headed(self, hunk: Hunk, where: int) -> bool:
        """Whether a row above that place begins as the heading does, which git cuts off."""
        if not hunk.headings:
            return True
        heading = hunk.headings[0].rstrip("\ufffd").rstrip()
        return any(row.startswith(heading) for row in reversed(self.places.rows[:where]))

    def _searched(self, hunks: Sequence[Hunk]) -> list[PlacedHunk]:
        placed: list[PlacedHunk] = []
        drift = reached = 0
        for number, hunk in enumerate(hunks, 1):
            found = self._search(hunk, number, drift, reached) if hunk.old else self._insertion(hunk, number, drift)
            placed.append(found)
            reached = max(reached, found.match.stop)
            if hunk.start is not None and hunk.old:
                drift = found.match.start - (hunk.start - 1)
            if hunk.old and self._has_already(found):
                self.doubts.append(f"the file has already what hunk {number} puts in at {named([found.match.start])}")
        self._doubt_offsets(placed)
        return placed

    def _insertion(self, hunk: Hunk, number: int, drift: int) -> PlacedHunk:
        """The place of a hunk that shows no row of the file."""
        size = len(self.places.rows)
        if hunk.start is not None:
            where = hunk.start + drift if hunk.count == 0 else hunk.start - 1 + drift
            if not 0 <= where <= size:
                raise EditNotFound(f"hunk {number} adds rows behind line {hunk.start}, but the file has {size} lines")
            if size:
                self.doubts.append(f"hunk {number} shows no row of the file, so its place is told by a number only")
        elif hunk.at_end or not size:
            where = size
        elif hunk.headings:
            inside = self._headings(hunk.headings)
            if not inside:
                raise EditNotFound(f"hunk {number} adds rows under {hunk.headings[-1]!r}, which is not in the file")
            where = inside[0][0] + 1
            self.doubts.append(
                f"hunk {number} shows no row of the file; what it adds was put under {hunk.headings[-1]!r}"
            )
        else:
            raise EditNotFound(f"hunk {number} adds rows, but shows neither a row of the file nor a line number")
        return PlacedHunk(hunk, Match(where, where, Looseness.EXACT))

    def _search(self, hunk: Hunk, number: int, drift: int, reached: int) -> PlacedHunk:
        hunk, found = self._candidates(hunk, number)
        name, size = f"hunk {number}", len(self.places.rows)
        if hunk.at_end or is_open(hunk, "-"):
            last = [match for match in found if match.stop == size]
            if not last:
                self.doubts.append(f"{name} is at the end of its file, but not of this one")
            found = last or found
        match = found[0]
        if hunk.start is not None:
            match, found = self._numbered(hunk, found, hunk.start - 1 + drift, name)
        elif len(found) > 1:
            inside = self._under(hunk, found, name)
            later = [each for each in inside if each.start >= reached] or inside
            match = later[0]
            if len(inside) > 1:
                starts = [each.start for each in inside]
                self.doubts.append(f"{name} is found at {named(starts)}: which one is meant?")
        elif hunk.headings:
            self._under(hunk, found, name)
        if match.looseness == Looseness.SIGNS:
            self.doubts.append(
                f"{name} is found at {named([match.start])} only with spaces, quotes or other signs alike"
            )
        elif match.looseness == Looseness.RELATIVE:
            self.doubts.append(f"{name} is found at {named([match.start])} only with its indents off")
        return PlacedHunk(self._indented(hunk, match, name), match, len(found) > 1)

    def _candidates(self, hunk: Hunk, number: int) -> tuple[Hunk, list[Match]]:
        """Where the file has what the hunk shows, or that without blank rows at its ends; and the hunk so."""
        found = self.places.find(hunk.old)
        if found and any(row.strip() for row in hunk.old):
            return hunk, found
        rows = list(hunk.rows)
        for place in (0, -1):
            while rows and rows[place].sign == " " and not rows[place].text.strip():
                rows.pop(place)
        cut = replace(hunk, rows=tuple(rows))
        if not found and any(row.strip() for row in cut.old) and cut.rows != hunk.rows:
            found = self.places.find(cut.old)
            if found:
                return cut, found
        if found:
            return hunk, found
        lost = replace(hunk, rows=tuple(_with_signs(hunk)))
        if lost.rows != hunk.rows and lost.old and (found := self.places.find(lost.old)):
            self.doubts.append(f"hunk {number} is found only if a blank row of it, which has no sign, is a new one")
            return lost, found
        raise EditNotFound(f"hunk {number} {self._why_not(hunk)}")

    def _numbered(self, hunk: Hunk, found: list[Match], expected: int, name: str) -> tuple[Match, list[Match]]:
        """The match that the line number means, with a doubt where it does not tell, and all that there are."""
        starts = [match.start for match in found]
        if expected in starts:
            if len(found) > 1 and not hunk.counted:
                self.doubts.append(f"{name} is found at {named(starts)}, and its header's counts are wrong")
            return found[starts.index(expected)], found
        looser = self.places.at(hunk.old, expected)
        if looser:
            self.doubts.append(f"{name} is at {named([expected])} but for white space, and at {named(starts)}")
            return looser, found
        if len(found) > 1:
            inside = self._under(hunk, found, name) if hunk.headings else found
            match = min(inside, key=lambda each: abs(each.start - expected))
            self.doubts.append(f"{name} is not at the line it names, but at {named(starts)}: which one is meant?")
            return match, found
        return found[0], found

    def _under(self, hunk: Hunk, found: list[Match], name: str) -> list[Match]:
        """The matches under the hunk's headings, nearest scope first; all, with a doubt, where it has none that help."""
        if not hunk.headings:
            return found
        inside = self._headings(hunk.headings)
        covered = bytearray(len(self.places.rows))
        for first, stop in inside:
            covered[first:stop] = b"\1" * (stop - first)
        within = [match for match in found if covered[match.start]]
        if within:
            return within
        after = [match for match in found if inside and match.start >= inside[0][0]]
        if not after and hunk.start is None:
            self.doubts.append(f"{name} is not under a row {hunk.headings[-1]!r}")
        return after or found

    def _headings(self, headings: Sequence[str]) -> list[tuple[int, int]]:
        """Ranges of rows under the innermost heading, itself first, within those of the outer ones."""
        ranges = [(0, len(self.places.rows))]
        for heading in headings:
            text = heading.strip()
            for same in (str.__eq__, str.startswith):
                rows = [
                    row
                    for first, stop in ranges
                    for row in range(first, stop)
                    if same(self.places.rows[row].strip(), text)
                ]
                if rows:
                    break
            ranges = [(row, self._scope_end(row)) for row in dict.fromkeys(rows)]
        return ranges

    def _scope_end(self, row: int) -> int:
        """The first row behind that is indented no deeper, closing signs aside."""
        rows = self.places.rows
        depth = len(margin(rows[row]).expandtabs(4))
        for place in range(row + 1, len(rows)):
            text = rows[place].strip()
            if text and len(margin(rows[place]).expandtabs(4)) <= depth and text[0] not in ")]}{":
                return place
        return len(rows)

    def _indented(self, hunk: Hunk, match: Match, name: str) -> Hunk:
        """The hunk with its new rows at the file's indents."""
        added = [row.text for row in hunk.rows if row.sign == "+"]
        shifted, clear = match.reindented(added)
        if not clear and match.looseness < Looseness.SIGNS:
            self.doubts.append(f"the indent of what {name} puts in is not certain")
        texts = iter(shifted)
        return replace(
            hunk, rows=tuple(replace(row, text=next(texts)) if row.sign == "+" else row for row in hunk.rows)
        )

    def _doubt_offsets(self, placed: Sequence[PlacedHunk]) -> None:
        """Doubts a hunk with other equal places that stands off its number otherwise than the sure ones beside it."""
        sure = [
            each.match.start - each.hunk.start + 1 if each.hunk.start is not None and not each.several else None
            for each in placed
        ]
        for number, each in enumerate(placed):
            if not each.several or each.hunk.start is None:
                continue
            before = next((off for off in reversed(sure[:number]) if off is not None), None)
            after = next((off for off in sure[number + 1 :] if off is not None), None)
            offset = each.match.start - each.hunk.start + 1
            if any(other not in (None, offset) for other in (before, after)):
                self.doubts.append(f"hunk {number + 1} has other places as good, and its line number is off")

    def _why_not(self, hunk: Hunk) -> str:
        """Why a hunk does not match, as the end of a sentence."""
        new, old = hunk.new, hunk.old
        if any(row.strip() for row in new) and (found := self.places.find(new)):
            return f"is applied already: what it makes is at {named([found[0].start])}"
        if left_out := next((row.strip() for row in old if is_left_out(row)), None):
            return f"leaves out rows ({left_out!r}); a hunk shows all rows from its first to its last"
        nearest = self.places.nearest(old)
        if nearest:
            place, row = nearest
            text = self.places.rows[place].strip()
            return f"does not match: it has {old[row].strip()!r} where {named([place])} of the file has {text!r}"
        first = next((row.strip() for row in old if row.strip()), "")
        return f"does not match: the file has no rows as it shows them, from {first!r} on"


def _with_signs(hunk: Hunk) -> list[HunkRow]:
    """The hunk's rows, blank ones without a sign beside new ones taken for new."""
    rows = list(hunk.rows)
    for number in range(1, len(rows)):
        if rows[number].bare and not rows[number].text.strip() and rows[number - 1].sign == "+":
            rows[number] = replace(rows[number], sign="+")
    return rows


def is_open(hunk: Hunk, sign: str) -> bool:
    """Whether the hunk says that its last row has no end, in the old file ("-") or in the new one ("+")."""
    return any(not row.end and row.sign in (" ", sign) for row in hunk.rows)
