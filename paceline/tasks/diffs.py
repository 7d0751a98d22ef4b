"""Edits that are diffs: unified ones as git and models write them, Codex's patches, rows with "+" and "-" alone."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import sha1
from itertools import pairwise

from paceline.errors import EditNotFound, EmptyEdit
from paceline.tasks.hunk_places import PlacedHunk, Placer, is_open
from paceline.tasks.hunks import Hunk, HunkRow, Part, Patch, bare_patch, is_header, is_named, patch_of
from paceline.tasks.lines import BOM, Edited, Lines, Row
from paceline.tasks.places import Places, named
from paceline.tasks.runs import runs
from paceline.tasks.searches import is_document, is_fence, is_left_out

_NORMAL = re.compile(r"\d+(?:,\d+)?[acd]\d+(?:,\d+)?$")  # a header of `diff` without an option
_CONTEXT = re.compile(r"\*\*\* \d+(?:,\d+)? \*\*\*\*$")  # and of `diff -c`


@dataclass(frozen=True)
class _Change:
    """File rows `start` up to `stop` give way to `rows`."""

    start: int
    stop: int
    rows: tuple[HunkRow, ...]


def is_diff(text: str, file: Lines) -> bool:
    """Whether the edit is a diff, and not a text that has one in it or rows that begin with "-" of their own."""
    rows = Lines.of(text).rows
    if _other_form(rows):
        return True
    patch = patch_of(text)
    if patch.combined:
        return True
    hunks = [hunk for part in patch.parts for hunk in part.hunks]
    if not hunks and not any(part.names for part in patch.parts):
        return bare_patch(text, file.rows) is not None
    if not any(hunk.changes for hunk in hunks) and not any(part.names for part in patch.parts):
        return False
    if _is_in_file(rows, file):
        return False
    places = Places(file.rows)
    found = not hunks or any(not hunk.old or places.find(hunk.old) for hunk in hunks)
    outside = [row for row in patch.outside if row.strip() and not is_fence(row)]
    return not is_document(outside, file.rows, found)


def apply_diff(file: Lines, text: str, path: str | None) -> Edited:
    """Applies what a diff says of the file at `path`. Rows that it shows as staying are the file's own.

    Line numbers are believed where the file has there what the hunk shows; else they choose between equal places, with
    a doubt. Raises EditNotFound naming the hunk that cannot be applied and why, EmptyEdit where nothing changes.
    """
    if _other_form(Lines.of(text).rows):
        raise EditNotFound("the edit is a diff of an old form; make it with `diff -u` or `git diff`")
    patch = patch_of(text)
    if patch.combined:
        raise EditNotFound("the edit is a combined diff of a merge; make it against one of the parents")
    doubts: list[str] = []
    if not any(part.hunks or part.names for part in patch.parts):
        patch = bare_patch(text, file.rows) or patch
        doubts.append("the edit has rows with + and - but no hunk header")
        patch = _grouped(patch, file)
    digest = _digest(file.join(range(len(file.rows))))
    part = _chosen(patch, file, path, digest, doubts)
    _refuse_other_kinds(part, file, digest)
    known = bool(part.before) and digest.startswith(part.before)
    hunks = [hunk for hunk in part.hunks if hunk.changes]
    if not hunks:
        raise EmptyEdit("the diff changes nothing: it has no row with + or -")
    hunks, marked = _without_mark(hunks, file)
    placer = Placer(file, known, bool(part.before) and not known)
    placed = placer.place(hunks)
    doubts += placer.doubts
    _doubt_left_over(patch, file, doubts)
    if not known:
        _doubt_markers(hunks, file, doubts)
    changes = _all_changes(placed)
    told = known or _tells_ends(patch, placed, file)
    if not told and not any(hunk.old for hunk in hunks) and len(set(filter(None, file.ends))) > 1:
        doubts.append("the file's line ends are mixed, and the diff shows none of its rows to tell which is meant")
    edited = _edited(file, changes, told)
    final = _final(placed, file, doubts)
    edited = replace(edited, final=final, bom=marked, doubts=tuple(dict.fromkeys(doubts)))
    if edited.rows == list(range(len(file.rows))) and final is None and marked is None:
        raise EmptyEdit("the diff changes nothing: what it takes out it puts in again")
    if known and part.after and not _digest(file.text(edited)).startswith(part.after):
        edited = replace(edited, doubts=(*edited.doubts, "the result is not what the diff's own digest says"))
    return edited


def _is_in_file(rows: Sequence[str], file: Lines) -> bool:
    """Whether most of the hunks' rows, headers and signs with them, are the file's: then it has a diff in it."""
    known = set(file.rows)
    first = next((place for place, row in enumerate(rows) if is_header(row)), len(rows))
    if first == len(rows) or rows[first] not in known:
        return False
    body = [row for row in rows[first:] if row.strip()]
    return sum(row in known for row in body) * 2 > len(body)


def _grouped(patch: Patch, file: Lines) -> Patch:
    """Rows without a header as one hunk, or where the file has no such rows side by side, as one for each group."""
    hunks = [hunk for part in patch.parts for hunk in part.hunks]
    if len(hunks) != 1 or Places(file.rows).find(hunks[0].old):
        return patch
    groups: list[list[HunkRow]] = [[]]
    for row in hunks[0].rows:
        if row.bare and not row.text.strip():
            groups.append([])
        else:
            groups[-1].append(row)
    return Patch([Part(hunks=[Hunk(tuple(group)) for group in groups if group])])


def _other_form(rows: Sequence[str]) -> bool:
    return any(
        (_NORMAL.match(row) and following.startswith(("< ", "> "))) or _CONTEXT.match(row)
        for row, following in pairwise(rows)
    )


def _digest(text: str) -> str:
    """Git's name for a file of this content."""
    content = text.encode("utf-8", "surrogatepass")
    return sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def _chosen(patch: Patch, file: Lines, path: str | None, digest: str, doubts: list[str]) -> Part:
    """The part of a diff that is about this file."""
    parts = [part for part in patch.parts if part.hunks or part.names or part.kind]
    if not parts:
        raise EditNotFound("the edit has no hunk")
    if len(parts) == 1:
        return parts[0]
    exact = [part for part in parts if part.before and digest.startswith(part.before)]
    if len(exact) == 1:
        return exact[0]
    names = ", ".join(part.names[0] for part in parts if part.names)
    best = max(is_named(part, path) for part in parts) if path else 0
    chosen = [part for part in parts if path and is_named(part, path) == best] if best else []
    places = Places(file.rows)
    fitting = [part for part in parts if _fits(part, places)]
    if len(chosen) == 1:
        others = [part.names[0] for part in fitting if part is not chosen[0] and part.names]
        if others:
            doubts.append(f"the diff's rows for {', '.join(others)} are in this file too; they were left out")
        return chosen[0]
    if chosen and len({tuple(part.names) for part in chosen}) == 1:
        doubts.append(f"the diff names {chosen[0].names[0]} {len(chosen)} times")
        return replace(chosen[0], hunks=[hunk for part in chosen for hunk in part.hunks], before="", after="")
    within = [part for part in fitting if not chosen or part in chosen]
    if len(within) != 1:
        raise EditNotFound(f"the diff is about several files ({names}), and none of them is named as this one")
    name = within[0].names[0] if within[0].names else "a part without a name"
    doubts.append(f"the diff is about several files ({names}); only the rows of {name} are in this one")
    return within[0]


