"""Diffs as git, Codex and models write them, read from an edit: parts by file, hunks, rows."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath

from paceline.tasks.lines import BOM, Lines

_NUMBERS = re.compile(r"@@ -(\d{1,9})(?:,(\d{1,9}))? \+(\d{1,9})(?:,(\d{1,9}))? @@ ?(.*)$")
_CODEX = re.compile(r"\*\*\* (Begin Patch|End Patch|End of File|(?:Update|Add|Delete) File: ?|Move to: ?)(.*)$")
_ABOUT = (  # rows of git between the name of a file and its hunks
    "index ", "Index: ", "similarity index ", "dissimilarity index ", "rename from ", "rename to ", "copy from ",
    "copy to ", "old mode ", "new mode ", "new file mode ", "deleted file mode ", "Binary files ", "GIT binary patch",
    "Only in ",
)  # fmt: skip
_ESCAPE = re.compile(r"\\([0-7]{3}|.)")
_ESCAPED = {"n": "\n", "t": "\t", "r": "\r", "a": "\a", "b": "\b", "f": "\f", "v": "\v"}


@dataclass(frozen=True)
class HunkRow:
    """A row: " " stays, "-" goes, "+" comes. `end` is as the diff has it, "" where it says that the row has none."""

    sign: str
    text: str
    end: str
    bare: bool = False  # without the space that a context row begins with


@dataclass(frozen=True)
class Hunk:
    """A hunk. `start` is its first line in the old file as its header says, `count` how many it says there are.

    `counted` says that the header's counts are those of the rows. `headings` are rows above it, outermost first.
    """

    rows: tuple[HunkRow, ...]
    start: int | None = None
    count: int | None = None
    counted: bool = False
    headings: tuple[str, ...] = ()
    at_end: bool = False

    @property
    def old(self) -> list[str]:
        return [row.text for row in self.rows if row.sign != "+"]

    @property
    def new(self) -> list[str]:
        return [row.text for row in self.rows if row.sign != "-"]

    @property
    def changes(self) -> bool:
        return any(row.sign != " " for row in self.rows)


@dataclass
class Part:
    """What a diff says of one file: its names, without "a/" and "b/", what is done to it, and its hunks.

    `kind` is "", "new", "deleted" or "binary". `before` and `after` are beginnings of git's names for its contents.
    """

    names: list[str] = field(default_factory=list)
    kind: str = ""
    before: str = ""
    after: str = ""
    hunks: list[Hunk] = field(default_factory=list)


@dataclass
class Patch:
    """A diff. `outside` are the edit's rows that are none of it, `left` those behind a hunk that look like some.

    `windows` says that its own rows, headers too, end with "\\r\\n", so that ends tell nothing of the file's.
    """

    parts: list[Part] = field(default_factory=list)
    outside: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    combined: bool = False
    windows: bool = False


def patch_of(text: str) -> Patch:
    """The diff in an edit, whatever stands around it."""
    return _Reader(text).read()


def is_header(row: str) -> bool:
    """Whether the row begins a hunk."""
    return row.startswith("@@ ") or row.rstrip() == "@@"


class _Reader:
    def __init__(self, text: str) -> None:
        lines = Lines.of(text)
        self.rows, self.ends = lines.rows, lines.ends
        self.patch = Patch()
        self.place = 0
        self.named = False  # whether the last part was named by rows that stand right above

    def read(self) -> Patch:
        while self.place < len(self.rows):
            row = self.rows[self.place]
            if is_header(row):
                self._hunk()
            elif row.startswith("@@@ "):
                self.patch.combined = True
                self.place += 1
            elif codex := _CODEX.match(row.rstrip()):
                self._codex(codex[1].rstrip(": "), codex[2].strip())
            elif self._names_file(self.place):
                self._note_end()
                old, new = _name(row[4:]), _name(self.rows[self.place + 1][4:])
                part = self._part_for_names()
                part.kind = "new" if old is None else "deleted" if new is None else part.kind
                part.names += [name for name in (old, new) if name and name not in part.names]
                self.place += 2
                if self.place < len(self.rows) and self.rows[self.place][:1] in (" ", "-", "+"):
                    self._by_content((), None, None)
            elif row.startswith("diff --git ") or (row.startswith("diff -") and " " in row[6:]):
                self.patch.parts.append(Part(_git_names(row)))
                self.named = True
                self.place += 1
            elif row.startswith(_ABOUT) and (self.named or row.startswith("Index: ")):
                self._about(row)
                self.place += 1
            elif row.startswith(("From ", "-- ")) and self.patch.parts:
                self._mail()
            else:
                self.patch.outside.append(row)
                self.place += 1
        return self.patch

    def _part_for_names(self) -> Part:
        if self.named and self.patch.parts and not self.patch.parts[-1].hunks:
            return self.patch.parts[-1]
        self.patch.parts.append(Part())
        self.named = True
        return self.patch.parts[-1]

    def _mail(self) -> None:
        """Passes over a signature, and the head of a mail, up to the next file."""
        self.named = False
        while self.place < len(self.rows) and not self.rows[self.place].startswith("diff "):
            if self._names_file(self.place):
                return
            self.place += 1

    def _about(self, row: str) -> None:
        if row.startswith("Index: "):
            self.patch.parts.append(Part([row[7:].strip()]))
            self.named = True
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

    def _names_file(self, place: int) -> bool:
        """Whether "--- " and "+++ " rows stand here."""
        return (
            place + 1 < len(self.rows)
            and self.rows[place].startswith("--- ")
            and self.rows[place + 1].startswith("+++ ")
        )

    def _note_end(self) -> None:
        self.patch.windows |= self.ends[self.place] == "\r\n"

    def _codex(self, what: str, name: str) -> None:
        self._note_end()
        self.place += 1
        if what in ("Update File", "Add File", "Delete File"):
            kind = {"Add File": "new", "Delete File": "deleted"}.get(what, "")
            self.patch.parts.append(Part([name], kind))
            self.named = True
            if what != "Delete File" and self.place < len(self.rows) and self.rows[self.place][:1] in (" ", "-", "+"):
                self._by_content((), None, None)
        elif what == "Move to" and self.patch.parts:
            self.patch.parts[-1].names.append(name)
            if self.place < len(self.rows) and self.rows[self.place][:1] in (" ", "-", "+"):
                self._by_content((), None, None)

    def _hunk(self) -> None:
        """Reads one hunk with the headers above it."""
        self._note_end()
        if not self.patch.parts:
            self.patch.parts.append(Part())
        headings: list[str] = []
        start = count = new_count = None
        while self.place < len(self.rows) and is_header(self.rows[self.place]):
            row = self.rows[self.place]
            if numbers := _NUMBERS.match(row):
                start = int(numbers[1])
                count, new_count = (1 if numbers[each] is None else int(numbers[each]) for each in (2, 4))
                headings = [numbers[5]] if numbers[5].strip() else []
            else:
                heading = row[2:].strip().removesuffix("@@").strip()
                headings += [heading] if any(map(str.isalpha, heading)) else []
            self.place += 1
        self.named = False
        if count is None or new_count is None or not self._by_counts(tuple(headings), start, count, new_count):
            self._by_content(tuple(headings), start, count)

    def _by_counts(self, headings: tuple[str, ...], start: int | None, count: int, new_count: int) -> bool:
        """Reads as many rows as the header says; False, and nothing is read, where the rows say otherwise."""
        place, rows = self.place, list[HunkRow]()
        while count > 0 or new_count > 0:
            if place >= len(self.rows) or (sign := self.rows[place][:1] or " ") not in " -+\\":
                return False
            count -= sign in " -"
            new_count -= sign in " +"
            if count < 0 or new_count < 0:
                return False
            self._add(rows, place)
            place += 1
        if place < len(self.rows) and self.rows[place].startswith("\\"):
            self._add(rows, place)
            place += 1
        reached = place
        while reached < len(self.rows) and not self._ends_hunk(reached) and self.rows[reached][:1] in (" ", "-", "+"):
            if self.rows[reached][0] != " ":
                return False
            reached += 1
        self.place = place
        self._append(Hunk(tuple(rows), start, sum(row.sign != "+" for row in rows), True, headings))
        while reached < len(self.rows) and not self._ends_hunk(reached):
            if self.rows[reached][:1] in ("-", "+"):
                self.patch.left.append(self.rows[reached])
            reached += 1
        return True

    def _by_content(self, headings: tuple[str, ...], start: int | None, count: int | None) -> None:
        """Reads rows up to what cannot be one of the hunk; rows without a sign count as context between others."""
        stop = self.place
        while stop < len(self.rows) and not self._ends_hunk(stop):
            stop += 1
        last = stop
        while last > self.place and self.rows[last - 1][:1] not in (" ", "-", "+", "\\"):
            last -= 1
        rows: list[HunkRow] = []
        for place in range(self.place, last):
            self._add(rows, place)
        self.patch.outside += self.rows[last:stop]
        at_end = stop < len(self.rows) and self.rows[stop].rstrip() == "*** End of File"
        self.place = stop
        self._append(Hunk(tuple(rows), start, count, False, headings, at_end))

    def _append(self, hunk: Hunk) -> None:
        if hunk.rows:
            self.patch.parts[-1].hunks.append(hunk)

    def _add(self, rows: list[HunkRow], place: int) -> None:
        """Adds the row there; one that begins with a backslash says that the row before has no end."""
        row, end = self.rows[place], self.ends[place] or "\n"
        if row.startswith("\\"):
            if rows:
                last = rows[-1]
                text = last.text + ("\r" if last.end == "\r\n" and not self.patch.windows else "")
                rows[-1] = HunkRow(last.sign, text, "")
        elif row[:1] in (" ", "-", "+"):
            rows.append(HunkRow(row[0], row[1:], end))
        else:
            rows.append(HunkRow(" ", row, end, bare=True))

    def _ends_hunk(self, place: int) -> bool:
        """Whether the row there is none of a hunk read by its content."""
        row = self.rows[place]
        if is_header(row) or row.startswith(("@@@ ", "diff --git ", "Index: ", "```", "~~~")) or _CODEX.match(row):
            return True
        if row.rstrip() == "--" and place + 2 >= len(self.rows):
            return True
        if row == "-- ":
            return place + 1 >= len(self.rows) or bool(re.match(r"\d+\.\d", self.rows[place + 1]))
        following = place + 2
        return self._names_file(place) and following < len(self.rows) and is_header(self.rows[following])


def _name(text: str) -> str | None:
    """A file's name as a "---" or "+++" row has it; None for no file."""
    name = _unquoted(text.split("\t")[0].strip())
    if name == "/dev/null":
        return None
    return name[2:] if name.startswith(("a/", "b/")) else name


