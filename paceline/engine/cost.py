"""What a step costs, by how many queries it has, and a prompt's chunk: learned from the steps themselves."""

from __future__ import annotations

import bisect
import math

_WEIGHT = 0.3  # of a new measurement
_LEAST_CHUNK = 32  # tokens: fewer take hardly less time
_MARGINAL = 0.02  # a further query's cost over a single query's, before anything is known


class StepCost:
    """Seconds of a step of n queries, interpolated between measured counts."""

    def __init__(self) -> None:
        self._counts: list[int] = []
        self._seconds: list[float] = []

    def add(self, queries: int, seconds: float) -> None:
        """Learns one step. Counts within an eighth of each other share an entry."""
        index = bisect.bisect_left(self._counts, queries)
        for near in (index - 1, index):
            if 0 <= near < len(self._counts) and abs(self._counts[near] - queries) * 8 <= queries:
                self._seconds[near] += _WEIGHT * (seconds - self._seconds[near])
                return
        self._counts.insert(index, queries)
        self._seconds.insert(index, seconds)

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
    """Seconds of a chunk of prompts, at most. A token at position p counts as 1 + p / `even`, its load.

    `even` is the context at which attention over it takes as many operations as the weights do. So a chunk of more load
    takes no more than proportionally longer: one measurement says something of all sizes, and one that was slow by chance
    is outweighed by others.
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
        """What the tokens `start:end` of a prompt count."""
        return (end - start) * (1 + (start + end) / 2 / self._even)

    def affordable(self, largest: int, start: int, seconds: float) -> int:
        """The most tokens from `start` on that take no longer than `seconds`: `largest`, sixteenths of it, or halves of one.

        Where even few take longer it is few.
        """
        least = min(largest, _LEAST_CHUNK)
        step = max(least, largest // 16)
        halves = (step >> shift for shift in range(1, step.bit_length()))
        sizes = (largest, *range((largest - 1) // step * step, step - 1, -step), *halves)
        fits = (size for size in sizes if self._most(self.load(start, start + size)) <= seconds)
        return max(next(fits, least), least)

    def _most(self, load: float) -> float:
        """The seconds that a chunk of `load` takes at most, if half of it takes half at the least; infinite before anything is
        known.
        """
        ratios = ((load / seen, seconds) for seen, seconds in self._seen.values())
        bounds = (seconds * (ratio if ratio > 1 else min(1.0, 2 * ratio)) for ratio, seconds in ratios)
        return min(bounds, default=math.inf)