def _fits(part: Part, places: Places) -> bool:
    """Whether the file has all that the part shows, and it shows something."""
    shown = [hunk.old for hunk in part.hunks if any(row.strip() for row in hunk.old)]
    return bool(shown) and all(places.exact(old) for old in shown)


def _refuse_other_kinds(part: Part, file: Lines, digest: str) -> None:
    if part.kind == "deleted":
        raise EditNotFound("the diff deletes the file; that is not an edit of its text")
    if part.kind == "binary":
        raise EditNotFound("the diff says only that a binary file differs")
    made = [row.text for hunk in part.hunks for row in hunk.rows if row.sign == "+"]
    if (part.after and digest.startswith(part.after)) or (part.kind == "new" and file.rows and made == file.rows):
        raise EditNotFound("the diff is applied already: the file is what it makes")
    if part.kind == "new" and file.rows:
        raise EditNotFound("the diff makes a new file, but the file is there and not empty")


def _without_mark(hunks: list[Hunk], file: Lines) -> tuple[list[Hunk], bool | None]:
    """The hunks without a byte order mark before the file's first row, and whether the result begins with one."""
    first = hunks[0]
    old = next((row for row in first.rows if row.sign != "+"), None)
    new = next((row for row in first.rows if row.sign != "-"), None)
    had = old is not None and old.text.startswith(BOM) and bool(file.bom)
    gets = new is not None and new.text.startswith(BOM) and (had or first.start in (0, 1))
    if not had and not gets:
        return hunks, None
    rows = tuple(
        replace(row, text=row.text.removeprefix(BOM)) if (row is old and had) or (row is new and gets) else row
        for row in first.rows
    )
    return [replace(first, rows=rows), *hunks[1:]], None if gets == bool(file.bom) else gets


