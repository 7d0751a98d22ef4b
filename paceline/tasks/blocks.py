"""Edits that name what they replace: SEARCH/REPLACE blocks and unified diffs."""

from __future__ import annotations

import re

from paceline.errors import EditNotFound

_SEARCH = re.compile(r"^<{5,9} ?SEARCH\b.*$", re.MULTILINE)
_BLOCK = re.compile(
    r"^<{5,9} ?SEARCH\b[^\n]*\n(?P<old>.*?)^={5,9}\s*?\n(?P<new>.*?)^>{5,9} ?REPLACE\b[^\n]*$", re.MULTILINE | re.DOTALL
)
_HUNK = re.compile(r"^@@ -(\d+)(?:,\d+)? \+\d+(?:,\d+)? @@.*$", re.MULTILINE)


def has_blocks(text: str) -> bool:
    return bool(_SEARCH.search(text))


def is_diff(text: str) -> bool:
    return bool(_HUNK.search(text)) and all(
        not line or line[0] in "+-@ \\" or line.startswith(("diff ", "index ", "new file", "deleted file"))
        for line in text.splitlines()
    )


def apply_blocks(code: str, text: str) -> str:
    """Replaces each SEARCH part by its REPLACE part, first exactly, then with white space at line ends and indents off.

    Raises EditNotFound naming the block that is not in the file.
    """
    blocks = list(_BLOCK.finditer(text))
    if len(blocks) != len(_SEARCH.findall(text)):
        raise EditNotFound("a SEARCH/REPLACE block is not closed")
    for number, block in enumerate(blocks, 1):
        code = _replace(code, block["old"], block["new"], 0, f"SEARCH block {number}")
    return code


def apply_diff(code: str, text: str) -> str:
    """Applies a unified diff by content; line numbers only choose between equal places. Raises EditNotFound."""
    pieces = _HUNK.split(text)
    for number, (line, body) in enumerate(zip(pieces[1::2], pieces[2::2], strict=True), 1):
        rows = [
            row for row in body.strip("\n").split("\n") if not row.startswith(("\\", "diff ", "index ", "--- ", "+++ "))
        ]
        old = "".join(row[1:] + "\n" for row in rows if not row.startswith("+"))
        new = "".join(row[1:] + "\n" for row in rows if not row.startswith("-"))
        code = _replace(code, old, new, int(line) - 1, f"hunk {number}")
    return code


def _replace(code: str, old: str, new: str, near: int, name: str) -> str:
    lines, wanted = code.splitlines(keepends=True), old.splitlines()
    if not wanted:
        return code + new if not code or code.endswith("\n") else code + "\n" + new
    for simplify in (str.rstrip, str.strip):
        simple = [simplify(line) for line in lines]
        target = [simplify(line) for line in wanted]
        places = [
            place for place in range(len(lines) - len(target) + 1) if simple[place : place + len(target)] == target
        ]
        if places:
            place = min(places, key=lambda each: abs(each - near)) if near else places[0]
            first = lines[place].rstrip("\r\n")
            shift = len(first) - len(first.lstrip()) - (len(wanted[0]) - len(wanted[0].lstrip()))
            if shift > 0:
                new = "".join(" " * shift + line if line.strip() else line for line in new.splitlines(keepends=True))
            last = lines[place + len(target) - 1]
            if not last.endswith("\n") and place + len(target) == len(lines):
                new = new.removesuffix("\n")
            return "".join(lines[:place]) + new + "".join(lines[place + len(target) :])
    raise EditNotFound(f"{name} is not in the file; it begins {wanted[0].strip()!r}")
