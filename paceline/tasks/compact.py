"""Context compaction: keeps a conversation's most valuable lines, verbatim and in order, within a share of its tokens."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from paceline.errors import InputError
from paceline.tasks.scoring import ConversationMessage, LineScorer, Scorer, split_lines

Count = Callable[[Sequence[str]], Sequence[int]]
LEAST_RATIO = 0.05  # of Morph's API
_OPENING_TAG, _CLOSING_TAG = "<keepContext>", "</keepContext>"
_MAX_PASSES = 3  # bounds time: rounds of selection, each of which spends what the one before overcharged for markers


@dataclass(frozen=True)
class Range:
    """Lines of the original message, counted from 1, both ends included."""

    start: int
    end: int


@dataclass(frozen=True)
class CompactedMessage:
    """`dropped` are the dropped lines; `kept` those that `<keepContext>` tags kept, including the tags' own lines."""

    role: str
    content: str
    name: str | None
    dropped: tuple[Range, ...]
    kept: tuple[Range, ...]


@dataclass(frozen=True)
class Compacted:
    """The compacted messages. Sizes are in the unit of `count`: tokens, or characters.

    `budget` is the largest size allowed for the lines open to compaction and the markers of dropped lines; `spent` is their
    size. `spent` exceeds `budget` only if the lines that must stay and the markers exceed it alone.
    """

    messages: tuple[CompactedMessage, ...]
    input_size: int
    output_size: int
    budget: int
    spent: int

    @property
    def text(self) -> str:
        """All contents, joined by line feeds."""
        return "\n".join(each.content for each in self.messages)

    def as_dict(self) -> dict[str, Any]:
        return {"text": self.text, **dataclasses.asdict(self)}


def compact(
    messages: str | Sequence[ConversationMessage],
    query: str | None = None,
    *,
    ratio: float = 0.5,
    preserve_recent: int = 2,
    compress_system: bool = False,
    markers: bool = True,
    scorer: Scorer | None = None,
    count: Count | None = None,
) -> Compacted:
    """Drops the lines that matter least to `query` until `ratio` of the size is left. Kept lines are unchanged.

    A text counts as one message that may be compacted. Of messages, the last `preserve_recent` stay whole, and so do system
    messages unless `compress_system`; `ratio` is a share of the other messages. Lines between the tags `<keepContext>` and
    `</keepContext>` (or the message's end) stay and count against the budget. A run of dropped lines becomes the marker
    "(filtered N lines)", or an empty line without `markers`; markers count too. `count` returns the size of each text of a
    batch, by default its characters. Without a query the last user message is the query. Raises InputError for a ratio outside
    0.05 to 1 or a negative `preserve_recent`.
    """
    if not LEAST_RATIO <= ratio <= 1:
        raise InputError(f"the ratio is the share to keep and must be {LEAST_RATIO} to 1, not {ratio}")
    if preserve_recent < 0:
        raise InputError("preserve_recent must be 0 or more")
    if isinstance(messages, str):
        messages, preserve_recent = (ConversationMessage("user", messages),), 0
    texts = [split_lines(message.content) for message in messages]
    sizes = _sizes(texts, count or _characters)
    outside_ratio = [
        index >= len(messages) - preserve_recent or (message.role == "system" and not compress_system)
        for index, message in enumerate(messages)
    ]
    forced = [_forced_lines(lines) for lines in texts]
    open_size = sum(sum(each) for each, outside in zip(sizes, outside_ratio, strict=True) if not outside)
    budget = open_size if ratio == 1 else int(ratio * open_size + 1e-9)
    marker = _OmissionMarker(markers, count or _characters)
    always_kept = [
        [True] * len(flags) if outside else flags for flags, outside in zip(forced, outside_ratio, strict=True)
    ]
    selection = _Selection(sizes, [[marker.ending_cost(line) for line in lines] for lines in texts], always_kept)
    outside_size = sum(map(sum, sizes)) - open_size
    if open_size > budget:
        priorities = (scorer or LineScorer()).score(messages, query)
        selection.select(priorities, budget + outside_size, marker)
    else:
        selection.keep_all()
    compacted = []
    inserted_markers: list[str] = []
    for message, lines, kept, flags in zip(messages, texts, selection.by_message(), forced, strict=True):
        compacted.append(_rebuild(message, lines, kept, flags, marker, inserted_markers))
    size = selection.size + sum((count or _characters)(inserted_markers))
    return Compacted(tuple(compacted), open_size + outside_size, size, budget, size - outside_size)


def _characters(texts: Sequence[str]) -> list[int]:
    """The default unit of size."""
    return [len(text) for text in texts]


def _sizes(texts: list[list[str]], count: Count) -> list[list[int]]:
    """The size of every line. Each distinct line is counted once."""
    distinct = list(dict.fromkeys(itertools.chain.from_iterable(texts)))
    size = dict(zip(distinct, count(distinct), strict=True))
    return [[size[line] for line in lines] for lines in texts]


def _forced_lines(lines: list[str]) -> list[bool]:
    """Which lines `<keepContext>` keeps. A tag must be alone on its line; a closing tag without an opening one is text."""
    flags = []
    inside = False
    for line in lines:
        inside = inside or line.strip() == _OPENING_TAG
        flags.append(inside)
        inside = inside and line.strip() != _CLOSING_TAG
    return flags


