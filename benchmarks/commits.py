"""Fast Apply by rule on real commits: each file's change given as a diff and as a lazy snippet, in the styles of STYLES.

    python benchmarks/commits.py [REPO ...] [--limit N] [--seed N] [--show] [--dump FILE]

The changes are those of ../shared/data (git_edits, train and dev) and of the history of each repository given by its path,
bare or not: one text file of 5 to 4,000 rows and at most 200 KB, with at most 200 changed rows. Merges, binary, locked,
minified and vendored files are left out. "exact" is equal byte for byte, flagged or not; "flagged" counts refusals too;
"wrong" is neither; "blank" are those of the wrong that differ in blank rows alone, "fits" those others of which the snippet is
true as well, so that it does not tell. A lazy snippet cannot say what becomes of line ends, so changes of those are no cases
of it. --dump writes wrong and flagged ones in apply.jsonl's form.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import subprocess
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import common
from rule import Answer, by_rule, difference, milliseconds

from paceline.tasks.lines import Lines
from paceline.tasks.snippet import snippet_of

_EDITS = "edits/git_edits.jsonl.gz"
_ENVIRONMENT = {**os.environ, "GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1", "GIT_NO_LAZY_FETCH": "1"}
_GENERATED = re.compile(
    r"(^|/)(vendor|vendored|_vendor|third_party|node_modules|dist|\.yarn)/|"
    r"(\.lock|\.snap|\.min\.(js|css)|\.map|go\.sum|package-lock\.json|npm-shrinkwrap\.json|pnpm-lock\.yaml)$"
)
_ROWS, _BYTES, _CHANGED = range(5, 4001), 200_000, range(1, 201)
_MARKER = re.compile(r"^.*\.\.\. existing code \.\.\..*\n?", re.MULTILINE)
_HUNK = re.compile(r"^@@ .*$", re.MULTILINE)
_COLUMNS = ("cases", "exact", "exact, flagged", "flagged", "refused", "wrong", "blank", "fits", "crashed")


@dataclass(frozen=True)
class Change:
    """What a commit made of one file."""

    repo: str
    commit: str
    path: str
    before: str
    after: str


@cache
def diff_of(change: Change, context: int) -> str:
    """What `git diff` prints of the change with so many rows of context."""
    with tempfile.TemporaryDirectory() as folder:
        names = [f"{side}/{change.path}" for side in "ab"]
        for name, text in zip(names, (change.before, change.after), strict=True):
            file = Path(folder, name)
            file.parent.mkdir(parents=True)
            file.write_bytes(text.encode())
        command = ["diff", "--no-index", "--no-prefix", "--no-color", f"-U{context}", "--", *names]
        return _git(folder, *command, wrong_above=1).decode()


def unnumbered(change: Change) -> str:
    """The diff with hunk headers that say nothing, as models write them."""
    return _HUNK.sub("@@", diff_of(change, 3))


def lazy(context: int, change: Change) -> str | None:
    """A lazy snippet; None where it cannot say the whole change, which is one of line ends, or leaves no row."""
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


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("repos", nargs="*", type=Path, metavar="REPO", help="a git repository's path")
    parser.add_argument("--limit", type=int, default=250, help="changes of each repository")
    parser.add_argument("--seed", type=int, default=0, help="which changes of a repository are drawn")
    parser.add_argument("--skip-data", action="store_true", help="only the repositories, not ../shared/data")
    parser.add_argument("--show", action="store_true", help="print what is wrong and not flagged")
    parser.add_argument("--dump", type=Path, metavar="FILE", help="write the wrong and flagged ones as JSON lines")
    arguments = parser.parse_args()

    sources = {} if arguments.skip_data else recorded(arguments.limit, arguments.seed)
    for repo in arguments.repos:
        sources[_name(repo)] = drawn(repo, arguments.limit, arguments.seed)
    if not sources:
        parser.error("there are no edits: give the path of a git repository")
    tallies: dict[str, dict[str, Counter[str]]] = {}
    seconds: list[float] = []
    records: list[dict[str, Any]] = []
    for name, changes in sources.items():
        tallies[name] = defaultdict(Counter)
        for change in changes:
            for style, make in STYLES.items():
                update = make(change)
                if update is None:
                    continue
                answer = by_rule(change.before, update, change.path)
                seconds.append(answer.seconds)
                verdict = judge(change, answer, update)
                tallies[name][style].update(["cases", *verdict])
                if arguments.show and verdict & {"wrong", "crashed"}:
                    show(change, style, update, answer)
                if arguments.dump and verdict & {"wrong", "crashed", "flagged"}:
                    records.append(case_of(change, style, update, verdict))
            diff_of.cache_clear()
        report(name, tallies[name])
    total = {style: sum((each[style] for each in tallies.values()), Counter()) for style in STYLES}
    report("all", total)
    if arguments.dump:
        arguments.dump.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    times = {"median": milliseconds(seconds, 0.5), "p99": milliseconds(seconds, 0.99)}
    print("milliseconds an edit: median {median}, p99 {p99}".format(**times))
    tables = {name: {style: dict(counts) for style, counts in table.items()} for name, table in tallies.items()}
    common.finish({"benchmark": "commits", "all": total, "milliseconds": times, "repositories": tables})


def judge(change: Change, answer: Answer, update: str) -> set[str]:
    """The columns of the table that an answer to an edit counts in."""
    if answer.crashed:
        return {"crashed"}
    if answer.text is None:
        return {"flagged", "refused"}
    exact = answer.text == change.after
    if answer.reasons:
        return {"flagged", "exact", "exact, flagged"} if exact else {"flagged"}
    if exact:
        return {"exact"}
    full = [[row for row in text.splitlines() if row.strip()] for text in (answer.text, change.after)]
    if full[0] == full[1]:
        return {"wrong", "blank"}
    return {"wrong", "fits"} if fits(update, answer.text) else {"wrong"}


def fits(update: str, text: str) -> bool:
    """Whether a lazy snippet is one of `text` too: its parts stand in it, in order, so that it does not tell the two apart."""
    rows = Lines.of(text).rows
    reached = 0
    for part in _MARKER.split(update):
        wanted = part.removesuffix("\n").split("\n")
        places = range(reached, len(rows) - len(wanted) + 1)
        place = next((place for place in places if rows[place : place + len(wanted)] == wanted), None)
        if part and place is None:
            return False
        reached = reached if place is None or not part else place + len(wanted)
    return True


def recorded(limit: int, seed: int) -> dict[str, list[Change]]:
    """The edits of ../shared/data by repository; none, and a word on it, where they are absent."""
    if not (common.DATA / _EDITS).exists():
        print(f"{common.DATA / _EDITS} is absent, so its edits are not measured; only the repositories given are")
        return {}
    found: dict[str, list[Change]] = defaultdict(list)
    for edit in common.load_edits(None, None, None, 1 << 30):
        name = f"{edit['repo']} ({edit['split']})"
        found[name].append(Change(edit["repo"], edit["commit"], edit["path"], edit["before"], edit["after"]))
    return {name: random.Random(seed).sample(each, min(limit, len(each))) for name, each in found.items()}


def drawn(repo: Path, limit: int, seed: int) -> list[Change]:
    """Changes of a repository's history, the same ones for a seed and a state of it."""
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
            change = Change(_name(repo), *found[pair], texts[0] or "", texts[1] or "")
            if None not in texts and modest(change):
                changes.append(change)
            if len(changes) == limit:
                break
    return changes


