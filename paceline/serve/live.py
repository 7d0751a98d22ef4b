"""What the status page shows: the last minute in numbers, and the open requests with their text as it comes.

Numbers are always counted, some additions a step. Text is kept only for listeners that want it, until they read it.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from paceline.errors import Overloaded
from paceline.serve.host import Stream
from paceline.types import StepOutput

_SPAN = 0.25  # seconds counted together
_SPANS_A_SECOND = 4
_SECONDS = 60  # what is kept
_MOST_SHOWN = 16  # requests
_MOST_CHARACTERS = 2000  # of one request between two reads
_MOST_LISTENERS = 8


@dataclass(slots=True)
class _Counts:
    """What happened in one span of time. `stepped` are the tokens of `steps`, which leave out each request's first."""

    span: int
    generated: int = 0
    accepted: int = 0
    steps: int = 0
    stepped: int = 0
    computed: int = 0
    cached: int = 0


@dataclass(slots=True)
class _Open:
    """A request under way. `cached` is None until its first output."""

    stream: Stream
    shown: bool
    generated: int = 0
    accepted: int = 0
    cached: int | None = None


class Live:
    """Observes a host's streams for the page."""

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self._open: dict[str, _Open] = {}
        self._counts: deque[_Counts] = deque(maxlen=_SECONDS * _SPANS_A_SECOND)
        self._firsts: deque[tuple[float, float]] = deque(maxlen=10_000)  # when, and the seconds it took
        self._listeners: list[Listener] = []
        self._num_shown = 0

    def opened(self, stream: Stream) -> None:
        self._open[stream.name] = _Open(stream, self._num_shown < _MOST_SHOWN)
        self._num_shown = min(self._num_shown + 1, _MOST_SHOWN)

    def output(self, stream: Stream, output: StepOutput) -> None:
        now = time.perf_counter()
        counts = self._counted(now)
        one = self._open[stream.name]
        num_tokens = len(output.tokens)
        num_accepted = output.accepted.count(True)
        if one.cached is None:
            one.cached = output.usage.cached_tokens if output.usage is not None else 0
            counts.cached += one.cached
            counts.computed += len(stream.request.prompt) - one.cached
            self._firsts.append((now, now - stream.started))
        else:
            counts.steps += 1
            counts.stepped += num_tokens
        counts.generated += num_tokens
        counts.accepted += num_accepted
        one.generated += num_tokens
        one.accepted += num_accepted
        if one.shown:
            for listener in self._listeners:
                listener.take(output)

    def closed(self, stream: Stream, finished: bool) -> None:
        """One that was shown makes room for the oldest that was not."""
        if not self._open.pop(stream.name).shown:
            return
        follows = next((each for each in self._open.values() if not each.shown), None)
        if follows is not None:
            follows.shown = True
        else:
            self._num_shown -= 1

    def listen(self, token_bytes: Callable[[int], bytes] | None) -> Listener:
        """A reader of the text from now on; None for one that is told no text. Raises Overloaded beside too many."""
        if len(self._listeners) >= _MOST_LISTENERS:
            raise Overloaded(f"{len(self._listeners)} status pages are open already", retry_after=10)
        listener = Listener(token_bytes, self._listeners)
        self._listeners.append(listener)
        return listener

    def state(self) -> dict[str, Any]:
        """The page's numbers: rates a second, times in seconds, shares from 0 to 1, None where nothing is known yet."""
        now = time.perf_counter()
        span = int(now / _SPAN)
        minute = [each for each in self._counts if each.span > span - _SECONDS * _SPANS_A_SECOND]
        latest = [each for each in minute if span - _SPANS_A_SECOND <= each.span < span]
        firsts = sorted(seconds for when, seconds in self._firsts if when > now - _SECONDS)
        prompts = sum(each.cached + each.computed for each in minute)
        generated = sum(each.generated for each in minute)
        steps = sum(each.steps for each in minute)
        num_waiting = sum(each.cached is None for each in self._open.values())
        return {
            "uptime": now - self._started,
            "generated": sum(each.generated for each in latest),
            "prefill": sum(each.computed for each in latest),
            "series": _series(minute, span),
            "first_token": {"p50": _quantile(firsts, 0.5), "p99": _quantile(firsts, 0.99), "requests": len(firsts)},
            "hit_rate": sum(each.cached for each in minute) / prompts if prompts else None,
            "drafted_share": sum(each.accepted for each in minute) / generated if generated else None,
            "tokens_a_step": sum(each.stepped for each in minute) / steps if steps else None,
            "waiting": num_waiting,
            "running": len(self._open) - num_waiting,
            "requests": [_row(each, now) for each in self._open.values() if each.shown],
        }

    def _counted(self, now: float) -> _Counts:
        span = int(now / _SPAN)
        if not self._counts or self._counts[-1].span != span:
            self._counts.append(_Counts(span))
        return self._counts[-1]


