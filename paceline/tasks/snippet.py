"""Lazy edit snippets: the markers for left-out code, and making a snippet from a change."""

from __future__ import annotations

import difflib
import enum
import re
from pathlib import PurePath

from paceline.tasks.definitions import indent
from paceline.tasks.lines import Lines

_COMMENTS = (  # (start, end) of a comment, longer forms first
    ("{{!--", "--}}"), ("{{/*", "*/}}"), ("<%--", "--%>"), ("<!--", "-->"), ("{{!", "}}"), ("{/*", "*/}"), ("<%#", "%>"),
    ('"""', '"""'), ("'''", "'''"), ("[//]: #", ""), ("{#", "#}"), ("/*", "*/"), ("@*", "*@"), ("(*", "*)"), ("{-", "-}"),
    ("//", ""), ("--", ""), ("REM ", ""), ("#", ""), (";", ""), ("%", ""), ("*", ""), ("'", ""),
)  # fmt: skip
_PROSE = (".md", ".markdown", ".mdx", ".rst", ".txt", ".adoc", ".org")  # here "#" and "*" begin headings and list items
# a file with more tab-indented rows than this for each space-indented one uses tabs; not tuned
_TABS_PER_SPACE_ROW = 10
_ELLIPSES = ("...", "…")
_OMISSION_WORDS = {
    "rest", "existing", "unchanged", "unmodified", "same", "omitted", "remaining", "remains", "remain", "untouched",
}  # fmt: skip
_FILLER_WORDS = _OMISSION_WORDS | {
    "a", "above", "all", "and", "are", "as", "before", "below", "body", "brevity", "class", "code", "content", "contents",
    "else", "everything", "file", "for", "from", "function", "functions", "goes", "here", "implementation", "imports", "in",
    "is", "it", "keep", "lines", "logic", "method", "methods", "no", "not", "of", "original", "other", "part", "previous",
    "previously", "stay", "stays", "the", "this", "to", "was",
}  # fmt: skip
_REST_OF = re.compile(r"(?:the )?(?:rest|remainder) of (?:the |this )?[\w-]+(?: [\w-]+)?$", re.IGNORECASE)
_OMISSION_START = re.compile(
    r"(?:(?:the|all|any|and|some|more|with)\s+)*(?:other|others|existing|remaining|previous|rest|same|keep|unchanged|original"
    r"|omitted|etc|leave|skip|unmodified|no changes?)\b",
    re.IGNORECASE,
)
_OMISSION_PHRASE = re.compile(
    r"\b(rest of (the )?(code|file|class|function|method)|existing (code|methods|functions|imports|class)|"
    r"(remains?|is|are) unchanged|unchanged code|code (remains|stays) the same)\b",
    re.IGNORECASE,
)


class Marker(enum.IntEnum):
    """How surely a line is a marker for left-out code. One that is not CERTAIN counts as text if nothing is left out there."""

    NONE = 0
    POSSIBLE = 1  # a comment that may be one, such as "# other methods" or "# the rest is read later"
    LIKELY = 2  # a comment of words for omission only, such as "# rest of the file"
    CERTAIN = 3  # an ellipsis, or a comment with one, such as "# ... existing code ..."


def marker(line: str, path: str | None = None) -> Marker:
    """How surely a line is a marker. In a prose file (by `path`) only an ellipsis or a comment of the markup can be one."""
    text = line.strip()
    if text in _ELLIPSES:
        return Marker.CERTAIN
    for filler in ("pass", "..."):
        text = text.removeprefix(filler).lstrip() if text.startswith(f"{filler} ") else text
    form = next((form for form in _COMMENTS if text.startswith(form[0])), None)
    if form is None or len(text) > 120:
        return Marker.NONE
    body = text[len(form[0]) :].lstrip(form[0][-1]).strip()
    body = body.strip("()") if form[0] == "[//]: #" else body
    if form[1]:
        body = body.removesuffix(form[1]).strip()
    elif body.endswith("*/"):
        body = body[:-2].strip()
    words = re.findall(r"[a-z]+", body.lower())
    only_filler = bool(words) and set(words) <= _FILLER_WORDS and not _OMISSION_WORDS.isdisjoint(words)
    if body.startswith(_ELLIPSES):
        rest = body.strip(".… ()[]{}")
        if (
            not rest
            or only_filler
            or body.endswith(_ELLIPSES)
            or _OMISSION_START.match(rest)
            or _OMISSION_PHRASE.search(rest)
        ):
            return Marker.CERTAIN
        return Marker.POSSIBLE if len(words) <= 6 else Marker.NONE
    if only_filler and body.endswith(_ELLIPSES):
        return Marker.CERTAIN
    if form[0] in ("*", "'"):
        return Marker.NONE
    if is_prose(path) and not form[1]:
        return Marker.NONE
    plain = body.strip(" .…[](){}<>~-=─—*_#/:")
    if only_filler or _REST_OF.match(plain):
        return Marker.LIKELY
    if _OMISSION_PHRASE.search(plain) or (_OMISSION_START.match(plain) and len(words) <= 5):
        return Marker.POSSIBLE
    return Marker.NONE


def is_prose(path: str | None) -> bool:
    """Whether the path is that of prose with markup, such as Markdown."""
    return PurePath(path or "").suffix.lower() in _PROSE


def is_marker(line: str, path: str | None = None) -> bool:
    """Whether a line is LIKELY or CERTAIN to be a marker, judged without its context."""
    return marker(line, path) >= Marker.LIKELY


