"""Scores the lines of a conversation by how much they are worth keeping: the `Scorer` interface and a scorer by rule."""

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

from paceline.tasks.error_lines import error_lines
from paceline.tasks.outline import Outline, outline

_Values = npt.NDArray[np.float64]
_WORD = re.compile(r"[^\W\d]\w+")
_PART = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[^\W\d_a-zA-Z]+")
# every alternative begins with a literal character, which makes the search fast
_ERROR_WORD = re.compile(
    r"(?:Error|Exception|error|FAILED|FAIL|failed|Traceback|panicked|fatal|assert|AssertionError)\b|\nE  |\n  File \""
)
_LINE_NUMBER = re.compile(r"^\s*\d+[\t→|:-]?\s")
_DIFF_HEADER = re.compile(r"\n(?:diff --git|--- |\+\+\+ |@@ |<{7} |>{7} )")
_STOP_WORDS = frozenset(
    re.findall(
        r"\w+",
        "the and for that this with you are not but from have has was were can will its all any out use let now then "
        "than what when which where who how why there here they them their our your into also just one more some such "
        "only should would could may might must does did done been being about over after before because if else "
        "return self none true false import def class",
    )
)
_CODE_SUFFIX = re.compile(
    r"\.(?:[chmr]|cc|cpp|cs|cxx|css|go|hpp|java|m?jsx?|cjs|kt|lua|php|pyi?|rb|rs|scala|sh|sql|swift|[cm]?tsx?|vue)",
    re.IGNORECASE,
)
_SATURATION, _LENGTH_SHARE = 1.2, 0.4  # k1 and b of BM25, set together with `Weights`


@dataclass(frozen=True)
class ConversationMessage:
    """A message of a conversation. `name` may be a file name, whose suffix then determines the content's language."""

    role: str
    content: str
    name: str | None = None


class Scorer(Protocol):
    """Gives the order in which lines are kept: by descending value, while they fit."""

    def score(self, messages: Sequence[ConversationMessage], query: str | None) -> Sequence[Sequence[float]]:
        """A value for each line (as `split_lines` returns them) of each message."""
        ...


def split_lines(text: str) -> list[str]:
    """A text's lines with their ends. Only a line feed ends a line. An empty text has no lines."""
    lines = text.split("\n")
    last = lines.pop()
    return [f"{line}\n" for line in lines] + ([last] if last else [])


@dataclass(frozen=True)
class Weights:
    """The weights of a line's features: first those that are added to its value, then those that scale it.

    Relevance (BM25) is scaled to 1 at its 95th percentile. The defaults were tuned with `python -m benchmarks.compact --split
    even`, on the even half of its conversations.
    """

    query: float = 2.0
    last_user: float = 0.3
    latest: float = 0.6
    first_user: float = 0.3
    base: float = 0.5
    shown_before: float = 1.9  # an earlier message has the line too: the agent returned to it
    error_word: float = 0.2
    change: float = 0.05
    definition: float = 0.3
    imports: float = 0.3
    code: float = 0.6
    recency: float = 0.6  # exponent: value divided by the message's distance from the end to this power
    long_message: float = 0.3  # exponent of the message's number of lines
    long_line: float = 0.18  # exponent of the line's length
    shown_later: float = 0.3  # factor if a later message has the line too
    shown_later_with_neighbour: float = 0.02  # factor if a later message has it with the same line before or after it
    tiny: float = 0.1  # factor for a line of under four characters


FILES = Weights(recency=0.0, long_message=0.0)  # for files, which have no order in time


