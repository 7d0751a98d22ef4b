"""Fast Apply by rule alone on small inputs with which edit tools fail: how many results are right, flagged and silently wrong.

    python -m benchmarks.cases tests/tasks/cases.jsonl [--easy] [--only ID] [--show [OUTCOME]]

A record has `id`, `path`, `file`, `edit`, `instruction`, `expected`, and `today`: the outcome when the record was written.
"right" means equal byte for byte. Where `expected` asks for a flag or a refusal, either counts as "rightly flagged". A Compact
case is right if all rows that must stay are there. An exception other than InputError counts as "crashed". Two shares are
printed: results that are right and not flagged, and those together with the rightly flagged.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common import argument_parser, finish, milliseconds
from benchmarks.data.files import read_records
from benchmarks.tools.rule import Answer, by_rule, difference
from paceline.errors import PacelineError
from paceline.tasks.compact import compact
from paceline.tasks.scoring import FILES, ConversationMessage, LineScorer

RIGHT, FLAGGED, RIGHTLY = "right", "flagged", "rightly flagged"
WRONG = "wrong, not flagged"
OUTCOMES = (RIGHT, "right, but flagged", RIGHTLY, FLAGGED, "refused", WRONG, "crashed")
_TO_FLAG = "(must be flagged or refused)\n"
_COMPACT = "paceline compact"
_ERROR = re.compile(r"\b(error|failed|panic|panicked|fatal)\b", re.IGNORECASE)
_FORMS = {
    "blocks": re.compile(r"^(<{5,9}|-{5,9}) ?(SEARCH|ORIGINAL)\b", re.MULTILINE),
    "diff": re.compile(r"^(@@|diff --git |\*\*\* Begin Patch|--- .*\n\+\+\+ )", re.MULTILINE),
}
_FEW = 3  # cases of a first word that make a row of the table


@dataclass(frozen=True)
class Judged:
    """A case and its outcome."""

    record: dict[str, Any]
    form: str
    outcome: str
    answer: Answer

    @property
    def good(self) -> bool:
        return self.outcome in (RIGHT, RIGHTLY)

    @property
    def worse(self) -> bool:
        """Whether it is not right now but was when the record was written."""
        past = self.record["today"]
        flag = self.record["expected"] == _TO_FLAG and past in (FLAGGED, "refused")
        return not self.good and (past == RIGHT or flag)


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--easy", action="store_true", help="only the cases with one possible reading")
    parser.add_argument("--only", metavar="ID")
    parser.add_argument(
        "--show", nargs="?", const="wrong", metavar="OUTCOME", help="an outcome, its beginning, or: worse"
    )
    arguments = parser.parse_args()
    records = [
        record
        for record in read_records(arguments.file)
        if arguments.only in (None, record["id"]) and (record["easy"] or not arguments.easy)
    ]
    judged = [judge(record) for record in records]
    if arguments.show or arguments.only:
        wanted = arguments.show or ""
        for each in judged:
            if each.worse if wanted == "worse" else _begins(each.outcome, wanted):
                show(each)
    finish({"benchmark": "cases", "file": str(arguments.file), **report(judged)})


def judge(record: dict[str, Any]) -> Judged:
    """Runs a case and judges the result."""
    if not record["edit"] and record["instruction"].startswith(_COMPACT):
        return compacted(record)
    path = record["path"] if record["path"] != "None" else None
    answer = by_rule(record["file"], record["edit"], path, record["instruction"])
    if answer.crashed:
        outcome = "crashed"
    elif record["expected"] == _TO_FLAG:
        outcome = WRONG if answer.silent else RIGHTLY
    elif answer.refused:
        outcome = "refused"
    elif answer.text == record["expected"]:
        outcome = RIGHT if answer.silent else "right, but flagged"
    else:
        outcome = WRONG if answer.silent else FLAGGED
    return Judged(record, form_of(record["edit"]), outcome, answer)


def compacted(record: dict[str, Any]) -> Judged:
    """Runs a Compact case by the command in its instruction.

    It is right if no row of `expected` is lost; where `expected` names none, no row that reports an error.
    """
    said = record["instruction"]
    ratio, query = re.search(r"--ratio ([\d.]+)", said), re.search(r"--query (['\"])(.*?)\1", said)
    message = ConversationMessage("user", record["file"], record["path"])
    began = time.perf_counter()
    try:
        text = compact(
            [message],
            query[2] if query else "",
            ratio=float(ratio[1]) if ratio else 0.5,
            preserve_recent=0,
            scorer=LineScorer(FILES),
        ).text
    except PacelineError as error:
        return Judged(record, "compact", "refused", Answer(None, (str(error),), time.perf_counter() - began))
    rows, named = record["file"].splitlines(), set(record["expected"].splitlines())
    due = [row for row in rows if row in named] or [row for row in rows if _ERROR.search(row)]
    lost = Counter(due) - Counter(text.splitlines())
    return Judged(record, "compact", WRONG if lost else RIGHT, Answer(text, (), time.perf_counter() - began))


def form_of(edit: str) -> str:
    """The form that an edit is written in."""
    rows = [row for row in edit.splitlines() if row.strip()]
    signs = {row[0] for row in rows}
    if {"+", "-"} <= signs <= {"+", "-", " "}:
        return "other"
    return next((form for form, sign in _FORMS.items() if sign.search(edit)), "lazy")


def report(judged: list[Judged]) -> dict[str, Any]:
    """Prints the table by form and by the first word of the id, then the totals; returns them as a record."""
    print(f"{'kind':26}{'cases':>6}" + "".join(f"  {outcome}" for outcome in OUTCOMES))
    kinds: dict[str, dict[str, int]] = {}
    for form in sorted({each.form for each in judged}):
        part = [each for each in judged if each.form == form]
        kinds[form] = _row(form, part)
        words = Counter(map(_word, part))
        common = sorted(word for word, number in words.items() if number >= _FEW)
        for word in common:
            kinds[f"{form}, {word}"] = _row(f"  {word}", [each for each in part if _word(each) == word])
        if common and len(common) < len(words):
            kinds[f"{form}, others"] = _row("  others", [each for each in part if _word(each) not in common])
    total = _row("all", judged)
    number = max(1, len(judged))
    easy = [each for each in judged if each.record["easy"]]
    seconds = [each.answer.seconds for each in judged]
    times = {"median": milliseconds(seconds, 0.5), "p99": milliseconds(seconds, 0.99)}
    worse = [each.record["id"] for each in judged if each.worse]
    result: dict[str, Any] = {
        "cases": len(judged),
        **{outcome: total.get(outcome, 0) for outcome in OUTCOMES},
        "right_share": round(total.get(RIGHT, 0) / number, 4),
        "right_or_rightly_flagged_share": round(sum(each.good for each in judged) / number, 4),
        "easy": len(easy),
        "easy_right": sum(each.good for each in easy),
        "worse": worse,
        "milliseconds": times,
        "kinds": kinds,
    }
    print(
        f"right: {result['right_share']:.1%}; with the rightly flagged: {result['right_or_rightly_flagged_share']:.1%}"
    )
    print(f"easy cases right: {result['easy_right']} of {len(easy)}; crashed: {result['crashed']}")
    print(f"right when written and not now: {', '.join(worse) or 'none'}")
    print("milliseconds a case: median {median}, p99 {p99}".format(**times))
    return result


def _row(name: str, judged: list[Judged]) -> dict[str, int]:
    counts = Counter(each.outcome for each in judged)
    cells = "".join(f"{counts[outcome] or '':>{len(outcome) + 2}}" for outcome in OUTCOMES)
    print(f"{name:26}{counts.total():>6}{cells}")
    return dict(counts)


def _word(judged: Judged) -> str:
    """The first word of a case's id, without a number at its end."""
    return str(judged.record["id"]).split("-")[0].rstrip("0123456789")


def _begins(outcome: str, wanted: str) -> bool:
    return outcome == wanted if wanted in OUTCOMES else outcome.startswith(wanted)


def show(judged: Judged) -> None:
    record, answer = judged.record, judged.answer
    print(f"=== {record['id']} ({record['path']}): {judged.outcome}; today was: {record['today']}; {record['source']}")
    if record["instruction"]:
        print(f"instruction: {record['instruction']}")
    for reason in answer.reasons:
        print(f"reason: {reason}")
    print(record["edit"], end="")
    if judged.form != "compact" and answer.text != record["expected"]:
        print(difference(record["expected"], answer.text) if answer.text is not None else "--- no result")
    print()


if __name__ == "__main__":
    main()
