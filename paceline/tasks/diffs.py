"""Applies edits that are diffs: unified diffs of git and of models, Codex patches, bare rows with "+" and "-"."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import sha1
from itertools import pairwise

from paceline.errors import EditNotFound, EmptyEdit
from paceline.tasks.diff_parser import (
    FilePatch,
    Hunk,
    HunkRow,
    Patch,
    headerless_patch,
    is_header,
    parse_diff,
    path_overlap,
)
from paceline.tasks.hunk_locator import HunkLocator, LocatedHunk, lacks_final_newline
from paceline.tasks.lines import BOM, EditResult, Lines, ResultRow
from paceline.tasks.matching_blocks import matching_blocks
from paceline.tasks.row_finder import RowFinder, format_lines
from paceline.tasks.search_replace_parser import is_certain_marker, is_fence, is_part_of_snippet

_NORMAL_DIFF = re.compile(r"\d+(?:,\d+)?[acd]\d+(?:,\d+)?$")  # a header of `diff` without options
_CONTEXT_DIFF = re.compile(r"\*\*\* \d+(?:,\d+)? \*\*\*\*$")  # a header of `diff -c`


@dataclass(frozen=True)
class _DiffChange:
    """File rows `start:stop` are replaced by `rows`."""

    start: int
    stop: int
    rows: tuple[HunkRow, ...]


def is_diff(text: str, file: Lines) -> bool:
    """Whether the edit is a diff, and not a text that quotes one or whose own rows begin with "-"."""
    rows = Lines.of(text).rows
    if _is_unsupported_form(rows):
        return True
    patch = parse_diff(text)
    if patch.combined:
        return True
    hunks = [hunk for part in patch.parts for hunk in part.hunks]
    if not hunks and not any(part.names for part in patch.parts):
        return headerless_patch(text, file.rows) is not None
    if not any(hunk.changes for hunk in hunks) and not any(part.names for part in patch.parts):
        return False
    if _is_quoted_in_file(rows, file):
        return False
    finder = RowFinder(file.rows)
    found = not hunks or any(not hunk.old or finder.find(hunk.old) for hunk in hunks)
    outside = [row for row in patch.outside if row.strip() and not is_fence(row)]
    return not is_part_of_snippet(outside, file.rows, found)


def apply_diff(file: Lines, text: str, path: str | None) -> EditResult:
    """Applies a diff's changes to the file at `path`. Context rows stay the file's own.

    A hunk's line number is trusted if the file has the hunk's rows there. Otherwise the hunk is searched for, and the number
    only chooses between equal matches, with a warning. Raises EditNotFound, which names the hunk that cannot be applied and
    why, and EmptyEdit if nothing changes.
    """
    if _is_unsupported_form(Lines.of(text).rows):
        raise EditNotFound(
            "the edit is a diff of an old form, which is not supported; make it with `diff -u` or `git diff`"
        )
    patch = parse_diff(text)
    if patch.combined:
        raise EditNotFound(
            "the edit is a combined diff of a merge, which is not supported; make it against one of the parents"
        )
    warnings: list[str] = []
    if not any(part.hunks or part.names for part in patch.parts):
        patch = headerless_patch(text, file.rows) or patch
        warnings.append("the edit has rows with + and - but no hunk header")
        patch = _split_at_blank_rows(patch, file)
    digest = _blob_digest(file.join(range(len(file.rows))))
    part = _select_file_patch(patch, file, path, digest, warnings)
    _refuse_unsupported(part, file, digest)
    same_file = bool(part.before) and digest.startswith(part.before)
    hunks = [hunk for hunk in part.hunks if hunk.changes]
    if not hunks:
        raise EmptyEdit("the diff changes nothing: it has no row with + or -")
    hunks, final_bom = _without_byte_order_mark(hunks, file)
    locator = HunkLocator(file, same_file, bool(part.before) and not same_file)
    located = locator.locate(hunks)
    warnings += locator.warnings
    _warn_of_stray_rows(patch, file, warnings)
    if not same_file:
        _warn_of_markers(hunks, file, warnings)
    changes = _all_changes(located)
    use_diff_ends = same_file or _line_ends_match(patch, located, file)
    if not use_diff_ends and not any(hunk.old for hunk in hunks) and len(set(filter(None, file.ends))) > 1:
        warnings.append("the file's line ends are mixed, and the diff shows none of its rows to tell which is meant")
    edited = _apply_changes(file, changes, use_diff_ends)
    final = _final_newline(located, file, warnings)
    edited = replace(edited, final_newline=final, bom=final_bom, warnings=tuple(dict.fromkeys(warnings)))
    if edited.rows == list(range(len(file.rows))) and final is None and final_bom is None:
        raise EmptyEdit("the diff changes nothing: what it takes out it puts in again")
    if same_file and part.after and not _blob_digest(file.text(edited)).startswith(part.after):
        edited = replace(edited, warnings=(*edited.warnings, "the result is not what the diff's own digest says"))
    return edited


def _is_quoted_in_file(rows: Sequence[str], file: Lines) -> bool:
    """Whether the file itself holds most of the diff's rows, headers and signs included: it is a file that quotes a diff."""
    known = set(file.rows)
    first = next((row_number for row_number, row in enumerate(rows) if is_header(row)), len(rows))
    if first == len(rows) or rows[first] not in known:
        return False
    body = [row for row in rows[first:] if row.strip()]
    return sum(row in known for row in body) * 2 > len(body)


