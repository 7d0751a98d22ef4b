"""The status page's data: statistics of the last minute, and the open requests with their text as it streams.

Statistics are always counted, at the cost of a few additions each step. Text is kept only for listeners that request it,
until they read it.
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

_BUCKET_SECONDS = 0.25  # time resolution of the statistics
_BUCKETS_PER_SECOND = 4
_HISTORY_SECONDS = 60  # length of the statistics
MAX_SHOWN = 16  # requests on the page
MAX_CHARACTERS = 2000  # bounds the text kept for one request between two reads
MAX_LISTENERS = 8  # bounds the open status pages


@dataclass(slots=True)
class _Bucket:
    """Counts of one time bucket. `steps` leave out each request's first output; `stepped` are the tokens of `steps`."""

    span: int
    generated: int = 0
    accepted: int = 0
    steps: int = 0
    stepped: int = 0
    computed: int = 0
    cached: int = 0


@dataclass(slots=True)
class _OpenRequest:
    """An open request. `cached`, its prompt tokens found in the prefix cache, is None until its first output."""

    stream: Stream
    shown: bool
    generated: int = 0
    accepted: int = 0
    cached: int | None = None


class LiveStats:
    """An Observer of a host's streams that keeps the status page's data."""

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self._open: dict[str, _OpenRequest] = {}
        self._counts: deque[_Bucket] = deque(maxlen=_HISTORY_SECONDS * _BUCKETS_PER_SECOND)
        self._firsts: deque[tuple[float, float]] = deque(maxlen=10_000)  # (time, seconds to first token)
        self.listeners: list[PageListener] = []
        self._num_shown = 0

    def opened(self, stream: Stream) -> None:
        self._open[stream.name] = _OpenRequest(stream, self._num_shown < MAX_SHOWN)
        self._num_shown = min(self._num_shown + 1, MAX_SHOWN)

    def output(self, stream: Stream, output: StepOutput) -> None:
        now = time.perf_counter()
        counts = self._current_bucket(now)
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
            for listener in self.listeners:
                listener.add(output)

    def closed(self, stream: Stream, finished: bool) -> None:
        """Removes a request. If it was shown, the oldest request that was not takes its place on the page."""
        if not self._open.pop(stream.name).shown:
            return
        follows = next((each for each in self._open.values() if not each.shown), None)
        if follows is not None:
            follows.shown = True
        else:
            self._num_shown -= 1

    def listen(self, token_bytes: Callable[[int], bytes] | None) -> PageListener:
        """Registers a listener for text from now on; without `token_bytes` it receives no text.

        Raises Overloaded if MAX_LISTENERS are registered.
        """
        if len(self.listeners) >= MAX_LISTENERS:
            raise Overloaded(f"{len(self.listeners)} status pages are open already", retry_after=10)
        listener = PageListener(token_bytes, self.listeners)
        self.listeners.append(listener)
        return listener

    def state(self) -> dict[str, Any]:
        """The page's statistics: rates per second, times in seconds, shares from 0 to 1, None without any data."""
        now = time.perf_counter()
        span = int(now / _BUCKET_SECONDS)
        minute = [each for each in self._counts if each.span > span - _HISTORY_SECONDS * _BUCKETS_PER_SECOND]
        latest = [each for each in minute if span - _BUCKETS_PER_SECOND <= each.span < span]
        firsts = sorted(seconds for when, seconds in self._firsts if when > now - _HISTORY_SECONDS)
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
            "requests": [_request_row(each, now) for each in self._open.values() if each.shown],
        }

    def _current_bucket(self, now: float) -> _Bucket:
        span = int(now / _BUCKET_SECONDS)
        if not self._counts or self._counts[-1].span != span:
            self._counts.append(_Bucket(span))
        return self._counts[-1]


class PageListener:
    """Collects text for one page between two reads: of the shown requests, the last characters of each.

    `close` may be called more than once.
    """

    def __init__(self, token_bytes: Callable[[int], bytes] | None, listeners: list[PageListener]) -> None:
        self._token_bytes = token_bytes
        self.listeners = listeners
        self._outputs: dict[str, deque[StepOutput]] = {}
        self._sizes: dict[str, int] = {}

    def add(self, output: StepOutput) -> None:
        name = output.request_id
        if self._token_bytes is None or not output.text:
            return
        if name not in self._outputs:
            if len(self._outputs) >= 2 * MAX_SHOWN:  # the shown requests, and those that ended since the last read
                return
            self._outputs[name], self._sizes[name] = deque(), 0
        outputs = self._outputs[name]
        outputs.append(output)
        self._sizes[name] += len(output.text)
        while self._sizes[name] - len(outputs[0].text) >= MAX_CHARACTERS:
            self._sizes[name] -= len(outputs.popleft().text)

    def read(self) -> dict[str, list[tuple[str, bool]]]:
        """The text since the last read by request id, in parts: (text, whether it was drafted)."""
        if self._token_bytes is None:
            return {}
        outputs_by_request, self._outputs, self._sizes = self._outputs, {}, {}
        return {name: _merged_parts(outputs, self._token_bytes) for name, outputs in outputs_by_request.items()}

    def close(self) -> None:
        if self in self.listeners:
            self.listeners.remove(self)


def drafted_parts(output: StepOutput, token_bytes: Callable[[int], bytes]) -> list[tuple[str, bool]]:
    """An output's text in at most two parts, (text, whether it was drafted): drafted text comes first.

    If text was buffered (half a character, the beginning of a possible stop string), the split is at the nearest
    character boundary of the tokens that were not drafted.
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


def _merged_parts(outputs: Iterable[StepOutput], token_bytes: Callable[[int], bytes]) -> list[tuple[str, bool]]:
    """The parts of all outputs, with adjacent parts of the same kind merged."""
    result: list[tuple[str, bool]] = []
    for output in outputs:
        for text, drafted in drafted_parts(output, token_bytes):
            if result and result[-1][1] is drafted:
                result[-1] = (result[-1][0] + text, drafted)
            else:
                result.append((text, drafted))
    return result


def _series(minute: list[_Bucket], span: int) -> dict[str, list[int]]:
    """Tokens by second, oldest first. The last second ends with the last complete bucket."""
    series = {
        "generated": [0] * _HISTORY_SECONDS,
        "accepted": [0] * _HISTORY_SECONDS,
        "prefill": [0] * _HISTORY_SECONDS,
    }
    for each in minute:
        second = _HISTORY_SECONDS - 1 - (span - 1 - each.span) // _BUCKETS_PER_SECOND
        if 0 <= second < _HISTORY_SECONDS:
            series["generated"][second] += each.generated
            series["accepted"][second] += each.accepted
            series["prefill"][second] += each.computed
    return series


def _quantile(values: list[float], share: float) -> float | None:
    """The quantile `share` of sorted `values`: the smallest value that at least `share` of them do not exceed."""
    return values[max(0, math.ceil(share * len(values)) - 1)] if values else None


def _request_row(one: _OpenRequest, now: float) -> dict[str, Any]:
    return {
        "id": one.stream.name,
        "age": now - one.stream.started,
        "prompt": len(one.stream.request.prompt),
        "cached": one.cached,
        "output": one.generated,
        "accepted": one.accepted,
    }
