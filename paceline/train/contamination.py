"""The contamination check: no prompt or output of the training data shares 13 words in a row with a held-out text."""

from __future__ import annotations

import gzip
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from paceline.errors import InputError

NGRAM = 13  # words, as in the GPT-3 paper's check (Brown et al. 2020, appendix C)
HELD_OUT_MBPP = 100  # the last records of MBPP, which judge the drafters
_WORD = re.compile(r"[a-z0-9]+")
_IMPORT = re.compile(r"^[ \t>.]*(?:import[ \t]+\w|from[ \t]+[\w.]+[ \t]+import\b).*$", re.MULTILINE)
_MBPP, _BIGCODEBENCH, _EDITS = "prompts/mbpp.jsonl.gz", "prompts/bigcodebench_hard.json.gz", "edits/git_edits.jsonl.gz"
_STARTING_WITH = "You should write self-contained code starting with"  # what follows is in every prompt of that form


def words(text: str) -> list[str]:
    """A text's words in lower case, letters and digits only. Import lines are left out: unrelated programs share them."""
    return _WORD.findall(_IMPORT.sub("", text).lower())


class HeldOut:
    """The n-grams of the held-out texts, and which benchmark each is of."""

    def __init__(self, size: int = NGRAM) -> None:
        self.size = size
        self.texts: Counter[str] = Counter()
        self._sources: dict[int, str] = {}

    @property
    def num_ngrams(self) -> int:
        return len(self._sources)

    def add(self, source: str, text: str) -> None:
        """Adds a text of the benchmark `source`. A text of fewer than `size` words has no n-gram and matches nothing."""
        self.texts[source] += 1
        for ngram in self._ngrams(text):
            self._sources.setdefault(ngram, source)

    def find(self, text: str) -> str | None:
        """The benchmark of the first n-gram that `text` shares with a held-out text; None where it shares none."""
        sources = self._sources
        return next((sources[ngram] for ngram in self._ngrams(text) if ngram in sources), None)

    def _ngrams(self, text: str) -> Iterator[int]:
        """Hashes of 64 bits that hold within this process: among 10^7 lookups a false match is not to be expected."""
        found = words(text)
        for first in range(len(found) - self.size + 1):
            yield hash(tuple(found[first : first + self.size]))


@dataclass
class Contamination:
    """What a check found; `summary` is for the drafter's card."""

    held_out: HeldOut
    num_checked: int = 0
    hits: Counter[str] = field(default_factory=Counter)  # by benchmark
    tasks: Counter[str] = field(default_factory=Counter)  # by the record's task

    def summary(self) -> dict[str, Any]:
        """Counts of texts held out, records checked and records removed."""
        return {
            "ngram": self.held_out.size,
            "held_out_texts": dict(sorted(self.held_out.texts.items())),
            "held_out_ngrams": self.held_out.num_ngrams,
            "checked": self.num_checked,
            "removed": self.hits.total(),
            "removed_by_benchmark": dict(sorted(self.hits.items())),
            "removed_by_task": dict(sorted(self.tasks.items())),
        }


def remove_contaminated(
    records: Iterable[dict[str, Any]], held_out: HeldOut
) -> tuple[list[dict[str, Any]], Contamination]:
    """The records without a hit, in order, and the counts. All strings of a record's messages and its "text" are read."""
    result = Contamination(held_out)
    kept = []
    for record in records:
        result.num_checked += 1
        source = held_out.find(record_text(record))
        if source is None:
            kept.append(record)
        else:
            result.hits[source] += 1
            result.tasks[str(record.get("task", ""))] += 1
    return kept, result


def record_text(record: Mapping[str, Any]) -> str:
    """The text of a record's messages, and its "text", "output" and "response" where it has them."""
    parts = [message.get("content") for message in record.get("messages", [])]
    parts += [record.get(name) for name in ("text", "output", "response")]
    return "\n".join(part for part in parts if isinstance(part, str))


def load_held_out(data: Path, extra: Iterable[Path] = ()) -> HeldOut:
    """The held-out texts: MBPP's last records, BigCodeBench-hard, the edits of split "dev", and those of `extra` files.

    `data` is the data set's folder. An extra file is .jsonl, .jsonl.gz, .json (its strings are the texts) or a text;
    a folder stands for the .py files in it. Raises InputError for a file that is not there.
    """
    held_out = HeldOut()
    for record in read_records(data / _MBPP)[-HELD_OUT_MBPP:]:
        held_out.add("mbpp-last-100", "\n".join([record["text"], record["code"], *record["test_list"]]))
    for record in read_records(data / _BIGCODEBENCH):
        prompt = record["instruct_prompt"].split(_STARTING_WITH)[0]
        held_out.add("bigcodebench-hard", "\n".join([prompt, record["complete_prompt"]]))
        held_out.add("bigcodebench-hard", "\n".join([record["canonical_solution"], record["test"]]))
    for record in read_records(data / _EDITS):
        if record["split"] == "dev":
            held_out.add("edits-dev", record["before"])
            held_out.add("edits-dev", record["after"])
    for path in extra:
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            for text in _texts(file):
                held_out.add(path.name.split(".")[0], text)
    return held_out


def _texts(path: Path) -> Iterator[str]:
    if ".json" not in path.name:
        if not path.is_file():
            raise InputError(f"there is no file {path}")
        yield path.read_text(encoding="utf-8", errors="replace")
        return
    for record in read_records(path):
        yield "\n".join(_strings(record))


def _strings(value: Any) -> Iterator[str]:
    """The strings in a value of JSON, at any depth."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _strings(each)


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a .jsonl, .jsonl.gz, .json or .json.gz file; a .json's are the items of its list or object.

    Raises InputError for a file that is not there or whose lines are not JSON.
    """
    if not path.is_file():
        raise InputError(f"there is no file {path}")
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
        text = file.read()
    try:
        if ".jsonl" in path.name:
            return [json.loads(line) for line in text.split("\n") if line.strip()]
        value = json.loads(text)
    except ValueError as error:
        raise InputError(f"{path} is not JSON: {error}") from error
    return list(value.values()) if isinstance(value, dict) else list(value)