def _split_at_blank_rows(patch: Patch, file: Lines) -> Patch:
    """A headerless diff as one hunk, or as one hunk for each group between blank rows if the file lacks the whole."""
    hunks = [hunk for part in patch.parts for hunk in part.hunks]
    if len(hunks) != 1 or RowFinder(file.rows).find(hunks[0].old):
        return patch
    groups: list[list[HunkRow]] = [[]]
    for row in hunks[0].rows:
        if row.unsigned and not row.text.strip():
            groups.append([])
        else:
            groups[-1].append(row)
    return Patch([FilePatch(hunks=[Hunk(tuple(group)) for group in groups if group])])


def _is_unsupported_form(rows: Sequence[str]) -> bool:
    """Whether the rows are a normal or a context diff."""
    return any(
        (_NORMAL_DIFF.match(row) and following.startswith(("< ", "> "))) or _CONTEXT_DIFF.match(row)
        for row, following in pairwise(rows)
    )


def _blob_digest(text: str) -> str:
    """The hash by which git names a blob of this content."""
    content = text.encode("utf-8", "surrogatepass")
    return sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def _select_file_patch(patch: Patch, file: Lines, path: str | None, digest: str, warnings: list[str]) -> FilePatch:
    """The part of a diff that is about this file. Raises EditNotFound if none or several may be."""
    parts = [part for part in patch.parts if part.hunks or part.names or part.kind]
    if not parts:
        raise EditNotFound("the edit has no hunk; a hunk begins with a row '@@ -1,2 +1,3 @@'")
    if len(parts) == 1:
        return parts[0]
    exact = [part for part in parts if part.before and digest.startswith(part.before)]
    if len(exact) == 1:
        return exact[0]
    names = ", ".join(part.names[0] for part in parts if part.names)
    best = max(path_overlap(part, path) for part in parts) if path else 0
    chosen = [part for part in parts if path and path_overlap(part, path) == best] if best else []
    finder = RowFinder(file.rows)
    fitting = [part for part in parts if _fits_file(part, finder)]
    if len(chosen) == 1:
        others = [part.names[0] for part in fitting if part is not chosen[0] and part.names]
        if others:
            warnings.append(f"the diff's rows for {', '.join(others)} are in this file too; they were left out")
        return chosen[0]
    if chosen and len({tuple(part.names) for part in chosen}) == 1:
        warnings.append(f"the diff names {chosen[0].names[0]} {len(chosen)} times")
        return replace(chosen[0], hunks=[hunk for part in chosen for hunk in part.hunks], before="", after="")
    within = [part for part in fitting if not chosen or part in chosen]
    if len(within) != 1:
        raise EditNotFound(
            f"the diff is about several files ({names}), and none of them is named as this one; send the part for this file"
        )
    name = within[0].names[0] if within[0].names else "a part without a name"
    warnings.append(f"the diff is about several files ({names}); only the rows of {name} are in this one")
    return within[0]


def _fits_file(part: FilePatch, finder: RowFinder) -> bool:
    """Whether the part shows rows of its file, and this file has all of them exactly."""
    shown = [hunk.old for hunk in part.hunks if any(row.strip() for row in hunk.old)]
    return bool(shown) and all(finder.find_exact(old) for old in shown)


def _refuse_unsupported(part: FilePatch, file: Lines, digest: str) -> None:
    """Raises EditNotFound for a part that is no edit of the file's text, or is applied already."""
    if part.kind == "deleted":
        raise EditNotFound("the diff deletes the file; that is not an edit of its text")
    if part.kind == "binary":
        raise EditNotFound("the diff says only that a binary file differs")
    added_rows = [row.text for hunk in part.hunks for row in hunk.rows if row.sign == "+"]
    if (part.after and digest.startswith(part.after)) or (part.kind == "new" and file.rows and added_rows == file.rows):
        raise EditNotFound("the diff is applied already: the file is what it makes")
    if part.kind == "new" and file.rows:
        raise EditNotFound("the diff makes a new file, but the file is there and not empty")


