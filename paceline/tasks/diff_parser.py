"""Parses diffs as git, Codex and models write them, into parts by file, hunks and rows."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath

from paceline.tasks.lines import BOM, Lines

_HUNK_HEADER = re.compile(r"@@ -(\d{1,9})(?:,(\d{1,9}))? \+(\d{1,9})(?:,(\d{1,9}))? @@ ?(.*)$")
_CODEX_HEADER = re.compile(r"\*\*\* (Begin Patch|End Patch|End of File|(?:Update|Add|Delete) File: ?|Move to: ?)(.*)$")
_METADATA = (  # rows between a file's name and its hunks
    "index ", "Index: ", "similarity index ", "dissimilarity index ", "rename from ", "rename to ", "copy from ",
    "copy to ", "old mode ", "new mode ", "new file mode ", "deleted file mode ", "Binary files ", "GIT binary patch",
    "Only in ",
)  # fmt: skip
_ESCAPE = re.compile(r"\\([0-7]{3}|.)")
_ESCAPED = {"n": "\n", "t": "\t", "r": "\r", "a": "\a", "b": "\b", "f": "\f", "v": "\v"}


@dataclass(frozen=True)
class HunkRow:
    """A hunk's row with its sign: " " context, "-" deleted, "+" inserted.

    `end` is the line end in the diff, "" if the diff says that the row has none.
    """

    sign: str
    text: str
    end: str
    unsigned: bool = False  # a context row without the space it should begin with


@dataclass(frozen=True)
class Hunk:
    """A hunk. `start` and `count` are its first line in the old file and its number of lines, according to its header.

    `counts_match`: the header's counts are those of the rows. `headings` are the rows above the hunk that its headers name,
    outermost first. `at_end`: the diff says that the hunk is at the end of the file.
    """

    rows: tuple[HunkRow, ...]
    start: int | None = None
    count: int | None = None
    counts_match: bool = False
    headings: tuple[str, ...] = ()
    at_end: bool = False

    @property
    def old(self) -> list[str]:
        """The hunk's rows in the old file."""
        return [row.text for row in self.rows if row.sign != "+"]

    @property
    def new(self) -> list[str]:
        """The hunk's rows in the new file."""
        return [row.text for row in self.rows if row.sign != "-"]

    @property
    def changes(self) -> bool:
        """Whether the hunk deletes or inserts a row."""
        return any(row.sign != " " for row in self.rows)


@dataclass
class FilePatch:
    """A diff's part for one file: its names (without "a/" and "b/") and its hunks.

    `kind` is "", "new", "deleted" or "binary". `before` and `after` are abbreviated blob hashes of its contents.
    """

    names: list[str] = field(default_factory=list)
    kind: str = ""
    before: str = ""
    after: str = ""
    hunks: list[Hunk] = field(default_factory=list)


@dataclass
class Patch:
    """A parsed diff. `outside` are the edit's rows that do not belong to it.

    `stray_rows` follow a hunk and look like hunk rows, but its header's counts exclude them. `combined`: a merge's combined
    diff. `crlf`: the diff's own header rows end with "\\r\\n", so its line ends say nothing about the file's.
    """

    parts: list[FilePatch] = field(default_factory=list)
    outside: list[str] = field(default_factory=list)
    stray_rows: list[str] = field(default_factory=list)
    combined: bool = False
    crlf: bool = False


def parse_diff(text: str) -> Patch:
    """Parses the diff in an edit, whatever text is around it."""
    return _Reader(text).read()


def is_header(row: str) -> bool:
    """Whether the row is a hunk's header."""
    return row.startswith("@@ ") or row.rstrip() == "@@"


