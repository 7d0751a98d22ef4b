"""Edit snippets: what marks left-out code, and snippets made by rule from a change."""

from __future__ import annotations

import difflib
import enum
import re
from pathlib import PurePath

from paceline.tasks.definitions import indent
from paceline.tasks.lines import Lines

_COMMENTS = (  # how comments begin and end, the longer forms first
    ("{{!--", "--}}"), ("{{/*", "*/}}"), ("<%--", "--%>"), ("<!--", "-->"), ("{{!", "}}"), ("{/*", "*/}"), ("<%#", "%>"),
    ('"""', '"""'), ("'''", "'''"), ("[//]: #", ""), ("{#", "#}"), ("/*", "*/"), ("@*", "*@"), ("(*", "*)"), ("{-", "-}"),
    ("//", ""), ("--", ""), ("REM ", ""), ("#", ""), (";", ""), ("%", ""), ("*", ""), ("'", ""),
)  # fmt: skip
_PROSE = (".md", ".markdown", ".mdx", ".rst", ".txt", ".adoc", ".org")  # here "#" and "*" begin headings and items
_MOSTLY = 10  # rows indented by tabs for one by spaces in a file that is indented by tabs
_ELLIPSES = ("...", "…")
_LEFT_OUT = {
    "rest", "existing", "unchanged", "unmodified", "same", "omitted", "remaining", "remains", "remain", "untouched",
}  # fmt: skip
_ABOUT = _LEFT_OUT | {
    "a", "above", "all", "and", "are", "as", "before", "below", "body", "brevity", "class", "code", "content", "contents",
    "else", "everything", "file", "for", "from", "function", "functions", "goes", "here", "implementation", "imports", "in",
    "is", "it", "keep", "lines", "logic", "method", "methods", "no", "not", "of", "original", "other", "part", "previous",
    "previously", "stay", "stays", "the", "this", "to", "was",
}  # fmt: skip
_REST = re.compile(r"(?:the )?(?:rest|remainder) of (?:the |this )?[\w-]+(?: [\w-]+)?$", re.IGNORECASE)
_OPENING = re.compile(
    r"(?:(?:the|all|any|and|some|more|with)\s+)*(?:other|others|existing|remaining|previous|rest|same|keep|unchanged|original"
    r"|omitted|etc|leave|skip|unmodified|no changes?)\b",
    re.IGNORECASE,
)
_PHRASE = re.compile(
    r"\b(rest of (the )?(code|file|class|function|method)|existing (code|methods|functions|imports|class)|"
    r"(remains?|is|are) unchanged|unchanged code|code (remains|stays) the same)\b",
    re.IGNORECASE,
)


class Marker(enum.IntEnum):
    """How surely a line stands for left-out code. What is not CERTAIN is text where nothing is left out."""

    NONE = 0
    POSSIBLE = 1  # a comment that may mean it, as "# other methods" or "# the rest is read later"
    LIKELY = 2  # a comment of nothing but words for it, as "# rest of the file"
    CERTAIN = 3  # an ellipsis, or a comment with one, as "# ... existing code ..."


def marker(line: str, path: str | None = None) -> Marker:
    """Whether a line stands for left-out code. In prose, by the path, only an ellipsis or a comment in markup does."""
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
    bare = bool(words) and set(words) <= _ABOUT and not _LEFT_OUT.isdisjoint(words)
    if body.startswith(_ELLIPSES):
        rest = body.strip(".… ()[]{}")
        if not rest or bare or body.endswith(_ELLIPSES) or _OPENING.match(rest) or _PHRASE.search(rest):
            return Marker.CERTAIN
        return Marker.POSSIBLE if len(words) <= 6 else Marker.NONE
    if bare and body.endswith(_ELLIPSES):
        return Marker.CERTAIN
    if form[0] in ("*", "'"):
        return Marker.NONE
    if is_prose(path) and not form[1]:
        return Marker.NONE
    plain = body.strip(" .…[](){}<>~-=─—*_#/:")
    if bare or _REST.match(plain):
        return Marker.LIKELY
    if _PHRASE.search(plain) or (_OPENING.match(plain) and len(words) <= 5):
        return Marker.POSSIBLE
    return Marker.NONE