class LineScorer:
    """Scores by rule: BM25 over the parts of identifiers, and features of code and of agents' turns. Deterministic, no model.

    The BM25 terms are those of the query, of the latest turns and of the first user message. A line gets a share of its
    neighbours' relevance. The header and the last line of a definition get a share of the best value inside. Later messages
    weigh more. A line that several messages show is worth more, but only in the last of them.
    """

    def __init__(self, weights: Weights | None = None) -> None:
        self.weights = weights or Weights()

    def score(self, messages: Sequence[ConversationMessage], query: str | None) -> list[list[float]]:
        texts = [split_lines(message.content) for message in messages]
        words = [_WORD.findall(line) for lines in texts for line in lines]
        relevance = _relevance(words, _focus_terms(messages, query, self.weights))
        repeats = _repeats(texts, self.weights)
        values: list[list[float]] = []
        start = 0
        for age, (message, lines) in zip(range(len(texts), 0, -1), zip(messages, texts, strict=True), strict=True):
            end = start + len(lines)
            bonus, factor = repeats[:, start:end]
            row = self._message_values(message, lines, relevance[start:end] + bonus) * factor
            values.append((row * age**-self.weights.recency).tolist())
            start = end
        _promote_error_lines(messages, texts, values)
        return values

    def _message_values(self, message: ConversationMessage, lines: list[str], row: _Values) -> _Values:
        """The values of one message's lines, given their relevance and bonuses in `row`."""
        weights = self.weights
        row = _spread_to_neighbours(row) + weights.base
        lengths = np.fromiter(map(len, lines), float, len(lines))
        ends = np.cumsum(lengths)
        for pattern, weight in ((_ERROR_WORD, weights.error_word), (_DIFF_HEADER, weights.change)):
            places = [found.end() - 2 for found in pattern.finditer(f"\n{message.content}")]
            row[np.unique(np.searchsorted(ends, places, "right"))] += weight
        row *= (lengths + 20) ** -weights.long_line * (len(lines) + 1) ** -weights.long_message
        row[[len(line.strip()) < 4 for line in lines]] *= weights.tiny
        return self._with_outline(row, outline(lines, message.name))

    def _with_outline(self, row: _Values, shape: Outline) -> _Values:
        """Raises the values of code, of imports, and of the first and last lines of definitions."""
        weights = self.weights
        usual = float(np.median(row)) if row.size else 0.0
        inside = np.zeros(len(row), bool)
        for block in reversed(shape.blocks):  # inner ones first, since an outer header gains from theirs
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


def _promote_error_lines(
    messages: Sequence[ConversationMessage], texts: list[list[str]], values: list[list[float]]
) -> None:
    """Raises the lines that report an error above all others, in the order that `error_lines` gives.

    A report that a later message repeats is raised only there. Files of code are skipped: they mention errors but report none.
    """
    top = max((max(row) for row in values if row), default=0.0) + 1
    seen: set[str] = set()
    for message, lines, row in zip(reversed(messages), reversed(texts), reversed(values), strict=True):
        if _CODE_SUFFIX.fullmatch(PurePath(message.name or "").suffix):
            continue
        found = error_lines(lines)
        keys = {place: lines[place].strip() for place in sorted(found)}
        shown = False
        for place, key in keys.items():
            shown = key in seen if any(map(str.isalpha, key)) else shown
            if not shown:
                row[place] = top + found[place] + 0.5 * row[place] / top
        seen.update(keys.values())


def _focus_terms(messages: Sequence[ConversationMessage], query: str | None, weights: Weights) -> dict[str, float]:
    """The terms to look for, each with its weight."""
    users = [message.content for message in messages if message.role == "user"]
    latest = [message.content for message in messages[:-1] if message.role == "assistant"][-4:]
    focus: dict[str, float] = {}
    sources = [(query or "", weights.query)]
    if len(messages) > 1 and query is None:
        sources.append((users[-1] if users else "", weights.last_user))
    if len(messages) > 3:
        sources += [
            ("\n".join([*latest, messages[-1].content]), weights.latest),
            (users[0] if users else "", weights.first_user),
        ]
    for text, weight in sources:
        counts = Counter(itertools.chain.from_iterable(map(_terms, _WORD.findall(text))))
        most = max(counts.values(), default=1)
        for term, count in counts.items():
            focus[term] = focus.get(term, 0.0) + weight * (0.5 + 0.5 * count / most)
    return focus