class _Reader:
    """Reads a diff row by row. `next` is the number of the next row."""

    def __init__(self, text: str) -> None:
        lines = Lines.of(text)
        self.rows, self.ends = lines.rows, lines.ends
        self.patch = Patch()
        self.next = 0
        self.just_named = False  # the rows directly above named the last part's file

    def read(self) -> Patch:
        while self.next < len(self.rows):
            row = self.rows[self.next]
            if is_header(row):
                self._read_hunk()
            elif row.startswith("@@@ "):
                self.patch.combined = True
                self.next += 1
            elif codex := _CODEX_HEADER.match(row.rstrip()):
                self._read_codex_header(codex[1].rstrip(": "), codex[2].strip())
            elif self._is_file_header(self.next):
                self._note_line_end()
                old, new = _file_name(row[4:]), _file_name(self.rows[self.next + 1][4:])
                part = self._current_or_new_part()
                part.kind = "new" if old is None else "deleted" if new is None else part.kind
                part.names += [name for name in (old, new) if name and name not in part.names]
                self.next += 2
                if self.next < len(self.rows) and self.rows[self.next][:1] in (" ", "-", "+"):
                    self._read_by_content((), None, None)
            elif row.startswith("diff --git ") or (row.startswith("diff -") and " " in row[6:]):
                self.patch.parts.append(FilePatch(_git_names(row)))
                self.just_named = True
                self.next += 1
            elif row.startswith(_METADATA) and (self.just_named or row.startswith("Index: ")):
                self._read_metadata(row)
                self.next += 1
            elif row.startswith(("From ", "-- ")) and self.patch.parts:
                self._skip_mail()
            else:
                self.patch.outside.append(row)
                self.next += 1
        return self.patch

    def _current_or_new_part(self) -> FilePatch:
        """The part that the rows directly above began, or a new one."""
        if self.just_named and self.patch.parts and not self.patch.parts[-1].hunks:
            return self.patch.parts[-1]
        self.patch.parts.append(FilePatch())
        self.just_named = True
        return self.patch.parts[-1]

    def _skip_mail(self) -> None:
        """Skips a mail's signature and the next mail's header, up to the next file."""
        self.just_named = False
        while self.next < len(self.rows) and not self.rows[self.next].startswith("diff "):
            if self._is_file_header(self.next):
                return
            self.next += 1

    def _read_metadata(self, row: str) -> None:
        """Reads one of git's rows about the file, such as "index" or "rename from"."""
        if row.startswith("Index: "):
            self.patch.parts.append(FilePatch([row[7:].strip()]))
            self.just_named = True
            return
        part = self.patch.parts[-1]
        if found := re.match(r"index ([0-9a-f]{7,40})\.\.([0-9a-f]{7,40})", row):
            part.before, part.after = found[1], found[2]
        elif row.startswith(("Binary files ", "GIT binary patch")):
            part.kind = "binary"
        elif row.startswith("deleted file mode "):
            part.kind = "deleted"
        elif row.startswith("new file mode "):
            part.kind = "new"
        elif row.startswith(("rename ", "copy ")):
            name = _unquoted(row.split(" ", 2)[2])
            part.names += [name] * (name not in part.names)

    def _is_file_header(self, row_number: int) -> bool:
        """Whether "--- " and "+++ " rows begin at this row."""
        return (
            row_number + 1 < len(self.rows)
            and self.rows[row_number].startswith("--- ")
            and self.rows[row_number + 1].startswith("+++ ")
        )

    def _note_line_end(self) -> None:
        """Notes whether this header row ends with "\\r\\n"."""
        self.patch.crlf |= self.ends[self.next] == "\r\n"

    def _read_codex_header(self, what: str, name: str) -> None:
        """Reads a row of Codex's patch format, such as "*** Update File: NAME"."""
        self._note_line_end()
        self.next += 1
        if what in ("Update File", "Add File", "Delete File"):
            kind = {"Add File": "new", "Delete File": "deleted"}.get(what, "")
            self.patch.parts.append(FilePatch([name], kind))
            self.just_named = True
            if what != "Delete File" and self.next < len(self.rows) and self.rows[self.next][:1] in (" ", "-", "+"):
                self._read_by_content((), None, None)
        elif what == "Move to" and self.patch.parts:
            self.patch.parts[-1].names.append(name)
            if self.next < len(self.rows) and self.rows[self.next][:1] in (" ", "-", "+"):
                self._read_by_content((), None, None)

    def _read_hunk(self) -> None:
        """Reads one hunk and its headers."""
        self._note_line_end()
        if not self.patch.parts:
            self.patch.parts.append(FilePatch())
        headings: list[str] = []
        start = count = new_count = None
        while self.next < len(self.rows) and is_header(self.rows[self.next]):
            row = self.rows[self.next]
            if numbers := _HUNK_HEADER.match(row):
                start = int(numbers[1])
                count, new_count = (1 if numbers[each] is None else int(numbers[each]) for each in (2, 4))
                headings = [numbers[5]] if numbers[5].strip() else []
            else:
                heading = row[2:].strip().removesuffix("@@").strip()
                headings += [heading] if any(map(str.isalpha, heading)) else []
            self.next += 1
        self.just_named = False
        if count is None or new_count is None or not self._read_by_counts(tuple(headings), start, count, new_count):
            self._read_by_content(tuple(headings), start, count)

    def _read_by_counts(self, headings: tuple[str, ...], start: int | None, count: int, new_count: int) -> bool:
        """Reads as many rows as the header says. Returns False, without reading, if the rows contradict it."""
        row_number, rows = self.next, list[HunkRow]()
        while count > 0 or new_count > 0:
            if row_number >= len(self.rows) or (sign := self.rows[row_number][:1] or " ") not in " -+\\":
                return False
            count -= sign in " -"
            new_count -= sign in " +"
            if count < 0 or new_count < 0:
                return False
            self._append_row(rows, row_number)
            row_number += 1
        if row_number < len(self.rows) and self.rows[row_number].startswith("\\"):
            self._append_row(rows, row_number)
            row_number += 1
        next_row = row_number
        while (
            next_row < len(self.rows) and not self._ends_hunk(next_row) and self.rows[next_row][:1] in (" ", "-", "+")
        ):
            if self.rows[next_row][0] != " ":
                return False
            next_row += 1
        self.next = row_number
        self._append_hunk(Hunk(tuple(rows), start, sum(row.sign != "+" for row in rows), True, headings))
        while next_row < len(self.rows) and not self._ends_hunk(next_row):
            if self.rows[next_row][:1] in ("-", "+"):
                self.patch.stray_rows.append(self.rows[next_row])
            next_row += 1
        return True

    def _read_by_content(self, headings: tuple[str, ...], start: int | None, count: int | None) -> None:
        """Reads rows up to one that cannot belong to the hunk. A row without a sign between others is context."""
        stop = self.next
        while stop < len(self.rows) and not self._ends_hunk(stop):
            stop += 1
        last = stop
        while last > self.next and self.rows[last - 1][:1] not in (" ", "-", "+", "\\"):
            last -= 1
        rows: list[HunkRow] = []
        for row_number in range(self.next, last):
            self._append_row(rows, row_number)
        self.patch.outside += self.rows[last:stop]
        at_end = stop < len(self.rows) and self.rows[stop].rstrip() == "*** End of File"
        self.next = stop
        self._append_hunk(Hunk(tuple(rows), start, count, False, headings, at_end))

    def _append_hunk(self, hunk: Hunk) -> None:
        if hunk.rows:
            self.patch.parts[-1].hunks.append(hunk)

    def _append_row(self, rows: list[HunkRow], row_number: int) -> None:
        """Appends a row. One that begins with a backslash says that the row before has no line end."""
        row, end = self.rows[row_number], self.ends[row_number] or "\n"
        if row.startswith("\\"):
            if rows:
                last = rows[-1]
                text = last.text + ("\r" if last.end == "\r\n" and not self.patch.crlf else "")
                rows[-1] = HunkRow(last.sign, text, "")
        elif row[:1] in (" ", "-", "+"):
            rows.append(HunkRow(row[0], row[1:], end))
        else:
            rows.append(HunkRow(" ", row, end, unsigned=True))

    def _ends_hunk(self, row_number: int) -> bool:
        """Whether a hunk that is read by content ends before this row."""
        row = self.rows[row_number]
        if (
            is_header(row)
            or row.startswith(("@@@ ", "diff --git ", "Index: ", "```", "~~~"))
            or _CODEX_HEADER.match(row)
        ):
            return True
        if row.rstrip() == "--" and row_number + 2 >= len(self.rows):
            return True
        if row == "-- ":
            return row_number + 1 >= len(self.rows) or bool(re.match(r"\d+\.\d", self.rows[row_number + 1]))
        following = row_number + 2
        return self._is_file_header(row_number) and following < len(self.rows) and is_header(self.rows[following])


