"""Compact: the share of what an agent's next edit uses that is still there after compaction, against simpler ways to cut.

    python -m benchmarks.compact [--traces FILE] [--ratios 0.5,0.3] [--split odd] [--limit N] [--without] [--model NAME]

Each case is a recorded conversation (mini_swe_agent_gemini3.jsonl.gz) up to a message in which the agent edits a file. The
last two messages are preserved; no query is given. "identifiers" are the words of the edit's command that the compacted part
of the history contains and the preserved messages do not. "lines" are the lines that the conversation's final diff changes or
shows around its changes, if the compacted part shows them and the preserved messages do not. Each figure is the share that is
still there, a mean over the cases. The rules' weights were tuned on the even conversations; the odd ones only report. All ways
to cut are scorers behind the same selection, so results have the same size: characters, or tokens of --model.
"""

from __future__ import annotations

import random
import re
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common import argument_parser, finish, quantiles
from benchmarks.data.files import data_path, read_records
from paceline.tasks.compact import Compacted, Count, compact
from paceline.tasks.scoring import ConversationMessage, LineScorer, Scorer, Weights, split_lines

_COMMAND = re.compile(r"```bash\n(.*?)\n```", re.DOTALL)
_EDITS = re.compile(r"sed -i|<<\s*['\"]?\w+|\bapply_patch\b|git apply")
_WORD = re.compile(r"[^\W\d]\w{3,}")
_LEAST_LINES = 200  # a shorter history needs no compaction
_PER_CONVERSATION = 4


@dataclass(frozen=True)
class Case:
    """A history, and the identifiers and lines of it that the agent uses next."""

    messages: list[ConversationMessage]
    identifiers: frozenset[str]
    lines: frozenset[str]


class Order:
    """A scorer by place alone: first lines (head), last lines (tail), both ends of each message (ends), or at random."""

    def __init__(self, kind: str) -> None:
        self._kind = kind

    def score(self, messages: Sequence[ConversationMessage], query: str | None) -> list[list[float]]:
        source = random.Random(0)
        texts = [split_lines(message.content) for message in messages]
        number = sum(map(len, texts))
        places = iter(range(number))
        values = []
        for lines in texts:
            row = []
            for index, place in zip(range(len(lines)), places, strict=False):
                near = -min(index, len(lines) - 1 - index)
                row.append({"head": -place, "tail": place, "ends": near, "random": source.random()}[self._kind])
            values.append([float(value) for value in row])
        return values


WITHOUT = {
    "repeats": Weights(shown_before=0.0, shown_later=1.0, shown_later_with_neighbour=1.0),
    "relevance": Weights(query=0.0, last_user=0.0, latest=0.0, first_user=0.0),
    "recency": Weights(recency=0.0),
    "code": Weights(definition=0.0, imports=0.0, code=0.0),
}
WAYS: dict[str, Scorer] = {"rules": LineScorer(), **{kind: Order(kind) for kind in ("random", "head", "tail", "ends")}}


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--traces", type=Path)
    parser.add_argument("--ratios", default="0.5,0.3")
    parser.add_argument("--split", choices=("odd", "even", "all"), default="odd")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--without", action="store_true", help="also the rules with one thing left out each")
    parser.add_argument("--model", help="count with this model's tokenizer")
    arguments = parser.parse_args()
    records = read_records(arguments.traces or data_path("traces/mini_swe_agent_gemini3.jsonl.gz"))
    chosen = {"all": records, "even": records[::2], "odd": records[1::2]}[arguments.split]
    cases = [case for record in chosen for case in cases_of(record["messages"])][: arguments.limit]
    count = counter(arguments.model) if arguments.model else None
    result: dict[str, Any] = {"benchmark": "compact", "split": arguments.split, "cases": len(cases)}
    ways = dict(WAYS)
    if arguments.without:
        ways |= {f"without {name}": LineScorer(weights) for name, weights in WITHOUT.items()}
    for ratio in map(float, arguments.ratios.split(",")):
        result[str(ratio)] = {name: measure(name, scorer, cases, ratio, count) for name, scorer in ways.items()}
    result["long"] = one_long(records, count)
    finish(result)


