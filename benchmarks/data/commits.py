"""Real changes of one file, from the data set and from the histories of git repositories, and the edits that express them.

A change is of one text file of 5 to 4,000 rows and at most 200 KB, with at most 200 changed rows. Merges and binary, locked,
minified and vendored files are left out.
"""

from __future__ import annotations

import os
import random
import re
import subprocess
import tempfile
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

from benchmarks.data.files import GIT_EDITS, data_folder, load_edits
from paceline.tasks.lines import Lines
from paceline.tasks.snippet import snippet_of

_ENVIRONMENT = {**os.environ, "GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1", "GIT_NO_LAZY_FETCH": "1"}
_GENERATED = re.compile(
    r"(^|/)(vendor|vendored|_vendor|third_party|node_modules|dist|\.yarn)/|"
    r"(\.lock|\.snap|\.min\.(js|css)|\.map|go\.sum|package-lock\.json|npm-shrinkwrap\.json|pnpm-lock\.yaml)$"
)
_ROWS, _BYTES, _CHANGED = range(5, 4001), 200_000, range(1, 201)
_HUNK = re.compile(r"^@@ .*$", re.MULTILINE)


@dataclass(frozen=True)
class Change:
    """One file before and after a commit."""

    repo: str
    commit: str
    path: str
    before: str
    after: str


@cache
def diff_of(change: Change, context: int) -> str:
    """The output of `git diff` for the change with `context` rows of context."""
    with tempfile.TemporaryDirectory() as folder:
        names = [f"{side}/{change.path}" for side in "ab"]
        for name, text in zip(names, (change.before, change.after), strict=True):
            file = Path(folder, name)
            file.parent.mkdir(parents=True)
            file.write_bytes(text.encode())
        command = ["diff", "--no-index", "--no-prefix", "--no-color", f"-U{context}", "--", *names]
        return _git(folder, *command, wrong_above=1).decode()


def unnumbered(change: Change) -> str:
    """The diff with hunk headers without numbers, as models write them."""
    return _HUNK.sub("@@", diff_of(change, 3))


def lazy(context: int, change: Change) -> str | None:
    """A lazy snippet; None where it cannot express the change: line ends change, or no row is left."""
    old, new = change.before, change.after
    before, after = Lines.of(old), Lines.of(new)
    ends = before.newline == after.newline and old.endswith("\n") == new.endswith("\n")
    if not ends or not new.strip() or before.rows == after.rows:
        return None
    return snippet_of(old, new, change.path, context)


STYLES: dict[str, Callable[[Change], str | None]] = {
    **{f"git diff -U{context}": partial(diff_of, context=context) for context in (0, 1, 3)},
    "git diff -U3, bare @@": unnumbered,
    "lazy, 3 lines around": partial(lazy, 3),
    "lazy, 1 line around": partial(lazy, 1),
}


def recorded(limit: int, seed: int) -> dict[str, list[Change]]:
    """The edits of the data set by repository. If they are absent it prints a note and returns none."""
    if not (data_folder() / GIT_EDITS).exists():
        print(f"{data_folder() / GIT_EDITS} is absent: only the repositories given are measured")
        return {}
    found: dict[str, list[Change]] = defaultdict(list)
    for edit in load_edits(None, None, None, 1 << 30):
        name = f"{edit['repo']} ({edit['split']})"
        found[name].append(Change(edit["repo"], edit["commit"], edit["path"], edit["before"], edit["after"]))
    return {name: random.Random(seed).sample(each, min(limit, len(each))) for name, each in found.items()}


def drawn(repo: Path, limit: int, seed: int) -> list[Change]:
    """Changes drawn from a repository's history; the same ones for the same seed and history."""
    listed = _git(
        repo, "log", "--no-merges", "--raw", "--no-abbrev", "-z", "--diff-filter=M", "--no-renames", "--format=@%H"
    )
    found: dict[tuple[str, str], tuple[str, str]] = {}
    commit = ""
    fields = iter(listed.decode("utf-8", "replace").split("\0"))
    for field in fields:
        if field.startswith("@"):
            commit = field[1:]
        elif field.strip().startswith(":"):
            modes, path = field.split(), next(fields)
            plain = modes[0] in (":100644", ":100755") and modes[1] in ("100644", "100755")
            if plain and modes[2] != modes[3] and not _GENERATED.search(path):
                found[modes[2], modes[3]] = commit, path
    order = sorted(found)
    random.Random(seed).shuffle(order)
    changes: list[Change] = []
    with subprocess.Popen(
        ["git", "-C", repo, "cat-file", "--batch"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=_ENVIRONMENT
    ) as blobs:
        for pair in order:
            texts = [_text(blobs, blob) for blob in pair]
            change = Change(name_of(repo), *found[pair], texts[0] or "", texts[1] or "")
            if None not in texts and modest(change):
                changes.append(change)
            if len(changes) == limit:
                break
    return changes


def modest(change: Change) -> bool:
    """Whether the size of the file and of its change are within the limits."""
    if len(Lines.of(change.before).rows) not in _ROWS:
        return False
    hunks = diff_of(change, 0).partition("\n@@")[2]
    return sum(row.startswith(("+", "-")) for row in hunks.split("\n")) in _CHANGED


def _text(blobs: subprocess.Popen[bytes], blob: str) -> str | None:
    """A blob's text; None for one that is absent, large, binary or not UTF-8."""
    assert blobs.stdin is not None and blobs.stdout is not None
    blobs.stdin.write(blob.encode() + b"\n")
    blobs.stdin.flush()
    kind, *size = blobs.stdout.readline().split()[1:]
    if kind == b"missing":
        return None
    data = blobs.stdout.read(int(size[0]) + 1)[:-1]
    try:
        return None if b"\0" in data or len(data) > _BYTES else data.decode()
    except UnicodeDecodeError:
        return None


def name_of(repo: Path) -> str:
    """A repository's name from its path."""
    path = repo.resolve()
    return (path.parent if path.name in ("repo", ".git") else path).name.removesuffix(".git")


def _git(folder: str | Path, *arguments: str, wrong_above: int = 0) -> bytes:
    done = subprocess.run(["git", "-C", folder, *arguments], capture_output=True, env=_ENVIRONMENT)
    if done.returncode > wrong_above:
        raise SystemExit(f"git {arguments[0]} in {folder}: {done.stderr.decode(errors='replace').strip()}")
    return done.stdout
