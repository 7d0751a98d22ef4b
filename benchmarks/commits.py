"""Fast Apply by rule on real commits: each file's change given as a diff and as a lazy snippet.

    python -m benchmarks.commits [REPO ...] [--limit N] [--seed N] [--show] [--dump FILE]

The changes are those of git_edits (train and dev) and of the history of each repository given by its path, bare or not
(benchmarks/data/commits.py has the limits and the styles of edits). "exact" is equal byte for byte, flagged or not; "flagged"
counts refusals too; "wrong" is neither. "blank" counts the wrong results that differ in blank rows alone, "fits" the other
wrong results that the snippet describes as well as the right one. A lazy snippet cannot express a change of line ends; those
changes are left out for it. --dump writes the wrong and the flagged edits in the form of cases.jsonl.
"""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from benchmarks.common import argument_parser, finish, milliseconds
from benchmarks.data.commits import STYLES, Change, diff_of, drawn, name_of, recorded
from benchmarks.tools.rule import Answer, by_rule, difference
from paceline.tasks.lines import Lines

_MARKER = re.compile(r"^.*\.\.\. existing code \.\.\..*\n?", re.MULTILINE)
_COLUMNS = ("cases", "exact", "exact, flagged", "flagged", "refused", "wrong", "blank", "fits", "crashed")


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("repos", nargs="*", type=Path, metavar="REPO", help="a git repository's path")
    parser.add_argument("--limit", type=int, default=250, help="changes of each repository")
    parser.add_argument("--seed", type=int, default=0, help="which changes of a repository are drawn")
    parser.add_argument("--skip-data", action="store_true", help="only the repositories, not the data set")
    parser.add_argument("--show", action="store_true", help="print what is wrong and not flagged")
    parser.add_argument("--dump", type=Path, metavar="FILE", help="write the wrong and flagged ones as JSON lines")
    arguments = parser.parse_args()

    sources = {} if arguments.skip_data else recorded(arguments.limit, arguments.seed)
    for repo in arguments.repos:
        sources[name_of(repo)] = drawn(repo, arguments.limit, arguments.seed)
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
    finish({"benchmark": "commits", "all": total, "milliseconds": times, "repositories": tables})


def judge(change: Change, answer: Answer, update: str) -> set[str]:
    """The columns of the table in which an answer counts."""
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
    """Whether a lazy snippet describes `text` as well: each of its parts occurs in the text, in order."""
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


def report(name: str, table: dict[str, Counter[str]]) -> None:
    """Prints a repository's rows."""
    print(f"{name:32}" + "".join(f"  {column}" for column in _COLUMNS))
    for style, counts in table.items():
        print(f"  {style:30}" + "".join(f"{counts[column] or '':>{len(column) + 2}}" for column in _COLUMNS))


def show(change: Change, style: str, update: str, answer: Answer) -> None:
    print(f"=== {change.repo} {change.commit} {change.path}: {style}")
    print(update, *answer.reasons, difference(change.after, answer.text) if answer.text else "", sep="\n")


def case_of(change: Change, style: str, update: str, verdict: set[str]) -> dict[str, Any]:
    """The change as a record of cases.jsonl."""
    names = {"wrong": "wrong, not flagged", "exact": "right, but flagged"}
    today = next(
        (names.get(each, each) for each in ("crashed", "wrong", "refused", "exact") if each in verdict), "flagged"
    )
    return {
        "id": re.sub(r"\W+", "-", f"{style} {change.repo} {change.commit[:10]} {change.path}"),
        "path": change.path, "file": change.before, "edit": update, "instruction": "", "expected": change.after,
        "source": f"{change.repo}@{change.commit}", "today": today, "easy": style.startswith("git diff"),
    }  # fmt: skip


if __name__ == "__main__":
    main()