def is_prose(path: str | None) -> bool:
    """Whether a file of this name is prose with markup, such as Markdown."""
    return PurePath(path or "").suffix.lower() in _PROSE


def is_marker(line: str, path: str | None = None) -> bool:
    """Whether a line stands for left-out code, on its own words."""
    return marker(line, path) >= Marker.LIKELY


def in_unit_of(lines: list[str], snippet: list[str]) -> list[str]:
    """A snippet indented by spaces in the tabs of a file that is indented by them, or the other way round.

    A tab is as many spaces as make most rows the file's, or as the least indented row of the one that has spaces. Where
    either mixes the two, and where that is all that the snippet would change, it stays as it is.
    """
    tabs, spaces = _tabbed(lines), _spaced(lines)
    own_tabs, own_spaces = _tabbed(snippet), _spaced(snippet)
    turned = snippet
    if tabs and own_spaces and not own_tabs and len(spaces) * _MOSTLY < len(tabs):
        known = set(lines)
        units = (min(map(indent, own_spaces)), 4, 2, 8)
        turned = max((_tabbed_by(unit, snippet) for unit in units), key=lambda rows: sum(row in known for row in rows))
    elif spaces and own_tabs and not own_spaces and not tabs:
        unit = min(map(indent, spaces))
        turned = [" " * (unit * (len(row) - len(row.lstrip("\t")))) + row.lstrip("\t") for row in snippet]
    return snippet if set(turned) <= set(lines) else turned


def _tabbed_by(unit: int, rows: list[str]) -> list[str]:
    depths = [indent(row) // unit for row in rows]
    return ["\t" * depth + row[depth * unit :] for depth, row in zip(depths, rows, strict=True)]


def _tabbed(rows: list[str]) -> list[str]:
    return [row for row in rows if row.startswith("\t") and row.strip()]


def _spaced(rows: list[str]) -> list[str]:
    return [row for row in rows if row.startswith("  ") and row.strip()]


def marker_rows(snippet: list[str], lines: list[str], path: str | None = None) -> list[Marker]:
    """Which of the snippet's rows may be markers: not those that stand in the file in the same place, nor a body that is
    an ellipsis."""
    places: dict[str, list[int]] = {}
    for row, line in enumerate(lines):
        if line.strip():
            places.setdefault(line.strip(), []).append(row)
    found = []
    for row, line in enumerate(snippet):
        level = marker(line, path)
        if level and line.strip() in places:
            level = Marker.NONE if _stands_so(snippet, row, lines, places) else level
        if level and line.strip() in _ELLIPSES and _is_body(snippet, row, set(lines)):
            level = Marker.NONE
        found.append(level)
    return found


def _stands_so(snippet: list[str], row: int, lines: list[str], places: dict[str, list[int]]) -> bool:
    """Whether a row of the snippet and one beside it stand so in the file."""

    def beside(rows: list[str], number: int, step: int) -> str:
        number += step
        while 0 <= number < len(rows) and not rows[number].strip():
            number += step
        return rows[number].strip() if 0 <= number < len(rows) else ""

    wanted = [(step, text) for step in (-1, 1) if (text := beside(snippet, row, step))]
    return any(beside(lines, place, step) == text for place in places[snippet[row].strip()] for step, text in wanted)


def _is_body(snippet: list[str], row: int, known: set[str]) -> bool:
    """Whether a bare ellipsis is the whole body of a block, and not what is left out of one that the file has."""
    above = snippet[row - 1] if row else ""
    below = next((line for line in snippet[row + 1 :] if line.strip()), "")
    opens = above.split("#")[0].rstrip().endswith(":")
    alone = opens and indent(above) < indent(snippet[row]) > indent(below)
    return alone and (snippet[row] in known or above not in known)


def comment_leader(path: str | None) -> tuple[str, str]:
    """How a comment begins and ends in a file of this name."""
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
    """A lazy edit snippet made by rule: each changed part with `context` lines around, a marker for what is left out.

    Parts closer than what they would leave out are joined. Deleted lines show by their neighbours standing together.
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