class _OmissionMarker:
    """The marker for a run of dropped lines. Its size depends on their number and on the end of the last of them."""

    def __init__(self, has_text: bool, count: Count) -> None:
        self._has_text = has_text
        self._sizes = list(count([self.text("1" * digits) + "\n" for digits in range(1, 10)]))
        endings = ("", "\n", "\r\n")
        sizes = count([self.text(1) + ending for ending in endings])
        self._ending_costs = {ending: size - self._sizes[0] for ending, size in zip(endings, sizes, strict=True)}

    def text(self, number: object) -> str:
        """The marker's text. `number` is the number of dropped lines."""
        return f"(filtered {number} lines)" if self._has_text else ""

    def size(self, number: int) -> int:
        """The marker's size if the last dropped line ends with a line feed alone."""
        return self._sizes[len(str(number)) - 1]

    def ending_cost(self, line: str) -> int:
        """What is added to the marker's size if `line` is the last dropped one."""
        return self._ending_costs[_ending(line)]


def _ending(line: str) -> str:
    """A line's end."""
    return "\r\n" if line.endswith("\r\n") else "\n" if line.endswith("\n") else ""


class _Selection:
    """The choice of lines to keep, over the lines of all messages in one sequence.

    A sentinel line of size 0, which is always kept, separates the messages, so that no marker spans two of them.
    """

    def __init__(self, sizes: list[list[int]], ending_costs: list[list[int]], forced: list[list[bool]]) -> None:
        self._lengths = [len(each) for each in sizes]
        self._sizes = [0, *itertools.chain.from_iterable([*each, 0] for each in sizes)]
        self._ending_costs = [0, *itertools.chain.from_iterable([*each, 0] for each in ending_costs)]
        self._kept = [True, *itertools.chain.from_iterable([*each, True] for each in forced)]

    def keep_all(self) -> None:
        self._kept = [True] * len(self._kept)

    def select(self, priorities: Sequence[Sequence[float]], budget: int, marker: _OmissionMarker) -> None:
        """Keeps lines by priority, the earlier of equal ones first, while they and the markers fit the budget.

        A kept line inside a run of dropped ones splits its marker in two and is charged the size of the largest marker. The
        passes after the first spend what that overcharged.
        """
        values = [0.0, *itertools.chain.from_iterable([*each, 0.0] for each in priorities)]
        order = sorted((index for index, kept in enumerate(self._kept) if not kept), key=lambda index: -values[index])
        sizes, ends, kept = self._sizes, self._ending_costs, self._kept
        largest = max(marker.size(10**digits) for digits in range(len(str(max(self._lengths, default=1)))))
        alone = marker.size(1)
        for _ in range(_MAX_PASSES):
            total = self._fill(marker)
            before = total
            for index in order:
                if kept[index]:
                    continue
                above, below = kept[index - 1], kept[index + 1]
                cost = sizes[index] - below * ends[index] + (not above) * ends[index - 1]
                cost += 0 if above != below else -alone if above else largest
                if total + cost <= budget or cost <= 0:
                    kept[index] = True
                    total += cost
            if total == before:
                break
        self._fill(marker)

    @property
    def size(self) -> int:
        """The size of the kept lines."""
        return sum(size for size, kept in zip(self._sizes, self._kept, strict=True) if kept)

    def _fill(self, marker: _OmissionMarker) -> int:
        """Keeps runs of lines that are no larger than their marker. Returns the total size, markers included."""
        total = 0
        for start, end, stay in self._runs():
            size = sum(self._sizes[start:end])
            if not stay and size > marker.size(end - start) + self._ending_costs[end - 1]:
                total += marker.size(end - start) + self._ending_costs[end - 1]
                continue
            self._kept[start:end] = [True] * (end - start)
            total += size
        return total

    def _runs(self) -> Iterator[tuple[int, int, bool]]:
        """(start, end, kept) of each run of lines that are kept or dropped together."""
        start = 0
        for stay, group in itertools.groupby(list(self._kept)):
            end = start + len(list(group))
            yield start, end, stay
            start = end

    def by_message(self) -> Iterator[list[bool]]:
        """For each message, which of its lines are kept."""
        start = 1
        for length in self._lengths:
            yield self._kept[start : start + length]
            start += length + 1


def _rebuild(
    message: ConversationMessage,
    lines: list[str],
    kept: list[bool],
    forced: list[bool],
    marker: _OmissionMarker,
    inserted_markers: list[str],
) -> CompactedMessage:
    """The compacted message. A marker ends like the last line it replaces. Appends the markers to `inserted_markers`."""
    parts: list[str] = []
    dropped = _ranges([not stay for stay in kept])
    reached = 0
    for each in dropped:
        parts += lines[reached : each.start - 1]
        inserted_markers.append(marker.text(each.end - each.start + 1) + _ending(lines[each.end - 1]))
        parts.append(inserted_markers[-1])
        reached = each.end
    parts += lines[reached:]
    return CompactedMessage(message.role, "".join(parts), message.name, dropped, _ranges(forced))


def _ranges(flags: list[bool]) -> tuple[Range, ...]:
    """The runs of true flags, as line ranges."""
    result = []
    start = 0
    for flag, group in itertools.groupby(flags):
        end = start + len(list(group))
        if flag:
            result.append(Range(start + 1, end))
        start = end
    return tuple(result)