def _without_byte_order_mark(hunks: list[Hunk], file: Lines) -> tuple[list[Hunk], bool | None]:
    """(hunks without a byte order mark before the first row; whether the result gets one, None: as the file)."""
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


def _all_changes(located: Sequence[LocatedHunk]) -> list[_DiffChange]:
    """The hunks' changes in the file's order. Raises EditNotFound if two hunks change the same rows."""
    changes: list[tuple[_DiffChange, int]] = []
    for number, each in enumerate(located, 1):
        start = stop = each.match.start
        new: list[HunkRow] = []
        for row in (*each.hunk.rows, HunkRow(" ", "", "\n")):
            if row.sign == "+":
                new.append(row)
            elif row.sign == "-":
                stop += 1
            else:
                if new or stop > start:
                    changes.append((_DiffChange(start, stop, tuple(new)), number))
                start = stop = stop + 1
                new = []
    changes.sort(key=lambda pair: (pair[0].start, pair[0].stop))
    for (one, first), (two, second) in pairwise(changes):
        if two.start < one.stop or ((one.start, one.stop) == (two.start, two.stop) and first != second):
            raise EditNotFound(f"hunks {first} and {second} change the same rows, from {format_lines([two.start])} on")
    return [change for change, _ in changes]


def _line_ends_match(patch: Patch, located: Sequence[LocatedHunk], file: Lines) -> bool:
    """Whether the diff's line ends are those of the file, so that those of its new rows are significant."""
    if patch.crlf:
        return False
    diff_has_crlf = any(row.end == "\r\n" for each in located for row in each.hunk.rows)
    shown = False
    for each in located:
        for row, row_number in zip(
            (row for row in each.hunk.rows if row.sign != "+"), range(each.match.start, each.match.stop), strict=True
        ):
            shown = True
            if file.ends[row_number] and row.end and file.ends[row_number] != row.end:
                return diff_has_crlf and all(end != "\r\n" for end in file.ends)
    return shown or diff_has_crlf or "\r\n" not in file.ends


def _apply_changes(file: Lines, changes: Sequence[_DiffChange], use_diff_ends: bool) -> EditResult:
    """The file's rows with the changes applied; with `use_diff_ends` new rows get the diff's line ends."""
    rows: list[ResultRow] = []
    ends: dict[int, str] = {}
    reached = 0
    for change in changes:
        rows += range(reached, change.start)
        kept: dict[int, int] = {}
        if not use_diff_ends:
            old, new = file.rows[change.start : change.stop], [row.text for row in change.rows]
            for here, there, size in matching_blocks(old, new):
                kept.update((there + step, change.start + here + step) for step in range(size))
        for number, row in enumerate(change.rows):
            if use_diff_ends and row.end:
                ends[len(rows)] = row.end
            rows.append(kept.get(number, row.text))
        reached = change.stop
    rows += range(reached, len(file.rows))
    return EditResult(rows, ends=ends)


def _final_newline(located: Sequence[LocatedHunk], file: Lines, warnings: list[str]) -> bool | None:
    """Whether the result's last row has a line end according to the diff; None if the diff does not say."""
    for each in located:
        closes = lacks_final_newline(each.hunk, "+")
        if not closes and not lacks_final_newline(each.hunk, "-"):
            continue
        if each.match.stop == len(file.rows):
            return not closes
        warnings.append("the diff says that a row has no line end, but that row is not the file's last")
    return None


def _warn_of_stray_rows(patch: Patch, file: Lines, warnings: list[str]) -> None:
    """Warns of rows after a hunk that its header's counts exclude although they look like hunk rows."""
    known = set(file.rows)
    stray = [row for row in patch.stray_rows if row[0] == "+" or row[1:] in known]
    if stray:
        warnings.append(f"rows behind a hunk look as if they were of it: {stray[0]!r}")


def _warn_of_markers(hunks: Sequence[Hunk], file: Lines, warnings: list[str]) -> None:
    """Warns of a marker that would be inserted into the file."""
    known = {row.strip() for row in file.rows}
    for number, hunk in enumerate(hunks, 1):
        for row in hunk.rows:
            text = row.text.strip()
            if row.sign == "+" and is_certain_marker(text) and text not in known and any(map(str.isalpha, text)):
                warnings.append(f"hunk {number} puts {text!r} into the file, which reads as if rows were left out")