def modest(change: Change) -> bool:
    """Whether the file and what changes of it are of a size for an edit."""
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


def report(name: str, table: dict[str, Counter[str]]) -> None:
    """Prints a repository's rows."""
    print(f"{name:32}" + "".join(f"  {column}" for column in _COLUMNS))
    for style, counts in table.items():
        print(f"  {style:30}" + "".join(f"{counts[column] or '':>{len(column) + 2}}" for column in _COLUMNS))


def show(change: Change, style: str, update: str, answer: Answer) -> None:
    print(f"=== {change.repo} {change.commit} {change.path}: {style}")
    print(update, *answer.reasons, difference(change.after, answer.text) if answer.text else "", sep="\n")


def case_of(change: Change, style: str, update: str, verdict: set[str]) -> dict[str, Any]:
    """The change as a case of apply.jsonl."""
    names = {"wrong": "wrong, not flagged", "exact": "right, but flagged"}
    today = next(
        (names.get(each, each) for each in ("crashed", "wrong", "refused", "exact") if each in verdict), "flagged"
    )
    return {
        "id": re.sub(r"\W+", "-", f"{style} {change.repo} {change.commit[:10]} {change.path}"),
        "path": change.path, "file": change.before, "edit": update, "instruction": "", "expected": change.after,
        "source": f"{change.repo}@{change.commit}", "today": today, "easy": style.startswith("git diff"),
    }  # fmt: skip


def _name(repo: Path) -> str:
    """A repository's name from its path."""
    path = repo.resolve()
    return (path.parent if path.name in ("repo", ".git") else path).name.removesuffix(".git")


def _git(folder: str | Path, *arguments: str, wrong_above: int = 0) -> bytes:
    done = subprocess.run(["git", "-C", folder, *arguments], capture_output=True, env=_ENVIRONMENT)
    if done.returncode > wrong_above:
        raise SystemExit(f"git {arguments[0]} in {folder}: {done.stderr.decode(errors='replace').strip()}")
    return done.stdout


if __name__ == "__main__":
    main()
