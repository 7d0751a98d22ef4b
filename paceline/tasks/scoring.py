"""What a line of a conversation is worth keeping, by rule: the interface that a trained scorer shares, and the rules."""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import PurePath
from typing import Protocol

import numpy as np
import numpy.typing as npt

from paceline.tasks.outline import Outline, outline
from paceline.tasks.trouble import trouble

_Row = npt.NDArray[np.float64]
_WORD = re.compile(r"[^\W\d]\w+")
_PART = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[^\W\d_a-zA-Z]+")
# each begins with a plain character, which makes the search fast
_TROUBLE = re.compile(
    r"(?:Error|Exception|error|FAILED|FAIL|failed|Traceback|panicked|fatal|assert|AssertionError)\b|\nE  |\n  File \""
)
_NUMBER = re.compile(r"^\s*\d+[\t→|:-]?\s")
_CHANGE = re.compile(r"\n(?:diff --git|--- |\+\+\+ |@@ |<{7} |>{7} )")
_COMMON = frozenset(
    re.findall(
        r"\w+",
        "the and for that this with you are not but from have has was were can will its all any out use let now then "
        "than what when which where who how why there here they them their our your into also just one more some such "
        "only should would could may might must does did done been being about over after before because if else "
        "return self none true false import def class",
    )
)
_CODE = re.compile(
    r"\.(?:[chmr]|cc|cpp|cs|cxx|css|go|hpp|java|m?jsx?|cjs|kt|lua|php|pyi?|rb|rs|scala|sh|sql|swift|[cm]?tsx?|vue)",
    re.IGNORECASE,
)
_SATURATION, _LENGTH_SHARE = 1.2, 0.4


@dataclass(frozen=True)
class Message:
    """One of a conversation. `name` may be a file's, which then tells the content's language."""

    role: str
    content: str
    name: str | None = None


class Scorer(Protocol):
    """Says in which order lines are kept: those of greater value first, whatever they cost, while they fit."""

    def score(self, messages: Sequence[Message], query: str | None) -> Sequence[Sequence[float]]:
        """A value for every line, as `split_lines` gives them, of every message."""
        ...


def split_lines(text: str) -> list[str]:
    """A text's lines with their ends; only a line feed ends a line. They join to the text; an empty one has none."""
    lines = text.split("\n")
    last = lines.pop()
    return [f"{line}\n" for line in lines] + ([last] if last else [])


@dataclass(frozen=True)
class Weights:
    """How much each thing that speaks for a line adds, then what its value is multiplied by.

    Relevance is 1 at its 95th percentile. The defaults were tuned by benchmarks/compact.py on half of its conversations.
    """

    query: float = 2.0
    last_user: float = 0.3
    latest: float = 0.6
    opening: float = 0.3
    base: float = 0.5
    again: float = 1.9  # a line that an earlier message has too: the agent came back to it
    trouble: float = 0.2
    change: float = 0.05
    definition: float = 0.3
    imports: float = 0.3
    code: float = 0.6
    recency: float = 0.6  # power of a message's distance from the end
    long_message: float = 0.3  # power of the message's number of lines
    long_line: float = 0.18  # power of the line's length
    repeated: float = 0.3  # for a line that a later message has too
    repeated_beside: float = 0.02  # and with the same line before or after it
    tiny: float = 0.1  # for a line of under four characters


FILES = Weights(recency=0.0, long_message=0.0)  # for files, which are in no order of time


class LineScorer:
    """BM25 over the parts of identifiers, and what code and agents' turns look like. Deterministic, no model.

    Terms of the query, of the latest turns and of the first user message count by how rare they are, and a line shares
    in its neighbours' relevance; the head of a definition, and its closing line, in what is worth most inside. Later
    messages weigh more. What several messages show is worth more than what one does, in the last of them alone.
    """

    def __init__(self, weights: Weights | None = None) -> None:
        self.weights = weights or Weights()

    def score(self, messages: Sequence[Message], query: str | None) -> list[list[float]]:
        texts = [split_lines(message.content) for message in messages]
        words = [_WORD.findall(line) for lines in texts for line in lines]
        relevance = _relevance(words, _focus(messages, query, self.weights))
        repeats = _repeats(texts, self.weights)
        values: list[list[float]] = []
        start = 0
        for age, (message, lines) in zip(range(len(texts), 0, -1), zip(messages, texts, strict=True), strict=True):
            end = start + len(lines)
            bonus, factor = repeats[:, start:end]
            row = self._message(message, lines, relevance[start:end] + bonus) * factor
            values.append((row * age**-self.weights.recency).tolist())
            start = end
        _lift(messages, texts, values)
        return values

    def _message(self, message: Message, lines: list[str], row: _Row) -> _Row:
        """Values of one message's lines; `row` is what speaks for them already."""
        weights = self.weights
        row = _spread(row) + weights.base
        lengths = np.fromiter(map(len, lines), float, len(lines))
        ends = np.cumsum(lengths)
        for signs, weight in ((_TROUBLE, weights.trouble), (_CHANGE, weights.change)):
            places = [found.end() - 2 for found in signs.finditer(f"\n{message.content}")]
            row[np.unique(np.searchsorted(ends, places, "right"))] += weight
        row *= (lengths + 20) ** -weights.long_line * (len(lines) + 1) ** -weights.long_message
        row[[len(line.strip()) < 4 for line in lines]] *= weights.tiny
        return self._shape(row, outline(lines, message.name))

    def _shape(self, row: _Row, shape: Outline) -> _Row:
        """Gives the heads and ends of definitions their part in what is inside, and imports theirs."""
        weights = self.weights
        usual = float(np.median(row)) if row.size else 0.0
        inside = np.zeros(len(row), bool)
        for block in reversed(shape.blocks):  # inner ones first: an outer head gains from what they gained
            inner = row[block.head + 1 : block.end + 1]
            best = 0.9 * float(inner.max()) if inner.size else 0.0
            head = row[block.start : block.head + 1]
            np.maximum(head + weights.definition * usual, best, out=head)
            row[block.end] = max(float(row[block.end]), best / 2)
            inside[block.start : block.end + 1] = True
        row[inside] += weights.code * usual
        if shape.imports:
            row[list(shape.imports)] += weights.imports * usual
        return row


