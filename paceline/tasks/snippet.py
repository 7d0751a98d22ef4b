"""Edit snippets: what marks left-out code, and snippets made by rule from a change."""

from __future__ import annotations

import difflib
import re
from pathlib import PurePath

_LEADERS = ("#", "//", "/*", "<!--", "--", ";", "%", "*", '"""', "{/*")
_WORDS = re.compile(
    r"\b(existing|unchanged|same|rest of|rest is|rest remains|remaining|other (code|methods|functions|lines)|"
    r"previous code|no changes?|as before|omitted|left out|code here)\b",
    re.IGNORECASE,
)
_STRONG = re.compile(
    r"\b(rest of (the )?(code|file|class|function|method)|existing (code|methods|functions|imports|class)|"
    r"(remains?|is|are) unchanged|unchanged code|code (remains|stays) the same)\b",
    re.IGNORECASE,
)
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


def is_marker(line: str) -> bool:
    """Whether a line stands for left-out code: an ellipsis, or a comment with one, or of nothing but words for that."""
    text = line.strip()
    if text in _ELLIPSES:
        return True
    if not text.startswith(_LEADERS) or len(text) > 120:
        return False
    leader = next(each for each in _LEADERS if text.startswith(each))
    body = text[len(leader) :].strip()
    dotted = body.startswith(_ELLIPSES) or body.removesuffix("*/").removesuffix("-->").strip().endswith(_ELLIPSES)
    words = set(re.findall(r"[a-z]+", body.lower()))
    bare = bool(words & _LEFT_OUT) and words <= _ABOUT
    dotted = dotted and (len(body) <= 4 or bool(_WORDS.search(body)) or body.count("...") == 2)
    return dotted or bare or bool(_STRONG.search(body))


def marker_rows(snippet: list[str], lines: list[str]) -> list[bool]:
    """Which of the snippet's lines are markers: not those that the file has too, nor a body that is an ellipsis."""
    known = set(lines)
    return [
        is_marker(line) and not (_is_body(snippet, row, known) if line.strip() in _ELLIPSES else line in known)
        for row, line in enumerate(snippet)
    ]


def _is_body(snippet: list[str], row: int, known: set[str]) -> bool:
    """Whether a bare ellipsis is the whole body of a block, and not what is left out of one that the file has."""
    above = snippet[row - 1] if row else ""
    below = next((line for line in snippet[row + 1 :] if line.strip()), "")
    opens = above.split("#")[0].rstrip().endswith(":")
    alone = opens and _indent(above) < _indent(snippet[row]) > _indent(below)
    return alone and (snippet[row] in known or above not in known)


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def lines_of(text: str) -> list[str]:
    """A text's lines without their ends; only a line feed, or one after a carriage return, ends a line."""
    return unix(text).removesuffix("\n").split("\n") if text else []


def unix(text: str) -> str:
    """A text with line feeds alone at its line ends."""
    return text.replace("\r\n", "\n") if "\r" in text else text


def has_windows_ends(text: str) -> bool:
    """Whether most lines of a text end with a carriage return and a line feed."""
    return "\r" in text and text.count("\r\n") * 2 > text.count("\n")


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
    old, new = lines_of(before), lines_of(after)
    matcher = difflib.SequenceMatcher(None, old, new, autojunk=False)
    opening, closing = comment_leader(path)
    pieces: list[str] = []
    reached = 0
    for group in matcher.get_grouped_opcodes(context):
        first, last = group[0][3], group[-1][4]
        if first > reached:
            line = new[first] if first < len(new) else ""
            indent = line[: len(line) - len(line.lstrip())]
            pieces.append(f"{indent}{opening}... existing code ...{closing}")
        pieces += new[first:last]
        reached = last
    if reached < len(new):
        pieces.append(f"{opening}... existing code ...{closing}")
    return "\n".join(pieces) + "\n"