class Listener:
    """Text for one page since its last reading: of a few requests, the end of each. `close` may be called twice."""

    def __init__(self, token_bytes: Callable[[int], bytes] | None, listeners: list[Listener]) -> None:
        self._token_bytes = token_bytes
        self._listeners = listeners
        self._outputs: dict[str, deque[StepOutput]] = {}
        self._sizes: dict[str, int] = {}

    def take(self, output: StepOutput) -> None:
        name = output.request_id
        if self._token_bytes is None or not output.text:
            return
        if name not in self._outputs:
            if len(self._outputs) >= 2 * _MOST_SHOWN:  # the shown ones, and those that ended since
                return
            self._outputs[name], self._sizes[name] = deque(), 0
        outputs = self._outputs[name]
        outputs.append(output)
        self._sizes[name] += len(output.text)
        while self._sizes[name] - len(outputs[0].text) >= _MOST_CHARACTERS:
            self._sizes[name] -= len(outputs.popleft().text)

    def read(self) -> dict[str, list[tuple[str, bool]]]:
        """By request the text that came, in parts, each with whether it was drafted."""
        if self._token_bytes is None:
            return {}
        taken, self._outputs, self._sizes = self._outputs, {}, {}
        return {name: _joined(outputs, self._token_bytes) for name, outputs in taken.items()}

    def close(self) -> None:
        if self in self._listeners:
            self._listeners.remove(self)


def drafted_parts(output: StepOutput, token_bytes: Callable[[int], bytes]) -> list[tuple[str, bool]]:
    """An output's text in parts, each with whether it was drafted: first what was, then what was not.

    Where text was held back (half a character, what may be a stop string) the cut is at the nearest whole character of
    the tokens that were not drafted.
    """
    own = output.tokens[output.accepted.count(True) :]
    if len(own) == len(output.tokens):
        parts = [(output.text, False)]
    else:
        tail = b"".join(token_bytes(token) for token in own).decode("utf-8", "ignore")
        size = next(size for size in range(len(tail), -1, -1) if output.text.endswith(tail[:size]))
        cut = len(output.text) - size
        parts = [(output.text[:cut], True), (output.text[cut:], False)]
    return [part for part in parts if part[0]]


def _joined(outputs: Iterable[StepOutput], token_bytes: Callable[[int], bytes]) -> list[tuple[str, bool]]:
    """All outputs' parts, neighbours of one kind made one."""
    result: list[tuple[str, bool]] = []
    for output in outputs:
        for text, drafted in drafted_parts(output, token_bytes):
            if result and result[-1][1] is drafted:
                result[-1] = (result[-1][0] + text, drafted)
            else:
                result.append((text, drafted))
    return result


def _series(minute: list[_Counts], span: int) -> dict[str, list[int]]:
    """Tokens by second, oldest first, the last second ending with the last whole span."""
    series = {"generated": [0] * _SECONDS, "accepted": [0] * _SECONDS, "prefill": [0] * _SECONDS}
    for each in minute:
        second = _SECONDS - 1 - (span - 1 - each.span) // _SPANS_A_SECOND
        if 0 <= second < _SECONDS:
            series["generated"][second] += each.generated
            series["accepted"][second] += each.accepted
            series["prefill"][second] += each.computed
    return series


def _quantile(values: list[float], share: float) -> float | None:
    """The smallest of the sorted values that at least `share` of them do not exceed."""
    return values[max(0, math.ceil(share * len(values)) - 1)] if values else None


def _row(one: _Open, now: float) -> dict[str, Any]:
    return {
        "id": one.stream.name,
        "age": now - one.stream.started,
        "prompt": len(one.stream.request.prompt),
        "cached": one.cached,
        "output": one.generated,
        "accepted": one.accepted,
    }