def _lift(messages: Sequence[Message], texts: list[list[str]], values: list[list[float]]) -> None:
    """Puts what reports an error before all else, the most telling first. What a later message shows too counts there.

    A file of code holds no reports, however much it speaks of errors.
    """
    top = max((max(row) for row in values if row), default=0.0) + 1
    seen: set[str] = set()
    for message, lines, row in zip(reversed(messages), reversed(texts), reversed(values), strict=True):
        if _CODE.fullmatch(PurePath(message.name or "").suffix):
            continue
        found = trouble(lines)
        keys = {place: lines[place].strip() for place in sorted(found)}
        shown = False
        for place, key in keys.items():
            shown = key in seen if any(map(str.isalpha, key)) else shown
            if not shown:
                row[place] = top + found[place] + 0.5 * row[place] / top
        seen.update(keys.values())


def _focus(messages: Sequence[Message], query: str | None, weights: Weights) -> dict[str, float]:
    """Terms that matter and how much each does."""
    users = [message.content for message in messages if message.role == "user"]
    latest = [message.content for message in messages[:-1] if message.role == "assistant"][-4:]
    focus: dict[str, float] = {}
    sources = [(query or "", weights.query)]
    if len(messages) > 1 and query is None:
        sources.append((users[-1] if users else "", weights.last_user))
    if len(messages) > 3:
        sources += [
            ("\n".join([*latest, messages[-1].content]), weights.latest),
            (users[0] if users else "", weights.opening),
        ]
    for text, weight in sources:
        counts = Counter(itertools.chain.from_iterable(map(_terms, _WORD.findall(text))))
        most = max(counts.values(), default=1)
        for term, count in counts.items():
            focus[term] = focus.get(term, 0.0) + weight * (0.5 + 0.5 * count / most)
    return focus


@lru_cache(maxsize=1 << 16)
def _terms(word: str) -> tuple[str, ...]:
    """A word's parts without their endings, and itself where that is more; without those that say nothing."""
    parts = [part.lower() for part in _PART.findall(word)]
    found = dict.fromkeys(_stem(part) for part in parts if part not in _COMMON)
    if parts != [word.lower()]:
        found[word.lower()] = None
    return tuple(term for term in found if len(term) > 2)


def _stem(word: str) -> str:
    """A lower-case word without the ending that makes "caches", "cached" and "caching" of "cache", roughly."""
    for ending in ("ing", "ed", "s"):
        if word.endswith(ending) and len(word) - len(ending) > 3:
            word = word[: -len(ending)]
            word = word[:-1] if word[-1] == word[-2] and ending != "s" else word
            break
    return word[:-1] if len(word) > 4 and word[-1] == "e" else word


def _relevance(words: list[list[str]], focus: dict[str, float]) -> _Row:
    """BM25 of every line for the terms in focus, each counted once a line, over the 95th percentile of those above 0."""
    frequency: Counter[str] = Counter()
    for line in words:
        frequency.update(set(line))
    holding: Counter[str] = Counter()
    for word, number in frequency.items():
        for term in _terms(word):
            if term in focus:
                holding[term] += number
    number = len(words)
    rarity = {
        term: focus[term] * math.log(1 + max(0.0, number - count + 0.5) / (count + 0.5))
        for term, count in holding.items()
    }
    worth = {word: sum(rarity.get(term, 0.0) for term in _terms(word)) for word in frequency}
    sums = np.fromiter((sum(worth[word] for word in set(line)) for line in words), float, number)
    lengths = np.fromiter(map(len, words), float, number)
    share = lengths / max(1.0, float(lengths.mean()))
    scores = sums * (_SATURATION + 1) / (1 + _SATURATION * (1 - _LENGTH_SHARE + _LENGTH_SHARE * share))
    above = scores[scores > 0]
    return np.minimum(scores / np.percentile(above, 95), 2.0) if above.size else scores


def _spread(row: _Row) -> _Row:
    """Each value, or a share of a greater one near it, less with each line away."""
    best = row.copy()
    for distance in range(1, 4):
        share = 1 - distance / 4
        np.maximum(best[distance:], row[:-distance] * share, out=best[distance:])
        np.maximum(best[:-distance], row[distance:] * share, out=best[:-distance])
    return best


def _repeats(texts: list[list[str]], weights: Weights) -> _Row:
    """Two rows over all lines: what is added for being in an earlier message, and the factor for being in a later one."""
    keys = [[_NUMBER.sub("", line).strip() for line in lines] for lines in texts]
    bonus, factor = [], []
    seen: set[str] = set()
    for own in keys:
        bonus += [weights.again if key in seen else 0.0 for key in own]
        seen.update(key for key in own if len(key) > 3)
    seen.clear()
    pairs: set[tuple[str, str]] = set()
    for own in reversed(keys):
        row = [weights.repeated if key in seen else 1.0 for key in own]
        beside = list(itertools.pairwise(own))
        for place, pair in enumerate(beside):
            if pair in pairs:
                row[place] = row[place + 1] = weights.repeated_beside
        factor += row[::-1]
        seen.update(key for key in own if len(key) > 3)
        pairs.update(pair for pair in beside if len(pair[0]) + len(pair[1]) > 12)
    return np.array([bonus, factor[::-1]])