def _file_name(text: str) -> str | None:
    """The file name in a "---" or "+++" row; None for /dev/null."""
    name = _unquoted(text.split("\t")[0].strip())
    if name == "/dev/null":
        return None
    return name[2:] if name.startswith(("a/", "b/")) else name


def _unquoted(text: str) -> str:
    """A file name without git's quotes and escapes."""
    text = text.strip()
    if len(text) < 2 or text[0] != '"' or text[-1] != '"':
        return text

    def plain(found: re.Match[str]) -> str:
        sign = found[1]
        return chr(int(sign, 8)) if len(sign) == 3 else _ESCAPED.get(sign, sign)

    escaped = _ESCAPE.sub(plain, text[1:-1])
    try:
        return escaped.encode("latin-1").decode()
    except UnicodeError:
        return escaped


def _git_names(row: str) -> list[str]:
    """The file names in a "diff --git" row; empty if they cannot be separated."""
    text = row.removeprefix("diff --git ").strip()
    half = len(text) // 2
    if text[half : half + 1] == " " and text[2:half] == text[half + 3 :]:
        return [name for name in [_file_name(text[:half])] if name]
    words = text.split(" ")
    return (
        [name for name in map(_file_name, words[-2:]) if name]
        if row.startswith("diff --git ") and len(words) == 2
        else []
    )


