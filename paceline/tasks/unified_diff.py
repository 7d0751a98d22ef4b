"""Writes a change as a unified diff that `git apply` and `patch` accept, whatever characters text and name have."""

from __future__ import annotations

import difflib
import io
import posixpath

_NO_NEWLINE = "\n\\ No newline at end of file\n"
_ESCAPES = {"\a": "a", "\b": "b", "\t": "t", "\n": "n", "\v": "v", "\f": "f", "\r": "r", '"': '"', "\\": "\\"}


def unified_diff(before: str, after: str, path: str) -> str:
    """The change from `before` to `after` with three lines of context; empty if the texts are equal.

    Only a line feed ends a line. The name is `path` without a leading "/", "./" or "../". The diff has no `diff --git` line,
    so `git apply` resolves the name from the current folder.
    """
    name = _below(path)
    lines = difflib.unified_diff(
        list(io.StringIO(before, newline="\n")),
        list(io.StringIO(after, newline="\n")),
        _head("a", name),
        _head("b", name),
    )
    return "".join(line if line.endswith("\n") else line + _NO_NEWLINE for line in lines)


def _below(path: str) -> str:
    """A path without what leads out of the current folder."""
    parts = posixpath.normpath(path).split("/")
    return "/".join(part for part in parts if part not in ("", ".", "..")) or "file"


def _head(side: str, name: str) -> str:
    """A file name as git writes it: quoted if a character needs it, followed by a tab if it has a space."""
    quoted = "".join(_quoted(character) for character in name)
    if quoted != name:
        return f'"{side}/{quoted}"'
    return f"{side}/{name}\t" if " " in name else f"{side}/{name}"


def _quoted(character: str) -> str:
    """A character as it is written inside quotes. A non-UTF-8 byte (a lone surrogate) becomes an octal escape."""
    if character in _ESCAPES:
        return f"\\{_ESCAPES[character]}"
    if "\udc80" <= character <= "\udcff":
        return f"\\{ord(character) - 0xDC00:03o}"
    return f"\\{ord(character):03o}" if character < " " or character == "\x7f" else character