def cases_of(conversation: list[dict[str, str]]) -> list[Case]:
    messages = [ConversationMessage(each["role"], each["content"]) for each in conversation]
    shown = _shown_before(messages[-1].content)
    cases = []
    for index, message in enumerate(messages):
        command = "\n".join(_COMMAND.findall(message.content)) if message.role == "assistant" else ""
        if not _EDITS.search(command):
            continue
        history = messages[:index]
        open_text = "".join(each.content + "\n" for each in history[:-2] if each.role != "system")
        fixed = "".join(each.content + "\n" for each in history if each.role == "system" or each in history[-2:])
        if open_text.count("\n") < _LEAST_LINES:
            continue
        identifiers = words(command) & words(open_text) - words(fixed)
        lines = shown & stripped(open_text) - stripped(fixed)
        if identifiers and lines:
            cases.append(Case(history, frozenset(identifiers), frozenset(lines)))
    step = max(1, len(cases) // _PER_CONVERSATION)
    return cases[::step][:_PER_CONVERSATION]


def _shown_before(diff: str) -> set[str]:
    """The lines of a diff that its files contained before."""
    rows = [row[1:].strip() for row in diff.split("\n") if row[:1] in ("-", " ") and not row.startswith("--- ")]
    return {row for row in rows if len(row) >= 12}


def words(text: str) -> set[str]:
    return set(_WORD.findall(text))


def stripped(text: str) -> set[str]:
    """A text's lines without surrounding white space and without the line numbers that tools print."""
    return {re.sub(r"^\s*\d+[\t:→-]?\s", "", line).strip() for line in text.split("\n")}


def measure(name: str, scorer: Scorer, cases: list[Case], ratio: float, count: Count | None) -> dict[str, Any]:
    identifiers, lines, shares, seconds, gaps = [], [], [], [], []
    for case in cases:
        began = time.perf_counter()
        done = compact(case.messages, ratio=ratio, scorer=scorer, count=count)
        seconds.append(time.perf_counter() - began)
        kept = open_text(case, done)
        identifiers.append(len(case.identifiers & words(kept)) / len(case.identifiers))
        lines.append(len(case.lines & stripped(kept)) / len(case.lines))
        shares.append(done.spent / (done.budget / ratio))
        gaps.append(sum(len(each.dropped) for each in done.messages) / max(1, kept.count("\n")))
    row = {
        "identifiers": round(statistics.mean(identifiers), 4),
        "lines": round(statistics.mean(lines), 4),
        "share": round(statistics.mean(shares), 4),
        "gaps_a_line": round(statistics.mean(gaps), 3),
        "milliseconds": {part: round(1000 * value, 1) for part, value in quantiles(seconds).items()},
    }
    print(f"{ratio} {name:8}", row)
    return row


def open_text(case: Case, done: Compacted) -> str:
    """The text that is left of the messages that could be compacted."""
    pairs = list(zip(case.messages, done.messages, strict=True))[:-2]
    return "".join(after.content + "\n" for before, after in pairs if before.role != "system")


def one_long(records: list[dict[str, Any]], count: Count | None) -> dict[str, Any]:
    """The processor time of one compaction of 100,000 lines, of many conversations joined, after a warm-up."""
    messages: list[ConversationMessage] = []
    number = 0
    while number < 100_000:
        for record in records:
            for each in record["messages"] if number < 100_000 else ():
                messages.append(ConversationMessage(each["role"], each["content"]))
                number += each["content"].count("\n") + 1
    compact(messages[:200], "where is the query built", ratio=0.3, count=count)
    began = time.process_time()
    done = compact(messages, "where is the query built", ratio=0.3, count=count)
    seconds = time.process_time() - began
    print(f"{number} lines: {seconds:.2f} s")
    return {"lines": number, "seconds": round(seconds, 3), "share": round(done.spent / (done.budget / 0.3), 4)}


def counter(model: str) -> Count:
    """Counts tokens with the tokenizer of a pulled model."""
    from paceline.models.checkpoint import open_checkpoint
    from paceline.models.pull import pull

    return open_checkpoint(pull(model)).tokenizer().lengths


if __name__ == "__main__":
    main()
