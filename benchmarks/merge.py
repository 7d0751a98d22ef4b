"""The merge by rule and its checks, without a model: how often candidate merges are right, and what the checks see.

    python -m benchmarks.merge [--edits FILE] [--limit N]

The snippets of git_edits are made by rule from each commit's difference, in the styles of benchmarks/data/snippets.py. The
rules were tuned on train; dev only reports. "exact" is equal to the commit's text, "tree" is exact or equal in syntax tree,
"flagged" is doubtful or refused, "wrong" is neither equal in tree nor flagged. For the checks, each right result is changed in
one way (benchmarks/data/mutations.py): "seen" is the share of changed results that are flagged, "false_flags" the share of
right results that are.
"""

from __future__ import annotations

import random
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.common import argument_parser, finish, quantiles
from benchmarks.data import edits
from benchmarks.data.edits import Case
from benchmarks.data.mutations import MUTATIONS, Mutation
from benchmarks.data.snippets import STYLES
from paceline.errors import InputError
from paceline.tasks.checks import check, same_syntax_tree
from paceline.tasks.merge import candidate_merge
from paceline.tasks.snippet import snippet_of


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--edits", type=Path, help="a file in the form of git_edits.jsonl.gz")
    parser.add_argument("--limit", type=int, help="most edits of each split")
    parser.add_argument("--skip-checks", action="store_true")
    parser.add_argument("--show", action="store_true", help="name the merges that are not exact")
    arguments = parser.parse_args()

    train = edits.git_cases(arguments.edits, "train", arguments.limit)
    dev = edits.git_cases(arguments.edits, "dev", arguments.limit)
    sets = {
        f"{split}, {style}": [replace(case, update=update) for case in cases if (update := make(case))]
        for split, cases in (("train", train), ("dev", dev))
        for style, make in STYLES.items()
    }
    sets["aider blocks"] = edits.block_cases()
    sets["aider replies"], sets["aider replies, no marker"] = edits.replies(True), edits.replies(False)
    sets["continue lazy (white space aside)"] = edits.lazy_cases()
    merges = {name: measure(name, cases, arguments.show) for name, cases in sets.items()}
    long_file = one_long_file(train)
    print(f"a file of {long_file['lines']} lines: {long_file['milliseconds']} ms")
    result = {"benchmark": "merge", "merges": merges, "long_file": long_file}
    if not arguments.skip_checks:
        result["checks"] = {name: judge(name, sets[name]) for name in sets if "3 lines" in name or "whole" in name}
    finish(result)


def measure(name: str, cases: list[Case], show: bool) -> dict[str, Any]:
    """Counts candidate merges that are right, that are flagged, and that are wrong (neither)."""
    exact = tree = refused = flagged = wrong = 0
    seconds = []
    for case in cases:
        began = time.perf_counter()
        try:
            text = candidate_merge(case.before, case.update).text
        except InputError:
            text, refused = "", refused + 1
        seconds.append(time.perf_counter() - began)
        right = text == case.after if "lazy" not in name else text.split() == case.after.split()
        exact += right
        equal = right or same_syntax_tree(text, case.after, case.path)
        tree += equal
        doubtful = bool(check(case.before, case.update, text, case.path))
        flagged += doubtful
        wrong += not equal and not doubtful
        if show and not right:
            print(f"  not exact: {case.path}")
    counts = {"cases": len(cases), "exact": exact, "tree": tree, "refused": refused, "flagged": flagged, "wrong": wrong}
    rate = exact / max(1, len(cases))
    times = {part: round(1000 * value, 2) for part, value in quantiles(seconds).items()}
    print(
        f"{name:36} exact {exact:4} of {len(cases):4} ({rate:.1%}), tree {tree:4}, flagged {flagged:4}, wrong {wrong:3}"
    )
    return {**counts, "exact_rate": round(rate, 4), "milliseconds": times}


def one_long_file(cases: list[Case]) -> dict[str, Any]:
    """The time of one merge into a file of 3,000 lines, made of many files, and whether the result is right."""
    before: list[str] = []
    after: list[str] = []
    for case in cases:
        if len(before) < 3000:
            before += case.before.splitlines()
            after += case.after.splitlines() if len(before) in range(1400, 1800) else case.before.splitlines()
    old, new = "\n".join(before) + "\n", "\n".join(after) + "\n"
    update = snippet_of(old, new, "file.py")
    began = time.perf_counter()
    text = candidate_merge(old, update).text if old != new else new
    milliseconds = round(1000 * (time.perf_counter() - began), 1)
    return {"lines": len(before), "milliseconds": milliseconds, "exact": text == new}


def judge(name: str, cases: list[Case]) -> dict[str, Any]:
    """Counts what the checks flag: right results, wrong candidate merges, and results changed in one way."""
    flagged = [case for case in cases if check(case.before, case.update, case.after, case.path)]
    wrong = unseen = 0
    for case in cases:
        try:
            text = candidate_merge(case.before, case.update).text
        except InputError:
            continue
        if not same_syntax_tree(text, case.after, case.path):
            wrong += 1
            unseen += not check(case.before, case.update, text, case.path)
    outcome: dict[str, Any] = {
        "cases": len(cases),
        "false_flags": round(len(flagged) / max(1, len(cases)), 4),
        "wrong_candidates": wrong,
        "wrong_candidates_unseen": unseen,
        "seen": {mutation: seen(mutate, cases) for mutation, mutate in MUTATIONS.items()},
    }
    print(f"{name}: {outcome}")
    return outcome


def seen(mutate: Mutation, cases: list[Case]) -> float:
    """The share of changed results that the checks flag, without results that are still equal in syntax tree."""
    source = random.Random(0)
    flagged = count = 0
    for case in cases:
        text = mutate(case, source)
        if text is None or same_syntax_tree(text, case.after, case.path):
            continue
        count += 1
        flagged += bool(check(case.before, case.update, text, case.path))
    return round(flagged / max(1, count), 4)


if __name__ == "__main__":
    main()
