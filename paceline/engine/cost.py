"""What a step costs, by how many queries it has: learned from the steps themselves."""

from __future__ import annotations

import bisect

_WEIGHT = 0.3  # of a new measurement
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