def with_file_indent_unit(lines: list[str], snippet: list[str]) -> list[str]:
    """The snippet's rows, converted to the file's unit of indent: spaces to tabs or tabs to spaces.

    The width of a tab is the one that makes most rows equal the file's, or for tabs to spaces the file's smallest indent. The
    snippet stays as it is if it or the file mixes tabs and spaces, or if the indent is all that it would change.
    """
    tabs, spaces = _tab_rows(lines), _space_rows(lines)
    own_tabs, own_spaces = _tab_rows(snippet), _space_rows(snippet)
    converted = snippet
    if tabs and own_spaces and not own_tabs and len(spaces) * _TABS_PER_SPACE_ROW < len(tabs):
        known = set(lines)
        units = (min(map(indent, own_spaces)), 4, 2, 8)
        converted = max(
            (_with_tabs(unit, snippet) for unit in units), key=lambda rows: sum(row in known for row in rows)
        )
    elif spaces and own_tabs and not own_spaces and not tabs:
        unit = min(map(indent, spaces))
        converted = [" " * (unit * (len(row) - len(row.lstrip("\t")))) + row.lstrip("\t") for row in snippet]
    return snippet if set(converted) <= set(lines) else converted


def _with_tabs(unit: int, rows: list[str]) -> list[str]:
    """The rows with a tab for each `unit` characters of indent."""
    depths = [indent(row) // unit for row in rows]
    return ["\t" * depth + row[depth * unit :] for depth, row in zip(depths, rows, strict=True)]


def _tab_rows(rows: list[str]) -> list[str]:
    """The rows indented by tabs."""
    return [row for row in rows if row.startswith("\t") and row.strip()]


def _space_rows(rows: list[str]) -> list[str]:
    """The rows indented by spaces."""
    return [row for row in rows if row.startswith("  ") and row.strip()]


def marker_rows(snippet: list[str], lines: list[str], path: str | None = None) -> list[Marker]:
    """How surely each snippet row is a marker. Rows that the file has in the same place and `...` as a body are none."""
    places: dict[str, list[int]] = {}
    for row, line in enumerate(lines):
        if line.strip():
            places.setdefault(line.strip(), []).append(row)
    found = []
    for row, line in enumerate(snippet):
        level = marker(line, path)
        if level and line.strip() in places:
            level = Marker.NONE if _is_in_file(snippet, row, lines, places) else level
        if level and line.strip() in _ELLIPSES and _is_ellipsis_body(snippet, row, set(lines)):
            level = Marker.NONE
        found.append(level)
    return found


def _is_in_file(snippet: list[str], row: int, lines: list[str], places: dict[str, list[int]]) -> bool:
    """Whether the file has a row of the snippet together with one of its two neighbours."""

    def beside(rows: list[str], number: int, step: int) -> str:
        number += step
        while 0 <= number < len(rows) and not rows[number].strip():
            number += step
        return rows[number].strip() if 0 <= number < len(rows) else ""

    neighbours = [(step, text) for step in (-1, 1) if (text := beside(snippet, row, step))]
    return any(
        beside(lines, place, step) == text for place in places[snippet[row].strip()] for step, text in neighbours
    )


def _is_ellipsis_body(snippet: list[str], row: int, known: set[str]) -> bool:
    """Whether an ellipsis is the whole body of a block (as in Python), and not a marker in a block that the file has."""
    above = snippet[row - 1] if row else ""
    below = next((line for line in snippet[row + 1 :] if line.strip()), "")
    opens = above.split("#")[0].rstrip().endswith(":")
    alone = opens and indent(above) < indent(snippet[row]) > indent(below)
    return alone and (snippet[row] in known or above not in known)


def comment_leader(path: str | None) -> tuple[str, str]:
    """(start, end) of a comment in a file of this name."""
    suffix = PurePath(path or "file.py").suffix.lower()
    if suffix in (".py", ".rb", ".sh", ".yaml", ".yml", ".toml", ".r", ".pl", ".cfg", ".ini", ".ex", ".exs", ".jl", ""):
        return "# ", ""
    if suffix in (".html", ".xml", ".md", ".vue", ".svelte"):
        return "<!-- ", " -->"
    if suffix in (".css", ".scss"):
        return "/* ", " */"
    if suffix in (".lua", ".sql", ".hs", ".elm"):
        return "-- ", ""
    return "// ", ""


def snippet_of(before: str, after: str, path: str | None = None, context: int = 3) -> str:
    """A lazy edit snippet of a change: each changed part with `context` lines around it, and markers for the rest.

    Parts whose contexts meet are joined. Deleted lines show only by their neighbours standing side by side.
    """
    old, new = Lines.of(before).rows, Lines.of(after).rows
    matcher = difflib.SequenceMatcher(None, old, new, autojunk=False)
    opening, closing = comment_leader(path)
    pieces: list[str] = []
    reached = 0
    for group in matcher.get_grouped_opcodes(context):
        first, last = group[0][3], group[-1][4]
        if first > reached:
            line = new[first] if first < len(new) else ""
            margin = line[: indent(line)]
            pieces.append(f"{margin}{opening}... existing code ...{closing}")
        pieces += new[first:last]
        reached = last
    if reached < len(new):
        pieces.append(f"{opening}... existing code ...{closing}")
    return "\n".join(pieces) + "\n"