@lru_cache(maxsize=1 << 16)
def _terms(word: str) -> tuple[str, ...]:
    """A word's stemmed parts without stop words, and the whole word if it has several parts."""
    parts = [part.lower() for part in _PART.findall(word)]
    found = dict.fromkeys(_stem(part) for part in parts if part not in _STOP_WORDS)
    if parts != [word.lower()]:
        found[word.lower()] = None
    return tuple(term for term in found if len(term) > 2)


def _stem(word: str) -> str:
    """A rough stem of a lower-case word: the same for "cache", "caches", "cached" and "caching"."""
    for ending in ("ing", "ed", "s"):
        if word.endswith(ending) and len(word) - len(ending) > 3:
            word = word[: -len(ending)]
            word = word[:-1] if word[-1] == word[-2] and ending != "s" else word
            break
    return word[:-1] if len(word) > 4 and word[-1] == "e" else word


def _relevance(words: list[list[str]], focus: dict[str, float]) -> _Values:
    """The BM25 score of each line for the terms in focus, divided by the 95th percentile of the positive ones, at most 2.

    A term counts once a line, however often the line has it.
    """
    frequency: Counter[str] = Counter()
    for line in words:
        frequency.update(set(line))
    num_lines_with: Counter[str] = Counter()
    for word, number in frequency.items():
        for term in _terms(word):
            if term in focus:
                num_lines_with[term] += number
    number = len(words)
    term_weights = {
        term: focus[term] * math.log(1 + max(0.0, number - count + 0.5) / (count + 0.5))
        for term, count in num_lines_with.items()
    }
    word_weights = {word: sum(term_weights.get(term, 0.0) for term in _terms(word)) for word in frequency}
    sums = np.fromiter((sum(word_weights[word] for word in set(line)) for line in words), float, number)
    lengths = np.fromiter(map(len, words), float, number)
    relative_lengths = lengths / max(1.0, float(lengths.mean()))
    scores = sums * (_SATURATION + 1) / (1 + _SATURATION * (1 - _LENGTH_SHARE + _LENGTH_SHARE * relative_lengths))
    above = scores[scores > 0]
    return np.minimum(scores / np.percentile(above, 95), 2.0) if above.size else scores


def _spread_to_neighbours(row: _Values) -> _Values:
    """The maximum of each value and of 3/4, 2/4 and 1/4 of the values one, two and three lines away."""
    best = row.copy()
    for distance in range(1, 4):
        share = 1 - distance / 4
        np.maximum(best[distance:], row[:-distance] * share, out=best[distance:])
        np.maximum(best[:-distance], row[distance:] * share, out=best[:-distance])
    return best


def _repeats(texts: list[list[str]], weights: Weights) -> _Values:
    """[2, lines]: the bonus of lines that an earlier message has too, and the factor of those that a later one has."""
    keys = [[_LINE_NUMBER.sub("", line).strip() for line in lines] for lines in texts]
    bonus, factor = [], []
    seen: set[str] = set()
    for own in keys:
        bonus += [weights.shown_before if key in seen else 0.0 for key in own]
        seen.update(key for key in own if len(key) > 3)
    seen.clear()
    pairs: set[tuple[str, str]] = set()
    for own in reversed(keys):
        row = [weights.shown_later if key in seen else 1.0 for key in own]
        beside = list(itertools.pairwise(own))
        for place, pair in enumerate(beside):
            if pair in pairs:
                row[place] = row[place + 1] = weights.shown_later_with_neighbour
        factor += row[::-1]
        seen.update(key for key in own if len(key) > 3)
        pairs.update(pair for pair in beside if len(pair[0]) + len(pair[1]) > 12)
    return np.array([bonus, factor[::-1]])