def path_overlap(part: FilePatch, path: str) -> int:
    """How many components, counted from the end, a name of the part shares with the path."""
    wanted = PurePosixPath(path.replace("\\", "/")).parts[::-1]
    best = 0
    for name in part.names:
        parts = PurePosixPath(name.replace("\\", "/")).parts[::-1]
        common = next((at for at, (one, two) in enumerate(zip(wanted, parts, strict=False)) if one != two), None)
        best = max(best, min(len(wanted), len(parts)) if common is None else common)
    return best


def headerless_patch(text: str, rows: Sequence[str]) -> Patch | None:
    """An edit of rows with "+" and "-" but without a hunk header, as one hunk; None if the edit has another form.

    It has this form if the file holds its deleted and context rows without their signs, and not with them.
    """
    lines = Lines.of(text)
    body = list(zip(lines.rows, lines.ends, strict=True))
    fences = [row_number for row_number, (row, _) in enumerate(body) if row.startswith("```")]
    if len(fences) == 2:
        body = body[fences[0] + 1 : fences[1]]
    while body and not body[0][0].strip():
        body.pop(0)
    while body and not body[-1][0].strip():
        body.pop()
    known = {row.rstrip() for row in rows}
    stripped = {row.strip() for row in rows}
    found = []
    for row, end in body:
        sign = row[:1] if row[:1] in ("-", "+", " ") and row.strip() else ""
        is_file_row = row.rstrip() in known and bool(row.strip())
        if sign in ("-", "+") and is_file_row:
            return None
        # "- a" is more likely a list item than a deleted row " a"
        is_list_item = len(row) - len(row[1:].lstrip(" ")) == 2
        if sign == "-" and row[1:].rstrip() not in known and (is_list_item or row[1:].strip() not in stripped):
            return None
        if sign in ("", " ") and row.strip() and row[1:].rstrip() not in known and not is_file_row:
            return None
        is_context = sign == "" or (sign == " " and is_file_row and row[1:].rstrip() not in known)
        found.append(
            HunkRow(" " if is_context else sign, row if is_context else row[1:], end or "\n", unsigned=is_context)
        )
    signs = {row.sign for row in found}
    if not ({"-", "+"} & signs) or not ({"-", " "} & signs) or all(not row.text.strip() for row in found):
        return None
    if BOM + found[0].text in rows:
        return None
    return Patch([FilePatch(hunks=[Hunk(tuple(found))])])