def _unquoted(text: str) -> str:
    """A name without git's quotes and escapes."""
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
    """The names of a "diff --git" row, where they can be told apart."""
    text = row.removeprefix("diff --git ").strip()
    half = len(text) // 2
    if text[half : half + 1] == " " and text[2:half] == text[half + 3 :]:
        return [name for name in [_name(text[:half])] if name]
    words = text.split(" ")
    return (
        [name for name in map(_name, words[-2:]) if name] if row.startswith("diff --git ") and len(words) == 2 else []
    )


def is_named(part: Part, path: str) -> int:
    """How many parts of the path, from its end, a name of the file has in common with it."""
    wanted = PurePosixPath(path.replace("\\", "/")).parts[::-1]
    best = 0
    for name in part.names:
        parts = PurePosixPath(name.replace("\\", "/")).parts[::-1]
        common = next((at for at, (one, two) in enumerate(zip(wanted, parts, strict=False)) if one != two), None)
        best = max(best, min(len(wanted), len(parts)) if common is None else common)
    return best


def bare_patch(text: str, rows: Sequence[str]) -> Patch | None:
    """An edit of rows with "+" and "-" before them and no header, as one hunk; None where it is another form.

    It is one where what its "-" rows and others show is in the file without the signs, and not with them.
    """
    lines = Lines.of(text)
    body = list(zip(lines.rows, lines.ends, strict=True))
    fences = [place for place, (row, _) in enumerate(body) if row.startswith("```")]
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
        literal = row.rstrip() in known and bool(row.strip())
        if sign in ("-", "+") and literal:
            return None
        item = len(row) - len(row[1:].lstrip(" ")) == 2  # "- a" is one of a list, more likely than " a" that goes
        if sign == "-" and row[1:].rstrip() not in known and (item or row[1:].strip() not in stripped):
            return None
        if sign in ("", " ") and row.strip() and row[1:].rstrip() not in known and not literal:
            return None
        plain = sign == "" or (sign == " " and literal and row[1:].rstrip() not in known)
        found.append(HunkRow(" " if plain else sign, row if plain else row[1:], end or "\n", bare=plain))
    signs = {row.sign for row in found}
    if not ({"-", "+"} & signs) or not ({"-", " "} & signs) or all(not row.text.strip() for row in found):
        return None
    if BOM + found[0].text in rows:
        return None
    return Patch([Part(hunks=[Hunk(tuple(found))])])
