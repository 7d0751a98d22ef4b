"""Measured costs: seconds of a step by its number of queries, and seconds of a prefill chunk by its tokens."""

from __future__ import annotations

import bisect
import math

_WEIGHT = 0.3  # of a new measurement in the moving average
_MIN_CHUNK = 32  # tokens: a chunk has at least this many, whatever the bound (python -m benchmarks.stalls)
_MARGINAL = 0.02  # cost of one more query over that of the first, before anything is measured


class StepCost:
    """Seconds of a step of n queries, interpolated between measured counts."""

    def __init__(self) -> None:
        self._counts: list[int] = []
        self._seconds: list[float] = []
        self._first: set[int] = set()  # counts that were measured once

    def add(self, queries: int, seconds: float) -> None:
        """Learns one step. Counts within an eighth of each other share an entry.

        A first step may take several times as long as the next: it makes what the others find. So the second one replaces it
        where it took less.
        """
        index = bisect.bisect_left(self._counts, queries)
        for near in (index - 1, index):
            if 0 <= near < len(self._counts) and abs(self._counts[near] - queries) * 8 <= queries:
                before, count = self._seconds[near], self._counts[near]
                is_second = count in self._first
                self._first.discard(count)
                self._seconds[near] = (
                    seconds if is_second and seconds < before else before + _WEIGHT * (seconds - before)
                )
                return
        self._counts.insert(index, queries)
        self._seconds.insert(index, seconds)
        self._first.add(queries)

    def __call__(self, queries: int) -> float:
        counts, seconds = self._counts, self._seconds
        if not counts:
            return 1 + _MARGINAL * queries
        if len(counts) == 1:
            return seconds[0] * (1 + _MARGINAL * queries) / (1 + _MARGINAL * counts[0])
        index = min(max(bisect.bisect_left(counts, queries), 1), len(counts) - 1)
        low, high = index - 1, index
        slope = max(0.0, (seconds[high] - seconds[low]) / (counts[high] - counts[low]))
        return max(seconds[low] + slope * (queries - counts[low]), 0.5 * seconds[0])


class ChunkCost:
    """An upper bound of the seconds of a prefill chunk, from the chunks measured so far.

    The load of a token at position p is 1 + p / `even`; `even` is the context length at which attention takes as many
    operations as the weights do. Seconds grow at most in proportion to the load, so every measurement bounds the cost of
    all sizes. The least of these bounds counts, so one slow measurement does not shrink later chunks.
    """

    def __init__(self, even: float) -> None:
        self._even = even
        self._seen: dict[int, tuple[float, float]] = {}

    def add(self, ranges: list[tuple[int, int]], seconds: float) -> None:
        """Learns a chunk of the tokens `start:end` of one or several prompts. Loads within an octave share an entry."""
        load = sum(self.load(*each) for each in ranges)
        octave = int(math.log2(load))
        old_load, old_seconds = self._seen.get(octave, (load, seconds))
        self._seen[octave] = (
            old_load + _WEIGHT * (load - old_load),
            old_seconds + _WEIGHT * (seconds - old_seconds),
        )

    def load(self, start: int, end: int) -> float:
        """The load of the tokens `start:end` of a prompt."""
        return (end - start) * (1 + (start + end) / 2 / self._even)

    def affordable(self, largest: int, start: int, seconds: float) -> int:
        """The chunk size, from position `start` on, that takes at most `seconds` by the bound: `largest`, a multiple of its
        sixteenth, or a sixteenth halved. `_MIN_CHUNK` tokens (or `largest`, if less) where no size does.
        """
        least = min(largest, _MIN_CHUNK)
        step = max(least, largest // 16)
        halves = (step >> shift for shift in range(1, step.bit_length()))
        sizes = (largest, *range((largest - 1) // step * step, step - 1, -step), *halves)
        fits = (size for size in sizes if self._most(self.load(start, start + size)) <= seconds)
        return max(next(fits, least), least)

    def _most(self, load: float) -> float:
        """The least bound for a chunk of `load`; infinite before anything is measured.

        A measured chunk of more load bounds it too: by the chunk's seconds, or by twice its share of them if that is less.
        """
        ratios = ((load / seen, seconds) for seen, seconds in self._seen.values())
        bounds = (seconds * (ratio if ratio > 1 else min(1.0, 2 * ratio)) for ratio, seconds in ratios)
        return min(bounds, default=math.inf)
