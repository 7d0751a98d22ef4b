"""Compact: of a conversation the lines worth most, verbatim and in order, within a share of its tokens."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from paceline.errors import InputError
from paceline.tasks.scoring import LineScorer, Message, Scorer, split_lines

Count = Callable[[Sequence[str]], Sequence[int]]
LEAST_RATIO = 0.05
_OPEN, _CLOSE = "<keepContext>", "</keepContext>"
_PASSES = 3


@dataclass(frozen=True)
class Range:
    """Lines of a message as it came, the first one 1, both ends inside."""

    start: int
    end: int


@dataclass(frozen=True)
class CompactedMessage:
    """`dropped` are the lines that went, `kept` those that `<keepContext>` kept, its own two lines with them."""

    role: str
    content: str
    name: str | None
    dropped: tuple[Range, ...]
    kept: tuple[Range, ...]


@dataclass(frozen=True)
class Compacted:
    """Sizes are in what `count` counts: tokens, or characters without a tokenizer.

    `budget` is what the lines open to dropping, and the markers for those dropped, may come to, `spent` what they do.
    `spent` exceeds `budget` only where the lines kept by force and the markers alone do.
    """

    messages: tuple[CompactedMessage, ...]
    input_size: int
    output_size: int
    budget: int
    spent: int

    @property
    def text(self) -> str:
        return "\n".join(each.content for each in self.messages)

    def as_dict(self) -> dict[str, Any]:
        return {"text": self.text, **dataclasses.asdict(self)}


def compact(
    messages: str | Sequence[Message],
    query: str | None = None,
    *,
    ratio: float = 0.5,
    preserve_recent: int = 2,
    compress_system: bool = False,
    markers: bool = True,
    scorer: Scorer | None = None,
    count: Count | None = None,
) -> Compacted:
    """Drops the lines that matter least to `query` until `ratio` of the size is left; what stays is as it was.

    A text is one message that may be compacted; of messages, the last `preserve_recent` stay whole, and system messages
    too without `compress_system`. These are outside the ratio, which is a share of the rest. Lines from a line
    `<keepContext>` to a line `</keepContext>` (or the message's end) stay and count. A run of dropped lines becomes
    "(filtered N lines)", or an empty line without `markers`; that counts as well. Without a query the last user message
    is one. Raises InputError for a ratio outside 0.05 to 1 or a negative `preserve_recent`.
    """
    if not LEAST_RATIO <= ratio <= 1:
        raise InputError(f"the ratio is the share to keep, {LEAST_RATIO} to 1, not {ratio}")
    if preserve_recent < 0:
        raise InputError("preserve_recent must be 0 or more")
    if isinstance(messages, str):
        messages, preserve_recent = (Message("user", messages),), 0
    texts = [split_lines(message.content) for message in messages]
    sizes = _sizes(texts, count or _characters)
    fixed = [
        index >= len(messages) - preserve_recent or (message.role == "system" and not compress_system)
        for index, message in enumerate(messages)
    ]
    forced = [_forced(lines) for lines in texts]
    open_size = sum(sum(each) for each, stays in zip(sizes, fixed, strict=True) if not stays)
    budget = open_size if ratio == 1 else int(ratio * open_size + 1e-9)
    marker = _Marker(markers, count or _characters)
    bound = [[True] * len(flags) if stays else flags for flags, stays in zip(forced, fixed, strict=True)]
    choice = _Choice(sizes, [[marker.more(line) for line in lines] for lines in texts], bound)
    outside = sum(map(sum, sizes)) - open_size
    if open_size > budget:
        priorities = (scorer or LineScorer()).score(messages, query)
        choice.spend(priorities, budget + outside, marker)
    else:
        choice.keep_all()
    done = []
    put: list[str] = []
    for message, lines, stays, flags in zip(messages, texts, choice.by_message(), forced, strict=True):
        done.append(_rebuild(message, lines, stays, flags, marker, put))
    size = choice.size + sum((count or _characters)(put))
    return Compacted(tuple(done), open_size + outside, size, budget, size - outside)


def _characters(texts: Sequence[str]) -> list[int]:
    return [len(text) for text in texts]


def _sizes(texts: list[list[str]], count: Count) -> list[list[int]]:
    """The size of every line; each distinct one is counted once."""
    distinct = list(dict.fromkeys(itertools.chain.from_iterable(texts)))
    size = dict(zip(distinct, count(distinct), strict=True))
    return [[size[line] for line in lines] for lines in texts]


def _forced(lines: list[str]) -> list[bool]:
    """Which lines `<keepContext>` keeps. A tag must be alone on its line; a close without an open is a line like others."""
    flags = []
    inside = False
    for line in lines:
        inside = inside or line.strip() == _OPEN
        flags.append(inside)
        inside = inside and line.strip() != _CLOSE
    return flags


class _Marker:
    """What stands for dropped lines, and its size by how many they are and how the last of them ends."""

    def __init__(self, shown: bool, count: Count) -> None:
        self._shown = shown
        self._sizes = list(count([self.text("1" * digits) + "\n" for digits in range(1, 10)]))
        endings = ("", "\n", "\r\n")
        sizes = count([self.text(1) + ending for ending in endings])
        self._more = {ending: size - self._sizes[0] for ending, size in zip(endings, sizes, strict=True)}

    def text(self, number: object) -> str:
        return f"(filtered {number} lines)" if self._shown else ""

    def size(self, number: int) -> int:
        """The size where the last line ends with a line feed alone."""
        return self._sizes[len(str(number)) - 1]

    def more(self, line: str) -> int:
        """What is added to the size where `line` is the last."""
        return self._more[_ending(line)]


def _ending(line: str) -> str:
    return "\r\n" if line.endswith("\r\n") else "\n" if line.endswith("\n") else ""


class _Choice:
    """Which lines stay. All messages' lines are in one row, with a line that stays (and costs nothing) between messages."""

    def __init__(self, sizes: list[list[int]], more: list[list[int]], forced: list[list[bool]]) -> None:
        self._lengths = [len(each) for each in sizes]
        self._sizes = [0, *itertools.chain.from_iterable([*each, 0] for each in sizes)]
        self._more = [0, *itertools.chain.from_iterable([*each, 0] for each in more)]
        self._stays = [True, *itertools.chain.from_iterable([*each, True] for each in forced)]

    def keep_all(self) -> None:
        self._stays = [True] * len(self._stays)

    def spend(self, priorities: Sequence[Sequence[float]], budget: int, marker: _Marker) -> None:
        """Keeps lines by priority, ties by place, while they fit with the markers.

        A line next to dropped ones may split their marker in two; it is charged for the larger one, so the passes after
        the first give back what that was too much.
        """
        row = [0.0, *itertools.chain.from_iterable([*each, 0.0] for each in priorities)]
        order = sorted((index for index, stays in enumerate(self._stays) if not stays), key=lambda index: -row[index])
        sizes, ends, stays = self._sizes, self._more, self._stays
        largest = max(marker.size(10**digits) for digits in range(len(str(max(self._lengths, default=1)))))
        alone = marker.size(1)
        for _ in range(_PASSES):
            total = self._fill(marker)
            before = total
            for index in order:
                if stays[index]:
                    continue
                above, below = stays[index - 1], stays[index + 1]
                more = sizes[index] - below * ends[index] + (not above) * ends[index - 1]
                more += 0 if above != below else -alone if above else largest
                if total + more <= budget or more <= 0:
                    stays[index] = True
                    total += more
            if total == before:
                break
        self._fill(marker)

    @property
    def size(self) -> int:
        """The size of the lines that stay."""
        return sum(size for size, stays in zip(self._sizes, self._stays, strict=True) if stays)

    def _fill(self, marker: _Marker) -> int:
        """Keeps runs of lines that cost no more than the marker in their place; returns the size of all, markers too."""
        total = 0
        for start, end, stay in self._runs():
            size = sum(self._sizes[start:end])
            if not stay and size > marker.size(end - start) + self._more[end - 1]:
                total += marker.size(end - start) + self._more[end - 1]
                continue
            self._stays[start:end] = [True] * (end - start)
            total += size
        return total

    def _runs(self) -> Iterator[tuple[int, int, bool]]:
        start = 0
        for stay, group in itertools.groupby(list(self._stays)):
            end = start + len(list(group))
            yield start, end, stay
            start = end

    def by_message(self) -> Iterator[list[bool]]:
        start = 1
        for length in self._lengths:
            yield self._stays[start : start + length]
            start += length + 1


def _rebuild(
    message: Message, lines: list[str], stays: list[bool], forced: list[bool], marker: _Marker, put: list[str]
) -> CompactedMessage:
    """The message of what stays. A marker ends as the last line it stands for; all are added to `put`."""
    parts: list[str] = []
    dropped = _ranges([not stay for stay in stays])
    reached = 0
    for each in dropped:
        parts += lines[reached : each.start - 1]
        put.append(marker.text(each.end - each.start + 1) + _ending(lines[each.end - 1]))
        parts.append(put[-1])
        reached = each.end
    parts += lines[reached:]
    return CompactedMessage(message.role, "".join(parts), message.name, dropped, _ranges(forced))


def _ranges(flags: list[bool]) -> tuple[Range, ...]:
    """The runs of true flags."""
    result = []
    start = 0
    for flag, group in itertools.groupby(flags):
        end = start + len(list(group))
        if flag:
            result.append(Range(start + 1, end))
        start = end
    return tuple(result)