def _all_changes(placed: Sequence[PlacedHunk]) -> list[_Change]:
    """What the hunks change, in the file's order. Raises EditNotFound where two change the same rows."""
    changes: list[tuple[_Change, int]] = []
    for number, each in enumerate(placed, 1):
        start = stop = each.match.start
        new: list[HunkRow] = []
        for row in (*each.hunk.rows, HunkRow(" ", "", "\n")):
            if row.sign == "+":
                new.append(row)
            elif row.sign == "-":
                stop += 1
            else:
                if new or stop > start:
                    changes.append((_Change(start, stop, tuple(new)), number))
                start = stop = stop + 1
                new = []
    changes.sort(key=lambda pair: (pair[0].start, pair[0].stop))
    for (one, first), (two, second) in pairwise(changes):
        if two.start < one.stop or ((one.start, one.stop) == (two.start, two.stop) and first != second):
            raise EditNotFound(f"hunks {first} and {second} change the same rows, from {named([two.start])} on")
    return [change for change, _ in changes]


def _tells_ends(patch: Patch, placed: Sequence[PlacedHunk], file: Lines) -> bool:
    """Whether the diff's line ends are the file's, so that those of its new rows are meant."""
    if patch.windows:
        return False
    windows = any(row.end == "\r\n" for each in placed for row in each.hunk.rows)
    shown = False
    for each in placed:
        for row, place in zip(
            (row for row in each.hunk.rows if row.sign != "+"), range(each.match.start, each.match.stop), strict=True
        ):
            shown = True
            if file.ends[place] and row.end and file.ends[place] != row.end:
                return windows and all(end != "\r\n" for end in file.ends)
    return shown or windows or "\r\n" not in file.ends


def _edited(file: Lines, changes: Sequence[_Change], told: bool) -> Edited:
    """The file's rows with the changes made, and the new rows' line ends where the diff tells them."""
    rows: list[Row] = []
    ends: dict[int, str] = {}
    reached = 0
    for change in changes:
        rows += range(reached, change.start)
        kept: dict[int, int] = {}
        if not told:
            old, new = file.rows[change.start : change.stop], [row.text for row in change.rows]
            for here, there, size in runs(old, new):
                kept.update((there + step, change.start + here + step) for step in range(size))
        for number, row in enumerate(change.rows):
            if told and row.end:
                ends[len(rows)] = row.end
            rows.append(kept.get(number, row.text))
        reached = change.stop
    rows += range(reached, len(file.rows))
    return Edited(rows, ends=ends)


def _final(placed: Sequence[PlacedHunk], file: Lines, doubts: list[str]) -> bool | None:
    """Whether the result's last row has an end, as the diff says; None where it does not."""
    for each in placed:
        closes = is_open(each.hunk, "+")
        if not closes and not is_open(each.hunk, "-"):
            continue
        if each.match.stop == len(file.rows):
            return not closes
        doubts.append("the diff says that a row has no line end, but that row is not the file's last")
    return None


def _doubt_left_over(patch: Patch, file: Lines, doubts: list[str]) -> None:
    known = set(file.rows)
    left = [row for row in patch.left if row[0] == "+" or row[1:] in known]
    if left:
        doubts.append(f"rows behind a hunk look as if they were of it: {left[0]!r}")


def _doubt_markers(hunks: Sequence[Hunk], file: Lines, doubts: list[str]) -> None:
    """Doubts a row that would be put in though it says that rows are left out."""
    known = {row.strip() for row in file.rows}
    for number, hunk in enumerate(hunks, 1):
        for row in hunk.rows:
            text = row.text.strip()
            if row.sign == "+" and is_left_out(text) and text not in known and any(map(str.isalpha, text)):
                doubts.append(f"hunk {number} puts {text!r} into the file, which reads as if rows were left out")
